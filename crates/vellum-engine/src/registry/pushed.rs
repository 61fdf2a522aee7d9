//! Where the blocks of layers can be had again that were pushed. docs/lazy.md, "Healing".

use uuid::Uuid;

use super::super::lazy::Remote;
use super::layout::Layout;
use vellum_base::error::Result;
use vellum_registry::Access;
use vellum_registry::artifact::LayerKey;
use vellum_store::Store;

/// A layer whose blobs lie in a layout.
pub(super) struct PushedLayer {
    pub layer: Uuid,
    /// The digest of its table.
    pub table: String,
    /// The digest of its data; none where it has none.
    pub data: Option<String>,
    /// Its key, if it is encrypted.
    pub key: Option<LayerKey>,
}

/// Notes beside layers that all of them are in that place. Without it they are there all the same, and nobody asks for
/// them.
pub(super) fn note(
    store: &Store,
    layout: &Layout,
    layers: &[PushedLayer],
    reference: &str,
    access: Access,
) {
    for pushed in layers {
        let noted = || -> Result<()> {
            let remote = Remote {
                reference: reference.to_owned(),
                plain_http: access.plain_http,
                table: pushed.table.clone(),
                data: pushed.data.clone(),
                background: None,
                keep: false,
            };
            let table = layout.read(&pushed.table)?;
            let dir = store.layer_dir(pushed.layer);
            let _guard = store.lock()?;
            remote.note_push(&**store.storage(), &dir, (&table, pushed.key.as_ref()))
        };
        if let Err(error) = noted() {
            tracing::warn!(layer = %pushed.layer, "where the layer is now is not noted: {error}");
        }
    }
}
