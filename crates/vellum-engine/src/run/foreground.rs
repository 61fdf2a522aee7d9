//! Waiting for a command in the foreground: its signals go on to it, its exit status comes back.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use vellum_base::error::{Result, ResultExt};

/// What somebody may want a command to hear. The terminal's size is the runtime's business.
const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
];

/// Takes the signals of the calling thread, from before a child is started until it has ended.
#[derive(Debug)]
pub(super) struct Foreground {
    signals: SignalFd,
    old: SigSet,
}

impl Foreground {
    /// Begins to take signals: from now on none of them ends this process.
    pub(super) fn new() -> Result<Self> {
        let doing = || "cannot take signals";
        let mut set = SigSet::empty();
        for signal in FORWARDED {
            // A blocked signal comes here even where it is ignored, as nohup has it.
            if !is_ignored(signal).context(doing)? {
                set.add(signal);
            }
        }
        set.add(Signal::SIGCHLD);
        let mut old = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut old)).context(doing)?;
        match SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK) {
            Ok(signals) => Ok(Foreground { signals, old }),
            Err(errno) => {
                // It was valid a moment ago.
                let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&old), None);
                Err(errno).context(doing)
            }
        }
    }

    /// Waits for a child that passes signals on, and does `look` every second at least meanwhile. The exit status, 128 + n
    /// after signal n.
    pub(super) fn wait(
        &self,
        child: &mut Child,
        mut look: impl FnMut(&Child) -> Result<()>,
    ) -> Result<u8> {
        let doing = || "cannot wait for the command";
        loop {
            if let Some(status) = child.try_wait().context(doing)? {
                let code = status
                    .code()
                    .or_else(|| status.signal().map(|signal| 128 + signal));
                return Ok(code.unwrap_or(1).clamp(0, 255) as u8);
            }
            look(child)?;
            let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            // The time is a net for a child that ended without its signal being seen.
            match poll(&mut fds, PollTimeout::from(1000u16)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(doing),
            }
            while let Some(info) = self.signals.read_signal().context(doing)? {
                self.forward(info.ssi_signo as i32, info.ssi_code, child);
            }
        }
    }

    fn forward(&self, number: i32, code: i32, child: &Child) {
        let Ok(signal) = Signal::try_from(number) else {
            return;
        };
        // What the terminal sent reached the child as well.
        if signal == Signal::SIGCHLD || code > 0 {
            return;
        }
        // It is ours and not reaped yet, so the pid is still its.
        let _ = kill(Pid::from_raw(child.id() as i32), signal);
    }
}

/// True for a signal that this process ignores.
fn is_ignored(signal: Signal) -> nix::Result<bool> {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call changes nothing, and fills in the one there is.
    let outcome = unsafe { libc::sigaction(signal as i32, std::ptr::null(), now.as_mut_ptr()) };
    Errno::result(outcome)?;
    // SAFETY: the call succeeded.
    let now = unsafe { now.assume_init() };
    Ok(now.sa_sigaction == libc::SIG_IGN)
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // It was valid before.
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&self.old), None);
    }
}
