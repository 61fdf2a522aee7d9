//! The map of a writable layer in memory, and how it differs from the durable one.

use super::STATE_DATA;
use super::index::{Index, ValueRun};
use super::live::{Live, LiveChange};

/// A change of state that is not yet in the journal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) start: u64,
    pub(super) len: u64,
    /// Index values.
    pub(super) old: u32,
    pub(super) new: u32,
}

/// Blocks whose bytes changed since the last flush.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Runs in the order they were written; complete unless `many`.
    pub(super) runs: Vec<(u64, u64)>,
    pub(super) blocks: u64,
    /// More than a journal record would carry: only a sync of the data file will do.
    pub(super) many: bool,
    /// Of those, what nobody has started on its way to the disk.
    waiting: u64,
}

/// Blocks that are worth being sent to the disk ahead of the sync that they will need.
const WRITE_BACK_BLOCKS: u64 = 512;

impl Dirty {
    pub(super) fn add(&mut self, start: u64, len: u64, limit: u64) {
        if self.many {
            self.waiting += len;
            return;
        }
        self.blocks += len;
        if self.blocks > limit {
            self.many = true;
            self.runs = Vec::new();
        } else {
            self.runs.push((start, len));
        }
    }

    /// Something changed, and nobody knows what.
    pub(super) fn add_unknown(&mut self) {
        self.blocks += 1;
        self.many = true;
        self.runs = Vec::new();
    }

    /// True once for every [`WRITE_BACK_BLOCKS`] of blocks that will need a sync of the data file.
    pub(super) fn write_back_due(&mut self) -> bool {
        let due = self.waiting >= WRITE_BACK_BLOCKS;
        if due {
            self.waiting = 0;
        }
        due
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The blocks of the runs, each once, in order.
    pub(super) fn distinct_blocks(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self
            .runs
            .iter()
            .flat_map(|&(start, len)| start..start + len)
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

/// The map as clients see it, and how it differs from the durable one.
#[derive(Debug, Default)]
pub(super) struct MapState {
    /// [`STATE_DATA`] and [`super::STATE_ZERO`] by block.
    pub(super) index: Index,
    /// Changes since the last flush began.
    pub(super) changes: Vec<Change>,
    /// Changes in records that were written ahead of a flush, and are not durable yet. Older than
    /// all others here.
    pub(super) ahead: Vec<Change>,
    /// Changes that a flush is writing to the journal now.
    pub(super) in_flight: Vec<Change>,
    pub(super) dirty: Dirty,
    pub(super) data_blocks: u64,
    /// Changes ever since the layer was opened.
    pub(super) changed: u64,
    /// Changes that are not durable, for our successor.
    pub(super) live: Option<Live>,
}

impl MapState {
    /// Goes on where a process of this boot died: what it told clients of holds.
    pub(super) fn take_over(&mut self, left: &[LiveChange], blocks: u64) {
        for change in left {
            if let Some(new) = change.what.value()
                && change
                    .start
                    .checked_add(change.len)
                    .is_some_and(|end| end <= blocks)
            {
                let there = self.index.run_at(change.start, change.len);
                self.change(there, change.len, new);
            }
        }
        // What it wrote in place without a flush nobody knows.
        self.dirty.add_unknown();
    }

    /// Sets `len` blocks to one state and remembers what changed; `first` is the run that begins
    /// there, at most that long. Returns the number of blocks that changed.
    pub(super) fn change(&mut self, first: ValueRun, len: u64, new: u32) -> u64 {
        let end = first.start + len;
        let mut changed = self.change_run(first, new);
        let mut at = first.start + first.len;
        while at < end {
            let run = self.index.run_at(at, end - at);
            changed += self.change_run(run, new);
            at += run.len;
        }
        changed
    }

    /// As [`MapState::change`], for one run.
    fn change_run(&mut self, run: ValueRun, new: u32) -> u64 {
        if run.value == new {
            return 0;
        }
        if run.value == STATE_DATA {
            self.data_blocks -= run.len;
        }
        if new == STATE_DATA {
            self.data_blocks += run.len;
        }
        // A sequential writer makes one change of many.
        match self.changes.last_mut() {
            Some(last)
                if last.start + last.len == run.start
                    && (last.old, last.new) == (run.value, new) =>
            {
                last.len += run.len;
            }
            _ => {
                self.changed += 1;
                self.changes.push(Change {
                    start: run.start,
                    len: run.len,
                    old: run.value,
                    new,
                });
            }
        }
        self.index.set(run.start, run.len, new);
        run.len
    }
}
