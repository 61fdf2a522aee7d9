//! Clients of a listening socket, taken one by one until the server stops.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{self, SockFlag};

use vellum_base::error::{Result, ResultExt};

/// The next client of a listener that does not block; `None` once `stopping` says so, of which `stop` wakes
/// whoever waits.
///
/// # Errors
/// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) when the listener fails. For want of descriptors or memory it
/// waits instead: others may give some back.
pub(crate) fn accept(
    listener: BorrowedFd<'_>,
    stop: &EventFd,
    stopping: impl Fn() -> bool,
) -> Result<Option<OwnedFd>> {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match nix::poll::poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result.context(|| "waiting for clients")?,
        };
        if stopping() {
            return Ok(None);
        }
        match socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: accept4 has just made the descriptor, and nothing else owns it.
            Ok(fd) => return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
            // The client gave up, or was another listener's.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED | Errno::EPROTO) => {}
            Err(errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)) => {
                tracing::warn!("cannot accept a client: {errno}");
                thread::sleep(Duration::from_millis(50));
            }
            Err(errno) => return Err(errno).context(|| "accepting a client"),
        }
    }
}
