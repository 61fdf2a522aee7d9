//! The lock on a run directory: commands attach and detach one after the other.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::run_dir::RunDir;

/// How long a command may wait for another that attaches or detaches the same device: longer than
/// all that either of them waits for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(90);

/// The lock on a run directory, so that commands attach and detach one after the other.
pub struct RunLock(#[allow(dead_code, reason = "held for its Drop")] Flock<fs::File>);

impl RunLock {
    /// Locks `run_dir`, which must exist; `None` when it was removed meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another command holds it for longer than such commands take;
    /// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
    pub fn take(run_dir: &RunDir) -> Result<Option<RunLock>> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let dir = match fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(run_dir.path())
            {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io(run_dir.to_string(), error)),
            };
            let lock = lock_until(dir, deadline)
                .context(|| format!("{run_dir}: cannot be locked"))?
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::InUse,
                        format!(
                            "{run_dir}: another command has been attaching or detaching it for more \
                             than {LOCK_TIMEOUT:?}: see `fuser -v {run_dir}`"
                        ),
                    )
                })?;
            // The holder before us may have removed it, and another may have made it anew.
            let locked = lock.metadata().context(|| run_dir.to_string())?;
            match fs::symlink_metadata(run_dir.path()) {
                Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => {
                    return Ok(Some(RunLock(lock)));
                }
                _ => {}
            }
        }
    }
}

/// Takes the lock; `None` where another holds it until `deadline`.
fn lock_until(mut dir: fs::File, deadline: Instant) -> io::Result<Option<Flock<fs::File>>> {
    let mut pause = Duration::from_micros(100);
    loop {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => return Ok(None),
            Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) => dir = again,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
