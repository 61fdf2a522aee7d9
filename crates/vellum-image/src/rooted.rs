//! A directory that nothing can leave: every name is resolved by the kernel inside it.
//!
//! Parents are opened with `openat2(RESOLVE_IN_ROOT)`, under which absolute links and `..` stay
//! below the root; the last component is then only ever touched relative to its parent and
//! without following links. There is no moment at which a link placed by an archive could divert
//! a write.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, futimens, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::node::{MAX_DEPTH, Time, join, shown, split, to_path};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// How many parent directories are kept open.
const OPEN_DIRECTORIES: usize = 128;

/// How many links are followed on the way to a directory that does not exist yet.
const MAX_LINKS: usize = 40;

/// The times of a directory of which nobody says any: the first second of 2020, as the empty file system has
/// it for its root.
const UNSAID: Time = Time {
    seconds: 1_577_836_800,
    nanoseconds: 0,
};

/// A directory in the tree, open.
#[derive(Debug)]
pub(super) struct Directory {
    pub fd: OwnedFd,
    /// Its inode number.
    pub inode: u64,
    /// Its times when it was opened.
    pub mtime: Time,
    pub atime: Time,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A tree that names cannot leave.
#[derive(Debug)]
pub(super) struct Rooted {
    root: OwnedFd,
    /// Names may lead into what is mounted in it.
    crosses: bool,
    /// A directory that is made since a name leads through it has [`UNSAID`] as its times, and the one that
    /// it is made in keeps its own.
    keeps_times: bool,
    open: HashMap<Vec<u8>, Rc<Directory>>,
}

impl Rooted {
    /// Opens `path`, which must be a directory.
    pub fn open(path: &Path) -> Result<Rooted> {
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .context(|| format!("opening the directory {path:?}"))?;
        Ok(Rooted {
            root: root.into(),
            crosses: false,
            keeps_times: false,
            open: HashMap::new(),
        })
    }

    /// Lets names lead into what others have mounted in the tree.
    pub fn cross_mounts(&mut self) {
        self.crosses = true;
    }

    /// Has directories that are made on the way leave no trace of when that was.
    pub fn keep_times(&mut self) {
        self.keeps_times = true;
    }

    /// The same tree once more, with nothing of it known yet.
    pub fn again(&self) -> Result<Rooted> {
        Ok(Rooted {
            root: self
                .root
                .try_clone()
                .context(|| "opening the root of a tree")?,
            crosses: self.crosses,
            keeps_times: self.keeps_times,
            open: HashMap::new(),
        })
    }

    /// Opens the directory at `path` (empty: the root), through whatever links lead there.
    ///
    /// # Errors
    ///
    /// `ENOENT` and `ENOTDIR` among others, bare, for the caller to act on.
    pub fn resolve(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let path: &OsStr = OsStr::from_bytes(if path.is_empty() { b"." } else { path });
        let mut inside = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        if !self.crosses {
            inside |= ResolveFlag::RESOLVE_NO_XDEV;
        }
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(inside);
        let mut tries = 0;
        loop {
            match openat2(&self.root, path, how) {
                // A rename somewhere on the host raced with the resolution of a "..".
                Err(Errno::EAGAIN | Errno::EINTR) if tries < 100 => tries += 1,
                other => return other,
            }
        }
    }

    /// The directory at `path`, or `None` when there is none (or something else lies there).
    pub fn find(&mut self, path: &[u8]) -> Result<Option<Rc<Directory>>> {
        if let Some(directory) = self.open.get(path) {
            return Ok(Some(directory.clone()));
        }
        match self.resolve(path) {
            Ok(fd) => Ok(Some(self.keep(path, fd)?)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(failure(path, "opening this directory", errno)),
        }
    }

    /// The directory at `path`, made with mode 0755 (and all above it) where it is missing.
    pub fn find_or_make(&mut self, path: &[u8]) -> Result<Rc<Directory>> {
        if let Some(directory) = self.open.get(path) {
            return Ok(directory.clone());
        }
        let fd = match self.resolve(path) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => self.make(path, 0)?,
            Err(errno) => return Err(failure(path, "opening this directory", errno)),
        };
        self.keep(path, fd)
    }

    fn keep(&mut self, path: &[u8], fd: OwnedFd) -> Result<Rc<Directory>> {
        let stat = fstat(&fd).map_err(|errno| failure(path, "reading its attributes", errno))?;
        if self.open.len() >= OPEN_DIRECTORIES {
            self.open.clear();
        }
        let directory = Rc::new(Directory {
            fd,
            inode: stat.st_ino,
            mtime: mtime(&stat),
            atime: atime(&stat),
        });
        self.open.insert(path.to_vec(), directory.clone());
        Ok(directory)
    }

