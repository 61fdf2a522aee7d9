//! A container's writable layer becomes a layer of a new image; the container goes on.

use serde::Serialize;
use uuid::Uuid;

use super::complete::complete_layer;
use super::lock_container;
use super::seal::{How, seal_container};
use super::template;
use vellum_base::error::Result;
use vellum_image::HistoryEntry;
use vellum_store::{ContainerRecord, ImageRecord, Store, now};

/// What a commit made, and for how long the container's writers waited.
#[derive(Debug, Clone, Serialize)]
pub struct CommitReport {
    /// The new image.
    pub image: ImageRecord,
    /// The layer that was the container's.
    pub layer: Uuid,
    /// Bytes of its data blocks.
    pub bytes: u64,
    /// Seconds from freeze to thaw; `None` for a container that was not mounted.
    pub frozen_seconds: Option<f64>,
}

/// Seals the writable layer of the container `name` as the top layer of a new image. A mounted
/// container is frozen for a moment, so that the image's file system is whole, and goes on.
///
/// # Errors
/// [`vellum_base::ErrorKind::AlreadyExists`] for the image's name; [`vellum_base::ErrorKind::InUse`] while an NBD server has
/// the container. The container is as before, or goes on with one layer more below it.
pub fn commit(
    store: &Store,
    name: &str,
    image: &str,
    comment: Option<&str>,
) -> Result<CommitReport> {
    store.check_new_image(image)?;
    let (container, _busy) = lock_container(store, &store.container(name)?)?;
    let pin = store.pin_layers()?;
    let sealing = seal_container(store, &container, How::Frozen, None, &pin)?;
    let layer = sealing.layer;
    complete_layer(store, layer)?;
    let mut info = store.layer_info(layer)?;
    info.origin = format!("vellum commit {name}");
    store.set_layer_info(layer, &info)?;
    let image = image_record(store, &sealing.container, image, comment);
    store.put_image(&image, &pin)?;
    Ok(CommitReport {
        image,
        layer,
        bytes: info.bytes,
        frozen_seconds: sealing.waited.map(|waited| waited.as_secs_f64()),
    })
}

fn image_record(
    store: &Store,
    container: &ContainerRecord,
    image: &str,
    comment: Option<&str>,
) -> ImageRecord {
    let mut config = container.config.clone();
    // Each layer below the new one has its step, also those of earlier commits.
    let own = template::count(store, &container.layers) + 1;
    config.settle_history(container.layers.len().saturating_sub(own));
    config.history.push(HistoryEntry {
        created: Some(now()),
        created_by: Some(format!("vellum commit {}", container.name)),
        comment: comment.map(str::to_owned),
        ..HistoryEntry::default()
    });
    ImageRecord {
        name: image.to_owned(),
        id: Uuid::new_v4(),
        layers: container.layers.clone(),
        disk: container.disk.clone(),
        config,
        created: now(),
    }
}
