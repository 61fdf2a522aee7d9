//! Tables of layers and hot packs in registries: whatever the bytes are, what is read of them makes sense.

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, Blocks, Span, WindowPower};
use vellum_registry::artifact::{
    HOT_HEADER_LEN, HotFrame, HotPack, LayerEncoder, LayerKey, Salt, Table,
};

use crate::input::with_mode;
use crate::{Seed, fixup};

/// Bit of the first byte: checksums are made to fit.
const FIX: u8 = 1;

/// The salt of the seeds that are encrypted.
const SALT: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
/// The key of the seed `encrypted`.
const KEY: &str = "c0de851de3a065f0eb9713e453ccd98d75b86516db04b95ca26c4e29d61d1bff";

/// Extents are in order and within the layer, each chunk has its blocks, and the same is written again.
pub fn table(input: &[u8]) {
    let Some((&mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & FIX != 0 {
        fixup::registry_table(&mut bytes);
    }
    let decoded = match Table::is_encrypted(&bytes) {
        true => {
            // Without the key it is refused, whatever it is.
            Table::decode(&bytes).unwrap_err();
            Table::decode_encrypted(&bytes, &LayerKey::parse(KEY).unwrap())
        }
        false => Table::decode(&bytes),
    };
    let table = match decoded {
        Ok(table) => table,
        Err(error) => {
            assert!(
                [ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()),
                "{error:?}"
            );
            return;
        }
    };
    let mut at = Block::FIRST;
    for run in &table.extents {
        assert!(at <= run.start() && !run.is_empty());
        at = run.end();
    }
    assert!(at.offset().get() <= table.virtual_size);
    let mut chunks = 0;
    let mut blocks = 0;
    let mut end = 0;
    for window in table.windows() {
        let plain = window.plain_len();
        assert!(plain > 0 && plain as u64 <= table.power.blocks().bytes());
        assert_eq!(window.chunk.offset, end);
        end += u64::from(window.chunk.len);
        blocks += plain as u64 / BLOCK_SIZE;
        chunks += 1;
    }
    assert_eq!(chunks, table.chunks.len());
    assert_eq!((end, blocks), (table.data_len, table.data_blocks().get()));
    let again = match Table::is_encrypted(&bytes) {
        false => Table::decode(&table.encode().unwrap()),
        true => {
            let (again, key) = table.encode_encrypted(&Salt::parse(SALT).unwrap()).unwrap();
            Table::decode_encrypted(&again, &key)
        }
    };
    assert_eq!(again.unwrap(), table);
}

/// A layer with each kind of extent, one of zeros alone, an empty one, and one that is encrypted.
pub fn table_seeds() -> Vec<Seed> {
    let table = |extents: &[(u64, u64, bool)], salt: Option<&Salt>| {
        let encoder = LayerEncoder::new(Vec::new(), WindowPower::USUAL, 1).unwrap();
        let mut encoder = encoder.encrypted(salt);
        for &(start, len, zero) in extents {
            let span = Span::new(Block::new(start), Blocks::new(len));
            match zero {
                true => encoder.zero(span),
                false => {
                    let bytes = vec![start as u8; len as usize * BLOCK_LEN];
                    encoder.data(span.start(), &bytes).unwrap();
                }
            }
        }
        encoder.finish(1 << 40, [5; 32]).unwrap().table
    };
    let some = &[
        (0, 2, false),
        (9, 70, false),
        (79, 1, true),
        (300, 1, false),
    ];
    let written = |extents| table(extents, None).encode().unwrap();
    let salt = Salt::parse(SALT).unwrap();
    let mut encrypted = table(some, Some(&salt));
    // What every version of zstd would give.
    for (chunk, number) in encrypted.chunks.iter_mut().zip(0..) {
        chunk.len = 100;
        chunk.offset = u64::from(number) * 100;
        chunk.sha256 = [number; 32];
        chunk.key = Some(salt.chunk_key(&[number]));
    }
    encrypted.data_len = encrypted.chunks.len() as u64 * 100;
    let (encrypted, key) = encrypted.encode_encrypted(&salt).unwrap();
    assert_eq!(*key.digits(), KEY);
    [
        ("some", written(some)),
        ("encrypted", encrypted),
        ("zeros", written(&[(2, 1 << 20, true)])),
        ("empty", written(&[])),
    ]
    .map(|(name, bytes)| (name.to_owned(), with_mode(FIX, &bytes)))
    .into()
}

/// Of a hot pack header and list, of a pack that is as long as its header says: each frame is of a layer that there is,
/// none comes twice, and the same is written again.
pub fn hot(input: &[u8]) {
    let Some((&mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & FIX != 0 {
        fixup::registry_hot(&mut bytes);
    }
    let stored = bytes
        .get(40..48)
        .map(|len| u64::from_le_bytes(len.try_into().unwrap()));
    let len = (bytes.len() as u64).saturating_add(stored.unwrap_or(0));
    let pack = match HotPack::decode(&bytes, len) {
        Ok(pack) => pack,
        Err(error) => {
            assert!(
                [ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()),
                "{error:?}"
            );
            return;
        }
    };
    let mut at = bytes.len() as u64;
    for (offset, frame) in pack.placed() {
        assert!(frame.layer < pack.layers && frame.len > 0);
        assert_eq!(offset, at);
        at += u64::from(frame.len);
    }
    assert_eq!(at, len);
    let again = pack.encode();
    assert_eq!(
        HotPack::front_len(&again[..HOT_HEADER_LEN], len).unwrap(),
        bytes.len()
    );
    assert_eq!(HotPack::decode(&again, len).unwrap(), pack);
}

/// A pack with some frames, and one without any.
pub fn hot_seeds() -> Vec<Seed> {
    let written = |frames: &[(u32, u32, u32)]| {
        let frame = |&(layer, window, len): &(u32, u32, u32)| HotFrame { layer, window, len };
        let frames = frames.iter().map(frame).collect();
        HotPack { layers: 3, frames }.encode()
    };
    [
        ("some", written(&[(0, 0, 400), (2, 9, 1 << 20), (0, 1, 1)])),
        ("empty", written(&[])),
    ]
    .map(|(name, bytes)| (name.to_owned(), with_mode(FIX, &bytes)))
    .into()
}
