//! One file: its content in its new place, and the bytes of its inode.

use std::ops::Range;

use super::super::FileSystem;
use super::super::checksum::{crc, crc_but};
use super::super::extents::Extent;
use super::super::inode::{Inode, MAP_LEN, OLD_SIZE};
use super::attributes::{EXTRA_SIZE, IN_INODE_AT, value_hash};
use super::changes::{Listing, MAP_AT};
use super::extents::{self, Piece};
use super::form::INODE;
use super::space::ALIGNED;
use super::{Laying, directory};
use crate::fields::{put_u16, put_u32, u32_at};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, in_memory, part, part_mut};
use vellum_base::error::{Result, ResultExt};

mod at {
    pub const SIZE: usize = 0x04;
    pub const ATIME: usize = 0x08;
    pub const CTIME: usize = 0x0C;
    pub const MTIME: usize = 0x10;
    pub const DELETED: usize = 0x14;
    pub const LINKS: usize = 0x1A;
    pub const SECTORS: usize = 0x1C;
    pub const FLAGS: usize = 0x20;
    pub const VERSION: usize = 0x24;
    pub const GENERATION: usize = 0x64;
    pub const XATTR_BLOCK: usize = 0x68;
    pub const SIZE_HIGH: usize = 0x6C;
    pub const SECTORS_HIGH: usize = 0x74;
    pub const XATTR_BLOCK_HIGH: usize = 0x76;
    pub const CHECKSUM: usize = 0x7C;
    pub const CHECKSUM_HIGH: usize = 0x82;
    pub const CTIME_EXTRA: usize = 0x84;
    pub const MTIME_EXTRA: usize = 0x88;
    pub const ATIME_EXTRA: usize = 0x8C;
    pub const MADE: usize = 0x90;
    pub const MADE_EXTRA: usize = 0x94;
    pub const VERSION_HIGH: usize = 0x98;
}

mod flag {
    pub const INDEXED: u32 = 0x1000;
    /// Its blocks are counted in blocks, not in sectors of 512 bytes.
    pub const HUGE: u32 = 0x4_0000;
    pub const EXTENTS: u32 = 0x8_0000;
    pub const VALUE: u32 = 0x20_0000;
}

/// Blocks of content that are copied at a time: 1 MiB.
const BATCH: u64 = 256;
/// Sectors of 512 bytes in a block.
const SECTORS: u64 = BLOCK_SIZE / 512;

/// Blocks of a file's content, side by side.
struct Run {
    /// The first of them in the file.
    logical: u64,
    len: u64,
    /// The first of them in the newer state; none where they lie apart from it.
    physical: Option<u64>,
}

/// Where the content of a file lies.
pub(super) struct Content {
    /// The map in its inode, or what it has there instead.
    map: [u8; MAP_LEN],
    /// Blocks of the content and of its tree.
    blocks: u64,
    /// Of a directory: its size in bytes, and whether it is a hash tree.
    directory: Option<(u64, bool)>,
}

impl Content {
    /// Of a file whose content stays where it is.
    pub fn kept(files: &FileSystem<'_>, inode: &Inode) -> Result<Content> {
        let blocks = files.blocks_of(inode)?;
        let content: u64 = blocks.content.iter().map(|extent| extent.len).sum();
        let indexed = u32_at(inode.raw(), at::FLAGS) & flag::INDEXED != 0;
        Ok(Content {
            map: map_of(inode),
            blocks: content + blocks.tree.len() as u64,
            directory: inode.is_directory().then(|| (inode.size(), indexed)),
        })
    }
}

fn map_of(inode: &Inode) -> [u8; MAP_LEN] {
    let mut map = [0; MAP_LEN];
    map.copy_from_slice(part(inode.raw(), MAP_AT, MAP_LEN));
    map
}

/// Where the extended attributes of a file lie.
pub(super) struct Attached {
    /// The bytes of its inode from [`IN_INODE_AT`] on.
    pub in_inode: [u8; INODE - IN_INODE_AT],
    pub block: Option<u64>,
    /// That block, and those of values that have inodes of their own.
    pub blocks: u64,
}

