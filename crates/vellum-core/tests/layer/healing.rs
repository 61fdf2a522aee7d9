//! Blocks of a sealed layer that the disk lost or changed are brought again where somebody has them: a reader sees the
//! right bytes or an error, whatever happens.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, BlockDevice, Blocks, Durability, Span};
use vellum_base::storage::{OpenMode, SimStorage, Storage, unless_it_waits};
use vellum_core::chain::Chain;
use vellum_core::layer::{Healer, SealedLayer};

use crate::lazy_layer::{SIZE, WHOLE, bytes_of, chain_on, expected, heal_by, make_whole};

/// Data blocks of the layer, some of which are damaged.
const DAMAGED: [u64; 4] = [3, 4, 39, 210];

fn damage(disk: &SimStorage, blocks: &[u64]) {
    let path = Path::new(WHOLE).join("data");
    let file = disk.open(&path, OpenMode::Write).unwrap();
    for block in blocks {
        file.write_at(&[0xee; 100], block * BLOCK_SIZE + 7).unwrap();
    }
    file.sync_data().unwrap();
}

/// A sealed layer of which some blocks are damaged.
fn damaged_disk() -> SimStorage {
    let disk = SimStorage::new();
    make_whole(&disk);
    disk.sync_dir(Path::new("/")).unwrap();
    damage(&disk, &DAMAGED);
    disk
}

fn healer(disk: &SimStorage) -> Healer {
    Healer::open(disk, Path::new(WHOLE)).unwrap().unwrap()
}

/// Brings blocks as a registry has them; returns how many were written.
fn heal(disk: &SimStorage, blocks: Span) -> vellum_base::Result<Blocks> {
    let healer = Healer::open(disk, Path::new(WHOLE))?.unwrap();
    let bytes: Vec<u8> = blocks.blocks().flat_map(bytes_of).collect();
    let written = healer.put(blocks, &bytes)?;
    healer.sync()?;
    Ok(written)
}

fn chain(disk: &SimStorage) -> Chain {
    chain_on(disk, WHOLE)
}

fn all_is_as_it_was(device: &dyn BlockDevice) {
    let mut bytes = [0; BLOCK_LEN];
    for block in (0..SIZE / BLOCK_SIZE).map(Block::new) {
        device
            .read_at(&mut bytes, block.get() * BLOCK_SIZE)
            .unwrap();
        assert_eq!(bytes, expected(block), "{block}");
    }
}

// Tests of one process share the table of those who heal: one at a time.
static ONE: Mutex<()> = Mutex::new(());

#[test]
fn damaged_blocks_are_brought_again_when_they_are_read_and_stay_right() {
    let _one = ONE.lock();
    let disk = damaged_disk();
    let written = Arc::new(AtomicUsize::new(0));
    let (own, count) = (disk.clone(), Arc::clone(&written));
    heal_by(
        Path::new(WHOLE),
        Arc::new(move |blocks| {
            count.fetch_add(heal(&own, blocks)?.get() as usize, Ordering::SeqCst);
            Ok(true)
        }),
    );
    let chain = chain(&disk);
    // In one request with what is right.
    let mut some = vec![0; 8 * BLOCK_LEN];
    chain.read_at(&mut some, 0).unwrap();
    assert!(
        some.chunks(BLOCK_LEN)
            .zip(0..)
            .all(|(bytes, block)| bytes == bytes_of(Block::new(block)))
    );
    // A copy-up reads too.
    chain
        .write_at(&[1; 10], 39 * BLOCK_SIZE + 5, Durability::Durable)
        .unwrap();
    let mut copied = bytes_of(Block::new(39));
    copied[5..15].fill(1);
    let mut bytes = [0; BLOCK_LEN];
    chain.read_at(&mut bytes, 39 * BLOCK_SIZE).unwrap();
    assert_eq!(bytes, copied);
    chain.read_at(&mut bytes, 210 * BLOCK_SIZE).unwrap();
    assert_eq!(written.load(Ordering::SeqCst), DAMAGED.len());
    drop(chain);
    let layer = SealedLayer::open(&disk.cut(1), Path::new(WHOLE)).unwrap();
    assert_eq!(layer.scrub(|_| {}).unwrap().corrupt, []);
}

#[test]
fn a_read_that_waits_for_blocks_to_be_brought_again_holds_up_no_write_and_no_seal() {
    let _one = ONE.lock();
    let disk = damaged_disk();
    let (tell, waiting) = mpsc::channel();
    let (go, held) = mpsc::channel::<()>();
    let (tell, held, own) = (Mutex::new(tell), Mutex::new(held), disk.clone());
    heal_by(
        Path::new(WHOLE),
        Arc::new(move |blocks| {
            tell.lock().unwrap().send(blocks).unwrap();
            held.lock().unwrap().recv().unwrap();
            heal(&own, blocks).map(|_| true)
        }),
    );
    let chain = Arc::new(chain(&disk));
    let reads = Arc::clone(&chain);
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; BLOCK_LEN];
        reads.read_at(&mut bytes, 3 * BLOCK_SIZE).unwrap();
        bytes
    });
    let wanted = waiting.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(wanted, Span::of(Block::new(3)));
    chain
        .write_at(&[7; BLOCK_LEN], 3 * BLOCK_SIZE, Durability::Durable)
        .unwrap();
    chain.seal_last().unwrap();
    go.send(()).unwrap();
    let read = reader.join().unwrap();
    // It was asked before the write, and answered after it.
    assert!(read == [7; BLOCK_LEN] || read == bytes_of(Block::new(3)));
}

