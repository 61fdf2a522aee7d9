//! Inodes: where they lie and what they say.

use std::collections::HashSet;

use super::checksum::{crc, crc_but};
use super::{FileSystem, corrupt, unknown};
use crate::fields::{u16_at, u32_at};
use vellum_base::block::{in_memory, part};
use vellum_base::error::Result;

/// Bytes of an inode of the first ext2, and of what every later one has in front.
pub(super) const OLD_SIZE: usize = 128;

mod at {
    pub const ATIME: usize = 0x08;
    pub const CTIME: usize = 0x0C;
    pub const MTIME: usize = 0x10;
    pub const DELETED: usize = 0x14;
    pub const LINKS: usize = 0x1A;
    pub const FLAGS: usize = 0x20;
    pub const BLOCK: usize = 0x28;
    pub const GENERATION: usize = 0x64;
    pub const CHECKSUM_LOW: usize = 0x7C;
    pub const EXTRA_SIZE: usize = 0x80;
    pub const CHECKSUM_HIGH: usize = 0x82;
    pub const CTIME_EXTRA: usize = 0x84;
    pub const MTIME_EXTRA: usize = 0x88;
    pub const ATIME_EXTRA: usize = 0x8C;
}

mod flag {
    pub const ENCRYPTED: u32 = 0x800;
    pub const EXTENTS: u32 = 0x8_0000;
    pub const VERITY: u32 = 0x10_0000;
    pub const EA_INODE: u32 = 0x20_0000;
    pub const INLINE_DATA: u32 = 0x1000_0000;
}

/// Seconds since 1970 and nanoseconds, as stat(2) has them.
pub type Timestamp = (i64, i64);

/// An inode that is in use.
#[derive(Debug, Clone)]
pub struct Inode {
    number: u32,
    /// [`OLD_SIZE`] bytes at least.
    raw: Box<[u8]>,
    /// With what the checksums of its blocks begin.
    seed: Option<u32>,
}

/// The bytes of an inode's map, and of a short link's target.
pub(super) const MAP_LEN: usize = 60;

impl Inode {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its bytes.
    pub(super) fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Type and permissions, as stat(2) has them.
    pub fn mode(&self) -> u32 {
        u16_at(&self.raw, 0).into()
    }

    fn file_type(&self) -> u32 {
        self.mode() & libc::S_IFMT
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.file_type() == libc::S_IFREG
    }

    /// Owner and group.
    pub fn owner(&self) -> (u32, u32) {
        let half = |at| u32::from(u16_at(&self.raw, at));
        (half(0x02) | half(0x78) << 16, half(0x18) | half(0x7A) << 16)
    }

    /// Its names, and `..` of directories below.
    pub fn links(&self) -> u32 {
        u16_at(&self.raw, at::LINKS).into()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        let low = u64::from(u32_at(&self.raw, 0x04));
        // What is there of others means something else.
        if self.is_file() || self.is_directory() {
            low | u64::from(u32_at(&self.raw, 0x6C)) << 32
        } else {
            low
        }
    }

    /// The number of the device that a device node stands for, as stat(2) has it; 0 of others.
    pub fn device(&self) -> u64 {
        if !matches!(self.file_type(), libc::S_IFCHR | libc::S_IFBLK) {
            return 0;
        }
        let (old, new) = (
            u32_at(&self.raw, at::BLOCK),
            u32_at(&self.raw, at::BLOCK + 4),
        );
        let (major, minor) = if old != 0 {
            (old >> 8 & 0xFF, old & 0xFF)
        } else {
            (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xF_FF00)
        };
        libc::makedev(major, minor)
    }

    /// When its content changed last.
    pub fn mtime(&self) -> Timestamp {
        self.time(at::MTIME, at::MTIME_EXTRA)
    }

    /// When anything of it changed last.
    pub fn ctime(&self) -> Timestamp {
        self.time(at::CTIME, at::CTIME_EXTRA)
    }

