//! How requests come from the kernel and answers go back: the small trait behind which the ways lie.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::abi::{self, ParseError, Request};
use super::readers::Readers;
use super::slot::{Owed, Slot};
use vellum_base::error::{Error, ErrorKind, Result};

/// Why a serving thread ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The file was unmounted or the session aborted: nobody will ask again.
    SessionOver,
    /// It was told to stop; the session lives on.
    Stopped,
}

/// What [`Transport::fetch`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched<T> {
    /// A request: its ticket.
    Request(T),
    /// There will be none any more.
    Over(Ended),
}

/// What a thread may wait for while it has a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// For anything, also for room on a host's disk that is full: others serve meanwhile.
    Any,
    /// For the host's disk, since nobody else seems to wait for this thread; not for blocks from elsewhere.
    Host,
    /// For nothing: others wait for this thread.
    None,
}

/// What to send.
#[derive(Debug)]
pub enum Reply {
    /// Nothing: the kernel does not expect an answer.
    None,
    /// An errno, 0 for success, and no body.
    Errno(i32),
    /// A short body in hand.
    Body(Body),
    /// So many bytes that lie where [`Transport::data`] said.
    Data(usize),
}

/// A reply's body of at most 104 bytes, with room for a header in front.
#[derive(Debug)]
pub struct Body {
    bytes: [u8; abi::OUT_HEADER_LEN + 104],
    len: usize,
}

impl Body {
    /// A copy of `body`.
    #[expect(
        clippy::indexing_slicing,
        reason = "replies are laid out in `abi`, none longer than 104 bytes"
    )]
    pub fn new(body: &[u8]) -> Body {
        let mut bytes = [0; abi::OUT_HEADER_LEN + 104];
        let len = body.len();
        bytes[abi::OUT_HEADER_LEN..abi::OUT_HEADER_LEN + len].copy_from_slice(body);
        Body { bytes, len }
    }

    /// The body alone.
    #[expect(
        clippy::indexing_slicing,
        reason = "`new` made `bytes` with room for `len`"
    )]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[abi::OUT_HEADER_LEN..abi::OUT_HEADER_LEN + self.len]
    }

    /// The whole reply, `header` in front.
    #[expect(
        clippy::indexing_slicing,
        reason = "`new` made `bytes` with room for `len`"
    )]
    fn with_header(&mut self, header: &[u8; abi::OUT_HEADER_LEN]) -> &[u8] {
        self.bytes[..abi::OUT_HEADER_LEN].copy_from_slice(header);
        &self.bytes[..abi::OUT_HEADER_LEN + self.len]
    }
}

/// One thread's way to the kernel: it fetches a request, says where its data are, and commits the
/// answer. Before an answer is sent it is noted for the successor of a process that dies then, where the
/// kernel would not send the request again.
pub trait Transport {
    /// Names a request that was fetched and not committed.
    type Ticket: Copy;

    /// Waits for the next request.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the way to the kernel fails.
    fn fetch(&mut self) -> Result<Fetched<Self::Ticket>>;

    /// What is asked; the inner error is for a request that is cut, which is answered with EINVAL.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] when the kernel sent what is no request.
    fn request(&self, ticket: Self::Ticket) -> Result<Result<Request<'_>, ParseError>>;

    /// The errno with which a process that is dead now carried the request out. What changes data must
    /// not be carried out again: the kernel may have had the answer, and written the same place since.
    fn carried_out(&self, ticket: Self::Ticket) -> Option<i32>;

    /// Where `len` bytes of a READ's data go; `None` where it asks for more than was agreed on.
    fn data(&mut self, ticket: Self::Ticket, len: usize) -> Option<&mut [u8]>;

    /// Answers; the ticket is spent. Says so where nobody will ask again.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel refuses the reply.
    fn commit(&mut self, ticket: Self::Ticket, reply: Reply) -> Result<Option<Ended>>;

    /// Sees to it that answers are on their way which were committed.
    ///
    /// # Errors
    /// As [`Transport::commit`].
    fn flush(&mut self) -> Result<()>;

    /// What the thread may wait for now.
    fn patience(&self) -> Patience;

    /// Gives a request that has to wait longer than [`Transport::patience`] allows to a thread that may;
    /// the ticket is spent.
    fn hand_over(&mut self, ticket: Self::Ticket);
}

