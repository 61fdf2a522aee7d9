//! What changed between two trees.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::node::{PERMISSIONS, join, shown, to_path};
use super::tree::{Attributes, Directory, MountedTrees, Trees, is_deepest};
use vellum_base::Result;
use vellum_base::error::ResultExt;
use vellum_base::interrupt;

/// Bytes of stack for a walk: the deepest trees take a small part of it.
const STACK: usize = 64 << 20;

/// How a path changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Its content or an attribute is another, or something below it changed.
    Changed,
    /// It is gone.
    Deleted,
}

impl ChangeKind {
    /// The letter that `docker diff` prints: A, C or D.
    pub fn letter(self) -> char {
        match self {
            ChangeKind::Added => 'A',
            ChangeKind::Changed => 'C',
            ChangeKind::Deleted => 'D',
        }
    }
}

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What happened to it.
    pub kind: ChangeKind,
    /// Where, from the root of the tree: `/etc/hosts`.
    pub path: PathBuf,
}

impl fmt::Display for Change {
    /// As `docker diff` prints it: `C /etc/hosts`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.letter(), self.path.display())
    }
}

/// How the content of a file changed: whoever sets the size of what it was before to [`size`], and
/// copies these ranges, has what it is now.
///
/// [`size`]: ContentChange::size
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContentChange {
    /// Bytes that it had; 0 of a file that is new.
    pub size_before: u64,
    /// Bytes that it has.
    pub size: u64,
    /// Offset and length of the ranges that differ, in order, apart from each other. They consist of
    /// blocks of 4096 bytes from the start of the file on, the last one as far as the file goes: where a
    /// byte of a block differs the block counts. What lies behind the end of a file counts as zeros.
    pub ranges: Vec<(u64, u64)>,
}

impl ContentChange {
    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, len)| len).sum()
    }

    fn add(&mut self, offset: u64, len: u64) {
        match self.ranges.last_mut() {
            Some((start, before)) if *start + *before == offset => *before += len,
            _ => self.ranges.push((offset, len)),
        }
    }
}

/// One changed path, and how its content changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The path.
    pub change: Change,
    /// Of regular files that are there, where somebody asked for it.
    pub content: Option<ContentChange>,
}

/// What was made in a tree by others than whoever works in it, and is no change of theirs.
#[derive(Debug, Clone, Default)]
pub struct Foreign {
    /// Files (`false`) and directories (`true`), by absolute path, which do not count while the other tree
    /// does not have them and they have nothing in them but one another.
    pub points: BTreeMap<PathBuf, bool>,
    /// Modification times (seconds, nanoseconds) that directories have from that, which do not count.
    pub times: BTreeMap<PathBuf, (i64, i64)>,
    /// Those that the same directories had before.
    pub before: BTreeMap<PathBuf, (i64, i64)>,
}

/// How to compare two trees.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// What is not the work of whoever works in the older tree.
    pub older: Foreign,
    /// And in the newer one.
    pub newer: Foreign,
    /// Whether to say how the contents of files changed.
    pub contents: bool,
}

impl Foreign {
    fn made<D: Directory>(&self, directory: &D, name: &[u8], found: &Attributes) -> Result<bool> {
        let path = join(directory.path(), name);
        Ok(match self.points.get(&absolute(&path)) {
            Some(true) if found.is_directory() => {
                let mut all = true;
                directory.descend(name, |inner| {
                    for name in inner.names()? {
                        let Some(found) = inner.look(&name)? else {
                            continue;
                        };
                        all = all && self.made(inner, &name, &found)?;
                    }
                    Ok(())
                })?;
                all
            }
            Some(false) => found.is_file() && found.size == 0,
            _ => false,
        })
    }

    fn touched(&self, path: &[u8], found: &Attributes) -> bool {
        self.times.get(&absolute(path)) == Some(&found.mtime)
    }
}

fn absolute(path: &[u8]) -> PathBuf {
    Path::new("/").join(to_path(path))
}

/// Lists what makes the tree at `upper` differ from the one at `lower`, as [`compare_trees`] does.
///
/// # Errors
/// As [`compare_trees`].
pub fn diff_trees(lower: &Path, upper: &Path) -> Result<Vec<Change>> {
    diff_trees_but(lower, upper, &Foreign::default())
}

