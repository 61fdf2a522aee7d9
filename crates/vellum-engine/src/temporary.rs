//! File systems that a command has mounted for as long as it works: to fill a new layer, to look at
//! an image or a container.
//!
//! Each has a run directory of its own, in which `owner` says whose it is. The command holds a lock
//! on that file, which its death releases: whoever finds it free takes the mount, the loop device and
//! the servers away. So what a killed command left is in nobody's way for long.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::device::{OpenChain, Target, attach_spec};
use super::mount_point::{self, unmount_device};
use vellum_base::block::BlockDevice;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::storage::{Held, Holder, LockMode};
use vellum_export::device::{self, DetachOptions};
use vellum_export::local_disk::LocalDisk;
use vellum_fs::ext4;
use vellum_fs::run_dir::RunDir;
use vellum_fs::superblock::Superblock;
use vellum_store::{ContainerRecord, LayerLease, StagedLayer, Store};

/// A file system that is mounted for as long as this lives, in a place of its own.
#[derive(Debug)]
pub struct TemporaryMount {
    run_dir: RunDir,
    dir: PathBuf,
    ended: bool,
    _owned: Box<dyn Held>,
    // Below here what the mount needs: given back after it was taken away.
    _scratch: Option<StagedLayer>,
    _lease: Option<LayerLease>,
}

impl TemporaryMount {
    /// Attaches and mounts a target.
    ///
    /// # Errors
    /// As [`super::mount::mount`].
    pub fn new(store: &Store, target: &Target) -> Result<Self> {
        let read_only = target.is_read_only();
        TemporaryMount::with(store, target, read_only, None, None)
    }

    /// Mounts the files of sealed layers, up to `top`, to look at them.
    ///
    /// # Errors
    /// As [`super::mount::mount`].
    pub fn of_image(store: &Store, top: Uuid) -> Result<Self> {
        let target = Target::Sealed(top);
        let open = target.open(store)?;
        if is_clean(&open) {
            return TemporaryMount::new(store, &target);
        }
        let size = open.chain().size();
        drop(open);
        TemporaryMount::through_scratch(store, top, size, None)
    }

    /// Mounts the files of a container that is not mounted, to look at them: none of its layer's
    /// files is changed. A journal of its file system that a crash left is replayed into a layer that is
    /// thrown away.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process has it; as [`super::mount::mount`].
    pub fn of_container(store: &Store, container: &ContainerRecord) -> Result<Self> {
        let target = Target::look_at(container);
        let open = target.open(store)?;
        if is_clean(&open) {
            return TemporaryMount::new(store, &target);
        }
        let size = open.chain().size();
        let top = store.resolve(container)?.top;
        let lease = store.lease_for_reading(top)?;
        drop(open);
        TemporaryMount::through_scratch(store, top, size, Some(lease))
    }

    /// Mounts what is up to `top` with an empty layer above, which takes the replay of the journal.
    fn through_scratch(
        store: &Store,
        top: Uuid,
        size: u64,
        lease: Option<LayerLease>,
    ) -> Result<Self> {
        let scratch = store.stage_layer(Some(top), size)?;
        let target = Target::Staged(scratch.header.uuid);
        TemporaryMount::with(store, &target, true, Some(scratch), lease)
    }

    fn with(
        store: &Store,
        target: &Target,
        read_only: bool,
        scratch: Option<StagedLayer>,
        lease: Option<LayerLease>,
    ) -> Result<Self> {
        end_dead(store);
        interrupt::check()?;
        let run_dir = store.runs().dir(Uuid::new_v4());
        let dir = run_dir.rootfs();
        fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        let owned = own(store, &run_dir).inspect_err(|_| {
            // Nothing is mounted there yet.
            let _ = fs::remove_dir_all(run_dir.path());
        })?;
        let mount = TemporaryMount {
            run_dir,
            dir,
            ended: false,
            _owned: owned,
            _scratch: scratch,
            _lease: lease,
        };
        let attached = device::attach(&mount.run_dir, &attach_spec(store, target))?;
        interrupt::check()?;
        let options = ext4::MountOptions {
            read_only,
            // Nobody opens devices there.
            no_dev: true,
            scratch: matches!(target, Target::Staged(_)),
            ..ext4::MountOptions::default()
        };
        ext4::mount(&attached.device.path(), &mount.dir, options)?;
        interrupt::check()?;
        Ok(mount)
    }

