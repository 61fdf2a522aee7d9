//! Serialises writers of the same blocks and lets all others run side by side.

use std::ops::Range;

use parking_lot::{Condvar, Mutex};

/// Exclusive locks on ranges of block numbers. Few are held at a time (one a request in flight),
/// so a list is enough.
#[derive(Debug, Default)]
pub struct RangeLock {
    held: Mutex<Vec<Range<u64>>>,
    released: Condvar,
}

impl RangeLock {
    /// Waits until nobody holds a block of `range`, then holds all of it.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            self.released.wait(&mut held);
        }
        held.push(range.clone());
        RangeGuard { lock: self, range }
    }
}

/// Holds a range of blocks until it is dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock();
        if let Some(at) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(at);
        }
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

    #[test]
    fn ranges_that_do_not_overlap_are_held_together() {
        let lock = RangeLock::default();
        let _low = lock.lock(0..4);
        let _high = lock.lock(4..8);
    }

    #[test]
    fn an_overlapping_range_waits_for_the_first_to_end() {
        let lock = Arc::new(RangeLock::default());
        let released = Arc::new(AtomicBool::new(false));
        let first = lock.lock(2..6);
        let waiter = {
            let (lock, released) = (lock.clone(), released.clone());
            std::thread::spawn(move || {
                let _second = lock.lock(5..9);
                assert!(released.load(Ordering::SeqCst));
            })
        };
        std::thread::sleep(std::time::Duration::from_millis(30));
        released.store(true, Ordering::SeqCst);
        drop(first);
        waiter.join().unwrap();
    }
}
