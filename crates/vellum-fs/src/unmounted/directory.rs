//! Directories: names and the inodes that they stand for.

use super::checksum::crc;
use super::inode::Inode;
use super::{FileSystem, corrupt};
use crate::fields::Fields;
use vellum_base::block::in_memory;
use vellum_base::error::Result;

/// Bytes of an entry before its name.
const HEAD: usize = 8;
/// Bytes of the entry at the end of a block that holds the block's checksum, and its type.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xDE;
/// Blocks that are read at a time.
const BATCH: u64 = 64;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name: without `/` and zero bytes, and neither `.` nor `..`.
    pub name: Vec<u8>,
    /// The number of its inode.
    pub inode: u32,
}

impl FileSystem<'_> {
    /// The names in a directory, sorted by their bytes.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Corrupt`] for what is no directory, or one that the kernel would not
    /// list; as [`super::Source::fill`].
    pub fn list(&self, directory: &Inode) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.each_entry(directory, &mut |name, inode, _| {
            if name != b"." && name != b".." {
                let name = name.to_vec();
                entries.push(Entry { name, inode });
            }
        })?;
        entries.sort_unstable();
        let twice = entries.windows(2);
        let mut twice = twice.filter(|pair| matches!(pair, [one, two] if one.name == two.name));
        if twice.next().is_some() {
            return Err(bad(directory, "a name is there twice"));
        }
        Ok(entries)
    }

    /// The directory that a directory lies in; the root lies in itself.
    pub(super) fn parent_of(&self, directory: &Inode) -> Result<u32> {
        let content = self.blocks_of(directory)?.content;
        let first = content.first().filter(|first| first.logical == 0);
        let first = first.ok_or_else(|| bad(directory, "it begins with a hole"))?;
        let block = self.blocks(first.physical, 1)?;
        let mut parent = None;
        self.parse_block(directory, &block, &mut |name, inode, _| {
            if name == b".." {
                parent = Some(inode);
            }
        })?;
        parent.ok_or_else(|| bad(directory, "it does not say where it lies"))
    }

    /// Calls `each` with all names, `.` and `..` among them, their inodes and types, as they lie.
    pub(super) fn each_entry(
        &self,
        directory: &Inode,
        each: &mut dyn FnMut(&[u8], u32, u8),
    ) -> Result<()> {
        if !directory.is_directory() {
            return Err(bad(directory, "it is none"));
        }
        let end = directory.size() / self.block_size();
        let mut next = 0;
        for extent in self.blocks_of(directory)?.content {
            // Blocks may be kept behind its end, for names to come.
            let wanted = extent.len.min(end.saturating_sub(extent.logical));
            if wanted == 0 {
                break;
            }
            if extent.logical != next || !extent.written {
                return Err(bad(directory, "it has a hole"));
            }
            let mut done = 0;
            while done < wanted {
                let count = (wanted - done).min(BATCH);
                let bytes = self.blocks(extent.physical + done, count)?;
                for block in bytes.chunks_exact(in_memory(self.block_size())) {
                    self.parse_block(directory, block, each)?;
                }
                done += count;
            }
            next += wanted;
        }
        if next != end {
            return Err(bad(directory, "it has a hole"));
        }
        Ok(())
    }

    /// One block of entries. The inner nodes of a directory's hash tree look like blocks with no entry.
    fn parse_block(
        &self,
        directory: &Inode,
        block: &[u8],
        each: &mut dyn FnMut(&[u8], u32, u8),
    ) -> Result<()> {
        let out_of_place = || bad(directory, "an entry is out of place");
        self.check_block(directory, block)?;
        let mut rest = block;
        while !rest.is_empty() {
            let fields = Fields(rest);
            let (inode, len) = (fields.u32(0), fields.u16(4));
            let (inode, len) = (
                inode.ok_or_else(out_of_place)?,
                len.ok_or_else(out_of_place)?,
            );
            let len = usize::from(len);
            if len < TAIL || !len.is_multiple_of(4) || len > rest.len() {
                return Err(out_of_place());
            }
            let (entry, next) = rest.split_at(len);
            rest = next;
            if inode == 0 {
                continue;
            }
            let name_len = Fields(entry).u8(6).ok_or_else(out_of_place)?;
            let file_type = Fields(entry).u8(7).ok_or_else(out_of_place)?;
            if !self.layout.typed_entries && file_type != 0 {
                return Err(out_of_place());
            }
            let name = entry.get(HEAD..HEAD + usize::from(name_len));
            let name = name.ok_or_else(out_of_place)?;
            if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                return Err(bad(directory, "a name that is none"));
            }
            if inode > self.layout.inodes {
                return Err(bad(directory, "a name of no inode"));
            }
            each(name, inode, file_type);
        }
        Ok(())
    }

    /// Checks the checksum of a block, which stands in an entry at its end or, in a node of the hash
    /// tree, behind the tree's entries.
    fn check_block(&self, directory: &Inode, block: &[u8]) -> Result<()> {
        let Some(seed) = directory.seed() else {
            return Ok(());
        };
        let matches = match tree_entries(block) {
            Some(at) => node_matches(seed, block, at),
            None => leaf_matches(seed, block),
        };
        if matches == Some(true) {
            return Ok(());
        }
        Err(bad(directory, "a block does not match its checksum"))
    }
}

/// Where the entries of a node of a hash tree begin; `None` of a block of names.
fn tree_entries(block: &[u8]) -> Option<usize> {
    /// Bytes of the entry `.`, and of `..` without the rest of the block.
    const DOT: usize = 12;
    let fields = Fields(block);
    let first = usize::from(fields.u16(4)?);
    if first == block.len() {
        return Some(HEAD);
    }
    let second = usize::from(fields.u16(DOT + 4)?);
    let info = 2 * DOT;
    let is_root = first == DOT
        && second == block.len() - DOT
        && fields.u32(info) == Some(0)
        && fields.u8(info + 5) == Some(8);
    is_root.then_some(info + 8)
}

fn node_matches(seed: u32, block: &[u8], at: usize) -> Option<bool> {
    /// Bytes of an entry of the tree.
    const NODE_ENTRY: usize = 8;
    let fields = Fields(block);
    let (room, count) = (fields.u16(at)?, fields.u16(at + 2)?);
    let covered = block.get(..at + NODE_ENTRY * usize::from(count))?;
    let tail = block.get(at + NODE_ENTRY * usize::from(room)..)?;
    let (reserved, sum) = (tail.get(..4)?, Fields(tail).u32(4)?);
    Some(crc(crc(crc(seed, covered), reserved), &[0; 4]) == sum)
}

fn leaf_matches(seed: u32, block: &[u8]) -> Option<bool> {
    let end = block.len().checked_sub(TAIL)?;
    let (covered, tail) = block.split_at(end);
    let tail = Fields(tail);
    let has_tail = tail.u32(0)? == 0
        && usize::from(tail.u16(4)?) == TAIL
        && tail.u8(6)? == 0
        && tail.u8(7)? == TAIL_TYPE;
    Some(has_tail && tail.u32(8)? == crc(seed, covered))
}

fn bad(directory: &Inode, what: &str) -> vellum_base::Error {
    corrupt(format!("the directory {}: {what}", directory.number()))
}
