//! Making a layer durable: flushes, checkpoints, closing and sealing.
//!
//! A flush freezes what changed, makes the data durable, then commits the frozen changes in one
//! synchronous journal write. Little new data goes into that write itself (design E of a redo
//! journal: no sync of the data file at all); more is synced first, and then the record carries a
//! *barrier* that retires the blocks of older records. Records may also have been written ahead of
//! the flush ([`crate::layer::ahead`]). docs/durability.md argues each step.

mod queue;

pub(super) use queue::FlushQueue;
use queue::{Leading, Turn};

use crate::layer::areas::{Journal, Room};
use crate::layer::header::Header;
use crate::layer::index::Index;
use crate::layer::journal::{RecordBody, RecordPlace, block_offset, encode_record};
use crate::layer::map_state::{Change, Dirty, MapState};
use crate::layer::recovery::remove_journal;
use crate::layer::space::Claim;
use crate::layer::state_of_value;
use crate::layer::table::{MapExtent, state_code, state_of_code};
use crate::layer::writable::WritableLayer;
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::{Error, ErrorKind, Result};

/// What changes are committed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    /// A flush.
    Flush,
    /// A flush after which no block lives in the journal alone.
    Barrier,
    /// A record ahead of a flush, which will make it durable.
    Ahead,
}

impl WritableLayer {
    /// Makes every write that completed before the call durable. Flushes that overlap coalesce.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when neither the journal nor the map has room: nothing flushed
    /// earlier is harmed, and the flush may be tried again. So it may where a block cannot be read
    /// back. Any other failure poisons the layer.
    pub fn flush(&self) -> Result<()> {
        self.shared.stats.flushes.add(1);
        match self.queue.enter(&self.shared) {
            Turn::Lead(leading) => self.as_leader(leading, |layer, journal| {
                layer.commit(journal, Commit::Flush)
            }),
            Turn::Covered(outcome) => {
                self.shared.stats.flushes_coalesced.add(1);
                outcome
            }
        }
    }

    /// Runs `work` as the only flush.
    fn lead(&self, work: impl FnOnce(&Self, &mut Journal) -> Result<()>) -> Result<()> {
        self.as_leader(self.queue.lead(&self.shared), work)
    }

    /// Runs `work` and tells the clients that wait.
    pub(super) fn as_leader(
        &self,
        leading: Leading<'_>,
        work: impl FnOnce(&Self, &mut Journal) -> Result<()>,
    ) -> Result<()> {
        let outcome = self
            .check_poison()
            .and_then(|()| work(self, &mut self.journal.lock()));
        leading.end(outcome)
    }

