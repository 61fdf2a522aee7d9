//! Layers that commands write in `staging`, run by run.

use std::sync::Arc;

use vellum_base::block::{BlockState, Run};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::{LayerOptions, WritableLayer, seal_in_place};
use vellum_store::{StagedLayer, Store};

use super::space::follow_policy;

/// Opens a staged layer, to be written. It leaves free what the store's policy says, as containers do.
///
/// # Errors
/// As [`WritableLayer::open`].
pub(super) fn open_staged(store: &Store, staged: &StagedLayer) -> Result<Arc<WritableLayer>> {
    let storage = store.storage().clone();
    let layer = WritableLayer::open(storage, &staged.dir(), LayerOptions::default())?;
    follow_policy(store, &layer);
    Ok(layer)
}

/// Has a layer say of blocks what a run says; `bytes` are theirs where they are data.
///
/// # Errors
/// As [`WritableLayer::write_blocks`] and [`WritableLayer::clear_blocks`].
pub(super) fn write_run(layer: &WritableLayer, run: Run<BlockState>, bytes: &[u8]) -> Result<()> {
    let held = layer.lock_blocks(run.span)?;
    match run.value {
        BlockState::Data => layer.write_blocks(&held, run.start(), bytes).map(drop),
        state => layer.clear_blocks(&held, run.span, state),
    }
}

/// Seals a staged layer that came from elsewhere, and makes sure that it is the one that it was there.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where its blocks have another digest.
pub(super) fn seal_as(
    store: &Store,
    staged: &StagedLayer,
    layer: Arc<WritableLayer>,
    digest: &[u8; 32],
) -> Result<()> {
    layer.seal()?;
    drop(layer);
    let found = seal_in_place(&**store.storage(), &staged.dir(), |_| {})?;
    if found == *digest {
        return Ok(());
    }
    let uuid = staged.header.uuid;
    let text = format!("the blocks of the layer {uuid} do not match its digest (SHA-256)");
    Err(Error::new(ErrorKind::Corrupt, text))
}
