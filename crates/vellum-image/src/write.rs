//! Writes trees as tars: PAX headers, so that every attribute that is read is written too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::stat::SFlag;
use tar_core::{EntryBuilder, EntryType};

use super::Progress;
use super::apply::WHITEOUT;
use super::content::Content;
use super::diff::{Change, ChangeKind, Foreign};
use super::holes;
use super::node::{Kind, Node, Time, Xattrs, join, normalise, shown, split, to_path};
use super::rooted::{Rooted, file_type, is_directory};
use super::walk::{FileContent, Level, NoContent, walk};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

/// A tar being written.
pub(super) struct TarWriter<W: Write> {
    output: W,
    buffer: Vec<u8>,
}

impl<W: Write> TarWriter<W> {
    /// Starts a tar.
    pub fn new(output: W) -> Self {
        TarWriter {
            output,
            buffer: vec![0; 128 * 1024],
        }
    }

    /// Appends `node` with its `content`, of which there are `length` bytes.
    pub fn append(&mut self, node: &Node, length: u64, content: &mut dyn Content) -> Result<()> {
        self.put(node, length, content)
            .context(|| format!("writing {} to the tar", node.shown()))
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "a source gives no more than it is asked for; padding is shorter than 512 bytes"
    )]
    fn put(&mut self, node: &Node, length: u64, content: &mut dyn Content) -> Result<()> {
        let header = header(node, length)?;
        let failed = || "writing the archive";
        self.output.write_all(&header).context(failed)?;
        let mut left = length;
        while left > 0 {
            interrupt::check()?;
            let most = left.min(self.buffer.len() as u64) as usize;
            let (buffer, _) = self.buffer.split_at_mut(most);
            let count = content.read(buffer)?;
            if count == 0 {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("it became {left} bytes shorter while it was read"),
                ));
            }
            self.output.write_all(&buffer[..count]).context(failed)?;
            left -= count as u64;
        }
        let padding = length.next_multiple_of(512) - length;
        self.output
            .write_all(&[0; 512][..padding as usize])
            .context(failed)
    }

    /// Writes the end marker and gives the output back.
    pub fn finish(mut self) -> Result<W> {
        self.output
            .write_all(&[0; 1024])
            .and_then(|()| self.output.flush())
            .context(|| "writing the archive's end")?;
        Ok(self.output)
    }
}

fn unsupported(error: tar_core::HeaderError) -> Error {
    Error::with_source(ErrorKind::Unsupported, "a tar cannot hold it", error)
}

fn header(node: &Node, length: u64) -> Result<Vec<u8>> {
    let mut path = node.path.clone();
    match node.kind {
        Kind::Directory if path.is_empty() => path.extend(b"./"),
        Kind::Directory => path.push(b'/'),
        _ => {}
    }
    let mut entry = EntryBuilder::new_ustar();
    entry
        .path(&path)
        .mode(node.mode)
        .and_then(|entry| entry.uid(u64::from(node.uid)))
        .and_then(|entry| entry.gid(u64::from(node.gid)))
        .and_then(|entry| entry.mtime(node.mtime.seconds.max(0).cast_unsigned()))
        .and_then(|entry| entry.size(length))
        .map_err(unsupported)?;
    if node.mtime.nanoseconds > 0 || node.mtime.seconds < 0 {
        entry.add_pax("mtime", node.mtime.to_string());
    }
    for (name, value) in &node.xattrs {
        let name = std::str::from_utf8(name).map_err(|_| {
            Error::new(
                ErrorKind::Unsupported,
                format!("its xattr {} is not named in UTF-8", shown(name)),
            )
        })?;
        let name = name.replace('%', "%25").replace('=', "%3D");
        entry.add_pax(&format!("SCHILY.xattr.{name}"), value);
    }
    put_kind(&mut entry, &node.kind)?;
    Ok(entry.finish_bytes())
}

/// Says in the header what the node is, with what only its kind has.
fn put_kind(entry: &mut EntryBuilder, kind: &Kind) -> Result<()> {
    let mut device = |kind: EntryType, major: u32, minor: u32| -> Result<()> {
        entry.entry_type(kind);
        entry.device(major, minor).map(drop).map_err(unsupported)
    };
    match kind {
        Kind::File { size, extents } => {
            entry.entry_type(EntryType::Regular);
            if let Some(extents) = extents {
                entry.sparse(&holes::map(extents, *size), *size);
            }
        }
        Kind::Directory => {
            entry.entry_type(EntryType::Directory);
        }
        Kind::Symlink(target) => {
            entry.entry_type(EntryType::Symlink).link_name(target);
        }
        Kind::HardLink(target) => {
            entry.entry_type(EntryType::Link).link_name(target);
        }
        Kind::CharDevice { major, minor } => device(EntryType::Char, *major, *minor)?,
        Kind::BlockDevice { major, minor } => device(EntryType::Block, *major, *minor)?,
        Kind::Fifo => {
            entry.entry_type(EntryType::Fifo);
        }
        Kind::Socket => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a tar cannot hold a socket",
            ));
        }
    }
    Ok(())
}

