//! What a flush costs, counted; and what a full disk does.

use std::path::Path;
use std::sync::Arc;

use vellum_base::ErrorKind;
use vellum_base::block::{
    BLOCK_SIZE, Block, BlockDevice, BlockState, Blocks, Durability, Span, ZeroMode,
};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, FileStorage, OpCounts, OpKind, OpenMode, SimStorage, Storage,
};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer};

const SIZE: u64 = 256 * BLOCK_SIZE;
const LAYER: &str = "/layer";

fn device(options: LayerOptions) -> (SimStorage, FaultStorage, Chain) {
    let disk = SimStorage::new();
    let storage = FaultStorage::new(Arc::new(disk.clone()));
    WritableLayer::create(
        &storage,
        Path::new(LAYER),
        &Header::new(None, SIZE).unwrap(),
    )
    .unwrap();
    storage.sync_dir(Path::new("/")).unwrap();
    let chain = open(&storage, options);
    (disk, storage, chain)
}

fn open(storage: &FaultStorage, options: LayerOptions) -> Chain {
    let spec = ChainSpec {
        sealed: vec![],
        top: Some(LAYER.into()),
        options,
    };
    let seam: Arc<dyn Storage> = Arc::new(storage.clone());
    open_chain(&seam, &spec).unwrap()
}

fn without_blocks() -> LayerOptions {
    LayerOptions {
        journal_blocks: 0,
        ..LayerOptions::default()
    }
}

fn write(chain: &Chain, block: u64, blocks: u64, value: u8) -> vellum_base::Result<()> {
    let bytes = vec![value; (blocks * BLOCK_SIZE) as usize];
    chain.write_at(&bytes, block * BLOCK_SIZE, Durability::Buffered)
}

fn block(chain: &Chain, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_SIZE as usize];
    chain.read_at(&mut bytes, block * BLOCK_SIZE).unwrap();
    bytes
}

/// Operations of a flush that wait for the disk: fdatasyncs, synchronous writes, all others.
fn cost(storage: &FaultStorage, chain: &Chain) -> (u64, u64, u64) {
    let before = storage.counts();
    chain.flush().unwrap();
    let counts: OpCounts = storage.counts().since(&before);
    (
        counts.of(OpKind::SyncData),
        counts.of(OpKind::WriteDurable),
        counts.of(OpKind::Sync) + counts.of(OpKind::SyncDir),
    )
}

