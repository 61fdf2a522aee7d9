//! The writing half: blocks, flushes, and a log of what was acknowledged.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use uuid::Uuid;

use super::block::{self, Stamp, is_block_size};
use super::log::{Log, LogWriter, Region};
use super::target::{Channel, Target};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::SeededRng;

/// At most so many blocks lie between two flushes of a thread.
const BATCH: u64 = 12;
/// At most so many blocks go into one request.
const RUN: u64 = 4;
/// Regions are whole multiples of this, so that they can be read past the page cache.
const REGION_UNIT: u64 = 4096;

/// How to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteOptions {
    /// Writers at once, each with blocks of its own; at least 1.
    pub threads: usize,
    /// When to end; `None`: when the target fails or the process is killed.
    pub time: Option<Duration>,
    /// Bytes to write to, from the start of the target; less where it is smaller.
    pub size: u64,
    /// Bytes of a block: a power of two from 512 to 1 MiB.
    pub block: u64,
    /// Destroy what a device, an export or a file that is not empty holds.
    pub overwrite: bool,
}

/// What was written until the time was up.
#[derive(Debug, Clone, Serialize)]
pub struct WriteReport {
    /// Names this run.
    pub run: Uuid,
    /// Blocks that the target acknowledged as durable, each counted as often as it was written.
    pub acknowledged: u64,
    /// Flushes and synchronous writes.
    pub flushes: u64,
    /// How long it took.
    pub seconds: f64,
}

struct Run<'a> {
    id: Uuid,
    region: Region,
    log: LogWriter,
    deadline: Option<Instant>,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    flushes: AtomicU64,
    failure: Mutex<Option<Error>>,
    begun: &'a (dyn Fn() + Sync),
}

/// Writes to `target` until the time is up, and logs what it acknowledged. `begun` is called after
/// the first acknowledgement.
///
/// # Errors
/// Where the target fails, which ends the run: the message says how much was acknowledged, and
/// [`super::check()`] whether it is there. [`ErrorKind::InvalidInput`] for options that cannot work;
/// [`ErrorKind::AlreadyExists`] where something would be destroyed, or the log is there;
/// [`ErrorKind::Unsupported`] for an NBD server without FLUSH.
pub fn write(
    target: &Target,
    log: &Log,
    options: &WriteOptions,
    begun: &(dyn Fn() + Sync),
) -> Result<WriteReport> {
    check_options(target, log, options)?;
    let threads = options.threads.max(1);
    let opened = target.open(threads, options.size, options.overwrite)?;
    let blocks = opened.size / REGION_UNIT * REGION_UNIT / options.block;
    if blocks < threads as u64 * RUN {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} bytes are too few for {threads} threads that write blocks of {}",
                opened.size, options.block
            ),
        ));
    }
    let id = Uuid::new_v4();
    let region = Region {
        blocks,
        block: options.block,
    };
    let begin = Instant::now();
    let run = Run {
        id,
        region,
        log: LogWriter::start(log, id, region)?,
        deadline: options.time.map(|time| begin + time),
        stop: AtomicBool::new(false),
        acknowledged: AtomicU64::new(0),
        flushes: AtomicU64::new(0),
        failure: Mutex::default(),
        begun,
    };
    run.all_threads(opened.channels);
    let acknowledged = run.acknowledged.load(Ordering::Relaxed);
    if let Some(error) = run.failure.lock().take() {
        return Err(error.context(format!(
            "the target failed after it acknowledged {acknowledged} writes; `vellum \
             verify-durability check` says whether they are there"
        )));
    }
    run.log.end()?;
    Ok(WriteReport {
        run: id,
        acknowledged,
        flushes: run.flushes.load(Ordering::Relaxed),
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Refuses what cannot work, and warns of what would spoil the verdict.
fn check_options(target: &Target, log: &Log, options: &WriteOptions) -> Result<()> {
    if !is_block_size(options.block) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "a block of {} bytes: take a power of two from 512 to 1M",
                options.block
            ),
        ));
    }
    if let Log::File(path) = log
        && target.shares_disk_with(path)
    {
        tracing::warn!(
            log = %path.display(),
            "the log is on the file system that is put to the test: when that loses data the log \
             loses its lines too, and nobody notices; put it on another disk"
        );
    }
    Ok(())
}

impl Run<'_> {
    /// Writes through each channel on a thread of its own, until the time is up or one fails.
    fn all_threads(&self, channels: Vec<Box<dyn Channel>>) {
        let threads = channels.len() as u64;
        std::thread::scope(|scope| {
            for (number, channel) in (0..).zip(channels) {
                let first = self.region.blocks * number / threads;
                let end = self.region.blocks * (number + 1) / threads;
                scope.spawn(move || {
                    if let Err(error) = self.thread(channel, first, end) {
                        // What fails after the first is a consequence.
                        self.failure.lock().get_or_insert(error);
                        self.stop.store(true, Ordering::Relaxed);
                    }
                });
            }
        });
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
            || self
                .deadline
                .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Writes to blocks `first` to `end`, which are nobody else's.
    fn thread(&self, mut channel: Box<dyn Channel>, first: u64, end: u64) -> Result<()> {
        let seed = self.id.as_u128() as u64 ^ first;
        let mut rng = SeededRng::new(seed);
        let durable_writes = channel.has_durable_writes();
        let mut sequence = 0;
        while !self.is_over() {
            let mut written = Vec::new();
            if durable_writes && rng.chance(1, 4) {
                let (bytes, offset) =
                    self.next_request(&mut rng, first, end, &mut sequence, &mut written);
                channel.write_durable(&bytes, offset)?;
            } else {
                // Often few, as databases do, so that both ways of a flush are met.
                let wanted = if rng.chance(1, 2) {
                    1
                } else {
                    1 + rng.below(BATCH)
                };
                while (written.len() as u64) < wanted {
                    let (bytes, offset) =
                        self.next_request(&mut rng, first, end, &mut sequence, &mut written);
                    channel.write(&bytes, offset)?;
                }
                channel.flush()?;
            }
            self.log.acknowledged(&written)?;
            self.flushes.fetch_add(1, Ordering::Relaxed);
            let count = written.len() as u64;
            if self.acknowledged.fetch_add(count, Ordering::Relaxed) == 0 {
                (self.begun)();
            }
        }
        Ok(())
    }

    /// The bytes of the next request and where they go; notes the versions in `written`.
    fn next_request(
        &self,
        rng: &mut SeededRng,
        first: u64,
        end: u64,
        sequence: &mut u64,
        written: &mut Vec<(u64, u64)>,
    ) -> (Vec<u8>, u64) {
        let count = if rng.chance(2, 3) {
            1
        } else {
            1 + rng.below(RUN)
        };
        let start = first + rng.below(end - first);
        let count = count.min(end - start);
        let mut bytes = Vec::with_capacity((count * self.region.block) as usize);
        for block in start..start + count {
            *sequence += 1;
            let stamp = Stamp {
                run: self.id,
                block,
                sequence: *sequence,
            };
            block::encode(&mut bytes, stamp, self.region.block as usize);
            written.push((block, *sequence));
        }
        (bytes, start * self.region.block)
    }
}
