//! What of a host a ring needs.

use std::fs;
use std::path::Path;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue};

use super::memory::MAX_QUEUES;
use vellum_base::error::{Error, ErrorKind, Result};

/// Where the host says that FUSE file systems may use io_uring.
pub const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";
/// With one of them set, kernels of 2025 use a request that is not there.
const TIMEOUTS: [&str; 2] = [
    "/proc/sys/fs/fuse/default_request_timeout",
    "/proc/sys/fs/fuse/max_request_timeout",
];

/// Whether this host can serve by rings, and if not, why and what to do.
///
/// # Errors
/// [`ErrorKind::Unsupported`].
pub fn check() -> Result<()> {
    let refuse = |text: String| Err(Error::new(ErrorKind::Unsupported, text));
    match fs::read_to_string(SWITCH) {
        Ok(text) if text.trim() == "Y" => {}
        Ok(_) => {
            return refuse(format!(
                "FUSE over io_uring is off on this host: `echo Y > {SWITCH}`, and for every boot \
                 fuse.enable_uring=1 on the kernel's command line"
            ));
        }
        Err(_) => {
            return refuse("this kernel has no FUSE over io_uring (Linux 6.14 has)".to_owned());
        }
    }
    for path in TIMEOUTS {
        if fs::read_to_string(path).is_ok_and(|text| text.trim() != "0") {
            return refuse(format!(
                "{path} is not 0, with which FUSE over io_uring is not safe: set it to 0"
            ));
        }
    }
    let queues = possible_processors();
    if queues == 0 || queues > MAX_QUEUES {
        return refuse(format!(
            "this host may have {queues} processors: FUSE over io_uring is used up to {MAX_QUEUES}"
        ));
    }
    let ring = IoUring::<Entry128, cqueue::Entry>::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(2);
    match ring {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::with_source(
            ErrorKind::Unsupported,
            "io_uring cannot be used here (sysctl kernel.io_uring_disabled must be 0 or 1)",
            error,
        )),
    }
}

/// The processors that the host may ever have, which is how many queues a session has; 0 where that cannot
/// be told.
pub fn possible_processors() -> usize {
    let text = fs::read_to_string(Path::new(POSSIBLE)).unwrap_or_default();
    count(text.trim())
}

/// The highest number in a list as `0-3,8`, plus one; 0 for what is no list.
fn count(list: &str) -> usize {
    let last = list
        .rsplit([',', '-'])
        .next()
        .and_then(|last| last.parse::<usize>().ok());
    last.map_or(0, |last| last.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_processors_are_counted_to_the_highest_number() {
        assert_eq!(count("0"), 1);
        assert_eq!(count("0-1"), 2);
        assert_eq!(count("0-3,8"), 9);
        assert_eq!(count(""), 0);
        assert_eq!(count("all"), 0);
        assert!(possible_processors() > 0);
    }
}