#[test]
fn a_flush_without_blocks_in_the_journal_costs_one_sync_and_one_record_where_it_allocated() {
    let (_, storage, chain) = device(without_blocks());
    write(&chain, 0, 1, 1).unwrap();
    // The first makes the journal.
    chain.flush().unwrap();
    write(&chain, 7, 1, 1).unwrap();
    assert_eq!(cost(&storage, &chain), (1, 1, 0));
    write(&chain, 7, 1, 2).unwrap();
    assert_eq!(cost(&storage, &chain), (1, 0, 0));
    chain.discard(7 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    assert_eq!(cost(&storage, &chain), (0, 1, 0));
    assert_eq!(cost(&storage, &chain), (0, 0, 0));
}

#[test]
fn a_flush_of_few_blocks_costs_one_synchronous_write_and_no_sync() {
    let (_, storage, chain) = device(LayerOptions::default());
    write(&chain, 0, 1, 1).unwrap();
    chain.flush().unwrap();
    for (first, value) in [(7, 1), (7, 2), (90, 1)] {
        write(&chain, first, 3, value).unwrap();
        assert_eq!(cost(&storage, &chain), (0, 1, 0));
        assert_eq!(cost(&storage, &chain), (0, 0, 0));
    }
}

/// A client that flushes after each write: from its second flush on the record is there before it asks.
#[test]
fn a_flush_of_a_write_that_was_flushed_ahead_costs_one_sync() {
    let (_, storage, chain) = device(LayerOptions::default());
    let write_and_flush = |first| {
        write(&chain, first, 2, 1).unwrap();
        if chain.expects_flush() {
            chain.flush_ahead();
        }
        cost(&storage, &chain)
    };
    assert_eq!(write_and_flush(0).2, 2, "makes the journal");
    assert_eq!(
        write_and_flush(4),
        (0, 1, 0),
        "how it writes is not known yet"
    );
    for first in [8, 0, 80] {
        assert_eq!(write_and_flush(first), (1, 0, 0));
        assert_eq!(cost(&storage, &chain), (0, 0, 0));
    }
}

#[test]
fn a_flush_of_many_blocks_costs_one_sync_and_one_record() {
    let (_, storage, chain) = device(LayerOptions::default());
    write(&chain, 0, 1, 1).unwrap();
    chain.flush().unwrap();
    write(&chain, 0, 100, 2).unwrap();
    assert_eq!(cost(&storage, &chain), (1, 1, 0));
    // Nothing is left in the journal that a barrier would have to retire.
    write(&chain, 0, 100, 3).unwrap();
    assert_eq!(cost(&storage, &chain), (1, 0, 0));
}

/// A sync of the data file would have the disk write each of them by itself.
#[test]
fn a_flush_of_many_scattered_blocks_costs_one_synchronous_write_and_no_sync() {
    // What frees the smaller area would sync at any time.
    let (_, storage, chain) = device(LayerOptions {
        background: false,
        ..LayerOptions::default()
    });
    write(&chain, 0, 1, 1).unwrap();
    chain.flush().unwrap();
    let scattered = |count, value| {
        for at in 0..count {
            write(&chain, 3 * at + 1, 1, value).unwrap();
        }
    };
    // The first makes a larger area for them, the second frees the smaller one.
    for value in [1, 2] {
        scattered(80, value);
        chain.flush().unwrap();
    }
    scattered(80, 3);
    assert_eq!(cost(&storage, &chain), (0, 1, 0));
    // What lies together is written in one go either way.
    write(&chain, 0, 200, 3).unwrap();
    assert_eq!(cost(&storage, &chain).0, 1);
    (0..4).for_each(|value| scattered(80, value));
    assert_eq!(cost(&storage, &chain).0, 1, "more than 256");
    // A block that was written again and again is one.
    for value in 0..250 {
        write(&chain, 5, 1, value).unwrap();
    }
    assert_eq!(cost(&storage, &chain), (0, 1, 0));
}

/// Everything that takes space on the host.
const GROWTH: [OpKind; 5] = [
    OpKind::Create,
    OpKind::Write,
    OpKind::WriteDurable,
    OpKind::SetLen,
    OpKind::Allocate,
];

fn fill(storage: &FaultStorage, kinds: &[OpKind], errno: i32) {
    storage.fail(FaultPlan {
        kinds: kinds.to_vec(),
        nth: 1,
        fault: Fault::Errno(errno),
        lasting: true,
    });
}

#[test]
fn a_full_disk_is_enospc_serves_reads_and_takes_writes_again_once_there_is_room() {
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        for options in [without_blocks(), LayerOptions::default()] {
            let (disk, storage, chain) = device(options);
            write(&chain, 0, 60, 1).unwrap();
            chain.flush().unwrap();
            write(&chain, 3, 1, 2).unwrap();
            fill(&storage, &GROWTH, errno);
            let failures = [
                write(&chain, 4, 1, 9),
                chain.write_at(&[9], 5, Durability::Durable),
                chain.write_zeroes(0, 100, ZeroMode::KeepAllocated, Durability::Buffered),
            ];
            for failure in failures {
                let error = failure.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                assert_eq!(error.errno(), libc::ENOSPC);
            }
            let flushed = chain.flush();
            assert!(chain.top().unwrap().poisoned().is_none());
            assert_eq!(block(&chain, 3), [2; 4096]);
            assert_eq!(block(&chain, 4), [1; 4096]);
            storage.heal();
            write(&chain, 4, 2, 5).unwrap();
            chain.flush().unwrap();
            drop(chain);
            let storage = FaultStorage::new(Arc::new(disk.cut(3)));
            let chain = open(&storage, options);
            assert_eq!(block(&chain, 3), [2; 4096], "the flush was {flushed:?}");
            assert_eq!(block(&chain, 4), [5; 4096]);
            assert_eq!(block(&chain, 59), [1; 4096]);
        }
    }
}

/// A device on a disk that takes `more` bytes from now on, reserves included.
fn device_on_small_disk(more: u64) -> (SimStorage, Chain) {
    let (disk, _, chain) = device(LayerOptions::default());
    chain.close().unwrap();
    drop(chain);
    disk.limit(more);
    let chain = open(
        &FaultStorage::new(Arc::new(disk.clone())),
        LayerOptions::default(),
    );
    (disk, chain)
}

