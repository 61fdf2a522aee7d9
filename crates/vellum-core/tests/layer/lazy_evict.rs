//! Blocks of a lazy layer that are not whole yet are checked when they are read, and may go again: whatever is evicted or
//! damaged meanwhile, and whatever cuts that off, a reader sees the layer's bytes.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vellum_base::block::{
    BLOCK_LEN, BLOCK_SIZE, Block, BlockDevice, BlockState, Blocks, Run, Span,
};
use vellum_base::storage::{OpenMode, SeededRng, SimStorage, Storage};
use vellum_base::{Error, ErrorKind};
use vellum_core::chain::{ChainSpec, open_chain};
use vellum_core::layer::{
    Completion, Header, LayerOptions, LazyContent, LazyLayer, SealedLayer, WritableLayer,
    check_layer,
};

use crate::lazy_layer::{
    LAZY, POWER, bring, bytes_of, chain_on, check_after, expected, extents, heal_by, lazy_disk,
    open_lazy, put, read, serve, windows,
};

// Tests of one process share the table of servers: one at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Changes a byte of a block.
fn damage(disk: &SimStorage, block: u64) {
    let file = disk
        .open(&Path::new(LAZY).join("data"), OpenMode::Write)
        .unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, block * BLOCK_SIZE + 9).unwrap();
    file.write_at(&[byte[0] ^ 1], block * BLOCK_SIZE + 9)
        .unwrap();
    file.sync_data().unwrap();
}

/// Fetches and heals with one open layer, as the fetcher does; counts the windows that were brought.
fn fetcher(disk: &SimStorage) -> (Arc<LazyLayer>, Arc<AtomicUsize>) {
    let lazy = Arc::new(open_lazy(disk));
    let count = Arc::new(AtomicUsize::new(0));
    let (own, counted) = (Arc::clone(&lazy), Arc::clone(&count));
    serve(
        Path::new(LAZY),
        Arc::new(move |wanted| {
            for window in wanted.filter(|window| !own.is_here(*window)) {
                put(&own, window)?;
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        }),
    );
    let (own, counted) = (Arc::clone(&lazy), Arc::clone(&count));
    heal_by(
        Path::new(LAZY),
        Arc::new(move |blocks: Span| {
            if own.is_sound(blocks) {
                return Ok(true);
            }
            let last = Block::new(blocks.end().get() - 1);
            for window in POWER.window_of(blocks.start())..=POWER.window_of(last) {
                own.lost(window);
                put(&own, window)?;
                counted.fetch_add(1, Ordering::SeqCst);
            }
            own.sync_to_disk()?;
            Ok(true)
        }),
    );
    (lazy, count)
}

#[test]
fn a_changed_bit_of_a_layer_that_is_not_whole_is_found_and_comes_again() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, count) = fetcher(&disk);
    let chain = chain_on(&disk, LAZY);
    assert_eq!(read(&chain, 3), bytes_of(Block::new(3)));
    lazy.sync().unwrap();
    for block in [3, 5] {
        damage(&disk, block);
    }
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    assert_eq!(
        layer.scrub(|_| {}).unwrap().corrupt,
        [Block::new(3), Block::new(5)]
    );
    assert!(!check_layer(&disk, Path::new(LAZY), true).is_empty());
    for block in 0..8 {
        assert_eq!(read(&chain, block), bytes_of(Block::new(block)), "{block}");
    }
    assert_eq!(count.load(Ordering::SeqCst), 2);
    let after = SealedLayer::open(&disk.cut(1), Path::new(LAZY)).unwrap();
    assert_eq!(after.scrub(|_| {}).unwrap().corrupt, []);
}

