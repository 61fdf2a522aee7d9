//! Little-endian numbers in bytes from a disk.

pub(crate) use vellum_base::block::u32_at;
use vellum_base::block::{array_at, part_mut};

/// Bytes of which nothing is known but that they may hold numbers.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.0.get(at..at.checked_add(2)?)?;
        Some(u16::from_le_bytes(bytes.try_into().ok()?))
    }

    pub fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}

/// The number of 16 bits at `at` of bytes that are known to have it. Asserts that.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

/// Puts a number of 16 bits at `at` into bytes that are known to have room for it. Asserts that.
pub(crate) fn put_u16(bytes: &mut [u8], at: usize, number: u16) {
    part_mut(bytes, at, 2).copy_from_slice(&number.to_le_bytes());
}

/// As [`put_u16`], a number of 32 bits.
pub(crate) fn put_u32(bytes: &mut [u8], at: usize, number: u32) {
    part_mut(bytes, at, 4).copy_from_slice(&number.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_little_endian_and_none_where_bytes_are_missing() {
        let bytes = [1, 2, 3, 4, 5];
        assert_eq!(Fields(&bytes).u32(1), Some(0x0504_0302));
        assert_eq!(Fields(&bytes).u32(2), None);
        assert_eq!(Fields(&bytes).u16(usize::MAX), None);
        assert_eq!(u32_at(&bytes, 1), 0x0504_0302);
        assert_eq!(u16_at(&bytes, 0), 0x0201);
    }
}
