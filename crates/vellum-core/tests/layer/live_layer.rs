//! What clients were told survives the death of the server without a flush, as long as the host
//! runs: the log of changes. docs/format.md, section 6.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crash::model::{Model, pattern};
use vellum_base::ErrorKind;
use vellum_base::block::{
    BLOCK_SIZE, Block, BlockDevice, BlockState, Blocks, Durability, Span, ZeroMode,
};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, OpKind, SeededRng, SimStorage, Storage,
};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, RangeGuard, WritableLayer};

const BLOCKS: u64 = 40;
const SIZE: u64 = BLOCKS * BLOCK_SIZE;

fn spec(options: LayerOptions) -> ChainSpec {
    ChainSpec {
        sealed: vec![],
        top: Some(PathBuf::from("/layer")),
        options,
    }
}

fn small(journal_blocks: usize) -> LayerOptions {
    LayerOptions {
        journal_blocks,
        journal_start: 8 << 10,
        journal_max: 32 << 10,
        map_log: 12 << 10,
        preallocate: 1 << 20,
        background: false,
    }
}

fn new_disk() -> SimStorage {
    let disk = SimStorage::new();
    WritableLayer::create(
        &disk,
        Path::new("/layer"),
        &Header::new(None, SIZE).unwrap(),
    )
    .unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

fn open(storage: impl Storage + 'static, options: LayerOptions) -> Chain {
    let storage: Arc<dyn Storage> = Arc::new(storage);
    open_chain(&storage, &spec(options)).unwrap()
}

fn read(chain: &Chain) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    chain.read_at(&mut content, 0).unwrap();
    content
}

/// One random change, or now and then a flush; what it did is in the model.
fn step(chain: &Chain, model: &mut Model, rng: &mut SeededRng, tag: u16, flushes: u64) {
    if rng.chance(flushes, 100) {
        chain.flush().unwrap();
        model.acknowledge_all();
        return;
    }
    let (offset, len) = if rng.chance(1, 3) {
        (rng.below(SIZE - 9000), 1 + rng.below(9000))
    } else {
        let start = rng.below(BLOCKS);
        let len = 1 + rng.below((BLOCKS - start).min(6));
        (start * BLOCK_SIZE, len * BLOCK_SIZE)
    };
    let kind = rng.below(8);
    let bytes = if kind < 5 {
        pattern(tag, offset, len)
    } else {
        vec![0; len as usize]
    };
    model.begin(offset, &bytes);
    match kind {
        0..=4 => chain.write_at(&bytes, offset, Durability::Buffered),
        5 => chain.discard(offset, len),
        6 => chain.write_zeroes(offset, len, ZeroMode::MayUnmap, Durability::Buffered),
        _ => chain.write_zeroes(offset, len, ZeroMode::KeepAllocated, Durability::Buffered),
    }
    .unwrap();
    model.complete(offset, &bytes);
}

#[test]
fn after_each_operation_a_killed_process_loses_nothing_and_a_power_cut_nothing_flushed() {
    for seed in 0..24 {
        let mut rng = SeededRng::new(seed);
        let options = small([0, 4][seed as usize % 2]);
        let flushes = [0, 5, 20][seed as usize % 3];
        let mut disk = new_disk();
        let mut model = Model::new(SIZE);
        let mut chain = open(disk.clone(), options);
        for tag in 1..60 {
            step(&chain, &mut model, &mut rng, tag, flushes);
            let content = model.content();
            let killed = disk.fork();
            let after = open(killed.clone(), options);
            assert!(read(&after) == content, "seed {seed}, {tag}: killed");
            // The successor is killed too, having written nothing; its successor flushes.
            let twice = open(killed.fork(), options);
            assert!(read(&twice) == content, "seed {seed}, {tag}: killed twice");
            twice.flush().unwrap();
            let cut = open(disk.cut(seed), options);
            model
                .check(&read(&cut))
                .unwrap_or_else(|why| panic!("seed {seed}, {tag}: power cut: {why}"));
            drop((after, cut));
            if rng.chance(1, 10) {
                // Go on where the successor stands.
                drop(chain);
                disk = killed.fork();
                chain = open(disk.clone(), options);
            }
        }
        chain.flush().unwrap();
        model.acknowledge_all();
        model.check(&read(&open(disk.cut(seed), options))).unwrap();
    }
}

