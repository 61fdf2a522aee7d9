//! Encrypted layers: what is written is read again with the key and by nobody else, the bytes are those of
//! docs/encryption.md, and what was changed anywhere is refused.

use sha2::{Digest, Sha256};
use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, Block, BlockState, Run, WindowPower};
use vellum_registry::artifact::{Chunk, ChunkReader, Encoded, LayerEncoder, LayerKey, Salt, Table};

use super::{DIGEST, SIZE, span, with_field};

const SALT: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fn salt() -> Salt {
    Salt::parse(SALT).unwrap()
}

/// A block that says which one it is.
fn block(number: u64) -> Vec<u8> {
    format!("plain text of block {number} ")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(BLOCK_LEN)
        .collect()
}

/// Three windows: the first and the last with equal blocks, and zeros between them.
fn encoded(salt: &Salt, level: i32) -> Encoded<Vec<u8>> {
    let encoder = LayerEncoder::new(Vec::new(), WindowPower::USUAL, level).unwrap();
    let mut encoder = encoder.encrypted(Some(salt));
    encoder.data(Block::new(0), &block(1)).unwrap();
    encoder.zero(span(3, 2));
    encoder.data(Block::new(40), &block(2)).unwrap();
    encoder.data(Block::new(96), &block(1)).unwrap();
    encoder.finish(SIZE, DIGEST).unwrap()
}

fn stored<'a>(data: &'a [u8], chunk: &Chunk) -> &'a [u8] {
    &data[chunk.offset as usize..][..chunk.len as usize]
}

fn refused(bytes: &[u8], key: &LayerKey, says: &str) {
    let error = Table::decode_encrypted(bytes, key).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn what_is_encrypted_is_read_again_and_shows_nothing_of_its_content() {
    let written = encoded(&salt(), 3);
    let (table, key) = written.table.encode_encrypted(&salt()).unwrap();
    let read = Table::decode_encrypted(&table, &key).unwrap();
    assert_eq!(read, written.table);
    assert_eq!(read.digest, DIGEST);
    for shown in [&table[..], &written.out] {
        assert!(!shown.windows(5).any(|bytes| bytes == b"plain"));
        assert!(!shown.windows(32).any(|bytes| bytes == DIGEST));
    }
    let mut reader = ChunkReader::new().unwrap();
    let mut found = Vec::new();
    for window in read.windows() {
        let blocks = reader.blocks(&window, stored(&written.out, &window.chunk));
        found.extend(blocks.unwrap().map(|(span, bytes)| (span, bytes.to_vec())));
    }
    let expected = [(0, 1), (40, 2), (96, 1)];
    assert_eq!(
        found,
        expected.map(|(at, number)| (span(at, 1), block(number)))
    );
    // Who has no key is told so, as one who may have it is.
    let error = Table::decode(&table).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
}

#[test]
fn equal_chunks_are_equal_within_a_trust_domain_and_not_beyond_it() {
    let (one, again) = (encoded(&salt(), 3), encoded(&salt(), 3));
    assert_eq!(one.out, again.out);
    let (table, key) = one.table.encode_encrypted(&salt()).unwrap();
    let (same, same_key) = again.table.encode_encrypted(&salt()).unwrap();
    assert_eq!((&table, &*key.digits()), (&same, &*same_key.digits()));
    let chunks = &one.table.chunks;
    assert_eq!(chunks[0].sha256, chunks[2].sha256);
    assert_ne!(chunks[0].sha256, chunks[1].sha256);
    let other = Salt::random().unwrap();
    let elsewhere = encoded(&other, 3);
    for (here, there) in chunks.iter().zip(&elsewhere.table.chunks) {
        assert_eq!(here.len, there.len);
        assert_ne!(here.sha256, there.sha256);
    }
    // Frames of another level have keys of their own: no key is used for two texts.
    let level = encoded(&salt(), 19);
    for (here, there) in chunks.iter().zip(&level.table.chunks) {
        let same = stored(&one.out, here) == stored(&level.out, there);
        assert_eq!(same, here.key == there.key);
    }
}

/// Calculated by another program (Python's `cryptography`) from docs/encryption.md.
#[test]
fn the_table_of_the_first_version_has_these_bytes_for_ever() {
    let chunk = |window, len, offset, byte, frame: &[u8]| Chunk {
        window,
        len,
        offset,
        sha256: [byte; 32],
        key: Some(salt().chunk_key(frame)),
    };
    let (data, zero) = (BlockState::Data, BlockState::Zero);
    let table = Table {
        virtual_size: 1 << 20,
        power: WindowPower::USUAL,
        digest: DIGEST,
        extents: vec![
            Run::new(span(0, 3), data),
            Run::new(span(3, 5), zero),
            Run::new(span(64, 1), data),
        ],
        chunks: vec![chunk(0, 100, 0, 1, b"one"), chunk(2, 200, 100, 2, b"two")],
        data_len: 300,
    };
    let (bytes, key) = table.encode_encrypted(&salt()).unwrap();
    assert_eq!(
        *key.digits(),
        "7baa94b0911581032697be26933bcd16f345610eac8b988088fcb27d1c648f57"
    );
    let sha256 = Sha256::digest(&bytes);
    let sha256: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(bytes.len(), 256 + 3 * 16 + 2 * 80 + 48);
    assert_eq!(
        sha256,
        "ce5f4c98cbe086683803ce1fb1bfc57053bf4245341eae9caa3173fd85e2201b"
    );
    assert_eq!(Table::decode_encrypted(&bytes, &key).unwrap(), table);
}

#[test]
fn a_bit_that_flips_anywhere_in_a_table_is_found_also_where_the_crcs_fit() {
    let (table, key) = encoded(&salt(), 3).table.encode_encrypted(&salt()).unwrap();
    for at in 0..table.len() {
        for bit in [1, 128] {
            let mut bad = table.clone();
            bad[at] ^= bit;
            Table::decode_encrypted(&bad, &key).unwrap_err();
            // The CRCs themselves are made right again.
            let fixed = with_field(&table, at, &[table[at] ^ bit]);
            let read = Table::decode_encrypted(&fixed, &key);
            assert_eq!(read.is_ok(), (248..256).contains(&at), "{at}");
        }
        Table::decode_encrypted(&table[..at], &key).unwrap_err();
    }
}

#[test]
fn wrong_keys_plain_tables_and_other_layers_key_sections_are_refused_in_words() {
    let written = encoded(&salt(), 3);
    let (table, key) = written.table.encode_encrypted(&salt()).unwrap();
    let wrong = LayerKey::parse(&"0".repeat(64)).unwrap();
    refused(&table, &wrong, "does not match its tag");
    refused(
        &with_field(&table, 72, &[1]),
        &key,
        "names its layer's digest",
    );
    let mut plain = written.table.clone();
    plain.chunks.iter_mut().for_each(|chunk| chunk.key = None);
    refused(&plain.encode().unwrap(), &key, "is not encrypted");
    // The key section of a table that differs in a block that is zero.
    let mut other = written.table.clone();
    other.extents.retain(|run| run.value == BlockState::Data);
    other.extents.push(Run::new(span(200, 2), BlockState::Zero));
    let (other, _) = other.encode_encrypted(&salt()).unwrap();
    let section = table.len() - 48 - 3 * 32;
    let mixed = with_field(&other, section, &table[section..]);
    refused(&mixed, &key, "does not match its tag");
    let says = with_field(&table, 16, &[3]);
    let error = Table::decode_encrypted(&says, &key).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("feature bit(s) 1"), "{error}");
}

