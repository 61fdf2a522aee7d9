//! Layers whose files were changed by something else: no panic, no wrong data, and `check` finds
//! and explains it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, MAX_VIRTUAL_SIZE};
use vellum_base::storage::{OpenMode, SeededRng, SimStorage, Storage};
use vellum_core::chain::{ChainSpec, open_chain};
use vellum_core::layer::{
    Finding, Header, LayerOptions, Repair, Severity, WritableLayer, check_layer, repair_layer,
    seal_in_place,
};

const SIZE: u64 = 64 * BLOCK_SIZE;
const LAYER: &str = "/layer";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// With a checkpoint and a journal that was not closed.
    Writable,
    /// Sealed, without its seal.
    Pending,
    Sealed,
}

fn options() -> LayerOptions {
    LayerOptions {
        journal_blocks: 4,
        journal_start: 32 << 10,
        journal_max: 32 << 10,
        map_log: 32 << 10,
        preallocate: 1 << 20,
        background: false,
    }
}

/// A layer of that shape, and what it held after each flush.
fn layer(shape: Shape) -> (SimStorage, Vec<Vec<u8>>) {
    let disk = SimStorage::new();
    WritableLayer::create(&disk, Path::new(LAYER), &Header::new(None, SIZE).unwrap()).unwrap();
    let chain = open_chain(&(Arc::new(disk.clone()) as Arc<dyn Storage>), &spec(true)).unwrap();
    let mut states = vec![vec![0; SIZE as usize]];
    for value in 1..=15u8 {
        let offset = u64::from(value % 6) * 2 * BLOCK_SIZE;
        chain
            .write_at(&[value; 5000], offset, Durability::Durable)
            .unwrap();
        if value % 4 == 0 {
            chain.discard(offset, BLOCK_SIZE).unwrap();
            chain.flush().unwrap();
        }
        states.push(read(&chain).unwrap());
        if value == 9 {
            chain.close().unwrap();
        }
    }
    if shape != Shape::Writable {
        chain.top().unwrap().seal().unwrap();
    }
    drop(chain);
    if shape == Shape::Sealed {
        seal_in_place(&disk, Path::new(LAYER), |_| {}).unwrap();
    }
    (disk, states)
}

fn spec(top: bool) -> ChainSpec {
    ChainSpec {
        sealed: if top { vec![] } else { vec![LAYER.into()] },
        top: top.then(|| LAYER.into()),
        options: options(),
    }
}

fn read(device: &dyn BlockDevice) -> vellum_base::Result<Vec<u8>> {
    let mut content = vec![0; SIZE as usize];
    device.read_at(&mut content, 0)?;
    Ok(content)
}

fn open_and_read(disk: &SimStorage, shape: Shape) -> vellum_base::Result<Vec<u8>> {
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let chain = open_chain(&storage, &spec(shape == Shape::Writable))?;
    let mut content = vec![0; SIZE as usize];
    // Block by block: one that is corrupt must not hide a wrong one.
    let mut failed = None;
    for (block, bytes) in content.chunks_exact_mut(BLOCK_SIZE as usize).enumerate() {
        if let Err(error) = chain.read_at(bytes, block as u64 * BLOCK_SIZE) {
            failed = Some(error);
        }
    }
    failed.map_or(Ok(content), Err)
}

fn files(disk: &SimStorage) -> Vec<PathBuf> {
    let entries = disk.list(Path::new(LAYER)).unwrap();
    entries
        .into_iter()
        .map(|entry| Path::new(LAYER).join(entry.name))
        .collect()
}

fn damage(disk: &SimStorage) -> Vec<Finding> {
    let mut findings = check_layer(disk, Path::new(LAYER), true);
    findings.retain(|finding| finding.severity == Severity::Damage);
    findings
}

