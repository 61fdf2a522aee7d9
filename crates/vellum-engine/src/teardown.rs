//! The way down: what runs in a container is ended, its file system unmounted, its device detached. To
//! stop and to unmount are one act, so that a crash in between leaves what the next command finishes.

use super::lock_container;
use super::mount_point::{self, mounted, unmount_device};
use super::run::activity::{Activity, Owner, activity, end_running, forget};
use super::run::scaffold;
use super::serving::refuse_served;
use super::temporary::end_dead;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_export::device::{self, DetachOptions};
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, PruneReport, Store};

/// Takes away what commands and servers that are dead left of a container: a mount whose servers
/// are all dead (whoever looks there gets I/O errors, and what was flushed is in the layer), a device
/// that was attached and not mounted yet, or not detached any more, and temporary mounts.
///
/// # Errors
/// [`ErrorKind::InUse`] while something runs in the container, or a program still has its working
/// directory or files there, or the device is mounted in another mount namespace.
pub(super) fn take_over(store: &Store, container: &ContainerRecord) -> Result<()> {
    end_dead(store);
    let Some(status) = device::status(&store.run_dir(container))? else {
        return Ok(());
    };
    match (status.alive, mounted(store, container)?) {
        (true, Some(_)) => Ok(()),
        (true, None) => {
            tracing::info!("{}: attached and not mounted: detached", container.name);
            umount_locked(store, container, false)
        }
        (false, Some(mounted)) => {
            tracing::warn!("{}: its server is dead: unmounted", mounted.dir.display());
            umount_locked(store, container, false)
        }
        // Attaching clears the rest.
        (false, None) => Ok(()),
    }
}

/// Unmounts a container wherever it is mounted and ends its server. Returns false for one that was
/// not mounted, of which nothing else was left either: that is fine.
///
/// # Errors
/// [`ErrorKind::InUse`] while something runs in it or a program uses the file system, unless `force`
/// is given: then it is taken away from under it; and while it is served over NBD.
pub fn umount(store: &Store, name: &str, force: bool) -> Result<bool> {
    let (container, _busy) = lock_container(store, &store.container(name)?)?;
    end_dead(store);
    let run_dir = store.run_dir(&container);
    let was_there =
        device::status(&run_dir)?.is_some() || activity(store, &container)? != Activity::Idle;
    if !was_there {
        refuse_served(store, &container)?;
    }
    umount_locked(store, &container, force)?;
    Ok(was_there)
}

pub(super) fn umount_locked(store: &Store, container: &ContainerRecord, force: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    see_to_halted(&run_dir, &container.name, force)?;
    end_running(&run_dir, &container.name, force)?;
    unmount_ended(store, container, force)
}

/// As [`umount_locked`], after what ran has ended. What says that something ran goes last, so that
/// whoever comes after a crash in between knows that this was not finished.
pub(super) fn unmount_ended(store: &Store, container: &ContainerRecord, force: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    see_to_halted(&run_dir, &container.name, force)?;
    take_scaffold_away(store, container);
    unmount_device(&run_dir, force)
        .map_err(|error| error.context(format!("cannot unmount {}", container.name)))?;
    mount_point::remove_all(&run_dir)?;
    let options = DetachOptions {
        force,
        ..DetachOptions::default()
    };
    device::detach(&run_dir, &options)
        .map_err(|error| error.context(format!("cannot detach {}", container.name)))?;
    forget(&run_dir)?;
    // Not where there are files that are nobody's.
    let _ = run_dir.remove_empty();
    Ok(())
}

/// Takes away what running the container left in its file system. What stays does no harm: it is noted
/// in the record.
fn take_scaffold_away(store: &Store, container: &ContainerRecord) {
    let take = || {
        let alive = device::status(&store.run_dir(container))?.is_some_and(|status| status.alive);
        match mounted(store, container)? {
            Some(mounted) if alive => {
                let dir = mount_point::writable_dir(&store.run_dir(container), &mounted.dir)?;
                scaffold::take_away(store, container, &dir)
            }
            _ => Ok(()),
        }
    };
    if let Err(error) = take() {
        tracing::warn!(%error, "{}: mount points stay in it", container.name);
    }
}

/// Before a device is unmounted: as [`refuse_halted`], and by force as [`device::wake`].
fn see_to_halted(run_dir: &RunDir, name: &str, force: bool) -> Result<()> {
    match force {
        true => device::wake(run_dir),
        false => refuse_halted(run_dir, name),
    }
}

