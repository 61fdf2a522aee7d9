//! Counters of one chain: what copy-on-write costs.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Counters that only ever grow, relaxed; they start at zero when the chain is opened.
#[derive(Debug, Default)]
pub struct ChainStats {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) first_touch_blocks: AtomicU64,
    pub(super) partial_copy_ups: AtomicU64,
    pub(super) discarded_bytes: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainStatsSnapshot {
    /// Read requests.
    pub reads: u64,
    /// Bytes that clients read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes that clients wrote.
    pub written_bytes: u64,
    /// Blocks that a write allocated in the top layer.
    pub first_touch_blocks: u64,
    /// Of those, blocks that were filled up from the parent (4096 bytes read each).
    pub partial_copy_ups: u64,
    /// Bytes that clients discarded or zeroed.
    pub discarded_bytes: u64,
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl ChainStats {
    /// The counters now.
    pub fn snapshot(&self) -> ChainStatsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ChainStatsSnapshot {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            first_touch_blocks: get(&self.first_touch_blocks),
            partial_copy_ups: get(&self.partial_copy_ups),
            discarded_bytes: get(&self.discarded_bytes),
        }
    }
}
