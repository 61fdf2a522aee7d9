//! A container's writable layer is sealed, and the container goes on in a new one above it: what commits,
//! snapshots, forks and rollbacks have in common. docs/snapshots.md.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::device::{PREPARE_SEAL, SEAL_TOP, SealTop, SealedTop, Target, forget_ext4_journal};
use super::mount_point::mounted;
use super::serving::served_live;
use super::teardown::{refuse_halted, take_over};
use super::temporary::{TemporaryMount, is_clean};
use super::wire::encode;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_export::device::control;
use vellum_fs::freeze;
use vellum_fs::run_dir::{DirSocket, RunDir};
use vellum_store::{Consistency, ContainerRecord, ContainerSnapshot, Store, StoreGuard};

/// A frozen file system thaws by itself after this long, whatever happens to us.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long the server may take to flush, and to seal.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(120);
const SEAL_TIMEOUT: Duration = Duration::from_secs(8);

/// What becomes of the file system of a container while its layer is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// A mounted one is frozen, one that a crash left is recovered first: it can be mounted read-only.
    Frozen,
    /// It is synced, and stays as a power cut would leave it.
    Crash,
}

/// What the sealing of a container's layer made.
#[derive(Debug)]
pub(super) struct Sealing {
    /// As it goes on.
    pub container: ContainerRecord,
    /// The layer that was its top.
    pub layer: Uuid,
    /// For how long writers waited; `None` where nobody could write, or where the server is of a version that
    /// does not tell.
    pub waited: Option<Duration>,
    /// A server has the container, and gives the layer its checksums.
    pub served: bool,
}

/// Seals the top of a container, mounted or not, whose lock the caller has. `snapshot` is kept, if there
/// is one, with what its file system turned out to be.
///
/// # Errors
/// [`ErrorKind::InUse`] while an NBD server has the container, and, for a file system that can be mounted
/// read-only, while a virtual machine has it. The container is as before, or goes on with one layer more
/// below it.
pub(super) fn seal_container(
    store: &Store,
    container: &ContainerRecord,
    how: How,
    snapshot: Option<ContainerSnapshot>,
    pin: &StoreGuard,
) -> Result<Sealing> {
    let name = &container.name;
    refuse_halted(&store.run_dir(container), name)?;
    take_over(store, container)?;
    let mount = mounted(store, container)?;
    let served = match &mount {
        Some(_) => None,
        None => served_live(store, container)?,
    };
    let clean = match &mount {
        // Most of the writing happens before anybody has to wait.
        Some(mount) => {
            sync_file_system(&mount.dir)?;
            control::call(
                &store.run_dir(container),
                "flush",
                Value::Null,
                FLUSH_TIMEOUT,
            )?;
            how == How::Frozen
        }
        None if served.is_some() => {
            refuse_frozen(name, how)?;
            false
        }
        None => see_to_unmounted(store, container, how)?,
    };
    interrupt::check()?;
    // From here on it comes to its end, whatever signal comes: undoing it would take as long.
    let _held = interrupt::hold();
    let snapshot = snapshot.map(|snapshot| ContainerSnapshot {
        consistency: if clean {
            Consistency::Clean
        } else {
            Consistency::Crash
        },
        ..snapshot
    });
    let (record, prepared) = store.prepare_commit(name, snapshot, pin)?;
    let next = record
        .next
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "a commit without a next layer"))?;
    let waited = match (&mount, &served) {
        (Some(mount), _) => {
            let run_dir = store.run_dir(&record);
            match how {
                How::Frozen => Some(seal_frozen(&run_dir, &mount.dir, next)?),
                How::Crash => seal_synced(&run_dir, &mount.dir, next)?,
            }
        }
        (None, Some(socket)) => seal_served(socket, next)?,
        (None, None) => {
            let open = Target::of(&record).open(store)?;
            forget_ext4_journal(&open)?;
            open.seal_top(next)?;
            None
        }
    };
    Ok(Sealing {
        container: store.settle(name)?,
        layer: prepared.top,
        waited,
        served: mount.is_some() || served.is_some(),
    })
}

