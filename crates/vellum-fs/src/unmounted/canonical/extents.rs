//! The tree of extents of a file: as flat as it can be, its nodes full.

use super::super::checksum::crc;
use super::super::inode::MAP_LEN;
use super::Sink;
use super::space::Space;
use crate::fields::{put_u16, put_u32};
use vellum_base::block::{BLOCK_LEN, part, part_mut};
use vellum_base::error::Result;

const MAGIC: u16 = 0xF30A;
/// Bytes of a node's header and of each entry.
const ENTRY: usize = 12;
/// Entries in the inode, and in a block, of which the last four bytes are its checksum.
const IN_INODE: usize = MAP_LEN / ENTRY - 1;
const IN_BLOCK: usize = BLOCK_LEN / ENTRY - 1;
/// Blocks of the longest extent.
const LONGEST: u64 = 0x8000;

/// Blocks of a file that lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first block in the file.
    pub logical: u32,
    /// The first block on the device.
    pub physical: u64,
    /// How many, 1 to [`LONGEST`].
    pub len: u64,
}

/// Adds blocks behind others, to the same extent where they go on from it.
pub(super) fn push(pieces: &mut Vec<Piece>, logical: u32, physical: u64, len: u64) {
    let (mut logical, mut physical, mut len) = (logical, physical, len);
    if let Some(last) = pieces.last_mut() {
        let goes_on = u64::from(last.logical) + last.len == u64::from(logical)
            && last.physical + last.len == physical;
        if goes_on {
            let more = len.min(LONGEST - last.len);
            last.len += more;
            logical += more as u32;
            physical += more;
            len -= more;
        }
    }
    while len > 0 {
        let now = len.min(LONGEST);
        pieces.push(Piece {
            logical,
            physical,
            len: now,
        });
        logical = logical.saturating_add(now as u32);
        physical += now;
        len -= now;
    }
}

/// Makes the tree of `pieces`, which are in order. Its nodes outside the inode are taken from `space` and
/// written; `seed` begins their checksums. Returns the map for the inode, and the number of those nodes.
pub(super) fn build(
    pieces: &[Piece],
    seed: u32,
    space: &mut Space<'_>,
    sink: &mut dyn Sink,
) -> Result<([u8; MAP_LEN], u64)> {
    let mut entries: Vec<[u8; ENTRY]> = pieces.iter().map(leaf_entry).collect();
    let (mut depth, mut nodes) = (0, 0);
    while entries.len() > IN_INODE {
        let mut above = Vec::new();
        for part_of in entries.chunks(IN_BLOCK) {
            let mut node = [0; BLOCK_LEN];
            fill(&mut node, part_of, IN_BLOCK, depth);
            let end = ENTRY * (IN_BLOCK + 1);
            let sum = crc(seed, part(&node, 0, end));
            put_u32(&mut node, end, sum);
            for block in space.take_blocks(1)?.into_iter().flatten() {
                sink.put(block, &node)?;
                above.push(index_entry(part_of, block));
            }
            nodes += 1;
        }
        entries = above;
        depth += 1;
    }
    let mut map = [0; MAP_LEN];
    fill(&mut map, &entries, IN_INODE, depth);
    Ok((map, nodes))
}

fn fill(node: &mut [u8], entries: &[[u8; ENTRY]], room: usize, depth: u16) {
    put_u16(node, 0, MAGIC);
    put_u16(node, 2, entries.len() as u16);
    put_u16(node, 4, room as u16);
    put_u16(node, 6, depth);
    for (index, entry) in entries.iter().enumerate() {
        part_mut(node, ENTRY * (index + 1), ENTRY).copy_from_slice(entry);
    }
}

fn leaf_entry(piece: &Piece) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    put_u32(&mut entry, 0, piece.logical);
    put_u16(&mut entry, 4, piece.len as u16);
    put_u16(&mut entry, 6, (piece.physical >> 32) as u16);
    put_u32(&mut entry, 8, piece.physical as u32);
    entry
}

/// The entry of a node at `block` that holds `entries`.
fn index_entry(entries: &[[u8; ENTRY]], block: u64) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    if let Some(first) = entries.first() {
        part_mut(&mut entry, 0, 4).copy_from_slice(part(first, 0, 4));
    }
    put_u32(&mut entry, 4, block as u32);
    put_u16(&mut entry, 8, (block >> 32) as u16);
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_go_on_are_one_extent_up_to_the_longest() {
        let mut pieces = Vec::new();
        push(&mut pieces, 0, 100, 5);
        push(&mut pieces, 5, 105, 3);
        push(&mut pieces, 8, 200, 1);
        push(&mut pieces, 10, 201, 0x8001);
        let found: Vec<_> = pieces
            .iter()
            .map(|p| (p.logical, p.physical, p.len))
            .collect();
        assert_eq!(
            found,
            [
                (0, 100, 8),
                (8, 200, 1),
                (10, 201, 0x8000),
                (10 + 0x8000, 201 + 0x8000, 1)
            ]
        );
    }
}
