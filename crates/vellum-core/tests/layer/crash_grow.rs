//! A device that grows while it is written: whatever stops it, it is as large as before or as large
//! as it was to be, holds what was flushed, and grows when it is asked again.
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Durability, Span};
use vellum_base::storage::{Fault, FaultPlan, FaultStorage, SimStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{
    Header, LayerOptions, Severity, WritableLayer, check_layer, seal_in_place,
};

const BASE: &str = "/base";
const LAYER: &str = "/layer";
const BEFORE: u64 = 16 * BLOCK_SIZE;
const AFTER: u64 = 40 * BLOCK_SIZE;

fn options() -> LayerOptions {
    LayerOptions {
        journal_blocks: 4,
        journal_start: 16 << 10,
        journal_max: 32 << 10,
        map_log: 12 << 10,
        preallocate: 1 << 20,
        background: false,
    }
}

fn spec() -> ChainSpec {
    ChainSpec {
        sealed: vec![BASE.into()],
        top: Some(LAYER.into()),
        options: options(),
    }
}

fn open(disk: &Arc<dyn Storage>) -> Chain {
    open_chain(disk, &spec()).unwrap()
}

/// A sealed layer, and an empty one on it.
fn disk() -> SimStorage {
    let disk = SimStorage::new();
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let base = Header::new(None, BEFORE).unwrap();
    WritableLayer::create(&disk, Path::new(BASE), &base).unwrap();
    let layer = WritableLayer::open(storage, Path::new(BASE), options()).unwrap();
    let bytes = [b'b'; 16 * 4096];
    let held = layer
        .lock_blocks(Span::of_buffer(Block::FIRST, &bytes))
        .unwrap();
    layer.write_blocks(&held, Block::FIRST, &bytes).unwrap();
    drop(held);
    layer.seal().unwrap();
    drop(layer);
    seal_in_place(&disk, Path::new(BASE), |_| {}).unwrap();
    let top = Header::new(Some(base.uuid), BEFORE).unwrap();
    WritableLayer::create(&disk, Path::new(LAYER), &top).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

/// Writes, so that there are a checkpoint and a journal of the smaller size, grows, and writes into
/// the new room.
fn work(chain: &Chain, mut done: impl FnMut(&'static str)) -> vellum_base::Result<()> {
    for round in 0..12 {
        chain.write_at(&[round; 5000], 4096, Durability::Durable)?;
    }
    chain.write_at(&[7; 100], 3 * 4096 + 50, Durability::Durable)?;
    done("written");
    chain.grow(AFTER)?;
    done("grown");
    chain.write_at(&[9; 4096], AFTER - 4096, Durability::Durable)?;
    chain.write_at(&[8; 100], 5 * 4096, Durability::Durable)?;
    done("used");
    Ok(())
}

fn byte(chain: &Chain, offset: u64) -> u8 {
    let mut byte = [0];
    chain.read_at(&mut byte, offset).unwrap();
    byte[0]
}

/// What holds of whatever is found, where so much was `done`; it grows and works.
fn check(disk: &SimStorage, done: &[&'static str], when: &str) {
    for finding in check_layer(disk, Path::new(LAYER), true) {
        assert!(finding.severity == Severity::Note, "{when}: {finding}");
    }
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let chain = open(&storage);
    let size = chain.size();
    assert!([BEFORE, AFTER].contains(&size), "{when}: {size}");
    if done.contains(&"grown") {
        assert_eq!(size, AFTER, "{when}");
    }
    if done.contains(&"written") {
        assert_eq!(byte(&chain, 4096), 11, "{when}");
        assert_eq!(byte(&chain, 3 * 4096 + 60), 7, "{when}");
        assert_eq!(byte(&chain, 3 * 4096), b'b', "{when}");
    }
    if done.contains(&"used") {
        assert_eq!(byte(&chain, AFTER - 1), 9, "{when}");
        assert_eq!(byte(&chain, 5 * 4096), 8, "{when}");
    }
    chain.grow(AFTER).unwrap();
    for block in (BEFORE / BLOCK_SIZE)..(AFTER / BLOCK_SIZE - 1) {
        assert_eq!(byte(&chain, block * BLOCK_SIZE), 0, "{when}: {block}");
    }
    chain
        .write_at(&[3; 4096], AFTER - 8192, Durability::Durable)
        .unwrap();
    // What is acknowledged now survives, whatever of the growth was in memory only.
    let cut: Arc<dyn Storage> = Arc::new(disk.cut(1));
    assert_eq!(byte(&open(&cut), AFTER - 8192), 3, "{when}");
    chain.close().unwrap();
    drop(chain);
    let chain = open(&storage);
    assert_eq!(byte(&chain, AFTER - 8192), 3, "{when}");
    chain.seal_last().unwrap();
    drop(chain);
    seal_in_place(disk, Path::new(LAYER), |_| {}).unwrap();
    let spec = ChainSpec {
        sealed: vec![BASE.into(), LAYER.into()],
        top: None,
        options: options(),
    };
    let sealed = open_chain(&storage, &spec).unwrap();
    assert_eq!(sealed.size(), AFTER, "{when}");
    assert_eq!(byte(&sealed, AFTER - 8192), 3, "{when}");
}

#[test]
fn a_power_cut_or_a_kill_at_any_step_of_a_growth_leaves_the_old_size_or_the_new_one() {
    let mut steps = 0;
    for step in 1.. {
        let disk = disk();
        let chain = open(&(Arc::new(disk.clone()) as Arc<dyn Storage>));
        disk.arm(step);
        let mut done = Vec::new();
        let result = work(&chain, |what| done.push(what));
        let off = disk.is_off();
        for seed in 0..4 {
            check(&disk.cut(seed), &done, &format!("cut {seed} at {step}"));
        }
        if !off {
            result.unwrap();
            break;
        }
        steps = step;
    }
    assert!(steps > 30, "{steps}");
    // A kill: what was written is there, synced or not.
    for step in 1..=steps {
        let disk = disk();
        let faults = FaultStorage::new(Arc::new(disk.clone()));
        let storage: Arc<dyn Storage> = Arc::new(faults.clone());
        let chain = open(&storage);
        let seen: Arc<parking_lot::Mutex<(u64, Option<SimStorage>)>> = Arc::default();
        let (mark, source) = (seen.clone(), disk.clone());
        faults.set_hook(Some(Arc::new(move |_, _: &Path| {
            let mut seen = mark.lock();
            seen.0 += 1;
            if seen.0 == step {
                seen.1 = Some(source.fork());
            }
        })));
        let mut done = Vec::new();
        let mut at_the_kill = Vec::new();
        work(&chain, |what| {
            done.push(what);
            if seen.lock().1.is_none() {
                at_the_kill.clone_from(&done);
            }
        })
        .unwrap();
        faults.set_hook(None);
        let left = seen.lock().1.take();
        if let Some(left) = left {
            check(&left, &at_the_kill, &format!("killed at {step}"));
        }
    }
}

#[test]
fn a_growth_that_the_host_refuses_at_any_step_leaves_a_device_that_works_or_says_that_it_does_not()
{
    for fault in [
        Fault::Errno(libc::ENOSPC),
        Fault::Errno(libc::EIO),
        Fault::Done(libc::EIO),
        Fault::LostSync(libc::EIO),
    ] {
        let plan = FaultPlan {
            kinds: Vec::new(),
            nth: 1,
            fault,
            lasting: false,
        };
        let survive = |plan: &FaultPlan| {
            let disk = disk();
            let faults = FaultStorage::new(Arc::new(disk.clone()));
            let chain = open(&(Arc::new(faults.clone()) as Arc<dyn Storage>));
            chain
                .write_at(&[5; 5000], 4096, Durability::Durable)
                .unwrap();
            faults.fail(plan.clone());
            let grown = chain.grow(AFTER);
            let fired = faults.fired() > 0;
            faults.heal();
            let when = format!("{plan:?}");
            match &grown {
                Ok(()) => assert_eq!(chain.size(), AFTER, "{when}"),
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    assert_eq!(chain.size(), BEFORE, "{when}");
                    chain.write_at(&[6; 100], 0, Durability::Durable).unwrap();
                    chain.grow(AFTER).unwrap();
                }
                Err(_) => {}
            }
            drop(chain);
            check(&disk, &[], &when);
            if !fired {
                grown.unwrap();
            }
            Ok(fired)
        };
        plan.in_each_operation(survive).unwrap();
    }
}

#[test]
fn a_device_that_shows_part_of_its_last_block_grows_into_the_rest_of_it() {
    let storage: Arc<dyn Storage> = Arc::new(disk());
    let chain = open(&storage);
    chain.show(BEFORE - 512).unwrap();
    assert_eq!(chain.size(), BEFORE - 512);
    chain.grow(BEFORE).unwrap();
    assert_eq!(chain.size(), BEFORE);
}

#[test]
fn a_device_that_is_written_by_others_grows_by_a_segment_and_refuses_to_shrink() {
    let large = 9 << 40;
    let storage: Arc<dyn Storage> = Arc::new(disk());
    let chain = open(&storage);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (chain, stop) = (&chain, &stop);
            scope.spawn(move || {
                let mut round = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    round = round.wrapping_add(1);
                    let offset = writer * 5 * 4096;
                    chain
                        .write_at(&[round; 9000], offset, Durability::Durable)
                        .unwrap();
                    assert_eq!(byte(chain, offset), round);
                }
            });
        }
        for size in [BEFORE, AFTER, AFTER, 1 << 30, large] {
            chain.grow(size).unwrap();
            assert_eq!(chain.size(), size);
            chain
                .write_at(&[1; 4096], size - 4096, Durability::Durable)
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let smaller = chain.grow(AFTER).unwrap_err();
    assert_eq!(smaller.kind(), ErrorKind::InvalidInput, "{smaller}");
    assert_eq!(
        chain.grow((64 << 40) + 4096).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    drop(chain);
    let chain = open(&storage);
    assert_eq!(chain.size(), large);
    assert_eq!(byte(&chain, large - 1), 1);
    assert_eq!(byte(&chain, AFTER - 1), 1);
}
