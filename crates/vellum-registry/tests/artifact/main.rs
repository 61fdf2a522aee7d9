//! The block artifact: what is written is read again, the bytes stay those of the first version, and what somebody
//! else wrote is refused in words.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod encrypted;

use std::path::Path;

use proptest::prelude::*;
use sha2::{Digest, Sha256};
use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, Block, BlockState, Blocks, Run, Span, WindowPower, push_run};
use vellum_registry::artifact::{
    ChunkReader, Encoded, HotFrame, HotPack, LayerEncoder, Table, power_for,
};

const SIZE: u64 = 1 << 30;
const DIGEST: [u8; 32] = [7; 32];

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

/// Bytes that tell blocks apart, some of which compress well and some not at all.
fn bytes(span: Span) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in span.blocks() {
        let number = block.get();
        match number % 3 {
            0 => bytes.extend(vec![number as u8; BLOCK_LEN]),
            _ => {
                let mut hash = Sha256::digest(number.to_le_bytes());
                for _ in 0..BLOCK_LEN / 32 {
                    bytes.extend_from_slice(&hash);
                    hash = Sha256::digest(hash);
                }
            }
        }
    }
    bytes
}

fn encode(power: WindowPower, runs: &[Run<BlockState>]) -> Encoded<Vec<u8>> {
    let mut encoder = LayerEncoder::new(Vec::new(), power, 3).unwrap();
    for run in runs {
        match run.value {
            BlockState::Data => encoder.data(run.start(), &bytes(run.span)).unwrap(),
            _ => encoder.zero(run.span),
        }
    }
    encoder.finish(SIZE, DIGEST).unwrap()
}

/// The data blocks that a table and a data blob give, in order.
fn decode(table: &Table, data: &[u8]) -> Vec<(Span, Vec<u8>)> {
    let mut reader = ChunkReader::new().unwrap();
    let mut found = Vec::new();
    for window in table.windows() {
        let (at, len) = (window.chunk.offset as usize, window.chunk.len as usize);
        let blocks = reader.blocks(&window, &data[at..at + len]).unwrap();
        found.extend(blocks.map(|(span, bytes)| (span, bytes.to_vec())));
    }
    found
}

fn some_runs() -> Vec<Run<BlockState>> {
    let (data, zero) = (BlockState::Data, BlockState::Zero);
    vec![
        Run::new(span(0, 1), data),
        Run::new(span(3, 70), data),
        Run::new(span(73, 5), zero),
        Run::new(span(100, 1), data),
        Run::new(span(102, 2), data),
        Run::new(span(5000, 1000), zero),
        Run::new(span((1 << 18) - 1, 1), data),
    ]
}

/// Changes bytes, and makes the CRCs fit again.
fn with_field(bytes: &[u8], at: usize, field: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + field.len()].copy_from_slice(field);
    let body = crc32fast::hash(&bytes[256..]);
    bytes[248..252].copy_from_slice(&body.to_le_bytes());
    let header = crc32fast::hash(&bytes[..252]);
    bytes[252..256].copy_from_slice(&header.to_le_bytes());
    bytes
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(
        power in 16_u32..=20,
        parts in prop::collection::vec((0_u64..60, 1_u64..90, any::<bool>()), 0..20),
    ) {
        let mut runs = Vec::new();
        let mut at = 0;
        for (gap, len, is_data) in parts {
            let state = if is_data { BlockState::Data } else { BlockState::Zero };
            runs.push(Run::new(span(at + gap, len), state));
            at += gap + len;
        }
        let written = encode(WindowPower::new(power).unwrap(), &runs);
        prop_assert_eq!(written.sha256, <[u8; 32]>::from(Sha256::digest(&written.out)));
        let table = Table::decode(&written.table.encode().unwrap()).unwrap();
        prop_assert_eq!(&table, &written.table);
        let mut merged = Vec::new();
        runs.iter().for_each(|run| push_run(&mut merged, *run));
        prop_assert_eq!(&table.extents, &merged);
        let mut found = Vec::new();
        for (span, read) in decode(&table, &written.out) {
            prop_assert_eq!(read, bytes(span));
            push_run(&mut found, Run::new(span, BlockState::Data));
        }
        merged.retain(|run| run.value == BlockState::Data);
        prop_assert_eq!(found, merged);
    }

    #[test]
    fn damaged_tables_are_refused_and_never_panic(at in 0_usize..600, value in any::<u8>(), fix in any::<bool>()) {
        let good = encode(WindowPower::USUAL, &some_runs()).table.encode().unwrap();
        let at = at % good.len();
        let bad = match fix {
            true => with_field(&good, at, &[value]),
            false => {
                let mut bad = good.clone();
                bad[at] = value;
                bad
            }
        };
        if let Err(error) = Table::decode(&bad) {
            prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported));
        } else if !fix {
            prop_assert_eq!(bad, good);
        }
    }
}

