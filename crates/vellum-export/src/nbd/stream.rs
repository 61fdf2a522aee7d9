//! The byte streams that sessions run over.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, MsgFlags, Shutdown, sockopt};
use nix::sys::time::TimeVal;

/// What transmission needs of a stream: one thread at a time receives, one at a time sends.
pub(super) trait Stream {
    /// Some bytes; 0 at the end of the stream. [`io::ErrorKind::WouldBlock`] says that none came
    /// for a while.
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// As [`Stream::recv`], but waits for all of `buf` where the stream can: fewer calls.
    fn recv_whole(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv(buf)
    }

    /// Whether there is something to be received already, as far as can be told without waiting.
    fn has_input(&self) -> bool;

    /// All of `bytes`, or an error after which nothing more can be sent.
    fn send(&self, bytes: &[u8]) -> io::Result<()>;

    /// Ends the stream in good order, as far as the client still listens.
    fn finish(&self);

    /// Ends the stream at once, in both directions; wakes threads that wait for it.
    fn abort(&self);
}

/// Bytes of replies that the kernel may hold for a client.
const SEND_BUFFER: usize = 2 << 20;

/// A client that takes its replies more slowly than this, in bytes a second, is given up.
const SLOWEST: u64 = 64 << 10;

/// The time that `len` bytes may take when nothing may stall for longer than `stall`.
pub(super) fn allowance(stall: Duration, len: usize) -> Duration {
    stall + Duration::from_secs(len as u64 / SLOWEST)
}

/// A connected socket, unix or TCP.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    stall: Duration,
}

impl Socket {
    /// Takes a connected socket. Receiving and sending give up after `stall` without progress.
    pub(super) fn new(fd: OwnedFd, stall: Duration) -> io::Result<Self> {
        let time = TimeVal::new(stall.as_secs() as i64, stall.subsec_micros().into());
        socket::setsockopt(&fd, sockopt::ReceiveTimeout, &time)?;
        socket::setsockopt(&fd, sockopt::SendTimeout, &time)?;
        // A long reply then rarely waits for the client. As much as the host lets us have.
        let _ = socket::setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER);
        Ok(Socket { fd, stall })
    }

    /// Who is on the other side, for people.
    pub(super) fn peer(&self) -> String {
        type Any = socket::SockaddrStorage;
        match socket::getpeername::<Any>(self.fd.as_raw_fd()) {
            Ok(address) if address.as_unix_addr().is_none() => address.to_string(),
            _ => "a local client".into(),
        }
    }

    fn recv_with(&self, buf: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        loop {
            match socket::recv(self.fd.as_raw_fd(), buf, flags) {
                Ok(len) => return Ok(len),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Stops one or both directions; wakes whoever waits for them.
    pub(super) fn shutdown(&self, how: Shutdown) {
        // It may be gone already: that is what was wanted.
        let _ = socket::shutdown(self.fd.as_raw_fd(), how);
    }

    /// Waits until the socket is ready or `deadline` has come.
    fn wait(&self, events: PollFlags, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            let millis = left.as_millis().saturating_add(1);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.fd.as_fd(), events)];
            match nix::poll::poll(&mut fds, timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Stream for Socket {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv_with(buf, MsgFlags::empty())
    }

    fn has_input(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        let mut started = None;
        while !rest.is_empty() {
            match socket::send(self.fd.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(len) => (_, rest) = rest.split_at(len),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::Error::from(io::ErrorKind::TimedOut)),
                Err(errno) => return Err(errno.into()),
            }
            if !rest.is_empty() {
                let started = *started.get_or_insert_with(Instant::now);
                if started.elapsed() > allowance(self.stall, bytes.len()) {
                    return Err(io::Error::from(io::ErrorKind::TimedOut));
                }
            }
        }
        Ok(())
    }

    fn finish(&self) {
        self.shutdown(Shutdown::Write);
    }

    fn abort(&self) {
        self.shutdown(Shutdown::Both);
    }
}

impl Stream for Arc<Socket> {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.as_ref().recv(buf)
    }

    fn recv_whole(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.as_ref().recv_with(buf, MsgFlags::MSG_WAITALL)
    }

    fn has_input(&self) -> bool {
        self.as_ref().has_input()
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.as_ref().send(bytes)
    }

    fn finish(&self) {
        self.as_ref().finish();
    }

    fn abort(&self) {
        self.as_ref().abort();
    }
}

/// A socket during the handshake: everything together has to be done by a deadline.
#[derive(Debug)]
pub(super) struct Deadline<'a> {
    pub(super) socket: &'a Socket,
    pub(super) deadline: Instant,
}

impl Read for Deadline<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let fd = self.socket.fd.as_raw_fd();
            match socket::recv(fd, buf, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => return Ok(len),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.socket.wait(PollFlags::POLLIN, self.deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match socket::send(self.socket.fd.as_raw_fd(), bytes, flags) {
                Ok(len) => return Ok(len),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.socket.wait(PollFlags::POLLOUT, self.deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
