//! What the processes of a device tell its supervisor, through a pipe, and what that tells `attach`.

use std::fs::File;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::fuse::session::Features;
use vellum_base::error::{Result, ResultExt};

/// What a child tells the supervisor: one line of JSON in a pipe, shorter than PIPE_BUF.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// The worker with this pid serves.
    Serving(i32),
    /// The worker could not open the device.
    OpenFailed(Failure),
    /// End the device.
    Stop,
    /// Let this program take over.
    Upgrade(PathBuf),
}

/// The first line that `attach` reads.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ready {
    /// The device is served.
    Serving(Features),
    /// It could not be opened or mounted.
    Failed(Failure),
}

/// The pipe of [`Event`]s: the end that the supervisor reads, without waiting, and the one that all
/// write to.
pub(super) fn event_pipe() -> Result<(File, File)> {
    let (events_in, events_out) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "the pipe of events cannot be made")?;
    fcntl(&events_in, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .context(|| "the pipe of events cannot be made")?;
    Ok((File::from(events_in), File::from(events_out)))
}
