//! The files of a container: where it is mounted, or else in a mount for the purpose.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::device::Target;
use super::lock_container;
use super::mount_point::{Mounted, mounted};
use super::run::{is_mounted_for_run, unmount_after_run};
use super::serving::refuse_served;
use super::teardown::{refuse_halted, take_over};
use super::temporary::TemporaryMount;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// What is done with the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// They are read, and a container that is not mounted stays as it is.
    Look,
    /// They may be changed.
    Change,
}

/// Where the files are.
#[derive(Debug)]
pub(super) struct Reached<'a> {
    /// The root of the file system.
    pub dir: &'a Path,
    /// The run directory of the device that it lies on.
    pub run_dir: &'a RunDir,
    /// It is mounted for the purpose.
    pub temporary: bool,
}

impl<'a> Reached<'a> {
    fn mounted(dir: &'a Path, run_dir: &'a RunDir) -> Self {
        Reached {
            dir,
            run_dir,
            temporary: false,
        }
    }
}

/// Does something with the files of a container. Where it is mounted, others go on meanwhile; where it is
/// not, nobody else has it until the work is done and it is unmounted again.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a container without ext4; [`ErrorKind::InUse`] while it is served over
/// NBD; as [`super::mount::mount`]; what the work says.
pub(super) fn reach<T>(
    store: &Store,
    container: &ContainerRecord,
    access: Access,
    work: impl FnOnce(&Reached<'_>) -> Result<T>,
) -> Result<T> {
    let name = &container.name;
    if container.disk.fs.is_none() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the image of {name} holds no ext4, so it has no files that can be reached"),
        ));
    }
    let run_dir = store.run_dir(container);
    refuse_halted(&run_dir, name)?;
    // One that is unmounted at this moment is reached as one that is not mounted.
    let for_run = is_mounted_for_run(&run_dir)?;
    if let Some(mount) = mounted(store, container)?
        && let Some(root) = hold(&mount)?
    {
        let done = work(&Reached::mounted(&mount.dir, &run_dir));
        drop(root);
        if for_run {
            end_of_run(store, container);
        }
        return done;
    }
    let (container, _busy) = lock_container(store, container)?;
    let container = &container;
    let _pin = store.pin_layers()?;
    take_over(store, container)?;
    // Somebody may have mounted it while we waited.
    if let Some(mount) = mounted(store, container)? {
        return work(&Reached::mounted(&mount.dir, &run_dir));
    }
    refuse_served(store, container)?;
    let mount = match access {
        Access::Look => TemporaryMount::of_container(store, container)?,
        Access::Change => TemporaryMount::new(store, &Target::of(container))?,
    };
    let done = work(&Reached {
        dir: mount.dir(),
        run_dir: mount.run_dir(),
        temporary: true,
    });
    let ended = mount.end();
    // Why the work failed is what matters.
    let done = done?;
    ended?;
    Ok(done)
}

/// Unmounts a container whose run ended while we had its files.
fn end_of_run(store: &Store, container: &ContainerRecord) {
    // Also where a signal asked us to end.
    let _held = interrupt::hold();
    match unmount_after_run(store, container) {
        // Removed, with all that was mounted.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        // Another copy goes on, which unmounts it then.
        Err(error) if error.kind() == ErrorKind::InUse => tracing::info!("{error}"),
        Err(error) => tracing::warn!(%error, "{} stays mounted", container.name),
        Ok(()) => {}
    }
}

/// Opens the root of what is mounted, so that it stays mounted; `None` where it no longer is: what is
/// there by then is the host's.
fn hold(mount: &Mounted) -> Result<Option<File>> {
    let what = || format!("opening {}", mount.dir.display());
    let root = match File::open(&mount.dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context(what)?,
    };
    let on = root.metadata().context(what)?.dev();
    let device = fs::metadata(&mount.device).context(what)?.rdev();
    Ok((on == device).then_some(root))
}