/// read(2) of /dev/fuse for each request, write(2) for each reply.
#[derive(Debug)]
pub struct Classic<'a> {
    /// The session's descriptor.
    pub session: &'a File,
    /// The thread's buffer.
    pub slot: &'a mut Slot,
    /// Who of the threads takes the next request.
    pub readers: &'a Readers,
    /// Set to end the threads; one that waits for a request must be woken by a signal, and those
    /// that are spare by [`Readers::close`].
    pub stop: &'a AtomicBool,
    /// Note each request in the slot before answering it, for kernels that cannot resend.
    pub remember: bool,
}

impl Classic<'_> {
    /// The request that a dead server left in the slot, if there is one.
    pub fn owed(&mut self) -> Option<Owed> {
        let owed = self.slot.owed()?;
        if owed.done.is_none() {
            self.slot.taken(owed.len);
        }
        Some(owed)
    }

    fn unique(&self, ticket: Owed) -> Result<u64> {
        let unique = abi::unique(self.slot.request(ticket.len)?);
        unique.ok_or_else(|| no_request(ParseError::ShortHeader(ticket.len)))
    }
}

fn no_request(error: ParseError) -> Error {
    let what = "/dev/fuse: the kernel sent what is no request";
    Error::with_source(ErrorKind::Protocol, what, error)
}

impl Transport for Classic<'_> {
    type Ticket = Owed;

    fn fetch(&mut self) -> Result<Fetched<Owed>> {
        loop {
            let reading = self.readers.begin();
            if self.stop.load(Ordering::Acquire) {
                return Ok(Fetched::Over(Ended::Stopped));
            }
            self.slot.populate()?;
            let read = nix::unistd::read(self.session, self.slot.take(self.remember));
            drop(reading);
            let len = match read {
                Ok(len) => len,
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
                Err(Errno::ENODEV | Errno::ECONNABORTED) => {
                    return Ok(Fetched::Over(Ended::SessionOver));
                }
                Err(errno) => {
                    let what = "/dev/fuse: no more requests can be read";
                    return Err(Error::io(what, errno.into()));
                }
            };
            self.slot.begun();
            if self.remember {
                self.slot.taken(len);
            }
            return Ok(Fetched::Request(Owed { len, done: None }));
        }
    }

    fn request(&self, ticket: Owed) -> Result<Result<Request<'_>, ParseError>> {
        match Request::parse(self.slot.request(ticket.len)?) {
            Err(error @ (ParseError::ShortHeader(_) | ParseError::Length(..))) => {
                Err(no_request(error))
            }
            parsed => Ok(parsed),
        }
    }

    fn carried_out(&self, ticket: Owed) -> Option<i32> {
        ticket.done
    }

    fn data(&mut self, _: Owed, len: usize) -> Option<&mut [u8]> {
        self.slot.data(len)
    }

    fn commit(&mut self, ticket: Owed, reply: Reply) -> Result<Option<Ended>> {
        let unique = self.unique(ticket)?;
        if self.remember {
            self.slot.done(match reply {
                Reply::Errno(errno) => errno,
                _ => 0,
            });
        }
        let mut session = self.session;
        let header = |errno, len| abi::out_header(unique, errno, len);
        let sent = match reply {
            Reply::None => Ok(()),
            Reply::Errno(errno) => session.write_all(&header(errno, 0)),
            Reply::Body(mut body) => {
                let header = header(0, body.len);
                session.write_all(body.with_header(&header))
            }
            Reply::Data(len) => session.write_all(self.slot.read_reply(header(0, len), len)),
        };
        self.slot.answered(unique & abi::UNIQUE_RESEND != 0);
        match sent.map_err(|error| (error.raw_os_error(), error)) {
            // ENOENT: the asker is gone, or a dead server had answered already.
            Ok(()) | Err((Some(libc::ENOENT), _)) => Ok(None),
            Err((Some(libc::ENODEV | libc::ECONNABORTED), _)) => Ok(Some(Ended::SessionOver)),
            Err((_, error)) => Err(Error::io("/dev/fuse: a reply was refused", error)),
        }
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn patience(&self) -> Patience {
        Patience::Any
    }

    fn hand_over(&mut self, _: Owed) {
        assert_ne!(self.patience(), Patience::Any, "it may wait for anything");
    }
}
