//! Little-endian fields in and out of byte strings, and the CRC that ends them.

use uuid::Uuid;

use vellum_base::block::{part, part_from};
use vellum_base::error::{Error, ErrorKind, Result};

/// Appends fields.
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Writer {
            bytes: Vec::with_capacity(capacity),
        }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Zeros up to a length of `len`.
    pub(super) fn pad_to(&mut self, len: usize) {
        self.bytes.resize(len.max(self.bytes.len()), 0);
    }

    /// The CRC of everything so far.
    pub(super) fn crc(&mut self) {
        let crc = crc32fast::hash(&self.bytes);
        self.u32(crc);
    }

    /// The CRC of what follows the first `start` bytes.
    pub(super) fn crc_from(&self, start: usize) -> u32 {
        crc32fast::hash(part_from(&self.bytes, start))
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields off the front of a byte string.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(super) fn skip(&mut self, len: usize) -> Result<()> {
        self.take(len).map(drop)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn uuid(&mut self) -> Result<Uuid> {
        self.array().map(Uuid::from_bytes)
    }
}

/// The CRC of bytes in which it stands itself at `crc_at`: as if there were zeros.
pub(super) fn crc_around(bytes: &[u8], crc_at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(part(bytes, 0, crc_at));
    hasher.update(&[0; 4]);
    hasher.update(part_from(bytes, crc_at + 4));
    hasher.finalize()
}

/// A number of things in a file as its field holds it: asserts that the field does.
pub(super) fn count(things: usize) -> u32 {
    assert!(things <= u32::MAX as usize, "more than a field can count");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let count = things as u32;
    count
}

/// Checks the CRC in the last four bytes.
pub(super) fn check_crc(bytes: &[u8], what: &str) -> Result<()> {
    let ok = bytes
        .split_last_chunk::<4>()
        .is_some_and(|(body, crc)| crc32fast::hash(body) == u32::from_le_bytes(*crc));
    if ok {
        Ok(())
    } else {
        Err(Error::new(
            ErrorKind::Corrupt,
            format!("the CRC of the {what} does not match"),
        ))
    }
}
