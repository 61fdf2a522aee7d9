//! The bytes of format version 1, as a build of November 2026 wrote them, and the tables of
//! docs/format.md held against them. The files are never written anew: a build that does not read
//! them, or writes others, has changed the format, which takes a feature bit or a version.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use uuid::Uuid;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, ZeroMode};
use vellum_base::storage::{OpenMode, SimStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{
    Header, LayerOptions, Severity, WritableLayer, check_layer, seal_in_place,
};

use crate::format_page::{Row, Table, number_of, section};

const LAYER: &str = "/layer";
const BLOCKS: usize = 32;
const UUID: u128 = 0x5665_6c6c_756d_4c61_7965_7256_6572_7331;
/// Of the names and contents of all files below `format-v1`.
const FINGERPRINT: &str = "4786d38b3783bf4b55ef97be61e23fff840265e601136aa67f76bb7b2c3d3350";

type Files = BTreeMap<String, Vec<u8>>;

/// Closed in order: a table with a segment of changes behind it.
const CLOSED: &str = "closed";
/// Its process was killed: as `closed`, with a journal and a log of changes.
const KILLED: &str = "killed";
const SEALED: &str = "sealed";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-v1")
}

fn options() -> LayerOptions {
    LayerOptions {
        journal_blocks: 4,
        journal_start: 64 << 10,
        journal_max: 64 << 10,
        map_log: 32 << 10,
        preallocate: 1 << 20,
        background: false,
    }
}

fn open(disk: &SimStorage, sealed: bool) -> Chain {
    let layer = PathBuf::from(LAYER);
    let spec = ChainSpec {
        sealed: if sealed { vec![layer.clone()] } else { vec![] },
        top: (!sealed).then_some(layer),
        options: options(),
    };
    open_chain(&(Arc::new(disk.clone()) as Arc<dyn Storage>), &spec).unwrap()
}

/// One byte for each block that a layer holds: all bytes of the block have it.
fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK_SIZE as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
        .chunks_exact(BLOCK_SIZE as usize)
        .map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]));
            block[0]
        })
        .collect()
}

fn write(chain: &Chain, block: u64, blocks: usize, value: u8, durability: Durability) {
    let bytes = vec![value; blocks * BLOCK_SIZE as usize];
    chain
        .write_at(&bytes, block * BLOCK_SIZE, durability)
        .unwrap();
}

/// What the files of a layer hold now, as a process that is killed leaves them.
fn files_of(disk: &SimStorage) -> Files {
    let entries = disk.list(Path::new(LAYER)).unwrap();
    let names = entries.into_iter().map(|entry| entry.name);
    names
        // Space and nothing else.
        .filter(|name| name != "reserve" && name != "lease")
        .map(|name| {
            let path = Path::new(LAYER).join(&name);
            let mut bytes = disk.read_all(&path, 64 << 20).unwrap();
            if name == "live" {
                // Nothing but zeros follows.
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
                bytes.truncate(used.next_multiple_of(4096));
            }
            (name, bytes)
        })
        .collect()
}

