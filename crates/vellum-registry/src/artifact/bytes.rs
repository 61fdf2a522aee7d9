//! What the formats of artifacts share.

use vellum_base::block::part_mut;
use vellum_base::error::{Error, ErrorKind};

/// Writes `value` at `at`. Asserts that there is room.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    part_mut(bytes, at, value.len()).copy_from_slice(value);
}

/// Bytes that contradict themselves or each other.
pub(super) fn corrupt(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
