//! Layer files: whatever is written reads back; whatever is changed, cut off or put in another order is refused;
//! the bytes of version 1 stay as they are.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

use std::path::Path;

use vellum_backup::{LAYER_HEADER_LEN, LayerEntry, LayerPart, LayerReader, LayerWriter};
use vellum_base::block::{BLOCK_SIZE, Block, BlockState, Blocks, Run, Span};
use vellum_base::{ErrorKind, Result};

const DESCRIPTION: &[u8] = br#"{"name":"web"}"#;
const FRONT: usize = 64 + DESCRIPTION.len();

fn entry(number: u8, blocks: u64, left_out: bool) -> LayerEntry {
    LayerEntry {
        digest: [number; 32],
        virtual_size: blocks * BLOCK_SIZE,
        left_out,
        header: [number ^ 0xff; LAYER_HEADER_LEN],
        info: format!(r#"{{"origin":"layer {number}"}}"#).into_bytes(),
    }
}

fn run(start: u64, len: u64, value: BlockState) -> Run<BlockState> {
    Run::new(Span::new(Block::new(start), Blocks::new(len)), value)
}

/// A layer that is left out, one with data and zeros, an empty one, and a larger one.
fn small() -> Vec<(LayerEntry, Vec<Run<BlockState>>)> {
    vec![
        (entry(1, 10, true), Vec::new()),
        (
            entry(2, 10, false),
            vec![
                run(1, 3, BlockState::Data),
                run(4, 2, BlockState::Zero),
                run(9, 1, BlockState::Data),
            ],
        ),
        (entry(3, 10, false), Vec::new()),
        (
            entry(4, 1 << 34, false),
            vec![
                run(0, 1, BlockState::Data),
                run(1, (1 << 34) - 1, BlockState::Zero),
            ],
        ),
    ]
}

fn written(layers: &[(LayerEntry, Vec<Run<BlockState>>)]) -> Vec<u8> {
    let mut writer = LayerWriter::new(Vec::new(), layers.len(), DESCRIPTION).unwrap();
    for (entry, runs) in layers {
        writer.layer(entry).unwrap();
        for run in runs {
            match run.value {
                BlockState::Data => {
                    let bytes = vec![entry.digest[0]; run.len().buffer_len()];
                    writer.data(run.start(), &bytes).unwrap();
                }
                _ => writer.zero(run.span).unwrap(),
            }
        }
    }
    writer.finish().unwrap().1
}

fn read(bytes: &[u8]) -> Result<Vec<(LayerEntry, Vec<Run<BlockState>>)>> {
    let mut reader = LayerReader::new(bytes)?;
    let mut layers: Vec<(LayerEntry, Vec<_>)> = Vec::new();
    while let Some(part) = reader.next_part()? {
        match part {
            LayerPart::Layer(entry) => layers.push((*entry, Vec::new())),
            LayerPart::Chunk(chunk) => {
                let (entry, runs) = layers.last_mut().unwrap();
                for (run, bytes) in chunk.pieces() {
                    assert!(bytes.iter().all(|byte| *byte == entry.digest[0]));
                    vellum_base::block::push_run(runs, run);
                }
            }
        }
    }
    Ok(layers)
}

/// The records behind header and description.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = &bytes[FRONT..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let len = 32 + u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        records.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    records
}

#[test]
fn layers_read_back_as_they_were_written() {
    assert_eq!(read(&written(&small())).unwrap(), small());
    let long = vec![(entry(7, 4000, false), vec![run(5, 3000, BlockState::Data)])];
    assert_eq!(read(&written(&long)).unwrap(), long);
}

#[test]
fn every_truncation_and_every_changed_byte_is_refused() {
    let bytes = written(&small());
    for len in 0..bytes.len() {
        let error = read(&bytes[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len}: {error}");
    }
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let error = read(&bad).expect_err(&format!("byte {at}"));
        let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported];
        assert!(kinds.contains(&error.kind()), "{at}: {error}");
    }
    let error = read(&[&bytes[..], &[0]].concat()).unwrap_err();
    assert!(error.to_string().contains("something follows"), "{error}");
}

