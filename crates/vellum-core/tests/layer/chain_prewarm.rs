//! Copy-up ahead of traffic, and the counters of a chain, without any device.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vellum_base::ErrorKind;
use vellum_base::block::{Block, BlockDevice, Blocks, Durability, Offset, Span, ZeroMode};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, CopiedUp, Source, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

const BLOCKS: u64 = 1024;
const SIZE: u64 = BLOCKS * 4096;

/// Two sealed layers, the upper one without the last quarter, which is zero there, and the lower one
/// without its third quarter, which is a hole.
struct Rig {
    dir: tempfile::TempDir,
    storage: Arc<dyn Storage>,
    sealed: Vec<PathBuf>,
}

fn lower(block: u64) -> [u8; 4096] {
    [block as u8 | 1; 4096]
}

impl Rig {
    fn new() -> Self {
        let mut rig = Rig {
            dir: tempfile::tempdir().unwrap(),
            storage: Arc::new(FileStorage),
            sealed: Vec::new(),
        };
        let quarter = BLOCKS / 4;
        rig.seal("lower", |layer| {
            let held = layer.lock_blocks(Span::up_to(Blocks::new(BLOCKS))).unwrap();
            for block in (0..quarter * 2).chain(quarter * 3..BLOCKS) {
                layer
                    .write_blocks(&held, Block::new(block), &lower(block))
                    .unwrap();
            }
        });
        rig.seal("upper", |layer| {
            let held = layer.lock_blocks(Span::up_to(Blocks::new(BLOCKS))).unwrap();
            layer
                .write_blocks(&held, Block::new(1), &[0x77; 4096])
                .unwrap();
            let zero = vellum_base::block::BlockState::Zero;
            let last = Span::new(Block::new(quarter * 3), Blocks::new(quarter));
            layer.clear_blocks(&held, last, zero).unwrap();
        });
        rig
    }

    fn parent(&self) -> Option<uuid::Uuid> {
        let dir = self.sealed.last()?;
        Some(Header::read(&*self.storage, dir).unwrap().uuid)
    }

    fn layer(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        let header = Header::new(self.parent(), SIZE).unwrap();
        WritableLayer::create(&*self.storage, &dir, &header).unwrap();
        dir
    }

    fn seal(&mut self, name: &str, fill: impl FnOnce(&WritableLayer)) {
        let dir = self.layer(name);
        let options = LayerOptions::default();
        let layer = WritableLayer::open(self.storage.clone(), &dir, options).unwrap();
        fill(&layer);
        layer.seal().unwrap();
        drop(layer);
        seal_in_place(&*self.storage, &dir, |_| {}).unwrap();
        self.sealed.push(dir);
    }

    fn open(&self, top: Option<&Path>) -> Chain {
        let spec = ChainSpec {
            sealed: self.sealed.clone(),
            top: top.map(Path::to_owned),
            options: LayerOptions::default(),
        };
        open_chain(&self.storage, &spec).unwrap()
    }

    fn fresh(&self, name: &str) -> Chain {
        self.open(Some(&self.layer(name)))
    }
}

fn read(chain: &Chain, block: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    chain.read_at(&mut bytes, block * 4096).unwrap();
    bytes
}

#[test]
fn copy_up_changes_no_byte_and_leaves_nothing_to_touch_first() {
    let rig = Rig::new();
    let chain = rig.fresh("top");
    chain.write_at(&[9; 4096], 0, Durability::Buffered).unwrap();
    chain.discard(4096 * 5, 4096).unwrap();
    let before: Vec<_> = (0..BLOCKS).map(|block| read(&chain, block)).collect();
    let done = chain.copy_up(Offset::new(0), SIZE).unwrap();
    assert_eq!(
        done,
        CopiedUp {
            copied: 510,
            zeroed: 513,
            present: 1
        }
    );
    let after: Vec<_> = (0..BLOCKS).map(|block| read(&chain, block)).collect();
    assert!(before == after);
    let again = chain.copy_up(Offset::new(100), 5000).unwrap();
    assert_eq!((again.copied, again.zeroed, again.present), (0, 0, 2));
    for block in 0..BLOCKS {
        chain
            .write_at(&[3; 512], block * 4096 + 512, Durability::Buffered)
            .unwrap();
    }
    let stats = chain.stats().snapshot();
    assert_eq!(stats.prewarmed_blocks, 1023);
    assert_eq!(stats.first_touch_writes, 1, "before the copy-up");
    assert_eq!(stats.steady_writes, BLOCKS);
    assert_eq!(stats.partial_copy_ups, 0);
    // Durable like any other block.
    chain.flush().unwrap();
    drop(chain);
    let chain = rig.open(Some(&rig.dir.path().join("top")));
    let mut expected = before[1];
    expected[512..1024].fill(3);
    assert!(read(&chain, 1) == expected);
}

