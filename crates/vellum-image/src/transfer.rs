//! Files out of a tree and into one, as `docker cp` moves them: to and from a tar, and between trees.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::PathBuf;

use super::apply::MemberContent;
use super::compress::{Decoder, buffered};
use super::content::Content;
use super::copy::Counted;
use super::install::{ApplyStats, Installer};
use super::members::Members;
use super::node::{CAPABILITY, Kind, Node, join, split, to_path};
use super::rooted::{file_type, is_directory, look, open_directory};
use super::view::{Entry, Spot, View, below, last_name, means_directory};
use super::walk::{FileContent, Level, NoContent, walk_from};
use super::write::{TarWriter, append_changing};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

/// Whose copied files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// As they were.
    Kept,
    /// All of this user and group. What a file could do for its owner, set-id bits and capabilities, it
    /// cannot do for another.
    Given {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
}

/// How to copy between trees.
#[derive(Debug, Clone, Copy)]
pub struct TransferOptions {
    /// Where the source is a link, what it leads to is copied, under the link's name.
    pub follow: bool,
    /// Whose the copies are.
    pub owners: Owners,
    /// Device nodes are made, and not left out.
    pub devices: bool,
}

/// Writes what is at `path`, a file or a directory with all in it, as a tar to `output`. Its names begin
/// with the last one of the path; for one that ends with `/.` they are those in the directory.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a path that leads nowhere; as [`write_rootfs_tar`].
///
/// [`write_rootfs_tar`]: super::write_rootfs_tar
pub fn transfer_to_tar(view: &View, path: &[u8], follow: bool, output: impl Write) -> Result<()> {
    let source = Source::find(view, path, follow)?;
    let mut tar = TarWriter::new(output);
    let name = source.name.clone().unwrap_or_default();
    source.visit(&name, &mut |node, file| {
        append_changing(&mut tar, node, file.as_ref())
    })?;
    tar.finish().map(drop)
}

/// Unpacks a tar, plain or compressed, into the directory `path`. Owners are the tar's.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] where there is no directory; as [`apply_layer`], and where a file would
/// take the place of a directory, or a directory that of something else.
///
/// [`apply_layer`]: super::apply_layer
pub fn transfer_from_tar(input: impl Read, view: &View, path: &[u8]) -> Result<ApplyStats> {
    let spot = view.locate(path, true)?;
    if !spot.is_directory() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} is no directory: a tar is unpacked into one that is there",
                view.shown(&spot.path)
            ),
        ));
    }
    let mut members: Members<Decoder<BufReader<_>>> = Members::new(Decoder::new(buffered(input))?);
    let mut sink = Sink::new(view, spot.path, Owners::Kept, true);
    let mut any = false;
    while let Some(member) = members.next()? {
        interrupt::check()?;
        any = true;
        sink.put(member.node, &mut MemberContent(&mut members))?;
    }
    members.drain()?;
    if !any && !members.end_marker() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "there is no tar: nothing came",
        ));
    }
    sink.finish(members.end_marker())
}

/// Copies what is at `source` to `target`: into a directory that is there, over a file, or under a new
/// name in a directory that is there.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a source, or a directory above the target, that is not there;
/// [`ErrorKind::InvalidInput`] where the one is a directory and the other is not, and where a directory
/// would be copied into itself; as [`copy_tree`](super::copy_tree).
pub fn transfer(
    from: &View,
    source: &[u8],
    to: &View,
    target: &[u8],
    options: &TransferOptions,
) -> Result<ApplyStats> {
    let source = Source::find(from, source, options.follow)?;
    let (into, name) = place(to, target, &source)?;
    let there = host_path(to, &into)?;
    let mut inside = false;
    for part in source.parts().iter().filter(|_| source.spot.is_directory()) {
        inside |= there.starts_with(host_path(from, part)?);
    }
    if inside {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} lies in {}: a directory cannot be copied into itself",
                to.shown(&into),
                from.shown(&source.spot.path)
            ),
        ));
    }
    let mut sink = Sink::new(to, into, options.owners, options.devices);
    source.visit(&name, &mut |node, file| match &file {
        Some(file) => {
            let mut content = Counted {
                content: FileContent::of_changing(file, &node),
                progress: &mut None,
            };
            sink.put(node, &mut content)
        }
        None => sink.put(node, &mut NoContent),
    })?;
    sink.finish(true)
}

/// Where a path lies on the host.
fn host_path(view: &View, path: &[u8]) -> Result<PathBuf> {
    let (tree, rest) = view.tree_of(path);
    Ok(view.dir_of(tree)?.join(to_path(rest)))
}

