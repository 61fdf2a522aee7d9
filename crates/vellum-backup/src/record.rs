//! Records of backups and layer files: docs/backup.md, "Records".

use sha2::{Digest, Sha256};

use vellum_base::block::{
    BLOCK_LEN, Block, BlockState, Blocks, Run, Span, part, part_from, part_mut, u32_at, u64_at,
};
use vellum_base::error::{Error, ErrorKind, Result};

pub(crate) const HEAD_LEN: usize = 32;
const HEAD_CRC_AT: usize = HEAD_LEN - 4;
pub(crate) const EXTENT_LEN: usize = 16;
const END_LEN: usize = 64;
const DIGEST_AT: usize = 32;

/// In a chunk, at most.
pub(crate) const MAX_EXTENTS: usize = 4096;
pub(crate) const MAX_DATA: Blocks = Blocks::new(256);
/// The extents, and what zstd makes of data that it cannot compress.
const MAX_PAYLOAD: usize = MAX_EXTENTS * EXTENT_LEN + MAX_DATA.buffer_len() + (64 << 10);

/// What a layer record has in front of what is said of the layer.
pub(crate) const LAYER_FRONT: usize = 48 + LAYER_HEADER_LEN;
/// Bytes of the header of a layer.
pub const LAYER_HEADER_LEN: usize = 512;
/// Bytes of the payload of a layer record.
pub(crate) const LAYER_PAYLOAD: std::ops::RangeInclusive<usize> = LAYER_FRONT..=64 << 10;

const CHUNK: u32 = 1;
const END: u32 = 2;
const LAYER: u32 = 3;
/// In the length of an extent: its blocks are zero.
const ZERO: u64 = 1 << 63;

/// What a backup holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Chunks.
    pub chunks: u64,
    /// Blocks with data.
    pub data: Blocks,
    /// Blocks that are zero, where the base may have others.
    pub zero: Blocks,
}

/// Which record it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Blocks.
    Chunk,
    /// Of a layer file: the blocks of a layer follow.
    Layer,
    /// Nothing follows.
    End,
}

/// The front of a record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    pub kind: Kind,
    pub extents: usize,
    pub payload: usize,
    pub data: Blocks,
    pub crc: u32,
}

/// A damaged backup or layer file.
pub(crate) fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Puts a field into a structure of fixed size.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    part_mut(bytes, at, field.len()).copy_from_slice(field);
}

