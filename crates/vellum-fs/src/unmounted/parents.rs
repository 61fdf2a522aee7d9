//! In which directories the names of files are.
//!
//! An inode does not say where its names are. Of a file that changed in place none of its directories
//! did, so they have to be looked for. The kernel gives a new file an inode near its directory's, and
//! so the search goes outwards from the file's own inode, over the inodes of the table in chunks: most
//! files are found in the first few, and a file that was moved far is found in the end.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use super::changed::count_names;
use super::inode::Inode;
use super::layout::Group;
use super::{FileSystem, corrupt};
use vellum_base::error::{Error, Result};
use vellum_base::interrupt;

/// Blocks of an inode table that are searched at a time: 256 inodes in blocks of 4 KiB.
const CHUNK: u64 = 16;

/// A part of an inode table: the blocks, and the number of their first inode.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    first_inode: u32,
    pub blocks: Range<u64>,
    /// How many of its inodes may be in use.
    used: u32,
}

impl Chunk {
    /// How many blocks it has.
    pub fn len(&self) -> u64 {
        self.blocks.end - self.blocks.start
    }
}

impl FileSystem<'_> {
    pub(super) fn group(&self, number: usize) -> Result<&Group> {
        self.groups
            .get(number)
            .ok_or_else(|| corrupt(format!("it has no group {number}")))
    }

    /// The number of a group's first inode.
    pub(super) fn first_inode(&self, group: usize) -> u32 {
        group as u32 * self.layout.inodes_per_group + 1
    }

    /// All parts of inode tables that may be in use, in order.
    pub(super) fn chunks(&self) -> Vec<Chunk> {
        let groups = self.groups.iter().enumerate();
        groups
            .flat_map(|(number, group)| self.chunks_of(number, group))
            .collect()
    }

    /// As [`Self::chunks`], of the group `number`.
    pub(super) fn chunks_of(&self, number: usize, group: &Group) -> Vec<Chunk> {
        let per_block = self.block_size() / self.layout.inode_size as u64;
        let mut chunks = Vec::new();
        let used = u64::from(group.inodes_used);
        let end = used.div_ceil(per_block);
        for start in (0..end).step_by(CHUNK as usize) {
            let before = start * per_block;
            let blocks = start..end.min(start + CHUNK);
            chunks.push(Chunk {
                first_inode: self.first_inode(number) + before as u32,
                used: (used - before).min(CHUNK * per_block) as u32,
                blocks: group.inode_table + blocks.start..group.inode_table + blocks.end,
            });
        }
        chunks
    }

    /// The directories among the inodes of a chunk.
    pub(super) fn directories_in(&self, chunk: &Chunk) -> Result<Vec<Inode>> {
        self.inodes_in(chunk, Inode::is_used_directory)
    }

    /// The inodes of a chunk that are in use, of those whose bytes are `wanted`.
    pub(super) fn inodes_in(
        &self,
        chunk: &Chunk,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<Inode>> {
        let bytes = self.blocks(chunk.blocks.start, chunk.len())?;
        let mut found = Vec::new();
        let slots = bytes.chunks_exact(self.layout.inode_size);
        for (slot, raw) in (0..chunk.used).zip(slots) {
            if wanted(raw)
                && let Some(inode) = self.parse_inode(chunk.first_inode + slot, raw)?
            {
                found.push(inode);
            }
        }
        Ok(found)
    }
}

/// The directories that hold the names which `wanted` still lacks: how many of each inode. Those of
/// `known` were asked before.
///
/// # Errors
/// [`vellum_base::ErrorKind::Corrupt`] where a file has fewer names than it says; as
/// [`super::Source::fill`].
pub(super) fn find(
    files: &FileSystem<'_>,
    mut wanted: BTreeMap<u32, u32>,
    known: &HashSet<u32>,
) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    if wanted.is_empty() {
        return Ok(found);
    }
    let chunks = files.chunks();
    let mut left: BTreeSet<usize> = (0..chunks.len()).collect();
    while let Some(inode) = wanted.keys().next().copied() {
        // The chunk that it lies in is the one before those that begin behind it.
        let behind = chunks.partition_point(|chunk| chunk.first_inode <= inode);
        let Some(next) = nearest(&left, behind.max(1) - 1) else {
            break;
        };
        left.remove(&next);
        interrupt::check()?;
        let chunk = chunks.get(next);
        let chunk = chunk.ok_or_else(|| Error::internal("a chunk is left that there never was"))?;
        for directory in files.directories_in(chunk)? {
            if !known.contains(&directory.number()) && count_names(files, &directory, &mut wanted)?
            {
                found.push(directory.number());
            }
            if wanted.is_empty() {
                return Ok(found);
            }
        }
    }
    let nameless = |inode: &u32| files.layout.nameless.contains(inode);
    match wanted.keys().find(|inode| !nameless(inode)) {
        Some(inode) => Err(corrupt(format!(
            "inode {inode} has fewer names than it says"
        ))),
        None => Ok(found),
    }
}

/// The number in `left` that is nearest to `home`.
fn nearest(left: &BTreeSet<usize>, home: usize) -> Option<usize> {
    let below = left.range(..=home).next_back().copied();
    let above = left.range(home..).next().copied();
    match (below, above) {
        (Some(below), Some(above)) if above - home < home - below => Some(above),
        (Some(below), _) => Some(below),
        (None, above) => above,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_goes_outwards() {
        let mut left: BTreeSet<usize> = [0, 1, 2, 4, 5, 9].into();
        let mut order = Vec::new();
        while let Some(next) = nearest(&left, 3) {
            left.remove(&next);
            order.push(next);
        }
        assert_eq!(order, [2, 4, 1, 5, 0, 9]);
        assert_eq!(nearest(&left, 3), None);
    }
}
