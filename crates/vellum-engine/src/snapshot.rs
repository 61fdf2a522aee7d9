//! Moments of a container: kept as snapshots, made containers of, gone back to. docs/snapshots.md.

use serde::Serialize;
use uuid::Uuid;

use super::complete::{checksum_layer, count_layer};
use super::lock_container;
use super::mount_point::mounted;
use super::retention::{Retention, Verdict, judge};
use super::seal::{How, Sealing, seal_container};
use super::teardown::{take_over, umount_locked};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_base::moment::unix_time;
use vellum_store::{
    Consistency, ContainerRecord, ContainerSnapshot, Fork, LayerInfo, PruneReport, Store,
    StoreGuard, VolumeMount, now,
};

/// A snapshot that was taken, and for how long the container's writers waited.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotReport {
    /// The container.
    pub container: String,
    /// The snapshot.
    pub snapshot: ContainerSnapshot,
    /// Seconds; `None` where nobody could write.
    pub waited_seconds: Option<f64>,
}

/// Takes a snapshot of the container `name`, called `snapshot` or after the time.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for the snapshot's name; [`ErrorKind::InUse`] while an NBD server has the
/// container. The container is as before, or goes on with one layer more below it.
pub fn snapshot(
    store: &Store,
    name: &str,
    snapshot: Option<&str>,
    how: How,
    comment: Option<&str>,
) -> Result<SnapshotReport> {
    let (_, _busy) = lock_container(store, &store.container(name)?)?;
    let pin = store.pin_layers()?;
    let container = store.settle(name)?;
    let called = match snapshot {
        Some(snapshot) => snapshot.to_owned(),
        None => container.free_snapshot_name(&time_name()),
    };
    keep(store, &container, &called, how, comment, &pin)
}

/// Takes a snapshot of that name of a container that the caller has locked.
fn keep(
    store: &Store,
    container: &ContainerRecord,
    called: &str,
    how: How,
    comment: Option<&str>,
    pin: &StoreGuard,
) -> Result<SnapshotReport> {
    let mut wanted = container.new_snapshot(called, Consistency::Crash)?;
    wanted.comment = comment.map(str::to_owned);
    let sealing = seal_container(store, container, how, Some(wanted), pin)?;
    let kept = sealing.container.snapshot(called)?.clone();
    describe(
        store,
        &sealing,
        &format!("vellum snapshot {}@{called}", container.name),
    )?;
    let bytes = own_bytes(store, &kept, sealing.layer)?;
    store.count_snapshot(&container.name, kept.id, bytes)?;
    Ok(SnapshotReport {
        container: container.name.clone(),
        snapshot: ContainerSnapshot { bytes, ..kept },
        waited_seconds: sealing.waited.map(|waited| waited.as_secs_f64()),
    })
}

/// Bytes of data that the container wrote since the snapshot before; of the first, in the layer that was
/// sealed for it: what lies below may be an image's.
fn own_bytes(store: &Store, kept: &ContainerSnapshot, sealed: Uuid) -> Result<u64> {
    let own: &[Uuid] = match kept.parent {
        Some(_) => &kept.layers,
        None => &[sealed],
    };
    own.iter()
        .map(|layer| Ok(store.layer_info(*layer)?.bytes))
        .sum()
}

/// Notes what snapshots hold whose command was killed before it could.
///
/// # Errors
/// Where a layer's description cannot be read, or the record written.
pub(super) fn recount(store: &Store, container: &ContainerRecord) -> Result<()> {
    for snapshot in container.snapshots.iter().filter(|kept| kept.bytes == 0) {
        let Some(top) = snapshot.layers.last() else {
            continue;
        };
        let bytes = own_bytes(store, snapshot, *top)?;
        if bytes > 0 {
            store.count_snapshot(&container.name, snapshot.id, bytes)?;
        }
    }
    Ok(())
}

/// Notes where a sealed layer comes from and what it holds, and sees to its checksums.
fn describe(store: &Store, sealing: &Sealing, what: &str) -> Result<()> {
    let layer = sealing.layer;
    count_layer(store, layer)?;
    let mut info = store.layer_info(layer)?;
    info.origin = what.to_owned();
    store.set_layer_info(layer, &info)?;
    match sealing.served {
        // Its server makes them, and nobody waits.
        true => Ok(()),
        false => checksum_layer(store, layer, |_| {}),
    }
}

/// What a new container's volumes are where the origin has some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkVolumes {
    /// Nobody said: refused where the origin may write one.
    Ask,
    /// The origin's.
    Share,
    /// None.
    None,
}

