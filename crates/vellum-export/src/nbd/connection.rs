//! Transmission: requests in, replies out, on one or several threads.
//!
//! Of a connection's threads one at a time is the reader: it owns the socket's receiving side and
//! a buffer that takes many requests with one system call. Requests of a fast class it serves on
//! the spot, straight from that buffer, and sends the replies together once the buffer is used
//! up. Before it serves a request of a slow class it gives up the reader's role, so that another
//! thread reads on.

mod ahead;
mod aside;
mod crew;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use self::ahead::Expectation;
use self::aside::{Job, Served};
pub(super) use self::crew::Helpers;
use self::crew::{Alone, Crew, Role, Scoped, Stays, Threads};
use super::exec::{Buffer, Outcome, Patience, Refusal, Session, class};
use super::memory::{Budget, Memory, OWN, Share};
use super::protocol::{self as wire, Command, Request};
use super::stall::{Clock, receiving, torn};
use super::stream::Stream;
use crate::pace::{Class, Pace};
use vellum_base::block::in_memory;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::unless_it_stalls;

/// Size of the buffer that requests are received into, in bytes.
const INPUT: usize = 256 << 10;
/// Payloads up to this length are received together with other requests, in bytes.
const SHORT: u64 = 64 << 10;
/// So many bytes of replies are sent even when there are more requests to serve first.
const BATCH: usize = 64 << 10;
/// Payloads up to this length are skipped when their request is refused, in bytes.
const MAX_SKIPPED: u64 = 2 * wire::MAX_PAYLOAD as u64;

/// They are received in pieces of this many bytes.
const SCRAP: usize = 64 << 10;

/// Writes longer than [`OWN`] go to the device in pieces of this many bytes, as they come.
const PIECE: usize = 1 << 20;

/// What one connection may use.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Threads, at least 1.
    pub(super) threads: usize,
    /// Threads where requests may wait for what others bring.
    pub(super) threads_where_reads_stall: usize,
    /// Those that other connections want, too.
    pub(super) helpers: Arc<Helpers>,
    /// Bytes of long requests in flight; one request is always let through.
    pub(super) bytes_in_flight: usize,
    /// What they count against together with those of other connections.
    pub(super) memory: Arc<Memory>,
    /// How long a client may stall in the middle of a request.
    pub(super) stall: Duration,
}

/// A client in its transmission phase.
pub(super) struct Connection<S> {
    stream: S,
    session: Session,
    limits: Limits,
    role: Mutex<Role>,
    /// Somebody gave up the reader's role.
    free: Condvar,
    writer: Mutex<()>,
    pace: Pace,
    budget: Budget,
    threads: Threads,
    expectation: Expectation,
    /// Requests that wait for room on the host's disk, and the bytes of their payloads.
    held: AtomicUsize,
    held_bytes: AtomicUsize,
    /// The server ends: nothing is held any more.
    ends: Arc<AtomicBool>,
}

/// What belongs to whoever reads.
struct Reader {
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Replies that have not been sent yet.
    out: Buffer,
}

/// What came of reading a request.
enum Step<'c> {
    /// Served; the next one, please.
    Next,
    /// To be served by this thread once another one reads.
    HandOver(Job<'c>),
    /// The client is done.
    End,
}

impl<S: Stream> Connection<S> {
    pub(super) fn new(stream: S, session: Session, limits: Limits, ends: Arc<AtomicBool>) -> Self {
        let threads = match session.may_stall() {
            true => limits.threads.max(limits.threads_where_reads_stall),
            false => limits.threads,
        };
        Connection {
            stream,
            session,
            role: Mutex::new(Role::new(Reader {
                input: vec![0; INPUT],
                start: 0,
                end: 0,
                out: Buffer::default(),
            })),
            free: Condvar::new(),
            writer: Mutex::new(()),
            pace: Pace::default(),
            budget: Budget::new(Arc::clone(&limits.memory), limits.bytes_in_flight),
            threads: Threads::new(threads, Arc::clone(&limits.helpers)),
            expectation: Expectation::default(),
            limits,
            held: AtomicUsize::new(0),
            held_bytes: AtomicUsize::new(0),
            ends,
        }
    }

