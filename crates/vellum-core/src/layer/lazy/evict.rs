//! Windows of a lazy layer give their space back: lazy.md, "A bounded cache".

use std::collections::BTreeSet;

use super::LazyLayer;
use super::sums::Sums;
use vellum_base::block::{Block, Span};
use vellum_base::error::Result;

impl LazyLayer {
    /// Evicts windows: they are not here any more, and take no space. Others may read them meanwhile; nobody may put
    /// them. False where nothing is evicted: of a layer whose blocks have no checksums, and of one that is being sealed, or
    /// has its seal.
    ///
    /// # Errors
    /// Where the host refuses: they are not here any more, and may take their space.
    pub fn evict(&self, windows: &[u32]) -> Result<bool> {
        let Some(sums) = &self.sums else {
            return Ok(false);
        };
        // Whoever seals it has seen that all of it is here, and reads it for long.
        let sealed = self.sealing.try_read();
        if sealed.as_deref() != Some(&false) {
            return Ok(false);
        }
        let evicted = self.forget_and_punch(sums, windows);
        let mut state = self.state.lock();
        match &evicted {
            Ok(()) => state.left.retain(|window| !windows.contains(window)),
            Err(_) => state.left.extend(windows),
        }
        evicted.map(|()| true)
    }

    fn forget_and_punch(&self, sums: &Sums, windows: &[u32]) -> Result<()> {
        // First nobody finds them, not even after a crash; then readers are told; and only then they go.
        self.forget(windows)?;
        sums.note_eviction()?;
        for window in windows {
            self.data.punch(self.span_of(*window))?;
        }
        Ok(())
    }

    /// The blocks of a window that the layer has.
    fn span_of(&self, window: u32) -> Span {
        let whole = self.power().span(window);
        let end = Block::FIRST + self.header.blocks();
        Span::between(whole.start(), whole.end().min(end))
    }

    /// Evicts the windows that take space and are not here: a crash came between the two, or what was fetched was not noted.
    /// Nobody puts windows meanwhile.
    ///
    /// # Errors
    /// As [`LazyLayer::evict`].
    pub fn evict_unknown(&self) -> Result<()> {
        let mut unknown = BTreeSet::new();
        self.data.visit_allocated(|span| {
            let last = Block::new(span.end().get() - 1);
            let windows = self.power().window_of(span.start())..=self.power().window_of(last);
            unknown.extend(windows.filter(|window| !self.is_here(*window)));
        })?;
        let unknown: Vec<u32> = unknown.into_iter().collect();
        match unknown.is_empty() {
            true => Ok(()),
            false => self.evict(&unknown).map(drop),
        }
    }

    /// Those of these windows that were read since this was asked last; from now on reads are noted anew. All of them where
    /// the host does not say.
    pub fn take_reads(&self, windows: &[u32]) -> BTreeSet<u32> {
        let Some(sums) = &self.sums else {
            return windows.iter().copied().collect();
        };
        let read = |window: &&u32| sums.take_read(**window).unwrap_or(true);
        let read: BTreeSet<u32> = windows.iter().filter(read).copied().collect();
        if !read.is_empty()
            && let Err(error) = sums.next_lap()
        {
            tracing::warn!("reads of a lazy layer are not noted: {error}");
        }
        read
    }

    /// From now on whoever reads notes it.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn note_reads(&self) -> Result<()> {
        match &self.sums {
            Some(sums) if sums.turns()?.laps == 0 => sums.next_lap(),
            _ => Ok(()),
        }
    }
}
