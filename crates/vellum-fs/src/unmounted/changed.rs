//! What differs between two states of a file system, from the blocks that differ.
//!
//! Blocks of inode tables give the inodes. All other blocks belong to an inode: to one that changed
//! too, whose blocks need not be looked at one by one, or to one that did not. The kernel changes no
//! directory without its inode (times, `i_version`), but programs that work on the device itself may
//! (debugfs, e2fsck): so where a changed block is nobody's so far, all directories are asked whether it
//! is theirs.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::checksum::crc;
use super::inode::{Inode, differ};
use super::layout::{BitmapSum, Group};
use super::{FileSystem, ROOT, corrupt, unknown};
use vellum_base::block::{in_memory, part};
use vellum_base::error::Result;
use vellum_base::interrupt;

/// Blocks of an inode table that are read at a time.
const BATCH: u64 = 64;

/// What may differ between two states of a file system. What is not here does not.
#[derive(Debug, Default)]
pub struct Changed {
    /// Inodes whose bytes differ.
    inodes: HashSet<u32>,
    /// Directories of the newer state in which, or somewhere below which, something differs.
    directories: HashSet<u32>,
    /// Blocks of the file system that differ.
    blocks: Ranges,
}

impl Changed {
    /// Whether the inode of this number may differ.
    pub fn has_inode(&self, number: u32) -> bool {
        self.inodes.contains(&number)
    }

    /// Whether something in this directory of the newer state, or somewhere below it, may differ.
    pub fn has_directory(&self, number: u32) -> bool {
        self.directories.contains(&number)
    }

    /// All of which [`Changed::has_directory`] holds.
    pub fn directories(&self) -> impl Iterator<Item = u32> {
        self.directories.iter().copied()
    }

    /// How many blocks of the file system, of `count` from `first` on, are the same in both states up to
    /// the first that may differ.
    pub fn same_blocks(&self, first: u64, count: u64) -> u64 {
        let differs = self.blocks.common(&(first..first + count)).next();
        differs.map_or(count, |range| range.start - first)
    }
}

/// Finds what may differ between two states of a file system, of which the bytes in `differing` may
/// differ and all others do not.
///
/// # Errors
/// [`vellum_base::ErrorKind::Unsupported`] where they are no two states of one file system, or it keeps
/// something in a way that is not known here; [`vellum_base::ErrorKind::Corrupt`] where bytes contradict
/// each other; as [`super::Source::fill`].
pub fn changed(
    older: &FileSystem<'_>,
    newer: &FileSystem<'_>,
    differing: &[Range<u64>],
) -> Result<Changed> {
    if !older.layout.leads_to(&newer.layout) {
        return Err(unknown("it is another file system than before"));
    }
    let blocks = Ranges::of_bytes(differing, newer.block_size());
    let mut found = Found::default();
    for number in 0..newer.groups.len() {
        changed_inodes(older, newer, number, &blocks, &mut |inode, old, new| {
            found.add(newer, inode, older, old, new)
        })?;
    }
    let mut rest = blocks.clone();
    rest.remove(found.owned);
    rest.remove(own_blocks(newer)?);
    if !rest.is_empty() {
        rest.remove(free_blocks(newer, &rest)?);
    }
    if !rest.is_empty() {
        tracing::debug!("changed blocks that no changed inode has: {rest:?}");
        for directory in owners(newer, &rest)? {
            found.directories.insert(directory);
        }
    }
    for number in &found.directories {
        if let Some(directory) = newer.inode(*number)? {
            count_names(newer, &directory, &mut found.wanted)?;
        }
    }
    let above = super::parents::find(newer, found.wanted, &found.directories)?;
    let mut directories = HashSet::new();
    for directory in found.directories.into_iter().chain(above) {
        climb(newer, directory, &mut directories)?;
    }
    Ok(Changed {
        inodes: found.inodes,
        directories,
        blocks,
    })
}

/// What the inode tables give.
#[derive(Default)]
struct Found {
    inodes: HashSet<u32>,
    /// Directories of the newer state that changed.
    directories: HashSet<u32>,
    /// Files of the newer state that changed, and how many names of each are not known yet.
    wanted: BTreeMap<u32, u32>,
    /// Blocks that changed inodes have, before or after.
    owned: Vec<Range<u64>>,
}

