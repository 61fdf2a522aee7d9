//! The format held against a model: whatever is written reads back, also after an interruption; whatever is
//! changed or cut off is refused; the bytes of version 1 stay as they are.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

use std::path::Path;

use proptest::prelude::*;
use uuid::Uuid;
use vellum_backup::{Header, MAX_DESCRIPTION, Reader, Totals, Writer, ends_before_chunks};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, BlockState, Blocks, Run, Span};
use vellum_base::{ErrorKind, Result};

const DESCRIPTION: &[u8] = br#"{"container":"db"}"#;

fn header(blocks: u64) -> Header {
    Header {
        backup: Uuid::from_u128(1),
        container: Uuid::from_u128(2),
        state: Uuid::from_u128(3),
        base: Some(Uuid::from_u128(4)),
        virtual_size: blocks * BLOCK_SIZE,
        device_size: blocks * BLOCK_SIZE - 512,
        created: 1_795_000_000,
    }
}

/// What is written: extents, each block of data with a number of its own.
type Extents = Vec<Run<BlockState>>;

fn content(span: Span) -> Vec<u8> {
    let block = |block: Block| {
        let mut bytes = vec![0x5a; BLOCK_LEN];
        bytes[..8].copy_from_slice(&block.get().to_le_bytes());
        bytes
    };
    span.blocks().flat_map(block).collect()
}

fn put<W: std::io::Write>(writer: &mut Writer<W>, extents: &Extents) {
    let from = writer.at();
    for run in extents.iter().filter(|run| run.end() > from) {
        let span = run.span.from(run.start().max(from));
        match run.value {
            BlockState::Data => writer.data(span.start(), &content(span)).unwrap(),
            _ => writer.zero(span).unwrap(),
        }
    }
}

fn written(extents: &Extents) -> Vec<u8> {
    let end = extents.last().map_or(1, |run| run.end().get());
    let mut writer = Writer::new(Vec::new(), &header(end), DESCRIPTION).unwrap();
    put(&mut writer, extents);
    writer.finish().unwrap().1
}

/// Reads to the end, and checks what the data blocks hold. Neighbours of one state are one extent.
fn read(bytes: &[u8]) -> Result<(Extents, Totals)> {
    let mut reader = Reader::new(bytes)?;
    let mut extents = Vec::new();
    while let Some(chunk) = reader.chunk()? {
        for (run, bytes) in chunk.pieces() {
            let expected = match run.value {
                BlockState::Data => content(run.span),
                _ => Vec::new(),
            };
            assert!(bytes == expected, "{run:?}");
            vellum_base::block::push_run(&mut extents, run);
        }
    }
    assert!(reader.chunk().unwrap().is_none(), "the end stays the end");
    Ok((extents, reader.totals()))
}

/// Gaps, lengths and kinds.
fn extents() -> impl Strategy<Value = Extents> {
    let extent = (0u64..3, 1u64..600, any::<bool>());
    prop::collection::vec(extent, 0..12).prop_map(|list| {
        let mut at = Block::FIRST;
        let mut extents = Vec::new();
        for (gap, len, zero) in list {
            let span = Span::new(at + Blocks::new(gap), Blocks::new(len));
            at = span.end();
            let state = match zero {
                true => BlockState::Zero,
                false => BlockState::Data,
            };
            vellum_base::block::push_run(&mut extents, Run::new(span, state));
        }
        extents
    })
}

