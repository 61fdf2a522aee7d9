//! How requests come from the kernel: which of the ways a device takes.

use std::sync::Arc;

use crate::fuse::ring::host;
use crate::fuse::ring::memory::RingMemory;
use crate::ublk::control::Control;
use vellum_base::error::Result;

/// Which way the requests of a device come from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportChoice {
    /// A ublk device where the kernel has it; else FUSE by io_uring where the host allows it and this
    /// boot's self-test passed; else FUSE by /dev/fuse
    #[default]
    Auto,
    /// By read and write on /dev/fuse
    Classic,
    /// By io_uring, or not at all
    Ring,
    /// As a ublk device, without loop and FUSE, or not at all
    Ublk,
}

/// Whether this host can serve by ublk, and if not, why and what to do.
///
/// # Errors
/// [`Unsupported`](vellum_base::ErrorKind::Unsupported).
pub fn ublk_check() -> Result<()> {
    TransportChoice::Ublk.ublk_control().map(drop)
}

impl TransportChoice {
    /// As it stands on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Classic => "classic",
            TransportChoice::Ring => "ring",
            TransportChoice::Ublk => "ublk",
        }
    }

    /// The kernel's control device, where a ublk device is what is wanted and the host can.
    pub(super) fn ublk_control(self) -> Result<Option<Control>> {
        if self != TransportChoice::Ublk {
            return Ok(None);
        }
        let control = Control::open()?;
        control.check()?;
        Ok(Some(control))
    }

    /// The memory for a session by io_uring, where that is what is wanted and the host can.
    pub(super) fn ring_memory(self) -> Result<Option<Arc<RingMemory>>> {
        match (self, host::check()) {
            (TransportChoice::Classic | TransportChoice::Ublk, _)
            | (TransportChoice::Auto, Err(_)) => Ok(None),
            (TransportChoice::Ring, Err(error)) => Err(error),
            (_, Ok(())) => RingMemory::create(host::possible_processors()).map(Some),
        }
    }
}
