//! Directories that containers are mounted at: which may be taken, what lies on them, and what is
//! left of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::MsFlags;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_export::device;
use vellum_export::local_disk::LocalDisk;
use vellum_fs::ext4::{self, Atime};
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// How long an unmount waits for those who use the file system.
pub(super) const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes and files there may be in a container's own /etc.
const ETC_LIMITS: &str = "size=1m,nr_inodes=32,mode=0700";

/// What a mounted container's files may do on the host besides being read and written. Neither,
/// where people mount: any user of the host who can walk to the directory could start the image's
/// setuid programs, and open its device nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rights {
    /// Setuid and setgid programs and file capabilities give what they say.
    pub suid: bool,
    /// Device nodes open devices.
    pub dev: bool,
    /// Nothing is written through this mount. The file system itself takes writes: of what runs in the container,
    /// and its journal's.
    pub read_only: bool,
}

impl Rights {
    /// Both: for containers that run, which see nothing of the host's.
    pub const ALL: Rights = Rights {
        suid: true,
        dev: true,
        read_only: false,
    };

    /// What a mount gives.
    pub(super) fn of(mount: &MountInfo) -> Rights {
        Rights {
            suid: !mount.has_option("nosuid"),
            dev: !mount.has_option("nodev"),
            // Not the file system's own, which an error makes read-only.
            read_only: mount.options.split(',').any(|option| option == "ro"),
        }
    }

    /// How to mount with these.
    pub(super) fn options(self, atime: Atime) -> ext4::MountOptions {
        ext4::MountOptions {
            no_suid: !self.suid,
            no_dev: !self.dev,
            atime,
            ..ext4::MountOptions::default()
        }
    }
}

/// The directory that a container with this run directory is mounted at when none is named.
pub(super) fn default_dir(run_dir: &RunDir) -> Result<PathBuf> {
    let dir = run_dir.rootfs();
    fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The directory that somebody wants a container to be mounted at, without links. The store must
/// stay in sight: its commands and servers find their files by name.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for the store, what it lies in and what lies in it.
pub(super) fn named_dir(store: &Store, dir: &Path) -> Result<PathBuf> {
    let dir = dir
        .canonicalize()
        .context(|| format!("cannot mount at {}", dir.display()))?;
    let root = store.root();
    let why = if dir == root {
        "that is the store itself"
    } else if root.starts_with(&dir) {
        "the store lies below, and could not be reached any more"
    } else if dir.starts_with(root) {
        "that is a directory of the store"
    } else {
        return Ok(dir);
    };
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "cannot mount at {}: {why} ({}): choose a directory outside",
            dir.display(),
            root.display()
        ),
    ))
}

/// Unmounts everything that is mounted from a block device, and nothing else.
///
/// # Errors
/// [`ErrorKind::InUse`] while something else is mounted on top of it or below it, `force` or not;
/// and, unless `force` is given, while a program uses it.
pub(super) fn unmount_all(device: LocalDisk, force: bool) -> Result<()> {
    let number = device.major_minor();
    let mounts = MountInfo::read()?;
    let ours = |mount: &&MountInfo| Some(mount.major_minor) == number;
    for mount in mounts.iter().filter(ours) {
        mount.check_uncovered(&mounts)?;
    }
    // The newest mount first: it may lie on an older one.
    for mount in mounts.iter().rev().filter(ours) {
        if force {
            ext4::unmount_lazily(&mount.target)?;
        } else {
            ext4::unmount(&mount.target, UNMOUNT_TIMEOUT)?;
        }
    }
    Ok(())
}

/// Where `run` and `exec` find the root of a container that is mounted already. Where it was mounted
/// for people to look at, its setuid programs are without effect: then it is mounted a second time,
/// below the run directory, which nobody else can walk.
pub(super) fn inner_dir(
    run_dir: &RunDir,
    dir: &Path,
    device: &Path,
    atime: Atime,
) -> Result<PathBuf> {
    let mount = MountInfo::at(dir)?;
    if mount.is_none_or(|mount| Rights::of(&mount) == Rights::ALL) {
        return Ok(dir.to_owned());
    }
    let inner = run_dir.inner();
    if MountInfo::at(&inner)?.is_none() {
        fs::create_dir_all(&inner).context(|| format!("cannot make {}", inner.display()))?;
        ext4::mount(device, &inner, Rights::ALL.options(atime))?;
    }
    Ok(inner)
}

