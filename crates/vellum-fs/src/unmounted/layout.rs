//! Superblock and group descriptors: where everything else is.

use super::checksum::{crc, crc_but};
use super::{Source, corrupt, unknown};
use crate::fields::{Fields, u16_at, u32_at};
use crate::superblock::Superblock;
use vellum_base::error::{Result, ResultExt};

const SUPERBLOCK_AT: u64 = 1024;
pub(super) const SUPERBLOCK_LEN: usize = 1024;

/// Block groups that are looked at: 128 TiB in blocks of 4 KiB.
const MAX_GROUPS: u64 = 1 << 20;

mod incompat {
    pub const FILETYPE: u32 = 0x2;
    pub const META_BG: u32 = 0x10;
    pub const EXTENTS: u32 = 0x40;
    pub const BITS_64: u32 = 0x80;
    pub const FLEX_BG: u32 = 0x200;
    pub const EA_INODE: u32 = 0x400;
    pub const CSUM_SEED: u32 = 0x2000;
    pub const LARGEDIR: u32 = 0x4000;
    /// The journal wants replaying.
    pub const RECOVER: u32 = 0x4;
    /// With these a file system can be read here.
    pub const KNOWN: u32 = FILETYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BITS_64
        | FLEX_BG
        | EA_INODE
        | CSUM_SEED
        | LARGEDIR;
}

mod ro_compat {
    pub const SPARSE_SUPER: u32 = 0x1;
    pub const GDT_CSUM: u32 = 0x10;
    pub const METADATA_CSUM: u32 = 0x400;
    const LARGE_FILE: u32 = 0x2;
    const HUGE_FILE: u32 = 0x8;
    const DIR_NLINK: u32 = 0x20;
    const EXTRA_ISIZE: u32 = 0x40;
    const QUOTA: u32 = 0x100;
    const READONLY: u32 = 0x1000;
    const PROJECT: u32 = 0x2000;
    pub const ORPHAN_PRESENT: u32 = 0x1_0000;
    /// With these a file system can be read here.
    pub const KNOWN: u32 = SPARSE_SUPER
        | LARGE_FILE
        | HUGE_FILE
        | GDT_CSUM
        | DIR_NLINK
        | EXTRA_ISIZE
        | QUOTA
        | METADATA_CSUM
        | READONLY
        | PROJECT
        | ORPHAN_PRESENT;
}

mod compat {
    pub const HAS_JOURNAL: u32 = 0x4;
    pub const SPARSE_SUPER2: u32 = 0x200;
    pub const ORPHAN_FILE: u32 = 0x1000;
}

/// The inode table of the group was never written.
const INODES_UNUSED: u16 = 1;
/// The block bitmap of the group was never written: all its blocks but the file system's own are free.
const BLOCKS_UNUSED: u16 = 2;

/// What the superblock says of where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub uuid: uuid::Uuid,
    /// Bytes in a block.
    pub block_size: u64,
    pub blocks: u64,
    /// The first block of the first group.
    pub first_block: u64,
    pub blocks_per_group: u64,
    pub inodes: u32,
    pub inodes_per_group: u32,
    /// Bytes of an inode: 128 at least.
    pub inode_size: usize,
    /// The first inode that is not reserved.
    pub first_inode: u32,
    /// The journal's inode.
    pub journal: Option<u32>,
    /// The first of the inodes that a mount has to finish deleting or cutting; 0 where there is none.
    pub orphan: u32,
    /// There may be more of them, in a file.
    pub more_orphans: bool,
    /// Inodes that are in use and need not have a name.
    pub nameless: [u32; 2],
    /// With what checksums of metadata begin; `None` where there are none.
    pub seed: Option<u32>,
    /// Directory entries say what type their inodes are: a name has at most 255 bytes either way.
    pub typed_entries: bool,
    /// Blocks from the start on that hold the superblock and group descriptors.
    pub descriptors: Vec<u64>,
}