/// Containers made of a moment of another.
#[derive(Debug, Clone, Serialize)]
pub struct ForkReport {
    /// The new containers.
    pub containers: Vec<ContainerRecord>,
    /// Seconds that the origin's writers waited; `None` where nobody could write, or the moment was a
    /// snapshot's.
    pub waited_seconds: Option<f64>,
}

/// Makes containers called `names` of the container `name`, as it is or was at the snapshot `from`.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for a name; [`ErrorKind::InvalidInput`] where the origin may write volumes
/// and nobody said what becomes of them; as [`snapshot`] and [`Store::check_space_for`].
pub fn fork(
    store: &Store,
    name: &str,
    names: &[String],
    from: Option<&str>,
    volumes: ForkVolumes,
) -> Result<ForkReport> {
    let container = store.container(name)?;
    let volumes = fork_volumes(&container, volumes)?;
    store.check_space_for("fork")?;
    let _busy = lock_container(store, &container)?;
    let pin = store.pin_layers()?;
    let container = store.settle(name)?;
    store.check_new_containers(names)?;
    let (fork, waited) = match from {
        Some(from) => {
            let kept = container.snapshot(from)?.clone();
            (Fork::of_snapshot(container, &kept, volumes)?, None)
        }
        None => {
            let sealing = seal_container(store, &container, How::Crash, None, &pin)?;
            describe(store, &sealing, &format!("vellum fork {name}"))?;
            (
                Fork::of_container(sealing.container, volumes),
                sealing.waited,
            )
        }
    };
    crash_point::here("fork: sealed");
    Ok(ForkReport {
        containers: store.create_forks(&fork, names, &pin)?,
        waited_seconds: waited.map(|waited| waited.as_secs_f64()),
    })
}

fn fork_volumes(container: &ContainerRecord, choice: ForkVolumes) -> Result<Vec<VolumeMount>> {
    let writable = container.volumes.iter().find(|volume| !volume.read_only);
    match (choice, writable) {
        (ForkVolumes::Ask, Some(volume)) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the container {} writes the volume {} at {}, which is not part of its disk, so not of a \
                 fork: say --share-volumes, and both write the same files, or --no-volumes",
                container.name,
                volume.source,
                volume.destination.display()
            ),
        )),
        (ForkVolumes::None, _) => Ok(Vec::new()),
        _ => Ok(container.volumes.clone()),
    }
}

/// What a rollback did.
#[derive(Debug, Clone, Serialize)]
pub struct RollbackReport {
    /// As it is now.
    pub container: ContainerRecord,
    /// The snapshot that keeps what it was; `None` where that was to be discarded.
    pub kept: Option<ContainerSnapshot>,
}

/// What becomes of what a container is now when it goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Present {
    /// It is kept as a snapshot.
    Keep,
    /// It is gone.
    Discard,
}

/// Makes a container what it was at a snapshot. With `force` what runs in it is ended, and it is unmounted;
/// otherwise it must be stopped.
///
/// # Errors
/// [`ErrorKind::NotFound`] without that snapshot; [`ErrorKind::InUse`] while it is mounted or served. The
/// container is as before, perhaps with one snapshot more.
pub fn rollback(
    store: &Store,
    name: &str,
    to: &str,
    present: Present,
    force: bool,
) -> Result<RollbackReport> {
    let (container, _busy) = lock_container(store, &store.container(name)?)?;
    let pin = store.pin_layers()?;
    container.snapshot(to)?;
    stop(store, &container, force)?;
    let container = store.settle(name)?;
    let kept = match present {
        Present::Discard => None,
        Present::Keep => {
            let called = container.free_snapshot_name(&format!("before-rollback-{}", time_name()));
            Some(keep(store, &container, &called, How::Crash, None, &pin)?.snapshot)
        }
    };
    let _held = interrupt::hold();
    // Whoever serves it has the layer leased, and would write on in it.
    let top = store.resolve(&store.container(name)?)?.top;
    let lease = store.lease_layer(top)?;
    crash_point::here("rollback: present kept");
    let kept_at = container.snapshot(to)?;
    let layers = container.snapshot_layers(kept_at.id)?;
    let staged = store.stage_layer(layers.last().copied(), kept_at.disk.virtual_size)?;
    let new = staged.place(&LayerInfo::writable(), &pin)?;
    crash_point::here("rollback: layer published");
    let container = store.put_back(name, to, &new, &pin)?;
    crash_point::here("rollback: put back");
    drop((lease, pin));
    store.discard_layer(top)?;
    Ok(RollbackReport { container, kept })
}

