//! Making a layer durable: flushes, records ahead of them, closing and sealing.
//!
//! A flush freezes what changed, makes a [`mod@plan`] and carries it out: few blocks go into the journal
//! with the record that commits them, in one synchronous write and without a sync of the data files;
//! for many the data files are synced first, and the record is a *barrier* that retires the blocks of
//! older records. Where clients flush after every few writes, records are written ahead of the flush.
//! docs/durability.md argues each step.

mod net;
mod plan;
mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use self::net::net_changes;
use self::plan::{Ask, Commit, Content, Place, Plan, Work, is_written, may_carry, plan};
use self::queue::{FlushQueue, Leading, Turn};
use super::header::Header;
use super::journal::{Journal, RecordBody, Room, Standing, When};
use super::map_state::{Frozen, Written};
use super::options::LayerOptions;
use super::shared::Shared;
use super::space::Claim;
use vellum_base::block::{Block, Blocks};
use vellum_base::error::{ErrorKind, Result};

/// Blocks are scattered whose runs are no longer than this on average.
const SCATTERED_RUN: u64 = 4;
/// Many blocks take no more than this part of an area, so that it is not full at once.
const PART_OF_AREA: u64 = 4;

/// Whether two blocks lie next to each other.
fn touch(pair: &[Block]) -> bool {
    matches!(pair, [first, second] if *first + Blocks::ONE == *second)
}

/// What makes a layer durable: one leader at a time has its journal.
#[derive(Debug)]
pub(super) struct Flusher {
    shared: Arc<Shared>,
    journal: Mutex<Journal>,
    queue: FlushQueue,
    /// Records may carry so many blocks wherever they lie.
    few: Blocks,
    /// It was closed: a journal that nobody needs yet is not made any more.
    closed: AtomicBool,
}

impl Flusher {
    /// For a layer whose checkpoint contains generation `covered`, and whose journal is empty.
    pub(super) fn new(shared: Arc<Shared>, options: LayerOptions, covered: u64) -> Self {
        Flusher {
            journal: Mutex::new(Journal::new(shared.clone(), options, covered)),
            shared,
            queue: FlushQueue::default(),
            few: options.few(),
            closed: AtomicBool::new(false),
        }
    }

    /// As [`super::WritableLayer::flush`].
    pub(super) fn flush(&self) -> Result<()> {
        self.shared.stats.flushes.add(1);
        // Also while the journal is made: the kernel flushes a device before anybody can write to it.
        if self.shared.map.read().is_untouched() {
            self.queue.note_flush();
            self.shared.stats.flushes_empty.add(1);
            return self.shared.check_poison();
        }
        match self.queue.enter(&self.shared) {
            Turn::Lead(leading) => {
                self.as_leader(leading, |journal| self.commit(journal, Ask::Flush))
            }
            Turn::Covered(outcome) => {
                self.shared.stats.flushes_coalesced.add(1);
                outcome
            }
        }
    }

    /// As [`super::WritableLayer::expects_flush`].
    pub(super) fn expects_flush(&self) -> bool {
        !self.few.is_none() && self.queue.wrote()
    }

    /// As [`super::WritableLayer::flush_ahead`].
    pub(super) fn flush_ahead(&self) {
        let Some(leading) = self.queue.lead_if_idle(&self.shared) else {
            return;
        };
        let outcome = self.as_leader(leading, |journal| self.commit(journal, Ask::Ahead));
        if let Err(error) = outcome {
            tracing::debug!(%error, "a flush ahead failed");
        }
    }

    /// Whether a client asked for a flush within this time.
    pub(super) fn flushed_within(&self, time: Duration) -> bool {
        self.queue.flushed_within(time)
    }

    /// Runs `work` as the only flush.
    fn lead(&self, work: impl FnOnce(&mut Journal) -> Result<()>) -> Result<()> {
        self.as_leader(self.queue.lead(&self.shared), work)
    }

