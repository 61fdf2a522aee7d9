//! Counters of one chain: what copy-on-write costs.
//!
//! All of them lie in one [`Table`] of atomics, in memory of this process or in memory that
//! outlives it ([`ChainStats::in_file`]): then the successor of a killed server goes on counting.
//! Every request is counted; of writes one in [`SAMPLE_EVERY`] is timed (see `slots`).

mod histogram;
mod slots;
mod timeline;

pub use histogram::LatencySnapshot;
pub use slots::SAMPLE_EVERY;
pub use timeline::Sample;

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use memmap2::{MmapOptions, MmapRaw};
use nix::time::ClockId;
use serde::{Deserialize, Serialize};

use self::histogram::LatencyCounts;
use self::slots::{Count, Slot, Slots};
use self::timeline::Timeline;
use crate::layer::{LayerCounters, LayerStats};
use vellum_base::block::{BLOCK_SIZE, Blocks, in_memory};
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::clock_ns;

/// Layers whose reads are told apart, counted from the bottom; those above count together.
pub const MAX_COUNTED_LAYERS: usize = 1024;

/// Bytes of a file that [`ChainStats::in_file`] uses.
pub const STATS_LEN: usize = 64 << 10;

/// Changes with the meaning of the fields of [`Table`]; its size counts too.
const LAYOUT: u64 = 0x5645_4c53_5441_0002;

/// The counters. They only ever grow.
#[derive(Debug)]
#[repr(C)]
struct Table {
    /// [`LAYOUT`] and the size, once the table has been set up.
    layout: AtomicU64,
    /// When counting began, seconds since 1970.
    since: AtomicU64,
    /// Layers below the top plus one, as `layer_reads` numbers them; 0 before the first chain.
    depth: AtomicU64,
    /// What reads and writes change.
    slots: Slots,
    rare: Rare,
    first_touch: LatencyCounts,
    steady: LatencyCounts,
    flush: LatencyCounts,
    allocated: Timeline,
    layer: LayerStats,
    layer_reads: [AtomicU64; MAX_COUNTED_LAYERS],
}

/// What seldom changes, or goes along with work that takes far longer than an atomic addition.
#[derive(Debug)]
#[repr(C, align(128))]
struct Rare {
    /// Blocks read from layers above the counted ones.
    deeper_blocks: AtomicU64,
    /// Blocks read from tops that were sealed since: they count for their layers.
    sealed_top_blocks: AtomicU64,
    discarded_bytes: AtomicU64,
    partial_copy_ups: AtomicU64,
    copied_bytes: AtomicU64,
    prewarmed_blocks: AtomicU64,
    prewarmed_bytes: AtomicU64,
    /// By writes, zeroing and prewarming.
    allocated_blocks: AtomicU64,
    /// What of it the timeline knows.
    noted_blocks: AtomicU64,
}

const _: () = assert!(size_of::<Table>() <= STATS_LEN);

const fn zero() -> AtomicU64 {
    AtomicU64::new(0)
}

impl Table {
    const fn new() -> Self {
        Table {
            layout: zero(),
            since: zero(),
            depth: zero(),
            slots: Slots::new(),
            rare: Rare {
                deeper_blocks: zero(),
                sealed_top_blocks: zero(),
                discarded_bytes: zero(),
                partial_copy_ups: zero(),
                copied_bytes: zero(),
                prewarmed_blocks: zero(),
                prewarmed_bytes: zero(),
                allocated_blocks: zero(),
                noted_blocks: zero(),
            },
            first_touch: LatencyCounts::new(),
            steady: LatencyCounts::new(),
            flush: LatencyCounts::new(),
            allocated: Timeline::new(),
            layer: LayerStats::new(),
            layer_reads: [const { AtomicU64::new(0) }; MAX_COUNTED_LAYERS],
        }
    }
}

#[derive(Debug)]
enum Memory {
    Own(Box<Table>),
    Mapped(MmapRaw),
}

/// Counters of requests, copy-ups and, through [`LayerCounters`], of the layer on top.
#[derive(Debug)]
pub struct ChainStats {
    memory: Memory,
    /// False to find out what counting costs.
    counts: bool,
}