const LARGE: u64 = 64;

/// Fills the disk with writes that are too large for the reserve; the first block that was refused.
fn fill_disk(chain: &Chain) -> u64 {
    (0..SIZE / BLOCK_SIZE / LARGE)
        .map(|piece| piece * LARGE)
        .find(|first| {
            let written = write(chain, *first, LARGE, 3);
            written.is_err_and(|error| error.kind() == ErrorKind::NoSpace)
        })
        .expect("the disk is not full")
}

#[test]
fn on_a_full_disk_flush_discard_close_and_open_succeed_whatever_comes_between() {
    // The reserve, the log of changes and its journal, and some blocks.
    let (disk, chain) = device_on_small_disk(5 << 20);
    let refused = fill_disk(&chain);
    disk.limit(0);
    chain.flush().unwrap();
    chain.discard(700, 5 * BLOCK_SIZE).unwrap();
    chain.flush().unwrap();
    // What a neighbour frees somebody else takes at once.
    disk.limit(0);
    for value in 1..60 {
        // In place.
        write(&chain, 8, 3, value).unwrap();
        chain.flush().unwrap();
    }
    disk.limit(0);
    chain.close().unwrap();
    drop(chain);
    let storage = FaultStorage::new(Arc::new(disk.clone()));
    let chain = open(&storage, LayerOptions::default());
    chain.discard(10 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    chain.flush().unwrap();
    drop(chain);
    disk.limit(0);
    // The process died.
    let chain = open(&storage, LayerOptions::default());
    assert_eq!(block(&chain, 9), [59; 4096]);
    assert_eq!(block(&chain, 10), [0; 4096]);
    assert_eq!(block(&chain, 2), [0; 4096]);
    assert_eq!(block(&chain, refused.saturating_sub(1)), [3; 4096]);
    chain.close().unwrap();
}

#[test]
fn discards_of_more_runs_than_the_log_has_room_for_succeed_on_a_full_disk() {
    let blocks = 20 << 10;
    let disk = SimStorage::new();
    let storage = FaultStorage::new(Arc::new(disk.clone()));
    let header = Header::new(None, blocks * BLOCK_SIZE).unwrap();
    WritableLayer::create(&storage, Path::new(LAYER), &header).unwrap();
    let chain = open(&storage, LayerOptions::default());
    for first in (0..blocks).step_by(4) {
        write(&chain, first, 1, 1).unwrap();
    }
    chain.close().unwrap();
    drop(chain);
    let chain = open(&storage, LayerOptions::default());
    write(&chain, 0, 1, 2).unwrap();
    disk.limit(0);
    chain.discard(0, blocks * BLOCK_SIZE).unwrap();
    chain.flush().unwrap();
    assert_eq!(block(&chain, 0), [0; 4096]);
    assert_eq!(chain.top().unwrap().data_blocks().get(), 0);
}

/// One that writes little beside one that wants all of the disk.
#[test]
fn a_neighbour_that_writes_little_is_not_hurt_by_one_that_fills_the_disk() {
    let (disk, hog) = device_on_small_disk(10 << 20);
    let other = Path::new("/other");
    let storage: Arc<dyn Storage> = Arc::new(FaultStorage::new(Arc::new(disk.clone())));
    WritableLayer::create(&*storage, other, &Header::new(None, 4 * SIZE).unwrap()).unwrap();
    let spec = ChainSpec {
        sealed: vec![],
        top: Some(other.into()),
        options: LayerOptions::default(),
    };
    let light = open_chain(&storage, &spec).unwrap();
    write(&light, 0, 1, 1).unwrap();
    light.flush().unwrap();
    // All that the hog can get.
    disk.limit(100 << 10);
    fill_disk(&hog);
    for round in 1..400 {
        write(&light, round, 1, round as u8).unwrap();
        light.flush().unwrap();
        let refused = write(&hog, SIZE / BLOCK_SIZE - LARGE, LARGE, 9);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::NoSpace);
    }
    assert_eq!(block(&light, 300), [300u64 as u8; 4096]);
    let space = light.top().unwrap().space();
    assert!(space.full_since.is_none(), "{space:?}");
    light.close().unwrap();
    hog.close().unwrap();
}

