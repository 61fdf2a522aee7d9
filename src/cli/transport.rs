//! What `mount` and `run` share: how requests come from the kernel.

use std::ffi::OsString;

use clap::ValueEnum;

use vellum_engine::device::choose_transport;
use vellum_export::device::TransportChoice;

/// Of the devices that the command attaches.
#[derive(Debug, clap::Args)]
pub(super) struct TransportArgs {
    /// How requests come from the kernel: auto takes ublk where the kernel has it, else FUSE by io_uring
    /// where the host allows it and a self-test passed, else classic FUSE
    #[arg(
        long,
        value_name = "HOW",
        value_enum,
        default_value = "auto",
        env = "VELLUM_TRANSPORT"
    )]
    transport: TransportChoice,
}

impl TransportArgs {
    /// Has the devices served so that this process attaches from now on.
    pub(super) fn choose(&self) {
        choose_transport(self.transport);
    }

    /// The same for a process of this program.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let value = self.transport.to_possible_value();
        let how = value.iter().map(|value| value.get_name().into());
        how.flat_map(|how| ["--transport".into(), how]).collect()
    }
}
