//! Units as types: a block's number, a count of blocks and a byte of a device are three things, and
//! the compiler keeps them apart. They cost what a `u64` costs.
//!
//! Arithmetic asserts: a sum that wraps is a fault of ours and not a number to go on with. Numbers
//! from outside come in by [`Span::checked`] and [`Block::new`] and are held against the layer's size
//! before anything is computed from them.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};

use super::{BLOCK_LEN, BLOCK_SIZE};

const _: () = assert!(usize::BITS == 64, "lengths of files are lengths of buffers");

/// A length or a place in bytes as one of a buffer in memory.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, as asserted above"
)]
pub const fn in_memory(bytes: u64) -> usize {
    bytes as usize
}

#[inline]
const fn sum(a: u64, b: u64) -> u64 {
    let (sum, wrapped) = a.overflowing_add(b);
    assert!(!wrapped, "a sum of blocks or bytes is beyond 2^64");
    sum
}

#[inline]
const fn difference(a: u64, b: u64) -> u64 {
    assert!(a >= b, "a difference of blocks or bytes is negative");
    a - b
}

#[inline]
const fn times_block_size(blocks: u64) -> u64 {
    assert!(
        blocks <= u64::MAX / BLOCK_SIZE,
        "blocks whose bytes have no number"
    );
    blocks * BLOCK_SIZE
}

/// The number of a block in a device or a layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Block(u64);

/// A number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Blocks(u64);

/// A byte of a device or a layer, from 0. A length in bytes is a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Offset(u64);

impl Block {
    /// The first block.
    pub const FIRST: Block = Block(0);

    /// The block of this number.
    #[inline]
    pub const fn new(number: u64) -> Self {
        Block(number)
    }

    /// Its number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Its first byte.
    #[inline]
    pub const fn offset(self) -> Offset {
        Offset(times_block_size(self.0))
    }
}

impl Blocks {
    /// None at all.
    pub const NONE: Blocks = Blocks(0);
    /// One.
    pub const ONE: Blocks = Blocks(1);

    /// So many.
    #[inline]
    pub const fn new(count: u64) -> Self {
        Blocks(count)
    }

    /// How many.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The blocks that a buffer of whole blocks holds: asserts that there is no rest.
    #[inline]
    pub const fn in_buffer(buf: &[u8]) -> Self {
        assert!(
            buf.len().is_multiple_of(BLOCK_LEN),
            "a buffer of whole blocks"
        );
        Blocks((buf.len() / BLOCK_LEN) as u64)
    }

    /// The whole blocks in so many bytes; what is left over does not count.
    #[inline]
    pub const fn whole_in(bytes: u64) -> Self {
        Blocks(bytes / BLOCK_SIZE)
    }

    /// The blocks that it takes to hold so many bytes; the last one may be used in part.
    #[inline]
    pub const fn to_hold(bytes: u64) -> Self {
        Blocks(bytes.div_ceil(BLOCK_SIZE))
    }

    /// Their bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        times_block_size(self.0)
    }

    /// The length of a buffer for them.
    #[inline]
    pub const fn buffer_len(self) -> usize {
        in_memory(self.bytes())
    }

    /// True where there are none.
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl Offset {
    /// The byte of this number.
    #[inline]
    pub const fn new(byte: u64) -> Self {
        Offset(byte)
    }

    /// Its number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The block that it lies in.
    #[inline]
    pub const fn block(self) -> Block {
        Block(self.0 / BLOCK_SIZE)
    }

    /// The first block that begins there or later.
    #[inline]
    pub const fn block_from(self) -> Block {
        Block(self.0.div_ceil(BLOCK_SIZE))
    }

    /// Where in its block it lies: less than [`BLOCK_LEN`].
    #[inline]
    pub const fn within_block(self) -> usize {
        in_memory(self.0 % BLOCK_SIZE)
    }

    /// Bytes from there to the next border of a block: 0 where it is one.
    #[inline]
    pub const fn to_border(self) -> u64 {
        difference(self.block_from().offset().0, self.0)
    }
}

impl Add<Blocks> for Block {
    type Output = Block;
    #[inline]
    fn add(self, blocks: Blocks) -> Block {
        Block(sum(self.0, blocks.0))
    }
}

impl AddAssign<Blocks> for Block {
    #[inline]
    fn add_assign(&mut self, blocks: Blocks) {
        *self = *self + blocks;
    }
}

impl Sub for Block {
    type Output = Blocks;
    #[inline]
    fn sub(self, before: Block) -> Blocks {
        Blocks(difference(self.0, before.0))
    }
}

impl Add for Blocks {
    type Output = Blocks;
    #[inline]
    fn add(self, more: Blocks) -> Blocks {
        Blocks(sum(self.0, more.0))
    }
}

impl AddAssign for Blocks {
    #[inline]
    fn add_assign(&mut self, more: Blocks) {
        *self = *self + more;
    }
}