#[test]
fn the_bytes_of_the_first_version_are_read_and_written_for_ever() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let (data, zero) = (BlockState::Data, BlockState::Zero);
    let few = [
        Run::new(span(0, 1), data),
        Run::new(span(2, 1), data),
        Run::new(span(3, 70), zero),
        Run::new(span(100, 1), data),
    ];
    let written = encode(WindowPower::USUAL, &few);
    let (table, data) = (fixtures.join("layer.table"), fixtures.join("layer.data"));
    if std::env::var_os("VELLUM_WRITE_FIXTURES").is_some() {
        std::fs::create_dir_all(&fixtures).unwrap();
        std::fs::write(&table, written.table.encode().unwrap()).unwrap();
        std::fs::write(&data, &written.out).unwrap();
    }
    let (table, data) = (std::fs::read(table).unwrap(), std::fs::read(data).unwrap());
    let decoded = Table::decode(&table).unwrap();
    assert_eq!(decoded.encode().unwrap(), table);
    assert_eq!(decoded.extents, written.table.extents);
    assert_eq!((decoded.virtual_size, decoded.digest), (SIZE, DIGEST));
    let blocks = decode(&decoded, &data);
    assert_eq!(decoded.data_blocks(), Blocks::new(3));
    for (span, read) in blocks {
        assert_eq!(read, bytes(span), "{span}");
    }
}

#[test]
fn each_field_of_a_header_is_looked_at() {
    let good = encode(WindowPower::USUAL, &some_runs())
        .table
        .encode()
        .unwrap();
    for (at, field, says) in [
        (0, &b"VELLUMMP"[..], "wrong magic"),
        (8, &[2], "version 2"),
        (12, &[0, 2], "blocks of 512"),
        (16, &[2], "feature bit(s) 1"),
        (32, &[1], "a layer of"),
        (40, &[15], "to the power of 15"),
        (40, &[21], "to the power of 21"),
        (48, &[255; 8], "extents"),
        (56, &[255; 8], "chunks"),
        (64, &[255; 7], "the chunks end at"),
        (256, &[4], "does not fit"),
    ] {
        let error = Table::decode(&with_field(&good, at, field)).unwrap_err();
        assert!(error.to_string().contains(says), "{at}: {error}");
    }
    for len in 0..good.len() {
        Table::decode(&good[..len]).unwrap_err();
    }
}

#[test]
fn a_chunk_is_checked_before_it_is_decoded() {
    let written = encode(WindowPower::USUAL, &some_runs());
    let window = written.table.windows().next().unwrap();
    let stored = &written.out[..window.chunk.len as usize];
    let mut reader = ChunkReader::new().unwrap();
    let mut refused = |stored: &[u8], says: &str| {
        let error = reader.blocks(&window, stored).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(says), "{error}");
    };
    refused(&stored[1..], "is cut off");
    let mut flipped = stored.to_vec();
    flipped[stored.len() / 2] ^= 1;
    refused(&flipped, "SHA-256");
}

#[test]
fn a_frame_of_another_length_than_the_extents_say_is_refused() {
    let written = encode(WindowPower::USUAL, &some_runs());
    let mut window = written.table.windows().next().unwrap();
    let mut reader = ChunkReader::new().unwrap();
    for plain in [0, window.plain_len() - 1, window.plain_len() + 1, 1 << 24] {
        let stored = zstd::bulk::compress(&vec![1; plain], 3).unwrap();
        window.chunk.len = stored.len() as u32;
        window.chunk.sha256 = Sha256::digest(&stored).into();
        let error = reader.blocks(&window, &stored).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{plain}: {error}");
    }
}

#[test]
fn an_extent_longer_than_a_length_has_bits_for_is_written_in_pieces() {
    let size = 64 << 40;
    let mut encoder = LayerEncoder::new(Vec::new(), WindowPower::USUAL, 3).unwrap();
    encoder.zero(span(0, size / 4096));
    let written = encoder.finish(size, DIGEST).unwrap();
    assert!(written.out.is_empty());
    let table = Table::decode(&written.table.encode().unwrap()).unwrap();
    assert_eq!(table, written.table);
}

#[test]
fn larger_layers_have_larger_chunks_so_that_their_tables_stay_short() {
    let power = |gib: u64| power_for(Blocks::to_hold(gib << 30));
    assert_eq!(power(0), WindowPower::USUAL);
    assert_eq!(power(10), WindowPower::USUAL);
    assert!(power(1000) > WindowPower::USUAL);
    assert_eq!(power(64 << 10), WindowPower::new(20).unwrap());
}