/// The store's file system was shut down: the page cache is gone, and the log of changes is there, since
/// the host had written it back.
#[test]
fn a_file_system_that_is_mounted_again_in_the_same_boot_shows_what_was_flushed_or_newer() {
    for seed in 0..24 {
        let mut rng = SeededRng::new(300 + seed);
        let options = small([0, 4][seed as usize % 2]);
        let flushes = [0, 5, 20][seed as usize % 3];
        let disk = new_disk();
        let mut model = Model::new(SIZE);
        let chain = open(disk.clone(), options);
        for tag in 1..60 {
            step(&chain, &mut model, &mut rng, tag, flushes);
            for kept in [Some("live"), None] {
                let here = |why| panic!("seed {seed}, {tag}, {kept:?}: {why}");
                let again = disk.remount(rng.bits(), kept);
                let content = read(&open(again.clone(), options));
                model.check(&content).unwrap_or_else(here);
                // What it shows at first it shows from then on.
                let killed = read(&open(again.fork(), options));
                assert!(killed == content, "seed {seed}, {tag}: killed");
                let cut = read(&open(again.cut(seed), options));
                assert!(cut == content, "seed {seed}, {tag}: power cut");
            }
        }
    }
}

#[test]
fn what_a_successor_flushes_survives_a_power_cut_whatever_the_killed_process_wrote_in_place() {
    for seed in 0..12 {
        let mut rng = SeededRng::new(100 + seed);
        let options = small([0, 4][seed as usize % 2]);
        let disk = new_disk();
        let mut model = Model::new(SIZE);
        let chain = open(disk.clone(), options);
        for tag in 1..30 {
            step(&chain, &mut model, &mut rng, tag, 10);
        }
        let killed = disk.fork();
        let after = open(killed.clone(), options);
        after.flush().unwrap();
        model.acknowledge_all();
        for cut in 0..4 {
            let content = read(&open(killed.cut(cut), options));
            model
                .check(&content)
                .unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        }
    }
}

/// The process dies before each of its operations on the disk in turn.
#[test]
fn a_process_that_dies_within_any_operation_loses_nothing_it_acknowledged() {
    for seed in 0..3 {
        let options = small([0, 4][seed as usize % 2]);
        let survive = |plan: &FaultPlan| {
            let mut rng = SeededRng::new(200 + seed);
            let disk = new_disk();
            let faults = FaultStorage::new(Arc::new(disk.clone()));
            let chain = open(faults.clone(), options);
            faults.fail(plan.clone());
            // Acknowledged blocks, each written once or zeroed later: (block, byte).
            let mut told: Vec<Option<u8>> = vec![Some(0); BLOCKS as usize];
            let mut died = false;
            for tag in 1..25_u8 {
                let block = rng.below(BLOCKS);
                let offset = block * BLOCK_SIZE;
                let (byte, result) = match rng.below(10) {
                    0..=4 => {
                        let bytes = [tag; BLOCK_SIZE as usize];
                        let result = chain.write_at(&bytes, offset, Durability::Buffered);
                        (Some(tag), result)
                    }
                    5 => (Some(0), chain.discard(offset, BLOCK_SIZE)),
                    6 => {
                        let buffered = Durability::Buffered;
                        let result =
                            chain.write_zeroes(offset, BLOCK_SIZE, ZeroMode::MayUnmap, buffered);
                        (Some(0), result)
                    }
                    7 | 8 => {
                        chain.top().unwrap().flush_ahead();
                        (told[block as usize], Ok(()))
                    }
                    _ => (told[block as usize], chain.flush()),
                };
                // What fails may be done or not.
                told[block as usize] = byte.filter(|_| result.is_ok());
                if result.is_err() {
                    died = true;
                    break;
                }
            }
            let content = read(&open(disk.fork(), options));
            for (block, byte) in told.iter().enumerate() {
                let at = block * BLOCK_SIZE as usize;
                let found = &content[at..at + BLOCK_SIZE as usize];
                if let Some(byte) = byte {
                    assert!(
                        found.iter().all(|found| found == byte),
                        "seed {seed}, operation {}, block {block}: {byte} expected, not {}",
                        plan.nth,
                        found[0]
                    );
                }
            }
            Ok(died)
        };
        FaultPlan::death().in_each_operation(survive).unwrap();
    }
}

