//! A device for tests of the NBD server.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vellum_base::block::{BlockDevice, Durability, Extent, MemoryDevice, ZeroMode};
use vellum_base::{Error, ErrorKind, Result};

/// Of the device, in bytes.
pub const SIZE: u64 = 64 << 20;
/// Longer than anything here takes, so that a hang is a failure.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A device in memory that can be made slow, stuck, full or worse, and counts what goes on in it.
pub struct Lab {
    memory: MemoryDevice,
    /// Of every read and write.
    delay: Duration,
    /// Flushes wait until this is true.
    open: Mutex<bool>,
    opened: Condvar,
    flushing: AtomicUsize,
    /// Flushes that came to their end.
    pub flushed: AtomicUsize,
    now: AtomicUsize,
    /// Most reads and writes at one time.
    pub most: AtomicUsize,
    bytes: AtomicUsize,
    /// Most bytes that reads and writes had at one time.
    pub most_bytes: AtomicUsize,
    /// Reads and writes panic.
    pub panics: AtomicBool,
    /// Writes find no room.
    pub full: AtomicBool,
    /// How often a write that found none waited for room.
    pub waited: AtomicUsize,
    /// A flush is expected after each write.
    pub flushes_soon: AtomicBool,
    /// Calls that began what a flush would do; like flushes they wait for [`Lab::let_go`].
    pub ahead: AtomicUsize,
    /// Writes from this offset on fail.
    fails_from: u64,
}

impl Lab {
    pub fn new() -> Self {
        Lab {
            memory: MemoryDevice::new(SIZE),
            delay: Duration::ZERO,
            open: Mutex::new(true),
            opened: Condvar::new(),
            flushing: AtomicUsize::new(0),
            flushed: AtomicUsize::new(0),
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            most_bytes: AtomicUsize::new(0),
            panics: AtomicBool::new(false),
            full: AtomicBool::new(false),
            waited: AtomicUsize::new(0),
            flushes_soon: AtomicBool::new(false),
            ahead: AtomicUsize::new(0),
            fails_from: SIZE,
        }
    }

    pub fn slow(delay: Duration) -> Self {
        Lab {
            delay,
            ..Lab::new()
        }
    }

    pub fn failing_from(offset: u64) -> Self {
        Lab {
            fails_from: offset,
            ..Lab::new()
        }
    }

    pub fn stuck() -> Arc<Self> {
        let lab = Lab::new();
        *lab.open.lock().unwrap() = false;
        Arc::new(lab)
    }

    pub fn let_go(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn await_open(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }

    pub fn await_flushing(&self, wanted: usize) {
        let began = Instant::now();
        while self.flushing.load(SeqCst) != wanted {
            assert!(began.elapsed() < PATIENCE, "the flush did not arrive");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn work(&self, len: usize) {
        assert!(
            !self.panics.load(SeqCst),
            "the device panics, as it was told to"
        );
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
        let bytes = self.bytes.fetch_add(len, SeqCst) + len;
        self.most_bytes.fetch_max(bytes, SeqCst);
        thread::sleep(self.delay);
        self.bytes.fetch_sub(len, SeqCst);
        self.now.fetch_sub(1, SeqCst);
    }
}

impl BlockDevice for Lab {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.work(buf.len());
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()> {
        self.work(buf.len());
        if offset >= self.fails_from {
            return Err(Error::new(
                ErrorKind::Io,
                "the device fails, as it was told to",
            ));
        }
        if self.full.load(SeqCst) {
            return Err(Error::new(ErrorKind::NoSpace, "the disk is full"));
        }
        self.memory.write_at(buf, offset, durability)
    }

    fn wait_for_room(&self) -> bool {
        self.waited.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(2));
        true
    }

    fn flush(&self) -> Result<()> {
        self.flushing.fetch_add(1, SeqCst);
        self.await_open();
        self.flushing.fetch_sub(1, SeqCst);
        self.flushed.fetch_add(1, SeqCst);
        Ok(())
    }

    fn expects_flush(&self) -> bool {
        self.flushes_soon.load(SeqCst)
    }

    fn flush_ahead(&self) {
        self.ahead.fetch_add(1, SeqCst);
        self.await_open();
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.memory.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, m: ZeroMode, d: Durability) -> Result<()> {
        self.memory.write_zeroes(offset, len, m, d)
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        self.memory.extents(offset, len, max)
    }
}