#[test]
fn a_journal_that_has_no_space_to_grow_falls_back_to_a_checkpoint() {
    let options = LayerOptions {
        journal_start: 16 << 10,
        ..LayerOptions::default()
    };
    let (disk, storage, chain) = device(options);
    write(&chain, 0, 1, 1).unwrap();
    chain.flush().unwrap();
    // New journals fail, the small map does not.
    for round in 0..20u8 {
        let journals = storage.clone();
        storage.set_hook(Some(Arc::new(move |kind, path: &Path| {
            if kind == OpKind::Create && path.ends_with("journal.1") {
                fill(&journals, &[OpKind::Write], libc::ENOSPC);
            } else if kind == OpKind::Create {
                journals.heal();
            }
        })));
        // The other journal is made in the background, and while that fails the disk is full for us
        // too: there is room again at once.
        while let Err(error) = write(&chain, u64::from(round), 3, round) {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            storage.heal();
        }
        storage.heal();
        chain.flush().unwrap();
    }
    storage.set_hook(None);
    storage.heal();
    assert!(chain.top().unwrap().stats().snapshot().checkpoints > 0);
    drop(chain);
    let chain = open(&FaultStorage::new(Arc::new(disk.cut(1))), options);
    assert_eq!(block(&chain, 21), [19; 4096]);
    assert_eq!(block(&chain, 0), [0; 4096]);
}

#[test]
fn a_failed_sync_poisons_reads_of_own_data_and_every_later_flush_and_says_so() {
    let (disk, storage, chain) = device(without_blocks());
    write(&chain, 0, 1, 1).unwrap();
    chain.flush().unwrap();
    write(&chain, 0, 1, 2).unwrap();
    storage.fail(FaultPlan {
        kinds: vec![OpKind::SyncData],
        nth: 1,
        fault: Fault::LostSync(libc::EIO),
        lasting: false,
    });
    for result in [
        chain.flush(),
        chain.flush(),
        chain.close(),
        chain.read_at(&mut [0], 0),
        write(&chain, 9, 1, 1),
        chain.discard(0, SIZE),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert!(error.to_string().contains("syncing /layer/data"), "{error}");
    }
    drop(chain);
    let chain = open(&FaultStorage::new(Arc::new(disk.cut(1))), without_blocks());
    assert_eq!(block(&chain, 0), [1; 4096]);
}

/// A layer whose map has an extent for every other block.
fn large_map(storage: &Arc<dyn Storage>, dir: &Path, extents: u64) -> Arc<WritableLayer> {
    let header = Header::new(None, 8 * extents * BLOCK_SIZE).unwrap();
    WritableLayer::create(&**storage, dir, &header).unwrap();
    let options = LayerOptions {
        journal_start: 1 << 20,
        journal_max: 1 << 20,
        // Nothing depends on when a thread comes to it.
        background: false,
        ..LayerOptions::default()
    };
    let layer = WritableLayer::open(storage.clone(), dir, options).unwrap();
    for extent in 0..extents {
        let zero = Span::of(Block::new(2 * extent));
        let held = layer.lock_blocks(zero).unwrap();
        layer.clear_blocks(&held, zero, BlockState::Zero).unwrap();
    }
    layer.close().unwrap();
    layer
}