/// Compares the inodes of a group as far as their blocks differ. Calls `each` with the number of each that
/// differs, as it was and as it is; `None` where it is not in use.
pub(super) fn changed_inodes(
    older: &FileSystem<'_>,
    newer: &FileSystem<'_>,
    number: usize,
    blocks: &Ranges,
    each: &mut dyn FnMut(u32, Option<Inode>, Option<Inode>) -> Result<()>,
) -> Result<()> {
    let (before, group) = (older.groups.get(number), newer.group(number)?);
    if before.is_some_and(|before| before.inode_table != group.inode_table) {
        return Err(unknown("an inode table was moved"));
    }
    let used = |group: Option<&Group>| group.map_or(0, |group| group.inodes_used);
    let (used_before, used) = (used(before), used(Some(group)));
    let (first, size) = (newer.first_inode(number), newer.layout.inode_size);
    let table = group.inode_table..group.inode_table + newer.layout.table_blocks();
    for batch in blocks.common(&table).flat_map(batches) {
        interrupt::check()?;
        let count = batch.end - batch.start;
        let new = newer.blocks(batch.start, count)?;
        let old = match before {
            Some(_) => older.blocks(batch.start, count)?,
            None => vec![0; new.len()],
        };
        let per_block = newer.block_size() / size as u64;
        let slot = ((batch.start - group.inode_table) * per_block) as u32;
        let slots = old.chunks_exact(size).zip(new.chunks_exact(size));
        for (slot, (old, new)) in (slot..newer.layout.inodes_per_group).zip(slots) {
            let (is_old, is_new) = (slot < used_before, slot < used);
            if is_old != is_new || differ(old, new) {
                let inode = first + slot;
                let old = is_old.then(|| older.parse_inode(inode, old)).transpose()?;
                let new = is_new.then(|| newer.parse_inode(inode, new)).transpose()?;
                each(inode, old.flatten(), new.flatten())?;
            }
        }
    }
    Ok(())
}

impl Found {
    /// Notes an inode that differs, as it was and as it is; `None` where it is not in use.
    fn add(
        &mut self,
        newer: &FileSystem<'_>,
        number: u32,
        older: &FileSystem<'_>,
        old: Option<Inode>,
        new: Option<Inode>,
    ) -> Result<()> {
        self.inodes.insert(number);
        if let Some(old) = &old {
            add_blocks(older, old, &mut self.owned)?;
        }
        let Some(new) = new else {
            return Ok(());
        };
        add_blocks(newer, &new, &mut self.owned)?;
        let reserved = number < newer.layout.first_inode && number != ROOT;
        if new.is_directory() {
            self.directories.insert(number);
        } else if !reserved && !new.is_value() {
            self.wanted.insert(number, new.links());
        }
        Ok(())
    }
}

fn batches(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let starts = range.step_by(BATCH as usize);
    starts.map(move |start| start..end.min(start + BATCH))
}

/// Adds all blocks that an inode has.
fn add_blocks(files: &FileSystem<'_>, inode: &Inode, to: &mut Vec<Range<u64>>) -> Result<()> {
    let blocks = files.blocks_of(inode)?;
    let content = blocks.content.iter();
    to.extend(content.map(|extent| extent.physical..extent.physical + extent.len));
    let single = blocks.tree.into_iter().chain(inode.xattr_block());
    // Numbers of blocks have 48 bits.
    to.extend(single.map(|block| block..block + 1));
    Ok(())
}

/// The blocks that the file system keeps for itself: descriptors, bitmaps, inode tables, journal.
fn own_blocks(files: &FileSystem<'_>) -> Result<Vec<Range<u64>>> {
    let mut own = Vec::new();
    let descriptors = files.layout.descriptors.iter();
    own.extend(descriptors.map(|block| *block..block + 1));
    for group in &files.groups {
        own.push(group.block_bitmap..group.block_bitmap + 1);
        own.push(group.inode_bitmap..group.inode_bitmap + 1);
        own.push(group.inode_table..group.inode_table + files.layout.table_blocks());
    }
    let journal = files.layout.journal.filter(|inode| *inode != 0);
    if let Some(journal) = journal
        .map(|inode| files.inode(inode))
        .transpose()?
        .flatten()
    {
        add_blocks(files, &journal, &mut own)?;
    }
    Ok(own)
}

/// Those of `blocks` that nobody has.
fn free_blocks(files: &FileSystem<'_>, blocks: &Ranges) -> Result<Vec<Range<u64>>> {
    let mut free = Vec::new();
    let layout = &files.layout;
    for (number, group) in (0..).zip(&files.groups) {
        let start = layout.first_block + number * layout.blocks_per_group;
        let range = start..layout.blocks.min(start + layout.blocks_per_group);
        let mut inside = blocks.common(&range).peekable();
        if inside.peek().is_none() {
            continue;
        }
        if !group.has_bitmap {
            free.extend(inside);
            continue;
        }
        let bitmap = bitmap_of(files, group)?;
        for block in inside.flatten() {
            let bit = block - start;
            let byte = part(&bitmap, in_memory(bit / 8), 1);
            if byte.iter().all(|byte| byte >> (bit % 8) & 1 == 0) {
                free.push(block..block + 1);
            }
        }
    }
    Ok(free)
}

