//! One request against the device: checks, the call, and the bytes of the reply.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::handshake::Negotiated;
use super::protocol::{
    ChunkHeader, Command, Errno, Headers, Request, chunk, command_flag as flag, simple_reply,
};
use super::status::{Contexts, clip};
use crate::pace::Class;
use vellum_base::block::{BlockDevice, Durability, ExtentKind, ZeroMode, in_memory};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::refuses_to_stall;

/// The longest run of bytes that a structured read sends in one chunk, where the client lets it:
/// so much memory a long read takes. Shorter chunks cost the client more than they gain.
const READ_PIECE: usize = 1 << 20;
/// Reads shorter than this are not searched for holes, in bytes.
const HOLES_FROM: u64 = 32 << 10;
/// The most extents of a read that are sent apart; what is beyond is sent as data.
const READ_EXTENTS: usize = 16;
/// The longest text that goes with an error, in bytes.
const MAX_TEXT: usize = 512;

/// Bytes on their way to a client. Memory is kept, and zeroed only when it is new.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
}

impl Buffer {
    /// The bytes in it.
    #[expect(
        clippy::indexing_slicing,
        reason = "the memory is never shorter than `len`"
    )]
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// How many bytes are in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How much memory it holds, in bytes.
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Forgets the bytes from `len` on.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes it `more` bytes longer and hands them out, whatever they hold, to be overwritten.
    #[expect(
        clippy::indexing_slicing,
        reason = "the memory was just made long enough"
    )]
    pub(super) fn extend(&mut self, more: usize) -> &mut [u8] {
        let start = self.len;
        self.len += more;
        if self.bytes.len() < self.len {
            if start == 0 {
                // Fresh memory comes zeroed from the kernel and is not touched until it is used.
                self.bytes = vec![0; self.len];
            } else {
                self.bytes.resize(self.len, 0);
            }
        }
        &mut self.bytes[start..self.len]
    }

    /// Appends `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.extend(bytes.len()).copy_from_slice(bytes);
    }
}

/// Why a request gets an error instead of being carried out.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) errno: Errno,
    text: Cow<'static, str>,
    /// Blocks are not here; the request may be done again by who may wait for them.
    absent: bool,
}

impl Refusal {
    pub(super) fn new(errno: Errno, text: impl Into<Cow<'static, str>>) -> Self {
        Refusal {
            errno,
            text: text.into(),
            absent: false,
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal {
            absent: error.kind() == ErrorKind::Absent && refuses_to_stall(),
            ..Refusal::new(error.kind().into(), error.to_string())
        }
    }
}

/// What to do with a request that finds the host's disk full.
#[derive(Clone, Copy)]
pub(super) enum Patience<'a> {
    /// Leave it to be tried again by one who may wait.
    Return,
    /// Wait for room for a while, unless this says that the server ends.
    Wait(&'a AtomicBool),
    /// Tell the client.
    Refuse,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Its reply is there.
    Done,
    /// It wants room on the host's disk, and nothing was said to the client: [`Patience::Return`].
    WantsRoom,
}

/// A connection's view of its device.
pub(super) struct Session {
    device: Arc<dyn BlockDevice>,
    name: String,
    size: u64,
    read_only: bool,
    headers: Headers,
    contexts: Contexts,
    /// The client has made a request: it is no idle connection that only takes a place.
    busy: Arc<AtomicBool>,
}

/// Where full buffers go in the middle of a reply; leaves the buffer empty.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&mut Buffer) -> Result<()>;

impl Session {
    /// `busy` is set at the first request.
    pub(super) fn new(negotiated: Negotiated, busy: Arc<AtomicBool>) -> Self {
        let export = &negotiated.export;
        Session {
            name: export.name.clone(),
            size: export.device.size(),
            read_only: export.is_read_only(),
            device: Arc::clone(&export.device),
            headers: negotiated.headers,
            contexts: Contexts(negotiated.contexts),
            busy,
        }
    }

    /// How the client's requests are framed.
    pub(super) fn headers(&self) -> Headers {
        self.headers
    }

