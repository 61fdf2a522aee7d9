//! What several new files share: blocks of attributes, and large values that are equal.

use std::collections::{BTreeMap, HashMap};

use super::super::inode::Inode;
use super::Laying;
use super::attributes::{MAX_REFERENCES, arrange, set_references};
use super::file::{self, Attached};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE};
use vellum_base::error::{Error, Result};

/// What new files share so far.
#[derive(Default)]
pub(super) struct Shared {
    /// Blocks by their bytes without the number of files: where the last of these lies.
    blocks: HashMap<Box<[u8]>, u64>,
    /// The bytes of each, and how many files have it.
    counts: BTreeMap<u64, (Box<[u8]>, u32)>,
    /// Values: their inodes.
    values: HashMap<Box<[u8]>, u32>,
    /// How many attributes have the value of an inode.
    value_counts: BTreeMap<u32, u64>,
}

impl Laying<'_> {
    /// Finds places for the attributes that a file has in the newer state.
    pub(super) fn attach(&mut self, inode: &Inode) -> Result<Attached> {
        let xattrs = self.newer.xattrs(inode)?;
        let attributes = arrange(&xattrs)?;
        let mut value_blocks = 0;
        let mut holders = [Vec::new(), Vec::new()];
        for (in_block, holders) in [false, true].into_iter().zip(&mut holders) {
            for value in attributes.apart(in_block) {
                holders.push(self.holder(value)?);
                value_blocks += (value.len() as u64).div_ceil(BLOCK_SIZE);
            }
        }
        let [own, in_block] = &holders;
        let block = match attributes.block(in_block, self.seed) {
            Some(block) => Some(self.share(&block, in_block)?),
            None => None,
        };
        self.refer(own);
        Ok(Attached {
            in_inode: attributes.in_inode(own, self.seed),
            block,
            blocks: u64::from(block.is_some()) + value_blocks,
        })
    }

    /// Counts one more attribute for each of these values.
    fn refer(&mut self, holders: &[u32]) {
        for holder in holders {
            *self.shared.value_counts.entry(*holder).or_default() += 1;
        }
    }

    /// The block that holds these attributes: one that another new file has too, or a new one.
    fn share(&mut self, block: &[u8; BLOCK_LEN], holders: &[u32]) -> Result<u64> {
        if let Some(number) = self.shared.blocks.get(&block[..])
            && let Some((_, count)) = self.shared.counts.get_mut(number)
            && *count < MAX_REFERENCES
        {
            *count += 1;
            return Ok(*number);
        }
        let number = self.take_block()?;
        let bytes: Box<[u8]> = block[..].into();
        self.shared.blocks.insert(bytes.clone(), number);
        self.shared.counts.insert(number, (bytes, 1));
        // What shares a block shares its attributes.
        self.refer(holders);
        Ok(number)
    }

    fn take_block(&mut self) -> Result<u64> {
        let taken = self.space.take_blocks(1)?;
        let block = taken.first().map(|range| range.start);
        block.ok_or_else(|| Error::internal("a block that was taken is none"))
    }

    /// The inode that holds a value.
    fn holder(&mut self, value: &[u8]) -> Result<u32> {
        if let Some(number) = self.shared.values.get(value) {
            return Ok(*number);
        }
        let number = self.space.take_inode(false)?;
        self.shared.values.insert(value.into(), number);
        Ok(number)
    }

    /// Writes the blocks of attributes, and values with their inodes.
    pub(super) fn write_shared(&mut self) -> Result<()> {
        let shared = std::mem::take(&mut self.shared);
        for (number, (bytes, count)) in shared.counts {
            let mut block = bytes;
            set_references(&mut block, number, count, self.seed);
            self.sink.put(number, &block)?;
        }
        let mut values: Vec<_> = shared.values.into_iter().collect();
        values.sort_unstable_by_key(|(_, number)| *number);
        for (value, number) in values {
            let count = shared.value_counts.get(&number).copied().unwrap_or(0);
            self.put_value(number, &value, count)?;
        }
        Ok(())
    }

    fn put_value(&mut self, number: u32, value: &[u8], count: u64) -> Result<()> {
        let mut padded = value.to_vec();
        padded.resize(value.len().next_multiple_of(BLOCK_LEN), 0);
        let placed = self.place(&padded, file::fresh_seed(self.seed, number))?;
        let raw = file::value_inode(self.seed, self.time, number, value, count, &placed);
        self.inodes.insert(number, raw);
        Ok(())
    }
}
