//! The host's switch for FUSE over io_uring, which tests set and put back.
#![allow(missing_docs)]

use std::fs::{self, File};

use nix::fcntl::{Flock, FlockArg};

/// The switch.
pub const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Has the host offer FUSE over io_uring until it is dropped, also when the test fails, and then puts back
/// what was there. Tests that need it take turns.
pub struct Offered {
    before: String,
    _turn: Flock<File>,
}

impl Offered {
    pub fn new(value: &str) -> Offered {
        let lock = File::create("/tmp/vellum-test-enable-uring.lock").unwrap();
        let turn = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno);
        let before = fs::read_to_string(SWITCH).unwrap_or_else(|error| {
            panic!("{SWITCH}: {error}: these tests need a kernel with FUSE over io_uring (6.18)")
        });
        fs::write(SWITCH, value).unwrap();
        Offered {
            before,
            _turn: turn.unwrap(),
        }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, &self.before) {
            eprintln!("{SWITCH} is not what it was: {error}");
        }
    }
}