fn pack(frames: &[(u32, u32, u32)]) -> HotPack {
    let frame = |&(layer, window, len): &(u32, u32, u32)| HotFrame { layer, window, len };
    HotPack {
        layers: 4,
        frames: frames.iter().map(frame).collect(),
    }
}

/// Header and list, and the length that the whole pack has.
fn front(pack: &HotPack) -> (Vec<u8>, u64) {
    let front = pack.encode();
    let stored: u64 = pack.frames.iter().map(|frame| u64::from(frame.len)).sum();
    let len = front.len() as u64 + stored;
    (front, len)
}

/// Changes bytes of a hot pack's front, and makes the CRCs fit again.
fn with_hot_field(front: &[u8], at: usize, field: &[u8]) -> Vec<u8> {
    let mut front = front.to_vec();
    front[at..at + field.len()].copy_from_slice(field);
    let list = crc32fast::hash(&front[128..]);
    front[120..124].copy_from_slice(&list.to_le_bytes());
    let header = crc32fast::hash(&front[..124]);
    front[124..128].copy_from_slice(&header.to_le_bytes());
    front
}

proptest! {
    #[test]
    fn a_hot_pack_that_is_written_is_read_again(
        wanted in prop::collection::btree_map((0_u32..4, any::<u32>()), 1_u32..=(1 << 20) + 1024, 0..40),
    ) {
        let frames: Vec<_> = wanted.iter().map(|((layer, window), len)| (*layer, *window, *len)).collect();
        let pack = pack(&frames);
        let (front, len) = front(&pack);
        prop_assert_eq!(HotPack::front_len(&front[..128], len).unwrap(), front.len());
        prop_assert_eq!(&HotPack::decode(&front, len).unwrap(), &pack);
        let mut at = front.len() as u64;
        for (offset, frame) in pack.placed() {
            prop_assert_eq!(offset, at);
            at += u64::from(frame.len);
        }
        prop_assert_eq!(at, len);
    }

    #[test]
    fn damaged_hot_packs_are_refused_and_never_panic(at in 0_usize..176, value in any::<u8>(), fix in any::<bool>()) {
        let (good, len) = front(&pack(&[(0, 7, 9), (3, 1, 1 << 20), (0, 0, 4)]));
        let bad = match fix {
            true if !(120..128).contains(&at) => with_hot_field(&good, at, &[value]),
            _ => {
                let mut bad = good.clone();
                bad[at] = value;
                bad
            }
        };
        match HotPack::decode(&bad, len) {
            Err(error) => prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported)),
            Ok(_) if !fix => prop_assert_eq!(bad, good),
            Ok(_) => {}
        }
    }
}

#[test]
fn the_bytes_of_the_first_hot_pack_are_read_and_written_for_ever() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hot.pack");
    let pack = pack(&[(1, 0, 3), (0, 8191, 2), (1, 2, 1)]);
    let mut bytes = pack.encode();
    bytes.extend_from_slice(b"abcdef");
    if std::env::var_os("VELLUM_WRITE_FIXTURES").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let found = std::fs::read(path).unwrap();
    assert_eq!(found, bytes);
    let len = found.len() as u64;
    let front = HotPack::front_len(&found[..128], len).unwrap();
    assert_eq!(HotPack::decode(&found[..front], len).unwrap(), pack);
    let frames: Vec<&[u8]> = pack
        .placed()
        .map(|(at, frame)| &found[at as usize..][..frame.len as usize])
        .collect();
    assert_eq!(frames, [&b"abc"[..], b"de", b"f"]);
}

#[test]
fn each_field_of_a_hot_pack_is_looked_at() {
    let (good, len) = front(&pack(&[(0, 7, 9), (3, 1, 50)]));
    for (at, field, says) in [
        (0, &b"VELLUMTB"[..], "wrong magic"),
        (8, &[2], "version 2"),
        (16, &[1], "features 0x1"),
        (32, &[0], "of 0 layers"),
        (32, &[0, 32], "of 8192 layers"),
        (32, &[3], "of the layer 3 does not fit"),
        (36, &[3], "with 3 frames"),
        (36, &[255; 4], "with 4294967295 frames"),
        (40, &[255; 8], "a hot pack of"),
        (40, &[1], "a hot pack of"),
        (128 + 8, &[0], "of 0 bytes"),
        (128 + 8, &[10], "together"),
        (128 + 8, &[255; 4], "does not fit"),
        // The second frame is that of the first.
        (128 + 16, &[0, 0, 0, 0, 7], "does not fit"),
    ] {
        let error = HotPack::decode(&with_hot_field(&good, at, field), len).unwrap_err();
        assert!(error.to_string().contains(says), "{at}: {error}");
    }
    for short in 0..good.len() {
        HotPack::decode(&good[..short], len).unwrap_err();
    }
    HotPack::decode(&good, len - 1).unwrap_err();
}