/// The checksum of a bitmap, of which short descriptors have the lower half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BitmapSum {
    Whole(u32),
    Half(u16),
}

/// Where a group has its things. Block numbers, which lie within the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    pub block_bitmap: u64,
    pub inode_bitmap: u64,
    pub inode_table: u64,
    /// Inodes from the start of the table that may be in use.
    pub inodes_used: u32,
    /// The block bitmap says something.
    pub has_bitmap: bool,
    /// The checksum of the block bitmap.
    pub bitmap_sum: BitmapSum,
}

impl Layout {
    pub fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(self.blocks_per_group)
    }

    /// Blocks of the inode table of a group.
    pub fn table_blocks(&self) -> u64 {
        (u64::from(self.inodes_per_group) * self.inode_size as u64).div_ceil(self.block_size)
    }

    /// Whether `newer` is a later state of the same file system, which may have grown.
    pub fn leads_to(&self, newer: &Layout) -> bool {
        let alike = Layout {
            blocks: newer.blocks,
            inodes: newer.inodes,
            journal: newer.journal,
            orphan: newer.orphan,
            more_orphans: newer.more_orphans,
            nameless: newer.nameless,
            descriptors: newer.descriptors.clone(),
            ..self.clone()
        };
        alike == *newer && self.blocks <= newer.blocks && self.inodes <= newer.inodes
    }
}

/// The superblock, and what it says beside the layout.
pub(super) fn superblock(source: &dyn Source) -> Result<([u8; SUPERBLOCK_LEN], Superblock)> {
    let mut bytes = [0; SUPERBLOCK_LEN];
    source
        .fill(&mut bytes, SUPERBLOCK_AT)
        .context(|| "the ext4 superblock cannot be read")?;
    let superblock = Superblock::parse(&bytes)?;
    Ok((bytes, superblock))
}

/// Reads superblock and group descriptors. The journal has been replayed, or does not matter, where that is
/// `replayed`.
pub(super) fn read(source: &dyn Source, replayed: bool) -> Result<(Layout, Vec<Group>)> {
    let (bytes, superblock) = superblock(source)?;
    let readable = superblock.clean || replayed && superblock.wants_replay;
    if !readable {
        return Err(unknown("it was not unmounted in order"));
    }
    if superblock.size > source.bytes() {
        return Err(corrupt("it is larger than its device"));
    }
    let mut layout = parse(&bytes, &superblock)?;
    let groups = read_groups(source, &bytes, &mut layout)?;
    Ok((layout, groups))
}

/// Parses the 1024 bytes of a superblock.
fn parse(bytes: &[u8; SUPERBLOCK_LEN], known: &Superblock) -> Result<Layout> {
    let (features, read_only) = (u32_at(bytes, 0x60), u32_at(bytes, 0x64));
    let strange = (features & !incompat::KNOWN, read_only & !ro_compat::KNOWN);
    if strange != (0, 0) {
        return Err(unknown(format!(
            "its features (incompat {:#x}, ro_compat {:#x})",
            strange.0, strange.1
        )));
    }
    if u32_at(bytes, 0x4C) == 0 {
        return Err(unknown("its revision is 0"));
    }
    let block_size = known.block_size;
    if block_size > 4096 {
        return Err(unknown("its blocks are larger than 4096 bytes"));
    }
    let seed = checksum_seed(bytes, known, read_only, features)?;
    let compatible = u32_at(bytes, 0x5C);
    let journal = compatible & compat::HAS_JOURNAL != 0;
    let orphans = compatible & compat::ORPHAN_FILE != 0;
    let layout = Layout {
        uuid: known.uuid,
        block_size,
        blocks: known.size / block_size,
        first_block: u32_at(bytes, 0x14).into(),
        blocks_per_group: u32_at(bytes, 0x20).into(),
        inodes: u32_at(bytes, 0x00),
        inodes_per_group: u32_at(bytes, 0x28),
        inode_size: u16_at(bytes, 0x58).into(),
        first_inode: u32_at(bytes, 0x54),
        journal: journal.then(|| u32_at(bytes, 0xE0)),
        orphan: u32_at(bytes, 0xE8),
        more_orphans: read_only & ro_compat::ORPHAN_PRESENT != 0,
        nameless: [
            u32_at(bytes, 0x26C),
            if orphans { u32_at(bytes, 0x280) } else { 0 },
        ],
        seed,
        typed_entries: features & incompat::FILETYPE != 0,
        descriptors: Vec::new(),
    };
    check(&layout)?;
    Ok(layout)
}