/// Changes one file in one way, and looks at what comes of it.
fn judge(shape: Shape, states: &[Vec<u8>], disk: &SimStorage, what: &str, path: &Path) {
    let before: Vec<Vec<u8>> = contents(disk);
    let found = damage(disk);
    assert!(
        contents(disk) == before,
        "{what}: a check changed something"
    );
    let name = path.file_name().unwrap().to_str().unwrap();
    match open_and_read(disk, shape) {
        Err(error) => {
            let kinds = [
                ErrorKind::Corrupt,
                ErrorKind::Unsupported,
                ErrorKind::InvalidInput,
            ];
            assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
            assert!(error.to_string().contains(LAYER), "{what}: {error}");
            // The sealed flag is the header's to lose; all else is found.
            let expected = error.kind() == ErrorKind::InvalidInput || !found.is_empty();
            assert!(expected, "{what}: {error}, but check is content");
        }
        Ok(content) if name == "data" && shape != Shape::Sealed => drop(content),
        // A torn last record looks like one that was never finished.
        Ok(content) if name.starts_with("journal") || name == "map" => {
            assert!(states.contains(&content), "{what}: a state that never was");
        }
        Ok(content) => {
            assert!(content == *states.last().unwrap(), "{what}: wrong data");
        }
    }
}

fn contents(disk: &SimStorage) -> Vec<Vec<u8>> {
    files(disk)
        .iter()
        .map(|path| disk.read_all(path, 1 << 30).unwrap())
        .collect()
}

fn each_file(
    shape: Shape,
    mut change: impl FnMut(&SimStorage, &Path, u64) -> Vec<(SimStorage, String)>,
) {
    let (disk, states) = layer(shape);
    assert_eq!(damage(&disk), []);
    assert!(open_and_read(&disk.fork(), shape).unwrap() == *states.last().unwrap());
    for path in files(&disk) {
        let len = disk.open(&path, OpenMode::Read).unwrap().len().unwrap();
        for (changed, what) in change(&disk, &path, len) {
            let what = format!("{shape:?}: {} {what}", path.display());
            judge(shape, &states, &changed, &what, &path);
        }
    }
}

const SHAPES: [Shape; 3] = [Shape::Writable, Shape::Pending, Shape::Sealed];

#[test]
fn a_changed_byte_anywhere_is_an_error_or_changes_nothing() {
    let mut rng = SeededRng::new(1);
    for shape in SHAPES {
        each_file(shape, |disk, path, len| {
            // Densely where the structure is, then here and there.
            let dense = match len {
                0..6_000 => 7,
                6_000..20_000 => 23,
                _ => 251,
            };
            let sparse = (len / 500).max(dense) as usize;
            let head = len.min(200_000);
            (0..head)
                .step_by(dense as usize)
                .chain((head..len).step_by(sparse))
                .map(|at| {
                    let disk = disk.fork();
                    let file = disk.open(path, OpenMode::Write).unwrap();
                    let mut byte = [0];
                    file.read_at(&mut byte, at).unwrap();
                    file.write_at(&[byte[0] ^ (1 << rng.below(8))], at).unwrap();
                    (disk, format!("byte {at}"))
                })
                .collect()
        });
    }
}

#[test]
fn a_file_cut_short_or_extended_is_an_error_or_changes_nothing() {
    for shape in SHAPES {
        each_file(shape, |disk, path, len| {
            [
                0,
                1,
                100,
                511,
                512,
                4095,
                4096,
                4097,
                len - 1,
                len + 1,
                len + 4096,
            ]
            .into_iter()
            .filter(|&new| new != len)
            .map(|new| {
                let disk = disk.fork();
                let file = disk.open(path, OpenMode::Write).unwrap();
                file.set_len(new).unwrap();
                (disk, format!("of {len} bytes made {new}"))
            })
            .collect()
        });
    }
}

#[test]
fn noise_anywhere_is_an_error_or_changes_nothing() {
    let mut rng = SeededRng::new(2);
    for shape in SHAPES {
        each_file(shape, |disk, path, len| {
            (0..60)
                .map(|round| {
                    let disk = disk.fork();
                    let file = disk.open(path, OpenMode::Write).unwrap();
                    let at = rng.below(len);
                    let noise: Vec<u8> = (0..(1 + rng.below(600)).min(len - at))
                        .map(|_| rng.bits() as u8)
                        .collect();
                    file.write_at(&noise, at).unwrap();
                    (disk, format!("noise {round} at {at}"))
                })
                .collect()
        });
    }
}

