//! The header of a layer: format.md, section 1.

use std::path::Path;

use uuid::Uuid;

use super::codec::{Reader, Writer, count};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Blocks, MAX_VIRTUAL_SIZE};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Storage, Unsynced};

/// The header's file name within the layer's directory.
pub const HEADER_FILE: &str = "layer";

const MAGIC: &[u8; 8] = b"VELLUMLR";
const HEADER_LEN: usize = 512;
const FLAG_SEALED: u32 = 1;
/// Blocks of a data segment, as a power of two: 2³¹ blocks are 8 TiB.
pub(super) const SEGMENT_SHIFT: u32 = 31;

/// The version of the layer format that this build writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// The header names a layer in whose place this one is.
const FEATURE_STANDS_FOR: u64 = 1;
/// Its blocks come as they are wanted: format.md, section 8.
const FEATURE_LAZY: u64 = 2;
/// Incompatible features that this build knows.
const KNOWN_INCOMPATIBLE: u64 = FEATURE_STANDS_FOR | FEATURE_LAZY;

/// What a layer is: identity, parent, size and whether it is sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// This layer.
    pub uuid: Uuid,
    /// The layer below, `None` at the bottom of a chain.
    pub parent: Option<Uuid>,
    /// The layer in whose place this one is: those above name it as their parent.
    pub stands_for: Option<Uuid>,
    /// Virtual size in bytes: a multiple of 4096, up to 64 TiB.
    pub virtual_size: u64,
    /// Sealed layers never change again.
    pub sealed: bool,
    /// Not all of its blocks may be here; where there is a seal all of them are.
    pub lazy: bool,
    /// When the layer was made, in seconds since 1970.
    pub created: u64,
}

impl Header {
    /// A header for a new writable layer.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when the size is 0, no multiple of 4096 or beyond 64 TiB.
    pub fn new(parent: Option<Uuid>, virtual_size: u64) -> Result<Self> {
        check_size(virtual_size)?;
        let created = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Ok(Header {
            uuid: Uuid::new_v4(),
            parent,
            stands_for: None,
            virtual_size,
            sealed: false,
            lazy: false,
            created,
        })
    }

    /// True where this layer was made on `below`, or on what that stands for; with `None`, on nothing.
    pub fn fits_on(&self, below: Option<&Header>) -> bool {
        match (self.parent, below) {
            (Some(parent), Some(below)) => below.is(parent),
            (parent, below) => parent.is_none() && below.is_none(),
        }
    }

    /// True where a layer that names `uuid` as its parent lies on this one.
    fn is(&self, uuid: Uuid) -> bool {
        self.uuid == uuid || self.stands_for == Some(uuid)
    }

    /// What a layer above names as its parent, where it lay there before this one took that place.
    pub fn known_as(&self) -> Uuid {
        self.stands_for.unwrap_or(self.uuid)
    }

    /// Virtual size in blocks.
    pub fn blocks(&self) -> Blocks {
        Blocks::whole_in(self.virtual_size)
    }

    /// The header as it lies on disk.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(HEADER_LEN);
        out.bytes(MAGIC);
        out.u32(FORMAT_VERSION);
        out.u32(if self.sealed { FLAG_SEALED } else { 0 });
        out.u64(self.features());
        out.u64(0);
        out.bytes(self.uuid.as_bytes());
        out.bytes(self.parent.unwrap_or(Uuid::nil()).as_bytes());
        out.u64(self.virtual_size);
        out.u32(count(BLOCK_LEN));
        out.u32(SEGMENT_SHIFT);
        out.u64(self.created);
        if let Some(place) = self.stands_for {
            out.bytes(place.as_bytes());
        }
        out.pad_to(HEADER_LEN - 4);
        out.crc();
        out.into_bytes()
    }

    /// Its incompatible features.
    fn features(&self) -> u64 {
        let stands_for = match self.stands_for {
            Some(_) => FEATURE_STANDS_FOR,
            None => 0,
        };
        stands_for | if self.lazy { FEATURE_LAZY } else { 0 }
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a foreign file, another version or unknown incompatible
    /// features; [`ErrorKind::Corrupt`] for a wrong length, CRC or field.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, what);
        if bytes.get(..8) != Some(MAGIC.as_slice()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "not a Vellum layer (wrong magic)",
            ));
        }
        if bytes.len() != HEADER_LEN {
            return Err(corrupt(format!(
                "the header has {} bytes instead of {HEADER_LEN}",
                bytes.len()
            )));
        }
        let mut input = Reader::new(bytes);
        input.skip(8)?;
        let version = input.u32()?;
        if version != FORMAT_VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "layer format version {version}; this build reads version {FORMAT_VERSION}: \
                     use the vellum that made it"
                ),
            ));
        }
        super::codec::check_crc(bytes, "header")?;
        let flags = input.u32()?;
        let incompatible = input.u64()?;
        check_features(incompatible)?;
        input.skip(8)?;
        let uuid = input.uuid()?;
        let parent = input.uuid()?;
        let virtual_size = input.u64()?;
        let block_size = input.u32()?;
        let segment = input.u32()?;
        let created = input.u64()?;
        let place = match incompatible & FEATURE_STANDS_FOR {
            0 => None,
            _ => Some(input.uuid()?),
        };
        if place.is_some_and(|place| place.is_nil() || place == uuid) {
            return Err(corrupt(format!(
                "the layer {uuid} stands for none, or itself"
            )));
        }
        if uuid.is_nil() || uuid == parent {
            return Err(corrupt(format!("impossible layer UUID {uuid}")));
        }
        if u64::from(block_size) != BLOCK_SIZE || segment != SEGMENT_SHIFT {
            return Err(corrupt(format!(
                "block size {block_size} and segment size 2^{segment} instead of {BLOCK_SIZE} and \
                 2^{SEGMENT_SHIFT}"
            )));
        }
        check_size(virtual_size).map_err(|error| corrupt(error.to_string()))?;
        let (sealed, lazy) = (flags & FLAG_SEALED != 0, incompatible & FEATURE_LAZY != 0);
        if lazy && !sealed {
            return Err(corrupt(format!("the layer {uuid} is lazy and not sealed")));
        }
        Ok(Header {
            uuid,
            parent: (!parent.is_nil()).then_some(parent),
            stands_for: place,
            virtual_size,
            sealed,
            lazy,
            created,
        })
    }

    /// Reads the header of the layer in `dir`; errors name the file.
    pub fn read(storage: &dyn Storage, dir: &Path) -> Result<Self> {
        let path = dir.join(HEADER_FILE);
        let bytes = storage
            .read_all(&path, HEADER_LEN as u64)
            .context(|| format!("cannot read {}", path.display()))?;
        Header::decode(&bytes).context(|| path.display().to_string())
    }

    /// Writes the header of a new layer, which is not durable yet, nor is its name.
    pub(super) fn create(&self, storage: &dyn Storage, dir: &Path) -> Result<Unsynced> {
        let path = dir.join(HEADER_FILE);
        storage
            .create_file(&path, &self.encode())
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Replaces the header of the layer in `dir`, durably.
    pub fn write(&self, storage: &dyn Storage, dir: &Path) -> Result<()> {
        let path = dir.join(HEADER_FILE);
        storage
            .write_atomic(&path, &self.encode())
            .context(|| format!("cannot write {}", path.display()))
    }
}