fn checksum_seed(
    bytes: &[u8; SUPERBLOCK_LEN],
    known: &Superblock,
    read_only: u32,
    features: u32,
) -> Result<Option<u32>> {
    if read_only & ro_compat::METADATA_CSUM == 0 {
        return Ok(None);
    }
    const CRC32C: u8 = 1;
    if Fields(bytes).u8(0x175) != Some(CRC32C) {
        return Err(unknown("its checksums are of another kind"));
    }
    if crc(!0, bytes.split_at(0x3FC).0) != u32_at(bytes, 0x3FC) {
        return Err(corrupt("its superblock does not match its checksum"));
    }
    Ok(Some(if features & incompat::CSUM_SEED != 0 {
        u32_at(bytes, 0x270)
    } else {
        crc(!0, known.uuid.as_bytes())
    }))
}

/// What the rest computes with.
fn check(layout: &Layout) -> Result<()> {
    let bits = layout.block_size * 8;
    let size = layout.inode_size as u64;
    let first = u64::from(layout.block_size == 1024);
    if !(1..=bits).contains(&layout.blocks_per_group)
        || !(1..=bits).contains(&u64::from(layout.inodes_per_group))
        || !(128..=layout.block_size).contains(&size)
        || !size.is_power_of_two()
        || layout.first_block != first
        || layout.blocks <= layout.first_block
    {
        return Err(corrupt("the numbers of its superblock do not fit"));
    }
    if layout.first_inode != 11 {
        return Err(unknown("another number of inodes is reserved"));
    }
    let groups = layout.groups();
    if groups > MAX_GROUPS {
        return Err(unknown("it has too many groups"));
    }
    if u64::from(layout.inodes) != groups * u64::from(layout.inodes_per_group) {
        return Err(corrupt("its number of inodes does not fit its groups"));
    }
    Ok(())
}

/// Reads all group descriptors, and notes which blocks hold them.
fn read_groups(
    source: &dyn Source,
    superblock: &[u8; SUPERBLOCK_LEN],
    layout: &mut Layout,
) -> Result<Vec<Group>> {
    let wide = u32_at(superblock, 0x60) & incompat::BITS_64 != 0;
    let size = match (wide, u16_at(superblock, 0xFE)) {
        (false, _) => 32,
        (true, size) if (64..=1024).contains(&size) && size.is_power_of_two() => usize::from(size),
        (true, _) => return Err(corrupt("its group descriptors have another size")),
    };
    let per_block = layout.block_size / size as u64;
    let mut groups = Vec::new();
    layout.descriptors = vec![layout.first_block];
    let mut block = vec![0; layout.block_size as usize];
    for index in 0..layout.groups().div_ceil(per_block) {
        let at = descriptor_block(superblock, layout, per_block, index);
        if at >= layout.blocks {
            return Err(corrupt("its group descriptors lie beyond its end"));
        }
        source
            .fill(&mut block, at * layout.block_size)
            .context(|| "the group descriptors of an ext4 cannot be read")?;
        layout.descriptors.push(at);
        for bytes in block.chunks_exact(size) {
            let number = groups.len() as u64;
            if number == layout.groups() {
                break;
            }
            groups.push(group(bytes, number as u32, superblock, layout)?);
        }
    }
    layout.descriptors.sort_unstable();
    layout.descriptors.dedup();
    Ok(groups)
}

