//! Signals that ask a command to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP.
//!
//! A command that makes or mounts something [listens](listen) for them. Its long steps
//! [look](check) whether one came and fail then, and what they hold is undone on the way out, as
//! after any other failure. Calls that wait (for a lock, for input) are woken. A second signal, a
//! second or more after the first, ends the process at once; what it leaves then, the next command
//! takes over.
//!
//! A process that does not listen dies of these signals, and [`check`] always passes: the servers
//! and the snapshotter have ways of their own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::stat::{SFlag, fstat};
use nix::time::ClockId;

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::clock_ns;

/// What asks a command to end.
const SIGNALS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];
/// A repetition before this is taken for the same wish: timeout(1) and terminals signal a process
/// and its group.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How often a wait for input looks for a signal that came just before it began.
const LOOK_MS: u16 = 200;

/// Bytes that a pipe takes at once where it takes any (limits.h).
const PIPE_BUF: usize = 4096;

/// The first signal that came, 0 before.
static FIRST: AtomicI32 = AtomicI32::new(0);
/// When it came.
static SINCE_NS: AtomicU64 = AtomicU64::new(0);
/// [`Held`] guards that there are.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// Has signals ask from now on, instead of ending this process. One that is ignored stays so: nohup
/// and shells that start something in the background mean it.
///
/// # Errors
/// Where the kernel refuses.
pub fn listen() -> Result<()> {
    // Without SA_RESTART: what waits shall be woken.
    let ours = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: `note` calls nothing but what a signal handler may call (signal-safety(7)).
        let old = unsafe { sigaction(signal, &ours) }.context(|| "cannot take signals")?;
        if matches!(old.handler(), SigHandler::SigIgn) {
            // SAFETY: it was the action a moment ago.
            unsafe { sigaction(signal, &old) }.context(|| "cannot take signals")?;
        }
    }
    Ok(())
}

/// The handler: atomics, clock_gettime, sigaction and raise, which signal-safety(7) allows.
extern "C" fn note(number: i32) {
    let now = now_ns();
    let first = FIRST.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_ok() {
        SINCE_NS.store(now, Ordering::SeqCst);
        return;
    }
    let since = SINCE_NS.load(Ordering::SeqCst);
    // The first signal may have come to another thread, and be noted with a later moment than this one.
    if since == 0 || now.saturating_sub(since) < PATIENCE_NS {
        return;
    }
    let Ok(signal) = Signal::try_from(number) else {
        return;
    };
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    if unsafe { sigaction(signal, &default) }.is_ok() {
        // Comes when this handler returns.
        let _ = raise(signal);
    }
}

fn now_ns() -> u64 {
    // Never 0, which means that there is none yet.
    clock_ns(ClockId::CLOCK_MONOTONIC).max(1)
}

/// The signal that asked this process to end, if one did.
pub fn signal() -> Option<Signal> {
    Signal::try_from(FIRST.load(Ordering::SeqCst)).ok()
}

/// The exit status that says so, as shells have it; `None` where no signal came.
pub fn exit_status() -> Option<u8> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "signals have numbers from 1 to 64"
    )]
    signal().map(|signal| (128 + signal as i32) as u8)
}

/// Fails once a signal has asked this process to end.
///
/// # Errors
/// [`ErrorKind::Interrupted`].
pub fn check() -> Result<()> {
    match signal() {
        Some(signal) if HELD.load(Ordering::SeqCst) == 0 => Err(Error::new(
            ErrorKind::Interrupted,
            format!("interrupted by {signal}"),
        )),
        _ => Ok(()),
    }
}

/// As [`check`], where an [`io::Error`] is wanted. Its kind is not
/// [`io::ErrorKind::Interrupted`], after which readers try again.
///
/// # Errors
/// As [`check`].
pub fn check_io() -> io::Result<()> {
    check().map_err(io::Error::other)
}

/// While one of these lives, [`check`] passes: for what is to come to its end, such as undoing.
#[derive(Debug)]
pub struct Held(());

/// Begins something that is to come to its end.
pub fn hold() -> Held {
    HELD.fetch_add(1, Ordering::SeqCst);
    Held(())
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A reader or writer that fails once a signal asked this process to end, also while it waits for input, or
/// for whoever reads what it writes.
#[derive(Debug)]
pub struct Interruptible<F>(pub F);

/// Standard input. Not through the buffer of `Stdin`: what lies in it, poll(2) does not know of.
///
/// # Errors
/// Where the process has none.
pub fn standard_input() -> io::Result<Interruptible<File>> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Interruptible(input.into()))
}

/// Standard output, without the buffer of `Stdout`.
///
/// # Errors
/// Where the process has none.
pub fn standard_output() -> io::Result<Interruptible<File>> {
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Interruptible(output.into()))
}

impl<F: AsFd> Interruptible<F> {
    /// Whether a call can wait for somebody, for ever: not of files and disks.
    fn may_block(&self) -> io::Result<bool> {
        let kind = SFlag::from_bits_truncate(fstat(&self.0)?.st_mode) & SFlag::S_IFMT;
        Ok(kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK)
    }

    /// A pipe, a socket or a terminal may have nothing to say for hours, or nobody who listens. Files are
    /// always ready.
    fn wait_for(&self, ready: PollFlags) -> io::Result<()> {
        loop {
            check_io()?;
            let mut fds = [PollFd::new(self.0.as_fd(), ready)];
            match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl<F: Read + AsFd> Read for Interruptible<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLIN)?;
        self.0.read(buf)
    }
}

impl<F: Write + AsFd> Write for Interruptible<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLOUT)?;
        // What is ready takes so much without a wait; files are not waited for.
        let most = match self.may_block()? {
            true => PIPE_BUF,
            false => bytes.len(),
        };
        let (bytes, _) = bytes.split_at(bytes.len().min(most));
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
