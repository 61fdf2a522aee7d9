//! How a total grew: its value at the end of each of the last seconds and minutes.
//!
//! Two rings of slots, by the clock. A slot knows its time and the largest total of it. Both only
//! ever grow, so that writers need no lock and a killed one leaves nothing half done.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};
use vellum_base::block::in_memory;

const SECONDS: usize = 128;
const MINUTES: usize = 1440;
const NANOS: u64 = 1_000_000_000;

/// A total over time, relaxed.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Timeline {
    seconds: [Slot; SECONDS],
    minutes: [Slot; MINUTES],
}

#[derive(Debug)]
#[repr(C)]
struct Slot {
    /// The second or minute of the clock plus one; 0 where nothing was noted.
    stamp: AtomicU64,
    total: AtomicU64,
}

impl Slot {
    const fn new() -> Self {
        Slot {
            stamp: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    fn note(&self, stamp: u64, total: u64) {
        // One who was held up may come late, with an older time and a smaller total.
        self.total.fetch_max(total, Relaxed);
        if self.stamp.load(Relaxed) < stamp {
            self.stamp.fetch_max(stamp, Relaxed);
        }
    }
}

/// A total at the end of some second or minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds from that moment to the snapshot; 0 for the second that has not ended.
    pub seconds_ago: u64,
    /// The total then.
    pub total: u64,
}

impl Timeline {
    pub(super) const fn new() -> Self {
        Timeline {
            seconds: [const { Slot::new() }; SECONDS],
            minutes: [const { Slot::new() }; MINUTES],
        }
    }

    /// Notes the total at `now`, nanoseconds of a clock that only goes forward.
    #[expect(clippy::indexing_slicing, reason = "below the length by the modulus")]
    pub(super) fn note(&self, now: u64, total: u64) {
        let second = now / NANOS;
        self.seconds[in_memory(second) % SECONDS].note(second + 1, total);
        let minute = second / 60;
        self.minutes[in_memory(minute) % MINUTES].note(minute + 1, total);
    }

    /// The noted totals, oldest first: by minutes for the last day, by seconds for the last two
    /// minutes. Times in which nothing changed are left out.
    pub(super) fn samples(&self, now: u64) -> Vec<Sample> {
        let second = now / NANOS;
        let mut samples = Vec::new();
        // The clock began at 0 when the host came up, perhaps a moment ago.
        let oldest_second = second.saturating_sub(SECONDS as u64 - 1);
        for slot in &self.minutes {
            let Some(minute) = slot.stamp.load(Relaxed).checked_sub(1) else {
                continue;
            };
            let last = minute * 60 + 59;
            if last < oldest_second && minute + MINUTES as u64 > second / 60 {
                samples.push((last, slot.total.load(Relaxed)));
            }
        }
        for slot in &self.seconds {
            let Some(at) = slot.stamp.load(Relaxed).checked_sub(1) else {
                continue;
            };
            if at >= oldest_second {
                samples.push((at, slot.total.load(Relaxed)));
            }
        }
        samples.sort_unstable();
        samples
            .into_iter()
            .map(|(at, total)| Sample {
                // A minute that has not ended is noted as its last second.
                seconds_ago: second.saturating_sub(at),
                total,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_of_the_last_two_minutes_and_minutes_before_are_kept_in_order() {
        let timeline = Timeline::new();
        let start = 1_000_020;
        for second in 0..600u64 {
            timeline.note((start + second) * NANOS, second + 1);
        }
        let now = (start + 599) * NANOS + 5;
        let samples = timeline.samples(now);
        assert_eq!(
            samples.last(),
            Some(&Sample {
                seconds_ago: 0,
                total: 600
            })
        );
        assert!(samples.windows(2).all(|pair| {
            pair[0].total < pair[1].total && pair[0].seconds_ago > pair[1].seconds_ago
        }));
        let by_seconds = samples.iter().filter(|s| s.seconds_ago < 128).count();
        assert_eq!(by_seconds, 128);
        assert_eq!(samples.len(), 128 + 7);
        // Each says what the total was at its moment.
        for sample in samples {
            assert_eq!(600 - sample.seconds_ago, sample.total);
        }
    }

    #[test]
    fn a_late_writer_takes_nothing_back_and_old_slots_are_forgotten() {
        let timeline = Timeline::new();
        timeline.note(10 * NANOS, 5);
        timeline.note(10 * NANOS, 4);
        assert_eq!(timeline.samples(10 * NANOS)[0].total, 5);
        let days = 3 * 86_400 * NANOS;
        assert!(timeline.samples(days).is_empty());
    }
}
