//! How requests come from the kernel: which of the ways a device takes.

use std::sync::Arc;

use crate::fuse::ring::host;
use crate::fuse::ring::memory::RingMemory;
use vellum_base::error::Result;

/// Which way the requests of a device come from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportChoice {
    /// By io_uring where the host allows it and this boot's self-test passed, otherwise by /dev/fuse
    Auto,
    /// By read and write on /dev/fuse
    #[default]
    Classic,
    /// By io_uring, or not at all
    Ring,
}

impl TransportChoice {
    /// As it stands on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Classic => "classic",
            TransportChoice::Ring => "ring",
        }
    }

    /// The memory for a session by io_uring, where that is what is wanted and the host can.
    pub(super) fn ring_memory(self) -> Result<Option<Arc<RingMemory>>> {
        match (self, host::check()) {
            (TransportChoice::Classic, _) | (TransportChoice::Auto, Err(_)) => Ok(None),
            (TransportChoice::Ring, Err(error)) => Err(error),
            (_, Ok(())) => RingMemory::create(host::possible_processors()).map(Some),
        }
    }
}