#[test]
fn damage_that_nobody_can_heal_is_an_error_and_never_data() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, _) = fetcher(&disk);
    put(&lazy, 0).unwrap();
    lazy.sync().unwrap();
    damage(&disk, 3);
    heal_by(Path::new(LAZY), Arc::new(|_| Ok(false)));
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    let mut bytes = [0; BLOCK_LEN];
    let error = layer.read_blocks(&mut bytes, Block::new(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    layer.read_blocks(&mut bytes, Block::new(4)).unwrap();
    // Nor where a checksum is what was changed.
    let sums = disk
        .open(&Path::new(LAZY).join("sums"), OpenMode::Write)
        .unwrap();
    sums.write_at(&[0xee], 4096 + 4 * 4).unwrap();
    let error = layer.read_blocks(&mut bytes, Block::new(4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn completion_finds_damaged_windows_and_only_those_come_again() {
    let (disk, digest) = lazy_disk();
    let lazy = open_lazy(&disk);
    windows()
        .into_iter()
        .for_each(|window| put(&lazy, window).unwrap());
    lazy.sync().unwrap();
    damage(&disk, 20);
    assert_eq!(
        lazy.complete(&disk, |_| {}).unwrap(),
        Completion::Damaged(1)
    );
    assert_eq!(lazy.missing(), [1]);
    assert_eq!(open_lazy(&disk.cut(3)).missing(), [1]);
    put(&lazy, 1).unwrap();
    assert_eq!(lazy.complete(&disk, |_| {}).unwrap(), Completion::Whole);
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    assert_eq!(layer.digest(), Some(digest));
    assert!(!disk.exists(&Path::new(LAZY).join("sums")).unwrap());
}

/// As builds before the checksums made them.
#[test]
fn a_layer_of_version_1_is_read_and_completed_without_checksums() {
    let _one = ONE.lock();
    let (disk, digest) = lazy_disk();
    let path = Path::new(LAZY).join("have");
    let mut bytes = disk.read_all(&path, 1 << 20).unwrap();
    bytes[8] = 1;
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    disk.write_atomic(&path, &bytes).unwrap();
    disk.remove_file(&Path::new(LAZY).join("sums")).unwrap();
    disk.sync_dir(Path::new(LAZY)).unwrap();
    let (lazy, _) = fetcher(&disk);
    assert!(!lazy.is_checked());
    let chain = chain_on(&disk, LAZY);
    assert_eq!(read(&chain, 3), bytes_of(Block::new(3)));
    lazy.evict(&[0]).unwrap();
    assert!(lazy.is_here(0), "its readers would not find out");
    drop((chain, lazy));
    bring(&disk).unwrap();
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    assert_eq!(layer.digest(), Some(digest));
}

#[test]
fn what_is_evicted_takes_no_space_is_not_here_and_comes_again() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, count) = fetcher(&disk);
    let chain = chain_on(&disk, LAZY);
    for block in 0..256 {
        assert_eq!(read(&chain, block), expected(Block::new(block)), "{block}");
    }
    lazy.sync().unwrap();
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    let before = layer.allocated_bytes().unwrap();
    lazy.evict(&[0, 12, 15]).unwrap();
    assert_eq!(lazy.missing(), [0, 12, 15]);
    assert!(layer.allocated_bytes().unwrap() < before);
    assert_eq!(open_lazy(&disk.cut(2)).missing(), [0, 12, 15]);
    // Readers that had it open from before.
    for block in 0..256 {
        assert_eq!(read(&chain, block), expected(Block::new(block)), "{block}");
    }
    assert_eq!(count.load(Ordering::SeqCst), windows().len() + 3);
}

#[test]
fn reads_are_noted_once_somebody_wants_to_know() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, _) = fetcher(&disk);
    let chain = chain_on(&disk, LAZY);
    assert_eq!(read(&chain, 3), bytes_of(Block::new(3)));
    assert!(lazy.take_reads(&windows()).is_empty());
    lazy.note_reads().unwrap();
    read(&chain, 3);
    read(&chain, 20);
    let read_lately: Vec<u32> = lazy.take_reads(&windows()).into_iter().collect();
    assert_eq!(read_lately, [0, 1]);
    assert!(lazy.take_reads(&windows()).is_empty());
    read(&chain, 20);
    assert_eq!(
        lazy.take_reads(&[0, 1]).into_iter().collect::<Vec<_>>(),
        [1]
    );
}

