//! The table of a layer: docs/registry.md, "Table, version 1".

use std::iter::Peekable;
use std::slice;

use super::bytes::{corrupt, put};
use super::keys::{ChunkKey, KEY_LEN, LayerKey, Salt, TAG_LEN};
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
const FEATURES_AT: usize = 16;
const DIGEST_AT: usize = 72;
/// The incompatible feature bit of encrypted layers.
const ENCRYPTED: u64 = 1;
/// By how much stored bytes may be longer than plain ones: what zstd adds to what cannot be compressed, and a tag.
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
    /// What they are encrypted with, if they are.
    pub key: Option<ChunkKey>,
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
        let is_plain = self.chunks.iter().all(|chunk| chunk.key.is_none());
        assert!(is_plain, "the table of an encrypted layer is encrypted");
        let mut bytes = self.front(0)?;
        put(&mut bytes, DIGEST_AT, &self.digest);
        put_crcs(&mut bytes);
        Ok(bytes)
    }

    /// As the format has it for a layer whose chunks were encrypted with the salt, with the key that
    /// [`Table::decode_encrypted`] wants: docs/encryption.md, "Bytes". The same table and salt give the same bytes and key.
    /// Asserts that each chunk has a key.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where it would be too long.
    pub fn encode_encrypted(&self, salt: &Salt) -> Result<(Vec<u8>, LayerKey)> {
        let mut secret = self.digest.to_vec();
        for chunk in &self.chunks {
            let key = chunk.key.as_ref();
            assert!(key.is_some(), "each chunk of an encrypted layer has a key");
            key.iter().for_each(|key| secret.extend_from_slice(&key.0));
        }
        let mut bytes = self.front(secret.len() + TAG_LEN)?;
        put(&mut bytes, FEATURES_AT, &ENCRYPTED.to_le_bytes());
        let public = without_crcs(&bytes, bytes.len());
        let key = salt.layer_key(&public, &secret);
        key.seal(&public, &mut secret);
        bytes.extend_from_slice(&secret);
        put_crcs(&mut bytes);
        Ok((bytes, key))
    }

    /// Header, extents and chunk entries, without what differs between plain and encrypted tables, and without CRCs.
    /// `more` bytes will stand behind them.
    fn front(&self, more: usize) -> Result<Vec<u8>> {
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
        let len = HEADER_LEN + extents.len() + CHUNK_LEN * self.chunks.len() + more;
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
        bytes.extend_from_slice(&extents);
        for chunk in &self.chunks {
            bytes.extend_from_slice(&chunk.window.to_le_bytes());
            bytes.extend_from_slice(&chunk.len.to_le_bytes());
            bytes.extend_from_slice(&chunk.offset.to_le_bytes());
            bytes.extend_from_slice(&chunk.sha256);
        }
        Ok(bytes)
    }

    /// Reads the table of a layer that is not encrypted, which anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another kind of file, version or feature; [`ErrorKind::Corrupt`] for what
    /// contradicts itself; [`ErrorKind::Permission`] for one of an encrypted layer. It takes memory in proportion to
    /// `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let counts = check_front(bytes)?;
        if counts.encrypted {
            let text = "the table is of an encrypted layer, whose key is not known";
            return Err(Error::new(ErrorKind::Permission, text));
        }
        decode_front(bytes, &counts)
    }

    /// Reads the table of an encrypted layer, which anybody may have written.
    ///
    /// # Errors
    /// As [`Table::decode`]; [`ErrorKind::Corrupt`] also for one that the key does not fit, and for one that is not encrypted.
    pub fn decode_encrypted(bytes: &[u8], key: &LayerKey) -> Result<Self> {
        let counts = check_front(bytes)?;
        if !counts.encrypted {
            let text = "the table is not encrypted, and should be";
            return Err(corrupt(text));
        }
        let mut table = decode_front(bytes, &counts)?;
        if table.digest != [0; 32] {
            return Err(corrupt("the encrypted table names its layer's digest"));
        }
        let at = counts.section();
        let mut section = part_from(bytes, at).to_vec();
        let secret = key.open(&without_crcs(bytes, at), &mut section);
        let secret = secret.ok_or_else(|| {
            corrupt("the key section of the table, or the table, does not match its tag")
        })?;
        table.digest = array_at(secret, 0);
        let keys = part_from(secret, 32).chunks_exact(KEY_LEN);
        for (chunk, key) in table.chunks.iter_mut().zip(keys) {
            chunk.key = Some(ChunkKey(array_at(key, 0)));
        }
        Ok(table)
    }

    /// Whether these are bytes of an encrypted layer's table; false also for what is no table.
    pub fn is_encrypted(bytes: &[u8]) -> bool {
        bytes.len() >= HEADER_LEN && u64_at(bytes, FEATURES_AT) & ENCRYPTED != 0
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
    fn check_chunks(&self, encrypted: bool) -> Result<()> {
        let least = if encrypted { TAG_LEN + 1 } else { 1 };
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
            let len = chunk.len as usize;
            if len < least || len > plain + MAX_GROWTH || chunk.offset != end {
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
    chunks: usize,
    encrypted: bool,
}

impl Counts {
    /// Where the key section begins, or the table ends.
    fn section(&self) -> usize {
        HEADER_LEN + self.extents * EXTENT_LEN + self.chunks * CHUNK_LEN
    }
}

/// What is authenticated with a key section that begins at `end`: what stands in front of it, but for the CRCs.
fn without_crcs(bytes: &[u8], end: usize) -> Vec<u8> {
    let body = part(bytes, HEADER_LEN, end - HEADER_LEN);
    [part(bytes, 0, BODY_CRC_AT), body].concat()
}

fn put_crcs(bytes: &mut [u8]) {
    let body = crc32fast::hash(part_from(bytes, HEADER_LEN));
    put(bytes, BODY_CRC_AT, &body.to_le_bytes());
    let header = crc32fast::hash(part(bytes, 0, CRC_AT));
    put(bytes, CRC_AT, &header.to_le_bytes());
}

/// What a table says that is not encrypted.
fn decode_front(bytes: &[u8], counts: &Counts) -> Result<Table> {
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
    let body = part(bytes, HEADER_LEN, counts.section() - HEADER_LEN);
    let (extents, chunks) = body.split_at(counts.extents * EXTENT_LEN);
    let table = Table {
        virtual_size,
        power,
        digest: array_at(bytes, DIGEST_AT),
        extents: decode_extents(extents, Blocks::whole_in(virtual_size))?,
        chunks: chunks.chunks_exact(CHUNK_LEN).map(decode_chunk).collect(),
        data_len: u64_at(bytes, 64),
    };
    table.check_chunks(counts.encrypted)?;
    Ok(table)
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
    let features = u64_at(bytes, FEATURES_AT);
    let (encrypted, unknown) = (features & ENCRYPTED != 0, features & !ENCRYPTED);
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
    let (per_chunk, more) = match encrypted {
        true => (CHUNK_LEN + KEY_LEN, 32 + TAG_LEN),
        false => (CHUNK_LEN, 0),
    };
    let need = u128::from(extents) * EXTENT_LEN as u128
        + u128::from(chunks) * per_chunk as u128
        + more as u128;
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
        chunks: chunks as usize,
        encrypted,
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
        key: None,
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
