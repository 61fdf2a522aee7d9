//! Chains as NBD exports.

use std::sync::Arc;

use super::device::{OpenChain, Target};
use crate::error::Result;
use crate::export::nbd::Export;
use crate::store::Store;

/// The export of a container (writable) or an image (read-only) under its name. The returned chain
/// is closed in order when it is dropped, after the server's shutdown.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`] for a name that is neither; [`crate::ErrorKind::InUse`] while the
/// container is mounted or served.
pub fn export(store: &Store, name: &str, read_only: bool) -> Result<(Export, OpenChain)> {
    let target = match store.container(name) {
        Ok(_) => Target::Container(name.to_owned()),
        Err(no_container) => match store
            .image(name)
            .ok()
            .and_then(|i| i.layers.last().copied())
        {
            Some(top) => Target::Sealed(top),
            None => return Err(no_container),
        },
    };
    let open = target.open(store)?;
    let device = Arc::clone(open.chain());
    let mut export = Export::new(name, device);
    export.read_only = read_only;
    Ok((export, open))
}
