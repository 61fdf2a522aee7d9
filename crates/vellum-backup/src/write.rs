//! Blocks into a stream.

use std::io::Write;

use sha2::{Digest, Sha256};
use zstd::bulk::Compressor;

use crate::header::Header;
use crate::read::{BACKUP, Resume};
use crate::record::{self, MAX_DATA, MAX_EXTENTS, Totals};
use vellum_base::block::{
    BLOCK_LEN, Block, BlockState, Blocks, Run, Span, part, part_from, push_run,
};
use vellum_base::error::{Error, Result, ResultExt};

/// zstd's own default: most of what higher levels save, in a fraction of their time.
const LEVEL: i32 = 3;

/// Records into a stream: what backups and layer files have in common. Blocks are gathered into chunks; each
/// record is one write.
pub(crate) struct Records<W> {
    out: W,
    /// What it is, for messages.
    what: &'static str,
    digest: Sha256,
    totals: Totals,
    /// Records so far.
    number: u64,
    /// No block before this one may be written any more.
    at: Block,
    size: Block,
    /// The chunk that is being gathered.
    extents: Vec<Run<BlockState>>,
    data: Vec<u8>,
    compressor: Compressor<'static>,
}

impl<W> std::fmt::Debug for Records<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Writer({:?} until {} of the {})",
            self.totals, self.at, self.what
        )
    }
}

impl<W: Write> Records<W> {
    /// Begins with `front`, for `blocks` blocks.
    pub fn new(out: W, what: &'static str, front: &[u8], blocks: Blocks) -> Result<Self> {
        let mut records = Records {
            out,
            what,
            digest: Sha256::new(),
            totals: Totals::default(),
            number: 0,
            at: Block::FIRST,
            size: Block::FIRST + blocks,
            extents: Vec::new(),
            data: Vec::new(),
            compressor: compressor()?,
        };
        records.put(front)?;
        Ok(records)
    }

    /// Writes a record that begins a layer of `blocks` blocks.
    pub fn layer(&mut self, payload: &[u8], blocks: Blocks) -> Result<()> {
        self.put_chunk()?;
        let record = record::layer(payload, self.number);
        self.put(&record)?;
        self.number += 1;
        self.at = Block::FIRST;
        self.size = Block::FIRST + blocks;
        Ok(())
    }

    /// The whole blocks in `data`, from `start` on. Asserts that they are behind those before, and within the
    /// device.
    pub fn data(&mut self, start: Block, data: &[u8]) -> Result<()> {
        let whole = Span::of_buffer(start, data);
        self.check_next(whole);
        let mut rest = data;
        let mut at = start;
        while at < whole.end() {
            self.make_room()?;
            let room = MAX_DATA - Blocks::in_buffer(&self.data);
            let span = Span::between(at, whole.end()).at_most(room);
            let len = span.len().buffer_len();
            self.data.extend_from_slice(part(rest, 0, len));
            rest = part_from(rest, len);
            push_run(&mut self.extents, Run::new(span, BlockState::Data));
            at = span.end();
        }
        self.at = at;
        Ok(())
    }

    /// Blocks that are zero, as [`Records::data`].
    pub fn zero(&mut self, span: Span) -> Result<()> {
        self.check_next(span);
        self.make_room()?;
        push_run(&mut self.extents, Run::new(span, BlockState::Zero));
        self.at = span.end();
        Ok(())
    }

    fn check_next(&self, span: Span) {
        assert!(
            self.at <= span.start() && span.end() <= self.size && !span.is_empty(),
            "{span} behind block {} of {}",
            self.at,
            self.size
        );
    }

    /// Writes the chunk where it is full.
    fn make_room(&mut self) -> Result<()> {
        let is_full = self.extents.len() == MAX_EXTENTS || self.data.len() == MAX_DATA.buffer_len();
        if is_full { self.put_chunk() } else { Ok(()) }
    }

    fn put_chunk(&mut self) -> Result<()> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let frame = match self.data.is_empty() {
            true => Vec::new(),
            false => self
                .compressor
                .compress(&self.data)
                .context(|| format!("cannot compress a part of the {}", self.what))?,
        };
        let chunk = record::chunk(&self.extents, &frame, self.number);
        self.put(&chunk)?;
        let data = record::data_of(&self.extents);
        let all: Blocks = self.extents.iter().map(Run::len).sum();
        self.number += 1;
        self.totals.chunks += 1;
        self.totals.data += data;
        self.totals.zero += all - data;
        self.extents.clear();
        self.data.clear();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .context(|| format!("cannot write the {}", self.what))?;
        self.digest.update(bytes);
        Ok(())
    }

    /// Writes what is left, and the end. Nothing is synced.
    pub fn finish(mut self) -> Result<(Totals, W)> {
        self.put_chunk()?;
        let end = record::end(&self.totals, &self.digest, self.number);
        self.out
            .write_all(&end)
            .and_then(|()| self.out.flush())
            .context(|| format!("cannot write the end of the {}", self.what))?;
        Ok((self.totals, self.out))
    }
}

/// Writes a backup. What it was given is gathered into chunks; [`Writer::finish`] writes the last one and the
/// end. Each record is one write.
#[derive(Debug)]
pub struct Writer<W>(Records<W>);

impl<W: Write> Writer<W> {
    /// Begins a backup: writes the header, and the description, which the format knows nothing of.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::InvalidInput`] for impossible sizes, or a description longer than
    /// [`MAX_DESCRIPTION`](crate::MAX_DESCRIPTION); where `out` fails.
    pub fn new(out: W, header: &Header, description: &[u8]) -> Result<Self> {
        let front = [&header.encode(description)?, description].concat();
        let blocks = Blocks::whole_in(header.virtual_size);
        Records::new(out, BACKUP, &front, blocks).map(Writer)
    }

    /// Goes on with a backup that was cut off: `out` stands behind its last whole chunk.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn resume(out: W, resume: Resume) -> Result<Self> {
        Ok(Writer(Records {
            out,
            what: BACKUP,
            digest: resume.digest,
            number: resume.totals.chunks,
            totals: resume.totals,
            at: resume.at,
            size: resume.size,
            extents: Vec::new(),
            data: Vec::new(),
            compressor: compressor()?,
        }))
    }

    /// The block from which on blocks are expected: those before are done with.
    pub fn at(&self) -> Block {
        self.0.at
    }

    /// The whole blocks in `data`, from `start` on. Asserts that they are behind those before, and within the
    /// device.
    ///
    /// # Errors
    /// Where the stream cannot be written: then it is cut off there.
    pub fn data(&mut self, start: Block, data: &[u8]) -> Result<()> {
        self.0.data(start, data)
    }

    /// Blocks that are zero, as [`Writer::data`].
    ///
    /// # Errors
    /// As [`Writer::data`].
    pub fn zero(&mut self, span: Span) -> Result<()> {
        self.0.zero(span)
    }

    /// Writes what is left, and the end. Nothing is synced.
    ///
    /// # Errors
    /// As [`Writer::data`].
    pub fn finish(self) -> Result<(Totals, W)> {
        self.0.finish()
    }
}

fn compressor() -> Result<Compressor<'static>> {
    Compressor::new(LEVEL).map_err(|error| Error::io("starting zstd", error))
}

const _: () = assert!(MAX_DATA.buffer_len().is_multiple_of(BLOCK_LEN));
