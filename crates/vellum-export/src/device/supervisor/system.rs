//! What the supervisor asks of the system: forks, signals, pipes.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::device::process::Process;
use vellum_base::error::{Result, ResultExt};

/// Forks. Every caller runs in a process with one thread.
pub(super) fn fork() -> Result<ForkResult> {
    // SAFETY: the process has one thread, as `supervise` demands, so the child's memory is
    // consistent: no lock is held by a thread that is missing there.
    unsafe { nix::unistd::fork() }.context(|| "a process of the device cannot be forked")
}

pub(super) fn open_child(child: Pid) -> Result<Process> {
    // The child cannot be reaped by anyone else, so its pid stays its own.
    Process::open(child.as_raw()).context(|| "a process of the device cannot be watched")
}

/// Takes a dead child's status away; true when it was killed by SIGKILL, or when it was no child
/// of ours, whose end nobody can tell.
pub(super) fn reap(pid: i32) -> bool {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Signaled(_, signal, _)) => signal == Signal::SIGKILL,
        Ok(_) => false,
        Err(_) => true,
    }
}

/// SIGTERM comes as a descriptor that is polled.
pub(super) fn block_signals() -> Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)
        .context(|| "signals cannot be blocked")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "signals cannot be watched")
}

/// Best effort: none of it is worth failing for.
///
/// The supervisor and its standby are a few pages each and never killed for memory, where we may
/// say so (CAP_SYS_RESOURCE); the worker is more likely to be, since another takes its place.
pub(super) fn prepare_process() {
    // It outlives the command whose shell set them.
    vellum_base::inherit::lift_limits();
    let _ = nix::sys::prctl::set_name(c"vellum-device");
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Standard output becomes the log, and what it was is returned.
pub(super) fn take_stdout() -> Result<File> {
    let what = || "standard output cannot be moved";
    let ready = io::stdout().as_fd().try_clone_to_owned().context(what)?;
    nix::unistd::dup2_stdout(io::stderr()).context(what)?;
    Ok(File::from(ready))
}