    /// Serves the client on this thread and on others until it goes away, and waits for all that
    /// is in flight.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] and [`ErrorKind::Timeout`] for what the client did, or the
    /// stream's error.
    pub(super) fn serve(self) -> Result<()>
    where
        S: Sync,
    {
        thread::scope(|scope| self.work(&Scoped(scope), Stays::Always));
        self.finish()
    }

    /// Serves the client on this thread alone.
    pub(super) fn serve_alone(self) -> Result<()> {
        self.work(&Alone, Stays::Always);
        self.finish()
    }

    fn finish(self) -> Result<()> {
        self.stream.finish();
        self.role.into_inner().ended().unwrap_or(Ok(()))
    }

    /// Reads and serves until the connection ends.
    fn work<'c>(&'c self, crew: &impl Crew<'c, S>, stays: Stays) {
        let _abort = AbortOnPanic(self);
        let mut small = Buffer::default();
        let Some(mut reader) = self.lead(stays) else {
            return;
        };
        loop {
            match self.step(&mut reader, &mut small) {
                Ok(Step::Next) => {}
                Ok(Step::HandOver(job)) => {
                    let relieved = self.relieve(reader, crew);
                    let done = self.run_patiently(job, relieved, &mut small);
                    if done.is_err() {
                        // Wakes the reader, which then ends the connection.
                        self.stream.abort();
                    }
                    match self.lead(stays) {
                        Some(again) => reader = again,
                        None => return,
                    }
                }
                Ok(Step::End) => {
                    let sent = self.send(&mut reader.out);
                    return self.end(sent);
                }
                Err(error) => {
                    // What was served before may still be welcome, as far as it goes.
                    let _ = self.send(&mut reader.out);
                    return self.end(Err(error));
                }
            }
        }
    }

    /// Reads one request, and serves it where that is quick.
    fn step(&self, reader: &mut Reader, small: &mut Buffer) -> Result<Step<'_>> {
        let headers = self.session.headers();
        let head_len = headers.request_len();
        let request = loop {
            match Request::parse(reader.available(), headers)? {
                Some(request) => break request,
                None if !self.fill(reader, head_len)? => return Ok(Step::End),
                None => {}
            }
        };
        let command = match self.session.check(&request) {
            Ok(Command::Disconnect) => return Ok(Step::End),
            Ok(command) => command,
            Err(refusal) => {
                reader.start += head_len;
                self.refuse(reader, &request, &refusal)?;
                return self.next(reader);
            }
        };
        let payload_len = in_memory(request.payload_len(headers));
        if payload_len > OWN {
            self.write_in_pieces(reader, &request)?;
            return self.next(reader);
        }
        let long = matches!(command, Command::Read | Command::Write) && request.len > SHORT;
        let class = class(command, &request, long);
        // Half of a long read may be sent when it turns out that the rest is elsewhere.
        let slow = self.pace.is_slow(class) || (long && self.session.may_stall());
        if !long {
            let whole = head_len + payload_len;
            if reader.available().len() < whole && !self.fill(reader, whole)? {
                return Err(torn());
            }
        }
        if !long && !slow {
            return self.serve_at_once(reader, command, &request, class);
        }
        reader.start += head_len;
        let cost = self.session.memory(command, &request);
        let share = self.share(reader, cost)?;
        let mut job = Job {
            command,
            request,
            class,
            payload: Buffer::default(),
            share,
            wants_room: false,
        };
        if payload_len > 0 {
            job.payload = self.budget.memory().buffer(payload_len);
            self.receive(reader, job.payload.extend(payload_len))?;
        }
        self.send(&mut reader.out)?;
        self.expectation.set_apart(command);
        if slow {
            return Ok(Step::HandOver(job));
        }
        match self.run(job, small)? {
            Served::WantsRoom(job) => Ok(Step::HandOver(job)),
            Served::Done => Ok(Step::Next),
        }
    }

    /// Serves a request that was received whole, straight from the input. What wants blocks from elsewhere and a write
    /// that finds no room on the host are set apart, since whoever reads must not wait for that.
    #[expect(clippy::indexing_slicing, reason = "`step` received the whole request")]
    fn serve_at_once(
        &self,
        reader: &mut Reader,
        command: Command,
        request: &Request,
        class: Class,
    ) -> Result<Step<'_>> {
        let headers = self.session.headers();
        let len = in_memory(request.payload_len(headers));
        let Reader {
            input, start, out, ..
        } = reader;
        let from = *start + headers.request_len();
        *start = from + len;
        let payload = &input[from..*start];
        let before = out.len();
        // What may have to be done once more is not sent before it is done; it is short.
        let keep = &mut |_: &mut Buffer| Ok(());
        let mut execute = |payload: &[u8], patience: Patience<'_>, out: &mut Buffer| {
            self.session
                .execute(command, request, payload, patience, out, keep)
        };
        let began = Instant::now();
        let done = unless_it_stalls(|| execute(payload, self.first_patience(), out));
        let wants_room = match done.transpose()? {
            Some(Outcome::Done) => {
                self.pace.record(class, began.elapsed());
                let expected = self.session.expects_flush(command, request);
                self.expectation.learn(expected);
                return self.next(reader);
            }
            Some(Outcome::WantsRoom) => true,
            None => {
                out.truncate(before);
                false
            }
        };
        let mut kept = self.budget.memory().buffer(len);
        kept.push(payload);
        let share = match wants_room {
            true => self.budget.try_take(len),
            false => Some(self.share(reader, self.session.memory(command, request))?),
        };
        let Some(share) = share else {
            execute(kept.filled(), Patience::Refuse, &mut reader.out)?;
            return self.next(reader);
        };
        self.send(&mut reader.out)?;
        Ok(Step::HandOver(Job {
            command,
            request: *request,
            class,
            payload: kept,
            share,
            wants_room,
        }))
    }

    /// Memory of `cost` bytes for a request. What was answered before is sent if there is none yet:
    /// the client may wait for it.
    fn share(&self, reader: &mut Reader, cost: usize) -> Result<Share<'_>> {
        if let Some(share) = self.budget.try_take(cost) {
            return Ok(share);
        }
        self.send(&mut reader.out)?;
        Ok(self.budget.take(cost))
    }

    /// Serves a long write while it comes in, so that a client cannot have the server hold what it
    /// has not sent to its end. One that goes away in between has written a part, as the protocol
    /// lets it be with a write that was not answered.
    fn write_in_pieces(&self, reader: &mut Reader, request: &Request) -> Result<()> {
        reader.start += self.session.headers().request_len();
        let _share = self.share(reader, PIECE)?;
        let mut buffer = self.budget.memory().buffer(PIECE);
        let mut refusal = None;
        let mut done = 0;
        while done < request.len {
            let len = (request.len - done).min(PIECE as u64);
            buffer.truncate(0);
            let payload = buffer.extend(in_memory(len));
            self.receive(reader, payload)?;
            // After an error the rest is received and dropped: the next request lies behind it.
            if refusal.is_none() {
                let offset = request.offset + done;
                refusal = self.session.write_piece(payload, offset).err();
            }
            done += len;
        }
        self.session.finish_write(request, refusal, &mut reader.out);
        self.budget.memory().keep(buffer);
        Ok(())
    }

    /// Goes on to the next request, once there is room for its reply.
    fn next(&self, reader: &mut Reader) -> Result<Step<'_>> {
        if reader.out.len() >= BATCH {
            self.send(&mut reader.out)?;
        }
        Ok(Step::Next)
    }

    /// Answers a request that cannot be carried out, and skips its payload.
    fn refuse(&self, reader: &mut Reader, request: &Request, refusal: &Refusal) -> Result<()> {
        self.session.refuse(request, refusal, &mut reader.out);
        let payload = request.payload_len(self.session.headers());
        if payload > MAX_SKIPPED {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("the client announced a payload of {payload} bytes"),
            ));
        }
        let mut scrap = vec![0; in_memory(payload).min(SCRAP)];
        for at in (0..in_memory(payload)).step_by(SCRAP) {
            let (piece, _) = scrap.split_at_mut((in_memory(payload) - at).min(SCRAP));
            self.receive(reader, piece)?;
        }
        Ok(())
    }

    /// Receives until `want` bytes, at most the size of the input buffer, are available. False
    /// when the client closed the stream between two requests.
    #[expect(
        clippy::indexing_slicing,
        reason = "`start` and `end` lie within the input, in this order"
    )]
    fn fill(&self, reader: &mut Reader, want: usize) -> Result<bool> {
        // The client may wait for these before it sends more.
        self.send(&mut reader.out)?;
        if reader.start == reader.end {
            reader.start = 0;
            reader.end = 0;
            self.reader_waits();
        } else if reader.input.len() - reader.start < want {
            reader.input.copy_within(reader.start..reader.end, 0);
            reader.end -= reader.start;
            reader.start = 0;
        }
        let mut clock = Clock::default();
        let mut silent = false;
        while reader.available().len() < want {
            let between = reader.start == reader.end;
            let room = &mut reader.input[reader.end..];
            match self.stream.recv(room) {
                Ok(0) if between => return Ok(false),
                Ok(0) => return Err(torn()),
                Ok(len) => reader.end += len,
                // Between two requests a client may be silent as long as it likes.
                Err(error) if between && error.kind() == io::ErrorKind::WouldBlock => {
                    if !silent {
                        silent = true;
                        reader.forget();
                        self.budget.memory().forget();
                    }
                    continue;
                }
                Err(error) => return Err(receiving(error)),
            }
            self.expectation.reader_is_busy();
            clock.check(self.limits.stall, want)?;
        }
        Ok(true)
    }

    /// Fills `target` with the input's next bytes.
    #[expect(
        clippy::indexing_slicing,
        reason = "`ready` is at least as long as `head`, and a stream fills no more than it is given"
    )]
    fn receive(&self, reader: &mut Reader, target: &mut [u8]) -> Result<()> {
        let ready = reader.available();
        let (head, mut rest) = target.split_at_mut(ready.len().min(target.len()));
        head.copy_from_slice(&ready[..head.len()]);
        reader.start += head.len();
        let len = rest.len();
        if len > 0 {
            self.send(&mut reader.out)?;
        }
        let mut clock = Clock::default();
        while !rest.is_empty() {
            match self.stream.recv_whole(rest) {
                Ok(0) => return Err(torn()),
                Ok(got) => rest = &mut rest[got..],
                Err(error) => return Err(receiving(error)),
            }
            clock.check(self.limits.stall, len)?;
        }
        Ok(())
    }

    /// Sends what is in `out` and empties it.
    fn send(&self, out: &mut Buffer) -> Result<()> {
        if out.len() == 0 {
            return Ok(());
        }
        let sent = {
            let _writer = self.writer.lock();
            self.stream.send(out.filled())
        };
        out.truncate(0);
        sent.map_err(|error| Error::io("sending replies to the client", error))
    }
}

impl Reader {
    /// Bytes that were received and not yet used.
    #[expect(
        clippy::indexing_slicing,
        reason = "`start` and `end` lie within the input, in this order"
    )]
    fn available(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    /// Gives the memory of a client that is silent back to the system.
    fn forget(&mut self) {
        // Fresh memory is not there before it is used.
        self.input = vec![0; INPUT];
        self.out = Buffer::default();
    }
}

/// Ends the connection when one of its threads panics, so that neither the client nor the other threads are
/// left waiting.
struct AbortOnPanic<'a, S: Stream>(&'a Connection<S>);

impl<S: Stream> Drop for AbortOnPanic<'_, S> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stream.abort();
            self.0.end(Err(Error::internal(
                "a thread of an NBD connection panicked",
            )));
        }
    }
}
