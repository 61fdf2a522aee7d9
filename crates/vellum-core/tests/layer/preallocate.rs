//! Space that is taken ahead of first touches: what it saves, what it must not change, and that it is
//! given back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, BlockState, Blocks, Durability, Span};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, FileStorage, OpKind, SeededRng, SimStorage, Storage,
};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

/// Four windows, and a part of one.
const BLOCKS: u64 = 4 * WINDOW + 100;
const WINDOW: u64 = 256;
/// What the parent holds in every block.
const BELOW: u8 = 0xb0;

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

/// A container over a layer that holds every block.
struct Rig {
    storage: Arc<dyn Storage>,
    parent: PathBuf,
    top: PathBuf,
}

impl Rig {
    fn new(storage: Arc<dyn Storage>, root: &Path) -> Self {
        let (parent, top) = (root.join("parent"), root.join("top"));
        let header = Header::new(None, BLOCKS * BLOCK_SIZE).unwrap();
        WritableLayer::create(&*storage, &parent, &header).unwrap();
        let below = WritableLayer::open(storage.clone(), &parent, LayerOptions::default()).unwrap();
        let held = below.lock_blocks(span(0, BLOCKS)).unwrap();
        let bytes = vec![BELOW; (BLOCKS * BLOCK_SIZE) as usize];
        below.write_blocks(&held, Block::FIRST, &bytes).unwrap();
        drop(held);
        below.seal().unwrap();
        seal_in_place(&*storage, &parent, |_| {}).unwrap();
        let above = Header::new(Some(header.uuid), BLOCKS * BLOCK_SIZE).unwrap();
        WritableLayer::create(&*storage, &top, &above).unwrap();
        storage.sync_dir(root).unwrap();
        Rig {
            storage,
            parent,
            top,
        }
    }

    fn open_on(&self, storage: Arc<dyn Storage>) -> Chain {
        let spec = ChainSpec {
            sealed: vec![self.parent.clone()],
            top: Some(self.top.clone()),
            options: LayerOptions::default(),
        };
        open_chain(&storage, &spec).unwrap()
    }

    fn open(&self) -> Chain {
        self.open_on(self.storage.clone())
    }
}

fn simulated() -> (SimStorage, FaultStorage, Rig) {
    let disk = SimStorage::new();
    let faults = FaultStorage::new(Arc::new(disk.clone()));
    let rig = Rig::new(Arc::new(faults.clone()), Path::new("/"));
    (disk, faults, rig)
}

fn write(chain: &Chain, block: u64, blocks: u64, value: u8) {
    let bytes = vec![value; (blocks * BLOCK_SIZE) as usize];
    chain
        .write_at(&bytes, block * BLOCK_SIZE, Durability::Buffered)
        .unwrap();
}

/// The first byte of a block whose bytes are all the same.
fn value(chain: &Chain, block: u64) -> u8 {
    let mut bytes = [0; 4096];
    chain.read_at(&mut bytes, block * BLOCK_SIZE).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn block");
    bytes[0]
}

/// Blocks that the data file takes on the host.
fn taken(storage: &dyn Storage, layer: &Path) -> u64 {
    let file = storage
        .open(&layer.join("data"), vellum_base::storage::OpenMode::Read)
        .unwrap();
    let mut blocks = 0;
    file.visit_allocated(&mut |range| blocks += (range.end - range.start) / BLOCK_SIZE)
        .unwrap();
    blocks
}

fn reserved(chain: &Chain) -> u64 {
    chain.top().unwrap().space().reserved_bytes
}

#[test]
fn a_dense_region_costs_one_call_for_each_mebibyte_and_scattered_blocks_none() {
    let (disk, storage, rig) = simulated();
    let chain = rig.open();
    write(&chain, 0, 1, 1);
    let before = storage.counts();
    for window in 1..4 {
        for block in 0..7 {
            write(&chain, window * WINDOW + 31 * block, 1, 1);
        }
    }
    let scattered = storage.counts().since(&before).of(OpKind::Allocate);
    assert_eq!((scattered, taken(&disk, &rig.top)), (0, 22));
    for block in 0..4 * WINDOW {
        write(&chain, block, 1, 2);
    }
    let dense = storage.counts().since(&before).of(OpKind::Allocate);
    assert_eq!((dense, taken(&disk, &rig.top)), (4, 4 * WINDOW));
    assert_eq!(chain.top().unwrap().data_blocks().get(), 4 * WINDOW);
}

#[test]
fn the_last_window_ends_with_the_device() {
    let (disk, _, rig) = simulated();
    let chain = rig.open();
    write(&chain, 4 * WINDOW, 8, 1);
    assert_eq!(taken(&disk, &rig.top), 100);
    assert_eq!(value(&chain, BLOCKS - 1), BELOW);
}

