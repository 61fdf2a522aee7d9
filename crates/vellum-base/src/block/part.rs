//! Parts of buffers where our own arithmetic says that they lie: were that ever wrong, going on with
//! less would read or write something else than was asked for.

/// `len` bytes of `buf` from `at` on. Asserts that it has them.
#[inline]
#[track_caller]
#[expect(
    clippy::indexing_slicing,
    reason = "callers name bytes that the buffer has; a panic if not"
)]
pub fn part(buf: &[u8], at: usize, len: usize) -> &[u8] {
    &buf[at..][..len]
}

/// As [`part`], to be changed.
#[inline]
#[track_caller]
#[expect(
    clippy::indexing_slicing,
    reason = "callers name bytes that the buffer has; a panic if not"
)]
pub fn part_mut(buf: &mut [u8], at: usize, len: usize) -> &mut [u8] {
    &mut buf[at..][..len]
}

/// The `N` bytes of `buf` at `at`. Asserts that it has them.
#[inline]
#[track_caller]
pub fn array_at<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(part(buf, at, N));
    array
}

/// As [`array_at`], a little-endian number.
#[inline]
#[track_caller]
pub fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(buf, at))
}

/// As [`array_at`], a little-endian number.
#[inline]
#[track_caller]
pub fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(buf, at))
}

/// All bytes of `buf` from `at` on. Asserts that `at` is no more than its length.
#[inline]
#[track_caller]
#[expect(
    clippy::indexing_slicing,
    reason = "callers name a place in the buffer; a panic if not"
)]
pub fn part_from(buf: &[u8], at: usize) -> &[u8] {
    &buf[at..]
}
