use super::*;

const UUID: Uuid = Uuid::from_u128(7);

fn expected(kind: TableKind) -> Expected {
    Expected {
        kind,
        uuid: UUID,
        virtual_size: 1 << 30,
    }
}

fn extent(start: u64, len: u32, state: BlockState) -> MapExtent {
    MapExtent {
        start: Block::new(start),
        len,
        state,
    }
}

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

fn seal() -> Vec<u8> {
    TableContent {
        kind: TableKind::Seal,
        uuid: UUID,
        generation: 0,
        virtual_size: 1 << 30,
        extents: &[
            extent(3, 2, BlockState::Data),
            extent(5, 9, BlockState::Zero),
            extent(100, 1, BlockState::Data),
        ],
        sums: &[11, 22, 33],
        digest: [9; 32],
    }
    .encode()
}

fn decode(bytes: Vec<u8>, kind: TableKind) -> Result<Table> {
    Table::decode(Mapping::Owned(bytes), expected(kind))
}

#[test]
fn a_seal_reads_back_with_each_block_s_checksum() {
    let table = decode(seal(), TableKind::Seal).unwrap();
    assert_eq!(table.extents().count(), 3);
    assert_eq!(
        table.sums(span(3, 2)).unwrap().collect::<Vec<_>>(),
        [11, 22]
    );
    assert_eq!(table.sums(span(4, 1)).unwrap().collect::<Vec<_>>(), [22]);
    assert_eq!(table.sums(span(100, 1)).unwrap().collect::<Vec<_>>(), [33]);
    table.check_sums_crc().unwrap();
}

#[test]
fn a_checksum_that_the_table_lacks_is_corrupt_and_not_zero() {
    let table = decode(seal(), TableKind::Seal).unwrap();
    for (block, len) in [(0, 1), (3, 3), (5, 1), (99, 1), (100, 2), (1000, 1)] {
        assert_eq!(
            table.sums(span(block, len)).err().unwrap().kind(),
            ErrorKind::Corrupt
        );
    }
}

#[test]
fn every_single_changed_byte_is_found() {
    let good = seal();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let found = decode(bad, TableKind::Seal).and_then(|table| table.check_sums_crc());
        // Padding between extents and checksums carries nothing.
        let padding = (4096 + 3 * 24..8192).contains(&at);
        assert_eq!(found.is_err(), !padding, "byte {at}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let good = seal();
    for len in (0..good.len()).step_by(7) {
        decode(good[..len].to_vec(), TableKind::Seal).unwrap_err();
    }
}

#[test]
fn a_table_of_another_layer_kind_or_size_is_refused() {
    decode(seal(), TableKind::Checkpoint).unwrap_err();
    for expected in [
        Expected {
            uuid: Uuid::from_u128(8),
            ..expected(TableKind::Seal)
        },
        Expected {
            virtual_size: 1 << 31,
            ..expected(TableKind::Seal)
        },
    ] {
        let error = Table::decode(Mapping::Owned(seal()), expected).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn overlapping_unsorted_empty_and_outlying_extents_are_refused() {
    let data = BlockState::Data;
    let blocks = (1u64 << 30) / 4096;
    for extents in [
        vec![(3, 2), (4, 1)],
        vec![(9, 2), (3, 1)],
        vec![(3, 0)],
        vec![(blocks - 1, 2)],
        vec![(u64::MAX, 1)],
    ] {
        let extents: Vec<_> = extents
            .iter()
            .map(|&(start, len)| extent(start, len, data))
            .collect();
        let bytes = TableContent {
            kind: TableKind::Checkpoint,
            uuid: UUID,
            generation: 1,
            virtual_size: 1 << 30,
            extents: &extents,
            sums: &[],
            digest: [0; 32],
        }
        .encode();
        let error = decode(bytes, TableKind::Checkpoint).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{extents:?}");
    }
}

#[test]
fn extents_that_are_a_hole_are_refused_at_the_first_and_not_checksummed_to_the_last() {
    let mut bytes = seal();
    bytes.truncate(HEADER_LEN);
    bytes[48..56].copy_from_slice(&10_000u64.to_le_bytes());
    bytes[56..64].copy_from_slice(&0u64.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(sums_offset(10_000), 0);
    let error = decode(bytes, TableKind::Seal).unwrap_err();
    assert!(
        error.to_string().contains("extent 0 is impossible"),
        "{error}"
    );
}

#[test]
fn a_hostile_count_is_refused_before_anything_is_allocated() {
    let mut bytes = seal();
    bytes[48..56].copy_from_slice(&u64::MAX.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(
        decode(bytes, TableKind::Seal).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}