    /// Flushes, checkpoints and removes the journal, so that the next open has nothing to recover.
    /// The layer can still be used.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn close(&self) -> Result<()> {
        self.lead(|layer, journal| {
            if layer.shared.is_sealed() {
                return Ok(());
            }
            layer.commit(journal, Commit::Barrier)?;
            if journal.areas.iter().any(Option::is_some) {
                let freed = layer.wait_for_retirement(journal);
                // Where no record came since the last checkpoint, it contains everything.
                if freed.is_err() || journal.must_checkpoint || journal.sequence > 0 {
                    layer.checkpoint_all(journal, &[])?;
                }
                journal.areas = [None, None];
                let shared = &layer.shared;
                let remove = || remove_journal(&*shared.storage, &shared.dir);
                shared.space.within(Claim::Own, 0, remove)?;
            }
            layer.shared.end_live();
            layer.shared.space.give_back();
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
        self.lead(WritableLayer::settle)
    }

    /// Flushes so that no block lives in the journal alone, and waits for its thread.
    fn settle(&self, journal: &mut Journal) -> Result<()> {
        self.commit(journal, Commit::Barrier)?;
        if self.wait_for_retirement(journal).is_err() || journal.must_checkpoint {
            self.checkpoint_all(journal, &[])?;
        }
        Ok(())
    }

    /// Makes the first area of the journal before a flush wants it. Where there is no space it is
    /// left to that flush.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn prepare_journal(&self) -> Result<()> {
        self.lead(|layer, journal| {
            if journal.area().is_some() || journal.must_checkpoint || layer.shared.is_sealed() {
                return Ok(());
            }
            let which = journal.current;
            layer
                .create_area(journal, which, layer.options.journal_start)
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
        self.lead(|layer, _| layer.shared.grow(size))
    }

    /// Makes the layer sealed: durable and never to change again. Takes about as long as a flush,
    /// whatever the layer holds. The caller sees to it that no writes come any more.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn seal(&self) -> Result<()> {
        self.lead(|layer, journal| {
            layer.settle(journal)?;
            let header = Header {
                sealed: true,
                ..layer.shared.header()
            };
            let (storage, dir) = (&*layer.shared.storage, &*layer.shared.dir);
            let write = || header.write(storage, dir);
            let written = layer.shared.space.within(Claim::Own, 0, write);
            written.map_err(|error| {
                match Header::read(storage, dir) {
                    Ok(found) if !found.sealed => layer.shared.fatal(error),
                    // A crash may find it sealed, so nothing may be written to it any more.
                    _ => layer.shared.poison(&error),
                }
            })?;
            layer.shared.set_sealed();
            layer.shared.end_live();
            layer.shared.space.give_back_all();
            Ok(())
        })
    }

    /// Freezes what changed and commits it.
    pub(super) fn commit(&self, journal: &mut Journal, kind: Commit) -> Result<()> {
        let (dirty, frozen) = {
            let mut map = self.shared.map.write();
            let map: &mut MapState = &mut map;
            let frozen = if kind == Commit::Ahead {
                if !journal.can_go_ahead(map) {
                    return Ok(());
                }
                let frozen = std::mem::take(&mut map.changes);
                map.ahead.extend_from_slice(&frozen);
                frozen
            } else {
                map.in_flight = std::mem::take(&mut map.changes);
                if let Some(live) = &mut map.live {
                    live.freeze();
                }
                map.in_flight.clone()
            };
            (std::mem::take(&mut map.dirty), frozen)
        };
        let frozen_len = frozen.len();
        // Not under the lock: there may be very many, and requests would wait.
        let body = net_changes(&frozen);
        drop(frozen);
        let retires = kind == Commit::Barrier && journal.has_live_blocks();
        let result = if dirty.is_empty() && body.changes.is_empty() && !retires {
            if !journal.has_unsynced() {
                self.shared.stats.flushes_empty.add(1);
            }
            self.sync_journal(journal)
        } else {
            self.commit_frozen(journal, body, &dirty, kind)
        };
        let mut map = self.shared.map.write();
        let map: &mut MapState = &mut map;
        if result.is_err() {
            // Neither written nor durable: the next flush has to do it.
            let frozen = if kind == Commit::Ahead {
                let written = map.ahead.len().saturating_sub(frozen_len);
                map.ahead.split_off(written)
            } else {
                std::mem::take(&mut map.in_flight)
            };
            let newer = std::mem::replace(&mut map.changes, frozen);
            map.changes.extend(newer);
            map.dirty.blocks += dirty.blocks;
            map.dirty.many |= !dirty.is_empty();
        } else if kind != Commit::Ahead {
            map.in_flight.clear();
            if let Some(live) = &mut map.live {
                live.committed();
            }
        }
        result
    }

    fn commit_frozen(
        &self,
        journal: &mut Journal,
        mut body: RecordBody,
        dirty: &Dirty,
        kind: Commit,
    ) -> Result<()> {
        self.shared.space.look_after();
        self.shared.space.map_is(self.shared.checkpoint_room());
        let mut carry = kind != Commit::Barrier && !dirty.many;
        if carry {
            body.blocks = dirty.distinct_blocks();
            // After a power cut they want space that the data files may not have by then.
            let carried = journal.carried + body.blocks.len() as u64 * BLOCK_SIZE;
            carry = kind == Commit::Ahead || self.shared.space.covers(carried);
        }
        if !carry {
            body.blocks.clear();
            self.shared.sync_data()?;
            body.barrier = true;
            let nothing = body.changes.is_empty() && !journal.has_live_blocks();
            if nothing && !journal.must_checkpoint {
                return self.sync_journal(journal);
            }
        }
        if kind == Commit::Ahead {
            return self.write_record(journal, &body, kind);
        }
        match self.make_room(journal, body.encoded_len() as u64)? {
            Room::Fits => match self.write_record(journal, &body, kind) {
                // There is room for a checkpoint, if for nothing else.
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    self.checkpoint_all(journal, &body.changes)
                }
                other => other,
            },
            Room::NeedsCheckpoint => self.checkpoint_all(journal, &body.changes),
        }
    }

