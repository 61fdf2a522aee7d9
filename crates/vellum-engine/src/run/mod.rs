//! Containers that run: an image's command, or another, in a container's file system, started by
//! an OCI runtime with namespaces, capabilities and cgroups of its own.
//!
//! * [`run`] makes a container and runs a command in it; [`exec()`] runs one in a container that is
//!   there, beside what runs in it or alone.
//! * [`waiter`] runs a container's command in the background; [`stop()`] ends it.
//! * [`activity()`] says what runs; unmounting and removing end it. So [`super::teardown`] stands on
//!   `activity` and `scaffold` in here, which know nothing of it, and the rest of this module on it.

pub(super) mod activity;
mod alone;
mod attend;
mod bundle;
mod capabilities;
pub(crate) mod cgroup;
mod end;
mod exec;
mod executable;
mod foreground;
mod limits;
mod output;
mod refused;
mod runtime;
pub(super) mod scaffold;
mod seccomp;
mod spec;
mod stop;
mod user;
mod volume;
pub mod waiter;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use executable::NoProgram;
use runtime::Runtime;
use vellum_base::error::Result;
use vellum_store::Confinement;

pub use activity::{Activity, activity};
pub(super) use alone::{is_mounted_for_run, unmount_after_run};
pub(crate) use attend::run_for_a_trace;
pub use attend::{make, run, start};
pub use capabilities::parse_capability;
pub use exec::exec;
pub use output::{OutputLine, OutputOptions, Stream, logs};
pub use runtime::FAILURE;
pub(super) use runtime::find as find_runtime;
pub use seccomp::parse_seccomp;
pub use stop::{StopSignal, kill, stop, wait};
pub(super) use volume::mounted_volumes;
pub use volume::{check_volumes, parse_mount, parse_volume};

/// A command and what it gets.
#[derive(Debug, Clone, Default)]
pub struct CommandOptions {
    /// The program and its arguments; for [`run`] the image's where it is empty.
    pub command: Vec<String>,
    /// `NAME=VALUE` each, on top of the image's.
    pub env: Vec<String>,
    /// Where it starts; the image's where it is `None`. Made where it is missing.
    pub workdir: Option<String>,
    /// `USER[:GROUP]`, names or numbers; the image's where it is `None`.
    pub user: Option<String>,
    /// Give it a terminal; standard input must be one.
    pub terminal: bool,
}

/// How to run a new container.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The command.
    pub command: CommandOptions,
    /// The program in place of the image's entry point; empty for none.
    pub entrypoint: Option<String>,
    /// Remove the container when the command has ended.
    pub remove: bool,
}

/// A command that is run for what it touches: it has no input, and what it prints goes to standard error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traced {
    /// After so long it is asked to end, and is killed where it does not.
    pub limit: Option<Duration>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status, 128 + n after signal n; 127 where the program was not found, 126 where it
    /// could not be executed, [`FAILURE`] where it could not be started for another reason.
    pub status: u8,
    /// Why it did not start, if it did not.
    pub failure: Option<Failure>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NoProgram(why) | Failure::Runtime { why, .. } => f.write_str(why),
        }
    }
}

/// Why a command did not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is no program, and nobody has said so yet.
    NoProgram(String),
    /// The runtime failed.
    Runtime {
        /// What it said, or what is known of it.
        why: String,
        /// Whether it has said so itself, on the command's standard error.
        said: bool,
    },
}

impl From<NoProgram> for Ended {
    fn from(no: NoProgram) -> Self {
        Ended {
            status: no.status,
            failure: Some(Failure::NoProgram(no.why)),
        }
    }
}

/// Checks that this host can confine a container so.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](vellum_base::ErrorKind::InvalidInput) and
/// [`ErrorKind::Unsupported`](vellum_base::ErrorKind::Unsupported), with what to leave out.
pub fn check_confinement(confinement: &Confinement) -> Result<()> {
    let capabilities = capabilities::of(confinement)?;
    seccomp::of(&confinement.seccomp, &capabilities)?;
    limits::of(confinement).map(drop)
}

fn logged(runtime: &Runtime, log: &Path) -> Command {
    let mut command = runtime.command();
    // By its name alone: crun takes what stands before a colon in a path for a kind of log.
    if let (Some(dir), Some(name)) = (log.parent(), log.file_name()) {
        command.current_dir(dir).arg("--log").arg(name);
    }
    command.args(["--log-format", "json"]);
    command
}

/// Tells the command's exit status from a failure of the runtime.
fn ended(status: u8, log: &Path) -> Ended {
    match runtime::logged_failure(log).filter(|_| status != 0) {
        Some(failure) => Ended {
            status: runtime::status_of_failure(&failure),
            failure: Some(Failure::Runtime {
                why: failure,
                said: true,
            }),
        },
        None => Ended {
            status,
            failure: None,
        },
    }
}
