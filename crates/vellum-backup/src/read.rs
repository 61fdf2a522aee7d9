//! A stream into blocks.

use std::io::{ErrorKind as IoKind, Read};

use sha2::{Digest, Sha256};
use zstd::bulk::Decompressor;

use crate::header::{HEADER_LEN, Header, MAGIC, MAX_DESCRIPTION};
use crate::record::{self, HEAD_LEN, Head, Kind, Totals, corrupt};
use vellum_base::block::{Block, BlockState, Blocks, Run};
use vellum_base::error::{Error, Result};

/// What a backup is called in messages.
pub(crate) const BACKUP: &str = "backup";

/// A stream into records, each of them checked: what backups and layer files have in common.
pub(crate) struct Records<R> {
    input: R,
    /// What it is, for messages.
    what: &'static str,
    /// Of all records before the one that is read.
    digest: Sha256,
    totals: Totals,
    /// Records before the one that is read.
    number: u64,
    /// Bytes before the record that is read.
    len: u64,
    at: Block,
    size: Block,
    ended: bool,
    extents: Vec<Run<BlockState>>,
    payload: Vec<u8>,
    data: Vec<u8>,
    decompressor: Decompressor<'static>,
}

/// Reads a backup, and checks every byte of it: headers and chunks as they come, the whole at its end.
pub struct Reader<R> {
    header: Header,
    description: Vec<u8>,
    records: Records<R>,
}

impl<R> std::fmt::Debug for Reader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({:?}, {:?})", self.header, self.records.totals)
    }
}

/// Blocks of a backup or layer that were checked.
#[derive(Debug)]
pub struct Chunk<'a> {
    extents: &'a [Run<BlockState>],
    data: &'a [u8],
}

/// Where a backup that was cut off goes on: [`Reader::into_resume`].
#[derive(Debug)]
pub struct Resume {
    pub(crate) digest: Sha256,
    pub(crate) totals: Totals,
    pub(crate) at: Block,
    pub(crate) size: Block,
    /// Bytes up to the end of the last whole chunk. What follows is to be cut off.
    pub len: u64,
}

impl<'a> Chunk<'a> {
    /// Its extents in order: what they are, [`BlockState::Data`] or [`BlockState::Zero`], and their bytes, none
    /// for zeros.
    pub fn pieces(&self) -> impl Iterator<Item = (Run<BlockState>, &'a [u8])> {
        let mut rest = self.data;
        self.extents.iter().map(move |run| {
            let len = match run.value {
                BlockState::Data => run.len().buffer_len(),
                _ => 0,
            };
            let (bytes, behind) = rest.split_at(len);
            rest = behind;
            (*run, bytes)
        })
    }
}

impl<R: Read> Records<R> {
    /// Nothing was read yet.
    pub fn new(input: R, what: &'static str) -> Result<Self> {
        Ok(Records {
            input,
            what,
            digest: Sha256::new(),
            totals: Totals::default(),
            number: 0,
            len: 0,
            at: Block::FIRST,
            size: Block::FIRST,
            ended: false,
            extents: Vec::new(),
            payload: Vec::new(),
            data: Vec::new(),
            decompressor: Decompressor::new().map_err(|error| Error::io("starting zstd", error))?,
        })
    }

    /// The first bytes: what is no record.
    pub fn front(&mut self, buf: &mut [u8]) -> Result<()> {
        fill(&mut self.input, buf, self.what)?;
        self.digest.update(&*buf);
        self.len += buf.len() as u64;
        Ok(())
    }

    /// Blocks are of a device of so many from here on.
    pub fn begin(&mut self, blocks: Blocks) {
        self.at = Block::FIRST;
        self.size = Block::FIRST + blocks;
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn position(&self) -> u64 {
        self.len
    }

    /// The next record; its chunk or payload is asked for then. `None` at the end, once the digest is right and
    /// nothing follows.
    pub fn next(&mut self) -> Result<Option<Kind>> {
        if self.ended {
            return Ok(None);
        }
        let number = self.number;
        let mut front = [0; HEAD_LEN];
        fill(&mut self.input, &mut front, self.what)?;
        let head = Head::decode(&front, number)?;
        self.payload.resize(head.payload, 0);
        fill(&mut self.input, &mut self.payload, self.what)?;
        head.check(&self.payload, number)?;
        if head.kind == Kind::End {
            record::check_end(&self.payload, &self.totals, &self.digest)?;
            self.check_nothing_follows()?;
            self.ended = true;
            return Ok(None);
        }
        if head.kind == Kind::Chunk {
            self.take_chunk(&head)?;
        }
        self.digest.update(front);
        self.digest.update(&self.payload);
        self.len += (HEAD_LEN + head.payload) as u64;
        self.number += 1;
        Ok(Some(head.kind))
    }

    fn take_chunk(&mut self, head: &Head) -> Result<()> {
        let frame = record::extents(head, &self.payload, self.at, self.size, &mut self.extents)?;
        decompress(
            &mut self.decompressor,
            frame,
            head.data,
            &mut self.data,
            self.number,
        )?;
        let all: Blocks = self.extents.iter().map(Run::len).sum();
        self.totals.chunks += 1;
        self.totals.data += head.data;
        self.totals.zero += all - head.data;
        self.at = self.extents.last().map_or(self.at, Run::end);
        Ok(())
    }

    /// The chunk that was read last.
    pub fn chunk(&self) -> Chunk<'_> {
        Chunk {
            extents: &self.extents,
            data: &self.data,
        }
    }

