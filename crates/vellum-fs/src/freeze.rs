//! A file system held still while its layer is sealed, that is never left frozen.
//!
//! A frozen file system stops everyone who writes to it, for ever if nobody thaws it. So a small
//! process is forked first: it thaws when the owner of the freeze dies, by whatever means, or when
//! the freeze lasts too long.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid};

use super::ext4::open_root;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

mod ioctl {
    // include/uapi/linux/fs.h: the argument is not looked at.
    nix::ioctl_write_int_bad!(fifreeze, nix::request_code_readwrite!(b'X', 119, 4));
    nix::ioctl_write_int_bad!(fithaw, nix::request_code_readwrite!(b'X', 120, 4));
}

/// A file system that is frozen until this is dropped, its process dies, or time is up.
#[derive(Debug)]
pub struct Frozen {
    target: PathBuf,
    root: File,
    watchdog: Option<Watchdog>,
    since: Instant,
}

#[derive(Debug)]
struct Watchdog {
    pid: Pid,
    /// One byte ends the watchdog; closing this makes it thaw.
    done: OwnedFd,
}

/// Freezes the file system mounted at `target`: all that was written is on the device, the journal
/// is empty, and writers wait. After `limit` it thaws by itself, and [`Frozen::thaw`] says so.
///
/// # Errors
/// [`ErrorKind::InUse`] when it is frozen already, [`ErrorKind::Unsupported`] where it cannot be.
pub fn freeze(target: &Path, limit: Duration) -> Result<Frozen> {
    let root = open_root(target)?;
    let watchdog = Watchdog::start(&root, limit)?;
    let since = Instant::now();
    // SAFETY: the argument is ignored, and the descriptor is open.
    let result = unsafe { ioctl::fifreeze(root.as_raw_fd(), 0) };
    if let Err(errno) = result {
        watchdog.end();
        let what = format!("{}: cannot be frozen", target.display());
        return Err(match errno {
            Errno::EOPNOTSUPP => Error::with_source(ErrorKind::Unsupported, what, errno),
            _ => Error::io(what, errno.into()),
        });
    }
    Ok(Frozen {
        target: target.to_path_buf(),
        root,
        watchdog: Some(watchdog),
        since,
    })
}

impl Frozen {
    /// When the freeze began: the first writers may wait since then.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Thaws. Returns for how long it was frozen.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when it did not stay frozen until now, so that what was done
    /// meanwhile did not see one moment of it.
    pub fn thaw(mut self) -> Result<Duration> {
        self.thaw_now()
    }

    fn thaw_now(&mut self) -> Result<Duration> {
        let Some(watchdog) = self.watchdog.take() else {
            return Ok(Duration::ZERO);
        };
        // SAFETY: the argument is ignored, and the descriptor is open.
        let result = unsafe { ioctl::fithaw(self.root.as_raw_fd(), 0) };
        // Nobody waits for the end of the watchdog.
        let frozen = self.since.elapsed();
        watchdog.end();
        match result {
            Ok(_) => Ok(frozen),
            Err(Errno::EINVAL) => Err(Error::new(
                ErrorKind::Timeout,
                format!("{}: it was thawed before its time", self.target.display()),
            )),
            Err(errno) => Err(Error::io(
                format!("{}: cannot be thawed", self.target.display()),
                errno.into(),
            )),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = self.thaw_now() {
            tracing::warn!("{error}");
        }
    }
}

impl Watchdog {
    fn start(root: &File, limit: Duration) -> Result<Watchdog> {
        let (wait, done) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .context(|| "the watchdog of a freeze cannot be started")?;
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the child calls only what is safe after the fork of a process with many threads:
        // system calls, no allocation, no locks; and it never returns.
        match unsafe { nix::unistd::fork() }
            .context(|| "the watchdog of a freeze cannot be started")?
        {
            ForkResult::Child => watch(wait.as_raw_fd(), root.as_raw_fd(), limit),
            ForkResult::Parent { child } => Ok(Watchdog { pid: child, done }),
        }
    }

    /// Ends the watchdog without a thaw.
    fn end(self) {
        let _ = nix::unistd::write(&self.done, b".");
        while waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }
}

/// Closes the descriptors `first..=last`.
fn close_from_to(first: i32, last: i32) {
    if first <= last {
        // SAFETY: called by the watchdog alone, which owns no descriptor but the two it spares.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// The watchdog: waits for a byte, the end of the pipe, or the time limit.
fn watch(wait: i32, root: i32, limit: i32) -> ! {
    // A signal for the owner's group must not end both.
    let _ = nix::unistd::setsid();
    // Locks and pipes that the parent holds must not live on here.
    let (low, high) = (wait.min(root), wait.max(root));
    close_from_to(0, low - 1);
    close_from_to(low + 1, high - 1);
    close_from_to(high + 1, i32::MAX);
    let mut fds = [libc::pollfd {
        fd: wait,
        events: libc::POLLIN,
        revents: 0,
    }];
    loop {
        // SAFETY: `fds` is one pollfd that outlives the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 1, limit) };
        if ready < 0 && Errno::last() == Errno::EINTR {
            continue;
        }
        let mut byte = 0u8;
        // SAFETY: one byte is read into one byte.
        let told = ready > 0 && unsafe { libc::read(wait, (&raw mut byte).cast(), 1) } == 1;
        if !told {
            // SAFETY: the argument is ignored; failing means that it is thawed already.
            let _ = unsafe { ioctl::fithaw(root, 0) };
        }
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(0) }
    }
}