#[test]
fn a_preallocated_block_that_was_never_written_is_the_parents_whatever_happens() {
    let (disk, _, rig) = simulated();
    let chain = rig.open();
    write(&chain, 10, 8, 1);
    chain.flush().unwrap();
    write(&chain, 30, 1, 2);
    assert_eq!(taken(&disk, &rig.top), WINDOW);
    let check = |chain: &Chain, what: &str| {
        for block in 0..WINDOW {
            let found = value(chain, block);
            let expected = match block {
                10..18 => found == 1,
                30 => found == 2 || found == BELOW,
                _ => found == BELOW,
            };
            assert!(expected, "{what}: block {block} is {found:#x}");
        }
        assert!(matches!(chain.top().unwrap().data_blocks().get(), 8 | 9));
    };
    check(&chain, "in use");
    for seed in 0..60 {
        let cut = disk.cut(seed);
        check(&rig.open_on(Arc::new(cut)), &format!("power cut {seed}"));
        let remounted = disk.remount(seed, Some("data"));
        check(
            &rig.open_on(Arc::new(remounted)),
            &format!("remount {seed}"),
        );
    }
    // The server is killed.
    std::mem::forget(chain);
    check(&rig.open(), "killed");
}

#[test]
fn preallocated_space_counts_as_reserved_and_not_as_used() {
    let (disk, _, rig) = simulated();
    let chain = rig.open();
    write(&chain, 1000, 1, 1);
    let top = chain.top().unwrap();
    let before = reserved(&chain);
    write(&chain, 0, 8, 1);
    assert_eq!(taken(&disk, &rig.top), WINDOW + 1);
    assert_eq!(top.allocated_bytes().unwrap(), 9 * BLOCK_SIZE);
    assert_eq!(reserved(&chain) - before, (WINDOW - 8) * BLOCK_SIZE);
    write(&chain, 100, 100, 1);
    assert_eq!(top.allocated_bytes().unwrap(), 109 * BLOCK_SIZE);
    assert_eq!(reserved(&chain) - before, (WINDOW - 108) * BLOCK_SIZE);
}

#[test]
fn closing_sealing_and_asking_give_it_back() {
    for way in 0..3 {
        let (disk, _, rig) = simulated();
        let chain = rig.open();
        write(&chain, 20, 30, 1);
        assert_eq!(taken(&disk, &rig.top), WINDOW);
        let top = chain.top().unwrap();
        match way {
            0 => top.close().unwrap(),
            1 => top.seal().unwrap(),
            _ => top.give_back_preallocated(),
        }
        assert_eq!(taken(&disk, &rig.top), 30, "way {way}");
        assert_eq!(value(&chain, 20), 1);
        assert_eq!(value(&chain, 0), BELOW);
    }
}

#[test]
fn a_discard_gives_back_what_was_preallocated_beside_it_and_later_writes_take_it_again() {
    let (disk, _, rig) = simulated();
    let chain = rig.open();
    write(&chain, 0, 16, 1);
    assert_eq!(taken(&disk, &rig.top), WINDOW);
    chain.discard(0, WINDOW * BLOCK_SIZE).unwrap();
    assert_eq!((taken(&disk, &rig.top), value(&chain, 3)), (0, 0));
    write(&chain, 4, 8, 2);
    assert_eq!(taken(&disk, &rig.top), WINDOW);
    let top = chain.top().unwrap();
    assert_eq!(top.allocated_bytes().unwrap(), 8 * BLOCK_SIZE);
    for seed in 0..50 {
        let cut = rig.open_on(Arc::new(disk.cut(seed)));
        let found = value(&cut, 4);
        assert!([BELOW, 0, 2].contains(&found), "seed {seed}: {found:#x}");
    }
}

#[test]
fn what_a_killed_process_left_is_given_back_when_the_layer_is_opened() {
    // Also less than the host's file system may have for itself.
    for windows in [1, 3] {
        let (disk, _, rig) = simulated();
        let chain = rig.open();
        for window in 0..windows {
            write(&chain, window * WINDOW, 8, 1);
        }
        chain.flush().unwrap();
        // The server is killed; and the power goes once all was written back.
        std::mem::forget(chain);
        for disk in [disk.clone(), disk.remount(1, Some("data"))] {
            assert_eq!(taken(&disk, &rig.top), windows * WINDOW);
            let chain = rig.open_on(Arc::new(disk.clone()));
            assert_eq!(taken(&disk, &rig.top), windows * 8);
            let top = chain.top().unwrap();
            assert_eq!(top.allocated_bytes().unwrap(), windows * 8 * BLOCK_SIZE);
            assert_eq!(value(&chain, 0), 1);
            assert_eq!(value(&chain, 8), BELOW);
            // Nothing of it counts within the bounds.
            let before = reserved(&chain);
            write(&chain, 3 * WINDOW + 100, 8, 1);
            assert_eq!(reserved(&chain) - before, (WINDOW - 8) * BLOCK_SIZE);
        }
    }
}