#[test]
fn a_disk_that_does_not_keep_what_is_written_is_an_error_and_not_an_endless_wait() {
    let _one = ONE.lock();
    let disk = damaged_disk();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    heal_by(
        Path::new(WHOLE),
        Arc::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(true)
        }),
    );
    let mut bytes = [0; BLOCK_LEN];
    let error = chain(&disk)
        .read_at(&mut bytes, 3 * BLOCK_SIZE)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let layer = SealedLayer::open(&disk, Path::new(WHOLE)).unwrap();
    let error = layer.read_blocks(&mut bytes, Block::new(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[test]
fn what_nobody_has_or_cannot_be_had_is_the_error_of_the_checksum_with_the_reason() {
    let _one = ONE.lock();
    let disk = damaged_disk();
    heal_by(Path::new(WHOLE), Arc::new(|_| Ok(false)));
    let chain = chain(&disk);
    let mut bytes = [0; BLOCK_LEN];
    let error = chain.read_at(&mut bytes, 3 * BLOCK_SIZE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let gone = || vellum_base::Error::new(ErrorKind::Absent, "the registry is gone");
    heal_by(Path::new(WHOLE), Arc::new(move |_| Err(gone())));
    let error = chain.read_at(&mut bytes, 3 * BLOCK_SIZE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let said = error.to_string();
    assert!(said.contains("block 3 does not match"), "{said}");
    assert!(said.contains("the registry is gone"), "{said}");
    // All others are as they were.
    chain.read_at(&mut bytes, 5 * BLOCK_SIZE).unwrap();
    assert_eq!(bytes, bytes_of(Block::new(5)));
}

#[test]
fn who_may_not_wait_leaves_it_to_one_who_may() {
    let _one = ONE.lock();
    let disk = damaged_disk();
    let own = disk.clone();
    heal_by(
        Path::new(WHOLE),
        Arc::new(move |blocks| heal(&own, blocks).map(|_| true)),
    );
    let chain = chain(&disk);
    let mut bytes = [0; BLOCK_LEN];
    assert!(unless_it_waits(|| chain.read_at(&mut bytes, 3 * BLOCK_SIZE)).is_none());
    assert!(!healer(&disk).is_sound(Span::of(Block::new(3))).unwrap());
    chain.read_at(&mut bytes, 3 * BLOCK_SIZE).unwrap();
    assert_eq!(bytes, bytes_of(Block::new(3)));
}

#[test]
fn nothing_is_written_but_damaged_blocks_and_never_what_was_not_sealed() {
    let disk = damaged_disk();
    let healer = healer(&disk);
    let span = Span::new(Block::new(2), Blocks::new(4));
    assert!(!healer.is_sound(span).unwrap());
    let mut bytes: Vec<u8> = span.blocks().flat_map(bytes_of).collect();
    bytes[3 * BLOCK_LEN] ^= 1;
    let before = disk.changes();
    let error = healer.put(span, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(disk.changes(), before);
    bytes[3 * BLOCK_LEN] ^= 1;
    assert_eq!(healer.put(span, &bytes).unwrap(), Blocks::new(2));
    assert_eq!(healer.put(span, &bytes).unwrap(), Blocks::NONE);
    assert!(healer.is_sound(span).unwrap());
    // Blocks that the layer has no data of.
    for block in [40, 60, 199] {
        let found = healer.put(Span::of(Block::new(block)), &[0; BLOCK_LEN]);
        assert_eq!(found.unwrap_err().kind(), ErrorKind::Corrupt, "{block}");
    }
}

#[test]
fn a_power_cut_while_blocks_are_written_again_leaves_each_right_or_found_out() {
    for step in 1.. {
        let disk = damaged_disk();
        disk.arm(step);
        let span = Span::new(Block::FIRST, Blocks::new(40));
        let healed = heal(&disk, span);
        if !disk.is_off() {
            assert_eq!(healed.unwrap(), Blocks::new(3));
            assert!(step > 3, "nothing was cut");
            break;
        }
        for seed in 0..8 {
            let after = disk.cut(seed);
            let layer = SealedLayer::open(&after, Path::new(WHOLE)).unwrap();
            let corrupt = layer.scrub(|_| {}).unwrap().corrupt;
            assert!(corrupt.iter().all(|block| DAMAGED.contains(&block.get())));
            heal(&after, span).unwrap();
            heal(&after, Span::of(Block::new(210))).unwrap();
            all_is_as_it_was(&chain(&after));
        }
    }
}
