//! A writable layer: the map in memory, writes to the data files, and what is not yet durable.
//! Making it durable is in [`super::flush`], coming back after a crash in [`super::recovery`].

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock};

use super::data::DataFiles;
use super::flush::{Committer, FlushQueue};
use super::header::Header;
use super::index::{ABSENT, Index};
use super::journal::MAX_AREA;
use super::live::{self, Left, Live};
use super::range_lock::{RangeGuard, RangeLock};
use super::stats::LayerStats;
use super::{STATE_DATA, ValueRun, recovery, state_of_value, value_of_state};
use crate::block::{BLOCK_SIZE, BlockState};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::{OpenMode, Storage};

/// How a writable layer trades.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerOptions {
    /// A flush with at most this many blocks of new data carries them in its journal record and
    /// needs no sync of the data file; 0 turns that off.
    pub journal_blocks: usize,
    /// Bytes of a journal area when it is first made, a multiple of 4096, at most 16 MiB.
    pub journal_start: u64,
    /// Bytes up to which areas grow under load, a multiple of 4096, at most 16 MiB.
    pub journal_max: u64,
    /// Free a full journal area in a thread of its own, while flushes go on in the other area.
    pub background: bool,
}

impl Default for LayerOptions {
    fn default() -> Self {
        LayerOptions {
            journal_blocks: 32,
            journal_start: 256 << 10,
            journal_max: 8 << 20,
            background: true,
        }
    }
}

impl LayerOptions {
    /// The nearest that the format allows.
    fn within_bounds(self) -> Self {
        let bounded = |len: u64| (len / BLOCK_SIZE * BLOCK_SIZE).clamp(BLOCK_SIZE, MAX_AREA);
        LayerOptions {
            journal_start: bounded(self.journal_start),
            journal_max: bounded(self.journal_max),
            ..self
        }
    }
}

/// How long a poisoned layer waits to tell its successor: whoever holds the map is about to fail.
const POISON_WAIT: Duration = Duration::from_millis(100);

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
}

impl Dirty {
    fn add(&mut self, start: u64, len: u64, limit: u64) {
        if self.many {
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
    fn add_unknown(&mut self) {
        self.blocks += 1;
        self.many = true;
        self.runs = Vec::new();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks == 0
    }
}

/// The map as clients see it, and how it differs from the durable one.
#[derive(Debug, Default)]
pub(super) struct MapState {
    /// [`STATE_DATA`] and [`super::STATE_ZERO`] by block.
    pub(super) index: Index,
    /// Changes since the last flush began.
    pub(super) changes: Vec<Change>,
    /// Changes that a flush is writing to the journal now.
    pub(super) in_flight: Vec<Change>,
    pub(super) dirty: Dirty,
    pub(super) data_blocks: u64,
    /// Changes that are not durable, for our successor.
    pub(super) live: Option<Live>,
}

impl MapState {
    /// Goes on where a process of this boot died: what it told clients of holds.
    fn take_over(&mut self, left: &Left, blocks: u64) {
        for change in &left.changes {
            if change
                .start
                .checked_add(change.len)
                .is_some_and(|end| end <= blocks)
            {
                let there = self.index.run_at(change.start, change.len);
                self.change(there, change.len, change.new);
            }
        }
        // What it wrote in place without a flush nobody knows.
        self.dirty.add_unknown();
    }

    /// Sets `len` blocks to one state and remembers what changed; `first` is the run that begins
    /// there, at most that long. Returns the number of blocks that changed.
    fn change(&mut self, first: ValueRun, len: u64, new: u32) -> u64 {
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
            _ => self.changes.push(Change {
                start: run.start,
                len: run.len,
                old: run.value,
                new,
            }),
        }
        self.index.set(run.start, run.len, new);
        run.len
    }
}

/// The top layer of a chain. Blocks it holds are read and written here; what it says nothing of is
/// the chain's to resolve.
#[derive(Debug)]
pub struct WritableLayer {
    pub(super) core: Arc<Core>,
    pub(super) options: LayerOptions,
    pub(super) committer: Mutex<Committer>,
    pub(super) queue: Mutex<FlushQueue>,
    pub(super) flushed: Condvar,
    locks: RangeLock,
}

/// What a layer shares with the thread that frees a journal area.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) dir: PathBuf,
    pub(super) header: Header,
    pub(super) data: DataFiles,
    pub(super) map: RwLock<MapState>,
    pub(super) stats: LayerStats,
    poison: OnceLock<String>,
    sealed: AtomicBool,
    /// There is a log of changes.
    live: AtomicBool,
    /// The log is filling: a flush makes room.
    flush_due: AtomicBool,
}