impl Default for ChainStats {
    fn default() -> Self {
        let stats = ChainStats {
            memory: Memory::Own(Box::new(Table::new())),
            counts: true,
        };
        stats.set_up();
        stats
    }
}

impl LayerCounters for ChainStats {
    fn layer(&self) -> &LayerStats {
        &self.table().layer
    }
}

/// A counter of a slot.
type Pick = fn(&Slot) -> &Count;

/// The moment at which a request began; `None` for one that is not timed.
pub(super) type Began = Option<u64>;

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
fn now() -> u64 {
    clock_ns(ClockId::CLOCK_MONOTONIC)
}

/// By how much a counter, or a moment, is beyond another that was read before or after it, or that
/// another process left in memory: nothing where it is not, as threads go on counting meanwhile.
fn beyond(number: u64, other: u64) -> u64 {
    number.saturating_sub(other)
}

fn add(counter: &AtomicU64, amount: u64) -> u64 {
    counter.fetch_add(amount, Relaxed) + amount
}

impl ChainStats {
    /// Counters that count nothing but flushes, to measure what counting costs.
    pub fn off() -> Self {
        ChainStats {
            counts: false,
            ..ChainStats::default()
        }
    }

    /// Counters in [`STATS_LEN`] bytes of `file` from `offset` (a multiple of the page size), which
    /// go on from what an earlier process counted there. What is no table of ours becomes one.
    ///
    /// The file is memory (a memfd) that nobody shortens.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Io`] where it cannot be mapped.
    pub fn in_file(file: &File, offset: u64) -> Result<Self> {
        let map = MmapOptions::new()
            .offset(offset)
            .len(STATS_LEN)
            .map_raw(file)
            .context(|| "the memory of the counters cannot be mapped")?;
        let stats = ChainStats {
            memory: Memory::Mapped(map),
            counts: true,
        };
        stats.set_up();
        Ok(stats)
    }

    /// The same counters, or none of them.
    #[must_use]
    pub fn counting(self, counts: bool) -> Self {
        ChainStats { counts, ..self }
    }

    fn table(&self) -> &Table {
        match &self.memory {
            Memory::Own(table) => table,
            Memory::Mapped(map) => {
                let table = map.as_mut_ptr().cast::<Table>();
                assert!(!table.is_null(), "a mapping without an address");
                // SAFETY: the mapping is not null, as asserted; it is STATS_LEN bytes, page aligned
                // and lives as long as `self`; a `Table` is smaller, consists of atomics alone and
                // every bit pattern is one. The file is never shortened.
                unsafe { &*table }
            }
        }
    }

