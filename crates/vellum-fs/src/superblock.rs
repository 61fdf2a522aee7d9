//! An ext4 superblock as far as the driver must know it without mounting.
//!
//! Source: the kernel's Documentation/filesystems/ext4 (super.rst, ifork.rst). Little-endian.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::fields::Fields;
use vellum_base::block::{BLOCK_SIZE, BlockDevice};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

const MAGIC: u16 = 0xEF53;
const EXTENT_MAGIC: u16 = 0xF30A;
const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const RO_COMPAT_BIGALLOC: u32 = 0x200;
/// `s_jnl_blocks` holds a copy of the journal inode's block map.
const JOURNAL_BACKUP_BLOCKS: u8 = 1;

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Bytes in a block of the file system.
    pub block_size: u64,
    /// Size of the file system in bytes.
    pub size: u64,
    /// Inodes in use, as of when it was unmounted.
    pub inodes_used: u64,
    /// Space is kept in clusters of several blocks (`bigalloc`).
    pub bigalloc: bool,
    /// Unmounted in order: nothing to replay, no errors noted.
    pub clean: bool,
    /// Its journal wants replaying, and that is all that keeps it from being clean.
    pub wants_replay: bool,
    /// Its UUID.
    pub uuid: uuid::Uuid,
    /// Where the journal's blocks lie, in bytes, without the journal's own superblock. While the
    /// file system is [clean](Superblock::clean) their content means nothing: a layer need not
    /// keep it. Empty without a journal, and where its place is not known.
    pub journal: Vec<Range<u64>>,
}

impl Superblock {
    /// Where it lies on a device, in bytes.
    pub const AT: u64 = 1024;
    /// Its bytes.
    pub const LEN: usize = 1024;

    /// Reads the superblock of an ext4 on `device`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where there is no ext4, [`ErrorKind::Corrupt`] where it
    /// contradicts itself.
    pub fn read(device: &dyn BlockDevice) -> Result<Superblock> {
        let mut bytes = [0; Superblock::LEN];
        device
            .read_at(&mut bytes, Superblock::AT)
            .context(|| "the ext4 superblock cannot be read")?;
        Superblock::parse(&bytes)
    }

    /// Reads the superblock of an ext4 on the device or in the file at `path`.
    ///
    /// # Errors
    /// As [`Superblock::read`]; where it cannot be read.
    pub fn of_file(path: &Path) -> Result<Superblock> {
        let mut bytes = [0; Superblock::LEN];
        File::open(path)
            .and_then(|file| file.read_exact_at(&mut bytes, Superblock::AT))
            .context(|| format!("cannot read {}", path.display()))?;
        Superblock::parse(&bytes)
    }

    /// Parses the 1024 bytes of a superblock.
    ///
    /// # Errors
    /// As [`Superblock::read`].
    pub fn parse(bytes: &[u8]) -> Result<Superblock> {
        let fields = Fields(bytes);
        let cut = || corrupt("it is cut");
        if fields.u16(0x38).ok_or_else(cut)? != MAGIC {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "there is no ext4 file system on the device",
            ));
        }
        let shift = fields.u32(0x18).ok_or_else(cut)?;
        if shift > 6 {
            return Err(corrupt("its block size is out of range"));
        }
        let block_size = 1024u64 << shift;
        let compat = fields.u32(0x5C).ok_or_else(cut)?;
        let incompat = fields.u32(0x60).ok_or_else(cut)?;
        let ro_compat = fields.u32(0x64).ok_or_else(cut)?;
        let state = fields.u16(0x3A).ok_or_else(cut)?;
        let mut blocks = u64::from(fields.u32(0x04).ok_or_else(cut)?);
        if incompat & INCOMPAT_64BIT != 0 {
            blocks |= u64::from(fields.u32(0x150).ok_or_else(cut)?) << 32;
        }
        let size = blocks
            .checked_mul(block_size)
            .ok_or_else(|| corrupt("its size is out of range"))?;
        let uuid = bytes.get(0x68..0x78).ok_or_else(cut)?;
        let journal = if compat & COMPAT_HAS_JOURNAL == 0 {
            Vec::new()
        } else {
            journal_ranges(&fields, block_size, size)?
        };
        let inodes = fields.u32(0x00).ok_or_else(cut)?;
        let inodes_free = fields.u32(0x10).ok_or_else(cut)?;
        let inodes_used = inodes
            .checked_sub(inodes_free)
            .ok_or_else(|| corrupt("it has more free inodes than inodes"))?;
        let sound = state & (STATE_VALID | STATE_ERRORS) == STATE_VALID;
        let recover = incompat & INCOMPAT_RECOVER != 0;
        Ok(Superblock {
            block_size,
            size,
            inodes_used: u64::from(inodes_used),
            bigalloc: ro_compat & RO_COMPAT_BIGALLOC != 0,
            clean: sound && !recover,
            wants_replay: sound && recover,
            uuid: uuid::Uuid::from_slice(uuid)
                .map_err(|error| Error::with_source(ErrorKind::Corrupt, "its UUID", error))?,
            journal,
        })
    }

    /// Whether the file system takes a device of `size` bytes as far as whole blocks of its own, and
    /// of ours, go.
    pub fn fills(&self, size: u64) -> bool {
        size.saturating_sub(self.size) < self.block_size.max(BLOCK_SIZE)
    }

    /// Why the file system cannot be made larger, if it cannot.
    pub fn fixed(&self) -> Option<&'static str> {
        self.bigalloc.then_some(
            "its space is kept in clusters (the feature bigalloc), which resize2fs does not grow \
             without damage",
        )
    }
}

