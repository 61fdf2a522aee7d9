//! Two trees that are compared, wherever they are.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::FileStat;
use nix::unistd::{Whence, lseek};

use super::node::{MAX_DEPTH, Xattrs, join, shown};
use super::walk::Level;
use vellum_base::Result;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, in_memory};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;

/// What a tree says of a file without its content, as stat(2) has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Its number in its file system.
    pub inode: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device that a device node stands for.
    pub device: u64,
    /// Bytes.
    pub size: u64,
    /// When its content changed: seconds since 1970 and nanoseconds.
    pub mtime: (i64, i64),
    /// When anything of it changed.
    pub ctime: (i64, i64),
}

impl Attributes {
    /// The type among the bits of the mode.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(super) fn is_directory(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.file_type() == libc::S_IFREG
    }
}

impl From<FileStat> for Attributes {
    fn from(stat: FileStat) -> Self {
        Attributes {
            inode: stat.st_ino,
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            device: stat.st_rdev,
            size: stat.st_size.cast_unsigned(),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// A directory of a tree that is compared.
pub trait Directory: Sized {
    /// Its path from the root of the tree, without a slash in front; empty of the root itself.
    fn path(&self) -> &[u8];

    /// How many directories it lies in.
    fn depth(&self) -> usize;

    /// The names in it, sorted by their bytes.
    ///
    /// # Errors
    /// Where it cannot be read, as of all others here.
    fn names(&self) -> Result<Vec<Vec<u8>>>;

    /// Its own attributes.
    fn attributes(&self) -> Result<Attributes>;

    /// The attributes of `name` in it; `None` where that is gone.
    fn look(&self, name: &[u8]) -> Result<Option<Attributes>>;

    /// The extended attributes of `name` in it, or its own for an empty name.
    fn xattrs(&self, name: &[u8]) -> Result<Xattrs>;

    /// The target of the link `name` in it.
    fn link_target(&self, name: &[u8]) -> Result<Vec<u8>>;

    /// Does something with the directory `name` in it.
    fn descend(&self, name: &[u8], walk: impl FnOnce(&Self) -> Result<()>) -> Result<()>;
}

/// Two trees: an older state and a newer one.
pub trait Trees: Sync {
    /// A directory of the older tree.
    type Older: Directory;
    /// A directory of the newer tree.
    type Newer: Directory;

    /// The roots of both.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn roots(&self) -> Result<(Self::Older, Self::Newer)>;

    /// False only where it is known that nothing differs at `name`, which both directories have, and
    /// below it.
    ///
    /// # Errors
    /// Where a directory cannot be read.
    fn may_differ(&self, _older: &Self::Older, _newer: &Self::Newer, _name: &[u8]) -> Result<bool> {
        Ok(true)
    }

    /// Compares the regular file `name` of `newer` with that of `older`, or with nothing: behind its end a
    /// file counts as zeros. Calls `each` with the offset and length of every piece that differs, until it
    /// breaks: pieces are [`BLOCK_SIZE`] bytes from the start of the file on, the last ends with the file.
    ///
    /// # Errors
    /// Where one of the files cannot be read.
    fn compare_contents(
        &self,
        older: Option<&Self::Older>,
        newer: &Self::Newer,
        name: &[u8],
        each: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<()>;
}

/// Two trees that are mounted. Neither may change while they are compared: mount both read-only, or
/// take each path as it happens to be.
#[derive(Debug, Clone)]
pub struct MountedTrees {
    older: PathBuf,
    newer: PathBuf,
}

impl MountedTrees {
    /// The trees with these roots.
    pub fn new(older: &Path, newer: &Path) -> Self {
        MountedTrees {
            older: older.to_owned(),
            newer: newer.to_owned(),
        }
    }
}

impl Trees for MountedTrees {
    type Older = Level;
    type Newer = Level;

    fn roots(&self) -> Result<(Level, Level)> {
        Ok((Level::root(&self.older)?, Level::root(&self.newer)?))
    }

    fn compare_contents(
        &self,
        older: Option<&Level>,
        newer: &Level,
        name: &[u8],
        each: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<()> {
        let older = older.map(|older| older.open(name)).transpose()?;
        compare_files(older.as_ref(), &newer.open(name)?, each)
            .context(|| format!("comparing {}", shown(&join(&newer.path, name))))
    }
}

impl Directory for Level {
    fn path(&self) -> &[u8] {
        &self.path
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn names(&self) -> Result<Vec<Vec<u8>>> {
        Level::names(self)
    }

    fn attributes(&self) -> Result<Attributes> {
        Ok(self.stat()?.into())
    }

    fn look(&self, name: &[u8]) -> Result<Option<Attributes>> {
        Ok(Level::look(self, name)?.map(Attributes::from))
    }

    fn xattrs(&self, name: &[u8]) -> Result<Xattrs> {
        Level::xattrs(self, name)
    }

    fn link_target(&self, name: &[u8]) -> Result<Vec<u8>> {
        Level::link_target(self, name)
    }

    fn descend(&self, name: &[u8], walk: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        Level::descend(self, name, walk)
    }
}

/// Whether nothing below a directory is walked: no path could name it.
pub(super) fn is_deepest(directory: &impl Directory) -> bool {
    directory.depth() >= MAX_DEPTH
}

/// As [`Trees::compare_contents`], of open files; where both have a hole nothing is read.
fn compare_files(
    older: Option<&File>,
    newer: &File,
    each: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> std::io::Result<()> {
    const CHUNK: usize = 32 * BLOCK_LEN;
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let size = newer.metadata()?.len();
    let mut at = 0;
    while at < size {
        interrupt::check_io()?;
        let old = older
            .map(|older| next_data(older, at))
            .transpose()?
            .flatten();
        let data = match (old, next_data(newer, at)?) {
            (None, None) => return Ok(()),
            (Some(only), None) | (None, Some(only)) => only,
            (Some(old), Some(new)) => old.min(new),
        };
        if data >= size {
            return Ok(());
        }
        at = data - data % BLOCK_SIZE;
        let len = in_memory((size - at).min(CHUNK as u64));
        let (left, _) = left.split_at_mut(len);
        let (right, _) = right.split_at_mut(len);
        match older {
            Some(older) => read_full(older, left, at)?,
            None => left.fill(0),
        }
        read_full(newer, right, at)?;
        for (old, new) in left.chunks(BLOCK_LEN).zip(right.chunks(BLOCK_LEN)) {
            if old != new && each(at, new.len() as u64).is_break() {
                return Ok(());
            }
            at += new.len() as u64;
        }
    }
    Ok(())
}

/// Where data begins at or after `offset`; `None` when only a hole follows.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<u64>> {
    let from = i64::try_from(offset).map_err(std::io::Error::other)?;
    match lseek(file, from, Whence::SeekData) {
        Ok(data) => Ok(Some(data.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        // This file system cannot tell.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(offset)),
        Err(errno) => Err(errno.into()),
    }
}

/// Fills `into` from `offset`, with zeros behind the end of the file.
pub(super) fn read_full(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<()> {
    let (mut rest, mut at) = (into, offset);
    while !rest.is_empty() {
        match file.read_at(rest, at) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => {
                at += count as u64;
                rest = rest.split_at_mut(count).1;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
