//! The channel by which the server speaks first: to say that the configuration changed.
//!
//! The crate `vhost` (0.18) takes that socket from the client and knows no such message to send on it. So a
//! message is looked at before the crate reads it, which gives descriptors of our own for those that come
//! with it.

use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Bytes of a message's header: request, flags, length of what follows.
const HEADER: usize = 12;
/// Descriptors of a message at most.
const MAX_FDS: usize = 32;
/// The message that hands the channel over.
const SET_BACKEND_REQ_FD: u32 = 21;
/// The message that says that the configuration changed.
const CONFIG_CHANGE: u32 = 2;
/// The version of the protocol, in the flags of a message.
const VERSION: u32 = 1;
/// A client that does not read is not waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a client sends next.
pub(super) enum Next {
    /// Nothing any more.
    End,
    /// The channel.
    Channel(Channel),
    /// Something else.
    Other,
}

/// The channel of a client.
#[derive(Debug)]
pub(super) struct Channel(UnixStream);

impl Channel {
    /// Says that the configuration changed.
    ///
    /// # Errors
    /// Where the client is gone, or does not read.
    pub(super) fn config_changed(&self) -> std::io::Result<()> {
        let mut message = Vec::with_capacity(HEADER);
        for field in [CONFIG_CHANGE, VERSION, 0] {
            message.extend_from_slice(&field.to_ne_bytes());
        }
        (&self.0).write_all(&message)
    }
}

/// Waits for a client's next message, and leaves it to be read.
///
/// # Errors
/// As recvmsg(2).
pub(super) fn peek(client: &UnixStream) -> nix::Result<Next> {
    let mut header = [0; HEADER];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(&mut header)];
    let (bytes, fds) = loop {
        match recvmsg::<()>(client.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(message) => break (message.bytes, owned(message.cmsgs()?)),
        }
    };
    let [r0, r1, r2, r3, ..] = header;
    if bytes == 0 {
        return Ok(Next::End);
    }
    let is_channel = bytes >= 4 && u32::from_ne_bytes([r0, r1, r2, r3]) == SET_BACKEND_REQ_FD;
    match fds.into_iter().next() {
        Some(fd) if is_channel => {
            let stream = UnixStream::from(fd);
            // It is no socket where this fails; the crate refuses the message.
            match stream.set_write_timeout(Some(TIMEOUT)) {
                Ok(()) => Ok(Next::Channel(Channel(stream))),
                Err(_) => Ok(Next::Other),
            }
        }
        _ => Ok(Next::Other),
    }
}

fn owned(messages: impl Iterator<Item = ControlMessageOwned>) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for message in messages {
        if let ControlMessageOwned::ScmRights(received) = message {
            for fd in received {
                // SAFETY: recvmsg has just made the descriptor for us, and nothing else owns it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    fds
}