#[test]
fn checksums_whose_header_is_lost_are_made_anew_and_all_of_the_layer_comes_again() {
    let at = Path::new(LAZY).join("sums");
    let zeroed = |disk: &SimStorage| {
        let file = disk.open(&at, OpenMode::Write).unwrap();
        file.write_at(&[0; 4096], 0).unwrap();
        file.sync_data().unwrap();
    };
    let removed = |disk: &SimStorage| {
        disk.remove_file(&at).unwrap();
        disk.sync_dir(Path::new(LAZY)).unwrap();
    };
    for lose in [&zeroed as &dyn Fn(&SimStorage), &removed] {
        let (disk, digest) = lazy_disk();
        bring_some(&disk);
        lose(&disk);
        assert!(SealedLayer::open(&disk, Path::new(LAZY)).is_err());
        assert_eq!(open_lazy(&disk).missing(), windows());
        assert_eq!(open_lazy(&disk.cut(1)).missing(), windows());
        bring(&disk).unwrap();
        let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
        assert_eq!(layer.digest(), Some(digest));
        assert_eq!(layer.scrub(|_| {}).unwrap().corrupt, []);
    }
}

fn bring_some(disk: &SimStorage) {
    let lazy = open_lazy(disk);
    for window in [0, 1, 12] {
        put(&lazy, window).unwrap();
    }
    lazy.sync().unwrap();
    assert_eq!(lazy.missing().len(), windows().len() - 3);
}

/// Completion has seen that all is here, and reads it for long; afterwards others still have the layer open.
#[test]
fn nothing_is_evicted_of_a_layer_that_is_being_sealed_or_has_its_seal() {
    let (disk, digest) = lazy_disk();
    let lazy = open_lazy(&disk);
    windows()
        .into_iter()
        .for_each(|window| put(&lazy, window).unwrap());
    let mut asked = 0;
    let completed = lazy.complete(&disk, |_| {
        std::thread::scope(|scope| {
            let evicted = scope.spawn(|| lazy.evict(&windows()).unwrap());
            assert!(!evicted.join().unwrap(), "evicted while it is sealed");
        });
        asked += 1;
    });
    assert_eq!(completed.unwrap(), Completion::Whole);
    assert!(asked > 0, "nobody asked");
    assert!(!lazy.evict(&windows()).unwrap(), "evicted behind the seal");
    // One who asked for that at the same time.
    assert_eq!(lazy.complete(&disk, |_| {}).unwrap(), Completion::Whole);
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    let scrubbed = layer.scrub(|_| {}).unwrap();
    assert_eq!(scrubbed.corrupt, []);
    assert_eq!(scrubbed.digest, Some(digest));
}

/// A cache of 20 windows, and one read of 64 of them.
#[test]
fn a_read_of_more_than_the_bound_ends() {
    const LARGE: &str = "/large";
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let dir = Path::new(LARGE);
    let size = 4 << 20;
    let header = Header::new(None, size).unwrap();
    WritableLayer::create(&disk, dir, &header).unwrap();
    let all = Run::new(
        Span::new(Block::FIRST, Blocks::whole_in(size)),
        BlockState::Data,
    );
    let content = LazyContent {
        power: POWER,
        digest: [0; 32],
        extents: &[all],
    };
    LazyLayer::make(&disk, dir, &header, &content).unwrap();
    let lazy = LazyLayer::open(&disk, dir).unwrap().unwrap();
    let held = Mutex::new(VecDeque::new());
    let asked = AtomicUsize::new(0);
    serve(
        dir,
        Arc::new(move |wanted| {
            if asked.fetch_add(1, Ordering::SeqCst) > 200 {
                return Err(Error::new(ErrorKind::Absent, "the read does not end"));
            }
            let mut held = held.lock().unwrap();
            for window in wanted.filter(|window| !lazy.is_here(*window)) {
                let span = POWER.span(window);
                let bytes: Vec<u8> = span.blocks().flat_map(bytes_of).collect();
                lazy.put(window, [(span, &bytes[..])].into_iter())?;
                held.push_back(window);
                if held.len() > 20 {
                    lazy.evict(&[held.pop_front().unwrap()])?;
                }
            }
            Ok(())
        }),
    );
    let spec = ChainSpec {
        sealed: vec![LARGE.into()],
        top: None,
        options: LayerOptions::default(),
    };
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let chain = open_chain(&storage, &spec).unwrap();
    let mut bytes = vec![0; size as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    for (block, bytes) in all.span.blocks().zip(bytes.chunks_exact(BLOCK_LEN)) {
        assert_eq!(bytes, bytes_of(block), "{block}");
    }
}

/// Two readers with what they know, a fetcher, and one who evicts whatever is here.
#[test]
fn who_reads_while_windows_are_evicted_never_sees_zeros() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, count) = fetcher(&disk);
    // Whoever evicts has the window for itself.
    let turn = Arc::new(Mutex::new(()));
    let (own, counted, turns) = (Arc::clone(&lazy), Arc::clone(&count), Arc::clone(&turn));
    serve(
        Path::new(LAZY),
        Arc::new(move |wanted| {
            let _turn = turns.lock().unwrap();
            for window in wanted.filter(|window| !own.is_here(*window)) {
                put(&own, window)?;
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        }),
    );
    // Nothing is damaged, so nobody may ask for that.
    heal_by(
        Path::new(LAZY),
        Arc::new(|blocks| panic!("{blocks} were taken for damaged")),
    );
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (disk, stop) = (&disk, &stop);
            scope.spawn(move || {
                let layer = SealedLayer::open(disk, Path::new(LAZY)).unwrap();
                let data: Vec<Block> = extents()
                    .iter()
                    .filter(|run| run.value == BlockState::Data)
                    .flat_map(|run| run.span.blocks().collect::<Vec<_>>())
                    .collect();
                let mut rng = SeededRng::new(seed);
                let mut bytes = [0; BLOCK_LEN];
                for _ in 0..4000 {
                    let block = data[rng.below(data.len() as u64) as usize];
                    layer.read_blocks(&mut bytes, block).unwrap();
                    assert_eq!(bytes, bytes_of(block), "{block}");
                }
                stop.store(true, Ordering::SeqCst);
            });
        }
        let mut rng = SeededRng::new(7);
        while !stop.load(Ordering::SeqCst) {
            let windows = windows();
            let window = windows[rng.below(windows.len() as u64) as usize];
            let _turn = turn.lock().unwrap();
            if rng.below(4) == 0 {
                lazy.sync().unwrap();
            }
            lazy.evict(&[window]).unwrap();
        }
    });
    assert!(count.load(Ordering::SeqCst) > 50, "little was evicted");
}