impl Core {
    /// Marks the layer as one whose promises cannot be kept any more.
    pub(super) fn poison(&self, error: &Error) -> Error {
        tracing::error!(layer = %self.dir.display(), %error, "layer poisoned");
        // The first reason stays.
        let _ = self.poison.set(error.to_string());
        if let Some(mut map) = self.map.try_write_for(POISON_WAIT)
            && let Some(live) = &mut map.live
        {
            live.poison();
        }
        self.poison_error()
    }

    fn poison_error(&self) -> Error {
        let why = self.poison.get().map(String::as_str).unwrap_or_default();
        Error::new(
            ErrorKind::Poisoned,
            format!(
                "{}: a sync failed ({why}), so writes may be lost and the layer refuses to go on; \
                 check the host's disk, then open the layer again",
                self.dir.display()
            ),
        )
    }

    pub(super) fn check_poison(&self) -> Result<()> {
        if self.poison.get().is_some() {
            Err(self.poison_error())
        } else {
            Ok(())
        }
    }

    /// Sees to it that there is a log of changes before anything is written: it also tells our
    /// successor that the page cache is to be trusted.
    fn ensure_live(&self) -> Result<()> {
        if self.live.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut map = self.map.write();
        if map.live.is_none() {
            // Everything is durable, or there would be a log.
            let live = Live::create(&*self.storage, &self.dir, self.header.uuid, &[])?;
            map.live = Some(live);
            self.live.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Changes the map, and notes it for our successor first. Returns the number of blocks that
    /// changed.
    fn change(&self, map: &mut MapState, start: u64, len: u64, new: u32) -> Result<u64> {
        let there = map.index.run_at(start, len);
        if there.value == new && there.len == len {
            return Ok(0);
        }
        if let Some(live) = &mut map.live {
            live.append(start, len, new)?;
            if live.is_filling() {
                self.flush_due.store(true, Ordering::Relaxed);
            }
        }
        Ok(map.change(there, len, new))
    }

    /// Blocks that were written become data. Where that cannot be noted, some may have been data
    /// before and hold the new bytes: the next flush makes them durable.
    fn become_data(&self, map: &mut MapState, start: u64, len: u64) -> Result<u64> {
        self.change(map, start, len, STATE_DATA)
            .inspect_err(|_| map.dirty.add_unknown())
    }

    /// Ends the log where everything is durable.
    pub(super) fn end_live(&self) {
        let mut map = self.map.write();
        if map.live.is_none() || !map.changes.is_empty() || !map.dirty.is_empty() {
            return;
        }
        match live::remove(&*self.storage, &self.dir) {
            Ok(()) => {
                map.live = None;
                self.live.store(false, Ordering::Release);
            }
            // It says nothing that is not durable, so it does no harm where it stays.
            Err(error) => tracing::warn!(%error, "a log of changes is left"),
        }
    }

    pub(super) fn set_sealed(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// For whoever still holds the layer after it was sealed.
    fn check_writable(&self) -> Result<()> {
        self.check_poison()?;
        if self.is_sealed() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: the layer was sealed", self.dir.display()),
            ));
        }
        Ok(())
    }

    /// Writes bytes. Where that fails, some of them may be there: the next flush makes whatever a
    /// client reads from then on durable.
    fn write_data(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.ensure_live()?;
        self.data.write(buf, offset).inspect_err(|_| {
            self.map.write().dirty.add_unknown();
        })
    }
}

impl Drop for WritableLayer {
    /// Nobody may open the layer again while a thread of this one still writes to it.
    fn drop(&mut self) {
        // Its outcome matters to nobody any more: what it would have freed is still in the journal.
        let _ = self.wait_for_retirement(&mut self.committer.lock());
    }
}

