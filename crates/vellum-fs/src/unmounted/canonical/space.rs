//! The room of a file system: its free blocks, which are taken upwards, and inodes, of which the lowest are
//! taken first, and what its bitmaps, descriptors and superblock say of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::changed::{Ranges, bitmap_of};
use super::super::checksum::{crc, crc_but};
use super::super::layout;
use super::super::{FileSystem, corrupt, unknown};
use super::Sink;
use super::bits::Bits;
use super::form::{Form, at};
use crate::fields::{put_u16, put_u32, u16_at, u32_at};
use vellum_base::block::{in_memory, part, part_mut};
use vellum_base::error::{Error, ErrorKind, Result};

/// Blocks that are looked for side by side: 32 MiB. A longer file is put together of such runs.
const LONGEST_RUN: u64 = 8192;
/// What begins on a border of so many blocks, 128 KiB, does not move by less when something in front of it
/// grows: chunks of layers of that size stay the same.
pub(super) const ALIGNED: u64 = 32;
/// Bytes of a group descriptor.
const DESCRIPTOR: usize = 64;

mod group_flag {
    pub const INODES_UNUSED: u16 = 1;
    pub const BLOCKS_UNUSED: u16 = 2;
    /// The whole inode table is written, or reads as zeros.
    pub const TABLE_ZEROED: u16 = 4;
}

/// What changed in a group.
#[derive(Debug, Default, Clone, Copy)]
struct Delta {
    blocks: i64,
    inodes: i64,
    directories: i64,
    /// Blocks were freed or taken: as many of one as of the other, maybe.
    other_blocks: bool,
    /// So were inodes.
    other_inodes: bool,
}

/// The free blocks and inodes of a file system.
pub(super) struct Space<'a> {
    files: &'a FileSystem<'a>,
    form: &'a Form,
    seed: u32,
    /// Blocks that the file system keeps for itself.
    own: Ranges,
    blocks: BTreeMap<usize, Bits>,
    inodes: BTreeMap<usize, Bits>,
    deltas: BTreeMap<usize, Delta>,
    /// Where the next blocks are looked for.
    next_block: u64,
    /// In front of this inode none is free.
    next_inode: u32,
}

impl<'a> Space<'a> {
    pub fn new(files: &'a FileSystem<'_>, form: &'a Form, seed: u32) -> Self {
        let mut own = Vec::new();
        for (number, group) in (0..).zip(&files.groups) {
            own.push(group.block_bitmap..group.block_bitmap + 1);
            own.push(group.inode_bitmap..group.inode_bitmap + 1);
            own.push(group.inode_table..group.inode_table + files.layout.table_blocks());
            let start = number * files.layout.blocks_per_group;
            own.push(start..start + form.blocks_in_front(&files.layout, number));
        }
        Space {
            files,
            form,
            seed,
            own: Ranges::of_bytes(&own, 1),
            blocks: BTreeMap::new(),
            inodes: BTreeMap::new(),
            deltas: BTreeMap::new(),
            next_block: 0,
            next_inode: files.layout.first_inode,
        }
    }

    /// The group of a block, and the blocks of that group.
    fn group_of(&self, block: u64) -> (usize, Range<u64>) {
        let per_group = self.files.layout.blocks_per_group;
        let number = block / per_group;
        let start = number * per_group;
        let end = self.files.layout.blocks.min(start + per_group);
        (in_memory(number), start..end)
    }

    /// The block bitmap of a group as it is now.
    fn block_bits(&mut self, number: usize, range: &Range<u64>) -> Result<&mut Bits> {
        if !self.blocks.contains_key(&number) {
            let group = self.files.group(number)?;
            let len = range.end - range.start;
            let bits = if group.has_bitmap {
                Bits::new(bitmap_of(self.files, group)?, len)
            } else {
                let mut bits = Bits::new(vec![0; in_memory(self.files.block_size())], len);
                for block in self.own.common(range).flatten() {
                    bits.put(block - range.start, true);
                }
                bits
            };
            self.blocks.insert(number, bits);
        }
        let bits = self.blocks.get_mut(&number);
        bits.ok_or_else(|| Error::internal("a bitmap that was just read is not there"))
    }

    /// Frees blocks. All are freed before the first is taken.
    pub fn free_blocks(&mut self, blocks: Range<u64>) -> Result<()> {
        for block in blocks {
            let (number, range) = self.group_of(block);
            let bits = self.block_bits(number, &range)?;
            let bit = block - range.start;
            if !bits.is_set(bit) {
                return Err(corrupt(format!("block {block} is in use and free")));
            }
            bits.put(bit, false);
            let delta = self.deltas.entry(number).or_default();
            delta.blocks += 1;
            delta.other_blocks = true;
        }
        Ok(())
    }

    /// Has the blocks that are taken next begin on a border of [`ALIGNED`] blocks.
    pub fn align(&mut self) {
        self.next_block = self.next_block.next_multiple_of(ALIGNED);
    }