impl Sub for Blocks {
    type Output = Blocks;
    #[inline]
    fn sub(self, fewer: Blocks) -> Blocks {
        Blocks(difference(self.0, fewer.0))
    }
}

impl SubAssign for Blocks {
    #[inline]
    fn sub_assign(&mut self, fewer: Blocks) {
        *self = *self - fewer;
    }
}

impl Sum for Blocks {
    fn sum<I: Iterator<Item = Blocks>>(counts: I) -> Blocks {
        counts.fold(Blocks::NONE, Add::add)
    }
}

impl From<u32> for Blocks {
    #[inline]
    fn from(count: u32) -> Self {
        Blocks(count.into())
    }
}

impl Add<u64> for Offset {
    type Output = Offset;
    #[inline]
    fn add(self, bytes: u64) -> Offset {
        Offset(sum(self.0, bytes))
    }
}

impl Sub for Offset {
    type Output = u64;
    #[inline]
    fn sub(self, before: Offset) -> u64 {
        difference(self.0, before.0)
    }
}

/// The number, as messages name a block.
impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number.
impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number.
impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Blocks that follow each other: `len` of them from `start`. Its end always has a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Span {
    start: Block,
    len: Blocks,
}

impl Span {
    /// `len` blocks from `start`. Asserts that the end has a number.
    #[inline]
    pub const fn new(start: Block, len: Blocks) -> Self {
        let _ = sum(start.0, len.0);
        Span { start, len }
    }

    /// As [`Span::new`], of numbers from outside: `None` where the end has no number.
    #[inline]
    pub const fn checked(start: Block, len: Blocks) -> Option<Self> {
        match start.0.checked_add(len.0) {
            Some(_) => Some(Span { start, len }),
            None => None,
        }
    }

    /// The blocks from `start` up to `end`, which is not one of them. Asserts their order.
    #[inline]
    pub const fn between(start: Block, end: Block) -> Self {
        let len = Blocks(difference(end.0, start.0));
        Span { start, len }
    }

    /// The first `len` blocks.
    #[inline]
    pub const fn up_to(len: Blocks) -> Self {
        Span {
            start: Block::FIRST,
            len,
        }
    }

    /// This block alone.
    #[inline]
    pub const fn of(block: Block) -> Self {
        Span::new(block, Blocks::ONE)
    }

    /// The blocks whose bytes a buffer of whole blocks holds that begins with `start`.
    #[inline]
    pub const fn of_buffer(start: Block, buf: &[u8]) -> Self {
        Span::new(start, Blocks::in_buffer(buf))
    }

    /// The blocks that `len` bytes from `offset` touch: rounded outwards at both ends.
    #[inline]
    pub const fn touched_by(offset: Offset, len: u64) -> Self {
        let end = Offset(sum(offset.0, len));
        Span::between(offset.block(), end.block_from())
    }

    /// The first of them.
    #[inline]
    pub const fn start(self) -> Block {
        self.start
    }

    /// How many.
    #[inline]
    pub const fn len(self) -> Blocks {
        self.len
    }

    /// The first block behind them.
    #[inline]
    pub const fn end(self) -> Block {
        Block(self.start.0 + self.len.0)
    }

    /// True where it has no blocks.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.len.is_none()
    }

    /// Its first byte.
    #[inline]
    pub const fn offset(self) -> Offset {
        self.start.offset()
    }

    /// Its bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.len.bytes()
    }

    /// True where both have a block.
    #[inline]
    pub const fn overlaps(self, other: Span) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// True where every block of `other` is one of these.
    #[inline]
    pub const fn contains(self, other: Span) -> bool {
        self.start.0 <= other.start.0 && other.end().0 <= self.end().0
    }

    /// The blocks that both have; `None` where there are none.
    #[inline]
    pub fn intersection(self, other: Span) -> Option<Span> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Span::between(start, end))
    }

    /// True where `next` begins right behind these.
    #[inline]
    pub const fn meets(self, next: Span) -> bool {
        self.end().0 == next.start.0
    }

    /// These and `more` blocks behind them.
    #[inline]
    pub fn longer_by(self, more: Blocks) -> Span {
        Span::new(self.start, self.len + more)
    }

    /// At most `most` of them, from the first on.
    #[inline]
    pub fn at_most(self, most: Blocks) -> Span {
        Span {
            start: self.start,
            len: self.len.min(most),
        }
    }

    /// Those from `block` on, which is one of them or their end.
    #[inline]
    pub const fn from(self, block: Block) -> Span {
        assert!(self.start.0 <= block.0, "a block before the span");
        Span::between(block, self.end())
    }

    /// The blocks, in order.
    #[inline]
    pub fn blocks(self) -> impl DoubleEndedIterator<Item = Block> {
        (self.start.0..self.end().0).map(Block)
    }

    /// In pieces of `piece` blocks, the last of which may have fewer. Asserts that `piece` is not 0.
    #[inline]
    pub fn pieces(self, piece: Blocks) -> impl Iterator<Item = Span> {
        assert!(!piece.is_none(), "pieces of no blocks");
        let mut rest = self;
        std::iter::from_fn(move || {
            let next = rest.at_most(piece);
            rest = rest.from(next.end());
            (!next.is_empty()).then_some(next)
        })
    }
}