#[test]
fn what_ends_before_the_first_chunk_holds_nothing_and_is_told_from_all_else() {
    let bytes = written(&vec![Run::new(
        Span::new(Block::FIRST, Blocks::new(3)),
        BlockState::Data,
    )]);
    let before = 256 + DESCRIPTION.len();
    for len in 0..before + 100 {
        let ends = ends_before_chunks(&bytes[..len]).unwrap();
        assert_eq!(ends, len < before, "{len} bytes");
    }
    assert!(!ends_before_chunks(&b"my precious notes\n"[..]).unwrap());
    assert!(!ends_before_chunks(&[0; 20][..]).unwrap());
    let mut damaged = bytes[..before - 1].to_vec();
    damaged[40] ^= 1;
    assert!(!ends_before_chunks(&damaged[..]).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_written_reads_back(extents in extents()) {
        let (found, totals) = read(&written(&extents)).unwrap();
        prop_assert_eq!(&found, &extents);
        let of = |state| extents.iter().filter(move |run| run.value == state).map(Run::len).sum::<Blocks>();
        prop_assert_eq!((totals.data, totals.zero), (of(BlockState::Data), of(BlockState::Zero)));
    }

    #[test]
    fn a_backup_that_was_cut_off_anywhere_goes_on_and_becomes_what_it_would_have_been(
        extents in extents(),
        cut in any::<prop::sample::Index>(),
        torn in any::<bool>(),
    ) {
        let whole = written(&extents);
        let front = 256 + DESCRIPTION.len();
        let mut cut_off = whole[..front + cut.index(whole.len() - front + 1)].to_vec();
        if torn && cut_off.len() > front {
            // As a power cut leaves it.
            let from = cut_off.len() - (cut_off.len() - front).min(700);
            cut_off[from..].fill(0);
        }
        let mut reader = Reader::new(&cut_off[..]).unwrap();
        let failed = loop {
            match reader.chunk() {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        let Some(error) = failed else {
            prop_assert!(cut_off == whole);
            return Ok(());
        };
        prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
        let resume = reader.into_resume();
        cut_off.truncate(resume.len as usize);
        let mut writer = Writer::resume(cut_off, resume).unwrap();
        put(&mut writer, &extents);
        let (_, resumed) = writer.finish().unwrap();
        prop_assert_eq!(&read(&resumed).unwrap().0, &extents);
    }
}

/// A backup with each kind of record, in a few hundred bytes.
fn small() -> Vec<u8> {
    let run = |start, len, state| Run::new(Span::new(Block::new(start), Blocks::new(len)), state);
    written(&vec![
        run(1, 3, BlockState::Data),
        run(4, 2, BlockState::Zero),
        run(9, 1, BlockState::Data),
    ])
}

#[test]
fn every_truncation_is_refused_and_so_is_what_follows_the_end() {
    let bytes = small();
    for len in 0..bytes.len() {
        let error = read(&bytes[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len}: {error}");
    }
    let error = read(&[&bytes[..], &[0]].concat()).unwrap_err();
    assert!(error.to_string().contains("something follows"), "{error}");
}

#[test]
fn every_changed_bit_is_refused() {
    let bytes = small();
    for at in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[at / 8] ^= 1 << (at % 8);
        read(&bad).expect_err(&format!("bit {at}"));
    }
}

/// The records of a backup, after the header and the description.
fn records(bytes: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (front, mut rest) = bytes.split_at(256 + DESCRIPTION.len());
    let mut records = Vec::new();
    while !rest.is_empty() {
        let len = 32 + u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        records.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    (front.to_vec(), records)
}

#[test]
fn records_that_are_lost_doubled_exchanged_or_of_another_backup_are_refused() {
    let long = |value: u8| {
        let mut writer = Writer::new(Vec::new(), &header(2000), DESCRIPTION).unwrap();
        let data = vec![value; 1500 * BLOCK_LEN];
        writer.data(Block::FIRST, &data).unwrap();
        writer.finish().unwrap().1
    };
    let (front, own) = records(&long(1));
    let (_, foreign) = records(&long(2));
    assert!(own.len() > 5);
    let mut lost = own.clone();
    lost.remove(2);
    let mut doubled = own.clone();
    doubled.insert(2, own[2].clone());
    let mut exchanged = own.clone();
    exchanged.swap(1, 2);
    let mut other = own.clone();
    other[3] = foreign[3].clone();
    for (what, records) in [
        ("lost", lost),
        ("doubled", doubled),
        ("exchanged", exchanged),
        ("other", other),
    ] {
        let bytes = [front.clone(), records.concat()].concat();
        let mut reader = Reader::new(&bytes[..]).unwrap();
        let error = loop {
            match reader.chunk() {
                Ok(chunk) => assert!(chunk.is_some(), "{what}: it was taken"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    }
}

/// Puts the right CRC behind a changed header, as another implementation would.
fn with_header(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = small();
    change(&mut bytes);
    let crc = crc32(&bytes[..252]);
    bytes[252..256].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Bit by bit, not the crate that is tested.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| {
        if crc & 1 == 1 {
            crc >> 1 ^ 0xedb8_8320
        } else {
            crc >> 1
        }
    };
    !bytes
        .iter()
        .fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[test]
fn foreign_files_other_versions_and_unknown_features_are_refused_by_name() {
    type Case = (fn(&mut [u8]), ErrorKind, &'static str);
    let cases: [Case; 8] = [
        (|b| b[0] = b'X', ErrorKind::Unsupported, "wrong magic"),
        (|b| b[8] = 9, ErrorKind::Unsupported, "version 9"),
        (|b| b[16] = 0b1010, ErrorKind::Unsupported, "bit(s) 1, 3"),
        (
            |b| b[64..80].fill(0),
            ErrorKind::Corrupt,
            "impossible state",
        ),
        (|b| b[96] = 1, ErrorKind::Corrupt, "in layers of"),
        (
            |b| b[104..112].fill(0),
            ErrorKind::Corrupt,
            "a device of 0 bytes",
        ),
        (|b| b[113] = 1, ErrorKind::Corrupt, "block size"),
        (|b| b[15] = 1, ErrorKind::Corrupt, "a description of"),
    ];
    for (change, kind, text) in cases {
        let error = read(&with_header(change)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    // Compatible features are ignored; that the digest is another then has nothing to do with it.
    Reader::new(&with_header(|b| b[24] = 0xff)[..]).unwrap();
}

#[test]
fn what_cannot_be_said_in_a_header_is_not_begun() {
    let too_long = vec![b' '; MAX_DESCRIPTION + 1];
    let refused = [
        Writer::new(Vec::new(), &header(10), &too_long),
        Writer::new(
            Vec::new(),
            &Header {
                device_size: 4096,
                ..header(10)
            },
            b"",
        ),
        Writer::new(
            Vec::new(),
            &Header {
                virtual_size: 0,
                device_size: 0,
                ..header(10)
            },
            b"",
        ),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

/// A whole device of zeros, and more small extents than one chunk takes.
#[test]
fn terabytes_of_zeros_are_one_extent_and_many_small_extents_several_chunks() {
    let mut writer = Writer::new(Vec::new(), &header(1 << 34), DESCRIPTION).unwrap();
    writer.zero(Span::up_to(Blocks::new(1 << 34))).unwrap();
    let (totals, bytes) = writer.finish().unwrap();
    assert!(bytes.len() < 600 && totals.zero == Blocks::new(1 << 34));
    assert_eq!(read(&bytes).unwrap().0.len(), 1);
    let mut writer = Writer::new(Vec::new(), &header(20_000), DESCRIPTION).unwrap();
    for block in 0..10_000 {
        writer.zero(Span::of(Block::new(2 * block))).unwrap();
    }
    let (totals, bytes) = writer.finish().unwrap();
    assert_eq!(totals.chunks, 3);
    assert_eq!(read(&bytes).unwrap().0.len(), 10_000);
}

/// Written by a build of November 2026. It is never written anew: a build that does not read it, or that
/// writes another header, has changed the format, which takes a feature bit or a version.
#[test]
fn the_golden_backup_of_version_1_reads_as_it_did() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-v1.vb");
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (front, own) = records(&golden);
    let written = small();
    let (front_now, records_now) = records(&written);
    assert!(
        front == front_now,
        "the header or the description is another"
    );
    assert_eq!(own.len(), 2);
    // What zstd makes of the data may differ from version to version; all else may not.
    assert_eq!(own[0][..8], records_now[0][..8]);
    assert_eq!(own[0][12..24], records_now[0][12..24]);
    assert_eq!(own[0][32..32 + 48], records_now[0][32..32 + 48]);
    assert_eq!(
        own[1][32..64],
        records_now[1][32..64],
        "the counts of the end"
    );
    assert_eq!(own[1].len(), 96);
    assert_eq!(read(&golden).unwrap(), read(&written).unwrap());
    let reader = Reader::new(&golden[..]).unwrap();
    assert_eq!(reader.header(), &header(10));
    assert_eq!(reader.description(), DESCRIPTION);
}