/// The block bitmap of a group: a bit for each block, set where somebody has it.
pub(super) fn bitmap_of(files: &FileSystem<'_>, group: &Group) -> Result<Vec<u8>> {
    let bitmap = files.blocks(group.block_bitmap, 1)?;
    let Some(seed) = files.layout.seed else {
        return Ok(bitmap);
    };
    let covered = part(&bitmap, 0, in_memory(files.layout.blocks_per_group / 8));
    let sum = crc(seed, covered);
    let matches = match group.bitmap_sum {
        BitmapSum::Whole(expected) => sum == expected,
        BitmapSum::Half(expected) => sum as u16 == expected,
    };
    if !matches {
        return Err(corrupt("a block bitmap does not match its checksum"));
    }
    Ok(bitmap)
}

/// The directories that have some of `blocks`.
fn owners(files: &FileSystem<'_>, blocks: &Ranges) -> Result<Vec<u32>> {
    let mut owners = Vec::new();
    for chunk in files.chunks() {
        interrupt::check()?;
        for directory in files.directories_in(&chunk)? {
            let mut own = Vec::new();
            add_blocks(files, &directory, &mut own)?;
            if own.iter().any(|range| blocks.meets(range)) {
                owners.push(directory.number());
            }
        }
    }
    Ok(owners)
}

/// Takes the names in a directory away from those that are looked for. Returns whether there was one.
pub(super) fn count_names(
    files: &FileSystem<'_>,
    directory: &Inode,
    wanted: &mut BTreeMap<u32, u32>,
) -> Result<bool> {
    let mut some = false;
    files.each_entry(directory, &mut |_, inode, _| {
        if let Some(left) = wanted.get_mut(&inode) {
            some = true;
            *left -= 1;
            if *left == 0 {
                wanted.remove(&inode);
            }
        }
    })?;
    Ok(some)
}

/// Adds a directory and all above it.
fn climb(files: &FileSystem<'_>, directory: u32, to: &mut HashSet<u32>) -> Result<()> {
    let mut at = directory;
    while to.insert(at) && at != ROOT {
        let inode = files.inode(at)?.filter(Inode::is_directory);
        let inode = inode.ok_or_else(|| corrupt(format!("inode {at} should be a directory")))?;
        at = files.parent_of(&inode)?;
    }
    Ok(())
}

/// Numbers of blocks, as ranges in order that do not touch.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// The blocks of `size` bytes in which some of these bytes lie.
    pub(super) fn of_bytes(bytes: &[Range<u64>], size: u64) -> Self {
        let blocks = bytes.iter();
        let blocks = blocks.map(|range| range.start / size..range.end.div_ceil(size));
        Ranges(joined(blocks.collect()))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges that have some of `range`, cut to it.
    pub(super) fn common(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|own| own.end <= range.start);
        let from = self.0.iter().skip(first);
        let inside = from.take_while({
            let end = range.end;
            move |own| own.start < end
        });
        let range = range.clone();
        inside.map(move |own| own.start.max(range.start)..own.end.min(range.end))
    }

    pub(super) fn meets(&self, range: &Range<u64>) -> bool {
        self.common(range).next().is_some()
    }

    fn remove(&mut self, others: Vec<Range<u64>>) {
        let others = Ranges(joined(others));
        let mut left = Vec::new();
        for range in &self.0 {
            let mut at = range.start;
            for other in others.common(range) {
                if at < other.start {
                    left.push(at..other.start);
                }
                at = other.end;
            }
            if at < range.end {
                left.push(at..range.end);
            }
        }
        self.0 = left;
    }
}

/// The same numbers as ranges in order that do not touch.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec(
            (0u64..200, 0u64..20).prop_map(|(at, len)| at..at + len),
            0..20,
        )
    }

    fn numbers(ranges: &[Range<u64>]) -> HashSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn ranges_are_sets_of_numbers(one in ranges(), other in ranges(), window in (0u64..200, 0u64..50)) {
            let window = window.0..window.0 + window.1;
            let set = Ranges(joined(one.clone()));
            prop_assert!(set.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(numbers(&set.0), numbers(&one));
            let common: Vec<_> = set.common(&window).collect();
            let window = numbers(std::slice::from_ref(&window));
            prop_assert_eq!(numbers(&common), &numbers(&one) & &window);
            let mut less = set;
            less.remove(other.clone());
            prop_assert_eq!(numbers(&less.0), &numbers(&one) - &numbers(&other));
        }
    }
}
