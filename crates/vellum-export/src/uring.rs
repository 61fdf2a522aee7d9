//! What all threads that serve by an io_uring of their own have in common.

use std::io;
use std::time::{Duration, Instant};

/// A request that takes longer has waited for the host.
const SLOW: Duration = Duration::from_micros(100);
/// So many requests that may have to wait are handed over after one that kept others waiting.
const CROWD: u32 = 64;

/// True for what a later call to the kernel may not say again.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)
    )
}

/// Whether others wait while a thread waits for the host: learnt from the requests before.
#[derive(Debug)]
pub(crate) struct Crowd {
    /// While it is not 0, requests that would wait are handed over.
    left: u32,
    began: Instant,
}

impl Crowd {
    /// Nobody has waited yet.
    pub(crate) fn new() -> Crowd {
        Crowd {
            left: 0,
            began: Instant::now(),
        }
    }

    /// The thread begins with a request.
    pub(crate) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// It has carried the request out; `came` says whether others came meanwhile.
    pub(crate) fn done(&mut self, came: impl FnOnce() -> bool) {
        self.handed_over();
        if self.began.elapsed() > SLOW && came() {
            self.left = CROWD;
        }
    }

    /// It gave the request to another thread.
    pub(crate) fn handed_over(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// True where nobody seems to wait for this thread.
    pub(crate) fn is_calm(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_request_that_kept_others_waiting_the_next_64_are_not_waited_for() {
        let mut crowd = Crowd::new();
        crowd.done(|| true);
        assert!(crowd.is_calm(), "it was quick");
        crowd.begin();
        std::thread::sleep(SLOW * 2);
        crowd.done(|| true);
        for _ in 0..CROWD {
            assert!(!crowd.is_calm());
            crowd.handed_over();
        }
        assert!(crowd.is_calm());
    }
}
