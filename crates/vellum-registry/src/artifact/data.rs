//! The data of a layer: docs/registry.md, "Data".

use std::io::Write;

use sha2::{Digest, Sha256};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, DParameter};

use super::bytes::corrupt;
use super::keys::Salt;
use super::table::{Chunk, Table, Window};
use vellum_base::block::{Block, BlockState, Run, Span, WindowPower, part, part_from, push_run};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// The largest window that a frame may ask for, as a power of two: that of the largest chunk.
const WINDOW_LOG: u32 = 20;

/// Writes the data blob of a layer, and collects what its table says.
pub struct LayerEncoder<W> {
    out: W,
    compressor: Compressor<'static>,
    /// What chunks are encrypted with, if they are.
    salt: Option<Salt>,
    power: WindowPower,
    extents: Vec<Run<BlockState>>,
    chunks: Vec<Chunk>,
    /// The window that is being filled, and its plain bytes.
    window: Option<u32>,
    plain: Vec<u8>,
    len: u64,
    hasher: Sha256,
}

/// What an encoder has written.
#[derive(Debug)]
pub struct Encoded<W> {
    /// What the data blob was written to.
    pub out: W,
    /// What lies where in it.
    pub table: Table,
    /// The SHA-256 of the data blob.
    pub sha256: [u8; 32],
}

impl<W: Write> LayerEncoder<W> {
    /// Begins a data blob with zstd's `level`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a level that zstd does not have.
    pub fn new(out: W, power: WindowPower, level: i32) -> Result<Self> {
        let unusable = |error| {
            let text = format!("zstd has no level {level}: give 1 to 19");
            Error::with_source(ErrorKind::InvalidInput, text, error)
        };
        let mut compressor = Compressor::new(level).map_err(unusable)?;
        for parameter in [
            CParameter::ContentSizeFlag(true),
            CParameter::ChecksumFlag(false),
        ] {
            compressor.set_parameter(parameter).map_err(unusable)?;
        }
        Ok(LayerEncoder {
            out,
            compressor,
            salt: None,
            power,
            extents: Vec::new(),
            chunks: Vec::new(),
            window: None,
            plain: Vec::new(),
            len: 0,
            hasher: Sha256::new(),
        })
    }

    /// The same, but chunks are encrypted with keys of the salt, if there is one: docs/encryption.md, "Bytes".
    pub fn encrypted(mut self, salt: Option<&Salt>) -> Self {
        self.salt = salt.cloned();
        self
    }

    /// Adds data blocks. Asserts that they come behind those before.
    ///
    /// # Errors
    /// Where the blob cannot be written.
    pub fn data(&mut self, start: Block, bytes: &[u8]) -> Result<()> {
        let span = Span::of_buffer(start, bytes);
        self.push(Run::new(span, BlockState::Data));
        let mut at = span.start();
        while at < span.end() {
            let window = self.power.window_of(at);
            if self.window != Some(window) {
                self.end_chunk()?;
                self.window = Some(window);
            }
            let end = (u64::from(window) + 1) * self.power.blocks().get();
            let here = Span::between(at, span.end().min(Block::new(end)));
            let from = Span::between(span.start(), at).len().buffer_len();
            let bytes = part(bytes, from, here.len().buffer_len());
            self.plain.extend_from_slice(bytes);
            at = here.end();
        }
        Ok(())
    }

    /// Adds blocks that are zero. Asserts that they come behind those before.
    pub fn zero(&mut self, span: Span) {
        self.push(Run::new(span, BlockState::Zero));
    }

    fn push(&mut self, run: Run<BlockState>) {
        if let Some(last) = self.extents.last() {
            assert!(last.end() <= run.start(), "the blocks of a layer in order");
        }
        push_run(&mut self.extents, run);
    }