/// The journal's blocks but the first, from the copy of its inode's map in the superblock.
fn journal_ranges(fields: &Fields<'_>, block_size: u64, size: u64) -> Result<Vec<Range<u64>>> {
    const MAP: usize = 0x10C;
    // Without a copy of its map in the superblock, or with one of another form, as ext3 has.
    if fields.u8(0xFD) != Some(JOURNAL_BACKUP_BLOCKS)
        || fields.u16(MAP) != Some(EXTENT_MAGIC)
        || fields.u16(MAP + 6) != Some(0)
    {
        return Ok(Vec::new());
    }
    // A map of 60 bytes holds at most four extents beside its header.
    let cut = || corrupt("the journal's map is cut");
    let entries = usize::from(fields.u16(MAP + 2).ok_or_else(cut)?).min(4);
    let mut ranges = Vec::new();
    for entry in 0..entries {
        let at = MAP + 12 + entry * 12;
        let (Some(logical), Some(len), Some(high), Some(low)) = (
            fields.u32(at),
            fields.u16(at + 4),
            fields.u16(at + 6),
            fields.u32(at + 8),
        ) else {
            return Err(cut());
        };
        let mut start = (u64::from(high) << 32 | u64::from(low)) * block_size;
        let end = start.saturating_add(u64::from(len) * block_size);
        if end > size {
            return Err(corrupt("the journal lies beyond the end"));
        }
        if logical == 0 {
            // The journal's superblock stays: without it nothing mounts.
            start += block_size;
        }
        if start < end {
            ranges.push(start..end);
        }
    }
    Ok(ranges)
}

fn corrupt(what: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("the ext4 superblock makes no sense: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zeros_are_no_ext4_and_a_cut_superblock_is_refused() {
        assert_eq!(
            Superblock::parse(&[0; 1024]).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(
            Superblock::parse(&[0; 20]).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn more_free_inodes_than_inodes_are_damage_and_no_empty_file_system() {
        let mut bytes = [0; 1024];
        bytes[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[0x00..0x04].copy_from_slice(&16u32.to_le_bytes());
        bytes[0x10..0x14].copy_from_slice(&5u32.to_le_bytes());
        assert_eq!(Superblock::parse(&bytes).unwrap().inodes_used, 11);
        bytes[0x10..0x14].copy_from_slice(&17u32.to_le_bytes());
        let error = Superblock::parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("inodes"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..1024),
            marked: bool,
        ) {
            if marked && bytes.len() > 0x10E {
                bytes[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[0xFD] = JOURNAL_BACKUP_BLOCKS;
                bytes[0x10C..0x10E].copy_from_slice(&EXTENT_MAGIC.to_le_bytes());
            }
            if let Ok(superblock) = Superblock::parse(&bytes) {
                for range in superblock.journal {
                    prop_assert!(range.start < range.end && range.end <= superblock.size);
                }
            }
        }
    }
}