    /// Decides whether a request can be carried out, before any of it is.
    pub(super) fn check(&self, request: &Request) -> Result<Command, Refusal> {
        let inval = |text: &'static str| Err(Refusal::new(Errno::Inval, text));
        let Some(command) = Command::from_wire(request.command) else {
            return inval("the server does not know this command");
        };
        if request.flags & !command.valid_flags(self.headers) != 0 {
            return inval("the request has a flag that its command does not have");
        }
        if command == Command::Disconnect {
            return Ok(command);
        }
        if !self.busy.load(Relaxed) {
            self.busy.store(true, Relaxed);
        }
        if command == Command::Flush {
            return match (request.offset, request.len) {
                (0, 0) => Ok(command),
                _ => inval("a flush has no offset and no length"),
            };
        }
        let writes = matches!(
            command,
            Command::Write | Command::Trim | Command::WriteZeroes
        );
        if writes && self.read_only {
            return Err(Refusal::new(Errno::Perm, "the export is read-only"));
        }
        if command == Command::BlockStatus && self.contexts.is_empty() {
            return inval("no metadata context was selected for this export");
        }
        if request.flags & flag::DF != 0 && !self.headers.chunks() {
            return inval("DF needs structured replies");
        }
        if request.len == 0 {
            return inval("the request has length 0");
        }
        if matches!(command, Command::Read | Command::Write) && request.is_too_long() {
            let errno = if command == Command::Read && self.headers.chunks() {
                Errno::Overflow
            } else {
                Errno::Inval
            };
            return Err(Refusal::new(
                errno,
                "the request is longer than the limit of 32 MiB",
            ));
        }
        let end = request.offset.checked_add(request.len);
        if end.is_none_or(|end| end > self.size) {
            let errno = match command {
                Command::Write | Command::WriteZeroes => Errno::NoSpc,
                _ => Errno::Inval,
            };
            return Err(Refusal::new(
                errno,
                "the request reaches past the end of the export",
            ));
        }
        Ok(command)
    }

    /// The memory that a checked request takes while it is carried out, in bytes.
    pub(super) fn memory(&self, command: Command, request: &Request) -> usize {
        match command {
            Command::Read if self.in_pieces(request) => in_memory(request.len).min(READ_PIECE),
            Command::Read | Command::Write => in_memory(request.len),
            Command::BlockStatus => self.contexts.memory(self.headers),
            _ => 0,
        }
    }

    /// True where requests may wait for what others bring.
    pub(super) fn may_stall(&self) -> bool {
        self.device.may_stall()
    }

    /// True when a read may be answered in several chunks.
    fn in_pieces(&self, request: &Request) -> bool {
        self.headers.chunks() && request.flags & flag::DF == 0
    }

    /// Carries out a checked request and appends its reply to `out`, which may go to `sink` in
    /// between. An error of the device becomes an error for the client.
    ///
    /// # Errors
    /// Those of `sink`.
    pub(super) fn execute(
        &self,
        command: Command,
        request: &Request,
        payload: &[u8],
        patience: Patience<'_>,
        out: &mut Buffer,
        sink: Sink<'_>,
    ) -> Result<Outcome> {
        let Request { offset, len, .. } = *request;
        let durability = if request.flags & flag::FUA != 0 {
            Durability::Durable
        } else {
            Durability::Buffered
        };
        let done = match command {
            Command::Read => return self.read(request, out, sink).map(|()| Outcome::Done),
            Command::BlockStatus => {
                match (self.contexts).answer(&*self.device, request, self.headers, out) {
                    Ok(()) => return Ok(Outcome::Done),
                    Err(refusal) => Err(refusal),
                }
            }
            Command::Write => {
                let write = || self.device.write_at(payload, offset, durability);
                match self.patiently(patience, write) {
                    Some(done) => done.map_err(Refusal::from),
                    None => return Ok(Outcome::WantsRoom),
                }
            }
            Command::Flush => {
                crash_point::here("nbd: flush");
                self.device.flush().map_err(Refusal::from)
            }
            Command::Trim => self
                .device
                .discard(offset, len)
                .and_then(|()| match durability {
                    Durability::Durable => self.device.flush(),
                    Durability::Buffered => Ok(()),
                })
                .map_err(Refusal::from),
            Command::WriteZeroes => match self.write_zeroes(request, durability, patience) {
                Some(done) => done,
                None => return Ok(Outcome::WantsRoom),
            },
            // Only a hint: that it went unheard does no harm.
            Command::Cache => {
                let _ = self.device.prefetch(offset, len);
                Ok(())
            }
            Command::Disconnect => return Ok(Outcome::Done),
        };
        match done {
            Ok(()) => self.acknowledge(request, out),
            Err(refusal) => self.refuse(request, &refusal, out),
        }
        Ok(Outcome::Done)
    }

