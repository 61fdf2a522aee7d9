//! What a layer gets once it is sealed and nobody waits for it any more: its size in its description, and
//! its checksums. A server does that for what it sealed itself, a command for the rest.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use vellum_base::block::Blocks;
use vellum_base::error::{ErrorKind, Result};
use vellum_base::interrupt;
use vellum_core::layer::{SealedLayer, WritableLayer, seal_in_place};
use vellum_store::{LayerInfo, LayerLease, StagedLayer, Store, StoreGuard};

/// How often it is looked whether another process has given a layer its checksums.
const LEASE_PAUSE: Duration = Duration::from_millis(20);

/// Gives a sealed layer its size in its description and then its checksums, by which a later start tells
/// that it is done.
///
/// # Errors
/// As [`count_layer`] and [`checksum_layer`].
pub fn complete_layer(store: &Store, layer: Uuid) -> Result<()> {
    count_layer(store, layer)?;
    checksum_layer(store, layer, |_| {})
}

/// Gives a sealed layer its checksums. Where another process is at that, waits for it. `progress` is called
/// with the number of blocks just read.
///
/// # Errors
/// As [`seal_in_place`]: the layer stays readable as it was. [`ErrorKind::NotFound`] where it is gone.
pub(super) fn checksum_layer(
    store: &Store,
    layer: Uuid,
    progress: impl FnMut(Blocks),
) -> Result<()> {
    let _lease = wait_for_lease(store, layer)?;
    seal_in_place(&**store.storage(), &store.layer_dir(layer), progress).map(drop)
}

/// Nobody writes a sealed layer: whoever has its lease gives it checksums, or looks whether somebody does.
fn wait_for_lease(store: &Store, layer: Uuid) -> Result<LayerLease> {
    loop {
        match store.lease_layer(layer) {
            Err(error) if error.kind() == ErrorKind::InUse => interrupt::check()?,
            other => return other,
        }
        std::thread::sleep(LEASE_PAUSE);
    }
}

/// Notes in a sealed layer's description what it holds. One whose description is lost gets another.
///
/// # Errors
/// Where the layer cannot be read or the description written.
pub fn count_layer(store: &Store, layer: Uuid) -> Result<()> {
    let sealed = SealedLayer::open(&**store.storage(), &store.layer_dir(layer))?;
    let mut info = store.layer_info(layer).unwrap_or_else(|_| LayerInfo {
        origin: "unknown: its info.json was lost".into(),
        ..LayerInfo::default()
    });
    info.bytes = sealed.data_blocks().bytes();
    store.set_layer_info(layer, &info)
}

/// Seals a layer that is complete, gives it checksums and publishes it.
pub(super) fn finish_layer(
    staged: StagedLayer,
    layer: Arc<WritableLayer>,
    mut info: LayerInfo,
    pin: &StoreGuard,
) -> Result<Uuid> {
    info.bytes = layer.data_blocks().bytes();
    let storage = layer.storage_handle();
    layer.seal()?;
    drop(layer);
    seal_in_place(&*storage, &staged.dir(), |_| {})?;
    staged.publish(&info, pin)
}
