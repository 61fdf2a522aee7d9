//! Counters of one writable layer: what durability cost.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Counters that only ever grow. They consist of atomics alone, so that they can lie in memory that
/// outlives the process: see [`LayerCounters`].
#[derive(Debug, Default)]
#[repr(C)]
pub struct LayerStats {
    pub(super) flushes: Counter,
    pub(super) flushes_coalesced: Counter,
    pub(super) flushes_empty: Counter,
    pub(super) data_syncs: Counter,
    pub(super) journal_writes: Counter,
    pub(super) journal_bytes: Counter,
    pub(super) checkpoints: Counter,
    pub(super) checkpoint_bytes: Counter,
    pub(super) journal_waits: Counter,
    pub(super) records_ahead: Counter,
    pub(super) journal_syncs: Counter,
}

/// Whoever keeps the counters of a layer; by default the layer itself, from when it is opened.
pub trait LayerCounters: Send + Sync + std::fmt::Debug {
    /// The counters.
    fn layer(&self) -> &LayerStats;
}

impl LayerCounters for LayerStats {
    fn layer(&self) -> &LayerStats {
        self
    }
}

/// Where a layer counts.
#[derive(Debug, Clone)]
pub(super) struct StatsHandle(pub(super) Arc<dyn LayerCounters>);

impl Deref for StatsHandle {
    type Target = LayerStats;

    fn deref(&self) -> &LayerStats {
        self.0.layer()
    }
}

/// One relaxed counter.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStatsSnapshot {
    /// Flush calls.
    pub flushes: u64,
    /// Flush calls that another's work covered.
    pub flushes_coalesced: u64,
    /// Flushes that had nothing to do.
    pub flushes_empty: u64,
    /// fdatasync calls on data files.
    pub data_syncs: u64,
    /// Journal records written, the synchronous ones and those ahead of a flush.
    pub journal_writes: u64,
    /// Bytes of them.
    pub journal_bytes: u64,
    /// Checkpoints of the map.
    pub checkpoints: u64,
    /// Bytes of them.
    #[serde(default)]
    pub checkpoint_bytes: u64,
    /// Flushes that had to wait for a checkpoint to free a journal area.
    pub journal_waits: u64,
    /// Of the journal records, those written ahead of a flush.
    #[serde(default)]
    pub records_ahead: u64,
    /// fdatasync calls on the journal, which made such records durable.
    #[serde(default)]
    pub journal_syncs: u64,
}

impl LayerStatsSnapshot {
    /// Operations that waited until the disk had everything: syncs, and synchronous writes.
    pub fn synchronous_operations(&self) -> u64 {
        // The counters are read one after the other while they grow: the second may be ahead.
        let written = self.journal_writes.saturating_sub(self.records_ahead);
        // Another process may have sent them: then they are any.
        let syncs = self.data_syncs.saturating_add(self.journal_syncs);
        syncs.saturating_add(written)
    }
}

impl LayerStats {
    /// Counters that are all zero.
    pub const fn new() -> Self {
        LayerStats {
            flushes: Counter::new(),
            flushes_coalesced: Counter::new(),
            flushes_empty: Counter::new(),
            data_syncs: Counter::new(),
            journal_writes: Counter::new(),
            journal_bytes: Counter::new(),
            checkpoints: Counter::new(),
            checkpoint_bytes: Counter::new(),
            journal_waits: Counter::new(),
            records_ahead: Counter::new(),
            journal_syncs: Counter::new(),
        }
    }

    /// The counters now.
    pub fn snapshot(&self) -> LayerStatsSnapshot {
        LayerStatsSnapshot {
            flushes: self.flushes.get(),
            flushes_coalesced: self.flushes_coalesced.get(),
            flushes_empty: self.flushes_empty.get(),
            data_syncs: self.data_syncs.get(),
            journal_writes: self.journal_writes.get(),
            journal_bytes: self.journal_bytes.get(),
            checkpoints: self.checkpoints.get(),
            checkpoint_bytes: self.checkpoint_bytes.get(),
            journal_waits: self.journal_waits.get(),
            records_ahead: self.records_ahead.get(),
            journal_syncs: self.journal_syncs.get(),
        }
    }
}
