//! Making a layer durable: flushes, the journal's areas, checkpoints, closing and sealing.
//!
//! A flush freezes what changed, makes the data durable, then commits the frozen changes in one
//! synchronous journal write. Little new data goes into that write itself (design E of a redo
//! journal: no sync of the data file at all); more is synced first, and then the record carries a
//! *barrier* that retires the blocks of older records. docs/durability.md argues each step.

use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::header::Header;
use super::index::Index;
use super::journal::{AlignedBuf, Area, RecordBody, RecordPlace, block_offset, encode_record};
use super::map_state::{Change, Dirty, MapState};
use super::recovery::remove_journal;
use super::state_of_value;
use super::table::{state_code, state_of_code};
use super::writable::WritableLayer;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::about_to_wait;

/// How much longer an area is than the one before it, while they fill.
const GROWTH: u64 = 4;

/// Who flushes, and which flush covers whom.
#[derive(Debug, Default)]
pub(super) struct FlushQueue {
    /// Number of the last flush that began.
    begun: u64,
    /// Number of the last flush that ended.
    done: u64,
    running: bool,
    /// The last flush that failed.
    failed: Option<(u64, ErrorKind, String)>,
}

/// Where the journal stands. Only the flush that leads touches it.
#[derive(Debug)]
pub(super) struct Committer {
    areas: [Option<Area>; 2],
    current: usize,
    /// The generation being written.
    generation: u64,
    sequence: u64,
    records_before: u64,
    /// Where the next record goes.
    position: u64,
    /// By area: some record there carries blocks that no barrier has retired.
    live: [bool; 2],
    /// Something failed half-way, and what the disk holds of it is unknown: a record that may be
    /// there, a checkpoint that may be, an area that was not freed. Nothing may be written to the
    /// journal until a checkpoint contains it all.
    must_checkpoint: bool,
    /// Frees the other area, or makes a larger one in its place.
    retiring: Option<JoinHandle<Result<Option<Area>>>>,
    /// The generation in which the other area was made ahead, or found to have no space.
    prepared: u64,
    buf: AlignedBuf,
}

impl Committer {
    /// A journal without areas behind a checkpoint that contains `covered`.
    pub(super) fn new(covered: u64) -> Self {
        Committer {
            areas: [None, None],
            current: 0,
            generation: covered + 1,
            sequence: 0,
            records_before: 0,
            position: 0,
            live: [false; 2],
            must_checkpoint: false,
            retiring: None,
            prepared: 0,
            buf: AlignedBuf::default(),
        }
    }

    fn has_live_blocks(&self) -> bool {
        self.live != [false; 2]
    }

    fn area(&self) -> Option<&Area> {
        self.areas.get(self.current)?.as_ref()
    }

    fn set_area(&mut self, which: usize, area: Option<Area>) {
        if let Some(slot) = self.areas.get_mut(which) {
            *slot = area;
        }
    }

    fn area_len(&self, which: usize) -> u64 {
        let area = self.areas.get(which).and_then(Option::as_ref);
        area.map_or(0, Area::len)
    }

    fn set_live(&mut self, which: usize, live: bool) {
        if let Some(slot) = self.live.get_mut(which) {
            *slot = live;
        }
    }

    /// A checkpoint contains everything so far: both areas are free.
    fn begin_after_checkpoint(&mut self) {
        self.generation += 1;
        self.sequence = 0;
        self.records_before = 0;
        self.position = 0;
        self.live = [false; 2];
        self.must_checkpoint = false;
    }
}

/// Whether a record has a place in the journal.
enum Room {
    Fits,
    /// The journal is full or too small: a checkpoint takes the record's place.
    NeedsCheckpoint,
}

