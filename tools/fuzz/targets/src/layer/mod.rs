//! A layer's files: each by itself beside good ones, and a whole layer.

mod disk;
mod exercise;
mod lazy;
mod live;
mod whole;

use std::sync::OnceLock;

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, MAX_VIRTUAL_SIZE};
use vellum_base::storage::SimStorage;
use vellum_core::layer::Header;

use self::disk::{
    FIX, LARGE, SMALL, UUID, changed, file, fresh, open_on, put_file, sealed, size, template,
    with_seal, written,
};
use self::exercise::exercise;
pub use self::lazy::{have, have_seeds};
pub use self::live::{live, live_seeds};
pub use self::whole::{open, open_seeds};
use crate::input::with_mode;
use crate::{Seed, fixup};

fn split(input: &[u8]) -> Option<(u8, Vec<u8>)> {
    let (&mode, rest) = input.split_first()?;
    Some((mode, rest.to_vec()))
}

/// Seeds of layers of both sizes: a file as it is, and one whose checksums are made to fit.
fn seeds_of_both_sizes(file: impl Fn(u64) -> Vec<u8>) -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, mode) in [("small", 0), ("large", LARGE)] {
        let bytes = file(size(mode));
        seeds.push((format!("{name}-raw"), with_mode(mode, &bytes)));
        seeds.push((name.into(), with_mode(mode | FIX, &bytes)));
    }
    seeds
}

/// `layer`: what is accepted is written again as it was read.
pub fn header(input: &[u8]) {
    let Some((mode, mut bytes)) = split(input) else {
        return;
    };
    if mode & FIX != 0 {
        fixup::header(&mut bytes);
    }
    match Header::decode(&bytes) {
        Ok(header) => {
            assert!(header.virtual_size <= MAX_VIRTUAL_SIZE && !header.blocks().is_none());
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
        Err(error) => assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "{error:?}"
        ),
    }
}

pub fn header_seeds() -> Vec<Seed> {
    let header = file(&fresh(SMALL), "layer");
    let sealed = file(&sealed(MAX_VIRTUAL_SIZE), "layer");
    vec![
        ("new".into(), with_mode(0, &header)),
        ("new-fixed".into(), with_mode(FIX, &header)),
        ("sealed".into(), with_mode(FIX, &sealed)),
        ("cut".into(), with_mode(0, &header[..100])),
    ]
}

/// `map`, in a writable layer that was closed: as [`exercise()`].
pub fn map(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, mut bytes)) = split(input) else {
        return;
    };
    if mode & FIX != 0 {
        fixup::table(&mut bytes, UUID, size(mode));
    }
    let disk = template(&DISKS, mode, |size| written(size, true));
    put_file(&disk, "map", &bytes);
    exercise(&disk, false, mode & LARGE == 0);
}

pub fn map_seeds() -> Vec<Seed> {
    let mut seeds = seeds_of_both_sizes(|size| file(&written(size, true), "map"));
    for (name, bytes) in seeds_of_both_sizes(|size| file(&changed(size), "map")) {
        seeds.push((format!("{name}-changed"), bytes));
    }
    // As older builds wrote it: nothing follows the extents.
    let mut old = file(&written(SMALL, true), "map");
    old[8] = 1;
    old.truncate(4096 + 24 * old[48] as usize);
    seeds.push(("version-1".into(), with_mode(FIX, &old)));
    // One extent of 2^32 - 1 blocks beside the next: 48 bytes that speak of 32 TiB.
    let mut map = file(&written(MAX_VIRTUAL_SIZE, true), "map");
    map.truncate(4096);
    map[48] = 2;
    for (start, state) in [(0u64, 1u32), (u64::from(u32::MAX), 2)] {
        map.extend(start.to_le_bytes());
        map.extend(u32::MAX.to_le_bytes());
        map.extend(state.to_le_bytes());
        map.extend([0; 8]);
    }
    map.resize(8192, 0);
    seeds.push(("two-huge-extents".into(), with_mode(LARGE | FIX, &map)));
    seeds
}

/// `seal`, in a sealed layer: as [`exercise()`].
pub fn seal(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, mut bytes)) = split(input) else {
        return;
    };
    if mode & FIX != 0 {
        fixup::table(&mut bytes, UUID, size(mode));
    }
    let disk = template(&DISKS, mode, with_seal);
    put_file(&disk, "seal", &bytes);
    exercise(&disk, true, mode & LARGE == 0);
}

pub fn seal_seeds() -> Vec<Seed> {
    seeds_of_both_sizes(|size| file(&with_seal(size), "seal"))
}

/// Bit of the first byte: half of the bytes are `journal.1`.
const TWO: u8 = 4;

/// `journal.0` and `journal.1`, in a writable layer that was not closed, with a checkpoint of
/// generation 0: as [`exercise()`].
pub fn journal(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, mut bytes)) = split(input) else {
        return;
    };
    let disk = template(&DISKS, mode, fresh);
    let middle = if mode & TWO != 0 {
        (bytes.len() / 2).next_multiple_of(4096).min(bytes.len())
    } else {
        bytes.len()
    };
    let (first, second) = bytes.split_at_mut(middle);
    if mode & FIX != 0 {
        fixup::journal(first, UUID);
        fixup::journal(second, UUID);
    }
    put_file(&disk, "journal.0", first);
    if mode & TWO != 0 {
        put_file(&disk, "journal.1", second);
    }
    exercise(&disk, false, mode & LARGE == 0);
}

pub fn journal_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, mode) in [("small", 0), ("large", LARGE)] {
        let disk = fresh(size(mode));
        let chain = open_on(&disk, false).unwrap();
        for value in 1..=2u8 {
            let offset = u64::from(value) * (size(mode) / 4);
            chain
                .write_at(&[value; 512], offset, Durability::Durable)
                .unwrap();
        }
        chain.discard(size(mode) / 4, BLOCK_SIZE).unwrap();
        chain.flush().unwrap();
        drop(chain);
        let mut journal = file(&disk, "journal.0");
        journal.truncate(20 << 10);
        seeds.push((format!("{name}-raw"), with_mode(mode, &journal)));
        seeds.push((name.into(), with_mode(mode | FIX, &journal)));
        // The next generation in the other area, of one record that carries nothing.
        let mut next = journal[..4096].to_vec();
        next[32] += 1;
        next[48..56].copy_from_slice(&1u64.to_le_bytes());
        next[60..68].copy_from_slice(&[0, 0, 0, 0, 0, 16, 0, 0]);
        let record = u32::from_le_bytes(journal[64..68].try_into().unwrap()) as usize;
        let mut both = journal[..record].to_vec();
        next.resize(record, 0);
        both.extend(next);
        seeds.push((format!("{name}-two"), with_mode(mode | FIX | TWO, &both)));
    }
    seeds
}
