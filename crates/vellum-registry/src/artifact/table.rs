//! The table of a layer: docs/registry.md, "Table, version 1".

use std::iter::Peekable;
use std::slice;

use super::bytes::{corrupt, put};
use vellum_base::block::{
    BLOCK_SIZE, Block, BlockState, Blocks, MAX_VIRTUAL_SIZE, Run, Span, WindowPower, array_at,
    part, part_from, push_run, u32_at, u64_at,
};
use vellum_base::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"VELLUMTB";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 256;
const BODY_CRC_AT: usize = 248;
const CRC_AT: usize = 252;
const EXTENT_LEN: usize = 16;
const CHUNK_LEN: usize = 48;
/// By how much stored bytes may be longer than plain ones: what zstd adds to what cannot be compressed.
pub(super) const MAX_GROWTH: usize = 1024;

/// The longest table in bytes.
pub const MAX_TABLE: u64 = 256 << 20;

/// The size of windows for a layer with so many data blocks: the usual one, unless its table would be too long where
/// each window has few of them.
pub fn power_for(blocks: Blocks) -> WindowPower {
    let fits = |power: &WindowPower| {
        // As many windows as blocks could need where they lie close together, and again as many.
        let chunks = (blocks.get() / power.blocks().get()).saturating_mul(2);
        chunks.saturating_mul(CHUNK_LEN as u64) <= MAX_TABLE / 4
    };
    let mut powers = WindowPower::USUAL.and_larger();
    powers.find(fits).unwrap_or(WindowPower::MOST)
}

/// Where the data blocks of a window lie in the data blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Which window: it begins at so many times the window's size.
    pub window: u32,
    /// Length of the stored bytes.
    pub len: u32,
    /// Their offset in the data blob, in bytes.
    pub offset: u64,
    /// Their SHA-256.
    pub sha256: [u8; 32],
}

/// A chunk, and the data blocks that it holds, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Where it is stored.
    pub chunk: Chunk,
    /// The blocks.
    pub blocks: Vec<Span>,
}

impl Window {
    /// Length of the plain bytes.
    pub fn plain_len(&self) -> usize {
        self.blocks.iter().map(|span| span.len().buffer_len()).sum()
    }
}

/// What of a layer lies where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// In bytes: a multiple of 4096, up to 64 TiB.
    pub virtual_size: u64,
    /// The size of windows.
    pub power: WindowPower,
    /// The layer's digest: docs/format.md, section 5.
    pub digest: [u8; 32],
    /// Its blocks that are data or zero, in order.
    pub extents: Vec<Run<BlockState>>,
    /// In the order of their windows.
    pub chunks: Vec<Chunk>,
    /// Length of the data blob in bytes.
    pub data_len: u64,
}