    /// To be asked after each request: `Some` where it says something of whether a flush comes next, and
    /// [`Session::flush_ahead`] is worth its while then.
    pub(super) fn expects_flush(&self, command: Command, request: &Request) -> Option<bool> {
        match command {
            Command::Write if request.flags & flag::FUA == 0 => Some(self.device.expects_flush()),
            Command::Write | Command::Flush => Some(false),
            _ => None,
        }
    }

    /// Begins what the next flush would have to do; for when nobody waits for an answer.
    pub(super) fn flush_ahead(&self) {
        self.device.flush_ahead();
    }

    /// Does what wants space as `patience` says; `None`: it is to be tried again.
    fn patiently(
        &self,
        patience: Patience<'_>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Option<Result<()>> {
        let mut result = work();
        while result.as_ref().is_err_and(Error::is_full_disk) {
            match patience {
                Patience::Return => return None,
                Patience::Wait(ends) if !ends.load(Relaxed) && self.device.wait_for_room() => {
                    result = work();
                }
                Patience::Wait(_) | Patience::Refuse => break,
            }
        }
        Some(result)
    }

    /// Appends the reply to a request that was carried out and is not answered with anything else.
    fn acknowledge(&self, request: &Request, out: &mut Buffer) {
        match self.headers {
            Headers::Simple | Headers::Structured => {
                out.push(&simple_reply(0, request.cookie));
            }
            Headers::Extended => self.chunk(true, chunk::NONE, request, 0, out),
        }
    }

    /// Appends the header of a chunk with `len` bytes of payload.
    fn chunk(&self, last: bool, kind: u16, request: &Request, len: usize, out: &mut Buffer) {
        let flags = done(last);
        let header = ChunkHeader::new(self.headers, flags, kind, request, len as u32);
        out.push(header.bytes());
    }

    /// Appends the header of a chunk of data, and the offset that precedes its bytes.
    fn data_header(&self, last: bool, request: &Request, at: u64, len: usize, out: &mut Buffer) {
        self.chunk(last, chunk::OFFSET_DATA, request, len + 8, out);
        out.push(&at.to_be_bytes());
    }

    /// Appends the error reply to a request.
    pub(super) fn refuse(&self, request: &Request, refusal: &Refusal, out: &mut Buffer) {
        let Refusal {
            errno,
            text,
            absent,
        } = refusal;
        if matches!(errno, Errno::Io) && !absent {
            tracing::warn!(export = %self.name, ?request, "request failed: {text}");
        } else {
            tracing::debug!(export = %self.name, ?request, ?errno, "request refused: {text}");
        }
        if !self.headers.chunks() {
            out.push(&simple_reply(*errno as u32, request.cookie));
            return;
        }
        let text = shorten(text);
        self.chunk(true, chunk::ERROR, request, 6 + text.len(), out);
        out.push(&(*errno as u32).to_be_bytes());
        out.push(&(text.len() as u16).to_be_bytes());
        out.push(text.as_bytes());
    }

    /// Carries out a part of a checked write; it is durable only after [`Session::finish_write`].
    ///
    /// # Errors
    /// What to tell the client.
    pub(super) fn write_piece(&self, payload: &[u8], offset: u64) -> Result<(), Refusal> {
        self.device
            .write_at(payload, offset, Durability::Buffered)
            .map_err(Refusal::from)
    }

    /// Appends the reply to a write of which all pieces were written, or that was refused.
    pub(super) fn finish_write(
        &self,
        request: &Request,
        refusal: Option<Refusal>,
        out: &mut Buffer,
    ) {
        let done = match refusal {
            Some(refusal) => Err(refusal),
            None if request.flags & flag::FUA != 0 => self.device.flush().map_err(Refusal::from),
            None => Ok(()),
        };
        match done {
            Ok(()) => self.acknowledge(request, out),
            Err(refusal) => self.refuse(request, &refusal, out),
        }
    }