    /// Makes every missing directory of `path`, which may go through links that dangle so far.
    fn make(&self, path: &[u8], links: usize) -> Result<OwnedFd> {
        let fail = |errno| failure(path, "making this directory", errno);
        if links > MAX_LINKS {
            return Err(fail(Errno::ELOOP));
        }
        let mut above = self.resolve(b"").map_err(fail)?;
        let mut done: Vec<u8> = Vec::new();
        for name in path
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
        {
            let here = join(&done, name);
            above = match self.resolve(&here) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) => {
                    let before = fstat(&above).map_err(fail)?;
                    match mkdirat(&above, name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) => {
                            let made = self.resolve(&here).map_err(fail)?;
                            self.settle(&made, &above, &before).map_err(fail)?;
                            made
                        }
                        Err(Errno::EEXIST) => {
                            let target = readlinkat(&above, name).map_err(fail)?;
                            let target = target.as_bytes();
                            let onward = if target.starts_with(b"/") {
                                target.to_vec()
                            } else {
                                join(&done, target)
                            };
                            self.make(&onward, links + 1)?
                        }
                        Err(errno) => return Err(fail(errno)),
                    }
                }
                Err(errno) => return Err(fail(errno)),
            };
            done = here;
        }
        Ok(above)
    }

    /// Gives a directory that was just made in `above` its mode and times, and that one those of `before`.
    fn settle(&self, made: &OwnedFd, above: &OwnedFd, before: &FileStat) -> nix::Result<()> {
        // Whatever the process's umask took away.
        fchmod(made, Mode::from_bits_truncate(0o755))?;
        if self.keeps_times {
            futimens(made, &UNSAID.spec(), &UNSAID.spec())?;
            futimens(above, &atime(before).spec(), &mtime(before).spec())?;
        }
        Ok(())
    }

    /// Forgets every open directory: something on a path may have changed.
    pub fn forget(&mut self) {
        self.open.clear();
    }
}

/// What lies at `name` in `directory`, links not followed; `None` when nothing does.
pub(super) fn look(directory: &impl AsFd, name: &[u8]) -> nix::Result<Option<FileStat>> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The file type in a mode.
pub(super) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT)
}

/// Whether it is a directory.
pub(super) fn is_directory(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// Modification time.
pub(super) fn mtime(stat: &FileStat) -> Time {
    Time {
        seconds: stat.st_mtime,
        nanoseconds: stat.st_mtime_nsec as u32,
    }
}

/// Access time.
pub(super) fn atime(stat: &FileStat) -> Time {
    Time {
        seconds: stat.st_atime,
        nanoseconds: stat.st_atime_nsec as u32,
    }
}

/// Opens the directory `name` in `parent`, links not followed.
pub(super) fn open_directory(parent: &impl AsFd, name: &[u8]) -> nix::Result<OwnedFd> {
    openat(
        parent,
        name,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// The names in a directory, sorted by their bytes.
pub(super) fn names(directory: &impl AsFd) -> nix::Result<Vec<Vec<u8>>> {
    // A fresh description, since reading moves the offset that all duplicates share.
    let mut directory = Dir::openat(
        directory,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A path that reaches `name` in `parent` for calls that know no `at` form.
///
/// The magic link stands for the open directory itself, so that nothing above can divert it.
pub(super) fn proc_path(parent: &impl AsFd, name: &[u8]) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", parent.as_fd().as_raw_fd()));
    if !name.is_empty() {
        path.push(to_path(name));
    }
    path
}

/// Opens a regular file for reading. `ESTALE` where something else is there by now, which is not opened: to
/// open a device is to use it.
pub(super) fn open_file(parent: &impl AsFd, name: &[u8]) -> nix::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = openat(parent, name, flags, Mode::empty())?;
    if file_type(&fstat(&found)?) != SFlag::S_IFREG {
        return Err(Errno::ESTALE);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    openat(AT_FDCWD, &proc_path(&found, b""), flags, Mode::empty()).map(File::from)
}

/// Removes `name` in `directory` and everything below it, without leaving it.
///
/// `keep(inode of directory, name)` spares a node; a directory with something spared in it stays, and keeps its
/// times.
/// Returns whether `name` is gone.
pub(super) fn remove(
    directory: &impl AsFd,
    inode: u64,
    name: &[u8],
    keep: &dyn Fn(u64, &[u8]) -> bool,
    depth: usize,
) -> nix::Result<bool> {
    let spared = keep(inode, name);
    let Some(stat) = look(directory, name)? else {
        return Ok(true);
    };
    if !is_directory(&stat) {
        if spared {
            return Ok(false);
        }
        unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
        return Ok(true);
    }
    if depth > MAX_DEPTH {
        return Err(Errno::ENAMETOOLONG);
    }
    let inner = open_directory(directory, name)?;
    let mut empty = true;
    for child in names(&inner)? {
        empty &= remove(&inner, stat.st_ino, &child, keep, depth + 1)?;
    }
    if spared || !empty {
        // What was removed in it leaves no trace of when that was.
        futimens(&inner, &atime(&stat).spec(), &mtime(&stat).spec())?;
        return Ok(false);
    }
    drop(inner);
    unlinkat(directory, name, UnlinkatFlags::RemoveDir)?;
    Ok(true)
}

/// An error about `path` in the tree.
pub(super) fn failure(path: &[u8], doing: &str, errno: Errno) -> Error {
    match errno {
        Errno::EXDEV => Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{}: {doing}: another file system is mounted there",
                shown(path)
            ),
        ),
        Errno::ENOTDIR => Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{}: {doing}: something on the way there is not a directory",
                shown(path)
            ),
        ),
        errno => Error::io(format!("{}: {doing}", shown(path)), errno.into()),
    }
}

/// The parent and the name of `path`, or an error for the root.
pub(super) fn parent_of(path: &[u8]) -> Result<(&[u8], &[u8])> {
    split(path).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            "the root of the tree can only be a directory",
        )
    })
}
