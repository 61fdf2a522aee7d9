use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::layer::{Header, LayerOptions, WritableLayer};
use vellum_base::storage::{Fault, FaultPlan, FaultStorage, OpCounts, OpKind, SimStorage};

const PATIENCE: Duration = Duration::from_secs(60);

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
    rig.layer.put(3, &[1; 8192]).unwrap();
    let ahead = rig.counted(WritableLayer::flush_ahead);
    let flush = rig.counted(|layer| layer.flush().unwrap());
    let again = rig.counted(|layer| layer.flush().unwrap());
    assert_eq!((ahead, flush, again), ([1, 0, 0, 0], [0, 0, 1, 0], [0; 4]));
}

#[test]
fn a_flush_with_more_to_carry_than_was_written_ahead_writes_and_syncs() {
    let rig = Rig::new();
    rig.layer.put(3, &[1; 8192]).unwrap();
    rig.layer.flush_ahead();
    rig.layer.put(9, &[1; 4096]).unwrap();
    let flush = rig.counted(|layer| layer.flush().unwrap());
    assert_eq!(flush, [1, 0, 1, 0]);
    // And the next one is one synchronous write again.
    rig.layer.put(9, &[1; 4096]).unwrap();
    let next = rig.counted(|layer| layer.flush().unwrap());
    assert_eq!(next, [0, 1, 0, 0]);
}

#[test]
fn nothing_goes_ahead_that_needs_a_sync_of_data_or_an_area() {
    let rig = Rig::new();
    rig.layer.put(0, &[1; 33 * 4096]).unwrap();
    assert_eq!(rig.counted(WritableLayer::flush_ahead), [0; 4]);
    rig.layer.close().unwrap();
    rig.layer.put(0, &[1; 4096]).unwrap();
    assert_eq!(rig.counted(WritableLayer::flush_ahead), [0; 4], "no area");
}

/// A checkpoint is of what is durable: a record that was only written is not.
#[test]
fn a_checkpoint_leaves_out_what_was_only_written_ahead() {
    let rig = Rig::new();
    rig.layer.put(0, &[1; 4096]).unwrap();
    rig.layer.flush().unwrap();
    let flushed = rig.layer.shared.durable_extents(false);
    rig.layer.put(8, &[1; 4096]).unwrap();
    rig.layer.flush_ahead();
    rig.layer.put(16, &[1; 4096]).unwrap();
    assert_eq!(rig.layer.shared.durable_extents(false), flushed);
    rig.layer.flush().unwrap();
    assert_eq!(rig.layer.shared.durable_extents(false).len(), 3);
}

#[test]
fn a_failed_sync_of_records_written_ahead_poisons() {
    let rig = Rig::new();
    rig.layer.put(3, &[1; 4096]).unwrap();
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
    rig.layer.put(3, &[1; 4096]).unwrap();
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

#[test]
fn a_flush_of_a_layer_that_nobody_wrote_to_waits_for_nothing() {
    let rig = Rig::new();
    let (layer, flusher) = (&rig.layer, &rig.layer.flusher);
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let flush = move || {
            let tell = tell.clone();
            scope.spawn(move || tell.send(layer.flush()).unwrap());
        };
        let lead = flusher.lead(|_| {
            flush();
            told.recv_timeout(PATIENCE).unwrap().unwrap();
            layer.put(0, &[1; 4096]).unwrap();
            flush();
            assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
            Ok(())
        });
        lead.unwrap();
        told.recv_timeout(PATIENCE).unwrap().unwrap();
    });
    let stats = layer.stats().snapshot();
    assert_eq!((stats.flushes, stats.flushes_empty), (2, 1));
}