/// The three layers as this build writes them.
fn written_now() -> [(&'static str, Files); 3] {
    let disk = SimStorage::new();
    let header = Header {
        uuid: Uuid::from_u128(UUID),
        parent: None,
        stands_for: None,
        virtual_size: BLOCKS as u64 * BLOCK_SIZE,
        sealed: false,
        lazy: false,
        created: 1_795_651_200,
    };
    WritableLayer::create(&disk, Path::new(LAYER), &header).unwrap();
    let chain = open(&disk, false);
    write(&chain, 1, 6, 0x11, Durability::Durable);
    chain
        .write_zeroes(
            9 * BLOCK_SIZE,
            2 * BLOCK_SIZE,
            ZeroMode::MayUnmap,
            Durability::Durable,
        )
        .unwrap();
    chain.close().unwrap();
    write(&chain, 20, 1, 0x22, Durability::Durable);
    chain.close().unwrap();
    assert_eq!(content(&chain), expected(CLOSED));
    let closed = (CLOSED, files_of(&disk));
    // The journal has these: a block in a record, a barrier, a block that is zeros, one written ahead.
    write(&chain, 2, 2, 0x33, Durability::Durable);
    write(&chain, 24, 6, 0x44, Durability::Durable);
    chain.discard(4 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    chain.flush().unwrap();
    write(&chain, 12, 1, 0x55, Durability::Buffered);
    chain.top().unwrap().flush_ahead();
    chain.flush().unwrap();
    assert_eq!(content(&chain), expected(KILLED));
    let killed = (KILLED, files_of(&disk));
    chain.top().unwrap().seal().unwrap();
    drop(chain);
    seal_in_place(&disk, Path::new(LAYER), |_| {}).unwrap();
    [closed, killed, (SEALED, files_of(&disk))]
}

/// What clients of the golden layers read: one byte for each block.
fn expected(name: &str) -> Vec<u8> {
    let mut blocks = vec![0; BLOCKS];
    blocks[1..7].fill(0x11);
    blocks[20] = 0x22;
    if name != CLOSED {
        blocks[2..4].fill(0x33);
        blocks[4] = 0;
        blocks[12] = 0x55;
        blocks[24..30].fill(0x44);
    }
    blocks
}

fn golden(name: &str) -> Files {
    let dir = fixtures().join(name);
    let entries = std::fs::read_dir(&dir).unwrap();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

fn disk_with(files: &Files) -> SimStorage {
    let disk = SimStorage::new();
    disk.create_dir(Path::new(LAYER)).unwrap();
    for (name, bytes) in files {
        let path = Path::new(LAYER).join(name);
        let file = disk.open(&path, OpenMode::CreateNew).unwrap();
        file.write_at(bytes, 0).unwrap();
        if name == "live" {
            file.set_len(4096 + 2 * 32 * 262_144).unwrap();
        }
        file.sync().unwrap();
    }
    disk.sync_dir(Path::new(LAYER)).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

#[test]
fn the_golden_files_are_those_of_the_first_day() {
    let mut digest = Sha256::new();
    for name in [CLOSED, KILLED, SEALED] {
        for (file, bytes) in golden(name) {
            digest.update(format!("{name}/{file} {}\n", bytes.len()));
            digest.update(&bytes);
        }
    }
    let found: String = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        found, FINGERPRINT,
        "files below tests/fixtures/format-v1 changed: put them back"
    );
}

#[test]
fn layers_of_the_first_day_open_and_hold_what_they_held() {
    for name in [CLOSED, KILLED, SEALED] {
        let disk = disk_with(&golden(name));
        let findings = check_layer(&disk, Path::new(LAYER), true);
        let damage = findings
            .iter()
            .find(|finding| finding.severity == Severity::Damage);
        assert!(damage.is_none(), "{name}: {damage:?}");
        assert_eq!(
            content(&open(&disk, name == SEALED)),
            expected(name),
            "{name}"
        );
        if name == SEALED {
            continue;
        }
        // And are written on, and sealed.
        let chain = open(&disk, false);
        write(&chain, 30, 1, 0x66, Durability::Durable);
        chain.close().unwrap();
        drop(chain);
        let mut later = expected(name);
        later[30] = 0x66;
        assert_eq!(content(&open(&disk, false)), later, "{name}");
    }
}

/// A change of what is written is one of the format too: an older build may have to read it.
#[test]
fn this_build_writes_the_bytes_of_the_first_day() {
    for (name, mut files) in written_now() {
        let mut golden = golden(name);
        assert_eq!(
            files.keys().collect::<Vec<_>>(),
            golden.keys().collect::<Vec<_>>(),
            "{name}"
        );
        for files in [&mut files, &mut golden] {
            if let Some(live) = files.get_mut("live") {
                forget_the_host(live);
            }
        }
        for (file, bytes) in &golden {
            let differs = bytes.iter().zip(&files[file]).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{name}/{file} differs at this byte");
            assert_eq!(bytes.len(), files[file].len(), "{name}/{file}");
        }
    }
}

/// Takes out of a log of changes what it says of the host and not of the layer: the boot, which files
/// these are, when they were made, and what proves that they are there. The sums over that must fit.
fn forget_the_host(live: &mut [u8]) {
    let table = section(LIVE.section);
    judge(&LIVE, &table, live);
    let of_host = [
        "id of the boot",
        "CRC of bytes 0",
        "this file",
        "the file `layer`",
        "token of the processes",
        "ids of two mounts",
        "CRC of bytes 128",
    ];
    for row in of_host {
        live[table.row(row).range()].fill(0);
    }
    // One such for each data file.
    let row = table.row("number of data files");
    let files = row.number(live).unwrap() as usize;
    let first = row.range().end;
    live[first..][..table.row("this file").range().len() * files].fill(0);
}

/// What one structure of the format is in one golden file.
struct Place {
    section: &'static str,
    layer: &'static str,
    file: &'static str,
    at: usize,
    /// Bytes that its CRC covers where the page says "the whole".
    whole: Option<&'static str>,
}

const LIVE: Place = Place {
    section: "## 6. Log of changes",
    layer: KILLED,
    file: "live",
    at: 0,
    whole: None,
};

const PLACES: [Place; 6] = [
    Place {
        section: "## 1. Header",
        layer: CLOSED,
        file: "layer",
        at: 0,
        whole: None,
    },
    Place {
        section: "## 1. Header",
        layer: SEALED,
        file: "layer",
        at: 0,
        whole: None,
    },
    Place {
        section: "### 3.1 Table",
        layer: SEALED,
        file: "seal",
        at: 0,
        whole: None,
    },
    Place {
        section: "### 3.1 Table",
        layer: CLOSED,
        file: "map",
        at: 0,
        whole: None,
    },
    Place {
        section: "### 3.2 Journal",
        layer: KILLED,
        file: "journal.0",
        at: 0,
        whole: Some("length of the record"),
    },
    LIVE,
];

#[test]
fn the_tables_of_the_format_page_are_true_of_the_golden_files() {
    for place in &PLACES {
        let table = section(place.section);
        table.assert_in_order();
        judge(place, &table, &golden(place.layer)[place.file][place.at..]);
    }
}

/// The segment behind the table, wherever that ends.
#[test]
fn the_changes_behind_a_checkpoint_are_as_the_page_has_them() {
    let table = section("### 3.1.1");
    table.assert_in_order();
    let map = &golden(CLOSED)["map"];
    let at = map
        .windows(8)
        .position(|bytes| bytes == b"VELLUMMC")
        .expect("a segment");
    assert_eq!(at % 4096, 0);
    let place = Place {
        section: "### 3.1.1",
        layer: CLOSED,
        file: "map",
        at,
        whole: Some("length of the segment"),
    };
    judge(&place, &table, &map[at..]);
}

/// Each row of a table that says something of its bytes by itself.
fn judge(place: &Place, table: &Table, bytes: &[u8]) {
    let at = format!(
        "{}/{} at {}: {}",
        place.layer, place.file, place.at, place.section
    );
    let mut judged = 0;
    for row in &table.rows {
        let Some(field) = row.bytes(bytes) else {
            continue;
        };
        let what = row.field.as_str();
        let text = format!("{at}: {what}: {field:x?}");
        judged += 1;
        if let Some(magic) = what.strip_prefix("magic ") {
            assert_eq!(field, magic.trim_matches('`').as_bytes(), "{text}");
        } else if what.starts_with("version") {
            let seal = if place.file == "seal" { 1 } else { 2 };
            let version = number_of(what).unwrap_or(seal);
            assert_eq!(row.number(bytes), Some(version), "{text}");
        } else if what.starts_with("UUID of th") && !what.contains("parent") {
            assert_eq!(field, UUID.to_be_bytes(), "{text}");
        } else if what.starts_with("UUID of the parent") || what.starts_with("reserved") {
            assert!(field.iter().all(|byte| *byte == 0), "{text}");
        } else if what.starts_with("virtual size") {
            assert_eq!(
                row.number(bytes),
                Some(BLOCKS as u64 * BLOCK_SIZE),
                "{text}"
            );
        } else if what.starts_with("block size") {
            assert_eq!(row.number(bytes), Some(BLOCK_SIZE), "{text}");
        } else if what.starts_with("creation time") {
            assert_eq!(row.number(bytes), Some(1_795_651_200), "{text}");
        } else if let Some(range) = what.strip_prefix("CRC of bytes ") {
            let (from, to) = range.split_once('–').unwrap();
            let covered = &bytes[from.parse().unwrap()..=to.parse().unwrap()];
            assert_eq!(
                row.number(bytes),
                Some(crc32fast::hash(covered).into()),
                "{text}"
            );
        } else if what.starts_with("CRC of the whole") {
            let len = table.row(place.whole.unwrap()).number(bytes).unwrap();
            let mut covered = bytes[..usize::try_from(len).unwrap()].to_vec();
            covered[row.range()].fill(0);
            assert_eq!(
                row.number(bytes),
                Some(crc32fast::hash(&covered).into()),
                "{text}"
            );
        } else {
            judged -= 1;
        }
    }
    assert!(judged >= 4, "{at}: {judged} rows judged");
}

#[test]
fn a_record_and_a_seal_hold_what_the_page_says_where_it_says() {
    let killed = golden(KILLED);
    let record = &killed["journal.0"];
    let table = section("### 3.2 Journal");
    let number = |name: &str| table.row(name).number(record).unwrap();
    let (changes, blocks) = (
        number("number of map changes"),
        number("number of blocks in the record"),
    );
    assert_eq!(
        (changes, blocks),
        (0, 2),
        "blocks 2 and 3 were there before"
    );
    let len = number("length of the record") as usize;
    let first = 128 + 16 * changes as usize;
    assert_eq!(record[first..first + 8], 2u64.to_le_bytes());
    assert!(
        record[len - 2 * BLOCK_SIZE as usize..len]
            .iter()
            .all(|byte| *byte == 0x33)
    );
    let seal = &golden(SEALED)["seal"];
    let table = section("### 3.1 Table");
    let extents = table.row("number of extents").number(seal).unwrap() as usize;
    let sums = table.row("number of checksums").number(seal).unwrap() as usize;
    let held = expected(SEALED)
        .into_iter()
        .filter(|value| *value != 0)
        .count();
    assert_eq!(sums, held);
    let covered = |row: &Row, bytes: &[u8]| {
        assert_eq!(
            row.number(seal),
            Some(crc32fast::hash(bytes).into()),
            "{}",
            row.field
        );
    };
    let end = (4096 + 24 * extents).next_multiple_of(4096);
    covered(
        table.row("CRC of the extents"),
        &seal[4096..4096 + 24 * extents],
    );
    covered(
        table.row("CRC of the checksums"),
        &seal[end..end + 4 * sums],
    );
}

/// Writes the golden files where there are none: `cargo nextest run -p vellum-core --run-ignored all
/// golden::the_golden_files_are_made`.
#[test]
#[ignore = "once, on the first day"]
fn the_golden_files_are_made() {
    assert!(!fixtures().exists(), "they are never made again");
    for (name, files) in written_now() {
        let dir = fixtures().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        for (file, bytes) in files {
            std::fs::write(dir.join(file), bytes).unwrap();
        }
    }
}
