//! Many threads on one layer, and races that were once lost, each played again in the order that
//! lost it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Durability, Span};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, FileStorage, OpKind, SeededRng, SimStorage, Storage,
};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, SealedLayer, WritableLayer, seal_in_place};

const BLOCKS: u64 = 1024;
const SIZE: u64 = BLOCKS * BLOCK_SIZE;
const LAYER: &str = "/layer";

fn tiny() -> LayerOptions {
    LayerOptions {
        journal_blocks: 8,
        journal_start: 16 << 10,
        journal_max: 64 << 10,
        map_log: 32 << 10,
        preallocate: 1 << 20,
        background: true,
    }
}

fn make(storage: &dyn Storage, dir: &Path, parent: Option<uuid::Uuid>) -> PathBuf {
    WritableLayer::create(storage, dir, &Header::new(parent, SIZE).unwrap()).unwrap();
    storage.sync_dir(dir.parent().unwrap()).unwrap();
    dir.to_owned()
}

fn open(storage: Arc<dyn Storage>, dir: &Path, options: LayerOptions) -> Chain {
    let spec = ChainSpec {
        sealed: vec![],
        top: Some(dir.to_owned()),
        options,
    };
    open_chain(&storage, &spec).unwrap()
}

fn simulated(options: LayerOptions) -> (SimStorage, FaultStorage, Chain) {
    let disk = SimStorage::new();
    let storage = FaultStorage::new(Arc::new(disk.clone()));
    make(&storage, Path::new(LAYER), None);
    let chain = open(Arc::new(storage.clone()), Path::new(LAYER), options);
    (disk, storage, chain)
}

fn write(chain: &Chain, block: u64, value: u8) {
    chain
        .write_at(&[value; 4096], block * BLOCK_SIZE, Durability::Buffered)
        .unwrap();
}

fn first_byte(chain: &Chain, block: u64) -> u8 {
    let mut byte = [0];
    chain.read_at(&mut byte, block * BLOCK_SIZE).unwrap();
    byte[0]
}

fn after_cuts(disk: &SimStorage, options: LayerOptions, check: impl Fn(&Chain)) {
    for seed in 0..20 {
        check(&open(Arc::new(disk.cut(seed)), Path::new(LAYER), options));
    }
}