/// Fetches, syncs and evicts at random, and completes at last.
fn work(disk: &SimStorage, seed: u64) -> vellum_base::Result<()> {
    let Some(lazy) = LazyLayer::open(disk, Path::new(LAZY))? else {
        return Ok(());
    };
    lazy.evict_unknown()?;
    let mut rng = SeededRng::new(seed);
    let windows = windows();
    for _ in 0..24 {
        let window = windows[rng.below(windows.len() as u64) as usize];
        match rng.below(8) {
            0 | 1 => lazy.sync()?,
            2 | 3 => drop(lazy.evict(&[window])?),
            4 => {
                lazy.evict(&windows[..4])?;
                lazy.take_reads(&windows);
            }
            _ => put(&lazy, window)?,
        }
    }
    drop(lazy);
    bring(disk)
}

#[test]
fn a_power_cut_or_a_kill_at_any_step_of_an_eviction_leaves_windows_that_are_right_or_missing() {
    let (wanted, mut counted) = match std::env::var("VELLUM_LONG") {
        Ok(_) => (100_000, 0),
        Err(_) => (600, 0),
    };
    for seed in 0.. {
        if counted >= wanted {
            break;
        }
        for step in 1.. {
            let (disk, digest) = lazy_disk();
            disk.arm(step);
            let result = work(&disk, seed);
            if !disk.is_off() {
                result.unwrap();
                break;
            }
            for cut in 0..3 {
                let after = disk.cut(cut);
                check_after(&after, digest, &format!("seed {seed}, cut {cut} at {step}"));
                counted += 1;
            }
            let again = disk.fork();
            check_after(&again, digest, &format!("seed {seed}, kill at {step}"));
        }
    }
    println!("{counted} cuts");
}

/// The device that containers see, with blocks above: what is evicted below changes nothing.
#[test]
fn a_container_on_a_layer_that_is_evicted_reads_what_it_wrote_and_what_lies_below() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let (lazy, _) = fetcher(&disk);
    let chain = chain_on(&disk, LAZY);
    chain
        .write_at(
            &[5; 10],
            3 * BLOCK_SIZE,
            vellum_base::block::Durability::Durable,
        )
        .unwrap();
    lazy.evict(&windows()).unwrap();
    let mut copied = bytes_of(Block::new(3));
    copied[..10].fill(5);
    assert_eq!(read(&chain, 3), copied);
    assert_eq!(read(&chain, 4), bytes_of(Block::new(4)));
}
