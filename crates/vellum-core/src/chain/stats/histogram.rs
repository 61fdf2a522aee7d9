//! Latencies in buckets that several processes can count in.
//!
//! The `hdrhistogram` crate counts in memory of one process and behind `&mut`; here the buckets are
//! atomics of fixed place and number, and [`LatencySnapshot::histogram`] makes one of that crate's
//! histograms of them, which knows about percentiles.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use vellum_base::block::in_memory;
use vellum_base::error::{Error, ErrorKind, Result};

/// Each power of two is cut into 2^5 buckets: a bucket is at most 3.2 % wide.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
/// Latencies from 2^36 ns (69 s) on count as that.
const MAX_BITS: u32 = 36;
const BUCKETS: usize = SUB + (MAX_BITS - SUB_BITS) as usize * SUB;

/// Counts of latencies in nanoseconds, relaxed.
#[derive(Debug)]
#[repr(C)]
pub(super) struct LatencyCounts {
    sum: AtomicU64,
    max: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// The bucket of a latency.
fn bucket_of(nanos: u64) -> usize {
    if nanos < SUB as u64 {
        return in_memory(nanos);
    }
    let nanos = nanos.min((1 << MAX_BITS) - 1);
    let shift = nanos.ilog2() - SUB_BITS;
    // The highest bit is always set, so the next five say which.
    (shift as usize + 1) * SUB + (in_memory(nanos >> shift) - SUB)
}

/// The largest latency of a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = bucket / SUB - 1;
    (((SUB + bucket % SUB + 1) as u64) << shift) - 1
}

impl LatencyCounts {
    pub(super) const fn new() -> Self {
        LatencyCounts {
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "`bucket_of` counts everything that is longer in the last"
    )]
    pub(super) fn record(&self, nanos: u64) {
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
        // Seldom true, and then a race costs nothing but a second try.
        if nanos > self.max.load(Relaxed) {
            self.max.fetch_max(nanos, Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> LatencySnapshot {
        let buckets: Vec<(u64, u64)> = self
            .buckets
            .iter()
            .enumerate()
            .map(|(at, count)| (bucket_end(at), count.load(Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect();
        LatencySnapshot {
            count: buckets.iter().map(|(_, count)| count).sum(),
            sum_ns: self.sum.load(Relaxed),
            max_ns: self.max.load(Relaxed),
            buckets,
        }
    }
}

/// Latencies at one moment, in nanoseconds. Another process may have sent them, so its numbers are any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySnapshot {
    /// How many were measured.
    pub count: u64,
    /// All of them added up.
    pub sum_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// (the bucket's largest latency, how many lie in the bucket), ascending; empty ones are left
    /// out. A bucket is at most 3.2 % wide.
    pub buckets: Vec<(u64, u64)>,
}

impl LatencySnapshot {
    /// The same as a histogram of the `hdrhistogram` crate, which answers for percentiles.
    ///
    /// # Errors
    /// Never for these bounds; the crate's constructor checks them.
    pub fn histogram(&self) -> Result<Histogram<u64>> {
        let mut histogram = Histogram::new_with_max(1 << MAX_BITS, 3)
            .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "a histogram", error))?;
        for &(end, count) in &self.buckets {
            // Ours are within the bounds; another's count as the largest there is.
            histogram.saturating_record_n(end.min(self.max_ns), count);
        }
        Ok(histogram)
    }

    /// How many lasted at most `nanos`: a Prometheus bucket. Exact to the width of a bucket.
    pub fn count_up_to(&self, nanos: u64) -> u64 {
        self.buckets
            .iter()
            .take_while(|(end, _)| *end <= nanos)
            // Ours never come to that many.
            .fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_latency_without_gaps_and_narrowly() {
        let mut last = None;
        for nanos in (0..100_000u64).chain((17..36).flat_map(|bit| {
            let at = 1u64 << bit;
            [at - 1, at, at + 1, at + at / 3]
        })) {
            let bucket = bucket_of(nanos);
            let end = bucket_end(bucket);
            assert!(end >= nanos && bucket < BUCKETS, "{nanos}");
            assert!(end - nanos <= nanos / 31, "{nanos} counts as {end}");
            assert!(last.is_none_or(|last| bucket == last || bucket == last + 1) || nanos > 99_999);
            last = Some(bucket);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_end(BUCKETS - 1), (1 << MAX_BITS) - 1);
    }

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let counts = LatencyCounts::new();
        for micros in 1..=1000u64 {
            counts.record(micros * 1000);
        }
        let snapshot = counts.snapshot();
        assert_eq!(snapshot.count, 1000);
        assert_eq!(snapshot.max_ns, 1_000_000);
        assert_eq!(snapshot.sum_ns, 500_500_000);
        let histogram = snapshot.histogram().unwrap();
        for (quantile, expected) in [(0.5, 500_000.0), (0.99, 990_000.0)] {
            let found = histogram.value_at_quantile(quantile) as f64;
            assert!((found / expected - 1.0).abs() < 0.04, "{quantile}: {found}");
        }
        assert_eq!(snapshot.count_up_to(u64::MAX), 1000);
        let half = snapshot.count_up_to(500_000);
        assert!((480..=500).contains(&half), "{half}");
    }
}