    /// Runs `work` and tells the clients that wait.
    fn as_leader(
        &self,
        leading: Leading<'_>,
        work: impl FnOnce(&mut Journal) -> Result<()>,
    ) -> Result<()> {
        let outcome = self
            .shared
            .check_poison()
            .and_then(|()| work(&mut self.journal.lock()));
        leading.end(outcome)
    }

    /// As [`super::WritableLayer::prepare_journal`].
    pub(super) fn prepare_journal(&self) -> Result<()> {
        self.lead(
            |journal| match self.shared.is_sealed() || self.closed.load(Relaxed) {
                true => Ok(()),
                false => journal.prepare(),
            },
        )
    }

    /// As [`super::WritableLayer::close`].
    pub(super) fn close(&self) -> Result<()> {
        self.lead(|journal| {
            self.closed.store(true, Relaxed);
            if self.shared.is_sealed() {
                return Ok(());
            }
            self.commit(journal, Ask::Barrier)?;
            if journal.has_areas() {
                // Where no record came since the last checkpoint, it contains everything.
                if journal.finish_retiring().is_err() || !journal.is_contained() {
                    journal.checkpoint(&[])?;
                }
                journal.remove()?;
            }
            self.shared.end_log();
            self.shared.give_back_preallocated();
            self.shared.space.give_back();
            Ok(())
        })
    }

    /// As [`super::WritableLayer::prepare_seal`].
    pub(super) fn prepare_seal(&self) -> Result<()> {
        self.lead(|journal| {
            self.shared.give_back_preallocated();
            self.leave_nothing_in_journal(journal)
        })
    }

    /// Flushes so that no block is in the journal alone, and waits for its thread.
    fn leave_nothing_in_journal(&self, journal: &mut Journal) -> Result<()> {
        self.commit(journal, Ask::Barrier)?;
        let freed = journal.finish_retiring();
        if freed.is_err() || journal.status().standing == Standing::Unknown {
            journal.checkpoint(&[])?;
        }
        assert!(!journal.status().carries, "blocks in the journal alone");
        Ok(())
    }

    /// As [`super::WritableLayer::seal`].
    pub(super) fn seal(&self) -> Result<()> {
        self.lead(|journal| {
            self.leave_nothing_in_journal(journal)?;
            let shared = &*self.shared;
            shared.give_back_preallocated();
            let header = Header {
                sealed: true,
                ..shared.header()
            };
            let (storage, dir) = (&*shared.storage, &*shared.dir);
            let write = || header.write(storage, dir);
            let written = shared.space.within(Claim::Own, 0, write);
            written.map_err(|error| {
                match Header::read(storage, dir) {
                    Ok(found) if !found.sealed => shared.fatal(error),
                    // A crash may find it sealed, so nothing may be written to it any more.
                    _ => shared.poison(&error),
                }
            })?;
            shared.set_sealed();
            shared.end_log();
            shared.space.give_back_all();
            Ok(())
        })
    }

    /// As [`super::WritableLayer::grow`].
    pub(super) fn grow(&self, size: u64) -> Result<()> {
        self.lead(|_| self.shared.grow(size))
    }

    /// Freezes what changed and commits it.
    fn commit(&self, journal: &mut Journal, ask: Ask) -> Result<()> {
        let Some(mut frozen) = self.freeze(journal, ask) else {
            return Ok(());
        };
        // Not under the lock: there may be very many, and requests would wait.
        let changes = frozen.take_changes();
        let body = RecordBody {
            barrier: false,
            changes: net_changes(&changes),
            blocks: frozen.blocks(),
        };
        drop(changes);
        let work = Work {
            changes: body.changes.len(),
            written: self.worth_carrying(frozen.written(body.carried()), &body.blocks, journal),
        };
        let plan = self.plan(ask, work, journal);
        let outcome = self.carry_out(plan, journal, body, ask);
        let map = &mut *self.shared.map.write();
        match &outcome {
            Ok(()) => map.settle(frozen),
            Err(_) => map.thaw(frozen),
        }
        outcome
    }

