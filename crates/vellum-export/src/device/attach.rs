//! From nothing to a block device: starts the supervisor, waits until the worker serves.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

use super::command_line::ARG0;
use super::control;
use super::detach::{DetachOptions, clean, detach_locked};
use super::event::Ready;
use super::lock::RunLock;
use super::selftest;
use super::state::{Hint, RunState, Status, hinted_disk, is_listened, status};
use super::transport::TransportChoice;
use crate::fuse::session::Features;
use crate::local_disk::{DiskHold, LocalDisk};
use crate::loop_device::{Lifetime, LoopDevice, LoopOptions};
use crate::ublk::disk::UblkDisk;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::run_dir::RunDir;

/// How often it is asked whether a device still waits.
const LOOK: Duration = Duration::from_secs(1);

/// What to attach, and how.
#[derive(Debug, Clone)]
pub struct AttachSpec {
    /// The program to start: this one, unless a test says otherwise.
    pub program: PathBuf,
    /// Its arguments up to those of [`super::SupervisorArgs`]: the hidden subcommand that calls
    /// [`super::supervise`], and what it needs to open the device.
    pub arguments: Vec<OsString>,
    /// Refuse writes.
    pub read_only: bool,
    /// When the loop device is detached.
    pub lifetime: Lifetime,
    /// Threads that serve.
    pub threads: usize,
    /// How requests come from the kernel.
    pub transport: TransportChoice,
    /// How long the device may take to open.
    pub timeout: Duration,
    /// Asked when that is over.
    pub waits: Option<Waits>,
}

/// Whether a device that does not open waits for something that may take longer, rather than hang.
#[derive(Clone)]
pub struct Waits(pub Arc<dyn Fn() -> bool + Send + Sync>);

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waits")
    }
}

impl AttachSpec {
    /// A writable device that this very program serves when called with `arguments`.
    pub fn new(arguments: Vec<OsString>) -> Self {
        AttachSpec {
            // Also names the program when its file was replaced or deleted.
            program: PathBuf::from("/proc/self/exe"),
            arguments,
            read_only: false,
            lifetime: Lifetime::default(),
            threads: 2,
            transport: TransportChoice::Classic,
            timeout: Duration::from_secs(30),
            waits: None,
        }
    }
}

/// A device that is attached.
#[derive(Debug)]
pub struct Attached {
    /// Its run directory, as an absolute path without links.
    pub run_dir: RunDir,
    /// The block device.
    pub device: LocalDisk,
    /// Keeps it attached until the caller has mounted it.
    pub hold: DiskHold,
    /// What kernel and server agreed on.
    pub features: Features,
}

/// Serves a device from processes of its own, which outlive the caller, and puts a block device on
/// it. `run_dir` is made; what an earlier, dead device left there is cleaned up.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] while a device is attached there, [`ErrorKind::Timeout`], and
/// whatever kept the worker from opening the device, with its whole text.
pub fn attach(run_dir: &RunDir, spec: &AttachSpec) -> Result<Attached> {
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(run_dir.path())
        .context(|| format!("{run_dir}: cannot be made"))?;
    let run_dir = run_dir.canonical().context(|| run_dir.to_string())?;
    let Some(_lock) = RunLock::take(&run_dir)? else {
        return Err(Error::new(
            ErrorKind::InUse,
            format!("{run_dir}: it was removed meanwhile"),
        ));
    };
    if let Some(state) = RunState::read(&run_dir)?
        && state.status != Status::Ended
        && is_listened(&run_dir)
    {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "{run_dir}: a device is attached there (supervisor {}){}",
                state.supervisor.pid,
                user_elsewhere(&run_dir)
            ),
        ));
    }
    // To look for processes that are left takes its time, and is seldom needed.
    if run_dir.has_device_files().context(|| run_dir.to_string())? {
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        clean(&run_dir, &options)?;
    }
    let spec = &AttachSpec {
        transport: selftest::settle(spec),
        ..spec.clone()
    };
    let features = match start(&run_dir, spec) {
        Ok(features) => features,
        Err(error) => return Err(give_up(&run_dir, error)),
    };
    match show(&run_dir, spec, features) {
        Ok((device, hold)) => {
            Hint::write(&run_dir, device);
            Ok(Attached {
                run_dir,
                device,
                hold,
                features,
            })
        }
        Err(error) => Err(give_up(&run_dir, error)),
    }
}

/// The block device of what is served, and what keeps it there.
fn show(run_dir: &RunDir, spec: &AttachSpec, features: Features) -> Result<(LocalDisk, DiskHold)> {
    if let Some(id) = features.ublk {
        let disk = UblkDisk(id);
        return Ok((disk.into(), disk.hold_when_shown()?));
    }
    let options = LoopOptions {
        read_only: spec.read_only,
        lifetime: spec.lifetime,
    };
    let (device, hold) = LoopDevice::attach(&run_dir.dev(), &options)?;
    Ok((device.into(), hold))
}

/// Who uses the device of `run_dir`, where that is somebody: a mount may lie in a mount namespace that
/// nobody here sees.
fn user_elsewhere(run_dir: &RunDir) -> String {
    match hinted_disk(run_dir) {
        Some(device) if device.is_claimed().unwrap_or(false) => format!(": {}", device.user()),
        _ => String::new(),
    }
}