impl WritableLayer {
    /// Makes every write that completed before the call durable. Flushes that overlap coalesce.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when neither the journal nor the map has room: nothing flushed
    /// earlier is harmed, and the flush may be tried again. So it may where a block cannot be read
    /// back. Any other failure poisons the layer.
    pub fn flush(&self) -> Result<()> {
        self.core.stats.flushes.add(1);
        self.last_flush.store(self.age_ms(), Ordering::Relaxed);
        let mut queue = self.queue.lock();
        // Only a flush that begins from now on covers us.
        let mine = queue.begun + 1;
        while queue.running && queue.done < mine {
            about_to_wait();
            self.flushed.wait(&mut queue);
        }
        if queue.done >= mine {
            self.core.stats.flushes_coalesced.add(1);
            return match &queue.failed {
                Some((number, kind, why)) if *number >= mine => Err(Error::new(*kind, why.clone())),
                _ => Ok(()),
            };
        }
        self.lead(queue, |layer, committer| layer.commit(committer, false))
    }

    /// Runs `work` as the only flush, and tells those who wait.
    fn lead<'a>(
        &'a self,
        mut queue: parking_lot::MutexGuard<'a, FlushQueue>,
        work: impl FnOnce(&Self, &mut Committer) -> Result<()>,
    ) -> Result<()> {
        while queue.running {
            self.flushed.wait(&mut queue);
        }
        queue.running = true;
        queue.begun += 1;
        let number = queue.begun;
        drop(queue);
        let result = self
            .check_poison()
            .and_then(|()| work(self, &mut self.committer.lock()));
        let mut queue = self.queue.lock();
        queue.running = false;
        queue.done = number;
        if let Err(error) = &result {
            queue.failed = Some((number, error.kind(), error.to_string()));
        }
        drop(queue);
        self.flushed.notify_all();
        result
    }

    /// Flushes, checkpoints and removes the journal, so that the next open has nothing to recover.
    /// The layer can still be used.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn close(&self) -> Result<()> {
        self.lead(self.queue.lock(), |layer, committer| {
            if layer.core.is_sealed() {
                return Ok(());
            }
            layer.commit(committer, true)?;
            if committer.areas.iter().any(Option::is_some) {
                layer.checkpoint_all(committer)?;
                committer.areas = [None, None];
                remove_journal(&*layer.core.storage, &layer.core.dir)?;
            }
            layer.core.end_live();
            Ok(())
        })
    }

    /// Does ahead of [`WritableLayer::seal`] what it would have to do first: makes durable what was
    /// written until now, so that no block lives in the journal alone, and waits for the journal's
    /// thread. The layer can be used meanwhile and afterwards.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn prepare_seal(&self) -> Result<()> {
        self.lead(self.queue.lock(), WritableLayer::settle)
    }

    /// Flushes so that no block lives in the journal alone, and waits for its thread.
    fn settle(&self, committer: &mut Committer) -> Result<()> {
        self.commit(committer, true)?;
        if self.wait_for_retirement(committer).is_err() || committer.must_checkpoint {
            self.checkpoint_all(committer)?;
        }
        Ok(())
    }

    /// Makes the first area of the journal before a flush wants it. Where there is no space it is
    /// left to that flush.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn prepare_journal(&self) -> Result<()> {
        self.lead(self.queue.lock(), |layer, committer| {
            if committer.area().is_some() || committer.must_checkpoint || layer.core.is_sealed() {
                return Ok(());
            }
            let which = committer.current;
            layer
                .create_area(committer, which, layer.options.journal_start)
                .map(drop)
        })
    }

    /// Makes the layer `size` bytes large, durably; it may be in use. What it gains reads as
    /// zeros. One that is as large already stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a size that cannot be; where the host refuses, the layer is
    /// as before.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.lead(self.queue.lock(), |layer, _| layer.core.grow(size))
    }

    /// Makes the layer sealed: durable and never to change again. Takes about as long as a flush,
    /// whatever the layer holds. The caller sees to it that no writes come any more.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn seal(&self) -> Result<()> {
        self.lead(self.queue.lock(), |layer, committer| {
            layer.settle(committer)?;
            let header = Header {
                sealed: true,
                ..layer.core.header()
            };
            let (storage, dir) = (&*layer.core.storage, &*layer.core.dir);
            header.write(storage, dir).map_err(|error| {
                match Header::read(storage, dir) {
                    Ok(found) if !found.sealed => layer.core.fatal(error),
                    // A crash may find it sealed, so nothing may be written to it any more.
                    _ => layer.core.poison(&error),
                }
            })?;
            layer.core.set_sealed();
            layer.core.end_live();
            Ok(())
        })
    }

    /// Freezes what changed and commits it. With `barrier`, no record stays live.
    fn commit(&self, committer: &mut Committer, barrier: bool) -> Result<()> {
        let (dirty, frozen) = {
            let mut map = self.core.map.write();
            let map: &mut MapState = &mut map;
            map.in_flight = std::mem::take(&mut map.changes);
            if let Some(live) = &mut map.live {
                live.freeze();
            }
            (std::mem::take(&mut map.dirty), map.in_flight.clone())
        };
        // Not under the lock: there may be very many, and requests would wait.
        let body = net_changes(&frozen);
        drop(frozen);
        if dirty.is_empty() && body.changes.is_empty() && !(barrier && committer.has_live_blocks())
        {
            self.core.stats.flushes_empty.add(1);
            let mut map = self.core.map.write();
            map.in_flight.clear();
            if let Some(live) = &mut map.live {
                live.committed();
            }
            return Ok(());
        }
        let result = self.commit_frozen(committer, body, &dirty, barrier);
        let mut map = self.core.map.write();
        let map: &mut MapState = &mut map;
        let frozen = std::mem::take(&mut map.in_flight);
        if result.is_ok() {
            if let Some(live) = &mut map.live {
                live.committed();
            }
        } else {
            // Not durable: the next flush has to do it.
            let newer = std::mem::replace(&mut map.changes, frozen);
            map.changes.extend(newer);
            map.dirty.blocks += dirty.blocks;
            map.dirty.many |= !dirty.is_empty();
        }
        result
    }

    fn commit_frozen(
        &self,
        committer: &mut Committer,
        mut body: RecordBody,
        dirty: &Dirty,
        barrier: bool,
    ) -> Result<()> {
        let carry = !barrier && !dirty.many;
        if carry {
            body.blocks = dirty.distinct_blocks();
        } else {
            self.core.sync_data()?;
            body.barrier = true;
            let nothing = body.changes.is_empty() && !committer.has_live_blocks();
            if nothing && !committer.must_checkpoint {
                return Ok(());
            }
        }
        match self.make_room(committer, body.encoded_len() as u64)? {
            Room::Fits => self.write_record(committer, &body),
            Room::NeedsCheckpoint => self.checkpoint_all(committer),
        }
    }

    fn write_record(&self, committer: &mut Committer, body: &RecordBody) -> Result<()> {
        let place = RecordPlace {
            generation: committer.generation,
            sequence: committer.sequence,
            records_before: committer.records_before,
        };
        let mut buf = std::mem::take(&mut committer.buf);
        let encoded = encode_record(&mut buf, self.core.uuid(), place, body, |block, bytes| {
            // A writer of the block comes before or after, never in the middle.
            let _lock = self.lock_blocks(block, 1);
            self.core.data.read(bytes, block_offset(block))
        });
        let written = encoded.and_then(|()| {
            let Some(area) = committer.area() else {
                return Err(Error::new(ErrorKind::Io, "the journal has no area"));
            };
            area.write(&buf, committer.position).map_err(|error| {
                // It may be there all the same, whole or torn.
                committer.must_checkpoint = true;
                self.core.fatal(error)
            })
        });
        self.core.stats.journal_writes.add(1);
        self.core
            .stats
            .journal_bytes
            .add(buf.as_slice().len() as u64);
        committer.buf = buf;
        written?;
        // The blocks were read from a file whose sync may have failed meanwhile.
        self.core.check_poison()?;
        committer.position += body.encoded_len() as u64;
        committer.sequence += 1;
        if body.barrier {
            committer.live = [false; 2];
        }
        if !body.blocks.is_empty() {
            committer.set_live(committer.current, true);
        }
        self.prepare_other_area(committer);
        Ok(())
    }

    /// Finds a place for a record of `len` bytes.
    fn make_room(&self, committer: &mut Committer, len: u64) -> Result<Room> {
        if len > self.options.journal_max || committer.must_checkpoint {
            return Ok(Room::NeedsCheckpoint);
        }
        let Some(area_len) = committer.area().map(Area::len) else {
            let wanted = self.area_for(len, self.options.journal_start);
            return self.create_area(committer, committer.current, wanted);
        };
        if committer.position + len <= area_len {
            return Ok(Room::Fits);
        }
        if !self.options.background || self.wait_for_retirement(committer).is_err() {
            return Ok(Room::NeedsCheckpoint);
        }
        self.switch_area(committer, area_len, len)
    }

    /// Makes an area. Where there is no space for it there may be for a checkpoint.
    fn create_area(&self, committer: &mut Committer, which: usize, len: u64) -> Result<Room> {
        // An older file of the name is cut first, so it is no area any more.
        committer.set_area(which, None);
        let area = self.core.make_area(which, len)?;
        let room = if area.is_some() {
            Room::Fits
        } else {
            Room::NeedsCheckpoint
        };
        committer.set_area(which, area);
        Ok(room)
    }

    /// The length of the area that follows one of `area_len`: a journal that fills is too small
    /// for its load.
    fn next_len(&self, area_len: u64) -> u64 {
        (area_len * GROWTH).min(self.options.journal_max)
    }

    /// The length of an area of at least `least` bytes that a record of `len` bytes, which is no
    /// longer than an area can be, fits into.
    fn area_for(&self, len: u64, least: u64) -> u64 {
        least
            .max(len.next_power_of_two())
            .min(self.options.journal_max)
    }

    /// Makes the other area, or a larger one in its place, before it is wanted, so that no flush
    /// has to wait for that.
    fn prepare_other_area(&self, committer: &mut Committer) {
        let Some(area_len) = committer.area().map(Area::len) else {
            return;
        };
        if !self.options.background || committer.position < area_len / 2 {
            return;
        }
        if let Some(retiring) = &committer.retiring {
            if !retiring.is_finished() {
                return;
            }
            // A failure is noted there, and the next flush deals with it.
            let _ = self.wait_for_retirement(committer);
        }
        let other = 1 - committer.current;
        let wanted = self.next_len(area_len);
        if committer.must_checkpoint
            || committer.area_len(other) >= wanted
            // On a full disk not again for each flush.
            || committer.prepared == committer.generation
        {
            return;
        }
        committer.prepared = committer.generation;
        // Its file is cut first, so it is no area any more.
        committer.set_area(other, None);
        let core = self.core.clone();
        committer.retiring = spawn(move || core.make_area(other, wanted)).ok();
    }

    /// Goes on in the other area, which is free, and has this one freed in the background.
    fn switch_area(&self, committer: &mut Committer, area_len: u64, len: u64) -> Result<Room> {
        let other = 1 - committer.current;
        let wanted = self.area_for(len, self.next_len(area_len));
        if committer.area_len(other) < len
            && let Room::NeedsCheckpoint = self.create_area(committer, other, wanted)?
        {
            return Ok(Room::NeedsCheckpoint);
        }
        let core = self.core.clone();
        let full = committer.generation;
        let Ok(retiring) = spawn(move || core.retire(full).map(|()| None)) else {
            return Ok(Room::NeedsCheckpoint);
        };
        committer.retiring = Some(retiring);
        committer.current = other;
        committer.records_before = committer.sequence;
        committer.generation += 1;
        committer.sequence = 0;
        committer.position = 0;
        Ok(Room::Fits)
    }

    /// Waits until the area that is not written to is free.
    pub(super) fn wait_for_retirement(&self, committer: &mut Committer) -> Result<()> {
        let Some(retiring) = committer.retiring.take() else {
            return Ok(());
        };
        if !retiring.is_finished() {
            self.core.stats.journal_waits.add(1);
        }
        let outcome = retiring.join().unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Io,
                "the checkpoint thread ended unexpectedly",
            ))
        });
        match outcome {
            Ok(made) => {
                let other = 1 - committer.current;
                committer.set_live(other, false);
                if made.is_some() {
                    committer.set_area(other, made);
                }
                Ok(())
            }
            Err(error) => {
                committer.must_checkpoint = true;
                Err(error)
            }
        }
    }

    /// Syncs everything and writes a checkpoint that contains it, the frozen changes included.
    fn checkpoint_all(&self, committer: &mut Committer) -> Result<()> {
        // Two must not write the map at once, and an older one not come last. Where it failed this
        // one does its work too.
        let _ = self.wait_for_retirement(committer);
        // Should it fail, its name may be durable all the same, and then everything of this
        // generation counts as contained in it: nothing may be added.
        committer.must_checkpoint = true;
        self.core.sync_data()?;
        self.core.checkpoint(committer.generation, true)?;
        committer.begin_after_checkpoint();
        Ok(())
    }
}