/// Appends a node of a tree with the data of its file.
pub(super) fn append<W: Write>(
    tar: &mut TarWriter<W>,
    node: Node,
    file: Option<&File>,
    progress: &mut Option<Progress<'_>>,
) -> Result<()> {
    let read = |file, node: &Node| FileContent::new(file, &node.kind);
    let length = append_read(tar, node, file, read)?;
    if let (Some(progress), Some(_)) = (progress, file) {
        progress(length);
    }
    Ok(())
}

/// As [`append`], of a tree that programs change meanwhile.
pub(super) fn append_changing<W: Write>(
    tar: &mut TarWriter<W>,
    node: Node,
    file: Option<&File>,
) -> Result<()> {
    append_read(tar, node, file, FileContent::of_changing).map(drop)
}

/// Appends a node with what `read` finds in its file; the bytes of that.
fn append_read<'f, W: Write>(
    tar: &mut TarWriter<W>,
    mut node: Node,
    file: Option<&'f File>,
    read: impl Fn(&'f File, &Node) -> FileContent<'f>,
) -> Result<u64> {
    if node.kind == Kind::Socket {
        tracing::debug!(path = node.shown(), "socket left out of the tar");
        return Ok(0);
    }
    holes::fill_without_room(&mut node);
    let Some(file) = file else {
        return tar.append(&node, 0, &mut NoContent).map(|()| 0);
    };
    let mut content = read(file, &node);
    let length = content.length();
    tar.append(&node, length, &mut content).map(|()| length)
}

/// Writes the tree at `root`, without what is `foreign` in it, as the tar of a root file system to `output`.
///
/// The order is fixed (directories first, names sorted), so that the same tree gives the same
/// bytes. Sockets have no place in a tar and are left out, and so is the empty `lost+found`
/// that ext4 keeps. `progress` hears of the bytes of data written.
///
/// # Errors
///
/// `Io` with the file that could not be read, or when `output` fails; `Unsupported` for an
/// attribute that a tar cannot hold.
pub fn write_rootfs_tar(
    root: &Path,
    foreign: &Foreign,
    output: impl Write,
    mut progress: Option<Progress<'_>>,
) -> Result<()> {
    let mut tar = TarWriter::new(output);
    let skip_lost_found = is_empty_lost_found(root)?;
    let as_made = as_made(root, foreign)?;
    walk(root, &mut |mut node, file| {
        interrupt::check()?;
        if skip_lost_found && node.path == b"lost+found" || as_made.contains(&node.path) {
            return Ok(());
        }
        if node.kind == Kind::Directory {
            restore_time(&mut node, foreign);
        }
        append(&mut tar, node, file.as_ref(), &mut progress)
    })?;
    tar.finish().map(drop)
}

/// What of `foreign` is there as it was made: files with nothing in them, directories with nothing but one
/// another.
fn as_made(root: &Path, foreign: &Foreign) -> Result<BTreeSet<Vec<u8>>> {
    let mut tree = Rooted::open(root)?;
    let mut found = BTreeSet::new();
    // What lies in a directory comes before it.
    for (path, is_made_directory) in foreign.points.iter().rev() {
        let Ok(path) = normalise(path.as_os_str().as_bytes()) else {
            continue;
        };
        let Some((above, name)) = split(&path) else {
            continue;
        };
        let Some(level) = level(&mut tree, above)? else {
            continue;
        };
        let Some(stat) = level.look(name)? else {
            continue;
        };
        let untouched = match is_made_directory {
            true if is_directory(&stat) => {
                let names = level.enter(name)?.names()?;
                names
                    .iter()
                    .all(|inner| found.contains(&join(&path, inner)))
            }
            false => file_type(&stat) == SFlag::S_IFREG && stat.st_size == 0,
            true => false,
        };
        if untouched {
            found.insert(path);
        }
    }
    Ok(found)
}

