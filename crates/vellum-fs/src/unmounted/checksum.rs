//! The checksums of ext4's metadata (`metadata_csum`): CRC-32C without the final inversion.

/// The kernel's `crc32c()`: goes on from `sum`.
pub(super) fn crc(sum: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!sum, bytes)
}

/// As [`crc`], where the `len` bytes at `hole` count as zeros: a checksum does not cover itself.
pub(super) fn crc_but(sum: u32, bytes: &[u8], hole: usize, len: usize) -> u32 {
    let (before, rest) = bytes.split_at(hole.min(bytes.len()));
    let (own, after) = rest.split_at(len.min(rest.len()));
    let zeros = [0; 4];
    let sum = crc(sum, before);
    let sum = crc(sum, zeros.split_at(own.len().min(zeros.len())).0);
    crc(sum, after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_kernels_crc32c() {
        // The check value of CRC-32C is that of the inverted sum.
        assert_eq!(!crc(!0, b"123456789"), 0xE306_9283);
        assert_eq!(crc(crc(!0, b"1234"), b"56789"), crc(!0, b"123456789"));
        assert_eq!(
            crc_but(!0, b"12xx56", 2, 2),
            crc(!0, b"12\0\x0056"),
            "a hole is zeros"
        );
    }
}
