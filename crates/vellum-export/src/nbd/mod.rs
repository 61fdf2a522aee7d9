//! An NBD server: block devices for clients on the other end of a socket.
//!
//! It speaks the fixed newstyle protocol of the NBD project's `doc/proto.md` over unix sockets and
//! TCP, with or without TLS, and serves any [`BlockDevice`].
//!
//! * [`protocol`]: the wire format, pure.
//! * [`handshake`]: option haggling, over any stream.
//! * [`session`](session_over): one session over any stream, without threads: for fuzzing.
//! * [`Server`]: listeners, limits, and the threads of each connection.
//!
//! Each connection has one thread that reads requests and serves the cheap ones itself, many to a
//! system call. Once requests of a kind turn out to be slow, the reader hands the socket over to
//! another thread before it serves one, so that a slow request holds up no other.

mod config;
mod connection;
mod exec;
pub mod handshake;
mod listen;
mod memory;
pub mod protocol;
mod server;
mod session;
mod stall;
mod status;
mod stream;
mod tls;

use std::fmt;
use std::sync::Arc;

pub use super::unix_socket::{SocketFile, bind_unix};
pub use config::ServerConfig;
pub use listen::bind_tcp;
pub use server::{ExportStatus, Server};
pub use session::session_over;
pub use tls::{ClientCertificates, TlsConfig};

use vellum_base::block::BlockDevice;
use vellum_base::error::{Error, ErrorKind, Result};

/// A metadata context of an export beside `base:allocation`: a number for each of its bytes, which
/// clients get by BLOCK_STATUS.
pub trait MetaContext: Send + Sync {
    /// What clients ask for: `NAMESPACE:LEAF`, as an export's name.
    fn name(&self) -> &str;

    /// The numbers of the range from `offset`, as (bytes, number) in order and without gaps, in at most
    /// `max` runs; the answer may end before `offset + len`.
    ///
    /// # Errors
    /// Where they cannot be found out.
    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>>;
}

/// A block device under a name.
#[derive(Clone)]
pub struct Export {
    /// What clients ask for: at most 4096 bytes, no NUL.
    pub name: String,
    /// A text for people, shown in lists; may be empty, at most 4096 bytes.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn BlockDevice>,
    /// Refuse writes even where the device would take them.
    pub read_only: bool,
    /// What clients may ask of its bytes beside `base:allocation`.
    pub contexts: Vec<Arc<dyn MetaContext>>,
}

impl Export {
    /// An export of `device` as `name`, writable where the device is.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Export {
            name: name.into(),
            description: String::new(),
            device,
            read_only: false,
            contexts: Vec::new(),
        }
    }

    /// True when clients cannot write to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.device.is_read_only()
    }

    /// Checks that name and description fit the protocol.
    fn check(&self) -> Result<()> {
        let contexts = self
            .contexts
            .iter()
            .map(|context| ("context", context.name()));
        let names = [
            ("name", self.name.as_str()),
            ("description", &self.description),
        ];
        for (what, text) in names.into_iter().chain(contexts) {
            protocol::name(text.as_bytes()).map_err(|why| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("the {what} of an NBD export cannot be used: {why}"),
                )
            })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("size", &self.device.size())
            .field("read_only", &self.is_read_only())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