/// Gives a directory the time that it had before others made something in it.
fn restore_time(node: &mut Node, foreign: &Foreign) {
    let path = Path::new("/").join(to_path(&node.path));
    let made = foreign.times.get(&path);
    if made == Some(&(node.mtime.seconds, node.mtime.nanoseconds.into()))
        && let Some((seconds, nanoseconds)) = foreign.before.get(&path)
        && let Ok(nanoseconds) = u32::try_from(*nanoseconds)
    {
        node.mtime = Time {
            seconds: *seconds,
            nanoseconds,
        };
    }
}

fn is_empty_lost_found(root: &Path) -> Result<bool> {
    let root = Level::root(root)?;
    match root.look(b"lost+found")? {
        Some(stat) if is_directory(&stat) => Ok(root.enter(b"lost+found")?.names()?.is_empty()),
        _ => Ok(false),
    }
}

/// How to write a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerTarOptions {
    /// Programs change the tree meanwhile: what they removed since it was compared is left out, or a
    /// deletion if it was there before, and a file counts as it is when its turn comes.
    pub changing: bool,
    /// Holes of files are written as zeros, but for files with more than 256 MiB of them. The OCI image specification
    /// advises against sparse files in layers that others read, since not all of them can: stargz-snapshotter's
    /// converter takes what is behind a hole for what is in it.
    pub dense: bool,
    /// No modification time is later than this one, in seconds since 1970, and deletions have it.
    pub newest: Option<i64>,
}

/// Writes `changes`, what [`diff_trees`](super::diff_trees) found at `upper`, to `output` as an
/// OCI layer: new and changed files whole, deletions as whiteouts.
///
/// The order is that of the sorted paths, so that the same change gives the same bytes. A
/// changed file with further names that did not change comes with all of them, since a layer
/// that replaced one name would cut the link. `progress` hears of the bytes of data written.
///
/// # Errors
///
/// `Unsupported` for a file whose own name begins with `.wh.`, which a layer cannot hold;
/// `NotFound` when `upper` changed meanwhile and is not said to; `Io` when a file cannot be read or
/// `output` fails.
pub fn write_layer_tar(
    upper: &Path,
    changes: &[Change],
    output: impl Write,
    options: LayerTarOptions,
    progress: Option<Progress<'_>>,
) -> Result<()> {
    let mut layer = LayerTar {
        upper,
        tree: Rooted::open(upper)?,
        tar: TarWriter::new(output),
        options,
        progress,
        links: HashMap::new(),
        vanished: BTreeSet::new(),
    };
    // A whiteout sorts by the name it hides.
    let mut all = BTreeMap::new();
    for change in changes {
        let path = normalise(change.path.as_os_str().as_bytes()).map_err(|why| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("path {:?} refused: {why}", change.path),
            )
        })?;
        all.insert(path, change.kind);
    }
    layer.add_other_names(&mut all)?;
    for (path, kind) in &all {
        match kind {
            ChangeKind::Deleted => layer.put_whiteout(path)?,
            ChangeKind::Added | ChangeKind::Changed => layer.put(path, *kind)?,
        }
    }
    layer.tar.finish().map(drop)
}

/// A layer being written.
struct LayerTar<'a, W: Write> {
    upper: &'a Path,
    tree: Rooted,
    tar: TarWriter<W>,
    options: LayerTarOptions,
    progress: Option<Progress<'a>>,
    /// The first name of each file with several, by inode.
    links: HashMap<u64, Vec<u8>>,
    /// What programs removed since the trees were compared.
    vanished: BTreeSet<Vec<u8>>,
}

