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