/// Refuses a layer with incompatible features that this build does not know.
fn check_features(incompatible: u64) -> Result<()> {
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let bits: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 == 1)
        .map(|bit| bit.to_string())
        .collect();
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "incompatible feature bit(s) {} are unknown to this build: use a newer vellum",
            bits.join(", ")
        ),
    ))
}

/// Checks a virtual size in bytes: a multiple of 4096, from 4096 to 64 TiB.
///
/// # Errors
/// [`ErrorKind::InvalidInput`].
pub fn check_size(size: u64) -> Result<()> {
    if size == 0 || !size.is_multiple_of(BLOCK_SIZE) || size > MAX_VIRTUAL_SIZE {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "a virtual size of {size} bytes: it must be a multiple of {BLOCK_SIZE}, at least \
                 {BLOCK_SIZE} and at most {MAX_VIRTUAL_SIZE} (64 TiB)"
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header::new(Some(Uuid::new_v4()), 1 << 30).unwrap()
    }

    /// Puts the right CRC behind changed bytes, as another implementation would.
    fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
        let crc = crc32fast::hash(&bytes[..508]);
        bytes[508..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_reads_back_as_written() {
        let header = header();
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        let joined = Header {
            stands_for: Some(Uuid::new_v4()),
            ..header
        };
        assert_eq!(Header::decode(&joined.encode()).unwrap(), joined);
        assert_eq!(
            joined.encode()[16],
            1,
            "a build that does not know it refuses it"
        );
    }

    #[test]
    fn a_layer_is_itself_and_the_one_whose_place_it_has() {
        let (before, other) = (Uuid::new_v4(), Uuid::new_v4());
        let header = Header {
            stands_for: Some(before),
            ..header()
        };
        assert!(header.is(before) && header.is(header.uuid) && !header.is(other));
        assert_eq!(header.known_as(), before);
        for impossible in [Uuid::nil(), header.uuid] {
            let header = Header {
                stands_for: Some(impossible),
                ..header.clone()
            };
            let error = Header::decode(&header.encode()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn every_single_changed_byte_is_refused() {
        let bytes = header().encode();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x40;
            Header::decode(&bad).unwrap_err();
        }
    }

    #[test]
    fn a_foreign_file_is_unsupported_and_says_so() {
        let error = Header::decode(&[0x51; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("wrong magic"), "{error}");
    }

    #[test]
    fn a_newer_version_is_unsupported_and_names_both_versions() {
        let mut bytes = header().encode();
        bytes[8] = 9;
        let error = Header::decode(&with_crc(bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("version 9"), "{error}");
    }

    #[test]
    fn unknown_incompatible_bits_are_refused_by_number_and_compatible_ones_ignored() {
        let mut bytes = header().encode();
        bytes[16] = 0b1_0100;
        let error = Header::decode(&with_crc(bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("bit(s) 2, 4"), "{error}");
        let mut bytes = header().encode();
        bytes[24] = 0xff;
        Header::decode(&with_crc(bytes)).unwrap();
    }

    #[test]
    fn truncated_and_padded_headers_are_corrupt() {
        let bytes = header().encode();
        for len in [8, 100, 511] {
            assert_eq!(
                Header::decode(&bytes[..len]).unwrap_err().kind(),
                ErrorKind::Corrupt
            );
        }
        let mut long = bytes;
        long.push(0);
        assert_eq!(
            Header::decode(&long).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 1, 4095, MAX_VIRTUAL_SIZE + BLOCK_SIZE] {
            assert_eq!(
                Header::new(None, size).unwrap_err().kind(),
                ErrorKind::InvalidInput
            );
        }
        Header::new(None, MAX_VIRTUAL_SIZE).unwrap();
    }
}
