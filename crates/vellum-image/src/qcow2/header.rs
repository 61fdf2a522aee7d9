//! The header of a qcow2, as far as it must be known before others read the image: which files and
//! features it needs. Source: QEMU's docs/interop/qcow2.rst. Big-endian.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{corrupt, cut_off, tables};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a header of version 2, and where the extensions of one begin.
const V2_LEN: u32 = 72;
/// The least that a header of version 3 has.
const V3_LEN: u32 = 104;
/// `header_length` of one that says how it is compressed.
const COMPRESSION_LEN: u32 = 112;
/// Cluster sizes that QEMU knows, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The largest table that QEMU reads, in entries: 32 MiB.
const MAX_L1: u32 = 4 << 20;
const MAX_NAME: u32 = 1023;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;

/// Incompatible features.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Whether a file begins as a qcow2 of version 2 or 3. (Version 1 is the old format qcow.)
pub(super) fn has_magic(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && matches!(head.get(4..8), Some([0, 0, 0, 2 | 3]))
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// The name of the file below, as it stands there.
    pub backing: Option<String>,
    /// The format of that file.
    pub backing_format: Option<String>,
    cluster_bits: u32,
    features: u64,
    l1_offset: u64,
    l1_entries: u32,
}

/// A piece of the first cluster.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let at = usize::try_from(at).ok();
        let bytes = at.and_then(|at| self.0.get(at..)?.first_chunk());
        bytes
            .copied()
            .ok_or_else(|| corrupt("its header is cut off"))
    }

    fn u32(&self, at: u64) -> Result<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: u64) -> Result<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    fn text(&self, at: u64, len: u32, what: &str) -> Result<String> {
        let start = usize::try_from(at).ok();
        let bytes = start.and_then(|at| self.0.get(at..)?.get(..len as usize));
        let bytes = bytes.ok_or_else(|| corrupt(format!("{what} lies outside its header")))?;
        String::from_utf8(bytes.to_vec()).map_err(|error| {
            Error::with_source(ErrorKind::Unsupported, format!("{what} is no UTF-8"), error)
        })
    }
}

