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
use nix::sys::stat::{FileStat, SFlag, fstat, major, minor};
use nix::unistd::{Whence, lseek};

use super::content::Content;
use super::node::{Extent, Kind, MAX_DEPTH, Node, PERMISSIONS, Xattrs, join, shown};
use super::rooted::{
    atime, file_type, is_directory, look, mtime, names, open_directory, open_file, proc_path,
};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// The most data runs of a sparse file that are kept in memory; one with more counts as dense.
const MAX_EXTENTS: usize = 64 * 1024;

/// How often a name is looked at that programs give to one file after the other.
const LOOKS: u32 = 100;

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
        // The magic link of the directory itself has to be followed.
        self.xattrs_at(&path, name.is_empty(), name)
    }

    fn xattrs_at(&self, path: &Path, follow: bool, name: &[u8]) -> Result<Xattrs> {
        let doing = || {
            let path = if name.is_empty() {
                self.path.clone()
            } else {
                join(&self.path, name)
            };
            format!("reading the xattrs of {}", shown(&path))
        };
        let list = if follow {
            xattr::list_deref(path)
        } else {
            xattr::list(path)
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
                xattr::get_deref(path, &attribute)
            } else {
                xattr::get(path, &attribute)
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

    /// Opens the regular file `name` in it, whose attributes were `stat`, and gives those that it has. `ESTALE`
    /// where it is another by now.
    fn open_same(&self, name: &[u8], stat: &FileStat) -> Result<(File, FileStat)> {
        let file = self.open(name)?;
        let look = || {
            let now = fstat(&file)?;
            match (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino) {
                true => Ok(now),
                false => Err(Errno::ESTALE),
            }
        };
        let now = look().context(|| format!("opening {}", shown(&join(&self.path, name))))?;
        Ok((file, now))
    }

    /// Describes `name`, whose attributes are `stat`, and opens it if it is a regular file.
    pub(super) fn node(&self, name: &[u8], stat: &FileStat) -> Result<(Node, Option<File>)> {
        let path = join(&self.path, name);
        if file_type(stat) == SFlag::S_IFREG {
            let (file, now) = self.open_same(name, stat)?;
            let extents = extents(&file, &now)
                .context(|| format!("looking for holes in {}", shown(&path)))?;
            let size = now.st_size.cast_unsigned();
            let xattrs = self.xattrs_at(&proc_path(&file, b""), true, name)?;
            let node = describe(path, Kind::File { size, extents }, &now, xattrs);
            return Ok((node, Some(file)));
        }
        let (major, minor) = (major(stat.st_rdev) as u32, minor(stat.st_rdev) as u32);
        let kind = match file_type(stat).bits() {
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
        Ok((describe(path, kind, stat, xattrs), None))
    }

    /// As [`Level::node`], of a tree that programs change meanwhile, with the attributes that it went by: what
    /// they put in the place of `name` counts. `None` where it is gone, as if it had never been listed.
    pub(super) fn node_now(&self, name: &[u8]) -> Result<Option<(FileStat, Node, Option<File>)>> {
        let mut looks = 0;
        loop {
            let Some(stat) = self.look(name)? else {
                return Ok(None);
            };
            looks += 1;
            match self.node(name, &stat) {
                Ok((node, file)) => return Ok(Some((stat, node, file))),
                Err(error) if is_another(&error) && looks < LOOKS => {}
                Err(error) => return Err(error),
            }
        }
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
    walk_from(&Level::root(root)?, &|_| false, visit)
}

/// As [`walk`], below a directory that is open, under the path that it is given there, without what lies
/// at `hidden` paths.
pub(super) fn walk_from(
    root: &Level,
    hidden: &dyn Fn(&[u8]) -> bool,
    visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
) -> Result<()> {
    visit(root.own_node()?, None)?;
    walk_level(root, hidden, &mut HashMap::new(), visit)
}

fn walk_level(
    level: &Level,
    hidden: &dyn Fn(&[u8]) -> bool,
    links: &mut HashMap<(u64, u64), Vec<u8>>,
    visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
) -> Result<()> {
    let names = match level.names() {
        // It was removed meanwhile, with all that was in it.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for name in names {
        if hidden(&join(&level.path, &name)) {
            continue;
        }
        let Some((stat, node, file)) = level.node_now(&name)? else {
            continue;
        };
        let linked = !is_directory(&stat) && stat.st_nlink > 1;
        if linked && let Some(first) = links.get(&(stat.st_dev, stat.st_ino)) {
            let kind = Kind::HardLink(first.clone());
            let path = join(&level.path, &name);
            visit(describe(path, kind, &stat, Xattrs::new()), None)?;
            continue;
        }
        if linked {
            links.insert((stat.st_dev, stat.st_ino), node.path.clone());
        }
        visit(node, file)?;
        if is_directory(&stat) {
            let mut entered = false;
            let walked = level.descend(&name, |inner| {
                entered = true;
                walk_level(inner, hidden, links, visit)
            });
            match walked {
                // It is none any more.
                Err(error) if !entered && is_another(&error) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// Whether a failure says that a name was taken away, or given to something else, since it was looked at.
fn is_another(error: &Error) -> bool {
    let gone = [
        libc::ENOENT,
        libc::ENOTDIR,
        libc::ELOOP,
        libc::ESTALE,
        // Of readlink(2).
        libc::EINVAL,
    ];
    error
        .raw_os_error()
        .is_some_and(|errno| gone.contains(&errno))
}

/// The data of an open file, run by run.
pub(super) struct FileContent<'a> {
    file: &'a File,
    extents: Vec<Extent>,
    index: usize,
    done: u64,
    /// It may become shorter while it is read: its name.
    changing: Option<String>,
    /// It did, and that was said.
    short: bool,
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
            changing: None,
            short: false,
        }
    }

    /// As [`FileContent::new`], for a file that programs may change meanwhile. Where it becomes shorter, zeros
    /// stand for the rest, as GNU tar has it: what reads it was told the length, and goes on.
    pub fn of_changing(file: &'a File, node: &Node) -> Self {
        FileContent {
            changing: Some(node.shown()),
            ..FileContent::new(file, &node.kind)
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
            if count > 0 || most == 0 {
                self.done += count as u64;
                return Ok(count);
            }
            let Some(name) = &self.changing else {
                return Ok(0);
            };
            if !self.short {
                tracing::warn!("{name}: became shorter while it was read: zeros fill it up");
                self.short = true;
            }
            into.fill(0);
            self.done += most as u64;
            return Ok(most);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(content: &mut FileContent<'_>) -> Vec<u8> {
        let mut all = Vec::new();
        let mut piece = [1; 7];
        loop {
            let count = content.read(&mut piece).unwrap();
            if count == 0 {
                return all;
            }
            all.extend(piece.iter().take(count));
        }
    }

    #[test]
    fn a_file_that_is_replaced_after_a_look_at_it_is_described_as_what_is_there_then() {
        let dir = tempfile::tempdir().unwrap();
        let (conf, next) = (dir.path().join("conf"), dir.path().join("next"));
        std::fs::write(&conf, [1; 10]).unwrap();
        let level = Level::root(dir.path()).unwrap();
        let old = level.look(b"conf").unwrap().unwrap();
        // As programs write a file that others read.
        std::fs::write(&next, [2; 5000]).unwrap();
        std::fs::rename(&next, &conf).unwrap();
        let error = level.node(b"conf", &old).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
        let (stat, node, file) = level.node_now(b"conf").unwrap().unwrap();
        assert_ne!(stat.st_ino, old.st_ino);
        let read = read_all(&mut FileContent::new(&file.unwrap(), &node.kind));
        assert_eq!(read, [2; 5000]);
        // What is no file any more is not opened as one.
        std::fs::remove_file(&conf).unwrap();
        nix::unistd::mkfifo(&conf, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let error = level.node(b"conf", &old).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
        let (_, node, _) = level.node_now(b"conf").unwrap().unwrap();
        assert_eq!(node.kind, Kind::Fifo);
        std::fs::remove_file(&conf).unwrap();
        assert!(level.node_now(b"conf").unwrap().is_none());
    }

    #[test]
    fn zeros_stand_for_what_is_cut_off_of_a_file_that_programs_change_and_of_no_other() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("log"), [5; 20]).unwrap();
        let level = Level::root(dir.path()).unwrap();
        let stat = level.look(b"log").unwrap().unwrap();
        let (node, file) = level.node(b"log", &stat).unwrap();
        let file = file.unwrap();
        OpenOptions::new()
            .write(true)
            .open(dir.path().join("log"))
            .unwrap()
            .set_len(3)
            .unwrap();
        let cut = read_all(&mut FileContent::of_changing(&file, &node));
        assert_eq!(cut, [&[5; 3][..], &[0; 17]].concat());
        assert_eq!(read_all(&mut FileContent::new(&file, &node.kind)), [5; 3]);
    }
}
