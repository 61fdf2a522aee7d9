//! What clients' writes leave free on the host's disk, on the wish of whoever runs the store: others
//! share the disk. docs/durability.md, "A disk that is nearly full".

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::space::millis;

/// The disk is looked at after so many milliseconds, also where little was written: others fill it too.
const LOOK_MS: u64 = 100;
/// Between two looks a layer writes at most this part of what is free beyond what shall stay so:
/// other layers do not look either.
const PART: u64 = 64;

/// Which writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// What a file system above could not do without: its journal. Never refused here.
    Favoured,
    /// Small ones may take half of what shall stay free, so that a container that writes little goes
    /// on, and a file system can note what it could not write.
    Small,
    /// All others.
    Large,
}

/// What one layer leaves free.
#[derive(Debug)]
pub(super) struct Headroom {
    /// Bytes that shall stay available; 0 for no such wish.
    keep: AtomicU64,
    /// Bytes that may be written before the disk is looked at again.
    unasked: AtomicU64,
    opened: Instant,
    /// When it was looked at last, in milliseconds since then.
    looked: AtomicU64,
}

impl Headroom {
    pub(super) fn new() -> Self {
        Headroom {
            keep: AtomicU64::new(0),
            unasked: AtomicU64::new(0),
            opened: Instant::now(),
            looked: AtomicU64::new(0),
        }
    }

    /// From now on so many bytes shall stay available.
    pub(super) fn keep(&self, bytes: u64) {
        self.keep.store(bytes, Ordering::Relaxed);
        self.unasked.store(0, Ordering::Relaxed);
    }

    /// Bytes that shall stay available.
    pub(super) fn kept(&self) -> u64 {
        self.keep.load(Ordering::Relaxed)
    }

    /// Whether a write that takes `len` new bytes leaves enough; `need` says which it is, `available` asks
    /// the disk, which may not know.
    pub(super) fn allows(
        &self,
        need: impl FnOnce() -> Need,
        len: u64,
        available: impl FnOnce() -> Option<u64>,
    ) -> bool {
        let keep = self.kept();
        if keep == 0 {
            return true;
        }
        let least = match need() {
            Need::Favoured => return true,
            Need::Small => keep / 2,
            Need::Large => keep,
        };
        if self.is_covered(len) {
            return true;
        }
        let Some(available) = available() else {
            return true;
        };
        // Whoever comes meanwhile looks too.
        let unasked = available.saturating_sub(keep).saturating_sub(len) / PART;
        self.unasked.store(unasked, Ordering::Relaxed);
        self.looked.store(self.now(), Ordering::Relaxed);
        available.saturating_sub(len) >= least
    }

    fn now(&self) -> u64 {
        millis(self.opened.elapsed())
    }

    /// The last look was a moment ago, and found enough for this write too.
    fn is_covered(&self, len: u64) -> bool {
        let lately = self.now() < self.looked.load(Ordering::Relaxed) + LOOK_MS;
        let take = |left: u64| left.checked_sub(len);
        let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
        lately && self.unasked.fetch_update(set, get, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;

    const MIB: u64 = 1 << 20;

    #[test]
    fn large_writes_leave_all_small_ones_half_and_a_journal_nothing() {
        let headroom = Headroom::new();
        let allows = |need, available| headroom.allows(|| need, MIB, || Some(available));
        assert!(allows(Need::Large, 0), "nothing shall stay free");
        headroom.keep(100 * MIB);
        assert!(allows(Need::Large, 101 * MIB));
        assert!(!allows(Need::Large, 101 * MIB - 1));
        assert!(allows(Need::Small, 51 * MIB));
        assert!(!allows(Need::Small, 51 * MIB - 1));
        assert!(allows(Need::Favoured, 0));
        headroom.keep(0);
        assert!(allows(Need::Large, 0));
    }

    #[test]
    fn the_disk_is_asked_again_after_a_part_of_what_is_left_or_a_moment() {
        let headroom = Headroom::new();
        headroom.keep(100 * MIB);
        let asked = Cell::new(0);
        let write = |len| {
            headroom.allows(
                || Need::Large,
                len,
                || {
                    asked.set(asked.get() + 1);
                    Some(165 * MIB)
                },
            )
        };
        assert!(write(MIB));
        // A 64th of the 64 MiB that are left.
        assert!(write(MIB / 2) && write(MIB / 2));
        let at_once = asked.get();
        assert!(write(4096));
        std::thread::sleep(Duration::from_millis(LOOK_MS + 1));
        assert!(write(4096));
        // A slow machine may have needed more than a moment for the first ones.
        assert!(at_once <= 3 && asked.get() >= at_once + 2, "{asked:?}");
    }

    #[test]
    fn a_disk_that_does_not_say_what_is_left_takes_all() {
        let headroom = Headroom::new();
        headroom.keep(u64::MAX);
        assert!(headroom.allows(|| Need::Large, MIB, || None));
    }
}