    /// Makes a table of what is none. One process at a time has a chain open, so nobody else does.
    fn set_up(&self) {
        let table = self.table();
        let layout = LAYOUT ^ ((size_of::<Table>() as u64) << 32);
        if table.layout.load(Ordering::Acquire) == layout {
            return;
        }
        if let Memory::Mapped(map) = &self.memory {
            let words = map.as_mut_ptr().cast::<AtomicU64>();
            assert!(!words.is_null(), "a mapping without an address");
            // SAFETY: as in `table`; STATS_LEN is a multiple of 8.
            let words = unsafe { std::slice::from_raw_parts(words, STATS_LEN / 8) };
            words.iter().for_each(|word| word.store(0, Relaxed));
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        table
            .since
            .store(since.map_or(0, |since| since.as_secs()), Relaxed);
        table.layout.store(layout, Ordering::Release);
    }

    /// Tells how many layers are below the top now. Where a commit has put the old top there, what
    /// was read from it counts for its new place.
    pub(super) fn set_depth(&self, depth: usize) {
        let table = self.table();
        let before = table.depth.swap(depth as u64 + 1, Relaxed);
        if before == 0 || before == depth as u64 + 1 {
            return;
        }
        // Not taken off the slots, which other threads may write.
        let all = table.slots.sum(|slot| &slot.top_blocks);
        let blocks = beyond(all, table.rare.sealed_top_blocks.swap(all, Relaxed));
        if before <= depth as u64 {
            self.layer_read(in_memory(before - 1), blocks);
        } else {
            // Another chain took the place of the first: its layers are not those.
            let layers = table.layer_reads.iter();
            layers.for_each(|count| count.store(0, Relaxed));
        }
    }

    /// Counts blocks read from the sealed layer with a number.
    fn layer_read(&self, number: usize, blocks: u64) {
        let table = self.table();
        add(
            table
                .layer_reads
                .get(number)
                .unwrap_or(&table.rare.deeper_blocks),
            blocks,
        );
    }

    /// Adds to counters of this thread.
    fn count<const N: usize>(&self, amounts: [(Pick, u64); N]) {
        let (slot, adder) = self.table().slots.own();
        for (counter, amount) in amounts {
            adder.add(counter(slot), amount);
        }
    }

    /// Counts a read request.
    pub(super) fn read(&self, bytes: u64) {
        if self.counts {
            self.count([(|slot| &slot.reads, 1), (|slot| &slot.read_bytes, bytes)]);
        }
    }

    /// Counts blocks that the top answered for.
    pub(super) fn read_from_top(&self, blocks: Blocks) {
        if self.counts {
            self.count([(|slot| &slot.top_blocks, blocks.get())]);
        }
    }

    /// Counts blocks that a sealed layer answered for; `None` for zeros, which no layer holds.
    pub(super) fn read_from(&self, layer: Option<u32>, blocks: Blocks) {
        if self.counts {
            match layer {
                Some(number) => self.layer_read(number as usize, blocks.get()),
                None => self.count([(|slot| &slot.zero_blocks, blocks.get())]),
            }
        }
    }

    /// The moment at which a write begins, if it is one of those that are timed.
    pub(super) fn begin(&self) -> Began {
        (self.counts && slots::is_sampled()).then(now)
    }

    /// Counts a write request that allocated so many blocks and is done.
    pub(super) fn wrote(&self, began: Began, bytes: u64, allocated: Blocks) {
        if !self.counts {
            return;
        }
        let table = self.table();
        if allocated.is_none() {
            self.count([
                (|slot| &slot.steady_writes, 1),
                (|slot| &slot.written_bytes, bytes),
            ]);
        } else {
            self.count([
                (|slot| &slot.first_touch_writes, 1),
                (|slot| &slot.written_bytes, bytes),
            ]);
            add(&table.rare.allocated_blocks, allocated.get());
        }
        if let Some(began) = began {
            let now = now();
            let nanos = beyond(now, began);
            if allocated.is_none() {
                table.steady.record(nanos);
            } else {
                table.first_touch.record(nanos);
                self.note_allocated(now);
            }
        }
    }

    /// Brings the timeline up to date: with a timed write, a flush, a snapshot.
    fn note_allocated(&self, now: u64) {
        let table = self.table();
        let total = table.rare.allocated_blocks.load(Relaxed);
        if table.rare.noted_blocks.load(Relaxed) != total {
            table.rare.noted_blocks.store(total, Relaxed);
            table.allocated.note(now, total);
        }
    }

    /// Counts bytes that went into the data file of the top.
    pub(super) fn stored(&self, bytes: u64) {
        if self.counts {
            self.count([(|slot| &slot.stored_bytes, bytes)]);
        }
    }

    /// Counts a block of which a client wrote a part and a layer below gave the rest.
    pub(super) fn copied_up(&self, bytes: u64) {
        if self.counts {
            let rare = &self.table().rare;
            add(&rare.partial_copy_ups, 1);
            add(&rare.copied_bytes, bytes);
        }
    }

    /// Counts blocks that were copied up ahead of traffic, `copied` of them from a layer below.
    pub(super) fn prewarmed(&self, copied: u64, zeroed: u64) {
        if self.counts && copied + zeroed > 0 {
            let rare = &self.table().rare;
            add(&rare.prewarmed_blocks, copied + zeroed);
            add(&rare.prewarmed_bytes, copied * BLOCK_SIZE);
            add(&rare.allocated_blocks, copied + zeroed);
            self.note_allocated(now());
        }
    }

    /// Counts blocks that zeroing allocated: its ends, which are written.
    pub(super) fn zeroed(&self, bytes: u64, allocated: Blocks) {
        if self.counts {
            let rare = &self.table().rare;
            add(&rare.discarded_bytes, bytes);
            if !allocated.is_none() {
                add(&rare.allocated_blocks, allocated.get());
                self.note_allocated(now());
            }
        }
    }

    /// The moment at which a flush begins. Flushes are all timed: they take far longer than a
    /// reading of the clock.
    pub(super) fn begin_flush(&self) -> Began {
        self.counts.then(now)
    }

    /// Counts a flush request that is done.
    pub(super) fn flushed(&self, began: Began) {
        if let Some(began) = began {
            let now = now();
            self.table().flush.record(beyond(now, began));
            self.note_allocated(now);
        }
    }

    /// The counters now.
    pub fn snapshot(&self) -> ChainStatsSnapshot {
        let table = self.table();
        let now = now();
        self.note_allocated(now);
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let depth = in_memory(beyond(get(&table.depth), 1));
        let layers = table.layer_reads.iter().take(depth);
        let (slots, rare) = (&table.slots, &table.rare);
        let first_touch_writes = slots.sum(|slot| &slot.first_touch_writes);
        let steady_writes = slots.sum(|slot| &slot.steady_writes);
        let top_blocks = slots.sum(|slot| &slot.top_blocks);
        let prewarmed_blocks = get(&rare.prewarmed_blocks);
        ChainStatsSnapshot {
            since: get(&table.since),
            reads: slots.sum(|slot| &slot.reads),
            read_bytes: slots.sum(|slot| &slot.read_bytes),
            top_read_blocks: beyond(top_blocks, get(&rare.sealed_top_blocks)),
            zero_read_blocks: slots.sum(|slot| &slot.zero_blocks),
            layer_read_blocks: layers.map(get).collect(),
            deeper_read_blocks: get(&rare.deeper_blocks),
            writes: first_touch_writes + steady_writes,
            first_touch_writes,
            steady_writes,
            written_bytes: slots.sum(|slot| &slot.written_bytes),
            stored_bytes: slots.sum(|slot| &slot.stored_bytes) + get(&rare.prewarmed_bytes),
            first_touch_blocks: beyond(get(&rare.allocated_blocks), prewarmed_blocks),
            partial_copy_ups: get(&rare.partial_copy_ups),
            copied_bytes: get(&rare.copied_bytes),
            prewarmed_blocks,
            discarded_bytes: get(&rare.discarded_bytes),
            first_touch: table.first_touch.snapshot(),
            steady: table.steady.snapshot(),
            flush: table.flush.snapshot(),
            allocated: table.allocated.samples(now),
        }
    }
}

/// The counters at one moment. What a server of an older version does not count is 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChainStatsSnapshot {
    /// When counting began: seconds since 1970.
    pub since: u64,
    /// Read requests.
    pub reads: u64,
    /// Bytes that clients read.
    pub read_bytes: u64,
    /// Blocks that reads got from the top layer (parts of a block count as one).
    pub top_read_blocks: u64,
    /// Blocks that reads found to be zero without any layer's data.
    pub zero_read_blocks: u64,
    /// Blocks that reads got from each sealed layer, from the bottom up.
    pub layer_read_blocks: Vec<u64>,
    /// Blocks from layers above the first [`MAX_COUNTED_LAYERS`].
    pub deeper_read_blocks: u64,
    /// Write requests that were carried out.
    pub writes: u64,
    /// Of those, writes that allocated a block.
    pub first_touch_writes: u64,
    /// Of those, writes that found all their blocks allocated.
    pub steady_writes: u64,
    /// Bytes that clients wrote.
    pub written_bytes: u64,
    /// Bytes that went into data files for that: whole blocks at a first touch. Copied up ahead of
    /// traffic included.
    pub stored_bytes: u64,
    /// Blocks that a write allocated in the top layer.
    pub first_touch_blocks: u64,
    /// Of those, blocks that a client wrote in part and that were filled up from a layer below
    /// (4096 bytes read each).
    pub partial_copy_ups: u64,
    /// The bytes that they were filled up with.
    pub copied_bytes: u64,
    /// Blocks that were copied up ahead of traffic.
    pub prewarmed_blocks: u64,
    /// Bytes that clients discarded or zeroed.
    pub discarded_bytes: u64,
    /// How long writes took that allocated a block, a flush for a durable write left out; of one in
    /// [`SAMPLE_EVERY`].
    pub first_touch: LatencySnapshot,
    /// How long writes took that found all their blocks allocated; of one in [`SAMPLE_EVERY`].
    pub steady: LatencySnapshot,
    /// How long flush requests took, all of them.
    pub flush: LatencySnapshot,
    /// Blocks allocated since counting began (freed ones not taken off), over time.
    pub allocated: Vec<Sample>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(STATS_LEN as u64).unwrap();
        file
    }

    #[test]
    fn a_successor_goes_on_with_what_was_counted() {
        let file = memfd();
        let first = ChainStats::in_file(&file, 0).unwrap();
        first.set_depth(2);
        first.read(4096);
        first.read_from(Some(1), Blocks::new(1));
        first.wrote(first.begin(), 100, Blocks::new(1));
        let before = first.snapshot();
        drop(first);
        let second = ChainStats::in_file(&file, 0).unwrap();
        second.set_depth(2);
        assert_eq!(second.snapshot(), before);
        second.wrote(second.begin(), 100, Blocks::new(0));
        assert_eq!(second.snapshot().writes, 2);
        assert_eq!(second.snapshot().layer_read_blocks, [0, 1]);
    }

    #[test]
    fn memory_of_another_layout_starts_from_zero() {
        use std::os::unix::fs::FileExt;
        let file = memfd();
        file.write_all_at(&[0xff; STATS_LEN], 0).unwrap();
        let stats = ChainStats::in_file(&file, 0).unwrap();
        let snapshot = stats.snapshot();
        assert_eq!((snapshot.writes, snapshot.reads), (0, 0));
        assert!(snapshot.allocated.is_empty());
    }

    #[test]
    fn reads_of_a_top_that_was_sealed_count_for_its_place_below() {
        let stats = ChainStats::default();
        stats.set_depth(1);
        stats.read_from(Some(0), Blocks::new(3));
        stats.read_from_top(Blocks::new(5));
        stats.set_depth(2);
        stats.read_from_top(Blocks::new(1));
        let snapshot = stats.snapshot();
        assert_eq!(snapshot.layer_read_blocks, [3, 5]);
        assert_eq!(snapshot.top_read_blocks, 1);
    }

    #[test]
    fn every_write_is_counted_and_one_in_sixteen_timed() {
        let stats = ChainStats::default();
        for _ in 0..16_000 {
            let began = stats.begin();
            stats.stored(4096);
            stats.wrote(began, 100, Blocks::new(1));
            stats.wrote(stats.begin(), 50, Blocks::new(0));
        }
        stats.flushed(stats.begin_flush());
        let snapshot = stats.snapshot();
        assert_eq!(snapshot.writes, 32_000);
        assert_eq!(snapshot.first_touch_writes, 16_000);
        assert_eq!(snapshot.steady_writes, 16_000);
        assert_eq!(snapshot.first_touch_blocks, 16_000);
        assert_eq!(snapshot.written_bytes, 16_000 * 150);
        assert_eq!(snapshot.stored_bytes, 16_000 * 4096);
        for timed in [snapshot.first_touch.count, snapshot.steady.count] {
            assert!((800..1200).contains(&timed), "{timed} of 16000 were timed");
        }
        assert_eq!(snapshot.flush.count, 1);
        // Those that came after the last timed one as well.
        assert_eq!(snapshot.allocated.last().unwrap().total, 16_000);
    }

    #[test]
    fn layers_beyond_the_counted_ones_count_together() {
        let stats = ChainStats::default();
        stats.set_depth(MAX_COUNTED_LAYERS + 10);
        stats.read_from(Some(MAX_COUNTED_LAYERS as u32 + 3), Blocks::new(2));
        stats.read_from(Some(MAX_COUNTED_LAYERS as u32 + 4), Blocks::new(2));
        let snapshot = stats.snapshot();
        assert_eq!(snapshot.layer_read_blocks.len(), MAX_COUNTED_LAYERS);
        assert_eq!(snapshot.deeper_read_blocks, 4);
    }

    #[test]
    fn counters_that_are_off_count_nothing() {
        let stats = ChainStats::off();
        stats.read(1);
        stats.read_from_top(Blocks::new(1));
        stats.wrote(stats.begin(), 1, Blocks::new(1));
        stats.flushed(stats.begin_flush());
        let snapshot = stats.snapshot();
        assert_eq!((snapshot.reads, snapshot.writes), (0, 0));
        assert_eq!(snapshot.flush.count, 0);
    }
}