/// Where a container that is mounted at `dir` takes writes: there, or where [`inner_dir`] mounted it.
pub(super) fn writable_dir(run_dir: &RunDir, dir: &Path) -> Result<PathBuf> {
    let inner = run_dir.inner();
    Ok(match MountInfo::at(&inner)? {
        Some(_) => inner,
        None => dir.to_owned(),
    })
}

/// Takes away what [`inner_dir`] made, if it did.
pub(super) fn end_inner(run_dir: &RunDir) -> Result<()> {
    let inner = run_dir.inner();
    ext4::unmount(&inner, UNMOUNT_TIMEOUT)?;
    remove(&inner)
}

/// Makes a place of little room for the files that a container has instead of its image's: it may write
/// them, and they are not on its disk, so nothing else would bound them.
pub(super) fn etc_dir(run_dir: &RunDir) -> Result<PathBuf> {
    let dir = run_dir.etc();
    end_etc(run_dir)?;
    fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("vellum"), &dir, Some("tmpfs"), flags, Some(ETC_LIMITS))
        .context(|| format!("cannot mount a tmpfs at {}", dir.display()))?;
    Ok(dir)
}

/// Takes away what [`etc_dir`] made, if it did.
pub(super) fn end_etc(run_dir: &RunDir) -> Result<()> {
    let dir = run_dir.etc();
    // Whoever still has a file of it keeps that.
    ext4::unmount_lazily(&dir)?;
    remove(&dir)
}

/// Removes the directories in a run directory that a container was mounted at.
pub(super) fn remove_all(run_dir: &RunDir) -> Result<()> {
    end_etc(run_dir)?;
    remove(&run_dir.inner())?;
    remove(&run_dir.rootfs())
}

/// Removes a directory that something was mounted at; one that is not there is fine. It may hold a
/// copy of what was mounted there: of a store that was copied in that state.
///
/// # Errors
/// [`ErrorKind::InUse`] while something is mounted there or below.
pub fn remove(dir: &Path) -> Result<()> {
    let what = || format!("cannot remove {}", dir.display());
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            return Err(Error::io(what(), error));
        }
        Ok(()) => return Ok(()),
        Err(_) => {}
    }
    let mounts = MountInfo::read()?;
    if let Some(mount) = mounts.iter().find(|mount| mount.target.starts_with(dir)) {
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "{}: something ({}) is mounted at {}: unmount that first",
                what(),
                mount.fs_type,
                mount.target.display()
            ),
        ));
    }
    tracing::warn!(
        "{}: nothing is mounted there, so what it holds was copied with the store: removed",
        dir.display()
    );
    fs::remove_dir_all(dir).context(what)
}

/// Unmounts everything that is mounted from the block device of a run directory.
///
/// # Errors
/// As [`unmount_all`].
pub fn unmount_device(run_dir: &RunDir, force: bool) -> Result<()> {
    match device::status(run_dir)?.and_then(|status| status.disk) {
        Some(device) => unmount_all(device, force),
        None => device::unmount_deleted(run_dir),
    }
}

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

/// Where a container is mounted, if it is.
///
/// # Errors
/// Where the host's mounts cannot be read.
pub fn mounted(store: &Store, container: &ContainerRecord) -> Result<Option<Mounted>> {
    let Some(status) = device::status(&store.run_dir(container))? else {
        return Ok(None);
    };
    let Some(device) = status.disk else {
        return Ok(None);
    };
    let Some(number) = device.major_minor() else {
        return Ok(None);
    };
    let mounts = MountInfo::read()?;
    let first = mounts.into_iter().find(|mount| mount.major_minor == number);
    Ok(first.map(|mount| Mounted {
        given_up: ext4::has_given_up(&mount),
        dir: mount.target,
        device: device.path(),
    }))
}
