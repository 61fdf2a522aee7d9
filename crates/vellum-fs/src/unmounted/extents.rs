//! Where the content of an inode lies: its tree of extents.

use std::collections::HashSet;

use super::checksum::crc;
use super::inode::{Inode, MAP_LEN};
use super::{FileSystem, corrupt};
use crate::fields::Fields;
use vellum_base::error::Result;

const MAGIC: u16 = 0xF30A;
/// Bytes of a node's header and of each entry.
const ENTRY: usize = 12;
/// Levels above the leaves: five can map more than 2^32 blocks.
const MAX_DEPTH: u16 = 5;
/// A longer extent is not written yet: it reads as zeros.
const MAX_WRITTEN: u16 = 0x8000;

/// Blocks of a file that lie side by side on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first block in the file.
    pub logical: u64,
    /// The first block on the device.
    pub physical: u64,
    /// How many.
    pub len: u64,
    /// False where it reads as zeros.
    pub written: bool,
}

impl Extent {
    pub fn end(self) -> u64 {
        self.logical + self.len
    }
}

/// The blocks of an inode.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// Its content, in order.
    pub content: Vec<Extent>,
    /// The nodes of its tree that lie outside the inode.
    pub tree: Vec<u64>,
}

impl FileSystem<'_> {
    /// The blocks of an inode: none of one whose content lies in itself, or that has none.
    pub(super) fn blocks_of(&self, inode: &Inode) -> Result<Blocks> {
        let mut found = Blocks::default();
        if let Some(map) = inode.map()? {
            let mut seen = HashSet::new();
            self.read_node(inode, map, None, &mut seen, &mut found)?;
        }
        let blocks: u64 = found.content.iter().map(|extent| extent.len).sum();
        if blocks > self.layout.blocks {
            return Err(corrupt(format!(
                "inode {} has more blocks than there are",
                inode.number()
            )));
        }
        Ok(found)
    }

    fn read_node(
        &self,
        inode: &Inode,
        node: &[u8],
        depth: Option<u16>,
        seen: &mut HashSet<u64>,
        found: &mut Blocks,
    ) -> Result<()> {
        let bad = |what: &str| corrupt(format!("the extents of inode {}: {what}", inode.number()));
        let cut = || bad("a node is cut");
        let fields = Fields(node);
        let count = usize::from(fields.u16(2).ok_or_else(cut)?);
        let own_depth = fields.u16(6).ok_or_else(cut)?;
        if fields.u16(0) != Some(MAGIC) {
            return Err(bad("no magic"));
        }
        if depth.unwrap_or(own_depth) != own_depth || own_depth > MAX_DEPTH {
            return Err(bad("a node of another depth"));
        }
        for entry in 0..count {
            let at = ENTRY * (entry + 1);
            let first = u64::from(fields.u32(at).ok_or_else(cut)?);
            let (low, mid) = (fields.u32(at + 4), fields.u16(at + 8));
            if own_depth > 0 {
                let (low, high) = (low.ok_or_else(cut)?, mid.ok_or_else(cut)?);
                let block = u64::from(high) << 32 | u64::from(low);
                if !seen.insert(block) {
                    return Err(bad("a node that is its own"));
                }
                found.tree.push(block);
                let child = self.blocks(block, 1)?;
                check_sum(inode, &child)
                    .ok_or_else(|| bad("a node does not match its checksum"))?;
                self.read_node(inode, &child, Some(own_depth - 1), seen, found)?;
                continue;
            }
            let (len, high) = (fields.u16(at + 4), fields.u16(at + 6));
            let (len, high) = (len.ok_or_else(cut)?, high.ok_or_else(cut)?);
            let low = fields.u32(at + 8).ok_or_else(cut)?;
            let written = len <= MAX_WRITTEN;
            let extent = Extent {
                logical: first,
                physical: u64::from(high) << 32 | u64::from(low),
                len: u64::from(if written { len } else { len - MAX_WRITTEN }),
                written,
            };
            if extent.len == 0
                || extent.physical < self.layout.first_block
                || extent.physical + extent.len > self.layout.blocks
                || found
                    .content
                    .last()
                    .is_some_and(|last| extent.logical < last.end())
            {
                return Err(bad("an extent out of place"));
            }
            found.content.push(extent);
        }
        Ok(())
    }
}

/// `None` for a node that lies outside its inode and does not match its checksum.
fn check_sum(inode: &Inode, node: &[u8]) -> Option<()> {
    let Some(seed) = inode.seed() else {
        return Some(());
    };
    let room = usize::from(Fields(node).u16(4)?);
    let end = ENTRY * room.checked_add(1)?;
    let covered = node.get(..end)?;
    (Fields(node).u32(end)? == crc(seed, covered)).then_some(())
}

const _: () = assert!(
    MAP_LEN == 5 * ENTRY,
    "an inode holds a header and four entries"
);