    fn read(&self, request: &Request, out: &mut Buffer, sink: Sink<'_>) -> Result<()> {
        if self.in_pieces(request) {
            return self.read_pieces(request, out, sink);
        }
        let start = out.len();
        let len = in_memory(request.len);
        if self.headers.chunks() {
            self.data_header(true, request, request.offset, len, out);
        } else {
            out.push(&simple_reply(0, request.cookie));
        }
        // Nothing is sent before all of it is read, so an error can still take its place.
        if let Err(error) = self.device.read_at(out.extend(len), request.offset) {
            out.truncate(start);
            self.refuse(request, &error.into(), out);
        }
        Ok(())
    }

    /// Answers a read with chunks of data and holes, as they come.
    fn read_pieces(&self, request: &Request, out: &mut Buffer, sink: Sink<'_>) -> Result<()> {
        let end = request.offset + request.len;
        let mut holes = self.holes(request).into_iter();
        let mut hole = holes.next();
        let mut at = request.offset;
        while at < end {
            let start = out.len();
            if let Some((from, len)) = hole.filter(|(from, _)| *from == at) {
                at += len;
                hole = holes.next();
                self.chunk(at == end, chunk::OFFSET_HOLE, request, 12, out);
                out.push(&from.to_be_bytes());
                // A hole lies within the request, which is no longer than the limit.
                out.push(&(len as u32).to_be_bytes());
                continue;
            }
            let until = hole.map_or(end, |(from, _)| from);
            let len = (until - at).min(READ_PIECE as u64) as usize;
            let last = at + len as u64 == end;
            self.data_header(last, request, at, len, out);
            if let Err(error) = self.device.read_at(out.extend(len), at) {
                out.truncate(start);
                self.refuse(request, &error.into(), out);
                return Ok(());
            }
            at += len as u64;
            // What is full goes out before the next piece is read.
            if !last && out.len() >= READ_PIECE {
                sink(out)?;
            }
        }
        Ok(())
    }

    /// The parts of a read that are known to be zeros, as offset and length, in order.
    fn holes(&self, request: &Request) -> Vec<(u64, u64)> {
        let mut holes: Vec<(u64, u64)> = Vec::new();
        if request.len < HOLES_FROM {
            return holes;
        }
        // Where this fails, the read itself will say why.
        let extents = self
            .device
            .extents(request.offset, request.len, READ_EXTENTS)
            .unwrap_or_default();
        for extent in clip(&extents, request) {
            if extent.kind == ExtentKind::Data {
                continue;
            }
            match holes.last_mut() {
                Some((from, len)) if *from + *len == extent.offset => *len += extent.len,
                _ => holes.push((extent.offset, extent.len)),
            }
        }
        holes
    }

    fn write_zeroes(
        &self,
        request: &Request,
        durability: Durability,
        patience: Patience<'_>,
    ) -> Option<Result<(), Refusal>> {
        let mode = if request.flags & flag::NO_HOLE != 0 {
            ZeroMode::KeepAllocated
        } else {
            ZeroMode::MayUnmap
        };
        // Unmapping changes the map alone; keeping the space may mean to write it.
        if request.flags & flag::FAST_ZERO != 0 && mode == ZeroMode::KeepAllocated {
            return Some(Err(Refusal::new(
                Errno::NotSup,
                "zeroing without a hole is not faster than writing",
            )));
        }
        let Request { offset, len, .. } = *request;
        let zero = || self.device.write_zeroes(offset, len, mode, durability);
        let done = self.patiently(patience, zero)?;
        Some(done.map_err(Refusal::from))
    }
}

/// How long a request may be expected to take; `long`: it has many bytes.
pub(super) fn class(command: Command, request: &Request, long: bool) -> Class {
    let durable = request.flags & flag::FUA != 0;
    match command {
        Command::Read if long => Class::LongRead,
        Command::Read => Class::Read,
        Command::Flush => Class::Durable,
        Command::Write | Command::Trim | Command::WriteZeroes if durable => Class::Durable,
        Command::Write if long => Class::LongWrite,
        Command::Write => Class::Write,
        Command::Trim | Command::WriteZeroes => Class::Zero,
        Command::BlockStatus | Command::Cache | Command::Disconnect => Class::Other,
    }
}

pub(super) fn done(last: bool) -> u16 {
    if last { chunk::FLAG_DONE } else { 0 }
}

/// Cuts a text for the client to a length that every client reads.
fn shorten(text: &str) -> &str {
    let mut len = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    text.split_at(len).0
}
