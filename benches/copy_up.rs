#![allow(clippy::expect_used, missing_docs)]
//! First writes into a fresh layer beside a plain pwrite to a sparse file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Durability, Span};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

const DEVICE: u64 = 64 << 20;

fn main_group(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let (parent, uuid) = parent(&*storage, dir.path());
    for (name, len, short) in [
        ("4 KiB", 4096u64, 0u64),
        ("64 KiB", 65536, 0),
        ("1 MiB", 1 << 20, 0),
        ("512 B of 4 KiB (partial)", 4096, 3584),
    ] {
        for random in [false, true] {
            let order = if random { "random" } else { "sequential" };
            let mut group = c.benchmark_group(format!("first write, {name}, {order}"));
            let offsets = offsets(len, random);
            let buf = vec![0xa5; (len - short) as usize];
            group.throughput(Throughput::Bytes(offsets.len() as u64 * (len - short)));
            group.sample_size(10);
            group.bench_function(BenchmarkId::from_parameter("vellum"), |b| {
                b.iter_batched(
                    || fresh_chain(&storage, dir.path(), &parent, uuid),
                    |(chain, _layer)| {
                        for &offset in &offsets {
                            chain
                                .write_at(&buf, offset, Durability::Buffered)
                                .expect("a write");
                        }
                    },
                    BatchSize::PerIteration,
                );
            });
            group.bench_function(
                BenchmarkId::from_parameter("pwrite to a sparse file"),
                |b| {
                    b.iter_batched(
                        || fresh_file(dir.path()),
                        |(file, _path)| {
                            for &offset in &offsets {
                                file.write_all_at(&buf, offset).expect("a write");
                            }
                        },
                        BatchSize::PerIteration,
                    );
                },
            );
        }
    }
}

/// The same order for both sides: an odd stride visits every slot of a power of two once.
fn offsets(len: u64, random: bool) -> Vec<u64> {
    let slots = DEVICE / len;
    let stride = if random {
        (slots as f64 * 0.618) as u64 | 1
    } else {
        1
    };
    (0..slots).map(|at| at * stride % slots * len).collect()
}

/// A sealed layer that holds every block.
fn parent(storage: &dyn Storage, root: &Path) -> (PathBuf, uuid::Uuid) {
    let header = Header::new(None, DEVICE).expect("a header");
    let dir = root.join("parent");
    WritableLayer::create(storage, &dir, &header).expect("a layer");
    let layer = WritableLayer::open(Arc::new(FileStorage), &dir, LayerOptions::default())
        .expect("an open layer");
    for block in (0..DEVICE / BLOCK_SIZE).step_by(256) {
        let (start, bytes) = (Block::new(block), [0x5a; 1 << 20]);
        let held = layer
            .lock_blocks(Span::of_buffer(start, &bytes))
            .expect("a lock");
        layer.write_blocks(&held, start, &bytes).expect("a write");
    }
    layer.seal().expect("a seal");
    drop(layer);
    seal_in_place(storage, &dir, |_| {}).expect("checksums");
    (dir, header.uuid)
}

/// Removes a file or directory at the end of an iteration.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0).or_else(|_| std::fs::remove_file(&self.0));
    }
}

fn fresh_chain(
    storage: &Arc<dyn Storage>,
    root: &Path,
    parent: &Path,
    parent_uuid: uuid::Uuid,
) -> (Chain, Scratch) {
    let header = Header::new(Some(parent_uuid), DEVICE).expect("a header");
    let dir = root.join(header.uuid.to_string());
    WritableLayer::create(&**storage, &dir, &header).expect("a layer");
    let spec = ChainSpec {
        sealed: vec![parent.to_owned()],
        top: Some(dir.clone()),
        options: LayerOptions::default(),
    };
    (open_chain(storage, &spec).expect("a chain"), Scratch(dir))
}

fn fresh_file(root: &Path) -> (File, Scratch) {
    let path = root.join("raw");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    let file = file.expect("a file");
    file.set_len(DEVICE).expect("a length");
    (file, Scratch(path))
}

criterion_group!(benches, main_group);
criterion_main!(benches);
