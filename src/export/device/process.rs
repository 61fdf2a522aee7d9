//! Processes by identity: a pid with its start time, waited for through a pidfd.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::error::{Result, ResultExt};

/// A process that cannot be taken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start: u64,
}

impl Identity {
    /// The process with this pid, if there is one.
    pub fn of(pid: i32) -> Option<Identity> {
        Some(Identity {
            pid,
            start: stat(pid)?.1,
        })
    }

    /// The calling process.
    pub fn current() -> Identity {
        let pid = nix::unistd::getpid().as_raw();
        Identity::of(pid).unwrap_or(Identity { pid, start: 0 })
    }

    /// True while it runs; a zombie does not.
    pub fn is_alive(self) -> bool {
        matches!(stat(self.pid), Some((state, start)) if start == self.start && state != b'Z')
    }

    /// A handle on it, or `None` when it is gone.
    pub fn open(self) -> Option<Process> {
        let process = Process::open(self.pid).ok()?;
        // The handle is on whoever had the pid just now: look again.
        self.is_alive().then_some(process)
    }
}

/// State and start time of a process from /proc.
fn stat(pid: i32) -> Option<(u8, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces and brackets: fields are counted after the last one.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// A handle on a process that stays on that process.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// Opens a pidfd.
    ///
    /// # Errors
    /// ESRCH when there is no such process.
    pub fn open(pid: i32) -> io::Result<Process> {
        // SAFETY: the call takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours; the kernel made it close-on-exec.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Process { pid, fd })
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal; a process that is gone is fine.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: the descriptor is a pidfd, and no siginfo is passed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }

    /// Waits until all its threads have ended; false when `timeout` passed first.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] where poll fails.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            // Rounded up, so that the wait does not spin in its last millisecond.
            let left = left.as_millis().saturating_add(1).min(60_000) as u16;
            match poll(&mut fds, PollTimeout::from(left)) {
                Ok(0) if std::time::Instant::now() >= deadline => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => {
                    return Err(io::Error::from(errno))
                        .context(|| format!("process {}: cannot be waited for", self.pid));
                }
            }
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The boot's id: state written before a reboot is about other processes.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_string()
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
pub fn monotonic_ns() -> u64 {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
        Ok(now) => now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_outlives_neither_its_process_nor_its_start_time() {
        let me = Identity::current();
        assert!(me.is_alive());
        let other = Identity {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive());
        assert!(other.open().is_none());

        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        assert!(!identity.is_alive(), "a zombie is not alive");
        child.wait().unwrap();
    }
}
