//! What changed between two trees.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};
use nix::unistd::{Whence, lseek};

use super::node::{PERMISSIONS, join, shown, to_path};
use super::rooted::{file_type, is_directory, mtime};
use super::walk::Level;
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

/// What was made in the upper tree by others than whoever works in it, and is no change of theirs.
#[derive(Debug, Clone, Default)]
pub struct Foreign {
    /// Files (`false`) and directories (`true`), by absolute path, which do not count while they are
    /// new and have nothing in them but one another.
    pub points: BTreeMap<PathBuf, bool>,
    /// Modification times (seconds, nanoseconds) that directories have from that, which do not count.
    pub times: BTreeMap<PathBuf, (i64, i64)>,
}

impl Foreign {
    fn made(&self, level: &Level, name: &[u8], stat: &FileStat) -> Result<bool> {
        let path = join(&level.path, name);
        Ok(match self.points.get(&absolute(&path)) {
            Some(true) if is_directory(stat) => {
                let mut all = true;
                level.descend(name, |inner| {
                    for name in inner.names()? {
                        let Some(stat) = inner.look(&name)? else {
                            continue;
                        };
                        all = all && self.made(inner, &name, &stat)?;
                    }
                    Ok(())
                })?;
                all
            }
            Some(false) => file_type(stat) == SFlag::S_IFREG && stat.st_size == 0,
            _ => false,
        })
    }

    fn touched(&self, path: &[u8], stat: &FileStat) -> bool {
        let time = self.times.get(&absolute(path));
        time == Some(&(stat.st_mtime, stat.st_mtime_nsec))
    }
}

fn absolute(path: &[u8]) -> PathBuf {
    Path::new("/").join(to_path(path))
}

/// Lists what makes the tree at `upper` differ from the one at `lower`, sorted by path.
///
/// It compares type, permissions, owner, size, modification time (nanoseconds), link target,
/// device number and extended attributes, and content where these leave room for a difference:
/// not for a file whose inode number and change time are the same too, which is what two
/// mounts of one copy-on-write file system show for an untouched file.
///
/// The list reads like `docker diff`'s: a changed path's directories are listed as changed; of
/// a deleted directory only its own path is listed, of a new one everything in it; a file that
/// became a directory, or the reverse, is changed. The root itself is listed only for its mode,
/// owner or attributes.
///
/// # Errors
///
/// `Io` and `Permission` with the path that could not be read. Neither tree may change
/// meanwhile: mount both read-only.
pub fn diff_trees(lower: &Path, upper: &Path) -> Result<Vec<Change>> {
    diff_trees_but(lower, upper, &Foreign::default())
}

/// As [`diff_trees`], without what is `foreign`.
///
/// # Errors
/// As [`diff_trees`].
pub fn diff_trees_but(lower: &Path, upper: &Path, foreign: &Foreign) -> Result<Vec<Change>> {
    // Each level of a tree is a call: deep ones want more than a thread commonly has.
    std::thread::scope(|scope| {
        let walk = || compare_trees(lower, upper, foreign);
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

fn compare_trees(lower: &Path, upper: &Path, foreign: &Foreign) -> Result<Vec<Change>> {
    let mut changes = Changes {
        list: Vec::new(),
        foreign,
    };
    let (lower, upper) = (Level::root(lower)?, Level::root(upper)?);
    compare_levels(&lower, &upper, &mut changes)?;
    if !same_attributes(&lower.stat()?, &upper.stat()?)
        || lower.xattrs(b"")? != upper.xattrs(b"")?
    {
        push(&mut changes, ChangeKind::Changed, b"");
    }
    let mut list = changes.list;
    list.sort_unstable_by(|one, two| one.0.cmp(&two.0));
    Ok(list
        .into_iter()
        .map(|(path, kind)| Change {
            kind,
            path: absolute(&path),
        })
        .collect())
}

struct Changes<'a> {
    list: Vec<(Vec<u8>, ChangeKind)>,
    foreign: &'a Foreign,
}

fn push(changes: &mut Changes<'_>, kind: ChangeKind, path: &[u8]) {
    changes.list.push((path.to_vec(), kind));
}

/// Whether nothing below `level` is walked: no path could name it.
fn is_too_deep(level: &Level) -> bool {
    let too_deep = level.is_deepest();
    if too_deep {
        tracing::warn!(
            "{}: what is below is not looked at: paths end here",
            shown(&level.path)
        );
    }
    too_deep
}

/// Merges the sorted names of two directories.
fn compare_levels(lower: &Level, upper: &Level, changes: &mut Changes<'_>) -> Result<()> {
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
                added(upper, &name, changes)?;
            }
            continue;
        }
        let Some(name) = old.next() else { continue };
        if order.is_lt() {
            push(changes, ChangeKind::Deleted, &join(&lower.path, &name));
            continue;
        }
        new.next();
        compare(lower, upper, &name, changes)?;
    }
}

