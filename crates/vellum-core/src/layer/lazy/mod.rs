//! A lazy layer, whose blocks are somewhere else until they are wanted. format.md, section 8; lazy.md.
//!
//! Here is what readers know of one; [`wait`] is how they wait for blocks, [`LazyLayer`] is for the one process that
//! brings them.

mod have;
mod incoming;
mod wait;

pub(super) use have::HAVE_FILE;
pub(super) use incoming::finish;
pub use incoming::{Completion, LazyContent, LazyLayer};
pub(crate) use wait::once_here;
pub use wait::{Fetch, fetch_by};
pub(super) use wait::{heal, want};

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use have::HaveHeader;
use vellum_base::block::{Block, Span, WindowPower};
use vellum_base::error::Result;
use vellum_base::storage::Storage;

use super::header::Header;

/// What a reader knows of a lazy layer.
pub(super) struct Lazy {
    dir: PathBuf,
    have: HaveHeader,
    /// The windows that are here: bits are only ever set.
    here: Vec<AtomicU64>,
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Lazy {
    /// Reads what is known to be here.
    ///
    /// # Errors
    /// As the header of `have`.
    pub fn open(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Arc<Self>> {
        let (have, here) = have::read(storage, dir, header)?;
        Ok(Arc::new(Lazy {
            dir: dir.to_owned(),
            have,
            here: here.words().iter().copied().map(AtomicU64::new).collect(),
        }))
    }

    pub fn power(&self) -> WindowPower {
        self.have.power
    }

    fn is_here(&self, window: u32) -> bool {
        let word = self.here.get(window as usize / 64);
        // Acquire: what was fetched was written before the bit.
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (window % 64) & 1 == 1)
    }

    /// The windows of data blocks that are not here: the first to the last of them.
    pub fn missing(&self, span: Span) -> Option<Range<u32>> {
        if span.is_empty() {
            return None;
        }
        let last = self.power().window_of(Block::new(span.end().get() - 1));
        let mut windows = self.power().window_of(span.start())..=last;
        let first = windows.find(|window| !self.is_here(*window))?;
        let last = windows.rfind(|window| !self.is_here(*window));
        Some(first..last.unwrap_or(first) + 1)
    }

    fn note(&self, windows: Range<u32>) {
        for window in windows {
            if let Some(word) = self.here.get(window as usize / 64) {
                word.fetch_or(1 << (window % 64), Ordering::Release);
            }
        }
    }
}
