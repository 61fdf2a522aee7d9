//! Windows: the aligned ranges of a virtual disk in which blocks travel between hosts.

use super::{BLOCK_SIZE, Block, Blocks, Span};

/// The size of the windows of a layer, as a power of two of bytes: 16 (64 KiB) to 20 (1 MiB).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowPower(u32);

impl WindowPower {
    /// 64 KiB.
    pub const LEAST: WindowPower = WindowPower(16);
    /// 128 KiB.
    pub const USUAL: WindowPower = WindowPower(17);
    /// 1 MiB.
    pub const MOST: WindowPower = WindowPower(20);

    /// Windows of two to this power of bytes; `None` but for 16 to 20.
    pub fn new(power: u32) -> Option<Self> {
        let power = WindowPower(power);
        (Self::LEAST..=Self::MOST).contains(&power).then_some(power)
    }

    /// The power.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Those from this one to the largest.
    pub fn and_larger(self) -> impl Iterator<Item = WindowPower> {
        (self.0..=Self::MOST.0).map(WindowPower)
    }

    /// Blocks in a window.
    pub fn blocks(self) -> Blocks {
        Blocks::new((1 << self.0) / BLOCK_SIZE)
    }

    /// The window that a block lies in.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most 2^34 blocks, at least 2^4 of them in a window"
    )]
    pub fn window_of(self, block: Block) -> u32 {
        (block.get() / self.blocks().get()) as u32
    }

    /// The blocks of a window.
    pub fn span(self, window: u32) -> Span {
        let start = u64::from(window) * self.blocks().get();
        Span::new(Block::new(start), self.blocks())
    }
}
