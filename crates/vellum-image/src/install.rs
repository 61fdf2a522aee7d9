//! Puts one node after another into a tree, with all its attributes.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, futimens, makedev, mkdirat, mknodat,
    utimensat,
};
use nix::unistd::{Gid, Uid, fchown, fchownat, linkat, symlinkat};
use xattr::FileExt as _;

use super::aside::{Aside, Part};
use super::content::{CHUNK, Content, Place, fill};
use super::node::{CAPABILITY, Extent, Kind, Node, Time, Xattrs, shown};
use super::rooted::{
    Directory, Rooted, failure, is_directory, look, open_directory, parent_of, proc_path, remove,
};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// What surely fits the block that a file's extended attributes share, in bytes.
const XATTRS_IN_A_BLOCK: usize = 2048;

/// What was put into a tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ApplyStats {
    /// Regular files.
    pub files: u64,
    /// Directories that were listed, whether they were new or not.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files.
    pub hard_links: u64,
    /// Devices, fifos and sockets.
    pub specials: u64,
    /// Whiteouts and opaque markers that were obeyed.
    pub whiteouts: u64,
    /// Bytes written into files: holes do not count.
    pub written: u64,
    /// Extended attributes that this file system or file type cannot have.
    pub skipped_xattrs: u64,
    /// Device nodes that were left out since nobody wanted them.
    pub left_out: u64,
    /// Whether the archive had its end marker. A stream that stopped early may lack it.
    pub end_marker: bool,
}

impl std::ops::AddAssign for ApplyStats {
    fn add_assign(&mut self, more: Self) {
        self.files += more.files;
        self.directories += more.directories;
        self.symlinks += more.symlinks;
        self.hard_links += more.hard_links;
        self.specials += more.specials;
        self.whiteouts += more.whiteouts;
        self.written += more.written;
        self.skipped_xattrs += more.skipped_xattrs;
        self.left_out += more.left_out;
        self.end_marker &= more.end_marker;
    }
}

/// A tree that nodes are put into.
pub(super) struct Installer<'a> {
    tree: Rooted,
    /// Takes what new files hold.
    aside: Option<&'a mut Aside>,
    devices: bool,
    /// As programs change a tree, and not as layers do.
    strict: bool,
    /// Hashes of (inode of the directory, name) for all that this run put there.
    mine: HashSet<u64>,
    hasher: RandomState,
    /// Times for directories once all is in them, by inode.
    times: HashMap<u64, (Vec<u8>, Time, Time)>,
    buffer: Vec<u8>,
    pub stats: ApplyStats,
}

impl<'a> Installer<'a> {
    /// Starts on the tree at `target`; `devices` says whether device nodes may be made, `aside` takes what new files
    /// hold, where it is not to be in the tree.
    pub fn new(target: &Path, devices: bool, aside: Option<&'a mut Aside>) -> Result<Self> {
        let mut tree = Rooted::open(target)?;
        tree.keep_times();
        let installer = Installer::on(tree, devices);
        Ok(Installer { aside, ..installer })
    }

    /// As [`Installer::new`], for one who changes the tree and does not add a layer to it: a file never
    /// takes the place of a directory, nor a directory that of anything else, and a directory that is not
    /// listed has the times that changes give it.
    pub fn strict(tree: Rooted) -> Self {
        Installer {
            strict: true,
            ..Installer::on(tree, true)
        }
    }

    fn on(tree: Rooted, devices: bool) -> Self {
        Installer {
            tree,
            aside: None,
            devices,
            strict: false,
            mine: HashSet::new(),
            hasher: RandomState::new(),
            times: HashMap::new(),
            buffer: vec![0; CHUNK],
            stats: ApplyStats::default(),
        }
    }

    /// Puts `node` in its place, with `content` for a file, over whatever was there.
    ///
    /// A directory over a directory keeps what is inside; everything else is replaced.
    pub fn install(&mut self, node: &Node, content: &mut dyn Content) -> Result<()> {
        self.place(node, content)
            .context(|| format!("unpacking {}", node.shown()))
    }