impl Attached {
    /// Of a file whose attributes stay as they are.
    pub fn kept(files: &FileSystem<'_>, inode: &Inode) -> Result<Attached> {
        let mut in_inode = [0; INODE - IN_INODE_AT];
        in_inode.copy_from_slice(part(inode.raw(), IN_INODE_AT, INODE - IN_INODE_AT));
        let block = inode.xattr_block();
        let mut blocks = u64::from(block.is_some());
        for in_block in [false, true] {
            for holder in files.holders(inode, in_block)? {
                let size = files.inode(holder)?.map_or(0, |value| value.size());
                blocks += size.div_ceil(BLOCK_SIZE);
            }
        }
        Ok(Attached {
            in_inode,
            block,
            blocks,
        })
    }
}

/// What begins the checksums of the blocks of an inode.
pub(super) fn seed(seed: u32, number: u32, inode: &Inode) -> u32 {
    let seed = crc(seed, &number.to_le_bytes());
    crc(seed, part(inode.raw(), at::GENERATION, 4))
}

/// As [`seed`], of a new inode, whose generation is 0.
pub(super) fn fresh_seed(seed: u32, number: u32) -> u32 {
    crc(crc(seed, &number.to_le_bytes()), &[0; 4])
}

impl Laying<'_> {
    /// Makes the blocks of a directory. `inode` is that of which the generation stays, or a new one.
    pub(super) fn directory(
        &mut self,
        number: u32,
        listing: &Listing,
        seed: u32,
    ) -> Result<Content> {
        let names = self.renumbered(&listing.names);
        let parent = self.number_of(listing.parent);
        let made = directory::make(number, parent, &names, &self.hasher, seed)?;
        let bytes = made.blocks.as_flattened();
        let placed = self.place(bytes, seed)?;
        Ok(Content {
            directory: Some((bytes.len() as u64, made.indexed)),
            ..placed
        })
    }

    /// Writes whole blocks to a place of their own.
    pub(super) fn place(&mut self, bytes: &[u8], seed: u32) -> Result<Content> {
        let count = (bytes.len() / BLOCK_LEN) as u64;
        let mut pieces = Vec::new();
        let mut done = 0;
        for run in self.space.take_blocks(count)? {
            let len = run.end - run.start;
            let bytes = part(
                bytes,
                in_memory(done * BLOCK_SIZE),
                in_memory(len * BLOCK_SIZE),
            );
            self.sink.put(run.start, bytes)?;
            extents::push(&mut pieces, done as u32, run.start, len);
            done += len;
        }
        self.mapped(&pieces, count, seed)
    }

    fn mapped(&mut self, pieces: &[Piece], count: u64, seed: u32) -> Result<Content> {
        let (map, nodes) = extents::build(pieces, seed, &mut self.space, self.sink)?;
        Ok(Content {
            map,
            blocks: count + nodes,
            directory: None,
        })
    }

    /// Copies the content of a file that is no directory to its new place: from those of its blocks that lie
    /// `apart`, or from the newer state.
    pub(super) fn content(
        &mut self,
        inode: &Inode,
        seed: u32,
        apart: Option<Vec<Range<u64>>>,
    ) -> Result<Content> {
        if inode.map()?.is_none() {
            return Ok(Content {
                map: map_of(inode),
                blocks: 0,
                directory: None,
            });
        }
        let runs = self.runs(inode, apart)?;
        let count: u64 = runs.iter().map(|run| run.len).sum();
        if count >= ALIGNED {
            self.space.align();
        }
        let mut free = self.space.take_blocks(count)?.into_iter();
        let mut to = 0..0;
        let mut pieces = Vec::new();
        for run in runs {
            let mut done = 0;
            while done < run.len {
                if to.is_empty() {
                    to = free.next().unwrap_or(0..0);
                }
                let len = (run.len - done).min(to.end - to.start).min(BATCH);
                self.copy(inode, &run, done..done + len, to.start)?;
                extents::push(&mut pieces, (run.logical + done) as u32, to.start, len);
                to.start += len;
                done += len;
            }
        }
        self.mapped(&pieces, count, seed)
    }

    /// Where the blocks of a file's content are, up to its end.
    fn runs(&self, inode: &Inode, apart: Option<Vec<Range<u64>>>) -> Result<Vec<Run>> {
        let end = inode.size().div_ceil(BLOCK_SIZE);
        let mut runs: Vec<Run> = match apart {
            Some(blocks) => {
                let run = |blocks: Range<u64>| Run {
                    logical: blocks.start,
                    len: blocks.end.saturating_sub(blocks.start),
                    physical: None,
                };
                blocks.into_iter().map(run).collect()
            }
            None => {
                let extents = self.newer.blocks_of(inode)?.content;
                // What is kept for later reads as zeros, and so does a hole.
                let written = extents.into_iter().filter(|extent| extent.written);
                let run = |extent: Extent| Run {
                    logical: extent.logical,
                    len: extent.len,
                    physical: Some(extent.physical),
                };
                written.map(run).collect()
            }
        };
        runs.retain(|run| run.logical < end);
        for run in &mut runs {
            run.len = run.len.min(end - run.logical);
        }
        Ok(runs)
    }

    /// Copies those blocks of a run to `to`.
    fn copy(&mut self, inode: &Inode, run: &Run, blocks: Range<u64>, to: u64) -> Result<()> {
        let len = blocks.end - blocks.start;
        let logical = run.logical + blocks.start;
        self.buffer.resize(in_memory(BATCH * BLOCK_SIZE), 0);
        let bytes = part_mut(&mut self.buffer, 0, in_memory(len * BLOCK_SIZE));
        match run.physical {
            Some(physical) => {
                let from = physical + blocks.start;
                let source = self.newer.source;
                source
                    .fill(bytes, from * BLOCK_SIZE)
                    .context(|| format!("reading {len} blocks of an ext4 from {from}"))?;
            }
            None => self.apart.fill(inode.number(), bytes, logical)?,
        }
        clear_tail(bytes, logical, inode.size());
        self.sink.put(to, bytes)
    }

    /// Puts an inode together: what the file is from `new`, its identity from `old`, where there is one.
    pub(super) fn put_inode(
        &mut self,
        number: u32,
        old: Option<&Inode>,
        new: &Inode,
        content: &Content,
        attached: &Attached,
    ) {
        let mut raw = new.raw().to_vec();
        let (time, extra) = encoded(self.time);
        put_u32(&mut raw, at::DELETED, 0);
        put_u32(&mut raw, at::CTIME, time);
        put_u32(&mut raw, at::CTIME_EXTRA, extra);
        put_u32(&mut raw, at::MADE, time);
        put_u32(&mut raw, at::MADE_EXTRA, extra);
        put_u32(&mut raw, at::GENERATION, 0);
        let mut version = 1u64;
        if let Some(old) = old {
            let keep = |raw: &mut [u8], at: usize, len: usize| {
                part_mut(raw, at, len).copy_from_slice(part(old.raw(), at, len));
            };
            keep(&mut raw, at::MADE, 8);
            keep(&mut raw, at::GENERATION, 4);
            let low = u64::from(u32_at(old.raw(), at::VERSION));
            let high = u64::from(u32_at(old.raw(), at::VERSION_HIGH));
            version = (high << 32 | low).wrapping_add(1);
        }
        put_u32(&mut raw, at::VERSION, version as u32);
        put_u32(&mut raw, at::VERSION_HIGH, (version >> 32) as u32);
        let mut flags = u32_at(&raw, at::FLAGS) & !(flag::INDEXED | flag::HUGE);
        if let Some((size, indexed)) = content.directory {
            flags |= if indexed { flag::INDEXED } else { 0 };
            put_u32(&mut raw, at::SIZE, size as u32);
            put_u32(&mut raw, at::SIZE_HIGH, (size >> 32) as u32);
        }
        put_u32(&mut raw, at::FLAGS, flags);
        put_content(&mut raw, content, attached.blocks);
        let block = attached.block.unwrap_or(0);
        put_u32(&mut raw, at::XATTR_BLOCK, block as u32);
        put_u16(&mut raw, at::XATTR_BLOCK_HIGH, (block >> 32) as u16);
        part_mut(&mut raw, IN_INODE_AT, INODE - IN_INODE_AT).copy_from_slice(&attached.in_inode);
        put_checksum(&mut raw, self.seed, number);
        self.inodes.insert(number, raw);
    }
}