    fn time(&self, at: usize, extra_at: usize) -> Timestamp {
        let seconds = i64::from(u32_at(&self.raw, at).cast_signed());
        if !has(&self.raw, extra_at + 4) {
            return (seconds, 0);
        }
        let extra = u32_at(&self.raw, extra_at);
        let nanoseconds = i64::from(extra >> 2);
        (seconds + (i64::from(extra & 3) << 32), nanoseconds)
    }

    fn flags(&self) -> u32 {
        u32_at(&self.raw, at::FLAGS)
    }

    /// Whether the bytes of an inode say that it is a directory.
    pub(super) fn is_used_directory(raw: &[u8]) -> bool {
        in_use(raw) && u32::from(u16_at(raw, 0)) & libc::S_IFMT == libc::S_IFDIR
    }

    /// It holds the value of an extended attribute, and has no name.
    pub(super) fn is_value(&self) -> bool {
        self.flags() & flag::EA_INODE != 0
    }

    /// Its map of extents; `None` of one that has no blocks for its content.
    pub(super) fn map(&self) -> Result<Option<&[u8]>> {
        let flags = self.flags();
        if flags & (flag::ENCRYPTED | flag::VERITY | flag::INLINE_DATA) != 0 {
            return Err(unknown(format!(
                "inode {} has the flags {flags:#x}",
                self.number
            )));
        }
        let is_link = self.file_type() == libc::S_IFLNK;
        if !is_link && !self.is_file() && !self.is_directory() {
            return Ok(None);
        }
        let map = part(&self.raw, at::BLOCK, MAP_LEN);
        if flags & flag::EXTENTS != 0 {
            return Ok(Some(map));
        }
        if is_link && self.size() < MAP_LEN as u64 {
            return Ok(None);
        }
        if self.size() == 0 && map.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        Err(unknown(format!("inode {} has no extents", self.number)))
    }

    /// The target of a link that is short enough to lie in the inode.
    pub(super) fn short_target(&self) -> Option<&[u8]> {
        let is_short = self.flags() & flag::EXTENTS == 0 && self.size() < MAP_LEN as u64;
        is_short.then(|| part(&self.raw, at::BLOCK, in_memory(self.size())))
    }

    /// The extended attributes in the inode itself, from their magic on.
    pub(super) fn own_xattrs(&self) -> Result<&[u8]> {
        if self.raw.len() == OLD_SIZE {
            return Ok(&[]);
        }
        let extra = usize::from(u16_at(&self.raw, at::EXTRA_SIZE));
        self.raw.get(OLD_SIZE + extra..).ok_or_else(|| {
            corrupt(format!(
                "inode {} says that it is larger than it is",
                self.number
            ))
        })
    }

    /// The block of its other extended attributes.
    pub(super) fn xattr_block(&self) -> Option<u64> {
        let low = u64::from(u32_at(&self.raw, 0x68));
        let block = low | u64::from(u16_at(&self.raw, 0x76)) << 32;
        (block != 0).then_some(block)
    }

    /// With what the checksums of its blocks begin; `None` without checksums.
    pub(super) fn seed(&self) -> Option<u32> {
        self.seed
    }
}

/// Whether an inode has a field that ends at `end`.
fn has(raw: &[u8], end: usize) -> bool {
    raw.len() > OLD_SIZE
        && end <= raw.len()
        && end <= OLD_SIZE + usize::from(u16_at(raw, at::EXTRA_SIZE))
}

/// Whether the bytes of an inode say that it is in use.
fn in_use(raw: &[u8]) -> bool {
    u16_at(raw, 0) != 0 && u16_at(raw, at::LINKS) != 0
}

/// Whether two states of an inode differ in more than when it was read last and their checksums.
pub(super) fn differ(older: &[u8], newer: &[u8]) -> bool {
    older != newer && significant(older) != significant(newer)
}