/// As [`diff_trees`], without what is `foreign`.
///
/// # Errors
/// As [`compare_trees`].
pub fn diff_trees_but(lower: &Path, upper: &Path, foreign: &Foreign) -> Result<Vec<Change>> {
    let comparison = Comparison {
        newer: foreign.clone(),
        ..Comparison::default()
    };
    let found = compare_trees(&MountedTrees::new(lower, upper), &comparison)?;
    Ok(found.into_iter().map(|found| found.change).collect())
}

/// Lists what makes the newer tree differ from the older one, but for what is foreign to them, sorted by
/// path.
///
/// It compares type, permissions, owner, size, modification time (nanoseconds), link target,
/// device number and extended attributes, and content where these leave room for a difference:
/// not for a file whose inode number and change time are the same too, which is what two states of one
/// copy-on-write file system show for an untouched file.
///
/// The list reads like `docker diff`'s: a changed path's directories are listed as changed; of
/// a deleted directory only its own path is listed, of a new one everything in it; a file that
/// became a directory, or the reverse, is changed. The root itself is listed only for its mode,
/// owner or attributes.
///
/// # Errors
/// Where a path cannot be read, with the path.
pub fn compare_trees<T: Trees>(trees: &T, comparison: &Comparison) -> Result<Vec<Difference>> {
    // Each level of a tree is a call: deep ones want more than a thread commonly has.
    std::thread::scope(|scope| {
        let walk = || compare_roots(trees, comparison);
        let thread = std::thread::Builder::new()
            .name("vellum-diff".into())
            .stack_size(STACK)
            .spawn_scoped(scope, walk)
            .context(|| "cannot start a thread")?;
        match thread.join() {
            Ok(changes) => changes,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn compare_roots<T: Trees>(trees: &T, comparison: &Comparison) -> Result<Vec<Difference>> {
    let mut changes = Changes {
        trees,
        comparison,
        list: Vec::new(),
    };
    let (lower, upper) = trees.roots()?;
    changes.compare_levels(&lower, &upper)?;
    if !same_attributes(&lower.attributes()?, &upper.attributes()?)
        || lower.xattrs(b"")? != upper.xattrs(b"")?
    {
        changes.push(ChangeKind::Changed, b"", None);
    }
    let mut list = changes.list;
    list.sort_unstable_by(|one, two| one.0.cmp(&two.0));
    Ok(list
        .into_iter()
        .map(|(path, kind, content)| Difference {
            change: Change {
                kind,
                path: absolute(&path),
            },
            content,
        })
        .collect())
}

struct Changes<'a, T> {
    trees: &'a T,
    comparison: &'a Comparison,
    list: Vec<(Vec<u8>, ChangeKind, Option<ContentChange>)>,
}

/// Whether nothing below a directory is walked: no path could name it.
fn is_too_deep(directory: &impl Directory) -> bool {
    let too_deep = is_deepest(directory);
    if too_deep {
        tracing::warn!(
            "{}: what is below is not looked at: paths end here",
            shown(directory.path())
        );
    }
    too_deep
}

impl<T: Trees> Changes<'_, T> {
    fn push(&mut self, kind: ChangeKind, path: &[u8], content: Option<ContentChange>) {
        self.list.push((path.to_vec(), kind, content));
    }

    /// Merges the sorted names of two directories.
    fn compare_levels(&mut self, lower: &T::Older, upper: &T::Newer) -> Result<()> {
        let mut old = lower.names()?.into_iter().peekable();
        let mut new = upper.names()?.into_iter().peekable();
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(old), Some(new)) => old.cmp(new),
            };
            if order.is_gt() {
                if let Some(name) = new.next() {
                    self.added(upper, &name)?;
                }
                continue;
            }
            let Some(name) = old.next() else { continue };
            if order.is_lt() {
                self.deleted(lower, &name)?;
                continue;
            }
            new.next();
            if self.trees.may_differ(lower, upper, &name)? {
                self.compare(lower, upper, &name)?;
            }
        }
    }

    fn deleted(&mut self, directory: &T::Older, name: &[u8]) -> Result<()> {
        let path = join(directory.path(), name);
        let foreign = &self.comparison.older;
        // Few are: the others need not be looked at.
        if foreign.points.contains_key(&absolute(&path))
            && let Some(found) = directory.look(name)?
            && foreign.made(directory, name, &found)?
        {
            return Ok(());
        }
        self.push(ChangeKind::Deleted, &path, None);
        Ok(())
    }

    fn added(&mut self, directory: &T::Newer, name: &[u8]) -> Result<()> {
        interrupt::check()?;
        let Some(found) = directory.look(name)? else {
            return Ok(());
        };
        if self.comparison.newer.made(directory, name, &found)? {
            return Ok(());
        }
        let content = self.content(None, directory, name, &found)?;
        self.push(ChangeKind::Added, &join(directory.path(), name), content);
        if found.is_directory() && !is_too_deep(directory) {
            directory.descend(name, |inner| self.added_below(inner))?;
        }
        Ok(())
    }

    fn added_below(&mut self, directory: &T::Newer) -> Result<()> {
        for name in directory.names()? {
            self.added(directory, &name)?;
        }
        Ok(())
    }

    fn compare(&mut self, lower: &T::Older, upper: &T::Newer, name: &[u8]) -> Result<()> {
        interrupt::check()?;
        let (Some(old), Some(new)) = (lower.look(name)?, upper.look(name)?) else {
            return Ok(());
        };
        let path = join(upper.path(), name);
        match (old.is_directory(), new.is_directory()) {
            (true, true) if is_too_deep(upper) => self.push(ChangeKind::Changed, &path, None),
            (true, true) => {
                let before = self.list.len();
                let same_time = old.mtime == new.mtime
                    || self.comparison.older.touched(&path, &old)
                    || self.comparison.newer.touched(&path, &new);
                let mut same = same_attributes(&old, &new) && same_time;
                lower.descend(name, |lower| {
                    upper.descend(name, |upper| {
                        self.compare_levels(lower, upper)?;
                        same = same
                            && (unmoved(&old, &new) || lower.xattrs(b"")? == upper.xattrs(b"")?);
                        Ok(())
                    })
                })?;
                if !same || self.list.len() != before {
                    self.push(ChangeKind::Changed, &path, None);
                }
            }
            (false, true) => {
                self.push(ChangeKind::Changed, &path, None);
                if !is_too_deep(upper) {
                    upper.descend(name, |inner| self.added_below(inner))?;
                }
            }
            (_, false) => {
                if old.is_directory() || !self.same_file(lower, upper, name, &old, &new)? {
                    let before = old.is_file().then_some((lower, old.size));
                    let content = self.content(before, upper, name, &new)?;
                    self.push(ChangeKind::Changed, &path, content);
                }
            }
        }
        Ok(())
    }

    fn same_file(
        &self,
        lower: &T::Older,
        upper: &T::Newer,
        name: &[u8],
        old: &Attributes,
        new: &Attributes,
    ) -> Result<bool> {
        if !same_attributes(old, new) || old.mtime != new.mtime || old.size != new.size {
            return Ok(false);
        }
        if unmoved(old, new) {
            return Ok(true);
        }
        if lower.xattrs(name)? != upper.xattrs(name)? {
            return Ok(false);
        }
        match new.file_type() {
            libc::S_IFLNK => Ok(lower.link_target(name)? == upper.link_target(name)?),
            libc::S_IFREG => {
                let mut same = true;
                let mut differs = |_, _| {
                    same = false;
                    ControlFlow::Break(())
                };
                self.trees
                    .compare_contents(Some(lower), upper, name, &mut differs)?;
                Ok(same)
            }
            _ => Ok(true),
        }
    }

    /// How the content of a file changed, if that is asked for: of one that was a regular file before, in
    /// that directory and with that size, or of one that is new.
    fn content(
        &self,
        before: Option<(&T::Older, u64)>,
        upper: &T::Newer,
        name: &[u8],
        found: &Attributes,
    ) -> Result<Option<ContentChange>> {
        if !self.comparison.contents || !found.is_file() {
            return Ok(None);
        }
        let (lower, size_before) = before.unzip();
        let mut content = ContentChange {
            size_before: size_before.unwrap_or(0),
            size: found.size,
            ranges: Vec::new(),
        };
        let mut add = |offset, len| {
            content.add(offset, len);
            ControlFlow::Continue(())
        };
        self.trees.compare_contents(lower, upper, name, &mut add)?;
        Ok(Some(content))
    }
}

fn same_attributes(old: &Attributes, new: &Attributes) -> bool {
    old.file_type() == new.file_type()
        && old.mode & PERMISSIONS == new.mode & PERMISSIONS
        && old.uid == new.uid
        && old.gid == new.gid
        && old.device == new.device
}

/// Whether it is the same inode, unchanged since: any write or change of attributes moves the
/// change time, and nothing but a clock set back moves it to what it was.
fn unmoved(old: &Attributes, new: &Attributes) -> bool {
    old.inode == new.inode && old.ctime == new.ctime
}
