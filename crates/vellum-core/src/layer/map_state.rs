//! The map of a writable layer in memory, and how it differs from the durable one: what a flush
//! freezes, and what becomes of that.

use super::index::Index;
use super::live::{Live, LiveChange};
use super::prealloc::Windows;
use vellum_base::block::{
    BLOCK_SIZE, Block, BlockState, Blocks, MAX_VIRTUAL_SIZE, Run, Span, push_run,
};

/// How the state of blocks changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Became {
    pub(super) old: BlockState,
    pub(super) new: BlockState,
}

/// A change of state that is not yet in the journal.
pub(super) type Change = Run<Became>;

/// How many blocks' bytes changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// None.
    Nothing,
    /// So few that a record can carry them.
    Few(Blocks),
    /// More than a record would carry, or it is not known which: only a sync of the data files will
    /// do.
    Many,
}

/// Blocks whose bytes changed since the last flush.
#[derive(Debug, Default)]
struct Dirty {
    /// Runs in the order they were written; complete unless `many`.
    runs: Vec<Span>,
    blocks: Blocks,
    /// As [`Written::Many`].
    many: bool,
    /// Of those, what has not been started on its way to the disk.
    waiting: Blocks,
}

/// So many entries more than changes the largest layer takes, since an entry says 2^32 blocks at most.
const MORE_ENTRIES: usize = (MAX_VIRTUAL_SIZE / BLOCK_SIZE / u32::MAX as u64) as usize;

/// Blocks that are worth being sent to the disk ahead of the sync that they will need.
const WRITE_BACK_BLOCKS: Blocks = Blocks::new(512);

impl Dirty {
    fn add(&mut self, span: Span, limit: Blocks) {
        if self.many {
            self.waiting += span.len();
            return;
        }
        self.blocks += span.len();
        if self.blocks > limit {
            self.many = true;
            self.runs = Vec::new();
        } else {
            self.runs.push(span);
        }
    }

    fn add_unknown(&mut self) {
        self.blocks += Blocks::ONE;
        self.many = true;
        self.runs = Vec::new();
    }

    fn is_empty(&self) -> bool {
        self.blocks.is_none()
    }

    /// How many blocks, where `few` of them are distinct.
    fn written(&self, few: Blocks) -> Written {
        match (self.is_empty(), self.many) {
            (true, _) => Written::Nothing,
            (false, true) => Written::Many,
            (false, false) => Written::Few(few),
        }
    }

    /// The blocks of the runs, each once, in order.
    fn distinct_blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.runs.iter().flat_map(|run| run.blocks()).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

/// What a flush, or a record ahead of one, is about: taken out of a [`MapState`], to which it goes
/// back, by [`MapState::settle`] or by [`MapState::thaw`].
#[derive(Debug)]
#[must_use]
pub(super) struct Frozen {
    dirty: Dirty,
    /// Until they are taken, to become a record.
    changes: Vec<Change>,
    /// So many they are.
    len: usize,
    /// For a record ahead.
    ahead: bool,
}

impl Frozen {
    /// The changes of the map, in order.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// The blocks whose bytes changed, in order, where they are few.
    pub(super) fn blocks(&self) -> Vec<Block> {
        match self.dirty.many {
            true => Vec::new(),
            false => self.dirty.distinct_blocks(),
        }
    }

    /// How many blocks' bytes changed, of which `distinct` are what [`Frozen::blocks`] says.
    pub(super) fn written(&self, distinct: Blocks) -> Written {
        self.dirty.written(distinct)
    }
}

/// The map as clients see it, and how it differs from the durable one.
#[derive(Debug, Default)]
pub(super) struct MapState {
    /// The state of each block.
    index: Index,
    /// Changes since the last flush began.
    changes: Vec<Change>,
    /// Changes in records that were written ahead of a flush, and are not durable yet. Older than
    /// all others here.
    ahead: Vec<Change>,
    /// Changes that a flush is writing to the journal now.
    in_flight: Vec<Change>,
    dirty: Dirty,
    data_blocks: Blocks,
    /// Changes ever since the layer was opened.
    changed: u64,
    /// Bytes were written since then, or may have been.
    is_written: bool,
    preallocated: Windows,
    /// The log of changes, for our successor: of those that are not durable.
    log: Option<Live>,
}

impl MapState {
    /// The map of a layer that was recovered; `data_blocks` are the data blocks of `index`.
    pub(super) fn new(index: Index, data_blocks: Blocks) -> Self {
        MapState {
            index,
            data_blocks,
            ..MapState::default()
        }
    }

    /// The state of each block.
    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    pub(super) fn data_blocks(&self) -> Blocks {
        self.data_blocks
    }