/// The directory to copy into, and the name there; an empty one for the content of a directory.
fn place(view: &View, target: &[u8], source: &Source<'_>) -> Result<(Vec<u8>, Vec<u8>)> {
    let spot = view.locate(target, true)?;
    let shown = view.shown(&spot.path);
    let refuse = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
    let directory = source.spot.is_directory();
    match &spot.stat {
        _ if spot.is_directory() => {
            return Ok((spot.path, source.name.clone().unwrap_or_default()));
        }
        Some(_) if directory => {
            return refuse(format!(
                "{shown} is no directory, so the directory {} cannot be copied there",
                source.view.shown(&source.spot.path)
            ));
        }
        Some(stat) if file_type(stat).bits() != libc::S_IFREG => {
            return refuse(format!(
                "{shown} is neither a directory nor a regular file: nothing is copied over it"
            ));
        }
        None if means_directory(target) && !directory => {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no directory {shown} to copy into: make it first"),
            ));
        }
        _ => {}
    }
    let Some((above, name)) = split(&spot.path) else {
        return Err(Error::internal("the root of a tree is not there"));
    };
    if !view.locate(above, true)?.is_directory() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "there is no directory {} to copy into: make it first",
                view.shown(above)
            ),
        ));
    }
    Ok((above.to_vec(), name.to_vec()))
}

/// What is copied.
struct Source<'a> {
    view: &'a View,
    spot: Spot,
    /// The name that it has as a copy; `None` where the content of a directory is meant.
    name: Option<Vec<u8>>,
}

impl<'a> Source<'a> {
    fn find(view: &'a View, path: &[u8], follow: bool) -> Result<Source<'a>> {
        let spot = view.locate(path, follow)?;
        if spot.stat.is_none() && !spot.is_directory() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no {}", view.shown(&spot.path)),
            ));
        }
        // Its own, also where it is a link that is followed; slashes behind it change nothing.
        let slashes = path.iter().rev().take_while(|byte| **byte == b'/');
        let (given, _) = path.split_at(path.len() - slashes.count());
        let name = match last_name(given) {
            b"" | b"." => None,
            b".." => split(&spot.path).map(|(_, name)| name),
            name => Some(name),
        };
        let name = name.map(<[u8]>::to_vec);
        Ok(Source { view, spot, name })
    }

    /// Visits it and all in it, under the path `name`, and what is mounted there with what is in that.
    fn visit(
        &self,
        name: &[u8],
        visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
    ) -> Result<()> {
        // One that is made when the container starts has nothing but mounts.
        let missing = usize::from(self.spot.stat.is_none());
        for path in self.parts().into_iter().skip(missing) {
            let at = match below(&path, &self.spot.path) {
                Some(at) if !at.is_empty() => join(name, at),
                _ => name.to_vec(),
            };
            visit_one(self.view, &path, &at, &mut |node, file| {
                interrupt::check()?;
                visit(node, file)
            })?;
        }
        Ok(())
    }

    /// Its path, and those of what is mounted below.
    fn parts(&self) -> Vec<Vec<u8>> {
        let mounts = self.view.mounts_below(&self.spot.path).into_iter();
        let mounts = mounts.map(|at| join(&self.spot.path, &at));
        std::iter::once(self.spot.path.clone())
            .chain(mounts)
            .collect()
    }
}

/// Visits what is at `path` of one tree, as `name`, without what is hidden by mounts in it.
fn visit_one(
    view: &View,
    path: &[u8],
    name: &[u8],
    visit: &mut dyn FnMut(Node, Option<File>) -> Result<()>,
) -> Result<()> {
    let gone = || {
        let text = format!("{} is gone", view.shown(path));
        Error::new(ErrorKind::NotFound, text)
    };
    let Entry {
        parent, name: last, ..
    } = view.entry(path)?.ok_or_else(gone)?;
    let mounts: Vec<Vec<u8>> = view
        .mounts_below(path)
        .iter()
        .map(|at| join(name, at))
        .collect();
    let hidden = |path: &[u8]| mounts.iter().any(|at| at == path);
    if last.is_empty() {
        return walk_from(&Level::at(parent, name), &hidden, visit);
    }
    let doing = || format!("opening {}", view.shown(path));
    let stat = look(&parent, &last).context(doing)?.ok_or_else(gone)?;
    if is_directory(&stat) {
        let inner = open_directory(&parent, &last).context(doing)?;
        return walk_from(&Level::at(inner, name), &hidden, visit);
    }
    let level = Level::at(parent, b"");
    let (_, node, file) = level.node_now(&last)?.ok_or_else(gone)?;
    let path = name.to_vec();
    visit(Node { path, ..node }, file)
}

