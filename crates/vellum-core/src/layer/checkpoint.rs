//! Checkpoints: the file `map` says what the map is, after which the records before are not needed.
//! What changed since the last one is added to the file; now and then all of the map replaces it.

use std::sync::atomic::Ordering;

use super::index::Index;
use super::map_file::{LogPlace, add_segment, net, replace_map};
use super::shared::Shared;
use super::space::Claim;
use super::table::{MapExtent, checkpoint_len, push_extent};
use vellum_base::block::{Block, BlockState, Blocks, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::memory;

/// A map of this many bytes needed memory that is worth giving back.
const MUCH_MEMORY: u64 = 1 << 20;

/// Once that many areas of the journal were filled and retired, memory lets go of what they carried: the file
/// system above has it as well, as far as anybody wants it.
const LET_GO_AFTER: u64 = 4;

/// Blocks whose part of the map is copied under one lock.
const CHECKPOINT_CHUNK: Blocks = Blocks::new(1 << 19);

impl Shared {
    /// A failure to make something durable: out of space can be tried again, all else poisons.
    pub(super) fn fatal(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::NoSpace {
            error
        } else {
            self.poison(&error)
        }
    }

    /// Syncs the data files. Any failure poisons: the kernel has forgotten what it could not write.
    pub(super) fn sync_data(&self) -> Result<()> {
        let syncs = self.data.sync().map_err(|error| self.poison(&error))?;
        self.stats.data_syncs.add(syncs);
        self.check_poison()
    }

    /// Makes the records of generation `full` and before unnecessary. `changes` are what they said
    /// since the last checkpoint, `None` where they are not known.
    pub(super) fn retire(&self, full: u64, changes: Option<Vec<MapExtent>>) -> Result<()> {
        self.sync_data()?;
        if full.is_multiple_of(LET_GO_AFTER) {
            self.data.let_go();
        }
        self.checkpoint(full, false, changes)
    }

    /// To be called once blocks were read for a record: they are what clients wrote last, or the layer is
    /// poisoned, since memory may have let go of what could not be written back.
    pub(super) fn check_read_back(&self) -> Result<()> {
        let written = self.data.check_written_back();
        written.map_err(|error| self.poison(&error))
    }

    /// Writes a checkpoint that contains generation `generation`. `changes` are those since the last
    /// one, durable all of them or with their data; `None` where they are not known.
    pub(super) fn checkpoint(
        &self,
        generation: u64,
        with_in_flight: bool,
        changes: Option<Vec<MapExtent>>,
    ) -> Result<()> {
        self.stats.checkpoints.add(1);
        let mut place = self.map_place.lock();
        // Where anything fails the next one replaces the file.
        let there = place.take();
        let changes = there.and(changes).map(net);
        let added = match (there, changes) {
            (Some(there), Some(changes)) if there.has_room(changes.len(), self.map_log) => {
                match self.add_to_map(&there, generation, &changes) {
                    // What it took is free again, the table may be small, and there is a reserve
                    // for it.
                    Err(error) if error.kind() == ErrorKind::NoSpace => None,
                    added => Some(added?),
                }
            }
            _ => None,
        };
        let (bytes, next) = match added {
            Some(added) => added,
            None => self.replace_map(generation, with_in_flight)?,
        };
        *place = Some(next);
        if bytes > MUCH_MEMORY {
            memory::give_back();
        }
        Ok(())
    }

    /// The next checkpoint must replace the file: what changed since the last one is not known.
    pub(super) fn forget_map_place(&self) {
        *self.map_place.lock() = None;
    }

    /// Adds what changed to the file.
    fn add_to_map(
        &self,
        there: &LogPlace,
        generation: u64,
        changes: &[MapExtent],
    ) -> Result<(u64, LogPlace)> {
        let (storage, dir) = (&*self.storage, &*self.dir);
        let added = add_segment(storage, dir, there, &self.header(), generation, changes);
        let (bytes, next) = added.map_err(|failed| {
            if failed.unsure {
                self.poison(&failed.error)
            } else {
                self.fatal(failed.error)
            }
        })?;
        self.stats.checkpoint_bytes.add(bytes);
        Ok((bytes, next))
    }

    /// Replaces the file by the whole map.
    fn replace_map(&self, generation: u64, with_in_flight: bool) -> Result<(u64, LogPlace)> {
        let changed = self.map.read().changed_durably(with_in_flight);
        let extents = self.durable_extents(with_in_flight);
        let count = extents.len() as u64;
        let bytes = checkpoint_len(count);
        self.stats.checkpoint_bytes.add(bytes);
        let (storage, dir) = (&*self.storage, &*self.dir);
        let header = self.header();
        let replace = || replace_map(storage, dir, &header, generation, &extents);
        let replaced = self.space.within(Claim::Own, bytes, replace);
        let next = replaced.map_err(|error| self.fatal(error))?;
        // Each change since makes two extents at most of one.
        self.map_extents.store(count, Ordering::Relaxed);
        self.map_changed.store(changed, Ordering::Release);
        Ok((bytes, next))
    }

    /// Bytes that the next checkpoint takes at most, while the present one is still there.
    pub(super) fn checkpoint_room(&self) -> u64 {
        // In this order: a checkpoint may be made meanwhile.
        let contained = self.map_changed.load(Ordering::Acquire);
        let since = self.map.read().changed() - contained;
        let extents = self.map_extents.load(Ordering::Relaxed) + 2 * since;
        checkpoint_len(extents.min(Blocks::whole_in(self.size()).get()))
    }

    /// The map without the changes that are not durable. Each part is as it was at one moment;
    /// what changes between the parts is in newer records, and replaying those makes it whole.
    pub(super) fn durable_extents(&self, with_in_flight: bool) -> Vec<MapExtent> {
        let mut extents = Extents::default();
        let mut start = Block::FIRST;
        loop {
            let span = Span::new(start, CHECKPOINT_CHUNK);
            let found = self.map.read().durable_runs(span, with_in_flight);
            let Some((runs, undo)) = found else {
                break;
            };
            if undo.is_empty() {
                runs.into_iter().for_each(|run| extents.push(run));
            } else {
                let mut index = Index::new();
                runs.iter().for_each(|run| index.set(run.span, run.value));
                // From the newest to the oldest: what was there first is what is durable.
                for change in undo.iter().rev() {
                    index.set(change.span, change.value.old);
                }
                index.runs(span).for_each(|run| extents.push(run));
            }
            start += CHECKPOINT_CHUNK;
        }
        extents.finish()
    }
}

/// Collects runs, joining those that touch.
#[derive(Default)]
struct Extents {
    done: Vec<MapExtent>,
    last: Option<Run<BlockState>>,
}

impl Extents {
    fn push(&mut self, run: Run<BlockState>) {
        match &mut self.last {
            Some(last) if last.span.meets(run.span) && last.value == run.value => {
                last.span = last.span.longer_by(run.len());
            }
            _ => {
                self.close();
                self.last = Some(run);
            }
        }
    }

    fn close(&mut self) {
        if let Some(run) = self.last.take() {
            push_extent(&mut self.done, run);
        }
    }

    fn finish(mut self) -> Vec<MapExtent> {
        self.close();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::Header;
    use crate::layer::{LayerOptions, WritableLayer};
    use std::path::Path;
    use std::sync::Arc;
    use vellum_base::block::{Block, BlockState, Blocks, Span};
    use vellum_base::storage::SimStorage;

    fn span(start: u64, len: u64) -> Span {
        Span::new(Block::new(start), Blocks::new(len))
    }

    /// A map that says *data* of a block whose bytes no sync and no record has would show whatever
    /// the data file happens to hold.
    #[test]
    fn a_checkpoint_leaves_out_changes_that_no_record_holds_yet() {
        let storage = Arc::new(SimStorage::new());
        let dir = Path::new("/layer");
        WritableLayer::create(&*storage, dir, &Header::new(None, 1 << 20).unwrap()).unwrap();
        let layer = WritableLayer::open(storage, dir, LayerOptions::default()).unwrap();
        layer.put(0, &[1; 4 * 4096]).unwrap();
        layer.flush().unwrap();
        let flushed = layer.shared.durable_extents(false);
        layer.clear(span(1, 2), BlockState::Zero).unwrap();
        layer.put(2, &[2; 4096]).unwrap();
        layer.put(9, &[2; 4096]).unwrap();
        layer.clear(span(3, 1), BlockState::Parent).unwrap();
        assert_eq!(layer.shared.durable_extents(false), flushed);
        let _frozen = layer.shared.map.write().freeze();
        layer.put(20, &[3; 4096]).unwrap();
        layer.put(1, &[3; 4096]).unwrap();
        // The background's checkpoint, while the record of some is being written.
        assert_eq!(layer.shared.durable_extents(false), flushed);
        // A checkpoint in that record's place contains them, and nothing newer.
        let extents: Vec<_> = layer
            .shared
            .durable_extents(true)
            .iter()
            .map(|extent| {
                let span = extent.span();
                (span.start().get(), span.len().get(), extent.state())
            })
            .collect();
        let (data, zero) = (BlockState::Data, BlockState::Zero);
        assert_eq!(
            extents,
            [(0, 1, data), (1, 1, zero), (2, 1, data), (9, 1, data)]
        );
    }
}
