//! A client that stalls in the middle of a request, or goes away.

use std::io;
use std::time::{Duration, Instant};

use super::stream::allowance;
use vellum_base::error::{Error, ErrorKind, Result};

/// Watches over a client in the middle of a request; costs nothing when it comes in one piece.
#[derive(Default)]
pub(super) struct Clock(Option<Instant>);

impl Clock {
    /// To be called after each piece of `len` bytes that are waited for.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] once the client took longer than `stall` allows for so many bytes.
    pub(super) fn check(&mut self, stall: Duration, len: usize) -> Result<()> {
        match self.0 {
            None => self.0 = Some(Instant::now()),
            Some(began) if began.elapsed() > allowance(stall, len) => return Err(stalled()),
            Some(_) => {}
        }
        Ok(())
    }
}

/// The client went away where it may not.
pub(super) fn torn() -> Error {
    Error::new(
        ErrorKind::Protocol,
        "the client went away in the middle of a request",
    )
}

fn stalled() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the client stalled in the middle of a request",
    )
}

/// Receiving failed in the middle of a request.
pub(super) fn receiving(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => stalled(),
        _ => Error::io("receiving requests from the client", error),
    }
}