/// Puts nodes into a directory of a view, each into the tree that it lies in there.
struct Sink<'a> {
    view: &'a View,
    /// The directory, without links.
    into: Vec<u8>,
    owners: Owners,
    devices: bool,
    /// One for each tree that something came to, by its number.
    installers: BTreeMap<usize, Installer<'static>>,
    /// The last directory that was asked for, and what it is without links.
    known: Option<(Vec<u8>, Vec<u8>)>,
    /// Device nodes that were not made, and their further names.
    left_out: BTreeSet<Vec<u8>>,
}

impl<'a> Sink<'a> {
    fn new(view: &'a View, into: Vec<u8>, owners: Owners, devices: bool) -> Self {
        Sink {
            view,
            into,
            owners,
            devices,
            installers: BTreeMap::new(),
            known: None,
            left_out: BTreeSet::new(),
        }
    }

    fn put(&mut self, mut node: Node, content: &mut dyn Content) -> Result<()> {
        // The directory itself, which was there before and stays as it is.
        if node.path.is_empty() {
            return match node.kind {
                Kind::Directory => Ok(()),
                _ => Err(Error::new(
                    ErrorKind::InvalidInput,
                    "the archive has a member that would replace the directory it is unpacked into",
                )),
            };
        }
        let is_device = matches!(
            node.kind,
            Kind::CharDevice { .. } | Kind::BlockDevice { .. }
        );
        let of_left_out =
            matches!(&node.kind, Kind::HardLink(first) if self.left_out.contains(first));
        if (is_device && !self.devices) || of_left_out {
            self.left_out.insert(node.path.clone());
            tracing::warn!("{}: a device node, left out", node.shown());
            return Ok(());
        }
        let path = self.settled(&node.path)?;
        let (tree, rest) = self.view.tree_of(&path);
        self.view.check_writable(tree, &path)?;
        if let Kind::HardLink(target) = &mut node.kind {
            let full = self.settled(target)?;
            let (other, rest) = self.view.tree_of(&full);
            if other != tree {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{} is a hard link to {}, which lies in another file system",
                        self.view.shown(&path),
                        self.view.shown(&full)
                    ),
                ));
            }
            *target = rest.to_vec();
        }
        if rest.is_empty() && (node.kind != Kind::Directory || self.view.is_file(tree)?) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: something is mounted there, and nothing takes its place",
                    self.view.shown(&path)
                ),
            ));
        }
        node.path = rest.to_vec();
        give(&mut node, self.owners);
        // What was on the way may be another by now.
        if !matches!(node.kind, Kind::File { .. } | Kind::HardLink(_)) {
            self.known = None;
        }
        self.installer(tree)?.install(&node, content)
    }

    /// A path below the directory with the links on the way to it followed, as far as they are there.
    fn settled(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        let (above, name) = split(path).unwrap_or((b"", path));
        if let Some((known, settled)) = &self.known
            && known == above
        {
            return Ok(join(settled, name));
        }
        let full = match above.is_empty() {
            true => self.into.clone(),
            false => join(&self.into, above),
        };
        let settled = match self.view.locate(&full, true) {
            Ok(spot) if spot.stat.is_some() && !spot.is_directory() => {
                return Err(self.view.no_directory(&spot.path));
            }
            Ok(spot) => spot.path,
            // It is made.
            Err(error) if error.kind() == ErrorKind::NotFound => full,
            Err(error) => return Err(error),
        };
        self.known = Some((above.to_vec(), settled.clone()));
        Ok(join(&settled, name))
    }

    fn installer(&mut self, tree: usize) -> Result<&mut Installer<'static>> {
        Ok(match self.installers.entry(tree) {
            btree_map::Entry::Occupied(there) => there.into_mut(),
            btree_map::Entry::Vacant(place) => {
                place.insert(Installer::strict(self.view.rooted(tree)?))
            }
        })
    }

    fn finish(self, end_marker: bool) -> Result<ApplyStats> {
        let mut all = ApplyStats::default();
        for installer in self.installers.into_values() {
            all += installer.finish()?;
        }
        all.end_marker = end_marker;
        all.left_out = self.left_out.len() as u64;
        Ok(all)
    }
}

/// Makes a node somebody's.
fn give(node: &mut Node, owners: Owners) {
    let Owners::Given { uid, gid } = owners else {
        return;
    };
    let other = (node.uid, node.gid) != (uid, gid);
    if other && node.kind != Kind::Directory {
        node.mode &= !(libc::S_ISUID | libc::S_ISGID);
        node.xattrs.remove(CAPABILITY);
    }
    (node.uid, node.gid) = (uid, gid);
}