fn added(level: &Level, name: &[u8], changes: &mut Changes<'_>) -> Result<()> {
    interrupt::check()?;
    let Some(stat) = level.look(name)? else {
        return Ok(());
    };
    if changes.foreign.made(level, name, &stat)? {
        return Ok(());
    }
    push(changes, ChangeKind::Added, &join(&level.path, name));
    if is_directory(&stat) && !is_too_deep(level) {
        level.descend(name, |inner| added_below(inner, changes))?;
    }
    Ok(())
}

fn added_below(level: &Level, changes: &mut Changes<'_>) -> Result<()> {
    for name in level.names()? {
        added(level, &name, changes)?;
    }
    Ok(())
}

fn compare(lower: &Level, upper: &Level, name: &[u8], changes: &mut Changes<'_>) -> Result<()> {
    interrupt::check()?;
    let (Some(old), Some(new)) = (lower.look(name)?, upper.look(name)?) else {
        return Ok(());
    };
    let path = join(&upper.path, name);
    match (is_directory(&old), is_directory(&new)) {
        (true, true) if is_too_deep(upper) => push(changes, ChangeKind::Changed, &path),
        (true, true) => {
            let before = changes.list.len();
            let same_time = mtime(&old) == mtime(&new) || changes.foreign.touched(&path, &new);
            let mut same = same_attributes(&old, &new) && same_time;
            lower.descend(name, |old_level| {
                upper.descend(name, |new_level| {
                    compare_levels(old_level, new_level, changes)?;
                    same = same
                        && (unmoved(&old, &new)
                            || old_level.xattrs(b"")? == new_level.xattrs(b"")?);
                    Ok(())
                })
            })?;
            if !same || changes.list.len() != before {
                push(changes, ChangeKind::Changed, &path);
            }
        }
        (false, true) => {
            push(changes, ChangeKind::Changed, &path);
            if !is_too_deep(upper) {
                upper.descend(name, |inner| added_below(inner, changes))?;
            }
        }
        (true, false) => push(changes, ChangeKind::Changed, &path),
        (false, false) => {
            if !same_file(lower, upper, name, &old, &new)? {
                push(changes, ChangeKind::Changed, &path);
            }
        }
    }
    Ok(())
}

fn same_attributes(old: &FileStat, new: &FileStat) -> bool {
    file_type(old) == file_type(new)
        && old.st_mode & PERMISSIONS == new.st_mode & PERMISSIONS
        && old.st_uid == new.st_uid
        && old.st_gid == new.st_gid
        && old.st_rdev == new.st_rdev
}

/// Whether it is the same inode, unchanged since: any write or change of attributes moves the
/// change time, and nothing but a clock set back moves it to what it was.
fn unmoved(old: &FileStat, new: &FileStat) -> bool {
    old.st_ino == new.st_ino
        && old.st_ctime == new.st_ctime
        && old.st_ctime_nsec == new.st_ctime_nsec
}

fn same_file(
    lower: &Level,
    upper: &Level,
    name: &[u8],
    old: &FileStat,
    new: &FileStat,
) -> Result<bool> {
    if !same_attributes(old, new) || mtime(old) != mtime(new) || old.st_size != new.st_size {
        return Ok(false);
    }
    if unmoved(old, new) {
        return Ok(true);
    }
    if lower.xattrs(name)? != upper.xattrs(name)? {
        return Ok(false);
    }
    match file_type(new).bits() {
        libc::S_IFLNK => Ok(lower.link_target(name)? == upper.link_target(name)?),
        libc::S_IFREG => same_content(&lower.open(name)?, &upper.open(name)?)
            .context(|| format!("comparing {}", shown(&join(&upper.path, name)))),
        _ => Ok(true),
    }
}

/// Compares two files of one size; where both have a hole nothing is read.
#[expect(
    clippy::indexing_slicing,
    reason = "`read_full` fills no more than the buffer"
)]
fn same_content(one: &File, two: &File) -> std::io::Result<bool> {
    const CHUNK: usize = 128 * 1024;
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut offset = 0;
    loop {
        interrupt::check_io()?;
        offset = match (next_data(one, offset)?, next_data(two, offset)?) {
            (None, None) => return Ok(true),
            (Some(only), None) | (None, Some(only)) => only,
            (Some(one), Some(two)) => one.min(two),
        };
        let count = read_full(one, &mut left, offset)?;
        if count != read_full(two, &mut right, offset)? || left[..count] != right[..count] {
            return Ok(false);
        }
        if count < CHUNK {
            return Ok(true);
        }
        offset += count as u64;
    }
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

#[expect(clippy::indexing_slicing, reason = "the loop ends with the buffer")]
fn read_full(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match file.read_at(&mut into[filled..], offset + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