/// As a message says it: `3 blocks from 17`.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks from {}", self.len, self.start)
    }
}

/// What is said of the blocks of a span, of each of them the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run<T> {
    /// The blocks; there is at least one.
    pub span: Span,
    /// What each of them has.
    pub value: T,
}

impl<T> Run<T> {
    /// A run.
    #[inline]
    pub const fn new(span: Span, value: T) -> Self {
        Run { span, value }
    }

    /// The first of its blocks.
    #[inline]
    pub const fn start(&self) -> Block {
        self.span.start()
    }

    /// How many blocks it has.
    #[inline]
    pub const fn len(&self) -> Blocks {
        self.span.len()
    }

    /// The first block behind it.
    #[inline]
    pub const fn end(&self) -> Block {
        self.span.end()
    }

    /// True where it has no blocks, as none should.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.span.is_empty()
    }
}

/// Puts a run behind others, as part of the last one where it goes on.
pub fn push_run<T: PartialEq>(runs: &mut Vec<Run<T>>, run: Run<T>) {
    match runs.last_mut() {
        Some(last) if last.value == run.value && last.span.meets(run.span) => {
            last.span = last.span.longer_by(run.span.len());
        }
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span {
        Span::new(Block(start), Blocks(len))
    }

    #[test]
    fn units_take_no_more_space_than_a_number() {
        assert_eq!(size_of::<Block>(), 8);
        assert_eq!(size_of::<Blocks>(), 8);
        assert_eq!(size_of::<Offset>(), 8);
        assert_eq!(size_of::<Span>(), 16);
        assert_eq!(size_of::<Run<crate::block::BlockState>>(), 24);
    }

    #[test]
    fn bytes_round_to_blocks_as_the_name_says() {
        assert_eq!(Blocks::whole_in(8191), Blocks(1));
        assert_eq!(Blocks::to_hold(8191), Blocks(2));
        assert_eq!(Offset(4096).block(), Block(1));
        assert_eq!(Offset(4095).block(), Block(0));
        assert_eq!(Offset(4096).block_from(), Block(1));
        assert_eq!(Offset(4097).block_from(), Block(2));
        assert_eq!(
            (Offset(4097).to_border(), Offset(4096).to_border()),
            (4095, 0)
        );
        assert_eq!(Offset(4097).within_block(), 1);
        assert_eq!(Span::touched_by(Offset(4095), 2), span(0, 2));
        assert_eq!(Span::touched_by(Offset(4096), 4096), span(1, 1));
        assert_eq!(Block(3).offset(), Offset(12288));
    }

    #[test]
    fn spans_intersect_where_both_have_blocks_and_nowhere_else() {
        let middle = span(10, 10);
        assert_eq!(middle.intersection(span(0, 11)), Some(span(10, 1)));
        assert_eq!(middle.intersection(span(12, 3)), Some(span(12, 3)));
        assert_eq!(middle.intersection(span(19, 9)), Some(span(19, 1)));
        for apart in [span(0, 10), span(20, 1), span(15, 0)] {
            assert_eq!(middle.intersection(apart), None, "{apart}");
        }
        assert!(middle.overlaps(span(19, 1)) && !middle.overlaps(span(20, 5)));
        assert!(middle.contains(span(19, 1)) && !middle.contains(span(19, 2)));
    }

    #[test]
    fn pieces_cover_a_span_in_order_and_without_gaps() {
        let pieces: Vec<Span> = span(5, 10).pieces(Blocks(4)).collect();
        assert_eq!(pieces, [span(5, 4), span(9, 4), span(13, 2)]);
        assert_eq!(span(5, 0).pieces(Blocks(4)).count(), 0);
        assert_eq!(span(5, 3).blocks().last(), Some(Block(7)));
    }

    #[test]
    fn numbers_from_outside_that_make_no_span_are_told_of() {
        assert_eq!(Span::checked(Block(u64::MAX), Blocks(1)), None);
        assert_eq!(
            Span::checked(Block(u64::MAX), Blocks(0)),
            Some(span(u64::MAX, 0))
        );
    }

    #[test]
    #[should_panic(expected = "beyond 2^64")]
    fn a_sum_that_wraps_is_a_panic_and_not_a_small_number() {
        let _ = Block(u64::MAX) + Blocks(1);
    }

    #[test]
    #[should_panic(expected = "negative")]
    fn a_difference_below_nothing_is_a_panic_and_not_nothing() {
        let _ = Blocks(1) - Blocks(2);
    }

    #[test]
    #[should_panic(expected = "have no number")]
    fn a_block_beyond_the_last_byte_has_no_offset() {
        let _ = Block(u64::MAX / 4096 + 1).offset();
    }
}
