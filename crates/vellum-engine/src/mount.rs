//! Chains as mounted file systems.
//!
//! This and [`run`] need each other: to run something a container is mounted, and to unmount it what
//! runs there is ended first, which in turn unmounts what a killed command left.

use std::path::{Path, PathBuf};

use super::device::{Target, attach_spec};
use super::grow::grow_file_system;
use super::mount_point::{self, UNMOUNT_TIMEOUT, unmount_device};
use super::serving::serving;
use super::temporary::end_dead;
use super::{container_lock, lock_container, run};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_export::device::{self, DetachOptions};
use vellum_export::loop_device::LoopDevice;
use vellum_fs::ext4::{self, Atime};
use vellum_fs::mountinfo::MountInfo;
use vellum_store::{ContainerRecord, PruneReport, Store};

pub use super::mount_point::Rights;

/// A container that is mounted.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Mounted {
    /// Where.
    #[serde(serialize_with = "super::path_as_text")]
    pub dir: PathBuf,
    /// The block device.
    pub device: PathBuf,
    /// The file system met an error and takes no writes any more, until it is mounted anew.
    pub given_up: bool,
}

/// Attaches a container and mounts its file system at `dir`, by default a directory under the
/// store, with these rights. It stays after this process ends.
///
/// # Errors
/// [`ErrorKind::InUse`] while it is mounted or served, with where; [`ErrorKind::Unsupported`] where
/// the image holds no ext4; [`ErrorKind::InvalidInput`] for a directory that would hide the store.
pub fn mount(
    store: &Store,
    name: &str,
    dir: Option<&Path>,
    rights: Rights,
    atime: Option<Atime>,
) -> Result<Mounted> {
    let mut container = store.container(name)?;
    let _busy = lock_container(store, &container)?;
    container.atime = atime.or(container.atime);
    mount_locked(store, &container, dir, rights)
}

/// As [`mount`], by whoever has the container's lock. Works on a full disk too, so that something
/// can be deleted there.
pub(super) fn mount_locked(
    store: &Store,
    container: &ContainerRecord,
    dir: Option<&Path>,
    rights: Rights,
) -> Result<Mounted> {
    store.keep_room();
    store.with_room(|| mount_once(store, container, dir, rights))
}

fn mount_once(
    store: &Store,
    container: &ContainerRecord,
    dir: Option<&Path>,
    rights: Rights,
) -> Result<Mounted> {
    let name = &container.name;
    if container.fs.is_none() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the image of {name} holds {}: use `vellum nbd {name}`, and a client that knows it",
                match &container.holds {
                    Some(holds) => format!("{holds}, and no ext4 that could be mounted"),
                    None => "no ext4 that could be mounted".into(),
                }
            ),
        ));
    }
    take_over(store, container)?;
    if let Some(there) = mounted(store, container)? {
        if there.given_up {
            return mount_anew(store, container, &there, dir, Some(rights));
        }
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the container {name} is mounted at {} already: unmount it first (`vellum umount {name}`)",
                there.dir.display()
            ),
        ));
    }
    let run_dir = store.run_dir(container);
    let dir = match dir {
        Some(dir) => mount_point::named_dir(store, dir)?,
        None => mount_point::default_dir(&run_dir)?,
    };
    let target = Target::Container(name.clone());
    let attached = device::attach(&run_dir, &attach_spec(store, &target))
        .map_err(|error| error.context(format!("cannot attach {name}")))?;
    let device = attached.device.path();
    let mounted = interrupt::check()
        .and_then(|()| mount_grown(container, &device, &dir, rights))
        .and_then(|()| interrupt::check());
    if let Err(error) = mounted {
        // The mount's failure is what matters.
        let _ = unmount_device(&run_dir, true);
        let _ = device::detach(
            &run_dir,
            &DetachOptions {
                force: true,
                ..Default::default()
            },
        );
        return Err(error.context(format!("cannot mount {name} at {}", dir.display())));
    }
    Ok(Mounted {
        dir,
        device,
        given_up: false,
    })
}

/// Brings back a container whose file system gave up, by mounting its device again: with these rights,
/// or with those that it had.
///
/// # Errors
/// [`ErrorKind::InUse`] while a program uses the file system: it would go on with the one that gave
/// up.
pub(super) fn mount_anew(
    store: &Store,
    container: &ContainerRecord,
    there: &Mounted,
    dir: Option<&Path>,
    rights: Option<Rights>,
) -> Result<Mounted> {
    let name = &container.name;
    let dir = match dir {
        Some(dir) => mount_point::named_dir(store, dir)?,
        None => there.dir.clone(),
    };
    let before = MountInfo::at(&there.dir)?.map(|mount| Rights::of(&mount));
    let rights = rights.or(before).unwrap_or_default();
    tracing::warn!("{name}: its file system gave up after an error: mounted anew");
    let in_use = |error: Error| {
        error.context(format!(
            "the file system of {name} gave up after an error (a full disk of the host?) and has \
             to be mounted anew, but a program still uses it: end that, or `vellum umount --force \
             {name}`"
        ))
    };
    let device = LoopDevice::from_path(&there.device);
    let _held = device.map(LoopDevice::hold).transpose()?;
    unmount_device(&store.run_dir(container), false).map_err(in_use)?;
    if let Some(device) = device
        && !device.wait_unclaimed(UNMOUNT_TIMEOUT)?
    {
        return Err(in_use(Error::new(ErrorKind::InUse, device.user())));
    }
    mount_grown(container, &there.device, &dir, rights)
        .map_err(|error| error.context(format!("cannot mount {name} at {}", dir.display())))?;
    Ok(Mounted {
        dir,
        device: there.device.clone(),
        given_up: false,
    })
}

