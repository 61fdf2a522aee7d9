//! A vhost-user-blk server: a block device as the disk of a virtual machine, whose monitor connects to a
//! socket and hands over the machine's memory. docs/vhost.md.
//!
//! * [`config`]: what the device says of itself.
//! * [`chain`]: descriptors in the guest's memory; [`request`]: what they ask for; [`exec`]: doing it.
//! * [`inflight`]: which requests were taken and not answered, for the next server.
//! * [`ring`]: a queue's rings; [`queue`]: the threads that serve them.
//! * [`handler`]: the vhost-user protocol, by way of the crate `vhost`; [`channel`]: messages to the monitor.
//! * [`session`](serve_memory): the requests in some bytes of memory, without threads: for fuzzing.
//! * [`Server`]: one client after the other.
//!
//! As in an NBD connection, of a queue's threads one at a time takes requests, serves the cheap ones itself, and
//! gives that role up before it serves one of a kind that turned out to be slow.

mod chain;
mod channel;
mod config;
mod exec;
mod handler;
mod inflight;
mod memory;
mod queue;
mod request;
mod ring;
mod server;
mod session;

use std::fmt;
use std::sync::Arc;

pub use super::unix_socket::{SocketFile, bind_unix};
pub use config::{DEFAULT_QUEUES, MAX_QUEUES};
pub use ring::Place;
pub use server::Server;
pub use session::serve_memory;

use vellum_base::block::BlockDevice;

/// A block device as a disk.
#[derive(Clone)]
pub struct Disk {
    /// What is served.
    pub device: Arc<dyn BlockDevice>,
    /// By what guests know it again: of more than 20 bytes the first 20.
    pub serial: String,
    /// Refuse writes even where the device would take them.
    pub read_only: bool,
}

impl Disk {
    /// True when guests cannot write to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.device.is_read_only()
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("serial", &self.serial)
            .field("size", &self.device.size())
            .field("read_only", &self.is_read_only())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod stalling_tests;
#[cfg(test)]
mod tests;
