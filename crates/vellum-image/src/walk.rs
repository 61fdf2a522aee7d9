//! Walks a tree and describes each file in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::readlinkat;
use nix::sys::stat::{FileStat, fstat, major, minor};
use nix::unistd::{Whence, lseek};

use super::install::Content;
use super::node::{Extent, Kind, MAX_DEPTH, Node, PERMISSIONS, Xattrs, join, shown};
use super::rooted::{
    atime, file_type, is_directory, look, mtime, names, open_directory, open_file, proc_path,
};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// The most data runs of a sparse file that are kept in memory; one with more counts as dense.
const MAX_EXTENTS: usize = 64 * 1024;

/// Levels of a walk whose directories stay open: one that is deeper is closed while what is below it
/// is walked, so that no tree takes more descriptors than a process may have.
const OPEN_LEVELS: usize = 64;

/// A directory of a tree that is being walked.
pub struct Level {
    /// `None` while something below is walked.
    fd: RefCell<Option<OwnedFd>>,
    pub(super) path: Vec<u8>,
    pub(super) depth: usize,
}

impl Level {
    /// The root of the tree at `path`.
    pub(super) fn root(path: &Path) -> Result<Level> {
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .context(|| format!("opening the directory {path:?}"))?;
        Ok(Level {
            fd: RefCell::new(Some(root.into())),
            path: Vec::new(),
            depth: 0,
        })
    }

    /// The directory at `path` of a tree, which is open.
    pub(super) fn at(fd: OwnedFd, path: &[u8]) -> Level {
        Level {
            fd: RefCell::new(Some(fd)),
            path: path.to_vec(),
            depth: path.iter().filter(|byte| **byte == b'/').count(),
        }
    }

    /// Does something with the open directory.
    fn with<T>(&self, work: impl FnOnce(&OwnedFd) -> nix::Result<T>) -> nix::Result<T> {
        // Nobody asks a level that is closed: what is walked is below it.
        self.fd.borrow().as_ref().map_or(Err(Errno::EBADF), work)
    }

    /// Whether nothing in it can be walked.
    pub(super) fn is_deepest(&self) -> bool {
        self.depth >= MAX_DEPTH
    }

    /// The names in it, sorted.
    pub(super) fn names(&self) -> Result<Vec<Vec<u8>>> {
        self.with(names)
            .context(|| format!("listing {}", shown(&self.path)))
    }

    /// Walks the directory `name` in it.
    pub(super) fn descend(
        &self,
        name: &[u8],
        walk: impl FnOnce(&Level) -> Result<()>,
    ) -> Result<()> {
        let inner = self.enter(name)?;
        if self.depth < OPEN_LEVELS {
            return walk(&inner);
        }
        let own = self
            .with(|fd| fstat(fd))
            .context(|| format!("reading {}", shown(&self.path)))?;
        drop(self.fd.take());
        walk(&inner)?;
        let back = inner
            .with(|inner| open_directory(inner, b".."))
            .context(|| format!("going back to {}", shown(&self.path)))?;
        let there = fstat(&back).context(|| format!("reading {}", shown(&self.path)))?;
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("{}: it was moved while it was read", shown(&self.path)),
            ));
        }
        self.fd.replace(Some(back));
        Ok(())
    }

    /// The directory `name` in it, for a look; [`Level::descend`] walks.
    pub(super) fn enter(&self, name: &[u8]) -> Result<Level> {
        let path = join(&self.path, name);
        if self.is_deepest() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: directories nest deeper than {MAX_DEPTH} here",
                    shown(&path)
                ),
            ));
        }
        let fd = self
            .with(|fd| open_directory(fd, name))
            .context(|| format!("opening {}", shown(&path)))?;
        Ok(Level {
            fd: RefCell::new(Some(fd)),
            path,
            depth: self.depth + 1,
        })
    }

    /// The attributes of the directory itself.
    pub(super) fn stat(&self) -> Result<FileStat> {
        self.with(|fd| fstat(fd))
            .context(|| format!("reading the attributes of {}", shown(&self.path)))
    }

    /// The attributes of `name`; `None` when it is gone.
    pub(super) fn look(&self, name: &[u8]) -> Result<Option<FileStat>> {
        self.with(|fd| look(fd, name)).context(|| {
            format!(
                "reading the attributes of {}",
                shown(&join(&self.path, name))
            )
        })
    }

    /// The target of the link `name`.
    pub(super) fn link_target(&self, name: &[u8]) -> Result<Vec<u8>> {
        let target = self
            .with(|fd| readlinkat(fd, name))
            .context(|| format!("reading the link {}", shown(&join(&self.path, name))))?;
        Ok(target.as_bytes().to_vec())
    }

    /// The extended attributes of `name`, or of the directory itself for an empty name.
    pub(super) fn xattrs(&self, name: &[u8]) -> Result<Xattrs> {
        let path = self
            .with(|fd| Ok(proc_path(fd, name)))
            .context(|| format!("reading {}", shown(&self.path)))?;
        let doing = || {
            let path = if name.is_empty() {
                self.path.clone()
            } else {
                join(&self.path, name)
            };
            format!("reading the xattrs of {}", shown(&path))
        };
        // The magic link of the directory itself has to be followed.
        let follow = name.is_empty();
        let list = if follow {
            xattr::list_deref(&path)
        } else {
            xattr::list(&path)
        };
        let list = match list {
            Ok(list) => list,
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(Xattrs::new());
            }
            Err(error) => return Err(Error::io(doing(), error)),
        };
        let mut xattrs = Xattrs::new();
        for attribute in list {
            let value = if follow {
                xattr::get_deref(&path, &attribute)
            } else {
                xattr::get(&path, &attribute)
            };
            if let Some(value) = value.context(doing)? {
                xattrs.insert(attribute.as_bytes().to_vec(), value);
            }
        }
        Ok(xattrs)
    }

    /// Opens the regular file `name` in it.
    pub(super) fn open(&self, name: &[u8]) -> Result<File> {
        self.with(|fd| open_file(fd, name))
            .context(|| format!("opening {}", shown(&join(&self.path, name))))
    }

    /// Describes `name`, whose attributes are `stat`, and opens it if it is a regular file.
    pub(super) fn node(&self, name: &[u8], stat: &FileStat) -> Result<(Node, Option<File>)> {
        let path = join(&self.path, name);
        let mut file = None;
        let size = stat.st_size.cast_unsigned();
        let (major, minor) = (major(stat.st_rdev) as u32, minor(stat.st_rdev) as u32);
        let kind = match file_type(stat).bits() {
            libc::S_IFREG => {
                let opened = self.open(name)?;
                let extents = extents(&opened, stat)
                    .context(|| format!("looking for holes in {}", shown(&path)))?;
                file = Some(opened);
                Kind::File { size, extents }
            }
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFLNK => Kind::Symlink(self.link_target(name)?),
            libc::S_IFCHR => Kind::CharDevice { major, minor },
            libc::S_IFBLK => Kind::BlockDevice { major, minor },
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{} is of the unknown type {other:#o}", shown(&path)),
                ));
            }
        };
        let xattrs = self.xattrs(name)?;
        Ok((describe(path, kind, stat, xattrs), file))
    }

    /// Describes the directory itself.
    pub(super) fn own_node(&self) -> Result<Node> {
        let stat = self.stat()?;
        let xattrs = self.xattrs(b"")?;
        Ok(describe(self.path.clone(), Kind::Directory, &stat, xattrs))
    }
}

