//! File systems that can be laid out here: those with exactly the features that the template has.

use super::super::layout::{self, Layout, SUPERBLOCK_LEN, descriptor_block, has_superblock};
use super::super::{FileSystem, unknown};
use super::hash::Hasher;
use crate::fields::{u16_at, u32_at};
use vellum_base::block::{BLOCK_SIZE, part};
use vellum_base::error::Result;

/// has_journal, ext_attr, dir_index
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x20;
/// filetype, meta_bg, extent, 64bit, flex_bg, ea_inode
const INCOMPATIBLE: u32 = 0x2 | 0x10 | 0x40 | 0x80 | 0x200 | 0x400;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum
const READ_ONLY: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// Bytes of an inode.
pub(super) const INODE: usize = 256;
/// Group descriptors in a block.
const PER_BLOCK: u64 = 64;
/// Names are hashed by half MD4.
const HALF_MD4: u8 = 1;
/// Bytes of names count as unsigned numbers in hashes.
const UNSIGNED_HASH: u32 = 0x2;

pub(super) mod at {
    /// The time of the last write.
    pub const WRITTEN: usize = 0x30;
    pub const WRITTEN_HIGH: usize = 0x274;
    pub const HASH_SEED: usize = 0xEC;
    pub const HASH_VERSION: usize = 0xFC;
    pub const DESCRIPTOR_SIZE: usize = 0xFE;
    pub const FIRST_META_GROUP: usize = 0x104;
    pub const FLAGS: usize = 0x160;
    pub const FEATURES: [usize; 3] = [0x5C, 0x60, 0x64];
}

/// What the superblock says beside the layout.
pub(super) struct Form {
    superblock: [u8; SUPERBLOCK_LEN],
}

impl Form {
    /// Of a file system that `newer` is a later state of.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Unsupported`] where one of them has another form.
    pub fn of(older: &FileSystem<'_>, newer: &FileSystem<'_>) -> Result<Form> {
        for files in [older, newer] {
            let (superblock, _) = layout::superblock(files.source)?;
            let features = at::FEATURES.map(|at| u32_at(&superblock, at));
            let layout = &files.layout;
            let fits = features == [COMPATIBLE, INCOMPATIBLE, READ_ONLY]
                && layout.block_size == BLOCK_SIZE
                && layout.inode_size == INODE
                && layout.blocks_per_group == 8 * BLOCK_SIZE
                && layout.inodes_per_group.is_multiple_of(16)
                && layout.orphan == 0
                && u32_at(&superblock, at::FIRST_META_GROUP) == 0
                && u64::from(u16_at(&superblock, at::DESCRIPTOR_SIZE)) * PER_BLOCK == BLOCK_SIZE
                && part(&superblock, at::HASH_VERSION, 1) == [HALF_MD4];
            if !fits {
                return Err(unknown(
                    "it is made in another way than the driver makes them",
                ));
            }
        }
        if older.layout != newer.layout {
            return Err(unknown("it is another file system than before"));
        }
        let (superblock, _) = layout::superblock(older.source)?;
        Ok(Form { superblock })
    }

    /// How names are hashed.
    pub fn hasher(&self) -> Hasher {
        let word = |index: usize| u32_at(&self.superblock, at::HASH_SEED + 4 * index);
        let flags = u32_at(&self.superblock, at::FLAGS);
        Hasher::new([0, 1, 2, 3].map(word), flags & UNSIGNED_HASH == 0)
    }

    /// When it was written last, in seconds since 1970.
    pub fn written(&self) -> u64 {
        let high = part(&self.superblock, at::WRITTEN_HIGH, 1);
        let high = high.first().copied().map_or(0, u64::from);
        high << 32 | u64::from(u32_at(&self.superblock, at::WRITTEN))
    }

    /// The block that holds group descriptors, of which this is the number.
    pub fn descriptor_block(&self, layout: &Layout, index: u64) -> u64 {
        descriptor_block(&self.superblock, layout, PER_BLOCK, index)
    }

    /// How many blocks at the start of a group hold copies of the superblock and of descriptors.
    pub fn blocks_in_front(&self, layout: &Layout, group: u64) -> u64 {
        let within = group % PER_BLOCK;
        let descriptors = matches!(within, 0 | 1) || within == PER_BLOCK - 1;
        let superblock = has_superblock(&self.superblock, group);
        let count = u64::from(superblock) + u64::from(descriptors);
        // The last group may be short.
        count.min(layout.blocks - group * layout.blocks_per_group)
    }
}