/// Cleans up after a failed attach. The error that led there is what the caller wants to know.
fn give_up(run_dir: &RunDir, error: Error) -> Error {
    let options = DetachOptions {
        force: true,
        timeout: Duration::from_secs(2),
    };
    match detach_locked(run_dir, &options) {
        Ok(()) => error,
        Err(second) => {
            let kind = error.kind();
            Error::new(kind, format!("{error}; and cleaning up failed: {second}"))
        }
    }
}

pub(super) fn start(run_dir: &RunDir, spec: &AttachSpec) -> Result<Features> {
    let log_path = run_dir.log();
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&log_path)
        .context(|| log_path.display().to_string())?;
    let (ready, ready_out) = std::io::pipe().context(|| "a pipe cannot be made")?;
    let mut command = Command::new(&spec.program);
    command
        .arg0(ARG0)
        .args(&spec.arguments)
        .arg("--run-dir")
        .arg(run_dir.path())
        .arg("--threads")
        .arg(spec.threads.to_string())
        .stdin(Stdio::null())
        .stdout(ready_out)
        .stderr(log);
    if spec.read_only {
        command.arg("--read-only");
    }
    // An earlier program, to which one may go back, does not know the option.
    if spec.transport != TransportChoice::Classic {
        command.arg("--transport").arg(spec.transport.name());
    }
    let what = || format!("{}: the device server", spec.program.display());
    let mut child = command.spawn().context(what)?;
    // Our copy of the pipe's writing end, or its end would never be seen.
    drop(command);
    let line = read_line(ready, spec);
    // The foreground process ends as soon as it has forked.
    let status = child.wait().context(what)?;
    match line? {
        Some(line) => match serde_json::from_str(&line) {
            Ok(Ready::Serving(features)) => Ok(features),
            Ok(Ready::Failed(failure)) => Err(Error::from(failure)),
            Err(error) => Err(Error::with_source(
                ErrorKind::Protocol,
                format!("{}: it said {line:?}", what()),
                error,
            )),
        },
        None => Err(Error::new(
            ErrorKind::Command,
            format!(
                "{} ended before it served ({status}): {}",
                what(),
                tail(&log_path)
            ),
        )),
    }
}

/// The first line from the pipe; `None` at its end.
fn read_line(ready: std::io::PipeReader, spec: &AttachSpec) -> Result<Option<String>> {
    let mut deadline = Instant::now() + spec.timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
        let left_ms = left.as_millis().min(60_000) as u16;
        match poll(&mut fds, PollTimeout::from(left_ms)) {
            Ok(0) if left.is_zero() => {
                if !spec.waits.as_ref().is_some_and(|waits| waits.0()) {
                    let text = format!("the device server was not ready within {:?}", spec.timeout);
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
                deadline = Instant::now() + LOOK;
            }
            Ok(0) | Err(nix::errno::Errno::EINTR) => vellum_base::interrupt::check()?,
            Ok(_) => break,
            Err(errno) => return Err(Error::io("poll", errno.into())),
        }
    }
    // The line is written in one piece, shorter than PIPE_BUF.
    let mut line = String::new();
    BufReader::new(ready.take(4096))
        .read_line(&mut line)
        .context(|| "the pipe of the device server")?;
    Ok((!line.is_empty()).then_some(line))
}

/// The end of the log on one line.
fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    if lines.is_empty() {
        return "it left no word".to_string();
    }
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}

/// Gives the device of `run_dir` a new supervisor, where a crash took supervisor and standby both
/// and the worker serves alone, which the worker else does by itself. Returns true when that was
/// needed.
///
/// # Errors
/// [`ErrorKind::NotFound`] when no device is attached there, [`ErrorKind::Timeout`].
pub fn ensure_supervised(run_dir: &RunDir, timeout: Duration) -> Result<bool> {
    let status = status(run_dir)?.filter(|status| status.alive);
    let Some(status) = status else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{run_dir}: no device is attached there"),
        ));
    };
    if status.supervised {
        return Ok(false);
    }
    match control::call_again(run_dir, "adopt", Value::Null, timeout) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Lets `program` take the device of `run_dir` over, under load, and waits until it serves.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the program cannot, [`ErrorKind::Timeout`]; the old program
/// goes on serving then.
pub fn upgrade(run_dir: &RunDir, program: &Path, timeout: Duration) -> Result<Value> {
    let deadline = Instant::now() + timeout;
    let no_device = || {
        Error::new(
            ErrorKind::NotFound,
            format!("{run_dir}: no device is attached there"),
        )
    };
    let read = || RunState::read(run_dir)?.ok_or_else(no_device);
    let before = read()?;
    // The supervisor waits for a standby, which an upgrade needs, if there is none at the moment. A
    // worker that dies before it can say that it passed the order on is asked again, through the next
    // one: it knows from the generation whether the order was carried out.
    let args = json!({ "program": program, "after": before.generation });
    control::call_again(run_dir, "upgrade", args, timeout)?;
    loop {
        let state = read()?;
        if state.generation > before.generation && state.status == Status::Serving {
            return control::call_again(run_dir, "status", Value::Null, timeout);
        }
        if !is_listened(run_dir) {
            return Err(no_device());
        }
        if state.failed_upgrades > before.failed_upgrades
            && let Some(failure) = state.upgrade_error
        {
            return Err(Error::from(failure));
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("{run_dir}: the new program did not serve within {timeout:?}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