#[test]
fn copy_up_beside_writers_loses_nothing_of_theirs() {
    let rig = Rig::new();
    for round in 0..6u64 {
        let chain = Arc::new(rig.fresh(&format!("top{round}")));
        let written: Arc<Vec<AtomicU64>> =
            Arc::new((0..BLOCKS * 8).map(|_| AtomicU64::new(0)).collect());
        let stop = Arc::new(AtomicBool::new(false));
        // Each writer has sectors of its own in every block: they meet in one block, not in one
        // sector.
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                let (chain, written) = (chain.clone(), written.clone());
                let stop = stop.clone();
                std::thread::spawn(move || {
                    let mut seed = round * 2 + writer + 1;
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) || count < 500 {
                        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                        let sector = (seed >> 33) % (BLOCKS * 4) * 2 + writer;
                        count += 1;
                        let value = count << 8 | writer | 0x80;
                        let bytes = value.to_le_bytes().repeat(64);
                        chain
                            .write_at(&bytes, sector * 512, Durability::Buffered)
                            .unwrap();
                        written[sector as usize].store(value, Ordering::Release);
                        if count.is_multiple_of(97) {
                            chain.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        for part in 0..16 {
            chain
                .copy_up(Offset::new(part * SIZE / 16), SIZE / 16)
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().unwrap();
        }
        let top = chain.top().unwrap();
        assert_eq!(top.data_blocks().get(), BLOCKS, "every block was copied up");
        let below = rig.open(None);
        for sector in 0..BLOCKS * 8 {
            let mut found = [0; 512];
            chain.read_at(&mut found, sector * 512).unwrap();
            let mut expected = [0; 512];
            match written[sector as usize].load(Ordering::Acquire) {
                0 => below.read_at(&mut expected, sector * 512).unwrap(),
                value => expected.copy_from_slice(&value.to_le_bytes().repeat(64)),
            }
            assert!(found == expected, "round {round}, sector {sector}");
        }
    }
}

#[test]
fn copy_up_is_refused_without_a_writable_layer_and_past_the_end() {
    let rig = Rig::new();
    let sealed = rig.open(None);
    let error = sealed.copy_up(Offset::new(0), 4096).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let error = rig
        .fresh("top")
        .copy_up(Offset::new(SIZE - 4096), 8192)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

#[test]
fn counters_tell_first_touches_copies_and_layers_apart() {
    let rig = Rig::new();
    let chain = rig.fresh("top");
    let buffered = Durability::Buffered;
    // A whole block, then a part of it; a part of one that a layer has, of a hole, of a zero.
    chain.write_at(&[1; 4096], 0, buffered).unwrap();
    chain.write_at(&[2; 512], 512, buffered).unwrap();
    chain.write_at(&[3; 512], 4096, buffered).unwrap();
    chain
        .write_at(&[3; 512], BLOCKS / 2 * 4096, buffered)
        .unwrap();
    chain
        .write_at(&[3; 512], (BLOCKS - 1) * 4096, buffered)
        .unwrap();
    // Ends of two blocks that a layer has.
    chain
        .write_at(&[4; 1024], 3 * 4096 - 512, Durability::Durable)
        .unwrap();
    let stats = chain.stats().snapshot();
    assert_eq!(stats.first_touch_writes, 5);
    assert_eq!(stats.steady_writes, 1);
    assert_eq!(stats.first_touch_blocks, 6);
    assert_eq!(stats.partial_copy_ups, 3);
    assert_eq!(stats.copied_bytes, 3 * 3584);
    assert_eq!(stats.written_bytes, 4096 + 4 * 512 + 1024);
    assert_eq!(stats.stored_bytes, 6 * 4096 + 512);
    assert_eq!(stats.flush.count, 1);
    assert_eq!(stats.allocated.last().unwrap().total, 6);
    assert!(stats.flush.max_ns > 0);

    let mut all = vec![0; SIZE as usize];
    chain.read_at(&mut all, 0).unwrap();
    let stats = chain.stats().snapshot();
    assert_eq!((stats.reads, stats.read_bytes), (1, SIZE));
    assert_eq!(stats.top_read_blocks, 6);
    // The upper layer's one block was touched; the lower one's first half but for four.
    assert_eq!(stats.layer_read_blocks, [BLOCKS / 2 - 4, 0]);
    assert_eq!(stats.zero_read_blocks, BLOCKS / 2 - 2);
    let zeroes = ZeroMode::MayUnmap;
    chain.write_zeroes(0, 4096, zeroes, buffered).unwrap();
    assert_eq!(chain.stats().snapshot().discarded_bytes, 4096);
}

#[test]
fn sources_cover_the_device_whatever_the_number_asked_for() {
    let rig = Rig::new();
    let chain = rig.fresh("top");
    for block in (0..BLOCKS).step_by(3) {
        chain
            .write_at(&[1; 4096], block * 4096, Durability::Buffered)
            .unwrap();
    }
    let mut by_block = Vec::new();
    for max in [1usize, 7, 100_000] {
        let mut seen = Vec::new();
        let mut at = Block::FIRST;
        loop {
            let runs = chain.sources(at, max);
            assert!(runs.len() <= max);
            if runs.is_empty() {
                break;
            }
            for run in runs {
                assert_eq!(run.start(), at);
                at += run.len();
                seen.extend(run.span.blocks().map(|_| run.value));
            }
        }
        assert_eq!(seen.len() as u64, BLOCKS);
        by_block.push(seen);
    }
    assert!(by_block.windows(2).all(|pair| pair[0] == pair[1]));
    let seen = &by_block[0];
    assert_eq!(seen[0], Source::Top);
    assert_eq!(seen[1], Source::Sealed(1));
    assert_eq!(seen[2], Source::Sealed(0));
    assert_eq!(seen[BLOCKS as usize / 2 + 2], Source::Hole);
    assert_eq!(seen[BLOCKS as usize - 2], Source::Zero);
}