#[test]
fn what_cannot_be_given_back_when_the_layer_is_opened_counts_and_goes_at_its_close() {
    let (disk, storage, rig) = simulated();
    let chain = rig.open();
    write(&chain, 0, 8, 1);
    chain.flush().unwrap();
    std::mem::forget(chain);
    storage.fail(refused_punches(libc::EIO, true));
    let chain = rig.open();
    assert_eq!(taken(&disk, &rig.top), WINDOW);
    assert!(reserved(&chain) >= (WINDOW - 8) * BLOCK_SIZE);
    storage.heal();
    chain.top().unwrap().close().unwrap();
    assert_eq!(taken(&disk, &rig.top), 8);
}

#[test]
fn a_trim_finds_what_takes_space_and_is_not_data_however_little_it_is() {
    let (disk, _, rig) = simulated();
    rig.open().close().unwrap();
    let file = disk
        .open(&rig.top.join("data"), vellum_base::storage::OpenMode::Write)
        .unwrap();
    file.allocate(50 * BLOCK_SIZE, 100 * BLOCK_SIZE).unwrap();
    let chain = rig.open();
    assert_eq!(taken(&disk, &rig.top), 100);
    chain.top().unwrap().give_back_preallocated();
    assert_eq!(taken(&disk, &rig.top), 0);
}

fn refused_punches(errno: i32, lasting: bool) -> FaultPlan {
    FaultPlan {
        kinds: vec![OpKind::Punch],
        nth: 1,
        fault: Fault::Errno(errno),
        lasting,
    }
}

#[test]
fn a_full_host_that_wants_a_block_for_a_hole_has_it_of_the_reserve() {
    for killed in [false, true] {
        let (disk, storage, rig) = simulated();
        disk.limit(2 << 30);
        let mut chain = rig.open();
        write(&chain, 0, 8, 1);
        chain.flush().unwrap();
        let plan = refused_punches(libc::ENOSPC, false);
        if killed {
            std::mem::forget(chain);
            storage.fail(plan);
            chain = rig.open();
            assert_eq!(taken(&disk, &rig.top), 8);
        } else {
            // A writer finds that there is little left, and tries once.
            disk.limit(512 << 20);
            storage.fail(plan);
            write(&chain, 2 * WINDOW, 8, 1);
            assert_eq!(taken(&disk, &rig.top), 16);
        }
        drop(chain);
    }
}

#[test]
fn space_that_the_host_does_not_take_back_is_not_tried_at_each_look() {
    let (disk, storage, rig) = simulated();
    disk.limit(2 << 30);
    let chain = rig.open();
    write(&chain, 0, 8, 1);
    disk.limit(512 << 20);
    storage.fail(refused_punches(libc::EIO, true));
    chain.look_after_space();
    let before = storage.counts();
    for _ in 0..5 {
        chain.look_after_space();
    }
    assert_eq!(storage.counts().since(&before).of(OpKind::Punch), 0);
    assert_eq!(taken(&disk, &rig.top), WINDOW);
}

#[test]
fn an_idle_container_gives_back_where_others_fill_the_disk_or_the_policy_keeps_more_free() {
    for policy in [false, true] {
        let (disk, _, rig) = simulated();
        disk.limit(2 << 30);
        let chain = rig.open();
        write(&chain, 0, 8, 1);
        chain.look_after_space();
        assert_eq!(taken(&disk, &rig.top), WINDOW);
        if policy {
            chain.top().unwrap().keep_free(3 << 29);
        } else {
            disk.limit(512 << 20);
            chain.look_after_space();
        }
        assert_eq!(taken(&disk, &rig.top), 8, "policy: {policy}");
    }
}

#[test]
fn a_host_that_refuses_is_not_asked_again_for_a_while_and_no_write_fails() {
    for errno in [libc::ENOSPC, libc::EOPNOTSUPP] {
        let (disk, storage, rig) = simulated();
        let chain = rig.open();
        write(&chain, 1000, 1, 1);
        let before = storage.counts();
        storage.fail(FaultPlan {
            kinds: vec![OpKind::Allocate],
            nth: 1,
            fault: Fault::Errno(errno),
            lasting: true,
        });
        for block in 0..2 * WINDOW {
            write(&chain, block, 1, 3);
        }
        let asked = storage.counts().since(&before).of(OpKind::Allocate);
        assert_eq!((asked, taken(&disk, &rig.top)), (1, 2 * WINDOW + 1));
        let top = chain.top().unwrap();
        assert_eq!(
            top.allocated_bytes().unwrap(),
            (2 * WINDOW + 1) * BLOCK_SIZE
        );
    }
}

