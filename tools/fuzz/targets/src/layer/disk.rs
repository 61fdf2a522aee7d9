//! Simulated disks with a layer, for its files to be exchanged.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use uuid::Uuid;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, MAX_VIRTUAL_SIZE};
use vellum_base::storage::{OpenMode, SimStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

pub(super) const DIR: &str = "/layer";
pub(super) const UUID: Uuid = Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0001);
pub(super) const SMALL: u64 = 64 * BLOCK_SIZE;
/// Bit of the first byte: checksums are made to fit.
pub(super) const FIX: u8 = 1;
/// Bit of the first byte: the layer has 64 TiB.
pub(super) const LARGE: u8 = 2;
pub(super) fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

pub(super) fn size(mode: u8) -> u64 {
    if mode & LARGE != 0 {
        MAX_VIRTUAL_SIZE
    } else {
        SMALL
    }
}

pub(super) fn spec(sealed: bool) -> ChainSpec {
    let dir = PathBuf::from(DIR);
    ChainSpec {
        sealed: if sealed { vec![dir.clone()] } else { vec![] },
        top: (!sealed).then_some(dir),
        options: LayerOptions {
            journal_blocks: 4,
            journal_start: 32 << 10,
            journal_max: 32 << 10,
            map_log: 32 << 10,
            preallocate: 1 << 20,
            background: false,
        },
    }
}

pub(super) fn open_on(disk: &SimStorage, sealed: bool) -> vellum_base::Result<Chain> {
    open_chain(&(Arc::new(disk.clone()) as Arc<dyn Storage>), &spec(sealed))
}

pub(super) fn file(disk: &SimStorage, name: &str) -> Vec<u8> {
    disk.read_all(&path(name), 1 << 30).unwrap()
}

pub(super) fn put_file(disk: &SimStorage, name: &str, bytes: &[u8]) {
    let file = disk.open(&path(name), OpenMode::Create).unwrap();
    file.set_len(0).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
}

/// A new layer, empty.
pub(super) fn fresh(virtual_size: u64) -> SimStorage {
    let disk = SimStorage::new();
    let header = Header {
        uuid: UUID,
        parent: None,
        stands_for: None,
        virtual_size,
        sealed: false,
        lazy: false,
        created: 1,
    };
    WritableLayer::create(&disk, Path::new(DIR), &header).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

/// A layer that somebody wrote to; its server closed it, or was killed.
pub(super) fn written(virtual_size: u64, close: bool) -> SimStorage {
    let disk = fresh(virtual_size);
    let chain = open_on(&disk, false).unwrap();
    for value in 1..=5u8 {
        let offset = u64::from(value % 4) * (virtual_size / 8);
        chain
            .write_at(&[value; 5000], offset, Durability::Durable)
            .unwrap();
        if value == 3 {
            chain.discard(offset, virtual_size / 16).unwrap();
            chain.flush().unwrap();
        }
    }
    if close {
        chain.close().unwrap();
    } else {
        chain
            .write_at(&[9; 100], 40 * BLOCK_SIZE, Durability::Buffered)
            .unwrap();
        chain.discard(virtual_size / 8, BLOCK_SIZE).unwrap();
    }
    drop(chain);
    disk
}

/// As [`written`] and closed, then opened and closed again: the map has a segment of changes, and one
/// that says nothing.
pub(super) fn changed(virtual_size: u64) -> SimStorage {
    let disk = written(virtual_size, true);
    for value in 1..=2u8 {
        let chain = open_on(&disk, false).unwrap();
        chain
            .write_at(&[value; 100], 9 * BLOCK_SIZE, Durability::Durable)
            .unwrap();
        if value == 1 {
            chain.discard(virtual_size / 4, BLOCK_SIZE).unwrap();
        }
        chain.close().unwrap();
    }
    disk
}

pub(super) fn sealed(virtual_size: u64) -> SimStorage {
    let disk = written(virtual_size, true);
    let chain = open_on(&disk, false).unwrap();
    chain.top().unwrap().seal().unwrap();
    drop(chain);
    disk
}

pub(super) fn with_seal(virtual_size: u64) -> SimStorage {
    let disk = sealed(virtual_size);
    seal_in_place(&disk, Path::new(DIR), |_| {}).unwrap();
    disk
}

/// A copy of a disk that is made once.
pub(super) fn template(
    cell: &'static [OnceLock<SimStorage>; 2],
    mode: u8,
    make: fn(u64) -> SimStorage,
) -> SimStorage {
    let which = usize::from(mode & LARGE != 0);
    cell[which].get_or_init(|| make(size(mode))).fork()
}
