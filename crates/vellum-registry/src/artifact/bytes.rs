//! Little-endian numbers in bytes whose length was checked.

use vellum_base::block::{part, part_mut};
use vellum_base::error::{Error, ErrorKind};

/// The number at `at`. Asserts that it is there.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(part(bytes, at, 4));
    u32::from_le_bytes(number)
}

/// The number at `at`. Asserts that it is there.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(part(bytes, at, 8));
    u64::from_le_bytes(number)
}

/// The digest at `at`. Asserts that it is there.
pub(super) fn digest_at(bytes: &[u8], at: usize) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(part(bytes, at, 32));
    digest
}

/// Writes `value` at `at`. Asserts that there is room.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    part_mut(bytes, at, value.len()).copy_from_slice(value);
}

/// Bytes that contradict themselves or each other.
pub(super) fn corrupt(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