#[test]
fn where_the_disk_has_little_left_nothing_is_preallocated_and_what_was_goes_back() {
    let (disk, _, rig) = simulated();
    disk.limit(2 << 30);
    let chain = rig.open();
    write(&chain, 0, 8, 1);
    assert_eq!(taken(&disk, &rig.top), WINDOW);
    disk.limit(512 << 20);
    write(&chain, 2 * WINDOW, 8, 1);
    assert_eq!(taken(&disk, &rig.top), 16);
    write(&chain, 3 * WINDOW, 32, 1);
    assert_eq!(taken(&disk, &rig.top), 48);
}

#[test]
fn a_flush_gives_back_where_others_filled_the_disk() {
    let (disk, _, rig) = simulated();
    disk.limit(2 << 30);
    let chain = rig.open();
    write(&chain, 0, 8, 1);
    disk.limit(512 << 20);
    // It looks once a second.
    std::thread::sleep(Duration::from_millis(1100));
    write(&chain, 2, 1, 1);
    chain.flush().unwrap();
    assert_eq!(taken(&disk, &rig.top), 8);
}

#[test]
fn a_container_preallocates_no_more_than_16_mib_beside_what_it_holds() {
    let disk = SimStorage::new();
    let dir = Path::new("/layer");
    let header = Header::new(None, 1 << 30).unwrap();
    WritableLayer::create(&disk, dir, &header).unwrap();
    let storage = Arc::new(disk.clone());
    let layer = WritableLayer::open(storage, dir, LayerOptions::default()).unwrap();
    for window in 0..100 {
        let span = span(window * WINDOW, 9);
        let held = layer.lock_blocks(span).unwrap();
        layer
            .write_blocks(&held, span.start(), &[1; 9 * 4096])
            .unwrap();
    }
    let data = layer.data_blocks().get();
    let beyond = taken(&disk, dir) - data;
    assert!((15 << 8..=16 << 8).contains(&beyond), "{beyond} blocks");
    // Also across kills.
    std::mem::forget(layer);
    for _ in 0..3 {
        let storage = Arc::new(disk.clone());
        let layer = WritableLayer::open(storage, dir, LayerOptions::default()).unwrap();
        for window in 200..300 {
            let span = span(window * WINDOW, 9);
            let held = layer.lock_blocks(span).unwrap();
            layer
                .write_blocks(&held, span.start(), &[1; 9 * 4096])
                .unwrap();
        }
        std::mem::forget(layer);
    }
    let beyond = taken(&disk, dir) - data - 900;
    assert!(beyond <= 16 << 8, "{beyond} blocks");
}

/// On the host's own file system: what it says of its extents is what is given back by.
#[test]
fn writers_discards_and_giving_back_at_once_lose_nothing_and_leave_exact_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(Arc::new(FileStorage), dir.path());
    for round in 0..2 {
        let chain = rig.open();
        let top = chain.top().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4u64)
                .map(|thread| {
                    let chain = &chain;
                    scope.spawn(move || {
                        let mut rng = SeededRng::new(thread + 10 * round);
                        let mut values = vec![None; BLOCKS as usize];
                        for step in 0..1500u64 {
                            // Each has blocks of its own, between those of others.
                            let block = rng.below(BLOCKS / 4) * 4 + thread;
                            if rng.below(5) == 0 {
                                chain.discard(block * BLOCK_SIZE, BLOCK_SIZE).unwrap();
                                values[block as usize] = Some(0);
                            } else {
                                let new = (step % 100) as u8 + 1;
                                write(chain, block, 1, new);
                                values[block as usize] = Some(new);
                            }
                        }
                        values
                    })
                })
                .collect();
            let giver = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    top.give_back_preallocated();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let all: Vec<_> = writers.into_iter().map(|w| w.join().unwrap()).collect();
            done.store(true, Ordering::Relaxed);
            giver.join().unwrap();
            for values in all {
                for (block, expected) in values.into_iter().enumerate() {
                    if let Some(expected) = expected {
                        assert_eq!(value(&chain, block as u64), expected, "block {block}");
                    }
                }
            }
        });
        top.assert_sound();
        if round == 0 {
            // Killed, with whatever it had ahead.
            write(&chain, 3 * WINDOW, 16, 1);
            std::mem::forget((chain, top));
        } else {
            top.close().unwrap();
            let mut data = 0;
            top.resolve(span(0, BLOCKS), |run| {
                data += u64::from(run.value == BlockState::Data) * run.len().get();
            });
            assert_eq!(taken(&FileStorage, &rig.top), data);
        }
    }
}