impl<W: Write> LayerTar<'_, W> {
    fn put(&mut self, path: &[u8], kind: ChangeKind) -> Result<()> {
        let Some((above, name)) = split(path) else {
            let root = Level::root(self.upper)?.own_node()?;
            return self.append(root, None);
        };
        if name.starts_with(WHITEOUT) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: in an image layer a name that begins with .wh. means a deletion",
                    shown(path)
                ),
            ));
        }
        let found = match level(&mut self.tree, above)? {
            Some(level) => level.node_now(name)?,
            None => None,
        };
        let Some((stat, mut node, file)) = found else {
            return self.put_vanished(path, kind);
        };
        if !is_directory(&stat) && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                node.kind = Kind::HardLink(first.clone());
                node.xattrs = Xattrs::new();
                return self.append(node, None);
            }
            self.links.insert(stat.st_ino, path.to_vec());
        }
        self.append(node, file.as_ref())
    }

    fn append(&mut self, mut node: Node, file: Option<&File>) -> Result<()> {
        if let Some(newest) = self.options.newest {
            let newest = Time {
                seconds: newest,
                nanoseconds: 0,
            };
            node.mtime = node.mtime.min(newest);
        }
        if self.options.dense {
            holes::fill_for_all(&mut node);
        }
        match self.options.changing {
            true => append_changing(&mut self.tar, node, file),
            false => append(&mut self.tar, node, file, &mut self.progress),
        }
    }

    /// What the comparison found and is gone. What was there before is a deletion now, unless what it
    /// lay in is one.
    fn put_vanished(&mut self, path: &[u8], kind: ChangeKind) -> Result<()> {
        if !self.options.changing {
            return Err(vanished(path));
        }
        let mut above = split(path);
        while let Some((directory, _)) = above {
            if self.vanished.contains(directory) {
                return Ok(());
            }
            above = split(directory);
        }
        self.vanished.insert(path.to_vec());
        match kind {
            ChangeKind::Changed => self.put_whiteout(path),
            ChangeKind::Added | ChangeKind::Deleted => Ok(()),
        }
    }

    fn put_whiteout(&mut self, path: &[u8]) -> Result<()> {
        let mut node = whiteout(path)?;
        node.mtime.seconds = self.options.newest.unwrap_or(0);
        self.tar.append(&node, 0, &mut NoContent)
    }

    /// Adds to `paths` the names outside it of files that it holds some names of.
    fn add_other_names(&mut self, paths: &mut BTreeMap<Vec<u8>, ChangeKind>) -> Result<()> {
        let mut names: HashMap<u64, u64> = HashMap::new();
        let mut missing = HashMap::new();
        for (path, kind) in paths.iter() {
            let Some((above, name)) = split(path) else {
                continue;
            };
            if *kind == ChangeKind::Deleted {
                continue;
            }
            let level = level(&mut self.tree, above)?;
            let found = level.map(|level| level.look(name)).transpose()?.flatten();
            let stat = match found {
                Some(stat) => stat,
                // Its turn comes, and says so.
                None if self.options.changing => continue,
                None => return Err(vanished(path)),
            };
            if !is_directory(&stat) && stat.st_nlink > 1 {
                let count = names.entry(stat.st_ino).or_default();
                *count += 1;
                if *count < stat.st_nlink {
                    missing.insert(stat.st_ino, ());
                } else {
                    missing.remove(&stat.st_ino);
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let root = Level::root(self.upper)?;
        find_names(&root, &missing, self.options.changing, paths)
    }
}

/// The directory at `path`, if it is there.
fn level(tree: &mut Rooted, path: &[u8]) -> Result<Option<Level>> {
    let Some(directory) = tree.find(path)? else {
        return Ok(None);
    };
    let fd = directory.fd.try_clone();
    let fd = fd.context(|| format!("opening {}", shown(path)))?;
    Ok(Some(Level::at(fd, path)))
}

fn vanished(path: &[u8]) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("{}: it was there when the trees were compared", shown(path)),
    )
}

fn find_names(
    level: &Level,
    wanted: &HashMap<u64, ()>,
    changing: bool,
    paths: &mut BTreeMap<Vec<u8>, ChangeKind>,
) -> Result<()> {
    for name in level.names()? {
        let Some(stat) = level.look(&name)? else {
            continue;
        };
        if is_directory(&stat) {
            let below = level.descend(&name, |inner| find_names(inner, wanted, changing, paths));
            match below {
                // Removed, or made something else, since it was looked at.
                Err(error)
                    if changing && level.look(&name)?.is_none_or(|now| !is_directory(&now)) =>
                {
                    tracing::debug!("{error}");
                }
                below => below?,
            }
        } else if wanted.contains_key(&stat.st_ino) {
            paths
                .entry(join(&level.path, &name))
                .or_insert(ChangeKind::Changed);
        }
    }
    Ok(())
}

/// The empty file that hides `path`.
fn whiteout(path: &[u8]) -> Result<Node> {
    let (above, name) = split(path).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            "the root of a tree cannot be deleted by a layer",
        )
    })?;
    Ok(plain_file(join(above, &[WHITEOUT, name].concat()), 0, 0))
}

/// A regular file of root's with no history.
pub(super) fn plain_file(path: Vec<u8>, size: u64, mode: u32) -> Node {
    Node {
        path,
        kind: Kind::File {
            size,
            extents: None,
        },
        mode,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        atime: None,
        xattrs: Xattrs::new(),
    }
}