/// Puts the map of a file, and how many sectors it has.
fn put_content(raw: &mut [u8], content: &Content, more_blocks: u64) {
    part_mut(raw, MAP_AT, MAP_LEN).copy_from_slice(&content.map);
    let sectors = (content.blocks + more_blocks) * SECTORS;
    put_u32(raw, at::SECTORS, sectors as u32);
    put_u16(raw, at::SECTORS_HIGH, (sectors >> 32) as u16);
}

fn put_checksum(raw: &mut [u8], seed: u32, number: u32) {
    let seed = crc(seed, &number.to_le_bytes());
    let seed = crc(seed, part(raw, at::GENERATION, 4));
    let (old, rest) = raw.split_at(OLD_SIZE);
    let sum = crc_but(seed, old, at::CHECKSUM, 2);
    let sum = crc_but(sum, rest, at::CHECKSUM_HIGH - OLD_SIZE, 2);
    put_u16(raw, at::CHECKSUM, sum as u16);
    put_u16(raw, at::CHECKSUM_HIGH, (sum >> 16) as u16);
}

/// A time in seconds since 1970 as an inode has it: the low 32 bits, and the field with the bits above.
fn encoded(seconds: u64) -> (u32, u32) {
    let low = seconds as u32;
    // The low bits are a signed number, to which 2^32 times the two bits are added.
    let signed = i64::from(low.cast_signed());
    let epoch = (seconds.cast_signed() - signed) >> 32;
    (low, epoch as u32 & 3)
}

