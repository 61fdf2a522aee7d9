//! Checkpoints: the whole map in a file of its own, after which the records before it are not needed.

use super::index::Index;
use super::journal::Area;
use super::map_state::Change;
use super::recovery::write_checkpoint;
use super::shared::Core;
use super::state_of_value;
use super::table::{MapExtent, checkpoint_len, push_extent};
use crate::error::{Error, ErrorKind, Result};
use crate::memory;

/// A map of this many bytes needed memory that is worth giving back.
const MUCH_MEMORY: u64 = 1 << 20;

/// Blocks whose part of the map is copied under one lock.
const CHECKPOINT_CHUNK: u64 = 1 << 19;

impl Core {
    /// Makes an area; `None` where there is no space for it.
    pub(super) fn make_area(&self, which: usize, len: u64) -> Result<Option<Area>> {
        match Area::create(&*self.storage, &self.dir, which, len) {
            Ok(area) => Ok(Some(area)),
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(None),
            Err(error) => Err(self.poison(&error)),
        }
    }

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

    /// Makes the records of generation `full` and before unnecessary.
    pub(super) fn retire(&self, full: u64) -> Result<()> {
        self.sync_data()?;
        self.checkpoint(full, false)
    }

    pub(super) fn checkpoint(&self, generation: u64, with_in_flight: bool) -> Result<()> {
        self.stats.checkpoints.add(1);
        let extents = self.durable_extents(with_in_flight);
        let bytes = checkpoint_len(extents.len());
        self.stats.checkpoint_bytes.add(bytes);
        let written = write_checkpoint(
            &*self.storage,
            &self.dir,
            &self.header(),
            generation,
            &extents,
        );
        if bytes > MUCH_MEMORY {
            drop(extents);
            memory::give_back();
        }
        written.map_err(|error| self.fatal(error))
    }

    /// The map without the changes that are not durable. Each part is as it was at one moment;
    /// what changes between the parts is in newer records, and replaying those makes it whole.
    pub(super) fn durable_extents(&self, with_in_flight: bool) -> Vec<MapExtent> {
        let mut extents = Extents::default();
        let mut start = 0;
        loop {
            let range = start..start + CHECKPOINT_CHUNK;
            let (runs, undo) = {
                let map = self.map.read();
                if start >= map.index.end() {
                    break;
                }
                let (ahead, in_flight): (&[Change], &[Change]) = if with_in_flight {
                    (&[], &[])
                } else {
                    (&map.ahead, &map.in_flight)
                };
                let undo: Vec<Change> = ahead
                    .iter()
                    .chain(in_flight)
                    .chain(&map.changes)
                    .filter(|change| {
                        change.start < range.end && range.start < change.start + change.len
                    })
                    .copied()
                    .collect();
                (map.index.runs(range.clone()).collect::<Vec<_>>(), undo)
            };
            if undo.is_empty() {
                runs.iter()
                    .for_each(|run| extents.push(run.start, run.len, run.value));
            } else {
                let mut index = Index::new();
                runs.iter()
                    .for_each(|run| index.set(run.start, run.len, run.value));
                // From the newest to the oldest: what was there first is what is durable.
                for change in undo.iter().rev() {
                    index.set(change.start, change.len, change.old);
                }
                index
                    .runs(range)
                    .for_each(|run| extents.push(run.start, run.len, run.value));
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
    last: Option<(u64, u64, u32)>,
}

impl Extents {
    fn push(&mut self, start: u64, len: u64, value: u32) {
        match &mut self.last {
            Some((last, last_len, last_value))
                if *last + *last_len == start && *last_value == value =>
            {
                *last_len += len;
            }
            _ => {
                self.close();
                self.last = Some((start, len, value));
            }
        }
    }

    fn close(&mut self) {
        if let Some((start, len, value)) = self.last.take() {
            push_extent(&mut self.done, start, len, state_of_value(value));
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
    use crate::block::BlockState;
    use crate::layer::{LayerOptions, WritableLayer};
    use crate::storage::SimStorage;
    use std::path::Path;
    use std::sync::Arc;

    /// A map that says *data* of a block whose bytes no sync and no record has would show whatever
    /// the data file happens to hold.
    #[test]
    fn a_checkpoint_leaves_out_changes_that_no_record_holds_yet() {
        let storage = Arc::new(SimStorage::new());
        let dir = Path::new("/layer");
        WritableLayer::create(&*storage, dir, &Header::new(None, 1 << 20).unwrap()).unwrap();
        let layer = WritableLayer::open(storage, dir, LayerOptions::default()).unwrap();
        layer.write_blocks(0, &[1; 4 * 4096]).unwrap();
        layer.flush().unwrap();
        let flushed = layer.core.durable_extents(false);
        layer.clear_blocks(1, 2, BlockState::Zero).unwrap();
        layer.write_blocks(2, &[2; 4096]).unwrap();
        layer.write_blocks(9, &[2; 4096]).unwrap();
        layer.clear_blocks(3, 1, BlockState::Parent).unwrap();
        assert_eq!(layer.core.durable_extents(false), flushed);
        {
            let map = &mut *layer.core.map.write();
            map.in_flight = std::mem::take(&mut map.changes);
        }
        layer.write_blocks(20, &[3; 4096]).unwrap();
        layer.write_blocks(1, &[3; 4096]).unwrap();
        // The background's checkpoint, while the record of some is being written.
        assert_eq!(layer.core.durable_extents(false), flushed);
        // A checkpoint in that record's place contains them, and nothing newer.
        let extents: Vec<_> = layer
            .core
            .durable_extents(true)
            .iter()
            .map(|extent| (extent.start, extent.len, extent.state))
            .collect();
        let (data, zero) = (BlockState::Data, BlockState::Zero);
        assert_eq!(
            extents,
            [(0, 1, data), (1, 1, zero), (2, 1, data), (9, 1, data)]
        );
    }
}