    /// The payload that was read last.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    fn check_nothing_follows(&mut self) -> Result<()> {
        match fill_if_any(&mut self.input, &mut [0], self.what)? {
            false => Ok(()),
            true => Err(corrupt(format!(
                "something follows the end of the {}",
                self.what
            ))),
        }
    }
}

/// Whether `input`, read from its beginning, is empty or a backup that was cut off before its first chunk: it holds no
/// block then.
///
/// # Errors
/// Where `input` fails.
pub fn ends_before_chunks(input: impl Read) -> std::io::Result<bool> {
    let mut front = Vec::new();
    let most = (HEADER_LEN + MAX_DESCRIPTION) as u64;
    input.take(most).read_to_end(&mut front)?;
    Ok(match front.first_chunk::<HEADER_LEN>() {
        Some(header) => Header::decode(header)
            .is_ok_and(|(_, described)| front.len() < HEADER_LEN + described.len),
        None => MAGIC.starts_with(&front) || front.starts_with(MAGIC),
    })
}

impl<R: Read> Reader<R> {
    /// Reads the header and the description.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Unsupported`] for what is no backup, or of another version or with features that are
    /// not known; [`vellum_base::ErrorKind::Corrupt`] where it is damaged or cut off; where `input` fails.
    pub fn new(input: R) -> Result<Self> {
        let mut records = Records::new(input, BACKUP)?;
        let mut front = [0; HEADER_LEN];
        records.front(&mut front)?;
        let (header, described) = Header::decode(&front)?;
        let mut description = vec![0; described.len];
        records.front(&mut description)?;
        if crc32fast::hash(&description) != described.crc {
            return Err(corrupt("the description does not match its CRC"));
        }
        records.begin(Blocks::whole_in(header.virtual_size));
        Ok(Reader {
            header,
            description,
            records,
        })
    }

    /// What it is a backup of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the writer said of it.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// What was read so far; all of it once [`Reader::chunk`] has returned `None`.
    pub fn totals(&self) -> Totals {
        self.records.totals()
    }

    /// Bytes of the backup up to the end of the last chunk.
    pub fn position(&self) -> u64 {
        self.records.position()
    }

    /// The next chunk; `None` once the end was read, the digest is right and nothing follows. Before that what
    /// was read may be replaced or cut off, and is to be shown to nobody.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Corrupt`] where it is damaged or cut off; where the input fails.
    pub fn chunk(&mut self) -> Result<Option<Chunk<'_>>> {
        match self.records.next()? {
            Some(Kind::Chunk) => Ok(Some(self.records.chunk())),
            Some(_) => Err(corrupt("a layer begins within a backup")),
            None => Ok(None),
        }
    }

    /// Where a writer goes on with this backup: behind the last chunk that was read.
    pub fn into_resume(self) -> Resume {
        let records = self.records;
        Resume {
            at: records.at,
            size: records.size,
            digest: records.digest,
            totals: records.totals,
            len: records.len,
        }
    }
}

/// Fills `buf`, whatever pieces the input comes in.
fn fill(input: &mut impl Read, buf: &mut [u8], what: &str) -> Result<()> {
    match fill_if_any(input, buf, what)? {
        true => Ok(()),
        false => Err(corrupt(format!(
            "the {what} is cut off: its end is missing"
        ))),
    }
}

/// False where the input ends before `buf` is full.
fn fill_if_any(input: &mut impl Read, buf: &mut [u8], what: &str) -> Result<bool> {
    match input.read_exact(buf) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == IoKind::UnexpectedEof => Ok(false),
        Err(error) => Err(Error::io(format!("cannot read the {what}"), error)),
    }
}

/// Decompresses a frame into a buffer of the length that its chunk says, and refuses any other.
fn decompress(
    decompressor: &mut Decompressor<'static>,
    frame: &[u8],
    data: Blocks,
    into: &mut Vec<u8>,
    number: u64,
) -> Result<()> {
    into.resize(data.buffer_len(), 0);
    let done = match frame.is_empty() {
        true => Ok(0),
        false => decompressor.decompress_to_buffer(frame, into.as_mut_slice()),
    };
    match done {
        Ok(len) if len == data.buffer_len() => Ok(()),
        Ok(len) => Err(corrupt(format!(
            "chunk {number} has {len} bytes of data instead of {}",
            data.bytes()
        ))),
        Err(error) => Err(corrupt(format!(
            "chunk {number} cannot be decompressed: {error}"
        ))),
    }
}