    /// Freezes what changed; `None` where it is not to be written ahead.
    fn freeze(&self, journal: &Journal, ask: Ask) -> Option<Frozen> {
        let map = &mut *self.shared.map.write();
        if ask != Ask::Ahead {
            return Some(map.freeze());
        }
        let (changes, written) = map.pending();
        let written = match written {
            // How they lie is not known yet.
            Written::Few(blocks) if blocks > self.few => Written::Many,
            other => other,
        };
        let work = Work { changes, written };
        let plan = plan(ask, work, &journal.status(), true);
        (plan != Plan::NOTHING).then(|| map.freeze_ahead())
    }

    /// What was written, as far as a record had better carry it. Scattered blocks cost a sync of the data
    /// files a write each, and the journal one for all; what lies together is written once by the former.
    fn worth_carrying(&self, written: Written, blocks: &[Block], journal: &Journal) -> Written {
        let Written::Few(count) = written else {
            return written;
        };
        let fits = count.bytes() <= journal.status().longest / PART_OF_AREA;
        let runs = 1 + blocks.windows(2).filter(|pair| !touch(pair)).count() as u64;
        let is_scattered = runs * SCATTERED_RUN >= count.get();
        match count <= self.few || fits && is_scattered {
            true => written,
            false => Written::Many,
        }
    }

    /// Makes the plan, with what it wants to know of the host's space.
    fn plan(&self, ask: Ask, work: Work, journal: &Journal) -> Plan {
        let status = journal.status();
        let mut covered = false;
        if !is_written(ask, work, &status) {
            let space = &self.shared.space;
            if space.look_after() {
                self.shared.mind_low_space();
            }
            space.map_is(self.shared.checkpoint_room());
            if may_carry(ask, work) {
                // After a power cut they want space that the data files may not have by then.
                covered = space.covers(journal.carried() + work.carried_bytes());
            }
        }
        plan(ask, work, &status, covered)
    }

    fn carry_out(
        &self,
        plan: Plan,
        journal: &mut Journal,
        mut body: RecordBody,
        ask: Ask,
    ) -> Result<()> {
        if plan == Plan::NOTHING {
            assert_ne!(ask, Ask::Ahead, "frozen, and not written");
            self.shared.stats.flushes_empty.add(1);
        }
        if plan.sync_data {
            self.shared.sync_data()?;
        }
        match plan.commit {
            Commit::Nothing => {}
            Commit::Checkpoint => journal.checkpoint(&body.changes)?,
            Commit::Record {
                content,
                place,
                when,
            } => {
                if content == Content::Barrier {
                    body.barrier = true;
                    body.blocks.clear();
                }
                match self.write_record(journal, &body, place, when) {
                    Ok(Room::Found) => {}
                    Ok(Room::NeedsCheckpoint) => return journal.checkpoint(&body.changes),
                    // There is room for a checkpoint, if for nothing else.
                    Err(error) if error.kind() == ErrorKind::NoSpace && ask != Ask::Ahead => {
                        return journal.checkpoint(&body.changes);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if plan.sync_journal {
            journal.sync()?;
        }
        if matches!(plan.commit, Commit::Record { .. }) {
            journal.prepare_other_area();
        }
        if ask == Ask::Ahead {
            self.shared.stats.records_ahead.add(1);
        }
        Ok(())
    }

    /// Writes a record at its place, where that can be made.
    fn write_record(
        &self,
        journal: &mut Journal,
        body: &RecordBody,
        place: Place,
        when: When,
    ) -> Result<Room> {
        let len = body.encoded_len() as u64;
        let room = match place {
            Place::Here => Room::Found,
            Place::NewArea => journal.make_area(len)?,
            Place::OtherArea => journal.switch(len)?,
        };
        if room == Room::Found {
            journal.append(body, when)?;
        }
        Ok(room)
    }

    /// As [`super::WritableLayer::assert_sound`].
    pub(super) fn assert_sound(&self) {
        self.journal.lock().assert_sound();
        self.shared.map.read().assert_sound();
    }
}

#[cfg(test)]
mod tests;