/// Puts records together with the right numbers and CRCs, as another implementation would.
fn with_records(count: u32, mut records: Vec<Vec<u8>>) -> Vec<u8> {
    let mut bytes = written(&small())[..FRONT].to_vec();
    bytes[32..36].copy_from_slice(&count.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    for (number, record) in records.iter_mut().enumerate() {
        record[16..24].copy_from_slice(&(number as u64).to_le_bytes());
        let crc = crc32fast::hash(&record[32..]);
        record[24..28].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&record[..28]);
        record[28..32].copy_from_slice(&crc.to_le_bytes());
    }
    bytes.extend(records.concat());
    bytes
}

#[test]
fn records_of_no_layer_of_too_many_layers_and_with_unknown_flags_are_refused() {
    type Case = (u32, fn(&mut Vec<Vec<u8>>), ErrorKind, &'static str);
    // 0: left out; 1, 2: a layer and its chunk; 3: empty; 4, 5: a layer and its chunk; 6: the end.
    let cases: [Case; 6] = [
        (
            4,
            |r| r.swap(0, 2),
            ErrorKind::Corrupt,
            "an extent of 3 blocks",
        ),
        (4, |r| r.swap(1, 2), ErrorKind::Corrupt, "left out"),
        (3, |_| {}, ErrorKind::Corrupt, "more layers than the 3"),
        (
            4,
            |r| r[1][32 + 40] = 2,
            ErrorKind::Unsupported,
            "the flags 0x2",
        ),
        (
            4,
            |r| r[1][32 + 33] = 1,
            ErrorKind::Corrupt,
            "a layer of 256 bytes",
        ),
        (
            4,
            // Its chunk lies beyond its end then.
            |r| r[1][32 + 32..][..8].copy_from_slice(&4096u64.to_le_bytes()),
            ErrorKind::Corrupt,
            "an extent of",
        ),
    ];
    for (count, change, kind, text) in cases {
        let mut records = records(&written(&small()));
        change(&mut records);
        let error = read(&with_records(count, records)).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.kind(), kind, "{error}");
    }
    let whole = written(&small());
    assert!(with_records(4, records(&whole)) == whole);
}

#[test]
fn foreign_files_other_versions_and_unknown_features_are_refused_by_name() {
    type Case = (fn(&mut [u8]), ErrorKind, &'static str);
    let cases: [Case; 6] = [
        (|b| b[0] = b'X', ErrorKind::Unsupported, "wrong magic"),
        (|b| b[8] = 9, ErrorKind::Unsupported, "version 9"),
        (|b| b[16] = 0b1010, ErrorKind::Unsupported, "bit(s) 1, 3"),
        (|b| b[15] = 1, ErrorKind::Corrupt, "a description of"),
        (|b| b[34] = 1, ErrorKind::Corrupt, "65540 layers"),
        (|b| b[37] = 1, ErrorKind::Corrupt, "block size"),
    ];
    for (change, kind, text) in cases {
        let mut bytes = written(&small());
        change(&mut bytes);
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        let error = read(&bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn what_a_layer_file_has_no_room_for_is_not_written() {
    for layers in [0, 4097] {
        let error = LayerWriter::new(Vec::new(), layers, b"").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    let mut writer = LayerWriter::new(Vec::new(), 1, b"").unwrap();
    let too_long = LayerEntry {
        info: vec![b' '; 64 << 10],
        ..entry(1, 10, false)
    };
    let error = writer.layer(&too_long).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

/// Written by a build of November 2026. It is never written anew: a build that does not read it, or that
/// writes other bytes around what zstd makes, has changed the format, which takes a feature bit or a version.
#[test]
fn the_golden_layer_file_of_version_1_reads_as_it_did() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layers-v1.vl");
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let now = written(&small());
    assert_eq!(golden[..FRONT], now[..FRONT]);
    let (old, new) = (records(&golden), records(&now));
    assert_eq!(old.len(), 7);
    for (old, new) in old.iter().zip(&new) {
        match old[0] {
            // Kind, lengths but that of the payload, number; extents.
            1 => {
                let table = 32 + 16 * usize::from(old[4]);
                assert_eq!(old[..8], new[..8]);
                assert_eq!(old[12..24], new[12..24]);
                assert_eq!(old[32..table], new[32..table]);
            }
            2 => assert_eq!(old[32..64], new[32..64], "the counts of the end"),
            _ => assert_eq!(old, new),
        }
    }
    assert_eq!(read(&golden).unwrap(), small());
    assert_eq!(
        LayerReader::new(&golden[..]).unwrap().description(),
        DESCRIPTION
    );
}