    fn place(&mut self, node: &Node, content: &mut dyn Content) -> Result<()> {
        if node.path.is_empty() && node.kind == Kind::Directory {
            let root = self.tree.find_or_make(b"")?;
            let root = root.fd.try_clone().context(|| "opening the root")?;
            self.stats.directories += 1;
            return self.finish_directory(node, root);
        }
        let (above, name) = parent_of(&node.path)?;
        let parent = self.tree.find_or_make(above)?;
        self.remember_times(above, &parent);
        let key = self.key(parent.inode, name);
        match &node.kind {
            Kind::Directory => {
                self.make(&parent, name, true, |parent| {
                    mkdirat(parent, name, Mode::from_bits_truncate(0o700))
                })?;
                let directory = open_directory(&*parent, name).context(|| "opening it")?;
                self.finish_directory(node, directory)?;
                self.stats.directories += 1;
            }
            Kind::File { size, extents } => {
                let flags = OFlag::O_WRONLY
                    | OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC;
                let fd = self.make(&parent, name, false, |parent| {
                    openat(parent, name, flags, Mode::from_bits_truncate(0o600))
                })?;
                let file = File::from(fd.ok_or_else(|| unmade("file"))?);
                self.fill(&file, *size, extents.as_deref(), content)?;
                file.set_len(*size)
                    .context(|| format!("setting its size to {size} bytes"))?;
                self.finish_file(node, &file)?;
                self.stats.files += 1;
            }
            Kind::Symlink(target) => {
                self.make(&parent, name, false, |parent| {
                    symlinkat(target.as_slice(), parent, name)
                })?;
                self.finish_other(node, &parent, name)?;
                self.stats.symlinks += 1;
            }
            Kind::HardLink(target) => self.link(target, &parent, name)?,
            Kind::CharDevice { major, minor } => {
                self.special(node, &parent, name, SFlag::S_IFCHR, (*major, *minor))?;
            }
            Kind::BlockDevice { major, minor } => {
                self.special(node, &parent, name, SFlag::S_IFBLK, (*major, *minor))?;
            }
            Kind::Fifo => self.special(node, &parent, name, SFlag::S_IFIFO, (0, 0))?,
            Kind::Socket => self.special(node, &parent, name, SFlag::S_IFSOCK, (0, 0))?,
        }
        self.mine.insert(key);
        Ok(())
    }

