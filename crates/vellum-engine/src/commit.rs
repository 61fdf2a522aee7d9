//! A container's writable layer becomes a layer of a new image; the container goes on.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::device::{PREPARE_SEAL, SEAL_TOP, SealTop, Target, forget_ext4_journal};
use super::lock_container;
use super::mount_point::mounted;
use super::teardown::{refuse_halted, take_over};
use super::template;
use super::temporary::{TemporaryMount, is_clean};
use super::wire::encode;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::layer::{SealedLayer, seal_in_place};
use vellum_export::device::control;
use vellum_fs::freeze;
use vellum_image::HistoryEntry;
use vellum_store::{ContainerRecord, ImageRecord, Store, now};

/// A frozen file system thaws by itself after this long, whatever happens to us.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long the server may take to flush, and to seal.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(120);
const SEAL_TIMEOUT: Duration = Duration::from_secs(8);

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
/// [`ErrorKind::AlreadyExists`] for the image's name; [`ErrorKind::InUse`] while an NBD server has
/// the container. The container is as before, or goes on with one layer more below it.
pub fn commit(
    store: &Store,
    name: &str,
    image: &str,
    comment: Option<&str>,
) -> Result<CommitReport> {
    store.check_new_image(image)?;
    let container = store.container(name)?;
    let _busy = lock_container(store, &container)?;
    let pin = store.pin_layers()?;
    refuse_halted(&store.run_dir(&container), name)?;
    take_over(store, &container)?;
    let mount = mounted(store, &container)?;
    match &mount {
        // Most of the writing happens before anybody has to wait.
        Some(mount) => {
            sync_file_system(&mount.dir)?;
            control::call(
                &store.run_dir(&container),
                "flush",
                Value::Null,
                FLUSH_TIMEOUT,
            )?;
        }
        // After a crash its journal may want replaying, which an image's readers cannot do. Otherwise
        // it is not mounted, which would only write to it.
        None if container.fs.is_some() => {
            let clean = is_clean(&Target::Look(name.to_owned()).open(store)?);
            if !clean {
                TemporaryMount::new(store, &Target::Container(name.to_owned()))?.end()?;
            }
        }
        None => {}
    }
    interrupt::check()?;
    // From here on it comes to its end, whatever signal comes: undoing it would take as long.
    let _held = interrupt::hold();
    let (record, prepared) = store.prepare_commit(name, &pin)?;
    let next = record
        .next
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "a commit without a next layer"))?;
    let frozen_seconds = match &mount {
        Some(mount) => Some(seal_frozen(&store.run_dir(&record), &mount.dir, next)?),
        None => {
            let open = Target::Container(name.to_owned()).open(store)?;
            forget_ext4_journal(&open)?;
            open.seal_top(next)?;
            None
        }
    };
    let settled = store.settle(name)?;
    let layer = prepared.top;
    let storage = &**store.storage();
    let dir = store.layer_dir(layer);
    seal_in_place(storage, &dir, |_| {})?;
    let bytes = SealedLayer::open(storage, &dir)?.data_blocks().bytes();
    let mut info = store.layer_info(layer)?;
    info.origin = format!("vellum commit {name}");
    info.bytes = bytes;
    store.set_layer_info(layer, &info)?;
    let image = image_record(store, &settled, image, comment);
    store.put_image(&image, &pin)?;
    Ok(CommitReport {
        image,
        layer,
        bytes,
        frozen_seconds,
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
        virtual_size: container.virtual_size,
        device_size: container.device_size,
        fs: container.fs.clone(),
        holds: container.holds.clone(),
        config,
        created: now(),
    }
}

/// Freezes, seals, thaws. Returns the seconds in between.
///
/// What can be done before the freeze is: `next` is opened, and what was written is made durable,
/// so that the freeze itself finds little to write. In between are the last flush and the seal.
pub fn seal_frozen(run_dir: &Path, dir: &Path, next: Uuid) -> Result<f64> {
    let args = encode(&SealTop { next })?;
    sync_file_system(dir)?;
    match control::call(run_dir, PREPARE_SEAL, args.clone(), FLUSH_TIMEOUT) {
        // A server of an older version does it all at the seal.
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        other => drop(other?),
    }
    crash_point::here("commit: synced");
    let frozen = freeze::freeze(dir, FREEZE_LIMIT)?;
    let since = frozen.since();
    let flushed = since.elapsed();
    crash_point::here("commit: frozen");
    let sealed = control::call(run_dir, SEAL_TOP, args, SEAL_TIMEOUT);
    let after_seal = since.elapsed();
    crash_point::here("commit: sealed under users");
    let thawed = frozen.thaw();
    crash_point::here("commit: thawed");
    tracing::debug!(
        freeze_ms = flushed.as_secs_f64() * 1e3,
        seal_ms = (after_seal - flushed).as_secs_f64() * 1e3,
        "frozen"
    );
    sealed?;
    Ok(thawed?.as_secs_f64())
}

/// syncfs(2) of the file system at `dir`.
pub fn sync_file_system(dir: &Path) -> Result<()> {
    let file = std::fs::File::open(dir).context(|| format!("cannot open {}", dir.display()))?;
    nix::unistd::syncfs(&file).context(|| format!("cannot sync {}", dir.display()))
}