    /// The run directory of its device.
    pub(super) fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// Its device.
    ///
    /// # Errors
    /// Where that cannot be told.
    pub(super) fn device(&self) -> Result<LocalDisk> {
        let status = device::status(&self.run_dir)?;
        let disk = status.and_then(|status| status.disk);
        disk.ok_or_else(|| {
            let dir = &self.run_dir;
            Error::internal(format!("{dir}: what is mounted has no device"))
        })
    }

    /// The root of the file system.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts in order.
    ///
    /// # Errors
    /// Where something is still in use, or could not be written. It is taken away all the same.
    pub fn end(mut self) -> Result<()> {
        unmount_device(&self.run_dir, false)?;
        mount_point::remove(&self.dir)?;
        device::detach(&self.run_dir, &DetachOptions::default())?;
        self.ended = true;
        remove(&self.run_dir)
    }
}

impl Drop for TemporaryMount {
    fn drop(&mut self) {
        if !self.ended {
            // On the way out of an error: what stays, the next command or prune removes.
            let _ = take_away(&self.run_dir);
        }
    }
}

/// True where the file system of a chain was unmounted in order. Where that cannot be told it is
/// treated as one that was not.
pub(super) fn is_clean(open: &OpenChain) -> bool {
    Superblock::read(&**open.chain()).is_ok_and(|superblock| superblock.clean)
}

/// Makes the run directory this process's, until the answer is dropped.
fn own(store: &Store, run_dir: &RunDir) -> Result<Box<dyn Held>> {
    let (unlocked, owner) = (run_dir.unlocked_owner(), run_dir.owner());
    let what = || format!("cannot write {}", owner.display());
    let holder = Holder::current();
    let text = serde_json::to_vec(&holder)
        .map_err(|error| Error::internal(format!("who has a mount cannot be encoded: {error}")))?;
    fs::write(&unlocked, text).context(what)?;
    // Locked under a name that nobody looks for, so that nobody finds it free.
    let held = store
        .storage()
        .lock(&unlocked, LockMode::Exclusive, false)
        .context(what)?
        .ok_or_else(|| Error::new(ErrorKind::InUse, what()))?;
    fs::rename(&unlocked, &owner).context(what)?;
    Ok(held)
}

/// Takes away what commands that are dead had mounted. What cannot be taken away now is left to the
/// next command or to prune.
pub(super) fn end_dead(store: &Store) -> Vec<RunDir> {
    let mut ended = Vec::new();
    if store.is_read_only() {
        return ended;
    }
    for run_dir in store.runs().dirs().into_iter().flatten() {
        let owner = run_dir.owner();
        if !owner.exists() {
            continue;
        }
        // Held until it is gone, so that two commands do not take it away at once.
        let Ok(Some(_dead)) = store.storage().lock(&owner, LockMode::Exclusive, false) else {
            continue;
        };
        tracing::info!("{run_dir}: its command is dead");
        match take_away(&run_dir) {
            Ok(()) => ended.push(run_dir),
            Err(error) => tracing::warn!(%error, "what a dead command left is still there"),
        }
    }
    ended
}

/// Takes a temporary mount away, whatever uses it.
fn take_away(run_dir: &RunDir) -> Result<()> {
    unmount_device(run_dir, true)?;
    let options = DetachOptions {
        force: true,
        ..DetachOptions::default()
    };
    device::detach(run_dir, &options)?;
    remove(run_dir)
}

/// Removes the run directory of a mount that is gone. Never into something that is mounted there.
fn remove(run_dir: &RunDir) -> Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    mount_point::remove(&run_dir.rootfs())?;
    let remove = || {
        gone(fs::remove_file(run_dir.unlocked_owner()))?;
        gone(fs::remove_file(run_dir.owner()))?;
        gone(run_dir.remove_empty())
    };
    remove().context(|| format!("cannot remove {run_dir}"))
}
