use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::layer::{LayerOptions, WritableLayer};
use vellum_base::block::{BLOCK_SIZE, BlockState};
use vellum_base::storage::SimStorage;

const DIR: &str = "/layer";
const BLOCKS: u64 = 1 << 20;

fn path() -> PathBuf {
    Path::new(DIR).join(MAP_FILE)
}

/// Any, also one that cannot be.
fn extent(start: u64, len: u32, state: BlockState) -> MapExtent {
    let mut out = Writer::with_capacity(MapExtent::LEN);
    out.u64(start);
    out.u32(len);
    out.u32(state.code());
    MapExtent::read(&mut Reader::new(&out.into_bytes())).unwrap()
}

struct Rig {
    disk: SimStorage,
    header: Header,
}

impl Rig {
    fn new() -> Self {
        let disk = SimStorage::new();
        let header = Header::new(None, BLOCKS * BLOCK_SIZE).unwrap();
        WritableLayer::create(&disk, Path::new(DIR), &header).unwrap();
        Rig { disk, header }
    }

    fn replace(&self, generation: u64, extents: &[MapExtent]) -> LogPlace {
        replace_map(
            &self.disk,
            Path::new(DIR),
            &self.header,
            generation,
            extents,
        )
        .unwrap()
    }

    fn add(&self, place: &LogPlace, generation: u64, changes: &[MapExtent]) -> LogPlace {
        let dir = Path::new(DIR);
        add_segment(&self.disk, dir, place, &self.header, generation, changes)
            .unwrap()
            .1
    }

    fn read(&self) -> Result<MapFile> {
        MapFile::read(&self.disk, Path::new(DIR), &self.header)
    }

    fn bytes(&self) -> Vec<u8> {
        self.disk.read_all(&path(), 1 << 30).unwrap()
    }

    fn put(&self, bytes: &[u8]) {
        let file = self.disk.open(&path(), OpenMode::Create).unwrap();
        file.set_len(0).unwrap();
        file.write_at(bytes, 0).unwrap();
    }

    /// A table and three segments; the last says nothing.
    fn three() -> Self {
        let rig = Rig::new();
        let data = BlockState::Data;
        let place = rig.replace(4, &[extent(3, 2, data), extent(9, 1, BlockState::Zero)]);
        let place = rig.add(&place, 5, &[extent(3, 1, BlockState::Parent)]);
        let many: Vec<_> = (0..600).map(|at| extent(100 + 2 * at, 1, data)).collect();
        let place = rig.add(&place, 7, &many);
        rig.add(&place, 8, &[]);
        rig
    }

    fn error(&self) -> String {
        self.read().unwrap_err().to_string()
    }
}

#[test]
fn segments_read_back_in_order_with_the_last_generation() {
    let rig = Rig::three();
    let map = rig.read().unwrap();
    assert_eq!((map.generation, map.torn), (8, false));
    assert_eq!(map.table.unwrap().extents().count(), 2);
    assert_eq!(map.changes.len(), 601);
    assert_eq!(map.changes[0], extent(3, 1, BlockState::Parent));
    let len = rig.bytes().len() as u64;
    // The table, 4 KiB for one change, 12 for six hundred, 4 for none.
    assert_eq!(len, 8192 + 4096 + 12288 + 4096);
    assert_eq!(
        map.place.map(|place| (place.end, place.sequence)),
        Some((len, 3))
    );
}

#[test]
fn a_table_that_an_older_build_wrote_is_read_and_not_added_to() {
    let rig = Rig::three();
    // As it was: version 1, nothing behind the extents.
    let mut bytes = rig.bytes();
    bytes.truncate(4096 + 2 * 24);
    bytes[8] = 1;
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    rig.put(&bytes);
    let map = rig.read().unwrap();
    assert_eq!((map.generation, map.torn, map.place), (4, false, None));
    assert_eq!(map.table.unwrap().extents().count(), 2);
    bytes.resize(8192 + 4096, 0);
    rig.put(&bytes);
    assert!(rig.error().contains("truncated or extended"));
}

#[test]
fn a_table_of_a_version_to_come_is_refused_by_its_number() {
    let rig = Rig::three();
    let mut bytes = rig.bytes();
    bytes[8] = 3;
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    rig.put(&bytes);
    let error = rig.read().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("map version 3"), "{error}");
}

#[test]
fn a_last_segment_cut_anywhere_is_torn_and_the_ones_before_it_hold() {
    let rig = Rig::three();
    let bytes = rig.bytes();
    let last = bytes.len() - 4096;
    for len in (last + 1..bytes.len()).step_by(97) {
        rig.put(&bytes[..len]);
        let map = rig.read().unwrap();
        // Behind its changes a segment is zeros, as a file reads beyond its end.
        assert!(map.torn && map.place.is_none(), "{len}");
        assert_eq!((map.generation, map.changes.len()), (7, 601), "{len}");
    }
    rig.put(&bytes[..last]);
    assert!(!rig.read().unwrap().torn);
    // Grown, and nothing of it written.
    let mut grown = bytes;
    grown.resize(grown.len() + 8192, 0);
    rig.put(&grown);
    let map = rig.read().unwrap();
    assert_eq!((map.generation, map.torn), (8, true));
}