fn describe(path: Vec<u8>, kind: Kind, stat: &FileStat, xattrs: Xattrs) -> Node {
    Node {
        path,
        kind,
        mode: stat.st_mode & PERMISSIONS,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: mtime(stat),
        atime: Some(atime(stat)),
        xattrs,
    }
}

/// Where a file has data; `None` when it has no hole (or too many to list).
fn extents(file: &File, stat: &FileStat) -> io::Result<Option<Vec<Extent>>> {
    let size = stat.st_size;
    if stat.st_blocks.saturating_mul(512) >= size {
        return Ok(None);
    }
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => break,
            // This file system cannot tell.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start, Whence::SeekHole)?.min(size);
        if start >= size || end <= start {
            break;
        }
        if extents.len() >= MAX_EXTENTS {
            return Ok(None);
        }
        extents.push(Extent {
            offset: start.cast_unsigned(),
            length: (end - start).cast_unsigned(),
        });
        at = end;
    }
    let whole = matches!(extents.as_slice(), [only] if only.offset == 0
        && only.length == size.cast_unsigned());
    Ok((!whole).then_some(extents))
}

/// Visits every node below a root, directories before what is in them, names sorted.
///
/// Further names of a file become [`Kind::HardLink`] to the first. The file comes along open.
pub(super) fn walk(
    root: &Path,
    visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
) -> Result<()> {
    let root = Level::root(root)?;
    visit(root.own_node()?, None)?;
    let mut links = HashMap::new();
    walk_level(&root, &mut links, visit)
}

fn walk_level(
    level: &Level,
    links: &mut HashMap<(u64, u64), Vec<u8>>,
    visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
) -> Result<()> {
    for name in level.names()? {
        let Some(stat) = level.look(&name)? else {
            continue;
        };
        if !is_directory(&stat) && stat.st_nlink > 1 {
            let path = join(&level.path, &name);
            if let Some(first) = links.get(&(stat.st_dev, stat.st_ino)) {
                let kind = Kind::HardLink(first.clone());
                visit(describe(path, kind, &stat, Xattrs::new()), None)?;
                continue;
            }
            links.insert((stat.st_dev, stat.st_ino), path);
        }
        let (node, file) = level.node(&name, &stat)?;
        visit(node, file)?;
        if is_directory(&stat) {
            level.descend(&name, |inner| walk_level(inner, links, visit))?;
        }
    }
    Ok(())
}

/// The data of an open file, run by run.
pub(super) struct FileContent<'a> {
    file: &'a File,
    extents: Vec<Extent>,
    index: usize,
    done: u64,
}

impl<'a> FileContent<'a> {
    /// The data of `file`, described by `kind`.
    pub fn new(file: &'a File, kind: &Kind) -> Self {
        let extents = match kind {
            Kind::File {
                extents: Some(extents),
                ..
            } => extents.clone(),
            Kind::File {
                size,
                extents: None,
            } => vec![Extent {
                offset: 0,
                length: *size,
            }],
            _ => Vec::new(),
        };
        FileContent {
            file,
            extents,
            index: 0,
            done: 0,
        }
    }

    /// How many bytes it has.
    pub fn length(&self) -> u64 {
        self.extents.iter().map(|extent| extent.length).sum()
    }
}

impl Content for FileContent<'_> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        while let Some(extent) = self.extents.get(self.index) {
            let left = extent.length - self.done;
            if left == 0 {
                self.index += 1;
                self.done = 0;
                continue;
            }
            let most = left.min(into.len() as u64) as usize;
            let (into, _) = into.split_at_mut(most);
            let count = self
                .file
                .read_at(into, extent.offset + self.done)
                .context(|| "reading the source file")?;
            self.done += count as u64;
            return Ok(count);
        }
        Ok(0)
    }
}

/// No data, for everything that is not a regular file.
pub(super) struct NoContent;

impl Content for NoContent {
    fn read(&mut self, _: &mut [u8]) -> Result<usize> {
        Ok(0)
    }
}
