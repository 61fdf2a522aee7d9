//! A whole session over any stream, on the caller's thread.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::Export;
use super::connection::{Connection, Helpers, Limits};
use super::exec::Session;
use super::handshake::{Handshake, Outcome};
use super::memory::Memory;
use super::stream::Stream;
use vellum_base::error::Result;

/// Serves one client from handshake to disconnection over `stream`, in plain text, on this thread.
///
/// This is the server's own code but for sockets, threads and TLS: what a fuzzer or a test feeds
/// bytes to. It returns when `stream` ends or fails.
///
/// # Errors
/// [`ErrorKind::Protocol`](vellum_base::ErrorKind::Protocol) when the client breaks the protocol beyond
/// what an error reply can say, or the stream's error. None of them is a fault of the server.
pub fn session_over(stream: impl Read + Write, exports: &[Arc<Export>]) -> Result<()> {
    let mut stream = stream;
    let mut handshake = Handshake::new(exports, false);
    handshake.greet(&mut stream)?;
    let negotiated = match handshake.haggle(&mut stream)? {
        Outcome::Transmit(negotiated) => negotiated,
        Outcome::StartTls | Outcome::Closed => return Ok(()),
    };
    let limits = Limits {
        threads: 1,
        threads_where_reads_stall: 1,
        helpers: Arc::new(Helpers::new(0)),
        bytes_in_flight: 0,
        memory: Arc::new(Memory::new(0)),
        stall: Duration::from_secs(3600),
    };
    Connection::new(
        Local(RefCell::new(stream)),
        Session::new(negotiated, Arc::default()),
        limits,
        Arc::default(),
    )
    .serve_alone()
}

/// A stream for one thread.
struct Local<S>(RefCell<S>);

impl<S: Read + Write> Stream for Local<S> {
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.borrow_mut().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody else can make it ready: waiting would never end.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::from(io::ErrorKind::TimedOut));
                }
                result => return result,
            }
        }
    }

    fn has_input(&self) -> bool {
        false
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.0.borrow_mut();
        stream.write_all(bytes)?;
        stream.flush()
    }

    fn finish(&self) {}

    fn abort(&self) {}
}