/// Mounts a container's device, and lets the file system fill one that is larger than the image's.
fn mount_grown(
    container: &ContainerRecord,
    device: &Path,
    dir: &Path,
    rights: Rights,
) -> Result<()> {
    let options = rights.options(container.atime.unwrap_or_default());
    ext4::mount(device, dir, options)?;
    let grown = grow_file_system(device, dir, container.virtual_size, options, || {
        ext4::unmount(dir, UNMOUNT_TIMEOUT)
    });
    match grown {
        // Its files are there all the same; the next mount tries again.
        Err(error) if ext4::is_mounted(dir)? => {
            tracing::warn!(
                "{}: its file system stays as large as it is: {error}",
                container.name
            );
            Ok(())
        }
        other => other,
    }
}

/// Where a container is mounted, if it is.
///
/// # Errors
/// Where the host's mounts cannot be read.
pub fn mounted(store: &Store, container: &ContainerRecord) -> Result<Option<Mounted>> {
    let Some(status) = device::status(&store.run_dir(container))? else {
        return Ok(None);
    };
    let Some(device) = status.loop_device else {
        return Ok(None);
    };
    let Some(number) = LoopDevice::from_path(&device).map(LoopDevice::major_minor) else {
        return Ok(None);
    };
    let mounts = MountInfo::read()?;
    let first = mounts.into_iter().find(|mount| mount.major_minor == number);
    Ok(first.map(|mount| Mounted {
        given_up: ext4::has_given_up(&mount),
        dir: mount.target,
        device,
    }))
}

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
    let container = store.container(name)?;
    let _busy = lock_container(store, &container)?;
    end_dead(store);
    let run_dir = store.run_dir(&container);
    let was_there = device::status(&run_dir)?.is_some()
        || run::activity(store, &container)? != run::Activity::Idle;
    if !was_there && let Some(serving) = serving(store, &container)? {
        return Err(serving.refusal(name));
    }
    umount_locked(store, &container, force)?;
    Ok(was_there)
}

pub(super) fn umount_locked(store: &Store, container: &ContainerRecord, force: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    see_to_halted(&run_dir, &container.name, force)?;
    run::end_running(&run_dir, &container.name, force)?;
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
    run::forget(&run_dir)?;
    // Not where there are files that are nobody's.
    let _ = std::fs::remove_dir(&run_dir);
    Ok(())
}

/// Takes away what running the container left in its file system. What stays does no harm: it is noted
/// in the record.
fn take_scaffold_away(store: &Store, container: &ContainerRecord) {
    let take = || {
        let alive = device::status(&store.run_dir(container))?.is_some_and(|status| status.alive);
        match mounted(store, container)? {
            Some(mounted) if alive => run::scaffold::take_away(store, container, &mounted.dir),
            _ => Ok(()),
        }
    };
    if let Err(error) = take() {
        tracing::warn!(%error, "{}: mount points stay in it", container.name);
    }
}

/// Before a device is unmounted: as [`refuse_halted`], and by force as [`device::wake`].
fn see_to_halted(run_dir: &Path, name: &str, force: bool) -> Result<()> {
    match force {
        true => device::wake(run_dir),
        false => refuse_halted(run_dir, name),
    }
}

/// Refuses to go on where all processes of a device are stopped: whoever touches it waits in the kernel
/// then, and cannot even be killed.
pub(super) fn refuse_halted(run_dir: &Path, name: &str) -> Result<()> {
    match device::status(run_dir)? {
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

/// Unmounts and detaches a container, then removes it. The report is as that of
/// [`Store::remove_container`].
///
/// # Errors
/// [`ErrorKind::InUse`] while something runs in it or it is mounted and `force` is not given, or
/// while a program uses it.
pub fn remove(store: &Store, name: &str, force: bool) -> Result<PruneReport> {
    let container = store.container(name)?;
    let report = {
        let _busy = lock_container(store, &container)?;
        end_dead(store);
        if force {
            device::wake(&store.run_dir(&container))?;
        }
        run::end_for_good(store, &container, force)?;
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
    let lock = container_lock(store, container.id);
    // The last user of the name; a leftover is harmless and pruned.
    let _ = std::fs::remove_file(lock);
    let (dir, socket) = store.socket_beside(container.id);
    let _ = std::fs::remove_file(dir.join(socket));
    Ok(report)
}

/// Cleans up run directories that belong to no container: what a crash left of imports and
/// removed containers. Those of a command that still runs are left alone. Returns what was
/// removed, for people.
///
/// # Errors
/// Where the directories cannot be listed.
pub fn clean_orphaned_run_dirs(store: &Store) -> Result<Vec<String>> {
    let shown =
        |run_dir: &Path| format!("run/{}", run_dir.file_name().unwrap_or_default().display());
    let ended = end_dead(store);
    let mut done: Vec<String> = ended.iter().map(|run_dir| shown(run_dir)).collect();
    // Whoever uses a temporary mount holds the other side of this lock.
    let Some(_lock) = store.try_collection_lock()? else {
        return Ok(done);
    };
    for run_dir in store.orphaned_run_dirs()? {
        device::wake(&run_dir)?;
        // Its record was taken away by hand: removing a container ends what runs in it first.
        if let Err(error) = run::end_running(&run_dir, "of a removed record", false) {
            tracing::warn!(%error, "{}: left as it is", run_dir.display());
            continue;
        }
        unmount_device(&run_dir, true)?;
        mount_point::end_etc(&run_dir)?;
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        device::detach(&run_dir, &options)?;
        match std::fs::remove_dir_all(&run_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(
                    format!("cannot remove {}", run_dir.display()),
                    error,
                ));
            }
            _ => done.push(shown(&run_dir)),
        }
    }
    Ok(done)
}