    /// Writes the chunk that is being filled.
    fn end_chunk(&mut self) -> Result<()> {
        let Some(window) = self.window.take() else {
            return Ok(());
        };
        let mut stored = self
            .compressor
            .compress(&self.plain)
            .context(|| "compressing blocks")?;
        self.plain.clear();
        // Of exactly what is encrypted with it: another level gives another frame of the same blocks.
        let key = self.salt.as_ref().map(|salt| salt.chunk_key(&stored));
        if let Some(key) = &key {
            key.seal(&mut stored);
        }
        self.out
            .write_all(&stored)
            .context(|| "writing the data of a layer")?;
        self.hasher.update(&stored);
        self.chunks.push(Chunk {
            window,
            len: stored.len() as u32,
            offset: self.len,
            sha256: Sha256::digest(&stored).into(),
            key,
        });
        self.len += stored.len() as u64;
        Ok(())
    }

    /// Ends the blob of a layer of that virtual size and digest.
    ///
    /// # Errors
    /// Where the blob cannot be written.
    pub fn finish(mut self, virtual_size: u64, digest: [u8; 32]) -> Result<Encoded<W>> {
        self.end_chunk()?;
        self.out.flush().context(|| "writing the data of a layer")?;
        Ok(Encoded {
            out: self.out,
            table: Table {
                virtual_size,
                power: self.power,
                digest,
                extents: self.extents,
                chunks: self.chunks,
                data_len: self.len,
            },
            sha256: self.hasher.finalize().into(),
        })
    }
}

/// Turns stored chunks into blocks.
pub struct ChunkReader {
    decompressor: Decompressor<'static>,
    /// A frame that was decrypted.
    frame: Vec<u8>,
    plain: Vec<u8>,
}

impl ChunkReader {
    /// A reader for chunks of any layer.
    ///
    /// # Errors
    /// Where zstd has no memory.
    pub fn new() -> Result<Self> {
        let mut decompressor = Decompressor::new().context(|| "starting zstd")?;
        decompressor
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
            .context(|| "limiting the memory of zstd")?;
        Ok(ChunkReader {
            decompressor,
            frame: Vec::new(),
            plain: Vec::new(),
        })
    }

    /// The blocks of a window, with their bytes, of what is stored for it. It is compared with its SHA-256
    /// before it is decoded, and with its tag where it is encrypted.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn blocks<'a>(
        &'a mut self,
        window: &'a Window,
        stored: &[u8],
    ) -> Result<impl Iterator<Item = (Span, &'a [u8])>> {
        let chunk = &window.chunk;
        let bad = |what: &str| {
            let (number, offset, len) = (chunk.window, chunk.offset, chunk.len);
            corrupt(format!(
                "the chunk of the window {number} ({len} bytes at {offset}) {what}"
            ))
        };
        if stored.len() != chunk.len as usize {
            return Err(bad(&format!(
                "is cut off: {} bytes are there",
                stored.len()
            )));
        }
        if <[u8; 32]>::from(Sha256::digest(stored)) != chunk.sha256 {
            return Err(bad("does not match its SHA-256"));
        }
        let frame = match &chunk.key {
            None => stored,
            Some(key) => {
                self.frame.clear();
                self.frame.extend_from_slice(stored);
                let opened = key.open(&mut self.frame);
                opened.ok_or_else(|| bad("does not match its tag, and cannot be decrypted"))?
            }
        };
        self.plain.resize(window.plain_len(), 0);
        let written = self
            .decompressor
            .decompress_to_buffer(frame, &mut self.plain[..])
            .map_err(|error| bad(&format!("cannot be decompressed: {error}")))?;
        if written != self.plain.len() {
            let need = self.plain.len();
            return Err(bad(&format!("has {written} bytes in it instead of {need}")));
        }
        let mut rest = &self.plain[..];
        Ok(window.blocks.iter().map(move |span| {
            let len = span.len().buffer_len();
            let bytes = part(rest, 0, len);
            rest = part_from(rest, len);
            (*span, bytes)
        }))
    }
}
