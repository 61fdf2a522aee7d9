//! A writable layer: the map in memory, writes to the data files, and what is not yet durable.
//! Making it durable is in [`super::flush`], coming back after a crash in [`super::recovery`].

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::data::DataFiles;
use super::flush::Flusher;
use super::header::Header;
use super::live::{self, Left, Live, Noted};
use super::map_file::drop_map_cache;
use super::map_state::MapState;
use super::options::LayerOptions;
use super::prealloc;
use super::range_lock::RangeGuard;
use super::recovery;
use super::sealed::{SEAL_FILE, SealedLayer};
use super::shared::{MapAtOpen, Shared};
use super::space::{Claim, Space, SpaceStatus};
use super::stats::{LayerCounters, LayerStats, StatsHandle};
use vellum_base::block::{Block, BlockState, Blocks, Offset, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, Unsynced};

/// A client that flushed within this time is expected to do it again.
const FLUSHES_WITHIN: Duration = Duration::from_secs(15);

/// The top layer of a chain. Blocks it holds are read and written here; what it says nothing of is
/// the chain's to resolve.
#[derive(Debug)]
pub struct WritableLayer {
    pub(super) shared: Arc<Shared>,
    pub(super) options: LayerOptions,
    pub(super) flusher: Flusher,
}

impl WritableLayer {
    /// Makes the directory `dir` with an empty layer in it, durable but for the entry of `dir` in
    /// its own parent directory. A crash before may leave part of it.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] where `dir` is there.
    pub fn create(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<()> {
        let unsynced = WritableLayer::create_unsynced(storage, dir, header)?;
        storage
            .sync_together(&unsynced)
            .context(|| format!("cannot sync the layer {}", dir.display()))
    }

    /// As [`WritableLayer::create`], for one who makes it durable later, together with other things: what
    /// is returned, that is. It may be opened and written before that, but what is flushed there
    /// is durable only after it.
    ///
    /// # Errors
    /// As [`WritableLayer::create`].
    pub fn create_unsynced(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
    ) -> Result<Vec<Unsynced>> {
        storage
            .create_dir(dir)
            .context(|| format!("cannot make the layer {}", dir.display()))?;
        let mut unsynced = DataFiles::create(storage, dir, header.virtual_size)?;
        unsynced.push(header.create(storage, dir)?);
        unsynced.push(Unsynced::Names(dir.to_owned()));
        Ok(unsynced)
    }

    /// Opens a writable layer and recovers it where it was not closed.
    ///
    /// The caller makes sure that no other process or thread has it open.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a sealed layer, [`ErrorKind::Corrupt`] or
    /// [`ErrorKind::Unsupported`] for what cannot be read; the message names the file.
    pub fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: LayerOptions,
    ) -> Result<Arc<WritableLayer>> {
        WritableLayer::open_counted(storage, dir, options, Arc::new(LayerStats::new()))
    }

