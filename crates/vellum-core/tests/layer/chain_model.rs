//! Chains against a plain array of bytes: random requests, aligned and not, over reopened and
//! sealed layers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Durability, ExtentKind, ZeroMode};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, SealedLayer, WritableLayer, seal_in_place};

const BLOCKS: u64 = 64;
const SIZE: u64 = BLOCKS * BLOCK_SIZE;

#[derive(Debug, Clone)]
enum Op {
    Write {
        offset: u64,
        len: u64,
        seed: u8,
        durable: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        keep: bool,
    },
    Read {
        offset: u64,
        len: u64,
    },
    Flush,
    Reopen {
        close: bool,
    },
    Snapshot,
    Checksum,
}

fn ranges() -> impl Strategy<Value = (u64, u64)> {
    let anywhere =
        (0..SIZE).prop_flat_map(|offset| (Just(offset), 1..=(SIZE - offset).min(5 * BLOCK_SIZE)));
    let aligned = (0..BLOCKS).prop_flat_map(|block| {
        (
            Just(block * BLOCK_SIZE),
            (1..=(BLOCKS - block)).prop_map(|blocks| blocks * BLOCK_SIZE),
        )
    });
    prop_oneof![anywhere, aligned]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (ranges(), any::<u8>(), prop::bool::weighted(0.2)).prop_map(|((offset, len), seed, durable)|
            Op::Write { offset, len, seed, durable }),
        2 => ranges().prop_map(|(offset, len)| Op::Discard { offset, len }),
        2 => (ranges(), any::<bool>()).prop_map(|((offset, len), keep)| Op::Zero { offset, len, keep }),
        3 => ranges().prop_map(|(offset, len)| Op::Read { offset, len }),
        3 => Just(Op::Flush),
        1 => any::<bool>().prop_map(|close| Op::Reopen { close }),
        1 => Just(Op::Snapshot),
        1 => Just(Op::Checksum),
    ];
    prop::collection::vec(op, 1..60)
}

/// A chain on disk with the array that it must equal.
struct Fixture {
    _dir: tempfile::TempDir,
    root: PathBuf,
    storage: Arc<dyn Storage>,
    spec: ChainSpec,
    chain: Option<Chain>,
    model: Vec<u8>,
}

impl Fixture {
    fn new(options: LayerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let storage: Arc<dyn Storage> = Arc::new(FileStorage);
        let top = new_layer(&*storage, &root, None, SIZE);
        let spec = ChainSpec {
            sealed: vec![],
            top: Some(top),
            options,
        };
        let chain = Some(open_chain(&storage, &spec).unwrap());
        Fixture {
            _dir: dir,
            root,
            storage,
            spec,
            chain,
            model: vec![0; SIZE as usize],
        }
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    fn range(&mut self, offset: u64, len: u64) -> &mut [u8] {
        &mut self.model[offset as usize..(offset + len) as usize]
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write {
                offset,
                len,
                seed,
                durable,
            } => {
                let bytes: Vec<u8> = (0..len)
                    .map(|at| (at as u8).wrapping_mul(31) ^ seed)
                    .collect();
                let durability = if durable {
                    Durability::Durable
                } else {
                    Durability::Buffered
                };
                self.chain().write_at(&bytes, offset, durability).unwrap();
                self.range(offset, len).copy_from_slice(&bytes);
            }
            Op::Discard { offset, len } => {
                self.chain().discard(offset, len).unwrap();
                self.range(offset, len).fill(0);
            }
            Op::Zero { offset, len, keep } => {
                let mode = if keep {
                    ZeroMode::KeepAllocated
                } else {
                    ZeroMode::MayUnmap
                };
                self.chain()
                    .write_zeroes(offset, len, mode, Durability::Buffered)
                    .unwrap();
                self.range(offset, len).fill(0);
            }
            Op::Read { offset, len } => {
                let mut bytes = vec![0xaa; len as usize];
                self.chain().read_at(&mut bytes, offset).unwrap();
                assert!(
                    bytes == *self.range(offset, len),
                    "read of {len} at {offset}"
                );
            }
            Op::Flush => self.chain().flush().unwrap(),
            Op::Reopen { close } => {
                // Without close it is as if the process had died: nothing that was written may go
                // away while the machine runs, flushed or not.
                if close {
                    self.chain().close().unwrap();
                    assert!(!self.spec.top.as_ref().unwrap().join("journal.0").exists());
                }
                self.chain = None;
                self.chain = Some(open_chain(&self.storage, &self.spec).unwrap());
            }
            Op::Snapshot => {
                let old = self.chain().top().unwrap();
                let dir = new_layer(&*self.storage, &self.root, Some(old.header().uuid), SIZE);
                let next =
                    WritableLayer::open(self.storage.clone(), &dir, self.spec.options).unwrap();
                self.chain().seal_top(next).unwrap();
                self.spec.sealed.push(old.dir().to_owned());
                self.spec.top = Some(dir);
            }
            Op::Checksum => {
                for dir in &self.spec.sealed {
                    seal_in_place(&*self.storage, dir, |_| {}).unwrap();
                }
            }
        }
        self.chain().top().unwrap().assert_sound();
    }