#[test]
fn a_seal_in_a_layer_that_is_not_sealed_is_refused() {
    let (disk, _) = layer(Shape::Writable);
    let (other, _) = layer(Shape::Sealed);
    let seal = Path::new(LAYER).join("seal");
    let bytes = other.read_all(&seal, 1 << 20).unwrap();
    disk.open(&seal, OpenMode::CreateNew)
        .unwrap()
        .write_at(&bytes, 0)
        .unwrap();
    let error = open_and_read(&disk, Shape::Writable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("seal"), "{error}");
}

#[test]
fn a_missing_file_of_a_sealed_layer_is_damage() {
    for name in ["layer", "data"] {
        let (disk, _) = layer(Shape::Sealed);
        disk.remove_file(&Path::new(LAYER).join(name)).unwrap();
        let found = damage(&disk);
        assert!(
            found.iter().any(|finding| finding.file.ends_with(name)),
            "{found:?}"
        );
        assert!(open_and_read(&disk, Shape::Sealed).is_err());
    }
}

#[test]
fn a_corrupt_block_of_a_sealed_layer_is_found_by_number() {
    let (disk, _) = layer(Shape::Sealed);
    let file = disk
        .open(&Path::new(LAYER).join("data"), OpenMode::Write)
        .unwrap();
    file.write_at(&[0xee], 2 * BLOCK_SIZE + 5).unwrap();
    let found = damage(&disk);
    assert_eq!(found.len(), 1);
    assert!(found[0].what.contains("checksum: 2"), "{}", found[0]);
    assert_eq!(found[0].repair, None);
    // Without reading the blocks nobody can know.
    assert_eq!(check_layer(&disk, Path::new(LAYER), false), []);
}

#[test]
fn leftovers_and_a_missing_seal_are_repaired_and_then_nothing_is_found() {
    let (disk, states) = layer(Shape::Pending);
    disk.open(&Path::new(LAYER).join("map.tmp"), OpenMode::Create)
        .unwrap();
    let proposed: Vec<_> = check_layer(&disk, Path::new(LAYER), true)
        .into_iter()
        .filter_map(|finding| finding.repair)
        .collect();
    assert_eq!(proposed, [Repair::Remove, Repair::MakeSeal]);
    let done = repair_layer(&disk, Path::new(LAYER)).unwrap();
    assert_eq!(done.len(), 2);
    assert_eq!(check_layer(&disk, Path::new(LAYER), true), []);
    assert!(open_and_read(&disk, Shape::Sealed).unwrap() == *states.last().unwrap());
    let names: Vec<_> = files(&disk)
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["data", "layer", "seal"]);
}

#[test]
fn repairing_a_layer_that_was_not_closed_keeps_its_journal() {
    let (disk, states) = layer(Shape::Writable);
    repair_layer(&disk, Path::new(LAYER)).unwrap();
    assert!(open_and_read(&disk, Shape::Writable).unwrap() == *states.last().unwrap());
    // Opening recovered it, and left a note at most.
    assert_eq!(damage(&disk), []);
}

#[test]
fn a_map_of_a_million_claimed_extents_is_refused_without_allocating_for_them() {
    let (disk, _) = layer(Shape::Writable);
    let file = disk
        .open(&Path::new(LAYER).join("map"), OpenMode::Write)
        .unwrap();
    let mut header = vec![0; 4096];
    file.read_at(&mut header, 0).unwrap();
    for claimed in [65, 1_000_000, u64::MAX] {
        header[48..56].copy_from_slice(&claimed.to_le_bytes());
        let crc = crc32fast::hash(&header[..4092]);
        header[4092..].copy_from_slice(&crc.to_le_bytes());
        file.write_at(&header, 0).unwrap();
        let error = open_and_read(&disk.fork(), Shape::Writable).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("extents"), "{error}");
    }
}

