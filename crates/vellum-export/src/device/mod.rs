//! The chain device as a local block device: FUSE file, loop device, and the processes behind.
//!
//! Each device has a supervisor, which owns the FUSE session and has no block logic, a worker,
//! which serves it, and a standby, which waits to become the next of either. Killing any one of
//! them is not seen by whoever uses the device:
//!
//! * a dead worker is replaced by the standby, which opens the chain again and has the kernel send
//!   the unanswered requests again (or, on a kernel older than 6.9, takes them from the memory
//!   that the processes share);
//! * a dead supervisor is replaced by the standby, which notices that its pipe is closed;
//! * one that lives and does nothing, since it was stopped or since it hangs, is noticed by another,
//!   which kills it ([`watch`]).
//!
//! All three are forks of one small process, which has one thread when it forks. Forks start in a
//! fraction of the time of a new program, and a program file that is replaced on disk changes
//! nothing until an upgrade is asked for.
//!
//! A [`RunDir`](vellum_fs::run_dir::RunDir), one for each device, holds what other commands need to find
//! the device. The store says where it is; the processes of the device hold it open.
//!
//! * [`attach()`] and [`detach()`] are the way in and out.
//! * [`supervise`] is what the hidden subcommand calls that `attach` starts.

mod attach;
mod backoff;
pub mod command;
mod command_line;
pub mod control;
pub mod control_server;
mod detach;
mod event;
mod failure;
mod handover;
mod lock;
mod lost;
mod opened;
mod process;
mod selftest;
mod state;
mod supervisor;
mod transport;
mod watch;
mod worker;

pub use attach::{AttachSpec, Attached, Waits, attach, ensure_supervised, upgrade};
pub use control::ControlHandler;
pub use detach::{DetachOptions, Leak, detach, find_leaks, unmount_deleted, wake};
pub use failure::Failure;
pub use lost::{FoundDevice, end_lost, find_devices};
pub use opened::{Memory, Open, Opened};
pub use process::{Identity, boot_id, is_ending};
pub use selftest::known as ring_self_test;
pub use state::{DeviceStatus, RunState, Status, status};
pub use supervisor::{SupervisorArgs, supervise};
pub use transport::{TransportChoice, ublk_check};

/// Sends what the processes of a device have to say to standard error, which is the device's log.
/// To be called before [`supervise`], by a program that has no other logging installed.
///
/// The log may lie on the very disk that is full: a line that cannot be written is dropped. The
/// default of the logging library is to complain on standard error, and, when that fails too, to
/// panic, which would take the server down with the disk.
pub fn init_log() {
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .log_internal_errors(false);
    // Fails where logging is installed already.
    let _ = log.try_init();
}
