//! How those who hand work over say that soon nobody will be there to take it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use vellum_base::error::{Result, ResultExt};

/// That threads are short: told by those who took the last spare one, heard by who starts more.
#[derive(Debug, Clone)]
pub struct Shortage(Arc<EventFd>);

impl Shortage {
    /// One that nobody has told of.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) with too many open files.
    pub fn new() -> Result<Shortage> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let told = EventFd::from_flags(flags).context(|| "an eventfd cannot be made")?;
        Ok(Shortage(Arc::new(told)))
    }

    /// What can be read once it was told.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn tell(&self) {
        // It can only fail where it has been written 2^64 times.
        let _ = self.0.write(1);
    }

    /// True where it was told since the last time.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }
}
