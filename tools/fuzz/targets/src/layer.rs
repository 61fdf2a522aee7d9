//! A layer's files: each by itself beside good ones, and a whole layer.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use uuid::Uuid;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, MAX_VIRTUAL_SIZE, Span};
use vellum_base::storage::{OpenMode, SimStorage, Storage};
use vellum_base::{Error, ErrorKind};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{
    Header, LayerOptions, SealedLayer, Severity, WritableLayer, check_layer, seal_in_place,
};

use crate::input::{self, take_file, with_mode};
use crate::{Seed, fixup};

const DIR: &str = "/layer";
const UUID: Uuid = Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0001);
const SMALL: u64 = 64 * BLOCK_SIZE;
/// Bit of the first byte: checksums are made to fit.
const FIX: u8 = 1;
/// Bit of the first byte: the layer has 64 TiB.
const LARGE: u8 = 2;
/// Layers of up to this many blocks of data are read whole.
const READABLE: u64 = 1024;
/// So many blocks of a device are looked at.
const SAMPLES: u64 = 64;

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn size(mode: u8) -> u64 {
    if mode & LARGE != 0 {
        MAX_VIRTUAL_SIZE
    } else {
        SMALL
    }
}

fn spec(sealed: bool) -> ChainSpec {
    let dir = PathBuf::from(DIR);
    ChainSpec {
        sealed: if sealed { vec![dir.clone()] } else { vec![] },
        top: (!sealed).then_some(dir),
        options: LayerOptions {
            journal_blocks: 4,
            journal_start: 32 << 10,
            journal_max: 32 << 10,
            map_log: 32 << 10,
            background: false,
        },
    }
}

fn open_on(disk: &SimStorage, sealed: bool) -> vellum_base::Result<Chain> {
    open_chain(&(Arc::new(disk.clone()) as Arc<dyn Storage>), &spec(sealed))
}

fn file(disk: &SimStorage, name: &str) -> Vec<u8> {
    disk.read_all(&path(name), 1 << 30).unwrap()
}

fn put_file(disk: &SimStorage, name: &str, bytes: &[u8]) {
    let file = disk.open(&path(name), OpenMode::Create).unwrap();
    file.set_len(0).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
}