/// Where the block of group descriptors with this number lies.
pub(super) fn descriptor_block(
    superblock: &[u8; SUPERBLOCK_LEN],
    layout: &Layout,
    per_block: u64,
    index: u64,
) -> u64 {
    let meta_bg = u32_at(superblock, 0x60) & incompat::META_BG != 0;
    if !meta_bg || index < u64::from(u32_at(superblock, 0x104)) {
        return layout.first_block + index + 1;
    }
    let group = per_block * index;
    let first = layout.first_block + group * layout.blocks_per_group;
    first + u64::from(has_superblock(superblock, group))
}

/// Whether a group begins with a copy of the superblock.
pub(super) fn has_superblock(superblock: &[u8; SUPERBLOCK_LEN], group: u64) -> bool {
    if group == 0 {
        return true;
    }
    if u32_at(superblock, 0x5C) & compat::SPARSE_SUPER2 != 0 {
        let copies = [u32_at(superblock, 0x24C), u32_at(superblock, 0x250)];
        return copies.iter().any(|copy| u64::from(*copy) == group);
    }
    if group == 1 || u32_at(superblock, 0x64) & ro_compat::SPARSE_SUPER == 0 {
        return true;
    }
    [3, 5, 7].iter().any(|base| {
        let mut power = *base;
        while power < group {
            power *= base;
        }
        power == group
    })
}

/// Parses a group descriptor of 32 bytes or more.
fn group(
    bytes: &[u8],
    number: u32,
    superblock: &[u8; SUPERBLOCK_LEN],
    layout: &Layout,
) -> Result<Group> {
    let summed = u32_at(superblock, 0x64) & (ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM) != 0;
    if let Some(seed) = layout.seed {
        let sum = crc_but(crc(seed, &number.to_le_bytes()), bytes, 0x1E, 2);
        if sum as u16 != u16_at(bytes, 0x1E) {
            return Err(corrupt(format!(
                "the descriptor of group {number} does not match its checksum"
            )));
        }
    }
    let wide = bytes.len() >= 64;
    let number_of = |low: usize, high: usize| {
        let high = if wide { u32_at(bytes, high) } else { 0 };
        u64::from(high) << 32 | u64::from(u32_at(bytes, low))
    };
    let flags = if summed { u16_at(bytes, 0x12) } else { 0 };
    let unused = if flags & INODES_UNUSED != 0 {
        layout.inodes_per_group
    } else if summed {
        let high = if wide { u16_at(bytes, 0x32) } else { 0 };
        u32::from(high) << 16 | u32::from(u16_at(bytes, 0x1C))
    } else {
        0
    };
    let inodes_used = layout
        .inodes_per_group
        .checked_sub(unused)
        .ok_or_else(|| corrupt(format!("group {number} has more unused inodes than inodes")))?;
    let group = Group {
        block_bitmap: number_of(0x00, 0x20),
        inode_bitmap: number_of(0x04, 0x24),
        inode_table: number_of(0x08, 0x28),
        inodes_used,
        has_bitmap: flags & BLOCKS_UNUSED == 0,
        bitmap_sum: match wide {
            true => {
                let high = u32::from(u16_at(bytes, 0x38));
                BitmapSum::Whole(high << 16 | u32::from(u16_at(bytes, 0x18)))
            }
            false => BitmapSum::Half(u16_at(bytes, 0x18)),
        },
    };
    let fits = |start: u64, len: u64| {
        start >= layout.first_block
            && start
                .checked_add(len)
                .is_some_and(|end| end <= layout.blocks)
    };
    if !fits(group.block_bitmap, 1)
        || !fits(group.inode_bitmap, 1)
        || !fits(group.inode_table, layout.table_blocks())
    {
        return Err(corrupt(format!("group {number} lies beyond its end")));
    }
    Ok(group)
}