    /// Takes `count` blocks behind those that were taken before: side by side where there are so many, else
    /// in pieces. What is left out on the way is taken when the end was reached.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`].
    pub fn take_blocks(&mut self, count: u64) -> Result<Vec<Range<u64>>> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut left = count;
        let mut want = left.min(LONGEST_RUN);
        while left > 0 {
            want = want.min(left);
            let found = match self.find(want, self.next_block)? {
                None if self.next_block > 0 => self.find(want, 0)?,
                found => found,
            };
            let Some(run) = found else {
                if want == 1 {
                    return Err(full("blocks"));
                }
                want /= 2;
                continue;
            };
            let (number, range) = self.group_of(run.start);
            let bits = self.block_bits(number, &range)?;
            for block in run.clone() {
                bits.put(block - range.start, true);
            }
            let delta = self.deltas.entry(number).or_default();
            delta.blocks -= want.cast_signed();
            delta.other_blocks = true;
            self.next_block = run.end;
            left -= want;
            match taken.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => taken.push(run),
            }
        }
        Ok(taken)
    }

    /// The first `want` free blocks from `from` on that lie side by side in a group.
    fn find(&mut self, want: u64, from: u64) -> Result<Option<Range<u64>>> {
        let mut at = from;
        while at < self.files.layout.blocks {
            let (number, range) = self.group_of(at);
            let bits = self.block_bits(number, &range)?;
            let Some(bit) = bits.next_clear(at - range.start) else {
                at = range.end;
                continue;
            };
            let (start, len) = (range.start + bit, bits.clear_run(bit, want));
            if len >= want {
                return Ok(Some(start..start + want));
            }
            at = start + len;
        }
        Ok(None)
    }

    fn inode_bits(&mut self, number: usize) -> Result<&mut Bits> {
        if !self.inodes.contains_key(&number) {
            let layout = &self.files.layout;
            let (descriptor, len) = (self.descriptor(number)?, layout.inodes_per_group);
            let bits = if u16_at(&descriptor, 0x12) & group_flag::INODES_UNUSED != 0 {
                Bits::new(vec![0; in_memory(layout.block_size)], len.into())
            } else {
                let bytes = self
                    .files
                    .blocks(self.files.group(number)?.inode_bitmap, 1)?;
                let sum = crc(self.seed, part(&bytes, 0, len as usize / 8));
                let high = u32::from(u16_at(&descriptor, 0x3A)) << 16;
                if sum != high | u32::from(u16_at(&descriptor, 0x1A)) {
                    return Err(corrupt("an inode bitmap does not match its checksum"));
                }
                Bits::new(bytes, len.into())
            };
            self.inodes.insert(number, bits);
        }
        let bits = self.inodes.get_mut(&number);
        bits.ok_or_else(|| Error::internal("a bitmap that was just read is not there"))
    }

    /// The group of an inode, and its place there.
    pub fn place_of(&self, inode: u32) -> (usize, u32) {
        let per_group = self.files.layout.inodes_per_group;
        (((inode - 1) / per_group) as usize, (inode - 1) % per_group)
    }

    /// Frees an inode. All are freed before the first is taken.
    pub fn free_inode(&mut self, inode: u32, directory: bool) -> Result<()> {
        let (number, slot) = self.place_of(inode);
        let bits = self.inode_bits(number)?;
        if !bits.is_set(slot.into()) {
            return Err(corrupt(format!("inode {inode} is in use and free")));
        }
        bits.put(slot.into(), false);
        let delta = self.deltas.entry(number).or_default();
        delta.inodes += 1;
        delta.other_inodes = true;
        delta.directories -= i64::from(directory);
        Ok(())
    }

    /// Takes the lowest free inode.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`].
    pub fn take_inode(&mut self, directory: bool) -> Result<u32> {
        let per_group = self.files.layout.inodes_per_group;
        while self.next_inode <= self.files.layout.inodes {
            let (number, slot) = self.place_of(self.next_inode);
            let first = self.next_inode - slot;
            let free = self.inode_bits(number)?.next_clear(slot.into());
            let Some(free) = free else {
                self.next_inode = first.saturating_add(per_group);
                continue;
            };
            self.inode_bits(number)?.put(free, true);
            let delta = self.deltas.entry(number).or_default();
            delta.inodes -= 1;
            delta.other_inodes = true;
            delta.directories += i64::from(directory);
            let inode = first + free as u32;
            self.next_inode = inode.saturating_add(1);
            return Ok(inode);
        }
        Err(full("inodes"))
    }

    /// The bytes of a group's descriptor, as they were.
    fn descriptor(&self, number: usize) -> Result<Vec<u8>> {
        let per_block = in_memory(self.files.block_size()) / DESCRIPTOR;
        let layout = &self.files.layout;
        let at = self
            .form
            .descriptor_block(layout, (number / per_block) as u64);
        let block = self.files.blocks(at, 1)?;
        Ok(part(&block, number % per_block * DESCRIPTOR, DESCRIPTOR).to_vec())
    }

    /// Writes the bitmaps and descriptors of all groups in which something was freed or taken, and the
    /// superblock, with `time` as the time of the last write, in seconds since 1970.
    pub fn write(mut self, time: u64, sink: &mut dyn Sink) -> Result<()> {
        let per_block = in_memory(self.files.block_size()) / DESCRIPTOR;
        let mut changed: BTreeMap<usize, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
        let mut total = Delta::default();
        for (number, delta) in std::mem::take(&mut self.deltas) {
            total.blocks += delta.blocks;
            total.inodes += delta.inodes;
            let descriptor = self.write_group(number, delta, sink)?;
            let in_block = changed.entry(number / per_block).or_default();
            in_block.push((number % per_block, descriptor));
        }
        for (index, descriptors) in changed {
            let layout = &self.files.layout;
            let at = self.form.descriptor_block(layout, index as u64);
            let mut block = self.files.blocks(at, 1)?;
            for (slot, descriptor) in descriptors {
                part_mut(&mut block, slot * DESCRIPTOR, DESCRIPTOR).copy_from_slice(&descriptor);
            }
            // The superblock lies in the block before the first descriptors.
            sink.put(at, &block)?;
        }
        self.write_superblock(total, time, sink)
    }

    /// Writes the bitmaps of a group. Returns its descriptor.
    fn write_group(&self, number: usize, delta: Delta, sink: &mut dyn Sink) -> Result<Vec<u8>> {
        let group = self.files.group(number)?;
        let mut bytes = self.descriptor(number)?;
        let layout = &self.files.layout;
        let mut flags = u16_at(&bytes, 0x12);
        let halves = |bytes: &mut [u8], low: usize, high: usize, value: u32| {
            put_u16(bytes, low, value as u16);
            put_u16(bytes, high, (value >> 16) as u16);
        };
        if let Some(bits) = self.blocks.get(&number).filter(|_| delta.other_blocks) {
            sink.put(group.block_bitmap, bits.bytes())?;
            flags &= !group_flag::BLOCKS_UNUSED;
            let covered = part(bits.bytes(), 0, in_memory(layout.blocks_per_group / 8));
            halves(&mut bytes, 0x18, 0x38, crc(self.seed, covered));
        }
        if let Some(bits) = self.inodes.get(&number).filter(|_| delta.other_inodes) {
            sink.put(group.inode_bitmap, bits.bytes())?;
            if flags & group_flag::TABLE_ZEROED == 0 {
                return Err(unknown("an inode table was never written"));
            }
            flags &= !group_flag::INODES_UNUSED;
            let covered = part(bits.bytes(), 0, layout.inodes_per_group as usize / 8);
            halves(&mut bytes, 0x1A, 0x3A, crc(self.seed, covered));
            let slots = (0..u64::from(layout.inodes_per_group)).rev();
            let last = slots.into_iter().find(|slot| bits.is_set(*slot));
            let used = last
                .map_or(0, |last| last as u32 + 1)
                .max(group.inodes_used);
            halves(&mut bytes, 0x1C, 0x32, layout.inodes_per_group - used);
        }
        put_u16(&mut bytes, 0x12, flags);
        for (low, high, change) in [
            (0x0C, 0x2C, delta.blocks),
            (0x0E, 0x2E, delta.inodes),
            (0x10, 0x30, delta.directories),
        ] {
            let old = u32::from(u16_at(&bytes, high)) << 16 | u32::from(u16_at(&bytes, low));
            let new = i64::from(old) + change;
            let new = u32::try_from(new).map_err(|_| corrupt("the counts of a group"))?;
            halves(&mut bytes, low, high, new);
        }
        let seed = crc(self.seed, &(number as u32).to_le_bytes());
        let sum = crc_but(seed, &bytes, 0x1E, 2) as u16;
        put_u16(&mut bytes, 0x1E, sum);
        Ok(bytes)
    }

    fn write_superblock(&self, total: Delta, time: u64, sink: &mut dyn Sink) -> Result<()> {
        let (mut bytes, _) = layout::superblock(self.files.source)?;
        let count = |old: u64, change: i64| {
            let new = old.checked_add_signed(change);
            new.ok_or_else(|| corrupt("the counts of the superblock"))
        };
        let blocks = u64::from(u32_at(&bytes, 0x158)) << 32 | u64::from(u32_at(&bytes, 0x0C));
        let blocks = count(blocks, total.blocks)?;
        put_u32(&mut bytes, 0x0C, blocks as u32);
        put_u32(&mut bytes, 0x158, (blocks >> 32) as u32);
        let inodes = count(u32_at(&bytes, 0x10).into(), total.inodes)?;
        put_u32(&mut bytes, 0x10, inodes as u32);
        put_u32(&mut bytes, at::WRITTEN, time as u32);
        part_mut(&mut bytes, at::WRITTEN_HIGH, 1).fill((time >> 32) as u8);
        let sum = crc(!0, part(&bytes, 0, 0x3FC));
        put_u32(&mut bytes, 0x3FC, sum);
        let mut block = self.files.blocks(0, 1)?;
        part_mut(&mut block, 1024, 1024).copy_from_slice(&bytes);
        sink.put(0, &block)
    }
}

fn full(what: &str) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!("the file system has no free {what} left"),
    )
}