#[test]
fn chunks_that_were_changed_swapped_or_are_shorter_than_a_tag_are_refused() {
    let written = encoded(&salt(), 3);
    let windows: Vec<_> = written.table.windows().collect();
    let (first, second) = (&windows[0], &windows[1]);
    let mut reader = ChunkReader::new().unwrap();
    let good = stored(&written.out, &first.chunk).to_vec();
    let mut refused = |window: &vellum_registry::artifact::Window, bytes: &[u8], says: &str| {
        let error = reader.blocks(window, bytes).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(says), "{error}");
    };
    let other = stored(&written.out, &second.chunk);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        refused(first, &bad, "SHA-256");
        // A table that vouches for it does not help.
        let mut window = first.clone();
        window.chunk.sha256 = Sha256::digest(&bad).into();
        refused(&window, &bad, "does not match its tag");
    }
    let mut swapped = first.clone();
    swapped.chunk.len = second.chunk.len;
    swapped.chunk.sha256 = second.chunk.sha256;
    refused(&swapped, other, "does not match its tag");
    for len in [1, 15, 16] {
        let mut window = first.clone();
        window.chunk.len = len;
        let short = &good[..len as usize];
        window.chunk.sha256 = Sha256::digest(short).into();
        refused(&window, short, "");
    }
    let mut short = written.table.clone();
    short.chunks.truncate(1);
    short.extents.truncate(1);
    short.chunks[0].len = 16;
    short.data_len = 16;
    let (bytes, key) = short.encode_encrypted(&salt()).unwrap();
    let error = Table::decode_encrypted(&bytes, &key).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[test]
fn a_layer_without_data_is_encrypted_too() {
    let encoder = LayerEncoder::new(Vec::new(), WindowPower::USUAL, 3).unwrap();
    let mut encoder = encoder.encrypted(Some(&salt()));
    encoder.zero(span(5, 100));
    let written = encoder.finish(SIZE, DIGEST).unwrap();
    assert!(written.out.is_empty());
    let (table, key) = written.table.encode_encrypted(&salt()).unwrap();
    assert!(Table::is_encrypted(&table));
    let read = Table::decode_encrypted(&table, &key).unwrap();
    assert_eq!(read, written.table);
}

#[test]
fn incompressible_blocks_of_the_largest_chunks_fit_with_their_tags() {
    let most = WindowPower::MOST;
    let mut noise = vec![0; most.blocks().buffer_len()];
    let mut hash = Sha256::digest(b"noise");
    for piece in noise.chunks_mut(32) {
        piece.copy_from_slice(&hash);
        hash = Sha256::digest(hash);
    }
    let encoder = LayerEncoder::new(Vec::new(), most, 1).unwrap();
    let mut encoder = encoder.encrypted(Some(&salt()));
    encoder.data(Block::FIRST, &noise).unwrap();
    let written = encoder.finish(SIZE, DIGEST).unwrap();
    assert!(written.out.len() > noise.len() + 16);
    let (table, key) = written.table.encode_encrypted(&salt()).unwrap();
    Table::decode_encrypted(&table, &key).unwrap();
}