/// Waits until it is true; a race that is never reached is a failure.
fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let since = Instant::now();
    while !ready() {
        assert!(since.elapsed() < Duration::from_secs(120), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_write_that_a_sync_overtakes_is_synced_by_the_next_flush() {
    let options = LayerOptions {
        journal_blocks: 0,
        ..LayerOptions::default()
    };
    let (disk, storage, chain) = simulated(options);
    write(&chain, 0, 1);
    write(&chain, 1, 1);
    chain.flush().unwrap();
    write(&chain, 0, 2);
    let chain = Arc::new(chain);
    let (held, go) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    storage.set_hook(Some({
        let (held, go) = (held.clone(), go.clone());
        Arc::new(move |kind, path: &Path| {
            if kind == OpKind::Write && path.ends_with("data") {
                held.store(true, Ordering::SeqCst);
                until("let go", || go.load(Ordering::SeqCst));
            }
        })
    }));
    let writer = std::thread::spawn({
        let chain = chain.clone();
        move || write(&chain, 1, 2)
    });
    until("the write began", || held.load(Ordering::SeqCst));
    chain.flush().unwrap();
    go.store(true, Ordering::SeqCst);
    writer.join().unwrap();
    storage.set_hook(None);
    chain.flush().unwrap();
    after_cuts(&disk, options, |chain| assert_eq!(first_byte(chain, 1), 2));
}

#[test]
fn a_sync_that_fails_in_the_background_fails_every_flush_from_then_on() {
    let (disk, storage, chain) = simulated(tiny());
    // Fills an area, so that the next flush has it freed in the background.
    storage.fail(FaultPlan {
        kinds: vec![OpKind::SyncData],
        nth: 1,
        fault: Fault::LostSync(libc::EIO),
        lasting: false,
    });
    let mut flushed = 0;
    for value in 1..=100u8 {
        if chain
            .write_at(&[value; 4096], 0, Durability::Durable)
            .is_err()
        {
            break;
        }
        flushed = value;
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(flushed < 100, "no area was ever freed");
    until("poisoned", || chain.top().unwrap().poisoned().is_some());
    assert_eq!(chain.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    drop(chain);
    after_cuts(&disk, tiny(), |chain| {
        let found = first_byte(chain, 0);
        assert!(
            found == flushed || found == flushed + 1,
            "{found}, flushed {flushed}"
        );
    });
}

/// A record larger than the journal makes a checkpoint while another is being made in the
/// background: both wrote `map.tmp`, and the older could come last.
#[test]
fn a_flush_too_large_for_the_journal_waits_for_the_checkpoint_in_the_background() {
    let options = LayerOptions {
        journal_blocks: 2,
        journal_start: 8 << 10,
        journal_max: 8 << 10,
        map_log: 0,
        preallocate: 1 << 20,
        background: true,
    };
    let (disk, storage, chain) = simulated(options);
    let (held, go) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    storage.set_hook(Some({
        let (held, go) = (held.clone(), go.clone());
        Arc::new(move |kind, path: &Path| {
            let ours = std::thread::current().name() == Some("vellum-journal");
            if ours && kind == OpKind::Rename && path.ends_with("map") {
                held.store(true, Ordering::SeqCst);
                until("let go", || go.load(Ordering::SeqCst));
            }
        })
    }));
    let mut value = 0;
    while !held.load(Ordering::SeqCst) {
        value += 1;
        assert!(value < 200, "no area was ever freed");
        chain
            .write_at(&[value; 4096], 0, Durability::Durable)
            .unwrap();
        // The next flush would wait for a background that is held: has this one started it?
        for _ in 0..1000 {
            if !held.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    // One map change every other block, 16 bytes each, takes three blocks of journal.
    let chain = Arc::new(chain);
    let flusher = std::thread::spawn({
        let chain = chain.clone();
        move || {
            (0..BLOCKS)
                .step_by(2)
                .for_each(|block| write(&chain, block, 201));
            chain.flush().unwrap();
            write(&chain, 1, 205);
            chain.flush().unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    go.store(true, Ordering::SeqCst);
    flusher.join().unwrap();
    storage.set_hook(None);
    // The background has ended, and well.
    chain.close().unwrap();
    after_cuts(&disk, options, |chain| {
        assert_eq!((first_byte(chain, 0), first_byte(chain, 1)), (201, 205));
    });
}

#[test]
fn a_sealed_layer_opens_while_its_seal_is_made() {
    let (disk, _, chain) = simulated(tiny());
    for value in 0..40 {
        chain
            .write_at(&[value; 4096], 0, Durability::Durable)
            .unwrap();
    }
    let top = chain.top().unwrap();
    top.seal().unwrap();
    drop(chain);
    let opened = Arc::new(AtomicU64::new(0));
    // A reader that is held before one of its looks at a file while the seal is made, up to the
    // removal of the map, of a journal, or of all.
    for stop in 2..40 {
        let disk = disk.fork();
        let reader = FaultStorage::new(Arc::new(disk.clone()));
        let seen = Arc::new(AtomicU64::new(0));
        reader.set_hook(Some({
            let (seen, opened, disk) = (seen.clone(), opened.clone(), disk.clone());
            Arc::new(move |_, _: &Path| {
                if seen.fetch_add(1, Ordering::SeqCst) + 1 == stop / 2 {
                    let sealer = FaultStorage::new(Arc::new(disk.clone()));
                    sealer.fail(FaultPlan {
                        kinds: vec![OpKind::Remove],
                        nth: 2 + stop % 2,
                        fault: Fault::Errno(libc::EIO),
                        lasting: true,
                    });
                    seal_in_place(&sealer, Path::new(LAYER), |_| {}).unwrap_err();
                    opened.fetch_add(1, Ordering::SeqCst);
                }
            })
        }));
        let layer = SealedLayer::open(&reader, Path::new(LAYER)).unwrap();
        assert_eq!(layer.data_blocks().get(), 1);
        let mut bytes = [0; 4096];
        layer.read_blocks(&mut bytes, Block::FIRST).unwrap();
        assert_eq!(bytes, [39; 4096]);
    }
    assert!(opened.load(Ordering::SeqCst) > 10);
}

#[test]
fn a_sealed_layer_takes_no_writes_from_whoever_still_holds_it() {
    let (_, _, chain) = simulated(tiny());
    write(&chain, 0, 1);
    let top = chain.top().unwrap();
    top.seal().unwrap();
    top.close().unwrap();
    let held = top.lock_blocks(Span::of(Block::FIRST)).unwrap();
    let error = top
        .write_blocks(&held, Block::FIRST, &[2; 4096])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert_eq!(first_byte(&chain, 0), 1);
}

/// A block that says who wrote it, where and when: all of its 64-bit words agree.
fn stamp(block: u64, writer: u64, version: u64) -> Vec<u8> {
    let word = (block << 40) | (writer << 32) | version;
    word.to_le_bytes().repeat(BLOCK_SIZE as usize / 8)
}

fn stamp_of(bytes: &[u8]) -> Option<u64> {
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes
        .chunks_exact(8)
        .all(|word| word == first.to_le_bytes())
        .then_some(first)
}

#[test]
fn threads_on_their_own_blocks_and_on_shared_ones_read_what_they_wrote_and_lose_nothing() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let storage = FaultStorage::new(Arc::new(FileStorage));
    let seam: Arc<dyn Storage> = Arc::new(storage.clone());
    let first = make(&*seam, &dir.path().join("layer0"), None);
    let chain = Arc::new(open(seam.clone(), &first, tiny()));
    let start = Arc::new(Barrier::new(THREADS as usize + 1));
    let done = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..THREADS)
        .map(|me| {
            let (chain, start) = (chain.clone(), start.clone());
            std::thread::spawn(move || {
                let mut rng = SeededRng::new(me);
                let own = 64; // blocks each
                let mut expected = vec![0; own];
                start.wait();
                for round in 1..=ROUNDS {
                    let at = rng.below(own as u64);
                    let block = me * own as u64 + at;
                    if rng.chance(1, 5) {
                        chain.discard(block * BLOCK_SIZE, BLOCK_SIZE).unwrap();
                        expected[at as usize] = 0;
                    } else {
                        let bytes = stamp(block, me, round);
                        let durability = if rng.chance(1, 8) {
                            Durability::Durable
                        } else {
                            Durability::Buffered
                        };
                        chain
                            .write_at(&bytes, block * BLOCK_SIZE, durability)
                            .unwrap();
                        expected[at as usize] = stamp_of(&bytes).unwrap();
                    }
                    // A block that all write, each its own sector.
                    let shared = 400 + rng.below(8);
                    let sector = shared * BLOCK_SIZE + me * 512;
                    chain
                        .write_at(&[round as u8; 512], sector, Durability::Buffered)
                        .unwrap();
                    let mut bytes = [0; 512];
                    chain.read_at(&mut bytes, sector).unwrap();
                    assert_eq!(bytes, [round as u8; 512], "another's write took ours away");
                    if rng.chance(1, 4) {
                        chain.top().unwrap().flush_ahead();
                    }
                    if rng.chance(1, 10) {
                        chain.flush().unwrap();
                        chain.top().unwrap().assert_sound();
                    }
                    let at = rng.below(own as u64);
                    let mut bytes = vec![0; BLOCK_SIZE as usize];
                    chain
                        .read_at(&mut bytes, (me * own as u64 + at) * BLOCK_SIZE)
                        .unwrap();
                    assert_eq!(stamp_of(&bytes), Some(expected[at as usize]));
                }
                expected
            })
        })
        .collect();
    let sealer = std::thread::spawn({
        let (chain, start, done, seam) = (chain.clone(), start.clone(), done.clone(), seam.clone());
        let dir = dir.path().to_owned();
        move || {
            start.wait();
            let mut sealed = Vec::new();
            while !done.load(Ordering::SeqCst) && sealed.len() < 8 {
                std::thread::sleep(Duration::from_millis(30));
                let old = chain.top().unwrap();
                let next = make(
                    &*seam,
                    &dir.join(format!("layer{}", sealed.len() + 1)),
                    Some(old.header().uuid),
                );
                let next = WritableLayer::open(seam.clone(), &next, tiny()).unwrap();
                chain.seal_top(next).unwrap();
                seal_in_place(&*seam, old.dir(), |_| {}).unwrap();
                sealed.push(old.dir().to_owned());
            }
            sealed
        }
    });
    let expected: Vec<u64> = workers
        .into_iter()
        .flat_map(|worker| worker.join().unwrap())
        .collect();
    done.store(true, Ordering::SeqCst);
    let sealed = sealer.join().unwrap();
    assert!(!sealed.is_empty(), "nothing was sealed under load");
    chain.flush().unwrap();
    let top = chain.top().unwrap().dir().to_owned();
    let mut before = vec![0; SIZE as usize];
    chain.read_at(&mut before, 0).unwrap();
    drop(chain);
    // Not closed: the journal brings it back.
    let spec = ChainSpec {
        sealed,
        top: Some(top),
        options: tiny(),
    };
    let chain = open_chain(&seam, &spec).unwrap();
    let mut after = vec![0; SIZE as usize];
    chain.read_at(&mut after, 0).unwrap();
    assert!(before == after);
    for (block, expected) in expected.iter().enumerate() {
        let bytes = &after[block * 4096..(block + 1) * 4096];
        assert_eq!(stamp_of(bytes), Some(*expected), "block {block}");
    }
}

#[test]
fn flushes_that_overlap_share_their_work() {
    let (_, storage, chain) = simulated(LayerOptions::default());
    let chain = Arc::new(chain);
    write(&chain, 0, 1);
    chain.flush().unwrap();
    // Each synchronous write takes long enough for the others to queue up behind it, the first until
    // all of them are about to.
    let begun = Arc::new(AtomicU64::new(0));
    storage.set_hook(Some({
        let begun = begun.clone();
        Arc::new(move |kind, _: &Path| {
            if kind == OpKind::WriteDurable {
                until("all flush", || begun.load(Ordering::SeqCst) == 8);
                std::thread::sleep(Duration::from_millis(100));
            }
        })
    }));
    let before = storage.counts().of(OpKind::WriteDurable);
    let threads: Vec<_> = (0..8)
        .map(|block| {
            let (chain, begun) = (chain.clone(), begun.clone());
            std::thread::spawn(move || {
                write(&chain, block, 2);
                begun.fetch_add(1, Ordering::SeqCst);
                chain.flush().unwrap();
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let writes = storage.counts().of(OpKind::WriteDurable) - before;
    assert!((1..=4).contains(&writes), "{writes} records for 8 flushes");
    let stats = chain.top().unwrap().stats().snapshot();
    assert!(stats.flushes_coalesced >= 4, "{stats:?}");
}

/// A mount makes the journal before anything is written. A first flush that did not fit into it went
/// to the next generation, and left one without a record, which nothing could follow: until the
/// checkpoint in the background was done, a power cut left a layer that was refused as damaged.
#[test]
fn a_first_flush_larger_than_the_prepared_journal_survives_a_cut_before_any_checkpoint() {
    let options = LayerOptions {
        journal_start: 8 << 10,
        ..tiny()
    };
    let (disk, storage, chain) = simulated(options);
    let go = Arc::new(AtomicBool::new(false));
    storage.set_hook(Some({
        let go = go.clone();
        Arc::new(move |_, _: &Path| {
            if std::thread::current().name() == Some("vellum-journal") {
                until("let go", || go.load(Ordering::SeqCst));
            }
        })
    }));
    chain.top().unwrap().prepare_journal().unwrap();
    (0..4).for_each(|block| write(&chain, 2 * block, 7));
    chain.flush().unwrap();
    after_cuts(&disk, options, |chain| {
        assert_eq!((first_byte(chain, 0), first_byte(chain, 6)), (7, 7));
    });
    go.store(true, Ordering::SeqCst);
    storage.set_hook(None);
    chain.close().unwrap();
}
