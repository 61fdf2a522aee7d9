//! Flushing ahead: where a client flushes after every few writes, as a database does, the record of
//! a write is on its way to the disk while the client still thinks, and the flush that follows finds
//! nothing left to write. docs/durability.md argues why that is safe.

use super::areas::Journal;
use super::flush::Commit;
use super::journal::{Area, RecordBody};
use super::map_state::MapState;
use super::writable::WritableLayer;
use vellum_base::error::Result;

impl WritableLayer {
    /// To be told of each write after it was answered: true where a flush is likely to come next,
    /// and [`WritableLayer::flush_ahead`] worth its while.
    pub fn expects_flush(&self) -> bool {
        self.options.journal_blocks > 0 && self.queue.wrote()
    }

    /// Writes down in the journal what the next flush would, where that needs neither a sync of
    /// data nor room to be made, and nobody flushes just now. Makes nothing durable; what fails here
    /// the next flush meets again.
    pub fn flush_ahead(&self) {
        let Some(leading) = self.queue.lead_if_idle(&self.shared) else {
            return;
        };
        let outcome = self.as_leader(leading, |layer, journal| {
            layer.commit(journal, Commit::Ahead)
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "a flush ahead failed");
        }
    }

    /// Makes the records durable that were written ahead.
    ///
    /// # Errors
    /// Any failure poisons, as that of every sync.
    pub(super) fn sync_journal(&self, journal: &mut Journal) -> Result<()> {
        if !journal.has_unsynced() {
            return Ok(());
        }
        if let Some(area) = journal.area() {
            area.sync().map_err(|error| self.shared.poison(&error))?;
        }
        self.shared.stats.journal_syncs.add(1);
        journal.durable = journal.sequence;
        // From now on a checkpoint may, and one of this generation must, contain their changes.
        self.shared.map.write().ahead.clear();
        Ok(())
    }
}

impl Journal {
    /// Some records were written ahead, and no sync has made them durable.
    pub(super) fn has_unsynced(&self) -> bool {
        self.durable < self.sequence
    }

    /// Whether what changed can be written ahead as it is.
    pub(super) fn can_go_ahead(&self, map: &MapState) -> bool {
        let dirty = &map.dirty;
        if dirty.is_empty() || dirty.many || self.must_checkpoint {
            return false;
        }
        let most = RecordBody::len_of(map.changes.len(), dirty.blocks as usize) as u64;
        self.area().map_or(0, Area::len) >= self.position + most
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::layer::{Header, LayerOptions};
    use vellum_base::storage::{Fault, FaultPlan, FaultStorage, OpCounts, OpKind, SimStorage};

    struct Rig {
        storage: Arc<FaultStorage>,
        layer: Arc<WritableLayer>,
    }

    impl Rig {
        fn new() -> Self {
            let storage = Arc::new(FaultStorage::new(Arc::new(SimStorage::new())));
            let dir = Path::new("/layer");
            WritableLayer::create(&*storage, dir, &Header::new(None, 1 << 20).unwrap()).unwrap();
            let options = LayerOptions {
                background: false,
                ..LayerOptions::default()
            };
            let layer = WritableLayer::open(storage.clone(), dir, options).unwrap();
            layer.prepare_journal().unwrap();
            Rig { storage, layer }
        }

        /// The synchronous operations and writes of `work`.
        fn counted(&self, work: impl FnOnce(&WritableLayer)) -> [u64; 4] {
            let before: OpCounts = self.storage.counts();
            work(&self.layer);
            let counts = self.storage.counts().since(&before);
            [
                OpKind::WriteDirect,
                OpKind::WriteDurable,
                OpKind::SyncData,
                OpKind::Sync,
            ]
            .map(|kind| counts.of(kind))
        }
    }

    #[test]
    fn a_flush_after_one_ahead_syncs_the_journal_and_writes_nothing() {
        let rig = Rig::new();
        rig.layer.write_blocks(3, &[1; 8192]).unwrap();
        let ahead = rig.counted(WritableLayer::flush_ahead);
        let flush = rig.counted(|layer| layer.flush().unwrap());
        let again = rig.counted(|layer| layer.flush().unwrap());
        assert_eq!((ahead, flush, again), ([1, 0, 0, 0], [0, 0, 1, 0], [0; 4]));
    }

    #[test]
    fn a_flush_with_more_to_carry_than_was_written_ahead_writes_and_syncs() {
        let rig = Rig::new();
        rig.layer.write_blocks(3, &[1; 8192]).unwrap();
        rig.layer.flush_ahead();
        rig.layer.write_blocks(9, &[1; 4096]).unwrap();
        let flush = rig.counted(|layer| layer.flush().unwrap());
        assert_eq!(flush, [1, 0, 1, 0]);
        // And the next one is one synchronous write again.
        rig.layer.write_blocks(9, &[1; 4096]).unwrap();
        let next = rig.counted(|layer| layer.flush().unwrap());
        assert_eq!(next, [0, 1, 0, 0]);
    }

    #[test]
    fn nothing_goes_ahead_that_needs_a_sync_of_data_or_an_area() {
        let rig = Rig::new();
        rig.layer.write_blocks(0, &[1; 33 * 4096]).unwrap();
        assert_eq!(rig.counted(WritableLayer::flush_ahead), [0; 4]);
        rig.layer.close().unwrap();
        rig.layer.write_blocks(0, &[1; 4096]).unwrap();
        assert_eq!(rig.counted(WritableLayer::flush_ahead), [0; 4], "no area");
    }

    /// A checkpoint is of what is durable: a record that was only written is not.
    #[test]
    fn a_checkpoint_leaves_out_what_was_only_written_ahead() {
        let rig = Rig::new();
        rig.layer.write_blocks(0, &[1; 4096]).unwrap();
        rig.layer.flush().unwrap();
        let flushed = rig.layer.shared.durable_extents(false);
        rig.layer.write_blocks(8, &[1; 4096]).unwrap();
        rig.layer.flush_ahead();
        rig.layer.write_blocks(16, &[1; 4096]).unwrap();
        assert_eq!(rig.layer.shared.durable_extents(false), flushed);
        rig.layer.flush().unwrap();
        assert_eq!(rig.layer.shared.durable_extents(false).len(), 3);
    }

    #[test]
    fn a_failed_sync_of_records_written_ahead_poisons() {
        let rig = Rig::new();
        rig.layer.write_blocks(3, &[1; 4096]).unwrap();
        rig.layer.flush_ahead();
        rig.storage.fail(FaultPlan {
            kinds: vec![OpKind::SyncData],
            nth: 1,
            fault: Fault::LostSync(libc::EIO),
            lasting: false,
        });
        let error = rig.layer.flush().unwrap_err();
        assert!(error.to_string().contains("syncing the journal"), "{error}");
        assert!(rig.layer.flush().is_err());
    }

    /// The record may be there in part, so nothing may follow it.
    #[test]
    fn without_space_for_a_record_ahead_the_flush_makes_all_durable_another_way() {
        let rig = Rig::new();
        rig.layer.write_blocks(3, &[1; 4096]).unwrap();
        rig.storage.fail(FaultPlan {
            kinds: vec![OpKind::WriteDirect],
            nth: 1,
            fault: Fault::Short(libc::ENOSPC),
            lasting: false,
        });
        rig.layer.flush_ahead();
        let flush = rig.counted(|layer| layer.flush().unwrap());
        assert_eq!((flush[0], flush[1]), (0, 0), "a checkpoint instead");
        assert_eq!(rig.layer.shared.durable_extents(false).len(), 1);
    }
}
