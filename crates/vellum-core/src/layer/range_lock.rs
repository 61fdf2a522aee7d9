//! Serialises writers of the same blocks and lets all others run side by side.

use parking_lot::{Condvar, Mutex};

use vellum_base::block::Span;

/// Exclusive locks on spans of blocks. Few are held at a time (one a request in flight),
/// so a list is enough.
#[derive(Debug, Default)]
pub struct RangeLock {
    held: Mutex<Vec<Span>>,
    released: Condvar,
}

impl RangeLock {
    /// As [`RangeLock::lock`], where no block of `span` is held.
    pub(super) fn try_lock(&self, span: Span) -> Option<RangeGuard<'_>> {
        let mut held = self.held.lock();
        let free = !held.iter().any(|other| other.overlaps(span));
        free.then(|| {
            held.push(span);
            RangeGuard { lock: self, span }
        })
    }

    /// Waits until no block of `span` is held, then holds all of it.
    pub fn lock(&self, span: Span) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|other| other.overlaps(span)) {
            self.released.wait(&mut held);
        }
        held.push(span);
        RangeGuard { lock: self, span }
    }
}

/// Holds a span of blocks until it is dropped: the proof that whoever is given it may change them.
#[derive(Debug)]
#[must_use]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    span: Span,
}

impl RangeGuard<'_> {
    /// The blocks that are held.
    pub(super) fn span(&self) -> Span {
        self.span
    }

    /// Checks that blocks may be changed whose lock is `lock`.
    ///
    /// # Panics
    /// Where this guard does not hold all of them: a fault of ours.
    pub(super) fn assert_holds(&self, lock: &RangeLock, span: Span) {
        assert!(
            std::ptr::eq(self.lock, lock) && self.span.contains(span),
            "{span} are changed, and {} are held",
            self.span
        );
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock();
        let at = held.iter().position(|span| *span == self.span);
        debug_assert!(at.is_some(), "{} were not held", self.span);
        at.map(|at| held.swap_remove(at));
        drop(held);
        // Cheap when nobody waits.
        self.lock.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use vellum_base::block::{Block, Blocks};

    fn span(start: u64, len: u64) -> Span {
        Span::new(Block::new(start), Blocks::new(len))
    }

    #[test]
    fn ranges_that_do_not_overlap_are_held_together() {
        let lock = RangeLock::default();
        let _low = lock.lock(span(0, 4));
        let _high = lock.lock(span(4, 4));
    }

    #[test]
    fn an_overlapping_range_waits_for_the_first_to_end() {
        let lock = Arc::new(RangeLock::default());
        let released = Arc::new(AtomicBool::new(false));
        let first = lock.lock(span(2, 4));
        let waiter = {
            let (lock, released) = (lock.clone(), released.clone());
            std::thread::spawn(move || {
                let _second = lock.lock(span(5, 4));
                assert!(released.load(Ordering::SeqCst));
            })
        };
        std::thread::sleep(std::time::Duration::from_millis(30));
        released.store(true, Ordering::SeqCst);
        drop(first);
        waiter.join().unwrap();
    }
}