/// Sees to it that nobody has the container.
fn stop(store: &Store, container: &ContainerRecord, force: bool) -> Result<()> {
    if force {
        return umount_locked(store, container, true);
    }
    take_over(store, container)?;
    if let Some(mounted) = mounted(store, container)? {
        let name = &container.name;
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the container {name} is mounted at {}: unmount it first (`vellum umount {name}`), or \
                 `vellum rollback --force`",
                mounted.dir.display()
            ),
        ));
    }
    Ok(())
}

/// Removes a snapshot of a container.
///
/// # Errors
/// [`ErrorKind::NotFound`] without it; [`ErrorKind::InUse`] while something reads it.
pub fn remove_snapshot(store: &Store, name: &str, snapshot: &str) -> Result<PruneReport> {
    let (_, _busy) = lock_container(store, &store.container(name)?)?;
    store.settle(name)?;
    store.remove_container_snapshots(name, &[snapshot])
}

/// What a policy made of a container's snapshots.
#[derive(Debug, Clone, Serialize)]
pub struct PrunedSnapshots {
    /// Every snapshot, the newest first, and what keeps it.
    pub snapshots: Vec<Verdict>,
    /// Nothing was removed: it was only asked what would be.
    pub dry_run: bool,
    /// What went with those that nothing keeps.
    #[serde(skip)]
    pub removed: PruneReport,
}

/// Removes the snapshots of a container that a policy does not keep; with `dry_run` only says which.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a policy that keeps nothing; as [`remove_snapshot`].
pub fn prune_snapshots(
    store: &Store,
    name: &str,
    policy: &Retention,
    dry_run: bool,
) -> Result<PrunedSnapshots> {
    if policy.keeps_nothing() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "say what is to be kept, as --keep-last 24 --keep-daily 7: otherwise nothing would be",
        ));
    }
    let (_, _busy) = lock_container(store, &store.container(name)?)?;
    let container = store.settle(name)?;
    let snapshots = judge(&container.snapshots, policy, unix_time()?)?;
    let gone = snapshots
        .iter()
        .filter(|verdict| verdict.kept_by.is_empty());
    let gone: Vec<&str> = gone.map(|verdict| verdict.name.as_str()).collect();
    let removed = match dry_run || gone.is_empty() {
        true => PruneReport::default(),
        false => store.remove_container_snapshots(name, &gone)?,
    };
    Ok(PrunedSnapshots {
        snapshots,
        dry_run,
        removed,
    })
}

/// A snapshot of a container, as the container's record had it at one moment.
#[derive(Debug, Clone)]
pub struct Found {
    /// The container.
    pub container: ContainerRecord,
    /// The snapshot.
    pub snapshot: ContainerSnapshot,
    /// Its layers, from the bottom up.
    pub layers: Vec<Uuid>,
}

impl Found {
    /// Its topmost layer.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`]: a snapshot has layers.
    pub fn top(&self) -> Result<Uuid> {
        let top = self.layers.last().copied();
        top.ok_or_else(|| Error::internal("a snapshot without layers"))
    }
}

/// The snapshot that `name` names, as `C@NAME`; `None` where it names something else, such as an image, whose
/// names may have an `@` too. Whoever opens its layers has them pinned before.
///
/// # Errors
/// Where the record of the container cannot be read, or is damaged.
pub fn find(store: &Store, name: &str) -> Result<Option<Found>> {
    let Some((container, called)) = name.split_once('@') else {
        return Ok(None);
    };
    let record = match store.container(container) {
        Ok(record) => store.as_settled(record)?,
        Err(error) if [ErrorKind::NotFound, ErrorKind::InvalidInput].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let Ok(snapshot) = record.snapshot(called).cloned() else {
        return Ok(None);
    };
    Ok(Some(Found {
        layers: record.snapshot_layers(snapshot.id)?,
        container: record,
        snapshot,
    }))
}

/// Why nothing has this name: of `C@NAME` that there is no such snapshot, or no such container; of others what
/// the caller was told.
pub(super) fn nothing_called(store: &Store, name: &str, no_container: Error) -> Error {
    let Some((container, called)) = name.split_once('@') else {
        return no_container;
    };
    let record = store.container(container);
    let missing = record.and_then(|record| record.snapshot(called).map(drop));
    missing.err().unwrap_or(no_container)
}

/// The time as the name of a snapshot: `20261126T050311Z`.
fn time_name() -> String {
    now().replace(['-', ':'], "")
}