    /// What takes space on the host and is not data.
    pub(super) fn preallocated(&self) -> &Windows {
        &self.preallocated
    }

    pub(super) fn preallocated_mut(&mut self) -> &mut Windows {
        &mut self.preallocated
    }

    /// Changes ever since the layer was opened.
    pub(super) fn changed(&self) -> u64 {
        self.changed
    }

    /// The log of changes, if there is one.
    pub(super) fn log(&self) -> Option<&Live> {
        self.log.as_ref()
    }

    pub(super) fn log_mut(&mut self) -> Option<&mut Live> {
        self.log.as_mut()
    }

    /// Has changes noted in `log` from now on, or nowhere.
    pub(super) fn set_log(&mut self, log: Option<Live>) {
        assert!(
            log.is_some() || self.changes.is_empty(),
            "changes that a successor would not know"
        );
        self.log = log;
    }

    /// Whether nothing changed since the last flush began.
    pub(super) fn is_clean(&self) -> bool {
        self.changes.is_empty() && self.dirty.is_empty()
    }

    /// Whether the layer is as it was opened, which is durable.
    pub(super) fn is_untouched(&self) -> bool {
        self.changed == 0 && !self.is_written
    }

    /// The bytes of blocks changed; a record carries `limit` of them at most.
    pub(super) fn wrote(&mut self, span: Span, limit: Blocks) {
        self.is_written = true;
        self.dirty.add(span, limit);
        self.debug_assert_sound();
    }

    /// Bytes changed, and it is not known which.
    pub(super) fn wrote_something(&mut self) {
        self.is_written = true;
        self.dirty.add_unknown();
    }

    /// True once for every [`WRITE_BACK_BLOCKS`] of blocks that will need a sync of the data file.
    pub(super) fn write_back_due(&mut self) -> bool {
        let due = self.dirty.waiting >= WRITE_BACK_BLOCKS;
        if due {
            self.dirty.waiting = Blocks::NONE;
        }
        due
    }

    /// What [`MapState::freeze`] would freeze now, at most: map changes as a record would say them,
    /// and blocks.
    pub(super) fn pending(&self) -> (usize, Written) {
        // One that lies within another parts it, and one of more blocks than an entry can say takes
        // several.
        let entries = 2 * self.changes.len() + MORE_ENTRIES;
        (entries, self.dirty.written(self.dirty.blocks))
    }

    /// Takes what changed so far for a flush.
    pub(super) fn freeze(&mut self) -> Frozen {
        assert!(self.in_flight.is_empty(), "two flushes at a time");
        self.in_flight = std::mem::take(&mut self.changes);
        if let Some(log) = &mut self.log {
            log.freeze();
        }
        self.frozen(self.in_flight.clone(), false)
    }

    /// Takes what changed so far for a record ahead.
    pub(super) fn freeze_ahead(&mut self) -> Frozen {
        let changes = std::mem::take(&mut self.changes);
        self.ahead.extend_from_slice(&changes);
        self.frozen(changes, true)
    }

    fn frozen(&mut self, changes: Vec<Change>, ahead: bool) -> Frozen {
        self.debug_assert_sound();
        Frozen {
            dirty: std::mem::take(&mut self.dirty),
            len: changes.len(),
            changes,
            ahead,
        }
    }

    /// What was frozen is neither written nor durable: the next flush has to do it.
    pub(super) fn thaw(&mut self, frozen: Frozen) {
        let changes = if frozen.ahead {
            // A flush makes durable what is ahead, and none runs meanwhile.
            assert!(self.ahead.len() >= frozen.len, "durable, and not written");
            self.ahead.split_off(self.ahead.len() - frozen.len)
        } else {
            std::mem::take(&mut self.in_flight)
        };
        assert_eq!(changes.len(), frozen.len, "other changes than were frozen");
        let newer = std::mem::replace(&mut self.changes, changes);
        self.changes.extend(newer);
        self.dirty.blocks += frozen.dirty.blocks;
        if !frozen.dirty.is_empty() {
            self.dirty.many = true;
            self.dirty.runs = Vec::new();
        }
        self.debug_assert_sound();
    }

    /// What was frozen for a flush is durable; what was for a record ahead is written.
    pub(super) fn settle(&mut self, frozen: Frozen) {
        if frozen.ahead {
            return;
        }
        assert_eq!(self.in_flight.len(), frozen.len, "another flush settled it");
        self.in_flight.clear();
        if let Some(log) = &mut self.log {
            log.committed();
        }
        self.debug_assert_sound();
    }

    /// The records that were written ahead are durable.
    pub(super) fn ahead_is_durable(&mut self) {
        self.ahead.clear();
    }