#[test]
fn a_journal_of_a_million_changes_of_terabytes_is_replayed_in_seconds() {
    const CHANGES: u32 = 1_000_000;
    let disk = SimStorage::new();
    let header = Header::new(None, MAX_VIRTUAL_SIZE).unwrap();
    WritableLayer::create(&disk, Path::new(LAYER), &header).unwrap();
    // One record: format.md, section 3.2.
    let len = (128 + 16 * CHANGES as usize).next_multiple_of(4096);
    let mut record = b"VELLUMJR\x01\0\0\0\0\0\0\0".to_vec();
    record.extend(header.uuid.as_bytes());
    record.extend(1u64.to_le_bytes());
    record.extend([0; 16]);
    record.extend(CHANGES.to_le_bytes());
    record.extend(0u32.to_le_bytes());
    record.extend((len as u32).to_le_bytes());
    record.resize(128, 0);
    for change in 0..CHANGES {
        record.extend(u64::from(change % 7).to_le_bytes());
        record.extend(u32::MAX.to_le_bytes());
        record.extend((change % 3).to_le_bytes());
    }
    record.resize(len, 0);
    let crc = crc32fast::hash(&record);
    record[68..72].copy_from_slice(&crc.to_le_bytes());
    let journal = Path::new(LAYER).join("journal.0");
    let file = disk.open(&journal, OpenMode::Create).unwrap();
    file.write_at(&record, 0).unwrap();
    let began = Instant::now();
    WritableLayer::open(Arc::new(disk), Path::new(LAYER), options()).unwrap();
    // One after the other they take minutes.
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}

/// `tests/fixtures/layer-v1` is a layer that a build wrote whose map had version 1; its server was
/// killed with a journal. The data file has 16 blocks.
fn old_layer() -> SimStorage {
    let disk = SimStorage::new();
    disk.create_dir(Path::new(LAYER)).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layer-v1");
    for name in ["layer", "data", "map", "journal.0"] {
        let bytes = std::fs::read(dir.join(name)).unwrap();
        let file = disk
            .open(&Path::new(LAYER).join(name), OpenMode::CreateNew)
            .unwrap();
        file.write_at(&bytes, 0).unwrap();
        file.sync().unwrap();
    }
    disk.sync_dir(Path::new(LAYER)).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

#[test]
fn a_layer_of_an_older_build_is_checked_opened_and_written_on() {
    let version = |disk: &SimStorage| {
        let map = disk
            .read_all(&Path::new(LAYER).join("map"), 1 << 20)
            .unwrap();
        map[8]
    };
    let disk = old_layer();
    assert_eq!(version(&disk), 1);
    assert_eq!(damage(&disk), []);
    let open = |disk: &SimStorage| {
        let storage: Arc<dyn Storage> = Arc::new(disk.clone());
        open_chain(&storage, &spec(true)).unwrap()
    };
    let block = |value: u8| vec![value; BLOCK_SIZE as usize];
    let values = [0, 0x11, 0, 0x11, 0, 0x33, 0, 0, 0x44, 0, 0, 0, 0, 0, 0, 0];
    let expected: Vec<u8> = values.into_iter().flat_map(block).collect();
    let content = |disk: &SimStorage| {
        let chain = open(disk);
        let mut content = vec![0; expected.len()];
        chain.read_at(&mut content, 0).unwrap();
        content
    };
    assert!(content(&disk) == expected);
    // As it was closed in order, without the journal: then the map stays until it is replaced.
    let closed = old_layer();
    closed
        .remove_file(&Path::new(LAYER).join("journal.0"))
        .unwrap();
    let chain = open(&closed);
    assert_eq!(version(&closed), 1);
    chain
        .write_at(&block(7), BLOCK_SIZE, Durability::Durable)
        .unwrap();
    chain.close().unwrap();
    drop(chain);
    assert_eq!(version(&closed), 2);
    assert_eq!(content(&closed)[BLOCK_SIZE as usize..][..2], [7, 7]);
    assert_eq!(damage(&closed), []);
}
