#![allow(clippy::expect_used, missing_docs)]
//! Reads at chain depth 1 to 128, the cost of a flush, and the opening of deep chains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Durability, Span};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

const DEVICE: u64 = 16 << 20;
const BLOCKS: u64 = DEVICE / BLOCK_SIZE;

/// Layers whose blocks take turns, the bottom first.
fn layers(storage: &dyn Storage, root: &Path, depth: u64) -> ChainSpec {
    let mut spec = ChainSpec::default();
    let mut parent = None;
    for number in 0..depth {
        let (dir, uuid) = new_layer(storage, root, parent);
        let layer = WritableLayer::open(Arc::new(FileStorage), &dir, LayerOptions::default())
            .expect("an open layer");
        for block in (number..BLOCKS).step_by(depth as usize) {
            let block = Block::new(block);
            let held = layer.lock_blocks(Span::of(block)).expect("a lock");
            layer
                .write_blocks(&held, block, &[number as u8; 4096])
                .expect("a write");
        }
        layer.seal().expect("a seal");
        drop(layer);
        seal_in_place(storage, &dir, |_| {}).expect("checksums");
        spec.sealed.push(dir);
        parent = Some(uuid);
    }
    spec
}

fn new_layer(
    storage: &dyn Storage,
    root: &Path,
    parent: Option<uuid::Uuid>,
) -> (PathBuf, uuid::Uuid) {
    let header = Header::new(parent, DEVICE).expect("a header");
    let dir = root.join(header.uuid.to_string());
    WritableLayer::create(storage, &dir, &header).expect("a layer");
    (dir, header.uuid)
}

fn reads(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let mut group = c.benchmark_group("read 4 KiB at random");
    for depth in [1, 8, 32, 128] {
        let spec = layers(&*storage, dir.path(), depth);
        let chain = open_chain(&storage, &spec).expect("a chain");
        let stride = (BLOCKS as f64 * 0.618) as u64 | 1;
        let mut at = 0;
        let mut buf = [0; 4096];
        group.bench_function(BenchmarkId::new("depth", depth), |b| {
            b.iter(|| {
                at = (at + stride) % BLOCKS;
                chain.read_at(&mut buf, at * BLOCK_SIZE).expect("a read");
            });
        });
    }
    group.finish();
    let mut group = c.benchmark_group("open a chain");
    for depth in [1, 8, 32, 128] {
        let spec = layers(&*storage, dir.path(), depth);
        group.bench_function(BenchmarkId::new("depth", depth), |b| {
            b.iter(|| open_chain(&storage, &spec).expect("a chain"));
        });
    }
}

fn flushes(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let mut group = c.benchmark_group("write 8 KiB and flush");
    for (name, journal_blocks) in [("in the journal", 32), ("data synced", 0)] {
        for overwrite in [false, true] {
            let (top, _) = new_layer(&*storage, dir.path(), None);
            let options = LayerOptions {
                journal_blocks,
                ..LayerOptions::default()
            };
            let spec = ChainSpec {
                top: Some(top),
                options,
                ..ChainSpec::default()
            };
            let chain = open_chain(&storage, &spec).expect("a chain");
            if overwrite {
                chain
                    .write_at(&vec![1; DEVICE as usize], 0, Durability::Buffered)
                    .expect("data");
            }
            let what = if overwrite {
                "overwriting"
            } else {
                "allocating"
            };
            let mut at = 0;
            group.bench_function(BenchmarkId::new(name, what), |b| {
                b.iter(|| {
                    // Back to nothing once all is allocated.
                    if at == DEVICE && !overwrite {
                        chain.discard(0, DEVICE).expect("a discard");
                    }
                    at %= DEVICE;
                    chain
                        .write_at(&[7; 8192], at, Durability::Durable)
                        .expect("a write");
                    at += 8192;
                });
            });
        }
    }
}

criterion_group!(benches, reads, flushes);
criterion_main!(benches);