/// Starts a thread that works for the journal.
fn spawn(
    work: impl FnOnce() -> Result<Option<Area>> + Send + 'static,
) -> std::io::Result<JoinHandle<Result<Option<Area>>>> {
    std::thread::Builder::new()
        .name("vellum-journal".into())
        .spawn(work)
}

/// The changes by block, where no block is in two of them, as first writes to blocks are.
fn in_order(changes: &[Change]) -> Option<Vec<Change>> {
    let mut ordered = changes.to_vec();
    ordered.sort_unstable_by_key(|change| change.start);
    let apart = ordered
        .iter()
        .zip(ordered.iter().skip(1))
        .all(|(change, next)| change.start + change.len <= next.start);
    apart.then_some(ordered)
}

/// What a sequence of changes comes to.
fn net_changes(changes: &[Change]) -> RecordBody {
    let mut body = RecordBody::default();
    if let [only] = changes {
        body.push_change(only.start, only.len, state_of_value(only.new));
        return body;
    }
    if let Some(ordered) = in_order(changes) {
        let mut changes = ordered.iter().copied().peekable();
        while let Some(mut change) = changes.next() {
            while let Some(next) = changes
                .next_if(|next| next.start == change.start + change.len && next.new == change.new)
            {
                change.len += next.len;
            }
            body.push_change(change.start, change.len, state_of_value(change.new));
        }
        return body;
    }
    // Codes of states, since parent is a change like the others here.
    let mut net = Index::new();
    for change in changes {
        net.set(
            change.start,
            change.len,
            state_code(state_of_value(change.new)),
        );
    }
    for run in net.iter() {
        if let Ok(state) = state_of_code(run.value) {
            body.push_change(run.start, run.len, state);
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{ABSENT, STATE_DATA, STATE_ZERO};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn net_changes_are_the_last_of_each_block_in_runs_as_long_as_can_be(
            changes in prop::collection::vec(
                (0u64..300, 1u64..20, prop::sample::select(vec![ABSENT, STATE_DATA, STATE_ZERO])),
                0..12,
            ),
        ) {
            let mut model = BTreeMap::new();
            let changes: Vec<Change> = changes
                .into_iter()
                .map(|(start, len, new)| {
                    for block in start..start + len {
                        model.insert(block, state_of_value(new));
                    }
                    Change { start, len, old: ABSENT, new }
                })
                .collect();
            let body = net_changes(&changes);
            let mut seen = BTreeMap::new();
            let mut last = None;
            for change in &body.changes {
                prop_assert!(last.is_none_or(|(end, state)| end < change.start || end == change.start && state != change.state));
                last = Some((change.start + u64::from(change.len), change.state));
                for block in change.start..change.start + u64::from(change.len) {
                    seen.insert(block, change.state);
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
