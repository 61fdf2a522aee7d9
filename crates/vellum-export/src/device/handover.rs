//! What one program of a device hands to the next: descriptors that stay open across exec.

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fuse::session::Features;
use vellum_base::storage::Witness;
use vellum_fs::run_dir::RunDir;

/// What one program hands to the next in an upgrade, or a worker without a supervisor to the one
/// that it starts: descriptors that stay open across exec, and what was agreed on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Resume {
    pub session: i32,
    pub listener: i32,
    pub shared: i32,
    /// The memory of the ring, where requests come by one.
    #[serde(default)]
    pub ring: Option<i32>,
    pub events_in: i32,
    pub events_out: i32,
    /// The old program's standby and the pipe that it waits on.
    pub standby: Option<(i32, i32)>,
    pub features: Features,
    pub generation: u32,
    /// What the processes of the device hold of the store's file system, if they do: see [`Witness`].
    #[serde(default)]
    pub witness: Option<(i32, Uuid)>,
}

/// What this process holds, with a descriptor for the program that comes next.
pub(super) fn witness() -> Option<(OwnedFd, Uuid)> {
    let held = Witness::held()?;
    // Without it a log of changes needs another proof, which most kernels have.
    let copy = held.file().try_clone_to_owned().ok()?;
    Some((copy, held.token()))
}

/// The arguments that this program was started with, without those of an earlier hand-over, and
/// with the path that its run directory has now.
pub(super) fn own_arguments(run_dir: &RunDir) -> Vec<OsString> {
    let mut arguments = Vec::new();
    let mut all = std::env::args_os().skip(1);
    while let Some(argument) = all.next() {
        if argument == "--resume" {
            all.next();
            continue;
        }
        let is_run_dir = argument == "--run-dir";
        arguments.push(argument);
        if is_run_dir && all.next().is_some() {
            arguments.push(run_dir.path().into());
        }
    }
    arguments
}

/// Says whether descriptors stay open in the program that is executed next.
pub(super) fn set_close_on_exec(fds: &[i32], on: bool) {
    let flags = if on {
        FdFlag::FD_CLOEXEC
    } else {
        FdFlag::empty()
    };
    for fd in fds {
        // SAFETY: the descriptors are open: their owners are borrowed by the callers.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
        let _ = fcntl(fd, FcntlArg::F_SETFD(flags));
    }
}