fn significant(raw: &[u8]) -> Vec<u8> {
    let mut bytes = raw.to_vec();
    let mut blank = |at: usize, len: usize| {
        if let Some(field) = bytes.get_mut(at..at + len) {
            field.fill(0);
        }
    };
    blank(at::ATIME, 4);
    blank(at::CHECKSUM_LOW, 2);
    if has(raw, at::CHECKSUM_HIGH + 2) {
        blank(at::CHECKSUM_HIGH, 2);
    }
    if has(raw, at::ATIME_EXTRA + 4) {
        blank(at::ATIME_EXTRA, 4);
    }
    bytes
}

impl FileSystem<'_> {
    /// The inode of this number; `None` of one that is not in use.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Corrupt`] for a number that there is not, and where it does not match
    /// its checksum; as [`super::Source::fill`].
    pub fn inode(&self, number: u32) -> Result<Option<Inode>> {
        match self.raw_inode(number)? {
            Some(raw) => self.parse_inode(number, &raw),
            None => Ok(None),
        }
    }

    /// The bytes of an inode; `None` of one that was never in use.
    fn raw_inode(&self, number: u32) -> Result<Option<Vec<u8>>> {
        if number == 0 || number > self.layout.inodes {
            return Err(corrupt(format!("it has no inode {number}")));
        }
        let per_group = self.layout.inodes_per_group;
        let (group, slot) = ((number - 1) / per_group, (number - 1) % per_group);
        let group = self.group(group as usize)?;
        if slot >= group.inodes_used {
            return Ok(None);
        }
        let offset = u64::from(slot) * self.layout.inode_size as u64;
        let block = self.blocks(group.inode_table + offset / self.block_size(), 1)?;
        let within = in_memory(offset % self.block_size());
        Ok(Some(part(&block, within, self.layout.inode_size).to_vec()))
    }

    /// Makes sure that a mount would have nothing to do after the replay of the journal but to delete
    /// files that have no name any more.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Unsupported`] where it would finish cutting a file, and give it another
    /// time.
    pub(super) fn check_orphans(&self) -> Result<()> {
        if self.layout.more_orphans {
            return Err(unknown("files are to be deleted"));
        }
        let mut seen = HashSet::new();
        let mut next = self.layout.orphan;
        while next != 0 {
            if !seen.insert(next) {
                return Err(corrupt("the list of files to be deleted is a circle"));
            }
            let raw = self.raw_inode(next)?;
            let raw = raw.ok_or_else(|| corrupt("a file to be deleted was never there"))?;
            if in_use(&raw) {
                return Err(unknown("a file is to be cut"));
            }
            // The time of its deletion is where the list goes on.
            next = u32_at(&raw, at::DELETED);
        }
        Ok(())
    }

    /// As [`FileSystem::inode`], from the inode's bytes.
    pub(super) fn parse_inode(&self, number: u32, raw: &[u8]) -> Result<Option<Inode>> {
        if !in_use(raw) {
            return Ok(None);
        }
        let seed = self.layout.seed.map(|seed| {
            let seed = crc(seed, &number.to_le_bytes());
            crc(seed, part(raw, at::GENERATION, 4))
        });
        if seed.is_some_and(|seed| !matches_sum(seed, raw)) {
            return Err(corrupt(format!(
                "inode {number} does not match its checksum"
            )));
        }
        Ok(Some(Inode {
            number,
            raw: raw.into(),
            seed,
        }))
    }
}