/// A new layer, empty.
fn fresh(virtual_size: u64) -> SimStorage {
    let disk = SimStorage::new();
    let header = Header {
        uuid: UUID,
        parent: None,
        virtual_size,
        sealed: false,
        created: 1,
    };
    WritableLayer::create(&disk, Path::new(DIR), &header).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

/// A layer that somebody wrote to; its server closed it, or was killed.
fn written(virtual_size: u64, close: bool) -> SimStorage {
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
fn changed(virtual_size: u64) -> SimStorage {
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

fn sealed(virtual_size: u64) -> SimStorage {
    let disk = written(virtual_size, true);
    let chain = open_on(&disk, false).unwrap();
    chain.top().unwrap().seal().unwrap();
    drop(chain);
    disk
}

fn with_seal(virtual_size: u64) -> SimStorage {
    let disk = sealed(virtual_size);
    seal_in_place(&disk, Path::new(DIR), |_| {}).unwrap();
    disk
}

/// A copy of a disk that is made once.
fn template(
    cell: &'static [OnceLock<SimStorage>; 2],
    mode: u8,
    make: fn(u64) -> SimStorage,
) -> SimStorage {
    let which = usize::from(mode & LARGE != 0);
    cell[which].get_or_init(|| make(size(mode))).fork()
}

/// What blocks hold; `None` for one that cannot be read. All of a small device, samples of a large.
fn content(device: &dyn BlockDevice) -> Vec<Option<Vec<u8>>> {
    let blocks = device.size() / BLOCK_SIZE;
    let step = (blocks / SAMPLES).max(1);
    let read = |block: u64| {
        let mut bytes = vec![0; BLOCK_SIZE as usize];
        match device.read_at(&mut bytes, block * BLOCK_SIZE) {
            Ok(()) => Some(bytes),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                None
            }
        }
    };
    (0..blocks).step_by(step as usize).map(read).collect()
}

/// An error says that the layer is bad and nothing else, and names it.
fn judge(error: &Error) {
    let kinds = [
        ErrorKind::Corrupt,
        ErrorKind::Unsupported,
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    assert!(error.to_string().contains(DIR), "{error}");
}

/// Looks a layer over, opens it, reads it, and, where it can be written, writes, closes, seals.
///
/// * `check` changes nothing, and finds damage wherever opening fails for damage.
/// * Opening again shows the same.
/// * What is written and flushed is there after closing; the rest is as before.
/// * After sealing too, and every block then fits its checksum.
fn exercise(disk: &SimStorage, is_sealed: bool, deep: bool) {
    let before = disk.changes();
    let found = check_layer(disk, Path::new(DIR), deep);
    assert_eq!(disk.changes(), before, "a check changed something");
    let damaged = found
        .iter()
        .any(|finding| finding.severity == Severity::Damage);
    let chain = match open_on(disk, is_sealed) {
        Ok(chain) => chain,
        Err(error) => {
            judge(&error);
            let excused = error.kind() == ErrorKind::InvalidInput;
            assert!(damaged || excused, "{error}, but check is content");
            return;
        }
    };
    assert!(chain.size() <= MAX_VIRTUAL_SIZE);
    let shown = content(&chain);
    let _ = chain.extents(0, chain.size(), 100).unwrap();
    chain
        .read_at(&mut [0; 512], chain.size())
        .expect_err("a read past the end");
    if is_sealed {
        let layer = SealedLayer::open(disk, Path::new(DIR)).unwrap();
        let all = Span::up_to(layer.header().blocks());
        layer
            .for_each_run(|run| assert!(!run.is_empty() && all.contains(run.span)))
            .unwrap();
        if layer.data_blocks().get() <= READABLE {
            let _ = layer.scrub(|_| {}).inspect_err(judge);
        }
        return;
    }
    drop(chain);
    let chain = open_on(disk, false).expect("it was opened a moment ago");
    assert!(
        content(&chain) == shown,
        "another open shows something else"
    );
    let last = chain.size() - BLOCK_SIZE;
    chain
        .write_at(&[0x77; 1000], last + 512, Durability::Buffered)
        .unwrap();
    chain.discard(0, BLOCK_SIZE.min(last)).unwrap();
    chain.flush().unwrap();
    let expected = content(&chain);
    chain.close().unwrap();
    drop(chain);
    let chain = open_on(disk, false).expect("it was closed in order");
    assert!(content(&chain) == expected, "something flushed is gone");
    let data_blocks = chain.top().unwrap().data_blocks().get();
    assert!(data_blocks <= chain.size() / BLOCK_SIZE);
    chain.top().unwrap().seal().unwrap();
    drop(chain);
    if data_blocks <= READABLE {
        seal_in_place(disk, Path::new(DIR), |_| {}).unwrap();
        let layer = SealedLayer::open(disk, Path::new(DIR)).unwrap();
        assert_eq!(layer.data_blocks().get(), data_blocks);
        let report = layer.scrub(|_| {}).unwrap();
        assert!(report.corrupt.is_empty() && report.digest.is_some());
    }
    let chain = open_on(disk, true).expect("it was sealed in order");
    assert!(content(&chain) == expected, "sealing changed something");
}

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

/// `map`, in a writable layer that was closed: as [`exercise`].
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

/// `seal`, in a sealed layer: as [`exercise`].
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
/// generation 0: as [`exercise`].
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

/// The log of changes, cut down to its header and the entries of its two regions: as it lies in a
/// writable layer whose server was killed. First the number of entries in region 0.
fn put_live(disk: &SimStorage, mode: u8, bytes: &[u8], uuid: Uuid) {
    const REGION: [u64; 2] = [4096, 8_392_704];
    let (count, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let (header, entries) = rest.split_at(rest.len().min(128));
    let mut header = header.to_vec();
    header.resize(128, 0);
    let boot = disk.boot_id();
    if mode & FIX != 0 {
        fixup::live_header(&mut header, uuid, boot);
    } else {
        header[32..48].copy_from_slice(&boot);
    }
    let file = disk.open(&path("live"), OpenMode::Create).unwrap();
    file.set_len(16_781_312).unwrap();
    file.write_at(&header, 0).unwrap();
    if mode & FIX != 0 {
        let id = |name: &str| Some(disk.open(&path(name), OpenMode::Read).ok()?.id().unwrap());
        let data = (0..8).map_while(|k| {
            id(&if k == 0 {
                "data".into()
            } else {
                format!("data.{k}")
            })
        });
        let bond = fixup::live_bond(
            file.id().unwrap(),
            id("layer").unwrap_or_default(),
            &data.collect::<Vec<_>>(),
            file.evidence().unwrap(),
        );
        file.write_at(&bond, 128).unwrap();
    }
    let mut placed = [0; 2];
    for (at, entry) in entries.chunks(32).enumerate() {
        let mut entry = entry.to_vec();
        entry.resize(32, 0);
        if mode & FIX != 0 {
            fixup::live_entry(&mut entry);
        }
        let region = usize::from(at >= usize::from(*count));
        file.write_at(&entry, REGION[region] + 32 * placed[region])
            .unwrap();
        placed[region] += 1;
    }
    file.sync().unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
}

fn cut_down_live(disk: &SimStorage) -> Vec<u8> {
    let live = file(disk, "live");
    let region = |at: usize| {
        let entries = live[at..].chunks(32);
        let used = entries.take_while(|entry| entry.iter().any(|byte| *byte != 0));
        used.flatten().copied().collect::<Vec<u8>>()
    };
    let (first, second) = (region(4096), region(8_392_704));
    let mut out = vec![(first.len() / 32) as u8];
    out.extend(&live[..128]);
    // Which boot it was is put in when it is used.
    out[33..49].fill(0);
    out[53..57].fill(0);
    out.extend(first);
    out.extend(second);
    out
}

/// `live`, in a writable layer whose server was killed: as [`exercise`].
pub fn live(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, bytes)) = split(input) else {
        return;
    };
    let disk = template(&DISKS, mode, |size| written(size, false));
    put_live(&disk, mode, &bytes, UUID);
    exercise(&disk, false, mode & LARGE == 0);
}

pub fn live_seeds() -> Vec<Seed> {
    seeds_of_both_sizes(|size| cut_down_live(&written(size, false)))
}

const FILES: [&str; 7] = [
    "layer",
    "map",
    "journal.0",
    "journal.1",
    "seal",
    "live",
    "data",
];

/// A directory of files, each a byte for its name, two for its length, and its bytes. Data files
/// that are not there are made as the header wants them. As [`exercise`].
pub fn open(input: &[u8]) {
    let Some((mode, bytes)) = split(input) else {
        return;
    };
    let mut files: Vec<(&str, Vec<u8>)> = Vec::new();
    let mut rest = &bytes[..];
    while let Some((name, bytes)) = take_file(&mut rest, &FILES) {
        files.push((name, bytes.to_vec()));
    }
    let disk = SimStorage::new();
    disk.create_dir(Path::new(DIR)).unwrap();
    let mut header = None;
    for (name, bytes) in &mut files {
        if *name == "layer" {
            if mode & FIX != 0 {
                fixup::header(bytes);
            }
            header = Header::decode(bytes).ok();
        }
    }
    let uuid = header.as_ref().map_or(UUID, |header| header.uuid);
    let size = header.as_ref().map_or(SMALL, |header| header.virtual_size);
    let mut live = None;
    for (name, mut bytes) in files {
        if mode & FIX != 0 {
            match name {
                "map" | "seal" => fixup::table(&mut bytes, uuid, size),
                "journal.0" | "journal.1" => fixup::journal(&mut bytes, uuid),
                _ => {}
            }
        }
        if name == "live" {
            // It names the others.
            live = Some(bytes);
        } else {
            put_file(&disk, name, &bytes);
        }
    }
    if mode & TWO == 0 {
        let segment = 8u64 << 40;
        for number in 0..size.div_ceil(segment) {
            let name = match number {
                0 => "data".to_owned(),
                _ => format!("data.{number}"),
            };
            let file = disk.open(&path(&name), OpenMode::Create).unwrap();
            file.set_len((size - number * segment).min(segment))
                .unwrap();
            file.sync().unwrap();
        }
    }
    if let Some(bytes) = live {
        put_live(&disk, mode, &bytes, uuid);
    }
    disk.sync_dir(Path::new(DIR)).unwrap();
    let is_sealed = header.is_some_and(|header| header.sealed);
    exercise(&disk, is_sealed, size <= SMALL);
}

/// The files of a layer as an input of [`open`], each cut to what an input has room for.
fn pack(mode: u8, disk: &SimStorage) -> Vec<u8> {
    let mut out = vec![mode];
    for entry in disk.list(Path::new(DIR)).unwrap() {
        let Some(which) = FILES.iter().position(|name| *name == entry.name) else {
            continue;
        };
        let mut bytes = match entry.name.as_str() {
            "live" => cut_down_live(disk),
            "data" => {
                let mut bytes = vec![0; 2 * BLOCK_SIZE as usize];
                let data = disk.open(&path("data"), OpenMode::Read).unwrap();
                data.read_at(&mut bytes, 0).unwrap();
                bytes
            }
            name => file(disk, name),
        };
        bytes.truncate(9000);
        input::put_file(&mut out, which as u8, &bytes);
    }
    out
}

pub fn open_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, size) in [("small", SMALL), ("large", MAX_VIRTUAL_SIZE)] {
        seeds.push((format!("{name}-new"), pack(FIX, &fresh(size))));
        seeds.push((format!("{name}-closed"), pack(FIX, &written(size, true))));
        seeds.push((format!("{name}-killed"), pack(FIX, &written(size, false))));
        seeds.push((format!("{name}-pending"), pack(FIX, &sealed(size))));
        seeds.push((format!("{name}-sealed"), pack(FIX, &with_seal(size))));
    }
    seeds
}