impl Header {
    /// Reads the header of `file`, which has `len` bytes.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported`, with what is wrong or not read.
    pub fn read(file: &File, len: u64) -> Result<Header> {
        let most = len.min(1 << CLUSTER_BITS.end()) as usize;
        let mut start = vec![0; most];
        file.read_exact_at(&mut start, 0)
            .context(|| "reading its header")?;
        let fields = Fields(&start);
        if !has_magic(&start) {
            return Err(corrupt("it does not begin as a qcow2 of version 2 or 3"));
        }
        let cluster_bits = fields.u32(20)?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(corrupt(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        // All that a header says stands in the first cluster.
        let (first, _) = start.split_at(most.min(1 << cluster_bits));
        let header = Header::parse(&Fields(first), cluster_bits)?;
        header.check(file, len)?;
        Ok(header)
    }

    fn parse(fields: &Fields<'_>, cluster_bits: u32) -> Result<Header> {
        let version = fields.u32(4)?;
        let (features, header_len) = match version {
            2 => (0, V2_LEN),
            _ => (fields.u64(72)?, fields.u32(100)?),
        };
        if version > 2 && header_len < V3_LEN {
            return Err(corrupt(format!("its header has {header_len} bytes")));
        }
        if features & COMPRESSION_TYPE != 0 && header_len < COMPRESSION_LEN {
            return Err(corrupt("it does not say how it is compressed"));
        }
        let (backing_at, backing_len) = (fields.u64(8)?, fields.u32(16)?);
        if backing_len > MAX_NAME {
            return Err(corrupt(format!(
                "its backing file's name has {backing_len} bytes"
            )));
        }
        let backing = match backing_at {
            0 => None,
            // As QEMU has it.
            _ if backing_len == 0 => None,
            at => Some(fields.text(at, backing_len, "the name of its backing file")?),
        };
        if fields.u32(32)? != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "it is encrypted: decrypt it first",
            ));
        }
        Ok(Header {
            size: fields.u64(24)?,
            backing,
            backing_format: backing_format(fields, u64::from(header_len))?,
            cluster_bits,
            features,
            l1_offset: fields.u64(40)?,
            l1_entries: fields.u32(36)?,
        })
    }

    /// Refuses what cannot be read in whole: an image that is cut off, damaged, or kept elsewhere too.
    fn check(&self, file: &File, len: u64) -> Result<()> {
        if self.features & CORRUPT != 0 {
            return Err(corrupt(
                "QEMU has marked it as damaged: repair it (qemu-img check -r all)",
            ));
        }
        if self.features & EXTERNAL_DATA != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "it keeps its data in another file: copy it into one (qemu-img convert -O qcow2)",
            ));
        }
        let known = DIRTY | COMPRESSION_TYPE | EXTENDED_L2;
        if self.features & !known != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "it has features that are not known: {:#x}",
                    self.features & !known
                ),
            ));
        }
        self.check_tables(file, len)
    }

    /// Looks whether all tables lie within the file, and each at a place of its own: a table that is cut
    /// off would read as zeros, and one that stands for many makes a disk of any size of a small file.
    fn check_tables(&self, file: &File, len: u64) -> Result<()> {
        let entry_bits = if self.features & EXTENDED_L2 == 0 {
            3
        } else {
            4
        };
        let covered = 1u128 << (2 * self.cluster_bits - entry_bits);
        let needed = u128::from(self.size).div_ceil(covered);
        if self.l1_entries > MAX_L1 || u128::from(self.l1_entries) < needed {
            return Err(corrupt(format!(
                "its first table has {} entries, which do not fit {} bytes",
                self.l1_entries, self.size
            )));
        }
        let table_len = u64::from(self.l1_entries) * 8;
        let end = self.l1_offset.checked_add(table_len);
        if end.is_none_or(|end| end > len) {
            return Err(cut_off());
        }
        let mut table = vec![0; table_len as usize];
        file.read_exact_at(&mut table, self.l1_offset)
            .context(|| "reading its first table")?;
        let (entries, _) = table.as_chunks();
        let mut tables: Vec<u64> = entries
            .iter()
            .map(|entry| u64::from_be_bytes(*entry) & tables::OFFSET)
            .filter(|offset| *offset != 0)
            .collect();
        tables.sort_unstable();
        if tables
            .last()
            .is_some_and(|last| len.saturating_sub(*last) < 1 << self.cluster_bits)
        {
            return Err(cut_off());
        }
        if tables.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(corrupt("one of its tables is used twice"));
        }
        tables::check(file, len, &tables, self.cluster_bits, 1 << entry_bits)
    }

    /// What of the format only QEMU itself reads, if there is something.
    pub fn needs_qemu(&self) -> Option<&'static str> {
        let has = |feature| self.features & feature != 0;
        // Before the others, which QEMU writes too.
        if has(COMPRESSION_TYPE) {
            Some("is compressed with zstd")
        } else if has(EXTENDED_L2) {
            Some("has extended L2 entries")
        } else {
            has(DIRTY).then_some("was not closed in order")
        }
    }
}

/// What the extensions behind the header say of the backing file's format.
fn backing_format(fields: &Fields<'_>, from: u64) -> Result<Option<String>> {
    let mut at = from;
    // Some writers leave no room for the end mark.
    while at + 8 <= fields.0.len() as u64 {
        let (kind, len) = (fields.u32(at)?, fields.u32(at + 4)?);
        at += 8;
        match kind {
            EXTENSION_END => break,
            EXTENSION_BACKING_FORMAT => {
                return fields.text(at, len, "its backing file's format").map(Some);
            }
            _ => at += u64::from(len).next_multiple_of(8),
        }
    }
    Ok(None)
}