    /// Removes what earlier layers have at `path`; what this layer put there stays.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let (above, name) = parent_of(path)?;
        let Some(parent) = self.tree.find(above)? else {
            return Ok(());
        };
        self.remember_times(above, &parent);
        self.prune(&parent, name)
            .context(|| format!("removing {}", shown(path)))?;
        self.stats.whiteouts += 1;
        Ok(())
    }

    /// Removes what earlier layers have inside the directory `path`.
    pub fn opaque(&mut self, path: &[u8]) -> Result<()> {
        let Some(directory) = self.tree.find(path)? else {
            return Ok(());
        };
        self.remember_times(path, &directory);
        let inside = super::rooted::names(&*directory)
            .map_err(|errno| failure(path, "listing it for an opaque marker", errno))?;
        for name in inside {
            self.prune(&directory, &name)
                .context(|| format!("emptying {}", shown(path)))?;
        }
        self.stats.whiteouts += 1;
        Ok(())
    }

    fn prune(&mut self, parent: &Rc<Directory>, name: &[u8]) -> Result<()> {
        let keep = |inode: u64, name: &[u8]| self.mine.contains(&self.key(inode, name));
        let removed = remove(&**parent, parent.inode, name, &keep, 0);
        self.tree.forget();
        removed
            .map(drop)
            .context(|| format!("removing {}", shown(name)))
    }

    fn key(&self, inode: u64, name: &[u8]) -> u64 {
        self.hasher.hash_one((inode, name))
    }

    /// Runs `make`; when something is in its way, removes that first.
    ///
    /// With `merge`, a directory that is there already is as good as a new one, and `None`.
    fn make<T>(
        &mut self,
        parent: &Rc<Directory>,
        name: &[u8],
        merge: bool,
        make: impl Fn(&Directory) -> nix::Result<T>,
    ) -> Result<Option<T>> {
        match make(parent) {
            Ok(made) => return Ok(Some(made)),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(Error::io("making it", errno.into())),
        }
        let there = look(&**parent, name).context(|| "looking at what is there")?;
        let directory = there.as_ref().is_some_and(is_directory);
        if merge && directory {
            return Ok(None);
        }
        if self.strict && (merge || directory) {
            let why = match directory {
                true => "a directory is there, and stays one",
                false => "it is a directory, and no directory is there",
            };
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        let removed = remove(&**parent, parent.inode, name, &|_, _| false, 0);
        // A directory or a link to one may have been on the way to directories held open.
        if directory || there.is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFLNK) {
            self.tree.forget();
        }
        removed.context(|| "removing what was there")?;
        make(parent).map(Some).context(|| "making it")
    }

    fn link(&mut self, target: &[u8], parent: &Rc<Directory>, name: &[u8]) -> Result<()> {
        let missing = || {
            Error::new(
                ErrorKind::NotFound,
                format!("it is a hard link to {}, which is not there", shown(target)),
            )
        };
        let (above, target_name) = parent_of(target)?;
        let source = self.tree.find(above)?.ok_or_else(missing)?;
        let there = look(&*source, target_name)
            .context(|| "looking at its link target")?
            .ok_or_else(missing)?;
        if is_directory(&there) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("it is a hard link to {}, a directory", shown(target)),
            ));
        }
        let here = look(&**parent, name).context(|| "looking at what is there")?;
        if here.is_none_or(|here| here.st_ino != there.st_ino) {
            self.make(parent, name, false, |parent| {
                linkat(&*source, target_name, parent, name, AtFlags::empty())
            })
            .context(|| format!("linking it to {}", shown(target)))?;
        }
        self.stats.hard_links += 1;
        Ok(())
    }

    fn special(
        &mut self,
        node: &Node,
        parent: &Rc<Directory>,
        name: &[u8],
        kind: SFlag,
        (major, minor): (u32, u32),
    ) -> Result<()> {
        let device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
        if device && !self.devices {
            return Err(Error::new(
                ErrorKind::Permission,
                format!("it is the device {major}:{minor}, and devices are not allowed here"),
            ));
        }
        let number = makedev(u64::from(major), u64::from(minor));
        self.make(parent, name, false, |parent| {
            mknodat(parent, name, kind, Mode::from_bits_truncate(0o600), number)
        })?;
        self.finish_other(node, parent, name)?;
        self.stats.specials += 1;
        Ok(())
    }

    /// Puts the content of a new file where it belongs.
    fn fill(
        &mut self,
        file: &File,
        size: u64,
        extents: Option<&[Extent]>,
        content: &mut dyn Content,
    ) -> Result<()> {
        let aside = self.aside.as_mut();
        let part = aside.map(|aside| aside.begin(file, size));
        let mut part = part.transpose().context(|| "looking at it")?.flatten();
        let whole = [Extent {
            offset: 0,
            length: size,
        }];
        let (to, first) = part.as_ref().map_or((file, 0), Part::place);
        let mut place = Place {
            file: to,
            first,
            written: &mut |bytes| {
                if let Some(part) = &mut part {
                    part.note(bytes);
                }
            },
        };
        for extent in extents.unwrap_or(&whole) {
            let (offset, length) = (extent.offset, extent.length);
            self.stats.written += fill(&mut place, &mut self.buffer, offset, length, content)?;
        }
        if let Some(part) = part {
            part.end();
        }
        Ok(())
    }

    fn finish_file(&mut self, node: &Node, file: &File) -> Result<()> {
        // Changing the owner clears set-id bits and capabilities, so it comes first.
        owned(
            node,
            fchown(
                file,
                Some(Uid::from_raw(node.uid)),
                Some(Gid::from_raw(node.gid)),
            ),
        )?;
        file.set_permissions(Permissions::from_mode(node.mode))
            .context(|| "setting its mode")?;
        self.set_xattrs(&node.xattrs, |name, value| file.set_xattr(name, value))?;
        futimens(file, &access(node).spec(), &node.mtime.spec()).context(|| "setting its times")
    }

    fn finish_directory(&mut self, node: &Node, directory: OwnedFd) -> Result<()> {
        let file = File::from(directory);
        let stat = nix::sys::stat::fstat(&file).context(|| "reading its attributes")?;
        owned(
            node,
            fchown(
                &file,
                Some(Uid::from_raw(node.uid)),
                Some(Gid::from_raw(node.gid)),
            ),
        )?;
        // The node says all: what an earlier layer had set on this directory is gone.
        for name in file.list_xattr().context(|| "listing its xattrs")? {
            let bytes = name.as_bytes();
            if !node.xattrs.contains_key(bytes) && replaceable(bytes) {
                file.remove_xattr(&name)
                    .context(|| format!("removing its xattr {name:?}"))?;
            }
        }
        file.set_permissions(Permissions::from_mode(node.mode))
            .context(|| "setting its mode")?;
        self.set_xattrs(&node.xattrs, |name, value| file.set_xattr(name, value))?;
        self.times
            .insert(stat.st_ino, (node.path.clone(), access(node), node.mtime));
        Ok(())
    }

    fn finish_other(&mut self, node: &Node, parent: &Rc<Directory>, name: &[u8]) -> Result<()> {
        owned(
            node,
            fchownat(
                &**parent,
                name,
                Some(Uid::from_raw(node.uid)),
                Some(Gid::from_raw(node.gid)),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            ),
        )?;
        if !matches!(node.kind, Kind::Symlink(_)) {
            let mode = Mode::from_bits_truncate(node.mode);
            fchmodat(&**parent, name, mode, FchmodatFlags::NoFollowSymlink)
                .context(|| "setting its mode")?;
        }
        let path = proc_path(&**parent, name);
        self.set_xattrs(&node.xattrs, |name, value| xattr::set(&path, name, value))?;
        utimensat(
            &**parent,
            name,
            &access(node).spec(),
            &node.mtime.spec(),
            UtimensatFlags::NoFollowSymlink,
        )
        .context(|| "setting its times")
    }

    fn set_xattrs(
        &mut self,
        xattrs: &Xattrs,
        set: impl Fn(&OsStr, &[u8]) -> io::Result<()>,
    ) -> Result<()> {
        for (name, value) in xattrs {
            let shown_name = OsStr::from_bytes(name);
            match set(shown_name, value) {
                Ok(()) => {}
                Err(error) if unsupported(name, &error) => {
                    tracing::warn!(name = ?shown_name, "extended attribute left out: {error}");
                    self.stats.skipped_xattrs += 1;
                }
                Err(error) => {
                    let limit = match error.raw_os_error() {
                        Some(libc::ENOSPC | libc::E2BIG) if value.len() > XATTRS_IN_A_BLOCK => {
                            ", more than this file system keeps for a file (an ext4 made without \
                             its feature ea_inode: some 4000 bytes)"
                        }
                        _ => "",
                    };
                    return Err(Error::io(
                        format!(
                            "setting its xattr {shown_name:?} of {} bytes{limit}",
                            value.len()
                        ),
                        error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Notes the times of a directory before its content changes, to put them back at the end.
    fn remember_times(&mut self, path: &[u8], directory: &Directory) {
        if self.strict {
            return;
        }
        self.times
            .entry(directory.inode)
            .or_insert_with(|| (path.to_vec(), directory.atime, directory.mtime));
    }

    /// Sets the times of all directories, now that nothing changes in them any more.
    pub fn finish(mut self) -> Result<ApplyStats> {
        self.tree.forget();
        for (inode, (path, atime, mtime)) in &self.times {
            // Something else may be there by now.
            let Some(directory) = self.tree.find(path)? else {
                continue;
            };
            if directory.inode == *inode {
                futimens(&*directory, &atime.spec(), &mtime.spec())
                    .context(|| format!("setting the times of {}", shown(path)))?;
            }
        }
        Ok(self.stats)
    }
}

fn access(node: &Node) -> Time {
    // An archive that does not say leaves the modification time as the best guess.
    node.atime.unwrap_or(node.mtime)
}

fn owned<T>(node: &Node, result: nix::Result<T>) -> Result<T> {
    result.map_err(|errno| {
        let hint = if errno == Errno::EPERM {
            " (this needs root)"
        } else {
            ""
        };
        let doing = format!("giving it to {}:{}{hint}", node.uid, node.gid);
        Error::io(doing, errno.into())
    })
}

fn unmade(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("the {what} was not made"))
}

/// Attributes that a layer's entry for a directory replaces as a whole.
///
/// Labels of a security module are the host's business.
fn replaceable(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || name.starts_with(b"system.posix_acl_")
        || name == CAPABILITY
}

/// Whether this attribute cannot exist here, rather than that setting it failed.
fn unsupported(name: &[u8], error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => true,
        // Links, devices and fifos have no user attributes.
        Some(libc::EPERM) => name.starts_with(b"user."),
        _ => false,
    }
}