#[test]
fn every_changed_byte_of_a_segment_before_the_last_is_damage() {
    let rig = Rig::three();
    let bytes = rig.bytes();
    for at in (8192..bytes.len() - 4096).step_by(31) {
        let mut bad = bytes.clone();
        bad[at] ^= 4;
        rig.put(&bad);
        let error = rig.error();
        assert!(error.contains("another one follows"), "{at}: {error}");
        assert!(error.contains("/layer/map"), "{error}");
    }
}

#[test]
fn more_than_one_segment_of_rubbish_at_the_end_is_damage() {
    let rig = Rig::three();
    let mut bytes = rig.bytes();
    let len = bytes.len() + MAX_SEGMENT as usize;
    bytes.resize(len, 7);
    rig.put(&bytes);
    assert!(rig.read().unwrap().torn);
    bytes.push(7);
    rig.put(&bytes);
    assert!(rig.error().contains("16777217 bytes follow"));
}

#[test]
fn segments_of_another_table_of_the_same_layer_do_not_count() {
    let rig = Rig::three();
    let old = rig.bytes();
    rig.replace(4, &[extent(50, 2, BlockState::Data)]);
    let mut bytes = rig.bytes();
    assert_eq!(bytes.len(), 8192);
    bytes.extend(&old[8192..]);
    rig.put(&bytes);
    let map = rig.read().unwrap();
    assert_eq!((map.generation, map.torn), (4, true));
    assert_eq!(map.changes, []);
}

#[test]
fn changes_that_cannot_be_are_refused() {
    let data = BlockState::Data;
    for changes in [
        vec![extent(9, 2, data), extent(3, 1, data)],
        vec![extent(3, 2, data), extent(4, 1, BlockState::Zero)],
        vec![extent(3, 0, data)],
        vec![extent(BLOCKS - 1, 2, data)],
        vec![extent(u64::MAX, 1, data)],
    ] {
        let rig = Rig::new();
        let place = rig.replace(1, &[]);
        rig.add(&place, 2, &changes);
        let error = rig.read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{changes:?}");
        assert!(error.to_string().contains("segment 0 says"), "{error}");
    }
}

/// What is torn was being written while the journal held what it was to say.
#[test]
fn a_torn_end_without_a_journal_is_damage_and_the_layer_is_refused() {
    let rig = Rig::three();
    let open = |rig: &Rig| {
        let storage: Arc<dyn Storage> = Arc::new(rig.disk.clone());
        WritableLayer::open(storage, Path::new(DIR), LayerOptions::default())
    };
    open(&rig).unwrap();
    let mut bytes = rig.bytes();
    *bytes.last_mut().unwrap() = 1;
    rig.put(&bytes);
    let error = open(&rig).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error.to_string().contains("unreadable, and the journal"),
        "{error}"
    );
}

#[test]
fn a_hole_of_a_gigabyte_behind_the_table_is_not_read() {
    let rig = Rig::three();
    let file = rig.disk.open(&path(), OpenMode::Write).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(rig.error().contains("bytes follow"));
}

proptest! {
    #[test]
    fn net_changes_come_to_the_same_as_all_in_order(
        changes in prop::collection::vec((0u64..300, 1u32..20, 0u32..3), 0..30),
    ) {
        let changes: Vec<_> = changes
            .into_iter()
            .map(|(start, len, code)| extent(start, len, BlockState::of_code(code).unwrap()))
            .collect();
        let apply = |changes: &[MapExtent]| {
            let mut blocks = vec![None; 400];
            for change in changes {
                for block in change.span().blocks() {
                    blocks[block.get() as usize] = Some(change.state());
                }
            }
            blocks
        };
        let net = net(changes.clone());
        prop_assert!(net.is_sorted_by(|a, b| a.span().end() <= b.start()));
        prop_assert_eq!(apply(&net), apply(&changes));
    }
}

/// The cost of the policy alone, counted: at each checkpoint so many changes, each of a block.
#[test]
fn what_is_added_and_replaced_stays_far_below_what_was_written() {
    let cost = |extents: u64, changes: u64, allocating: bool, checkpoints: u64| {
        let mut extents = extents;
        let mut place = LogPlace::behind(0, crate::layer::table::checkpoint_len(extents));
        let mut bytes = 0;
        for _ in 0..checkpoints {
            let said = if allocating { changes } else { 0 };
            extents += said;
            if place.has_room(said as usize, 256 << 10) {
                let len = segment_len(said as usize) as u64;
                bytes += len;
                place = place.next(len);
            } else {
                let len = crate::layer::table::checkpoint_len(extents);
                bytes += len;
                place = LogPlace::behind(0, len);
            }
        }
        bytes as f64 / (checkpoints * changes * BLOCK_SIZE) as f64
    };
    // An area of 8 MiB holds 1024 records of one block; until the table was replaced many times.
    for extents in [1000, 100_000, 2_000_000, 20_000_000] {
        for allocating in [false, true] {
            let ratio = cost(extents, 1024, allocating, 200_000);
            assert!(ratio < 0.03, "{extents} extents: {ratio}");
        }
    }
    // The smallest area, 256 KiB, before it grows: each segment is 4 KiB for 128 KiB written.
    assert!(cost(2_000_000, 32, true, 200_000) < 0.1);
}