/// Checkpoints wrote the whole map each time: 4.7 bytes for each byte here, and growing with the map.
#[test]
fn checkpoints_of_a_large_map_write_a_hundredth_of_what_clients_do() {
    const EXTENTS: u64 = 100_000;
    const WRITES: u64 = 2048;
    // In memory, where there is such a place: it flushes thousands of times.
    let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let root = root.unwrap();
    let dir = root.path().join("layer");
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let layer = large_map(&storage, &dir, EXTENTS);
    let table = 4096 + 24 * EXTENTS;
    // In turns the same blocks again, and blocks that the map does not have yet.
    for (kind, apart) in [("first", 7), ("again", 7), ("others", 5)] {
        let before = layer.stats().snapshot();
        for at in 0..WRITES {
            let start = Block::new(2 * EXTENTS + at * apart);
            {
                let held = layer.lock_blocks(Span::of(start)).unwrap();
                layer.write_blocks(&held, start, &[at as u8; 4096]).unwrap();
            }
            layer.flush().unwrap();
        }
        let after = layer.stats().snapshot();
        let checkpoints = after.checkpoints - before.checkpoints;
        let bytes = after.checkpoint_bytes - before.checkpoint_bytes;
        println!("{kind}: {bytes} bytes in {checkpoints} checkpoints");
        assert!(checkpoints >= 10, "{checkpoints} checkpoints");
        let written = WRITES * BLOCK_SIZE;
        assert!(bytes * 100 <= written, "{bytes} for {written} ({kind})");
        assert!(layer.checkpoint_room() >= table);
        assert!(layer.checkpoint_room() <= table + table / 2);
    }
    let blocks = layer.data_blocks();
    drop(layer);
    let layer = WritableLayer::open(storage, &dir, LayerOptions::default()).unwrap();
    assert_eq!(layer.data_blocks(), blocks);
    let mut block = vec![0; 4096];
    layer
        .read_blocks(&mut block, Block::new(2 * EXTENTS + 7 * 2047))
        .unwrap();
    assert_eq!(block, [255; 4096]);
    assert_eq!(layer.state(Block::new(2 * (EXTENTS - 1))), BlockState::Zero);
}

/// A checkpoint that adds to the map is one sync; one that replaces it three: of the data, of the
/// file and of the directory.
#[test]
fn a_checkpoint_that_adds_to_the_map_costs_one_sync_beside_that_of_the_data() {
    let faults = FaultStorage::new(Arc::new(SimStorage::new()));
    let storage: Arc<dyn Storage> = Arc::new(faults.clone());
    let layer = large_map(&storage, Path::new("/large"), 10);
    let syncs = |work: &dyn Fn()| {
        let before = faults.counts();
        work();
        let counts = faults.counts().since(&before);
        [OpKind::SyncData, OpKind::Sync, OpKind::SyncDir].map(|kind| counts.of(kind))
    };
    let held = layer.lock_blocks(Span::of(Block::FIRST)).unwrap();
    layer.write_blocks(&held, Block::FIRST, &[1; 4096]).unwrap();
    drop(held);
    layer.flush().unwrap();
    assert_eq!(syncs(&|| layer.close().unwrap()), [2, 0, 0]);
    // Nothing came since, so there is nothing to say.
    layer.prepare_journal().unwrap();
    assert_eq!(syncs(&|| layer.close().unwrap()), [0, 0, 0]);
}

/// Changes within another part it in two, so a record may have more of them than were made.
#[test]
fn a_record_ahead_of_changes_that_part_each_other_stays_within_its_area() {
    const AREA: u64 = 2 * BLOCK_SIZE;
    const HOLES: u64 = 200;
    let storage = SimStorage::new();
    let dir = Path::new(LAYER);
    let header = Header::new(None, 1024 * BLOCK_SIZE).unwrap();
    WritableLayer::create(&storage, dir, &header).unwrap();
    let options = LayerOptions {
        journal_start: AREA,
        journal_max: AREA,
        background: false,
        ..LayerOptions::default()
    };
    let layer = WritableLayer::open(Arc::new(storage.clone()), dir, options).unwrap();
    layer.prepare_journal().unwrap();
    let all = Span::up_to(Blocks::new(1024));
    let held = layer.lock_blocks(all).unwrap();
    let zero = Span::up_to(Blocks::new(2 * HOLES + 1));
    layer.clear_blocks(&held, zero, BlockState::Zero).unwrap();
    for hole in 0..HOLES {
        let hole = Span::of(Block::new(2 * hole + 1));
        layer.clear_blocks(&held, hole, BlockState::Parent).unwrap();
    }
    // Its bytes are a page, so the changes have another for themselves.
    layer
        .write_blocks(&held, Block::new(1000), &[7; 4096])
        .unwrap();
    drop(held);
    layer.flush_ahead();
    let area = storage
        .open(&dir.join("journal.0"), OpenMode::Read)
        .unwrap();
    assert_eq!(area.len().unwrap(), AREA);
    layer.flush().unwrap();
    drop(layer);
    let layer = WritableLayer::open(Arc::new(storage.cut(1)), dir, options).unwrap();
    assert_eq!(layer.state(Block::new(1)), BlockState::Parent);
    assert_eq!(layer.state(Block::new(2 * HOLES)), BlockState::Zero);
    assert_eq!(layer.state(Block::new(1000)), BlockState::Data);
}
