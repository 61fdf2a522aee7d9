//! A disk that refused a layer's writes for want of space, and when it has room for them again.

use std::time::{Duration, Instant, SystemTime};

use vellum_base::storage::DiskSpace;

/// So much more must be free than when the disk refused before writers try again: more than a
/// neighbour gives up of its reserve for itself, which is not theirs to take.
const MARGIN: u64 = 8 << 20;
/// Writers try once in this time where the disk seemed to have room: a quota shows nowhere.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// A disk with less left may well be full: a layer that is closed keeps its reserve there, so that it can be
/// opened again to remove something.
pub(super) const TIGHT: u64 = 64 << 20;

/// Who refused a write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Refuser {
    /// The host, with so much free: hosts keep some for themselves.
    Disk(Option<u64>),
    /// This layer, which leaves some free, of a write of so many bytes.
    Headroom(u64),
}

/// A disk without space, as one layer's writers met it.
#[derive(Debug)]
pub(super) struct Full {
    since: SystemTime,
    began: Instant,
    who: Refuser,
    tried: Instant,
}

impl Full {
    /// It refused the first write just now.
    pub(super) fn new(who: Refuser) -> Self {
        let now = Instant::now();
        Full {
            since: SystemTime::now(),
            began: now,
            who,
            tried: now,
        }
    }

    /// It refused one more.
    pub(super) fn refused(&mut self, who: Refuser) {
        self.tried = Instant::now();
        self.who = match (self.who, who) {
            (Refuser::Disk(level), Refuser::Disk(now)) => Refuser::Disk(level.min(now).or(now)),
            (_, who) => who,
        };
    }

    /// Whether there is room for `len` bytes again, with so much `space` and so many bytes kept free.
    pub(super) fn is_over(&self, space: DiskSpace, kept: u64, len: u64) -> bool {
        match self.who {
            Refuser::Disk(Some(level)) => space.free >= level + MARGIN + len,
            Refuser::Disk(None) => false,
            Refuser::Headroom(refused) => space.available >= kept.saturating_add(len.max(refused)),
        }
    }

    /// Whether a write of `len` bytes may try all the same, once in a while: the disk refused although
    /// there seemed to be room, as with a quota, or with what is kept for others.
    pub(super) fn may_be_tried(&mut self, len: u64) -> bool {
        let unexplained = match self.who {
            Refuser::Disk(level) => level.is_none_or(|level| level >= len + TIGHT),
            Refuser::Headroom(_) => false,
        };
        let due = unexplained && self.tried.elapsed() >= TRY_AGAIN;
        if due {
            self.tried = Instant::now();
        }
        due
    }

    /// For how long it has been full.
    pub(super) fn lasts(&self) -> Duration {
        self.began.elapsed()
    }

    /// Since when, in seconds since 1970.
    pub(super) fn since(&self) -> u64 {
        let since = self.since.duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    }
}