fn matches_sum(seed: u32, raw: &[u8]) -> bool {
    let (old, rest) = raw.split_at(OLD_SIZE);
    let sum = crc_but(seed, old, at::CHECKSUM_LOW, 2);
    let low = u16_at(raw, at::CHECKSUM_LOW);
    if has(raw, at::CHECKSUM_HIGH + 2) {
        let sum = crc_but(sum, rest, at::CHECKSUM_HIGH - OLD_SIZE, 2);
        return sum == u32::from(low) | u32::from(u16_at(raw, at::CHECKSUM_HIGH)) << 16;
    }
    crc(sum, rest) as u16 == low
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An inode of 256 bytes, of which `extra` beyond the old ones are fields.
    fn inode(mode: u32, extra: u16, fields: &[(usize, u32)]) -> Inode {
        let mut raw = vec![0; 256];
        raw[..2].copy_from_slice(&(mode as u16).to_le_bytes());
        raw[at::LINKS] = 1;
        raw[at::EXTRA_SIZE..][..2].copy_from_slice(&extra.to_le_bytes());
        for (at, value) in fields {
            raw[*at..][..4].copy_from_slice(&value.to_le_bytes());
        }
        Inode {
            number: 12,
            raw: raw.into(),
            seed: None,
        }
    }

    #[test]
    fn access_times_and_checksums_make_no_difference_where_they_are() {
        let with = |extra, at| inode(libc::S_IFREG, extra, &[(at, 0xABCD_0000)]).raw;
        for at in [at::ATIME, at::ATIME_EXTRA, at::CHECKSUM_HIGH - 2] {
            // The last one's lower half is the size of the fields, which stays.
            assert!(!differ(&with(32, 0xF0)[..], &with(32, 0xF0)[..]));
            let (mut one, other) = (with(32, 0xF0), with(32, 0xF0));
            one[at + 2] ^= 0x55;
            assert!(!differ(&one, &other), "{at:#x}");
        }
        for at in [at::MTIME, at::CTIME_EXTRA, at::FLAGS, at::GENERATION] {
            assert!(differ(&with(32, at), &with(32, 0xF0)), "{at:#x}");
        }
        // Without that field an extended attribute lies there.
        let (mut one, other) = (with(8, 0xF0), with(8, 0xF0));
        one[at::ATIME_EXTRA] = 1;
        assert!(differ(&one, &other));
    }

    #[test]
    fn times_reach_from_1901_to_2446_with_nanoseconds_where_there_is_room() {
        let time = |extra, seconds: i32, more: u32| {
            let fields = [
                (at::MTIME, seconds.cast_unsigned()),
                (at::MTIME_EXTRA, more),
            ];
            inode(libc::S_IFREG, extra, &fields).mtime()
        };
        assert_eq!(time(32, -5, 7 << 2), (-5, 7));
        assert_eq!(time(32, -5, 7 << 2 | 1), ((1 << 32) - 5, 7));
        assert_eq!(time(32, i32::MAX, 3), (i64::from(i32::MAX) + (3 << 32), 0));
        assert_eq!(time(4, 5, 7 << 2), (5, 0), "no field there");
    }

    #[test]
    fn device_numbers_are_those_of_stat_in_both_forms() {
        let device =
            |old, new| inode(libc::S_IFBLK, 32, &[(at::BLOCK, old), (at::BLOCK + 4, new)]).device();
        assert_eq!(device(0x0103, 0), libc::makedev(1, 3));
        // 300:70000 as the kernel writes it.
        let new = 70_000 & 0xFF | 300 << 8 | (70_000 & !0xFF) << 12;
        assert_eq!(device(0, new), libc::makedev(300, 70_000));
        assert_eq!(inode(libc::S_IFREG, 32, &[(at::BLOCK, 0x0103)]).device(), 0);
    }

    #[test]
    fn what_is_kept_in_another_way_is_refused() {
        let map = |mode, flags| {
            inode(mode, 32, &[(at::FLAGS, flags), (0x04, 100)])
                .map()
                .map(|map| map.is_some())
        };
        assert!(map(libc::S_IFREG, flag::EXTENTS).unwrap());
        assert!(!map(libc::S_IFIFO, 0).unwrap());
        for flags in [
            0,
            flag::EXTENTS | flag::INLINE_DATA,
            flag::EXTENTS | flag::ENCRYPTED,
        ] {
            let error = map(libc::S_IFREG, flags).unwrap_err();
            assert_eq!(error.kind(), vellum_base::ErrorKind::Unsupported);
        }
    }
}