/// Refuses to go on where all processes of a device are stopped, or dead and the kernel keeps it: whoever
/// touches it waits in the kernel then, and cannot even be killed.
pub(super) fn refuse_halted(run_dir: &RunDir, name: &str) -> Result<()> {
    match device::status(run_dir)? {
        Some(status) if status.abandoned => Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "all processes of the server of {name} are dead, and who uses it waits: `vellum umount --force \
                 {name}` gives them I/O errors and keeps what was flushed"
            ),
        )),
        Some(status) if status.halted => Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "all processes of the server of {name} are stopped (by a signal or a debugger): \
                 `kill -CONT {}`, or `vellum umount --force {name}`, which gives those who use it \
                 I/O errors and keeps what was flushed",
                status
                    .stopped
                    .iter()
                    .map(i32::to_string)
                    .collect::<Vec<_>>()
                    .join(" ")
            ),
        )),
        _ => Ok(()),
    }
}

/// What may be removed with a container.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemoveOptions {
    /// What runs in it is ended, and it is unmounted.
    pub force: bool,
    /// Its snapshots go with it.
    pub snapshots: bool,
}

/// Unmounts and detaches a container, then removes it. The report is as that of
/// [`Store::remove_container`].
///
/// # Errors
/// [`ErrorKind::InUse`] while something runs in it or it is mounted and that is not to be ended, or
/// while a program uses it; and where it has snapshots that are not to go with it.
pub fn remove(store: &Store, name: &str, options: RemoveOptions) -> Result<PruneReport> {
    let RemoveOptions { force, snapshots } = options;
    let container = store.container(name)?;
    let report = {
        let (_, _busy) = lock_container(store, &container)?;
        let container = store.settle(name)?;
        if !snapshots && !container.snapshots.is_empty() {
            return Err(has_snapshots(&container));
        }
        end_dead(store);
        if force {
            device::wake(&store.run_dir(&container))?;
        }
        end_for_good(store, &container, force)?;
        if let (Some(mounted), false) = (mounted(store, &container)?, force) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the container {name} is mounted at {}: unmount it first (`vellum umount {name}`) or remove it with --force",
                    mounted.dir.display()
                ),
            ));
        }
        umount_locked(store, &container, force)?;
        store.remove_container(name)?
    };
    let runs = store.runs();
    // The last user of the name; a leftover is harmless and pruned.
    let [output, old_output] = runs.output_beside(container.id);
    let socket = runs.socket_beside(container.id).path();
    for file in [
        runs.container_lock(container.id),
        socket,
        output,
        old_output,
    ] {
        let _ = std::fs::remove_file(file);
    }
    Ok(report)
}

fn has_snapshots(container: &ContainerRecord) -> Error {
    let (name, count) = (&container.name, container.snapshots.len());
    let plural = if count == 1 { "" } else { "s" };
    Error::new(
        ErrorKind::InUse,
        format!(
            "the container {name} has {count} snapshot{plural} (`vellum snapshots {name}`), which would go \
             with it: say so (`vellum rm --snapshots {name}`), or make a container of what you need first \
             (`vellum fork {name} NEW --from SNAPSHOT`)"
        ),
    )
}

/// Cleans up run directories that belong to no container: what a crash left of imports and
/// removed containers. Those of a command that still runs are left alone. Returns what was
/// removed, for people.
///
/// # Errors
/// Where the directories cannot be listed.
pub fn clean_orphaned_run_dirs(store: &Store) -> Result<Vec<String>> {
    let shown = |run_dir: &RunDir| format!("run/{}", run_dir.name().display());
    let mut done: Vec<String> = end_dead(store).iter().map(shown).collect();
    // Whoever uses a temporary mount holds the other side of this lock.
    let Some(_lock) = store.try_collection_lock()? else {
        return Ok(done);
    };
    for run_dir in store.orphaned_run_dirs()? {
        device::wake(&run_dir)?;
        // Its record was taken away by hand: removing a container ends what runs in it first.
        if let Err(error) = end_running(&run_dir, "of a removed record", false) {
            tracing::warn!(%error, "{run_dir}: left as it is");
            continue;
        }
        unmount_device(&run_dir, true)?;
        mount_point::end_etc(&run_dir)?;
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        device::detach(&run_dir, &options)?;
        match std::fs::remove_dir_all(run_dir.path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {run_dir}"), error));
            }
            _ => done.push(shown(&run_dir)),
        }
    }
    Ok(done)
}

/// As [`end_running`], for a container that is to be removed: what a killed command left mounted
/// is unmounted too.
///
/// # Errors
/// As [`end_running`].
pub(super) fn end_for_good(store: &Store, container: &ContainerRecord, force: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    let owner = Owner::read(&run_dir)?;
    end_running(&run_dir, &container.name, force)?;
    match owner {
        Some(owner) if !owner.keep_mounted => unmount_ended(store, container, force),
        _ => forget(&run_dir),
    }
}
