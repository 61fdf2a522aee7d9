//! How a writable layer trades space, syncs and memory.

use vellum_base::block::{BLOCK_SIZE, Blocks};

/// The largest area of the journal that is made, so that no record in it is larger than a reader
/// takes.
pub(super) const MAX_AREA: u64 = 16 << 20;

/// How a writable layer trades.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerOptions {
    /// A flush with at most this many blocks of new data carries them in its journal record and
    /// needs no sync of the data file; with up to eight times as many where they lie scattered. 0
    /// turns that off.
    pub journal_blocks: usize,
    /// Bytes of a journal area when it is first made, a multiple of 4096, at most 16 MiB.
    pub journal_start: u64,
    /// Bytes up to which areas grow under load, a multiple of 4096, at most 16 MiB.
    pub journal_max: u64,
    /// Bytes by which the file `map` may grow by changes before it is written anew as a table; half
    /// of the table where that is more.
    pub map_log: u64,
    /// Bytes of space that may be taken on the host ahead of first touches, where these are dense; a
    /// tenth of what the layer holds where that is more (at most 256 MiB). 0 turns that off.
    pub preallocate: u64,
    /// Free a full journal area in a thread of its own, while flushes go on in the other area.
    pub background: bool,
}

impl Default for LayerOptions {
    fn default() -> Self {
        LayerOptions {
            journal_blocks: 32,
            journal_start: 256 << 10,
            journal_max: 8 << 20,
            map_log: 256 << 10,
            preallocate: 16 << 20,
            background: true,
        }
    }
}

/// Scattered blocks that a record may carry for each of [`LayerOptions::journal_blocks`].
const SCATTERED: u64 = 8;

impl LayerOptions {
    /// A record carries up to so many blocks wherever they lie.
    pub(super) fn few(&self) -> Blocks {
        Blocks::new(self.journal_blocks as u64)
    }

    /// A record carries no more than so many.
    pub(super) fn carried_at_most(&self) -> Blocks {
        Blocks::new(SCATTERED * self.few().get())
    }

    /// The nearest that the format allows.
    pub(super) fn within_bounds(self) -> Self {
        let bounded = |len: u64| (len / BLOCK_SIZE * BLOCK_SIZE).clamp(BLOCK_SIZE, MAX_AREA);
        LayerOptions {
            journal_start: bounded(self.journal_start),
            journal_max: bounded(self.journal_max),
            ..self
        }
    }
}
