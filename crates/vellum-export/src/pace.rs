//! Which requests are slow enough to be worth another thread.
//!
//! To serve a request on the thread that reads the socket, or the queue, costs the requests behind it
//! the time that it takes; to hand it to another thread first costs a wake-up. Each class of
//! requests keeps a score of the time lost by not handing over. A page-cache hit takes a few
//! microseconds, a flush or a read from a disk hundreds.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// About what it costs to hand the socket or queue to another thread.
const HANDOVER: Duration = Duration::from_micros(8);
/// Requests that take longer count as slow.
const SLOW: Duration = Duration::from_micros(60);
/// The score above which a class is handed over.
const LIMIT: u32 = 16;
/// The highest score: so many fast requests in a row make the slowest device count as fast.
const MAX: u32 = 256;

/// Requests that are expected to take about the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Read = 0,
    LongRead = 1,
    Write = 2,
    LongWrite = 3,
    Durable = 4,
    Zero = 5,
    Other = 6,
}

/// The scores of all classes.
#[derive(Debug)]
pub(crate) struct Pace {
    scores: [AtomicU32; 7],
}

impl Default for Pace {
    /// What has to be durable counts as slow until it proves fast, everything else as fast.
    fn default() -> Self {
        let pace = Pace {
            scores: Default::default(),
        };
        pace.score(Class::Durable).store(MAX, Relaxed);
        pace
    }
}

impl Pace {
    #[expect(clippy::indexing_slicing, reason = "there is a score for each class")]
    fn score(&self, class: Class) -> &AtomicU32 {
        &self.scores[class as usize]
    }

    /// True when requests of that class should be handed over.
    pub(crate) fn is_slow(&self, class: Class) -> bool {
        self.score(class).load(Relaxed) > LIMIT
    }

    /// Counts a request. Racing updates may get lost, which only delays the verdict.
    pub(crate) fn record(&self, class: Class, took: Duration) {
        let score = self.score(class);
        let old = score.load(Relaxed);
        let new = if took > SLOW {
            let lost = took.as_micros() / HANDOVER.as_micros();
            (old + lost.min(MAX.into()) as u32).min(MAX)
        } else if old == 0 {
            return;
        } else {
            old - 1
        };
        score.store(new, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_from_a_disk_makes_its_class_slow_and_no_other() {
        let pace = Pace::default();
        pace.record(Class::Read, Duration::from_millis(5));
        assert!(pace.is_slow(Class::Read));
        assert!(!pace.is_slow(Class::Write));
    }

    #[test]
    fn a_class_becomes_fast_again_after_a_run_of_fast_requests() {
        let pace = Pace::default();
        pace.record(Class::Read, Duration::from_secs(5));
        for _ in 0..MAX {
            pace.record(Class::Read, Duration::from_micros(2));
        }
        assert!(!pace.is_slow(Class::Read));
    }

    #[test]
    fn rare_slow_requests_do_not_cost_the_fast_ones_a_handover() {
        let pace = Pace::default();
        for i in 0..10_000 {
            let took = if i % 32 == 0 { 100 } else { 2 };
            pace.record(Class::Read, Duration::from_micros(took));
            assert!(!pace.is_slow(Class::Read), "after {i} requests");
        }
    }
}