impl Table {
    /// As the format has it. Asserts that it is a table that [`Table::decode`] takes.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where it would be too long.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut extents = Vec::new();
        for run in &self.extents {
            // A length has 32 bits.
            for span in run.span.pieces(Blocks::new(u64::from(u32::MAX))) {
                extents.extend_from_slice(&span.start().get().to_le_bytes());
                extents.extend_from_slice(&(span.len().get() as u32).to_le_bytes());
                extents.extend_from_slice(&run.value.code().to_le_bytes());
            }
        }
        let count = extents.len() / EXTENT_LEN;
        let len = HEADER_LEN + extents.len() + CHUNK_LEN * self.chunks.len();
        if len as u64 > MAX_TABLE {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the table of a layer with {} extents and {} chunks would have {len} bytes, more than the \
                     {MAX_TABLE} that a registry's readers take: flatten the image, or push it with --format oci",
                    count,
                    self.chunks.len()
                ),
            ));
        }
        let mut bytes = vec![0; HEADER_LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 12, &(BLOCK_SIZE as u32).to_le_bytes());
        put(&mut bytes, 32, &self.virtual_size.to_le_bytes());
        put(&mut bytes, 40, &self.power.get().to_le_bytes());
        put(&mut bytes, 48, &(count as u64).to_le_bytes());
        put(&mut bytes, 56, &(self.chunks.len() as u64).to_le_bytes());
        put(&mut bytes, 64, &self.data_len.to_le_bytes());
        put(&mut bytes, 72, &self.digest);
        bytes.extend_from_slice(&extents);
        for chunk in &self.chunks {
            bytes.extend_from_slice(&chunk.window.to_le_bytes());
            bytes.extend_from_slice(&chunk.len.to_le_bytes());
            bytes.extend_from_slice(&chunk.offset.to_le_bytes());
            bytes.extend_from_slice(&chunk.sha256);
        }
        let body = crc32fast::hash(part_from(&bytes, HEADER_LEN));
        put(&mut bytes, BODY_CRC_AT, &body.to_le_bytes());
        let header = crc32fast::hash(part(&bytes, 0, CRC_AT));
        put(&mut bytes, CRC_AT, &header.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a table that anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another kind of file, version or feature; [`ErrorKind::Corrupt`] for what
    /// contradicts itself. It takes memory in proportion to `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let counts = check_front(bytes)?;
        let virtual_size = u64_at(bytes, 32);
        if virtual_size == 0
            || !virtual_size.is_multiple_of(BLOCK_SIZE)
            || virtual_size > MAX_VIRTUAL_SIZE
        {
            return Err(corrupt(format!("a layer of {virtual_size} bytes")));
        }
        let power = u32_at(bytes, 40);
        let power = WindowPower::new(power)
            .ok_or_else(|| corrupt(format!("chunks of two to the power of {power} bytes")))?;
        let body = part_from(bytes, HEADER_LEN);
        let (extents, chunks) = body.split_at(counts.extents * EXTENT_LEN);
        let table = Table {
            virtual_size,
            power,
            digest: array_at(bytes, 72),
            extents: decode_extents(extents, Blocks::whole_in(virtual_size))?,
            chunks: chunks.chunks_exact(CHUNK_LEN).map(decode_chunk).collect(),
            data_len: u64_at(bytes, 64),
        };
        table.check_chunks()?;
        Ok(table)
    }

    /// The chunks with what they hold. Ends early where chunks and extents do not fit.
    pub fn windows(&self) -> impl Iterator<Item = Window> {
        let windows = Windows::new(&self.extents, self.power);
        let pairs = self.chunks.iter().zip(windows);
        pairs.map_while(|(chunk, (window, blocks))| {
            (chunk.window == window).then_some(Window {
                chunk: *chunk,
                blocks,
            })
        })
    }

    /// The number of data blocks.
    pub fn data_blocks(&self) -> Blocks {
        let data = self.extents.iter();
        let data = data.filter(|run| run.value == BlockState::Data);
        Blocks::new(data.map(|run| run.len().get()).sum())
    }

    /// Makes sure that each window with data has its chunk, and that these fill the data blob.
    fn check_chunks(&self) -> Result<()> {
        let mut windows = Windows::new(&self.extents, self.power);
        let mut end = 0;
        for chunk in &self.chunks {
            let Some((window, blocks)) = windows.next().filter(|next| next.0 == chunk.window)
            else {
                return Err(corrupt(format!(
                    "the chunk of the window {} is none of those that the extents ask for",
                    chunk.window
                )));
            };
            let plain: usize = blocks.iter().map(|span| span.len().buffer_len()).sum();
            if chunk.len == 0 || chunk.len as usize > plain + MAX_GROWTH || chunk.offset != end {
                return Err(corrupt(format!(
                    "the chunk of the window {window}, {} bytes at {}, does not fit",
                    chunk.len, chunk.offset
                )));
            }
            end += u64::from(chunk.len);
        }
        if let Some((window, _)) = windows.next() {
            return Err(corrupt(format!("the window {window} has no chunk")));
        }
        if end != self.data_len {
            return Err(corrupt(format!(
                "the chunks end at {end}, and the data at {}",
                self.data_len
            )));
        }
        Ok(())
    }
}

/// How much follows a table's header, whose length fits that.
struct Counts {
    extents: usize,
}