    fn write_record(&self, journal: &mut Journal, body: &RecordBody, kind: Commit) -> Result<()> {
        // A durable write says nothing of the records before it.
        let durable = kind != Commit::Ahead && !journal.has_unsynced();
        let place = RecordPlace {
            generation: journal.generation,
            sequence: journal.sequence,
            records_before: journal.records_before,
            durable: journal.durable,
        };
        let mut buf = std::mem::take(&mut journal.buf);
        let encoded = encode_record(&mut buf, self.shared.uuid(), place, body, |first, bytes| {
            // A writer of a block comes before or after, never in the middle.
            let _lock = self.lock_blocks(first, bytes.len() as u64 / BLOCK_SIZE);
            self.shared.data.read(bytes, block_offset(first))
        });
        let written = encoded.and_then(|()| {
            let Some(area) = journal.area() else {
                return Err(Error::new(ErrorKind::Io, "the journal has no area"));
            };
            let position = journal.position;
            let write = if durable {
                area.write(&buf, position)
            } else {
                area.write_unsynced(&buf, position)
            };
            write.map_err(|error| {
                // It may be there all the same, whole or torn.
                journal.must_checkpoint = true;
                self.shared.fatal(error)
            })
        });
        self.shared.stats.journal_writes.add(1);
        self.shared
            .stats
            .journal_bytes
            .add(buf.as_slice().len() as u64);
        journal.buf = buf;
        written?;
        // The blocks were read from a file whose sync may have failed meanwhile.
        self.shared.check_poison()?;
        journal.position += body.encoded_len() as u64;
        journal.sequence += 1;
        journal.unsaved.add(&body.changes);
        if kind == Commit::Ahead {
            self.shared.stats.records_ahead.add(1);
        } else if durable {
            journal.durable = journal.sequence;
        } else {
            self.sync_journal(journal)?;
        }
        if body.barrier {
            journal.live = [false; 2];
            journal.carried = 0;
        }
        journal.carried += body.blocks.len() as u64 * BLOCK_SIZE;
        if !body.blocks.is_empty() {
            journal.set_live(journal.current, true);
        }
        self.prepare_other_area(journal);
        Ok(())
    }

    /// Syncs everything and writes a checkpoint that contains it, the frozen changes included: these
    /// are `newest`.
    fn checkpoint_all(&self, journal: &mut Journal, newest: &[MapExtent]) -> Result<()> {
        // Two must not write the map at once, and an older one not come last. Where it failed this
        // one does its work too.
        let _ = self.wait_for_retirement(journal);
        // Should it fail, its name may be durable all the same, and then everything of this
        // generation counts as contained in it: nothing may be added.
        journal.must_checkpoint = true;
        self.shared.sync_data()?;
        let mut changes = journal.unsaved.take();
        if journal.durable == 0 {
            // Should what is added to the map be torn, the journal could not tell.
            changes = None;
        }
        if let Some(changes) = &mut changes {
            changes.extend_from_slice(newest);
        }
        self.shared.checkpoint(journal.generation, true, changes)?;
        self.shared.map.write().ahead.clear();
        journal.begin_after_checkpoint();
        Ok(())
    }
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
