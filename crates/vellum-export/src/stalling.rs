//! For tests: a device of which some blocks are elsewhere, and come once the test says so.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use vellum_base::block::{BlockDevice, Durability, Extent, MemoryDevice, ZeroMode};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::refuses_to_stall;

/// Blocks from [`Stalling::FAR`] on are elsewhere.
pub(crate) struct Stalling {
    device: MemoryDevice,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: usize,
    came: bool,
}

impl Stalling {
    /// Where what is elsewhere begins, in bytes.
    pub(crate) const FAR: u64 = 8 << 20;

    pub(crate) fn new() -> Self {
        Stalling {
            device: MemoryDevice::new(16 << 20),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Waits until so many requests wait.
    pub(crate) fn wait_for(&self, waiting: usize) {
        let mut state = self.state.lock();
        while state.waiting < waiting {
            let late = Duration::from_secs(30);
            let timed_out = self.changed.wait_for(&mut state, late).timed_out();
            assert!(!timed_out, "{} of {waiting} wait", state.waiting);
        }
    }

    /// Lets all that wait go on.
    pub(crate) fn come(&self) {
        self.state.lock().came = true;
        self.changed.notify_all();
    }
}

impl BlockDevice for Stalling {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset >= Self::FAR {
            let mut state = self.state.lock();
            if !state.came && refuses_to_stall() {
                return Err(Error::new(ErrorKind::Absent, "not here"));
            }
            state.waiting += 1;
            self.changed.notify_all();
            while !state.came {
                self.changed.wait(&mut state);
            }
            state.waiting -= 1;
        }
        self.device.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()> {
        self.device.write_at(buf, offset, durability)
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn may_stall(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.device.discard(offset, len)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<()> {
        self.device.write_zeroes(offset, len, mode, durability)
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        self.device.extents(offset, len, max)
    }
}

/// The time in which 99 of 100 of these end, each of 200.
pub(crate) fn p99(mut work: impl FnMut()) -> Duration {
    let mut took: Vec<Duration> = (0..200)
        .map(|_| {
            let began = Instant::now();
            work();
            began.elapsed()
        })
        .collect();
    took.sort_unstable();
    took[198]
}

/// Fails where what took `idle` by itself took much longer beside requests that wait: longer than twice that, and than
/// a busy host lets a thread wait.
#[track_caller]
pub(crate) fn assert_not_held_up(idle: Duration, beside: Duration) {
    let bound = (idle * 2).max(Duration::from_millis(50));
    assert!(beside <= bound, "{beside:?} at p99, {idle:?} when idle");
}