    fn check(&mut self) {
        let mut bytes = vec![0; SIZE as usize];
        self.chain().read_at(&mut bytes, 0).unwrap();
        assert!(bytes == self.model);
        let extents = self.chain().extents(0, SIZE, usize::MAX).unwrap();
        let mut at = 0;
        for extent in extents {
            assert_eq!(extent.offset, at);
            at += extent.len;
            if extent.kind != ExtentKind::Data {
                let range = extent.offset as usize..at as usize;
                assert!(
                    self.model[range].iter().all(|&byte| byte == 0),
                    "{extent:?} is not zero"
                );
            }
        }
        assert_eq!(at, SIZE);
    }
}

fn new_layer(storage: &dyn Storage, root: &Path, parent: Option<uuid::Uuid>, size: u64) -> PathBuf {
    let header = Header::new(parent, size).unwrap();
    let dir = root.join(header.uuid.to_string());
    WritableLayer::create(storage, &dir, &header).unwrap();
    dir
}

fn small_journal() -> LayerOptions {
    LayerOptions {
        journal_start: 16 << 10,
        journal_max: 64 << 10,
        journal_blocks: 4,
        map_log: 12 << 10,
        preallocate: 1 << 20,
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_requests_over_reopened_and_sealed_layers_read_as_an_array(
        ops in ops(),
        background in any::<bool>(),
    ) {
        let mut fixture = Fixture::new(LayerOptions { background, ..small_journal() });
        for op in &ops {
            fixture.apply(op);
        }
        fixture.check();
        fixture.apply(&Op::Reopen { close: false });
        fixture.check();
        fixture.apply(&Op::Checksum);
        fixture.apply(&Op::Reopen { close: true });
        fixture.check();
    }
}

#[test]
fn layers_of_different_size_stack_and_what_a_smaller_one_cut_off_stays_zero() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let mut spec = ChainSpec::default();
    let mut parent = None;
    for (size, value) in [(SIZE, 1u8), (SIZE / 2, 2), (2 * SIZE, 3)] {
        let top = new_layer(&*storage, dir.path(), parent, size);
        spec.top = Some(top.clone());
        let chain = open_chain(&storage, &spec).unwrap();
        chain
            .write_at(&[value; 4096], value as u64 * 4096, Durability::Buffered)
            .unwrap();
        if value == 1 {
            chain
                .write_at(&[9; 4096], SIZE - 4096, Durability::Buffered)
                .unwrap();
        }
        chain.top().unwrap().seal().unwrap();
        seal_in_place(&*storage, &top, |_| {}).unwrap();
        parent = Some(chain.top().unwrap().header().uuid);
        spec.sealed.push(top);
        spec.top = None;
    }
    let chain = open_chain(&storage, &spec).unwrap();
    assert_eq!(chain.size(), 2 * SIZE);
    let mut bytes = vec![0; 2 * SIZE as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    for block in 0..2 * BLOCKS {
        let expected = if (1..=3).contains(&block) {
            block as u8
        } else {
            0
        };
        assert!(
            bytes[block as usize * 4096..][..4096]
                .iter()
                .all(|&b| b == expected),
            "{block}"
        );
    }
}

#[test]
fn a_layer_on_the_wrong_parent_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let lone = new_layer(&*storage, dir.path(), Some(uuid::Uuid::new_v4()), SIZE);
    let spec = ChainSpec {
        top: Some(lone.clone()),
        ..Default::default()
    };
    let error = open_chain(&storage, &spec).unwrap_err();
    assert_eq!(error.kind(), vellum_base::ErrorKind::Corrupt);
    assert!(
        error.to_string().contains(&*lone.to_string_lossy()),
        "{error}"
    );
}

#[test]
fn a_changed_byte_in_a_sealed_block_is_an_error_and_never_data() {
    use std::os::unix::fs::FileExt;
    let mut fixture = Fixture::new(LayerOptions::default());
    fixture.apply(&Op::Write {
        offset: 8192,
        len: 8192,
        seed: 5,
        durable: true,
    });
    let dir = fixture.spec.top.clone().unwrap();
    fixture.apply(&Op::Snapshot);
    fixture.apply(&Op::Checksum);
    fixture.apply(&Op::Reopen { close: true });
    let file = std::fs::File::options()
        .write(true)
        .open(dir.join("data"))
        .unwrap();
    file.write_all_at(&[0xee], 12288 + 77).unwrap();
    let mut block = [0; 4096];
    fixture.chain().read_at(&mut block, 8192).unwrap();
    let error = fixture.chain().read_at(&mut block, 12288).unwrap_err();
    assert_eq!(error.kind(), vellum_base::ErrorKind::Corrupt);
    assert!(error.to_string().contains("block 3"), "{error}");
    let layer = SealedLayer::open(&FileStorage, &dir).unwrap();
    assert_eq!(layer.scrub(|_| {}).unwrap().corrupt, [Block::new(3)]);
}

#[test]
fn a_64_tib_layer_opens_and_keeps_its_first_and_last_block() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let size = 64u64 << 40;
    let top = new_layer(&*storage, dir.path(), None, size);
    let spec = ChainSpec {
        top: Some(top),
        ..Default::default()
    };
    for round in 0..2 {
        let chain = open_chain(&storage, &spec).unwrap();
        for offset in [0, (8 << 40) - 2048, size - 4096] {
            if round == 0 {
                chain
                    .write_at(&[7; 4096], offset, Durability::Buffered)
                    .unwrap();
                chain.flush().unwrap();
            }
            let mut block = [0; 4096];
            chain.read_at(&mut block, offset).unwrap();
            assert_eq!(block, [7; 4096]);
        }
        assert!(chain.write_at(&[1], size, Durability::Buffered).is_err());
    }
}