    /// As [`WritableLayer::open`], counting in `counters`, which may hold what was counted before.
    ///
    /// # Errors
    /// As [`WritableLayer::open`].
    pub fn open_counted(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: LayerOptions,
        counters: Arc<dyn LayerCounters>,
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
        let seal = dir.join(SEAL_FILE);
        let stray = storage
            .exists(&seal)
            .context(|| format!("cannot look for {}", seal.display()))?;
        if stray {
            // Sealing would take it for the layer's own.
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: a seal in a layer that is not sealed: it was put there by hand, or the \
                     header is an older one; take away the one that is wrong",
                    seal.display()
                ),
            ));
        }
        let data = DataFiles::open(&*storage, dir, &header, OpenMode::Write)?;
        let left = live::read_left(&*storage, dir, &header, &data)?;
        if left == (Left::Stale { reread: true }) {
            data.drop_cache()?;
            drop_map_cache(&*storage, dir)?;
        }
        let closed = prealloc::was_closed(&*storage, dir, &left)?;
        let trusted = matches!(left, Left::Trusted(_));
        let space = Space::open(&storage, dir);
        let recovered = recovery::recover(&*storage, dir, &header, &data, &space, trusted)?;
        let (data_blocks, extents) = recovery::tally(&recovered.index);
        let map_file = MapAtOpen {
            place: recovered.place,
            extents,
            log: options.map_log,
        };
        let mut map = MapState::new(recovered.index, data_blocks);
        match left {
            Left::Trusted(changes) => {
                map.take_over(&changes);
                let create = || Live::create(&*storage, dir, header.uuid, &data, &changes);
                map.set_log(Some(space.within(Claim::Own, 0, create)?));
            }
            // What clients are shown now holds: no successor may find it trustworthy after all.
            Left::Stale { .. } => live::remove(&*storage, dir)?,
            Left::Nothing => {}
        }
        let leftover = prealloc::leftover(data.allocated(), map.data_blocks(), closed);
        let at_least = Blocks::whole_in(options.preallocate);
        map.preallocated_mut().begin(at_least, leftover);
        let shared = Arc::new(Shared::new(
            storage,
            dir,
            header,
            (data, space),
            map,
            map_file,
            StatsHandle(counters),
        ));
        // It would count within the bounds for as long as the layer is open.
        shared.give_back_leftover();
        let options = options.within_bounds();
        Ok(Arc::new(WritableLayer {
            flusher: Flusher::new(shared.clone(), options, recovered.generation),
            shared,
            options,
        }))
    }

    /// Identity, parent and present size.
    pub fn header(&self) -> Header {
        self.shared.header()
    }

    /// Present size in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size()
    }

    /// The layer's directory.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Where the layer's files are kept, to outlive the layer.
    pub fn storage_handle(&self) -> Arc<dyn Storage> {
        self.shared.storage.clone()
    }

    /// Where the layer's files are kept.
    pub fn storage(&self) -> &dyn Storage {
        &*self.shared.storage
    }

    /// What durability has cost since the layer was opened.
    pub fn stats(&self) -> &LayerStats {
        &self.shared.stats
    }

    /// Data blocks that the map holds.
    pub fn data_blocks(&self) -> Blocks {
        self.shared.map.read().data_blocks()
    }

    /// Bytes that the next checkpoint of the map takes on the host at most, beside what the layer
    /// takes now: until it is durable the one before stays.
    pub fn checkpoint_room(&self) -> u64 {
        self.shared.checkpoint_room()
    }

    /// Bytes that the data files take on the host, without what they take for no block.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let preallocated = self.shared.map.read().preallocated().blocks().bytes();
        Ok(self.shared.data.allocated()?.saturating_sub(preallocated))
    }

    /// Gives back the space on the host that was taken ahead of first touches, and whatever else takes
    /// space and is not data. To be called with no blocks held.
    pub fn give_back_preallocated(&self) {
        self.shared.give_back_preallocated();
        self.shared.look_for_leftover();
    }

    /// As [`vellum_base::block::BlockDevice::look_after_space`]. To be called with no blocks held.
    pub fn look_after_space(&self) {
        self.shared.look_after_preallocated();
    }

    /// The run of blocks of one state at the front of `span`, as long as can be.
    pub fn first_run(&self, span: Span) -> Run<BlockState> {
        self.shared.map.read().index().first_run(span)
    }

    /// Calls `each` with the runs that cover `span`, those of [`BlockState::Parent`] included, as
    /// they are at one moment.
    pub fn resolve(&self, span: Span, each: impl FnMut(Run<BlockState>)) {
        self.shared.map.read().index().cover(span).for_each(each);
    }

    /// Why the layer is poisoned, if it is.
    pub fn poisoned(&self) -> Option<&str> {
        self.shared.poisoned()
    }

    /// Marks the layer as one whose promises cannot be kept any more: from then on every request
    /// fails. Returns the error that they fail with.
    pub fn poison(&self, error: &Error) -> Error {
        self.shared.poison(error)
    }

    /// # Errors
    /// [`ErrorKind::Poisoned`] after a failed sync.
    pub fn check_poison(&self) -> Result<()> {
        self.shared.check_poison()
    }

    /// Makes every write that completed before the call durable. Flushes that overlap coalesce.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when neither the journal nor the map has room: nothing flushed
    /// earlier is harmed, and the flush may be tried again. So it may where a block cannot be read
    /// back. Any other failure poisons the layer.
    pub fn flush(&self) -> Result<()> {
        self.flusher.flush()
    }

    /// To be told of each write after it was answered: true where a flush is likely to come next,
    /// and [`WritableLayer::flush_ahead`] worth its while.
    pub fn expects_flush(&self) -> bool {
        self.flusher.expects_flush()
    }

    /// Writes down in the journal what the next flush would, where that needs neither a sync of
    /// data nor room to be made, and no flush runs just now. Makes nothing durable; what fails here
    /// the next flush meets again.
    pub fn flush_ahead(&self) {
        self.flusher.flush_ahead();
    }

    /// Makes the first area of the journal before a flush wants it. Where there is no space it is
    /// left to that flush.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn prepare_journal(&self) -> Result<()> {
        self.flusher.prepare_journal()
    }

    /// Flushes, checkpoints and removes the journal, so that the next open has nothing to recover.
    /// The layer can still be used.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn close(&self) -> Result<()> {
        self.flusher.close()
    }

    /// Does ahead of [`WritableLayer::seal`] what it would have to do first: makes durable what was
    /// written until now, so that no block is in the journal alone, and waits for the journal's
    /// thread. The layer can be used meanwhile and afterwards.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn prepare_seal(&self) -> Result<()> {
        self.flusher.prepare_seal()
    }

    /// Makes the layer sealed: durable and never to change again. Takes about as long as a flush,
    /// whatever the layer holds. The caller sees to it that no writes come any more.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn seal(&self) -> Result<()> {
        self.flusher.seal()
    }

    /// The layer as a sealed one, once [`WritableLayer::seal`] has made it that. Nothing is read, so it takes
    /// the same time whatever the layer holds.
    ///
    /// # Panics
    /// Where it was not sealed.
    pub fn as_sealed(&self) -> SealedLayer {
        SealedLayer::written(&self.shared)
    }

    /// Makes the layer `size` bytes large, durably; it may be in use. What it gains reads as
    /// zeros. One that is as large already stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a size that cannot be; where the host refuses, the layer is
    /// as before.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.flusher.grow(size)
    }

    /// Checks what holds of the layer in memory between any two requests, whatever that costs: for
    /// tests and simulators.
    ///
    /// # Panics
    /// Where it does not hold, which is a fault of Vellum's own.
    pub fn assert_sound(&self) {
        self.flusher.assert_sound();
    }

    /// Flushes where so much changed that the log of changes is filling.
    fn flush_if_due(&self) -> Result<()> {
        if !self.shared.flush_due.load(Ordering::Relaxed)
            || !self.shared.flush_due.swap(false, Ordering::Relaxed)
        {
            return Ok(());
        }
        let mut result = self.flush();
        // After a flush that failed, one that succeeds empties half of the log, and not the half
        // that changes go to.
        if result.is_ok() && self.shared.log_is_filling() {
            result = self.flush();
        }
        // It is still due, for the next request.
        result.inspect_err(|_| self.shared.flush_due.store(true, Ordering::Relaxed))
    }

    /// Whether a request failed because the log of changes has no room, and may be made again once
    /// its blocks were given back: [`WritableLayer::lock_blocks`] flushes then.
    pub fn is_flush_due(&self) -> bool {
        self.shared.flush_due.load(Ordering::Relaxed)
    }

    /// Writes to these bytes of the device may take of the reserve for small ones, whatever their
    /// size: a file system's journal, without which it gives up.
    pub fn favour(&self, ranges: Vec<std::ops::Range<Offset>>) {
        self.shared.space.favour(ranges);
    }

    /// How the layer stands with the host's space.
    pub fn space(&self) -> SpaceStatus {
        let preallocated = self.shared.map.read().preallocated().blocks();
        let mut status = self.shared.space.status();
        status.reserved_bytes += preallocated.bytes();
        status
    }

    /// For how long after the host's disk was found full [`WritableLayer::wait_for_room`] says that
    /// a write should be tried again.
    pub fn hold_writes_for(&self, limit: Duration) {
        self.shared.space.hold_writes_for(limit);
    }

    /// Clients' writes that want space leave so many bytes of the host's disk available, small ones
    /// half as many, and [favoured](Self::favour) ones none; others fail with
    /// [`ErrorKind::NoSpace`]. 0 ends that. To be called with no blocks held.
    pub fn keep_free(&self, bytes: u64) {
        self.shared.space.keep_free(bytes);
        self.shared.mind_low_space();
    }

    /// To be called after a write failed with [`ErrorKind::NoSpace`], with nothing locked: waits a
    /// moment, and says whether to make it again.
    pub fn wait_for_room(&self) -> bool {
        self.shared.mind_low_space();
        self.shared.space.wait_for_room()
    }

    /// Waits for writers of the same blocks, and holds these; every call below that changes blocks
    /// wants the proof. First flushes where so much changed that the log of changes is filling: a
    /// flush takes blocks itself, so it must not be waited for with blocks held.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn lock_blocks(&self, span: Span) -> Result<RangeGuard<'_>> {
        self.flush_if_due()?;
        Ok(self.shared.locks.lock(span))
    }

    /// Reads whole blocks from `start`, all of them [`BlockState::Data`].
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`] after a failed sync: the page cache may have dropped what was written.
    pub fn read_blocks(&self, buf: &mut [u8], start: Block) -> Result<()> {
        self.check_poison()?;
        self.shared.data.read(buf, start.offset())
    }

    /// Writes whole blocks from `start`; they become data. The parent is not read. Returns how many
    /// of them were not data before.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] leaves the blocks' states as they were.
    pub fn write_blocks(&self, held: &RangeGuard<'_>, start: Block, buf: &[u8]) -> Result<Blocks> {
        let span = Span::of_buffer(start, buf);
        held.assert_holds(&self.shared.locks, span);
        self.shared.check_writable()?;
        let (grows, want) = self.shared.before_write(span);
        self.shared.prepare_write(held, want);
        self.shared.write_data(buf, start.offset(), grows)?;
        self.blocks_were_written(span)
    }

    /// As [`WritableLayer::write_blocks`], of one block that is zeroed in part and was not data: as
    /// that gives space back, it is done with what the layer keeps for itself on a full disk.
    ///
    /// # Errors
    /// As [`WritableLayer::write_blocks`].
    pub fn write_zeroed_block(
        &self,
        held: &RangeGuard<'_>,
        block: Block,
        buf: &[u8],
    ) -> Result<Blocks> {
        let span = Span::of_buffer(block, buf);
        held.assert_holds(&self.shared.locks, span);
        self.shared.check_writable()?;
        self.shared.write_zeroed(buf, block.offset())?;
        self.blocks_were_written(span)
    }

    fn blocks_were_written(&self, span: Span) -> Result<Blocks> {
        let mut map = self.shared.map.write();
        let written = Noted::Becomes(BlockState::Data);
        let allocated = self.shared.become_data(&mut map, span, written)?;
        map.wrote(span, self.options.carried_at_most());
        let due = map.write_back_due();
        drop(map);
        // A client that does not flush gains nothing by it.
        if due && self.options.background && self.flusher.flushed_within(FLUSHES_WITHIN) {
            self.shared.data.start_writing_back();
        }
        Ok(allocated)
    }

    /// Writes bytes within one block that is data already.
    ///
    /// # Errors
    /// As [`WritableLayer::write_blocks`].
    pub fn write_within(&self, held: &RangeGuard<'_>, offset: Offset, buf: &[u8]) -> Result<()> {
        let touched = Span::touched_by(offset, buf.len() as u64);
        held.assert_holds(&self.shared.locks, touched);
        assert!(
            touched.len() <= Blocks::ONE,
            "a write over a border of blocks"
        );
        self.shared.check_writable()?;
        self.shared.write_data(buf, offset, false)?;
        let limit = self.options.carried_at_most();
        self.shared.map.write().wrote(touched, limit);
        Ok(())
    }

    /// Gives blocks the state zero or parent, and the space of those that were data back.
    ///
    /// # Errors
    /// Where the host refuses to punch the hole.
    pub fn clear_blocks(&self, held: &RangeGuard<'_>, span: Span, state: BlockState) -> Result<()> {
        held.assert_holds(&self.shared.locks, span);
        self.shared.check_writable()?;
        let mut data = Vec::new();
        self.resolve(span, |run| {
            if run.value == BlockState::Data {
                data.push(run.span);
            }
        });
        self.shared.ensure_log()?;
        let mut map = self.shared.map.write();
        self.shared.change(&mut map, span, Noted::Becomes(state))?;
        data.extend(map.preallocated_mut().take(span));
        drop(map);
        // After the change of state, so that a reader never takes a hole for data.
        for run in data {
            let punch = || self.shared.data.punch(run);
            match self.shared.space.within(Claim::Own, 0, punch) {
                // A hole may want a block of the host's own. Without it the bytes stay where they
                // are: the map says what the blocks are, and no more space is taken than before.
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    tracing::debug!(%error, "space is not given back");
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// Makes blocks data that is zero and takes its space now, so that writing there later cannot
    /// run out of space.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] may leave some of the blocks zero; none keeps its old bytes.
    pub fn allocate_zeroed(&self, held: &RangeGuard<'_>, span: Span) -> Result<()> {
        held.assert_holds(&self.shared.locks, span);
        self.shared.check_writable()?;
        self.shared.ensure_log()?;
        self.shared.note_emptied(span)?;
        self.shared.map.write().preallocated_mut().take(span);
        let allocate = || self.shared.data.allocate_zeroed(span);
        self.shared
            .space
            .write(span.offset(), span.bytes(), true, allocate)
            .inspect_err(|_| {
                self.shared.map.write().wrote_something();
            })?;
        let mut map = self.shared.map.write();
        self.shared.become_data(&mut map, span, Noted::Reserved)?;
        map.wrote(span, self.options.carried_at_most());
        Ok(())
    }

    /// A hint that data blocks will be read soon.
    ///
    /// # Errors
    /// When they lie outside the layer.
    pub fn prefetch(&self, span: Span) -> Result<()> {
        self.shared.data.prefetch(span)
    }

    /// The state of one block.
    pub fn state(&self, block: Block) -> BlockState {
        self.shared.map.read().index().get(block)
    }

    /// True when the map says nothing at all: a fresh layer.
    pub fn is_untouched(&self) -> bool {
        self.shared.map.read().index().iter().next().is_none()
    }
}

#[cfg(test)]
impl WritableLayer {
    /// [`WritableLayer::write_blocks`] by a writer of these blocks alone.
    pub(super) fn put(&self, start: u64, buf: &[u8]) -> Result<Blocks> {
        let start = Block::new(start);
        let held = self.lock_blocks(Span::of_buffer(start, buf))?;
        self.write_blocks(&held, start, buf)
    }

    /// [`WritableLayer::clear_blocks`] by a writer of these blocks alone.
    pub(super) fn clear(&self, span: Span, state: BlockState) -> Result<()> {
        let held = self.lock_blocks(span)?;
        self.clear_blocks(&held, span, state)
    }
}