/// A whole record: what is written at once.
fn record(kind: u32, extents: usize, data: Blocks, number: u64, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() <= MAX_PAYLOAD && extents <= MAX_EXTENTS && data <= MAX_DATA);
    let mut bytes = vec![0; HEAD_LEN];
    put(&mut bytes, 0, &kind.to_le_bytes());
    // All three are far below 2^32.
    put(&mut bytes, 4, &(extents as u32).to_le_bytes());
    put(&mut bytes, 8, &(payload.len() as u32).to_le_bytes());
    put(&mut bytes, 12, &(data.bytes() as u32).to_le_bytes());
    put(&mut bytes, 16, &number.to_le_bytes());
    put(&mut bytes, 24, &crc32fast::hash(payload).to_le_bytes());
    let crc = crc32fast::hash(part(&bytes, 0, HEAD_CRC_AT));
    put(&mut bytes, HEAD_CRC_AT, &crc.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A chunk with these extents, whose data extents together have the bytes that were compressed to `frame`.
pub(crate) fn chunk(extents: &[Run<BlockState>], frame: &[u8], number: u64) -> Vec<u8> {
    let mut payload = Vec::with_capacity(extents.len() * EXTENT_LEN + frame.len());
    for extent in extents {
        payload.extend_from_slice(&extent.start().get().to_le_bytes());
        let zero = match extent.value {
            BlockState::Zero => ZERO,
            _ => 0,
        };
        payload.extend_from_slice(&(extent.len().get() | zero).to_le_bytes());
    }
    payload.extend_from_slice(frame);
    record(CHUNK, extents.len(), data_of(extents), number, &payload)
}

/// Blocks with data.
pub(crate) fn data_of(extents: &[Run<BlockState>]) -> Blocks {
    let data = extents.iter().filter(|run| run.value == BlockState::Data);
    data.map(Run::len).sum()
}

/// The beginning of a layer. Asserts that its payload is as long as one may be.
pub(crate) fn layer(payload: &[u8], number: u64) -> Vec<u8> {
    assert!(LAYER_PAYLOAD.contains(&payload.len()));
    record(LAYER, 0, Blocks::NONE, number, payload)
}

/// The end, after bytes with this digest.
pub(crate) fn end(totals: &Totals, digest: &Sha256, number: u64) -> Vec<u8> {
    let mut payload = vec![0; END_LEN];
    put(&mut payload, 0, &totals.chunks.to_le_bytes());
    put(&mut payload, 8, &totals.data.get().to_le_bytes());
    put(&mut payload, 16, &totals.zero.get().to_le_bytes());
    put(&mut payload, DIGEST_AT, &digest.clone().finalize());
    record(END, 0, Blocks::NONE, number, &payload)
}

impl Head {
    /// Reads the front of the record with this number.
    pub(crate) fn decode(bytes: &[u8; HEAD_LEN], number: u64) -> Result<Head> {
        if crc32fast::hash(part(bytes, 0, HEAD_CRC_AT)) != u32_at(bytes, HEAD_CRC_AT) {
            return Err(corrupt(format!("record {number} does not match its CRC")));
        }
        let there = u64_at(bytes, 16);
        if there != number {
            return Err(corrupt(format!(
                "record {there} is in the place of record {number}"
            )));
        }
        let kind = match u32_at(bytes, 0) {
            CHUNK => Kind::Chunk,
            END => Kind::End,
            LAYER => Kind::Layer,
            other => return Err(corrupt(format!("record {number} is of no kind ({other})"))),
        };
        let [extents, payload, data] = [4, 8, 12].map(|at| u32_at(bytes, at) as usize);
        let lengths_fit = match kind {
            Kind::Chunk => {
                (1..=MAX_EXTENTS).contains(&extents)
                    && (extents * EXTENT_LEN..=MAX_PAYLOAD).contains(&payload)
                    && data.is_multiple_of(BLOCK_LEN)
                    && data <= MAX_DATA.buffer_len()
            }
            Kind::Layer => extents == 0 && data == 0 && LAYER_PAYLOAD.contains(&payload),
            Kind::End => extents == 0 && data == 0 && payload == END_LEN,
        };
        if !lengths_fit {
            return Err(corrupt(format!(
                "record {number} has impossible lengths: {extents} extents, {data} bytes of data in a \
                 payload of {payload}"
            )));
        }
        Ok(Head {
            kind,
            extents,
            payload,
            data: Blocks::whole_in(data as u64),
            crc: u32_at(bytes, 24),
        })
    }

    /// Checks the payload, which has the length that the head says.
    pub(crate) fn check(&self, payload: &[u8], number: u64) -> Result<()> {
        if crc32fast::hash(payload) == self.crc {
            return Ok(());
        }
        Err(corrupt(format!(
            "the bytes of record {number} do not match their CRC"
        )))
    }
}

/// Reads the extents in front of a payload, which begin at `from` or later and end at `size` or before.
/// Returns what is behind them.
pub(crate) fn extents<'a>(
    head: &Head,
    payload: &'a [u8],
    from: Block,
    size: Block,
    into: &mut Vec<Run<BlockState>>,
) -> Result<&'a [u8]> {
    into.clear();
    let table = head.extents * EXTENT_LEN;
    let mut at = from;
    for entry in part(payload, 0, table).chunks_exact(EXTENT_LEN) {
        let (start, len) = (u64_at(entry, 0), u64_at(entry, 8));
        let span = Span::checked(Block::new(start), Blocks::new(len & !ZERO));
        let span = span.filter(|span| !span.is_empty() && span.start() >= at && span.end() <= size);
        let span = span.ok_or_else(|| {
            let len = len & !ZERO;
            corrupt(format!(
                "an extent of {len} blocks from {start}, behind block {at} of {size}"
            ))
        })?;
        at = span.end();
        let state = match len & ZERO {
            0 => BlockState::Data,
            _ => BlockState::Zero,
        };
        into.push(Run::new(span, state));
    }
    // The sum has a number: no extent overlaps another.
    if data_of(into) != head.data {
        return Err(corrupt(format!(
            "extents with {} blocks of data in a chunk with {}",
            data_of(into),
            head.data
        )));
    }
    Ok(part_from(payload, table))
}

/// Checks the end against what was read before it.
pub(crate) fn check_end(payload: &[u8], totals: &Totals, digest: &Sha256) -> Result<()> {
    let told = Totals {
        chunks: u64_at(payload, 0),
        data: Blocks::new(u64_at(payload, 8)),
        zero: Blocks::new(u64_at(payload, 16)),
    };
    if told != *totals {
        return Err(corrupt(format!(
            "the end counts other blocks than there are: {told:?} instead of {totals:?}"
        )));
    }
    if part_from(payload, DIGEST_AT) != digest.clone().finalize().as_slice() {
        return Err(corrupt("the content does not match its digest (SHA-256)"));
    }
    Ok(())
}