fn check_front(bytes: &[u8]) -> Result<Counts> {
    if bytes.len() < HEADER_LEN || !bytes.starts_with(MAGIC) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "not the table of a layer that `vellum push` wrote (wrong magic)",
        ));
    }
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the table is of version {version}; this build reads version {VERSION}: use the vellum that pushed it"
            ),
        ));
    }
    if crc32fast::hash(part(bytes, 0, CRC_AT)) != u32_at(bytes, CRC_AT) {
        return Err(corrupt("the header of the table does not match its CRC"));
    }
    let unknown = u64_at(bytes, 16);
    if unknown != 0 {
        let bits = (0..64).filter(|bit| unknown >> bit & 1 == 1);
        let bits: Vec<String> = bits.map(|bit| bit.to_string()).collect();
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "incompatible feature bit(s) {} of the table are unknown to this build: use a newer vellum",
                bits.join(", ")
            ),
        ));
    }
    let block = u32_at(bytes, 12);
    if u64::from(block) != BLOCK_SIZE {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the table is of blocks of {block} bytes; this build has blocks of 4096"),
        ));
    }
    let (extents, chunks) = (u64_at(bytes, 48), u64_at(bytes, 56));
    let need = u128::from(extents) * EXTENT_LEN as u128 + u128::from(chunks) * CHUNK_LEN as u128;
    if need != (bytes.len() - HEADER_LEN) as u128 {
        return Err(corrupt(format!(
            "a table of {} bytes with {extents} extents and {chunks} chunks",
            bytes.len()
        )));
    }
    let body = part_from(bytes, HEADER_LEN);
    if crc32fast::hash(body) != u32_at(bytes, BODY_CRC_AT) {
        return Err(corrupt("the table does not match its CRC"));
    }
    Ok(Counts {
        extents: extents as usize,
    })
}

fn decode_extents(bytes: &[u8], size: Blocks) -> Result<Vec<Run<BlockState>>> {
    let mut extents: Vec<Run<BlockState>> = Vec::new();
    let mut last: Option<Run<BlockState>> = None;
    for bytes in bytes.chunks_exact(EXTENT_LEN) {
        let (start, len) = (u64_at(bytes, 0), u32_at(bytes, 8));
        let state = BlockState::of_code(u32_at(bytes, 12))?;
        let span = Span::checked(Block::new(start), Blocks::new(u64::from(len)));
        let bad = || corrupt(format!("an extent of {len} blocks at {start} does not fit"));
        let span = span.ok_or_else(bad)?;
        if span.is_empty() || state == BlockState::Parent || span.end().get() > size.get() {
            return Err(bad());
        }
        if let Some(last) = last {
            let touches = last.value == state && last.end() == span.start();
            let fits = last.len().get() + span.len().get() <= u64::from(u32::MAX);
            if last.end() > span.start() || touches && fits {
                return Err(bad());
            }
        }
        let run = Run::new(span, state);
        push_run(&mut extents, run);
        last = Some(run);
    }
    Ok(extents)
}

fn decode_chunk(bytes: &[u8]) -> Chunk {
    Chunk {
        window: u32_at(bytes, 0),
        len: u32_at(bytes, 4),
        offset: u64_at(bytes, 8),
        sha256: array_at(bytes, 16),
    }
}

/// The windows that have data blocks, each with these, in order.
struct Windows<'a> {
    extents: Peekable<slice::Iter<'a, Run<BlockState>>>,
    power: WindowPower,
    /// What is left of an extent of data.
    rest: Option<Span>,
}

impl<'a> Windows<'a> {
    fn new(extents: &'a [Run<BlockState>], power: WindowPower) -> Self {
        Windows {
            extents: extents.iter().peekable(),
            power,
            rest: None,
        }
    }

    /// The next data blocks, whichever window they are in.
    fn next_span(&mut self) -> Option<Span> {
        if let Some(rest) = self.rest.take() {
            return Some(rest);
        }
        let run = self.extents.find(|run| run.value == BlockState::Data)?;
        Some(run.span)
    }
}

impl Iterator for Windows<'_> {
    type Item = (u32, Vec<Span>);

    fn next(&mut self) -> Option<Self::Item> {
        let mut span = self.next_span()?;
        let window = self.power.window_of(span.start());
        let whole = self.power.span(window);
        let mut blocks = Vec::new();
        loop {
            let here = Span::between(span.start(), span.end().min(whole.end()));
            blocks.push(here);
            if here.end() < span.end() {
                self.rest = Some(Span::between(here.end(), span.end()));
                return Some((window, blocks));
            }
            span = match self.next_span() {
                None => return Some((window, blocks)),
                Some(next) if next.start() >= whole.end() => {
                    self.rest = Some(next);
                    return Some((window, blocks));
                }
                Some(next) => next,
            };
        }
    }
}