#[test]
fn a_poisoned_layer_goes_back_to_the_last_flush_when_it_is_opened_again_in_the_same_boot() {
    let options = small(0);
    let disk = new_disk();
    let faults = FaultStorage::new(Arc::new(disk.clone()));
    let chain = open(faults.clone(), options);
    let block = |byte: u8| [byte; BLOCK_SIZE as usize];
    chain.write_at(&block(1), 0, Durability::Buffered).unwrap();
    chain.flush().unwrap();
    let later = 5 * BLOCK_SIZE;
    chain
        .write_at(&block(2), later, Durability::Buffered)
        .unwrap();
    faults.fail(FaultPlan {
        kinds: vec![OpKind::SyncData],
        nth: 1,
        fault: Fault::LostSync(libc::EIO),
        lasting: false,
    });
    chain.flush().unwrap_err();
    let error = chain
        .write_at(&block(3), later, Durability::Buffered)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Poisoned);
    drop(chain);
    let chain = open(faults, options);
    let content = read(&chain);
    assert!(content[..BLOCK_SIZE as usize] == block(1));
    assert!(content[BLOCK_SIZE as usize..].iter().all(|byte| *byte == 0));
    // And goes on from there.
    chain
        .write_at(&block(4), later, Durability::Buffered)
        .unwrap();
    let content = read(&open(disk.fork(), options));
    assert!(content[later as usize..][..BLOCK_SIZE as usize] == block(4));
}

/// As the kernel keeps them: readable, and not on the disk.
#[test]
fn what_a_failed_sync_lost_is_not_shown_by_a_successor_that_then_reports_it_flushed() {
    for journal_blocks in [0, 4] {
        let options = small(journal_blocks);
        let disk = new_disk();
        let faults = FaultStorage::new(Arc::new(disk.clone()));
        faults.keep_lost();
        let chain = open(faults.clone(), options);
        let len = 6 * BLOCK_SIZE as usize;
        chain
            .write_at(&vec![1; len], 0, Durability::Buffered)
            .unwrap();
        chain.flush().unwrap();
        chain
            .write_at(&vec![2; len], 0, Durability::Buffered)
            .unwrap();
        faults.fail(FaultPlan {
            kinds: vec![OpKind::SyncData],
            nth: 1,
            fault: Fault::LostSync(libc::EIO),
            lasting: false,
        });
        chain.flush().unwrap_err();
        drop(chain);
        let chain = open(faults.clone(), options);
        let shown = read(&chain);
        chain.flush().unwrap();
        drop(chain);
        faults.evict().unwrap();
        assert!(read(&open(faults.clone(), options)) == shown, "evicted");
        for seed in 0..8 {
            assert!(
                read(&open(disk.cut(seed), options)) == shown,
                "power cut {seed}"
            );
        }
    }
}

/// The log of changes at its real size: 262,144 entries.
#[test]
fn a_log_of_its_real_size_that_is_full_survives_the_process_and_takes_changes_after_a_flush() {
    const ENTRIES: u64 = 256 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let storage: Arc<dyn Storage> = Arc::new(vellum_base::storage::FileStorage);
    let header = Header::new(None, 4 * ENTRIES * BLOCK_SIZE).unwrap();
    WritableLayer::create(&*storage, &path, &header).unwrap();
    let options = LayerOptions {
        background: false,
        ..LayerOptions::default()
    };
    let open = || WritableLayer::open(storage.clone(), &path, options).unwrap();
    let layer = open();
    // Every other block, so that no two changes are one.
    let zero = |layer: &WritableLayer, held: &RangeGuard<'_>, nth: u64| {
        layer.clear_blocks(held, Span::of(Block::new(2 * nth)), BlockState::Zero)
    };
    let all = Span::up_to(Blocks::new(4 * ENTRIES));
    // Held all the time, since each new lock would flush once the log fills.
    let held = layer.lock_blocks(all).unwrap();
    for nth in 0..ENTRIES {
        zero(&layer, &held, nth).unwrap();
    }
    let refused = zero(&layer, &held, ENTRIES).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    // Nothing is flushed by going away.
    drop(held);
    drop(layer);
    let layer = open();
    let zeros = |layer: &WritableLayer| {
        let mut zeros = 0;
        layer.resolve(all, |run| {
            zeros += u64::from(run.value == BlockState::Zero) * run.len().get();
        });
        zeros
    };
    assert_eq!(zeros(&layer), ENTRIES);
    let held = layer.lock_blocks(all).unwrap();
    zero(&layer, &held, ENTRIES).unwrap();
    drop(held);
    layer.flush().unwrap();
    drop(layer);
    // Without the log, as after a power cut.
    std::fs::remove_file(path.join("live")).unwrap();
    assert_eq!(zeros(&open()), ENTRIES + 1);
}