    /// Changes that are not durable, from the oldest to the newest. `with_in_flight`: those that a
    /// flush is about, and those ahead of it, count as durable.
    fn not_durable(&self, with_in_flight: bool) -> impl Iterator<Item = &Change> {
        let (ahead, in_flight): (&[Change], &[Change]) = match with_in_flight {
            true => (&[], &[]),
            false => (&self.ahead, &self.in_flight),
        };
        ahead.iter().chain(in_flight).chain(&self.changes)
    }

    /// So many of [`MapState::changed`] are durable; `with_in_flight` as there.
    pub(super) fn changed_durably(&self, with_in_flight: bool) -> u64 {
        let later = self.not_durable(with_in_flight).count() as u64;
        assert!(later <= self.changed, "more changes than were made");
        self.changed - later
    }

    /// The runs of a span, and what is to be undone in it, from the oldest to the newest, so that
    /// it is the durable map's; `with_in_flight` as there. `None` behind the last block of the map.
    pub(super) fn durable_runs(
        &self,
        span: Span,
        with_in_flight: bool,
    ) -> Option<(Vec<Run<BlockState>>, Vec<Change>)> {
        if span.start() >= self.index.end() {
            return None;
        }
        let touches = |change: &&Change| change.span.overlaps(span);
        let undo = self.not_durable(with_in_flight).filter(touches);
        let undo = undo.copied().collect();
        Some((self.index.runs(span).collect(), undo))
    }

    /// Goes on where a process of this boot died: what it told clients of holds.
    pub(super) fn take_over(&mut self, left: &[LiveChange]) {
        for change in left {
            // What is about to be emptied has kept its state.
            if let Some(new) = change.value.state() {
                let there = self.index.first_run(change.span);
                self.change(there, change.span, new);
            }
        }
        // What it wrote in place without a flush is not known.
        self.wrote_something();
    }

    /// Sets the blocks of `span` to one state and remembers what changed; `first` is the run at its
    /// front. Returns the number of blocks that changed.
    pub(super) fn change(&mut self, first: Run<BlockState>, span: Span, new: BlockState) -> Blocks {
        let mut changed = self.change_run(first, new);
        let mut rest = span.from(first.end());
        while !rest.is_empty() {
            let run = self.index.first_run(rest);
            changed += self.change_run(run, new);
            rest = rest.from(run.end());
        }
        self.debug_assert_sound();
        changed
    }

    /// As [`MapState::change`], for one run.
    fn change_run(&mut self, run: Run<BlockState>, new: BlockState) -> Blocks {
        let old = run.value;
        if old == new {
            return Blocks::NONE;
        }
        if old == BlockState::Data {
            self.data_blocks -= run.len();
        }
        if new == BlockState::Data {
            self.data_blocks += run.len();
            self.preallocated.became_data(run.span);
        }
        // A sequential writer makes one change of many.
        let before = self.changes.len();
        push_run(&mut self.changes, Run::new(run.span, Became { old, new }));
        if self.changes.len() > before {
            self.changed += 1;
        }
        self.index.set(run.span, new);
        run.len()
    }

    /// Checks what holds between any two operations, as far as that costs little.
    ///
    /// # Panics
    /// Where it does not: a fault of ours.
    fn debug_assert_sound(&self) {
        if !cfg!(debug_assertions) {
            return;
        }
        let dirty = &self.dirty;
        assert!(!dirty.many || !dirty.is_empty(), "many blocks, and none");
        assert!(!dirty.many || dirty.runs.is_empty(), "some of many blocks");
        assert!(dirty.is_empty() || self.is_written, "nobody wrote these");
        let waiting = self.ahead.len() + self.in_flight.len() + self.changes.len();
        assert!(
            waiting as u64 <= self.changed,
            "more changes than were made"
        );
    }

    /// As that, whatever it costs: it looks at the whole map.
    ///
    /// # Panics
    /// Where it does not hold.
    pub(super) fn assert_sound(&self) {
        self.debug_assert_sound();
        let dirty = &self.dirty;
        let blocks: Blocks = dirty.runs.iter().map(|run| run.len()).sum();
        assert!(dirty.many || blocks == dirty.blocks, "blocks of no run");
        self.index.assert_sound();
        let data = self
            .index
            .iter()
            .filter(|run| run.value == BlockState::Data);
        assert_eq!(data.map(|run| run.len()).sum::<Blocks>(), self.data_blocks);
        // What is undone is what was done: else a checkpoint would say what never was.
        let mut index = self.index.clone();
        let changes: Vec<_> = self.not_durable(false).collect();
        for change in changes.into_iter().rev() {
            let Became { old, new } = change.value;
            assert_eq!(index.first_run(change.span), Run::new(change.span, new));
            index.set(change.span, old);
        }
    }
}
