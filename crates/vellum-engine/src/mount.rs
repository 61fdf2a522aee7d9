//! Chains as mounted file systems.

use std::path::Path;

use super::device::{Target, attach_spec};
use super::grow::grow_file_system;
use super::lazy::{explain, go_on_in_background};
use super::lock_container;
use super::mount_point::{self, Mounted, UNMOUNT_TIMEOUT, mounted, unmount_device};
use super::serving::refuse_served;
use super::teardown::take_over;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_export::device::{self, DetachOptions};
use vellum_export::local_disk::LocalDisk;
use vellum_fs::ext4::{self, Atime};
use vellum_fs::mountinfo::MountInfo;
use vellum_store::{ContainerRecord, Store};

pub use super::mount_point::Rights;

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
    let (mut container, _busy) = lock_container(store, &store.container(name)?)?;
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
    if container.disk.fs.is_none() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the image of {name} holds {}: use `vellum nbd {name}`, and a client that knows it",
                match &container.disk.holds {
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
    refuse_served(store, container)?;
    let run_dir = store.run_dir(container);
    let dir = match dir {
        Some(dir) => mount_point::named_dir(store, dir)?,
        None => mount_point::default_dir(&run_dir)?,
    };
    let target = Target::of(container);
    let attached = device::attach(&run_dir, &attach_spec(store, &target))
        .map_err(|error| error.context(format!("cannot attach {name}")))?;
    let device = attached.device.path();
    let mounted = interrupt::check()
        .and_then(|()| mount_grown(store, container, &device, &dir, rights))
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
        let what = format!("cannot mount {name} at {}", dir.display());
        return Err(explain(store, &container.layers, what, error));
    }
    go_on_in_background(store, &container.layers);
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
    let device = LocalDisk::from_path(&there.device);
    let _held = device.map(LocalDisk::hold).transpose()?;
    unmount_device(&store.run_dir(container), false).map_err(in_use)?;
    if let Some(device) = device
        && !device.wait_unclaimed(UNMOUNT_TIMEOUT)?
    {
        return Err(in_use(Error::new(ErrorKind::InUse, device.user())));
    }
    mount_grown(store, container, &there.device, &dir, rights)
        .map_err(|error| error.context(format!("cannot mount {name} at {}", dir.display())))?;
    Ok(Mounted {
        dir,
        device: there.device.clone(),
        given_up: false,
    })
}

/// Mounts a container's device, and lets the file system fill one that is larger than the image's.
fn mount_grown(
    store: &Store,
    container: &ContainerRecord,
    device: &Path,
    dir: &Path,
    rights: Rights,
) -> Result<()> {
    let options = rights.options(container.atime.unwrap_or_default());
    ext4::mount(device, dir, options)?;
    let grown = store.size_of(container).and_then(|size| {
        let size = container.disk.shown_of(size);
        grow_file_system(device, dir, size, options, || {
            ext4::unmount(dir, UNMOUNT_TIMEOUT)
        })
    });
    if rights.read_only {
        ext4::make_read_only(dir, options)?;
    }
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