/// Zeroes what lies behind the end of a file in its last block.
fn clear_tail(bytes: &mut [u8], logical: u64, size: u64) {
    let kept = size.saturating_sub(logical * BLOCK_SIZE);
    if kept < bytes.len() as u64 {
        bytes.split_at_mut(in_memory(kept)).1.fill(0);
    }
}

/// How many attributes have the value that an inode holds.
pub(super) fn value_references(inode: &Inode) -> u64 {
    let high = u64::from(u32_at(inode.raw(), at::CTIME));
    high << 32 | u64::from(u32_at(inode.raw(), at::VERSION))
}

/// The bytes of the inode of a value that so many attributes have.
pub(super) fn with_value_references(seed: u32, inode: &Inode, references: u64) -> Vec<u8> {
    let mut raw = inode.raw().to_vec();
    put_value_references(&mut raw, references);
    put_checksum(&mut raw, seed, inode.number());
    raw
}

fn put_value_references(raw: &mut [u8], references: u64) {
    put_u32(raw, at::CTIME, (references >> 32) as u32);
    put_u32(raw, at::VERSION, references as u32);
}

/// The bytes of the inode of a new value.
pub(super) fn value_inode(
    seed: u32,
    time: u64,
    number: u32,
    value: &[u8],
    references: u64,
    content: &Content,
) -> Vec<u8> {
    let mut raw = vec![0; INODE];
    let (time, extra) = encoded(time);
    let (hash, hash_extra) = encoded(value_hash(seed, value).into());
    put_u16(&mut raw, 0, (libc::S_IFREG | 0o600) as u16);
    put_u32(&mut raw, at::SIZE, value.len() as u32);
    put_u16(&mut raw, at::LINKS, 1);
    put_u32(&mut raw, at::FLAGS, flag::EXTENTS | flag::VALUE);
    put_u16(&mut raw, OLD_SIZE, EXTRA_SIZE as u16);
    put_u32(&mut raw, at::ATIME, hash);
    put_u32(&mut raw, at::ATIME_EXTRA, hash_extra);
    put_u32(&mut raw, at::MTIME, time);
    put_u32(&mut raw, at::MTIME_EXTRA, extra);
    put_u32(&mut raw, at::MADE, time);
    put_u32(&mut raw, at::MADE_EXTRA, extra);
    put_value_references(&mut raw, references);
    put_content(&mut raw, content, 0);
    put_checksum(&mut raw, seed, number);
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_beyond_2038_have_the_bits_above() {
        assert_eq!(encoded(1_577_836_801), (1_577_836_801, 0));
        assert_eq!(encoded(0x8000_0000), (0x8000_0000, 1));
        assert_eq!(encoded(0x1_0000_0005), (5, 1));
    }

    #[test]
    fn only_what_lies_behind_the_end_is_cleared() {
        let mut bytes = vec![1; 2 * BLOCK_LEN];
        clear_tail(&mut bytes, 3, 3 * BLOCK_SIZE + 5000);
        assert!(bytes[..5000].iter().all(|byte| *byte == 1));
        assert!(bytes[5000..].iter().all(|byte| *byte == 0));
        let mut bytes = vec![1; BLOCK_LEN];
        clear_tail(&mut bytes, 0, 2 * BLOCK_SIZE);
        assert_eq!(bytes, vec![1; BLOCK_LEN]);
    }
}
