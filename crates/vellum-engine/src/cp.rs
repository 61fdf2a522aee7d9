//! Files into a container and out of it, as `docker cp` moves them.

use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::reach::{Access, reach};
use super::run::mounted_volumes;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::ext4;
use vellum_image::{
    ApplyStats, Owners, TransferOptions, View, transfer, transfer_from_tar, transfer_to_tar,
};
use vellum_store::{ContainerRecord, Store};

/// Bytes of which a file system has fewer where it is full: what it keeps for itself is not free.
const LITTLE: u64 = 1 << 20;

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Regular files, and further names of them.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Links, fifos, sockets and device nodes.
    pub others: u64,
    /// Bytes written into files: holes do not count.
    pub bytes: u64,
    /// Device nodes that the host did not get.
    pub left_out: u64,
}

impl From<ApplyStats> for Copied {
    fn from(stats: ApplyStats) -> Self {
        Copied {
            files: stats.files + stats.hard_links,
            directories: stats.directories,
            others: stats.symlinks + stats.specials,
            bytes: stats.written,
            left_out: stats.left_out,
        }
    }
}

/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Owners stay; else what comes into a container is root's, and what comes out this process's.
    pub archive: bool,
    /// Where the source is a link, what it leads to is copied.
    pub follow: bool,
}

/// Writes what is at `path` in a container as a tar.
///
/// # Errors
/// As [`transfer_to_tar`]; [`vellum_base::ErrorKind::Unsupported`] for a container without ext4, [`vellum_base::ErrorKind::InUse`]
/// for one that is served over NBD.
pub fn copy_to_tar(
    store: &Store,
    name: &str,
    path: &Path,
    follow: bool,
    output: impl Write,
) -> Result<()> {
    read_from(store, name, |view| {
        transfer_to_tar(view, bytes(path), follow, output)
    })
}

/// Copies what is at `path` in a container to `target` on the host. Device nodes are made with
/// `archive` alone: they are the host's there.
///
/// # Errors
/// As [`transfer`] and [`copy_to_tar`].
pub fn copy_to_host(
    store: &Store,
    name: &str,
    path: &Path,
    target: &Path,
    options: CopyOptions,
) -> Result<Copied> {
    let target = absolute(target)?;
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let how = TransferOptions {
        follow: options.follow,
        owners: owners(options, uid.as_raw(), gid.as_raw()),
        devices: options.archive,
    };
    let host = View::of_host()?;
    read_from(store, name, |view| {
        transfer(view, bytes(path), &host, bytes(&target), &how).map(Copied::from)
    })
}

/// Unpacks a tar into the directory `path` of a container. Owners are the tar's.
///
/// # Errors
/// As [`transfer_from_tar`] and [`copy_to_tar`]; [`vellum_base::ErrorKind::ReadOnly`] where the container may not
/// be written.
pub fn copy_from_tar(store: &Store, name: &str, input: impl Read, path: &Path) -> Result<Copied> {
    write_to(store, name, |view| {
        transfer_from_tar(input, view, bytes(path)).map(Copied::from)
    })
}

/// Copies what is at `source` on the host to `path` in a container.
///
/// # Errors
/// As [`transfer`] and [`copy_from_tar`].
pub fn copy_from_host(
    store: &Store,
    name: &str,
    source: &Path,
    path: &Path,
    options: CopyOptions,
) -> Result<Copied> {
    let source = absolute(source)?;
    let how = TransferOptions {
        follow: options.follow,
        owners: owners(options, 0, 0),
        devices: true,
    };
    let host = View::of_host()?;
    write_to(store, name, |view| {
        transfer(&host, bytes(&source), view, bytes(path), &how).map(Copied::from)
    })
}

fn owners(options: CopyOptions, uid: u32, gid: u32) -> Owners {
    match options.archive {
        true => Owners::Kept,
        false => Owners::Given { uid, gid },
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// A path of the host from its root, with what it ends with: a slash or a dot there mean something.
fn absolute(path: &Path) -> Result<PathBuf> {
    let here = std::env::current_dir().context(|| "the working directory")?;
    Ok(here.join(path))
}

fn read_from<T>(store: &Store, name: &str, work: impl FnOnce(&View) -> Result<T>) -> Result<T> {
    let container = store.container(name)?;
    reach(store, &container, Access::Look, |reached| {
        work(&view_of(store, &container, reached.dir)?)
    })
}

fn write_to<T>(store: &Store, name: &str, work: impl FnOnce(&View) -> Result<T>) -> Result<T> {
    let container = store.container(name)?;
    reach(store, &container, Access::Change, |reached| {
        let view = view_of(store, &container, reached.dir)?;
        work(&view).map_err(|error| name_the_limit(error, name, reached.dir))
    })
}

/// Says where the container's own file system is full, and what to do.
fn name_the_limit(error: Error, name: &str, dir: &Path) -> Error {
    if error.kind() != ErrorKind::NoSpace {
        return error;
    }
    let Ok(usage) = ext4::usage(dir) else {
        return error;
    };
    let what = match (usage.files_used >= usage.files, usage.free < LITTLE) {
        (true, _) => format!("all of its {} inodes are in use", usage.files),
        (_, true) => format!("its {} bytes are full", usage.size),
        // A volume, or the host's disk.
        _ => return error,
    };
    error.context(format!(
        "the file system of {name}: {what}: remove files, or `vellum resize {name} SIZE`"
    ))
}

/// A container's files as its programs see them, with its volumes where they are mounted when it runs.
fn view_of(store: &Store, container: &ContainerRecord, dir: &Path) -> Result<View> {
    let name = &container.name;
    let mut view = View::new(&format!("{name}:"), dir)?;
    if container.confinement.read_only {
        view.forbid_writes(&format!("the root file system of {name} is read-only"));
    }
    for volume in mounted_volumes(store, container, dir)? {
        let read_only = volume
            .read_only
            .then(|| format!("it lies in a volume that is read-only in {name}"));
        view.mount(&volume.source, &volume.destination, read_only)?;
    }
    Ok(view)
}