/// Before the layer of a container that is not mounted is sealed: says whether its file system was unmounted
/// in order, or sees to it, where that is wanted. (Otherwise it is not mounted, which would only write to it.)
fn see_to_unmounted(store: &Store, container: &ContainerRecord, how: How) -> Result<bool> {
    if container.disk.fs.is_none() {
        return Ok(true);
    }
    let clean = is_clean(&Target::look_at(container).open(store)?);
    if clean || how == How::Crash {
        return Ok(clean);
    }
    TemporaryMount::new(store, &Target::of(container))?.end()?;
    Ok(true)
}

/// Freezes, seals, thaws. Returns the time in between.
///
/// What can be done before the freeze is: `next` is opened, and what was written is made durable,
/// so that the freeze itself finds little to write. In between are the last flush and the seal.
pub fn seal_frozen(run_dir: &RunDir, dir: &Path, next: Uuid) -> Result<Duration> {
    let args = encode(&SealTop { next })?;
    prepare(run_dir, dir, &args)?;
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
    thawed
}

/// Syncs, then seals between two requests. Returns for how long they waited, where the server tells.
fn seal_synced(run_dir: &RunDir, dir: &Path, next: Uuid) -> Result<Option<Duration>> {
    let args = encode(&SealTop { next })?;
    prepare(run_dir, dir, &args)?;
    let sealed = control::call(run_dir, SEAL_TOP, args, SEAL_TIMEOUT)?;
    crash_point::here("commit: sealed under users");
    told(sealed)
}

/// Only the guest of a machine could freeze the file system that it has mounted.
fn refuse_frozen(name: &str, how: How) -> Result<()> {
    match how {
        How::Crash => Ok(()),
        How::Frozen => Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the container {name} is the disk of a virtual machine, whose file system cannot be frozen \
                 from here: `vellum snapshot {name}` or `vellum fork {name} NEW` take it as it is (fsfreeze in \
                 the guest before); a fork can be committed and exported"
            ),
        )),
    }
}

/// Seals the disk of a machine between two requests. Returns for how long they waited.
fn seal_served(socket: &DirSocket, next: Uuid) -> Result<Option<Duration>> {
    let args = encode(&SealTop { next })?;
    control::call_at(socket, PREPARE_SEAL, args.clone(), FLUSH_TIMEOUT)?;
    crash_point::here("commit: synced");
    let sealed = control::call_at(socket, SEAL_TOP, args, SEAL_TIMEOUT)?;
    crash_point::here("commit: sealed under users");
    told(sealed)
}

/// For how long writers waited, where the server told.
fn told(sealed: Value) -> Result<Option<Duration>> {
    // A server of an older version says nothing.
    let told: Option<SealedTop> = serde_json::from_value(sealed)
        .map_err(|error| Error::with_source(ErrorKind::Corrupt, "the answer to seal-top", error))?;
    Ok(told.map(|told| Duration::from_micros(told.waited_us)))
}

/// Does what can be done before writers wait: what they wrote is made durable, and the layer `next` opened.
fn prepare(run_dir: &RunDir, dir: &Path, args: &Value) -> Result<()> {
    sync_file_system(dir)?;
    match control::call(run_dir, PREPARE_SEAL, args.clone(), FLUSH_TIMEOUT) {
        // A server of an older version does it all at the seal.
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        other => drop(other?),
    }
    crash_point::here("commit: synced");
    Ok(())
}

/// syncfs(2) of the file system at `dir`.
pub fn sync_file_system(dir: &Path) -> Result<()> {
    let file = std::fs::File::open(dir).context(|| format!("cannot open {}", dir.display()))?;
    nix::unistd::syncfs(&file).context(|| format!("cannot sync {}", dir.display()))
}