impl WritableLayer {
    /// Makes the directory `dir` with an empty layer in it, durable but for the entry of `dir` in
    /// its own parent directory.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] where `dir` is there.
    pub fn create(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<()> {
        storage
            .create_dir(dir)
            .context(|| format!("cannot make the layer {}", dir.display()))?;
        DataFiles::create(storage, dir, header.virtual_size)?;
        // Last, and it syncs the directory: a layer with a header is whole.
        header.write(storage, dir)
    }

    /// Opens a writable layer and recovers it where it was not closed.
    ///
    /// The caller makes sure that nobody else has it open.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a sealed layer, [`ErrorKind::Corrupt`] or
    /// [`ErrorKind::Unsupported`] for what cannot be read; the message names the file.
    pub fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: LayerOptions,
    ) -> Result<Arc<WritableLayer>> {
        let header = Header::read(&*storage, dir)?;
        if header.sealed {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: the layer is sealed and cannot be written",
                    dir.display()
                ),
            ));
        }
        let data = DataFiles::open(&*storage, dir, header.virtual_size, OpenMode::Write)?;
        let left = live::read_left(&*storage, dir, header.uuid)?;
        let recovered = recovery::recover(&*storage, dir, &header, &data, left.same_boot)?;
        let mut map = MapState {
            data_blocks: recovery::data_blocks(&recovered.index),
            index: recovered.index,
            ..MapState::default()
        };
        if left.same_boot {
            map.take_over(&left, header.blocks());
            map.live = Some(Live::create(&*storage, dir, header.uuid, &left.changes)?);
        }
        let map_is_filling = map.live.as_ref().is_some_and(Live::is_filling);
        Ok(Arc::new(WritableLayer {
            core: Arc::new(Core {
                dir: dir.to_owned(),
                data,
                map: RwLock::new(map),
                live: AtomicBool::new(left.same_boot),
                flush_due: AtomicBool::new(map_is_filling),
                stats: LayerStats::default(),
                poison: OnceLock::new(),
                sealed: AtomicBool::new(false),
                header,
                storage,
            }),
            options: options.within_bounds(),
            committer: Mutex::new(Committer::new(recovered.generation)),
            queue: Mutex::default(),
            flushed: Condvar::new(),
            locks: RangeLock::default(),
        }))
    }

    /// Identity, parent and size.
    pub fn header(&self) -> &Header {
        &self.core.header
    }

    /// The layer's directory.
    pub fn dir(&self) -> &Path {
        &self.core.dir
    }

    /// Where the layer's files are kept, to outlive the layer.
    pub fn storage_handle(&self) -> Arc<dyn Storage> {
        self.core.storage.clone()
    }

    /// Where the layer's files are kept.
    pub fn storage(&self) -> &dyn Storage {
        &*self.core.storage
    }

    /// What durability has cost since the layer was opened.
    pub fn stats(&self) -> &LayerStats {
        &self.core.stats
    }

    /// Data blocks that the map holds.
    pub fn data_blocks(&self) -> u64 {
        self.core.map.read().data_blocks
    }

    /// Bytes that the data files take on the host.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.core.data.allocated()
    }

    /// The index value at `block` and for how many blocks from there (at most `max`) it holds.
    pub fn run_at(&self, block: u64, max: u64) -> ValueRun {
        self.core.map.read().index.run_at(block, max)
    }

    /// Calls `each` with the runs of index values that cover a range, gaps ([`ABSENT`]) included,
    /// as they are at one moment.
    pub fn resolve(&self, start: u64, len: u64, mut each: impl FnMut(ValueRun)) {
        let map = self.core.map.read();
        let mut at = start;
        while at < start + len {
            let run = map.index.run_at(at, start + len - at);
            at += run.len;
            each(run);
        }
    }

    /// A copy of the map in memory.
    pub fn index_snapshot(&self) -> Index {
        self.core.map.read().index.clone()
    }

    /// Why the layer is poisoned, if it is.
    pub fn poisoned(&self) -> Option<&str> {
        self.core.poison.get().map(String::as_str)
    }

    /// Marks the layer as one whose promises cannot be kept any more: from then on every request
    /// fails. Returns the error that they fail with.
    pub fn poison(&self, error: &Error) -> Error {
        self.core.poison(error)
    }

    /// # Errors
    /// [`ErrorKind::Poisoned`] after a failed sync.
    pub fn check_poison(&self) -> Result<()> {
        self.core.check_poison()
    }

    /// Flushes where so much changed that the log of changes is filling. To be called before blocks
    /// are locked.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn flush_if_due(&self) -> Result<()> {
        if self.core.flush_due.load(Ordering::Relaxed)
            && self.core.flush_due.swap(false, Ordering::Relaxed)
        {
            self.flush()?;
        }
        Ok(())
    }

    /// Waits for writers of the same blocks; every call below that changes blocks wants it held.
    pub fn lock_blocks(&self, start: u64, len: u64) -> RangeGuard<'_> {
        self.locks.lock(start..start + len)
    }

    /// Reads bytes of blocks that are [`STATE_DATA`].
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`] after a failed sync: the page cache may have dropped what was written.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_poison()?;
        self.core.data.read(buf, offset)
    }

    /// Writes whole blocks from `start`; they become data. The parent is not read. Returns how many
    /// of them were not data before.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] leaves the blocks' states as they were.
    pub fn write_blocks(&self, start: u64, buf: &[u8]) -> Result<u64> {
        self.core.check_writable()?;
        self.core.write_data(buf, start * BLOCK_SIZE)?;
        let len = buf.len() as u64 / BLOCK_SIZE;
        let mut map = self.core.map.write();
        let allocated = self.core.become_data(&mut map, start, len)?;
        map.dirty
            .add(start, len, self.options.journal_blocks as u64);
        Ok(allocated)
    }

    /// Writes bytes within one block that is data already.
    ///
    /// # Errors
    /// As [`WritableLayer::write_blocks`].
    pub fn write_within(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.core.check_writable()?;
        self.core.write_data(buf, offset)?;
        let limit = self.options.journal_blocks as u64;
        self.core
            .map
            .write()
            .dirty
            .add(offset / BLOCK_SIZE, 1, limit);
        Ok(())
    }

    /// Gives blocks the state zero or parent, and the space of those that were data back.
    ///
    /// # Errors
    /// Where the host refuses to punch the hole.
    pub fn clear_blocks(&self, start: u64, len: u64, state: BlockState) -> Result<()> {
        self.core.check_writable()?;
        let mut data = Vec::new();
        self.resolve(start, len, |run| {
            if run.value == STATE_DATA {
                data.push(run);
            }
        });
        self.core.ensure_live()?;
        self.core.change(
            &mut self.core.map.write(),
            start,
            len,
            value_of_state(state),
        )?;
        // After the change of state, so that a reader never takes a hole for data.
        for run in data {
            self.core
                .data
                .punch(run.start * BLOCK_SIZE, run.len * BLOCK_SIZE)?;
        }
        Ok(())
    }

    /// Makes blocks data that is zero and takes its space now, so that writing there later cannot
    /// run out of space.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] may leave some of the blocks zero; none keeps its old bytes.
    pub fn allocate_zeroed(&self, start: u64, len: u64) -> Result<()> {
        self.core.check_writable()?;
        self.core.ensure_live()?;
        self.core
            .data
            .allocate_zeroed(start * BLOCK_SIZE, len * BLOCK_SIZE)
            .inspect_err(|_| {
                self.core.map.write().dirty.add_unknown();
            })?;
        let mut map = self.core.map.write();
        self.core.become_data(&mut map, start, len)?;
        map.dirty
            .add(start, len, self.options.journal_blocks as u64);
        Ok(())
    }

    /// A hint that bytes of data blocks will be read soon.
    ///
    /// # Errors
    /// When the range lies outside the layer.
    pub fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.core.data.prefetch(offset, len)
    }

    /// The state of one block.
    pub fn state(&self, block: u64) -> BlockState {
        state_of_value(self.core.map.read().index.get(block))
    }

    /// True when the map says nothing at all: a fresh layer.
    pub fn is_untouched(&self) -> bool {
        let map = self.core.map.read();
        map.index
            .runs(0..map.index.end())
            .all(|run| run.value == ABSENT)
    }
}
