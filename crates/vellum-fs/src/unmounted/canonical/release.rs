//! Frees what the older state has and the newer has not, before anything new gets a place.

use std::collections::BTreeMap;

use super::super::corrupt;
use super::super::inode::Inode;
use super::attributes::{references, set_references};
use super::changes::Changes;
use super::form::INODE;
use super::{Laying, file};
use vellum_base::error::Result;

/// How many of the references to what several files share are gone.
#[derive(Default)]
struct Dropped {
    /// By the number of a block of attributes.
    blocks: BTreeMap<u64, u32>,
    /// By the inode of a value.
    values: BTreeMap<u32, u64>,
}

impl Laying<'_> {
    /// Frees what the older state has and the newer has not.
    pub(super) fn release(&mut self, changes: &Changes) -> Result<()> {
        let mut dropped = Dropped::default();
        for (number, inode) in &changes.gone {
            self.release_blocks(inode)?;
            self.drop_attributes(inode, &mut dropped)?;
            self.space.free_inode(*number, inode.is_directory())?;
            self.inodes.insert(*number, vec![0; INODE]);
        }
        for kept in changes.kept.values() {
            if !kept.same_content {
                self.release_blocks(&kept.old)?;
            }
            if !kept.same_attributes {
                self.drop_attributes(&kept.old, &mut dropped)?;
            }
        }
        self.release_shared(dropped)
    }

    fn release_blocks(&mut self, inode: &Inode) -> Result<()> {
        let blocks = self.older.blocks_of(inode)?;
        for extent in blocks.content {
            let range = extent.physical..extent.physical + extent.len;
            self.space.free_blocks(range)?;
        }
        for block in blocks.tree {
            self.space.free_blocks(block..block + 1)?;
        }
        Ok(())
    }

    fn drop_attributes(&mut self, inode: &Inode, dropped: &mut Dropped) -> Result<()> {
        for holder in self.older.holders(inode, false)? {
            *dropped.values.entry(holder).or_default() += 1;
        }
        let Some(block) = inode.xattr_block() else {
            return Ok(());
        };
        let count = dropped.blocks.entry(block).or_default();
        *count += 1;
        // With the last file goes the block, and what its attributes refer to.
        if *count == references(&self.older.blocks(block, 1)?) {
            for holder in self.older.holders(inode, true)? {
                *dropped.values.entry(holder).or_default() += 1;
            }
        }
        Ok(())
    }

    fn release_shared(&mut self, dropped: Dropped) -> Result<()> {
        for (number, count) in dropped.blocks {
            let mut block = self.older.blocks(number, 1)?;
            let left = references(&block).checked_sub(count);
            match left.ok_or_else(|| corrupt("more files share their attributes than do"))? {
                0 => self.space.free_blocks(number..number + 1)?,
                left => {
                    set_references(&mut block, number, left, self.seed);
                    self.sink.put(number, &block)?;
                }
            }
        }
        for (number, count) in dropped.values {
            let value = self.older.inode(number)?.filter(Inode::is_value);
            let value = value.ok_or_else(|| corrupt("the inode of a value is none"))?;
            let left = file::value_references(&value).checked_sub(count);
            let raw = match left.ok_or_else(|| corrupt("more attributes share a value than do"))? {
                0 => {
                    self.release_blocks(&value)?;
                    self.space.free_inode(number, false)?;
                    vec![0; INODE]
                }
                left => file::with_value_references(self.seed, &value, left),
            };
            self.inodes.insert(number, raw);
        }
        Ok(())
    }
}
