//! Random workloads that a seed decides, and their shrinking.

use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, ZeroMode};
use vellum_base::storage::SeededRng;

use super::model::pattern;

/// Blocks of the device under test.
pub const BLOCKS: u64 = 48;
pub const SIZE: u64 = BLOCKS * BLOCK_SIZE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Write {
        offset: u64,
        len: u64,
        fua: bool,
        /// What a flush would write is written down after it.
        ahead: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        keep: bool,
        fua: bool,
    },
    Flush,
    /// Seal the top under the live device and go on in a new layer.
    Snapshot,
    /// Give a sealed layer its checksums.
    Checksum(u64),
    /// Close, and go on without opening again.
    Close,
    /// Close, open.
    Reopen,
    /// The process dies and comes back: the disk keeps its power.
    Kill,
    /// The power goes and comes back.
    Cut(u64),
    /// The file system is shut down and mounted again while the machine runs on.
    Remount(u64),
}

/// A change of bytes: what a write, a discard or a write of zeros does.
pub struct Change {
    pub offset: u64,
    /// What a client reads there afterwards.
    pub bytes: Vec<u8>,
    pub fua: bool,
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    Write,
    Discard,
    Zero(ZeroMode),
}

impl Op {
    /// The change that it is, if it is one. `tag` counts writes, whose bytes follow from it.
    pub fn change(self, tag: &mut u16) -> Option<Change> {
        let zeros = |len: u64| vec![0; len as usize];
        let (offset, bytes, fua, how) = match self {
            Op::Write {
                offset, len, fua, ..
            } => {
                *tag += 1;
                (offset, pattern(*tag, offset, len), fua, How::Write)
            }
            Op::Discard { offset, len } => (offset, zeros(len), false, How::Discard),
            Op::Zero {
                offset,
                len,
                keep,
                fua,
            } => {
                let mode = if keep {
                    ZeroMode::KeepAllocated
                } else {
                    ZeroMode::MayUnmap
                };
                (offset, zeros(len), fua, How::Zero(mode))
            }
            _ => return None,
        };
        Some(Change {
            offset,
            bytes,
            fua,
            how,
        })
    }
}

impl Change {
    pub fn apply(&self, device: &dyn BlockDevice) -> vellum_base::Result<()> {
        let durability = if self.fua {
            Durability::Durable
        } else {
            Durability::Buffered
        };
        let len = self.bytes.len() as u64;
        match self.how {
            How::Write => device.write_at(&self.bytes, self.offset, durability),
            How::Discard => device.discard(self.offset, len),
            How::Zero(mode) => device.write_zeroes(self.offset, len, mode, durability),
        }
    }
}

/// What a workload is like; drawn once for each, since an even mix of everything would fill no
/// journal and let no layer live long.
struct Mood {
    flushes: u64,
    restarts: u64,
    large: u64,
    blocks: u64,
    ahead: u64,
}

impl Mood {
    fn draw(rng: &mut SeededRng) -> Self {
        let mut one_of = |choices: [u64; 3]| choices[rng.below(3) as usize];
        Mood {
            flushes: one_of([2, 15, 60]),
            restarts: one_of([0, 2, 9]),
            large: one_of([0, 1, 6]),
            blocks: one_of([4, 12, BLOCKS]),
            ahead: one_of([0, 1, 3]),
        }
    }

    fn range(&self, rng: &mut SeededRng) -> (u64, u64) {
        let block = if rng.chance(3, 4) {
            rng.below(self.blocks)
        } else {
            rng.below(BLOCKS)
        };
        let offset = block * BLOCK_SIZE;
        let (offset, len) = match rng.below(8 + self.large) {
            0..=3 => (offset, BLOCK_SIZE),
            4 => (offset, BLOCK_SIZE * (1 + rng.below(5))),
            5 => (offset + 512 * rng.below(8), 512 * (1 + rng.below(20))),
            6 => (offset + rng.below(4096), 1 + rng.below(300)),
            7 => (offset + rng.below(4096), 1 + rng.below(9000)),
            _ => (offset, BLOCK_SIZE * (1 + rng.below(BLOCKS))),
        };
        (offset, len.min(SIZE - offset))
    }
}

/// A workload of `count` operations.
pub fn generate(seed: u64, count: usize) -> Vec<Op> {
    let mut rng = SeededRng::new(seed);
    let mood = Mood::draw(&mut rng);
    (0..count)
        .map(|_| {
            let (offset, len) = mood.range(&mut rng);
            let fua = rng.chance(mood.flushes, 120);
            let ahead = rng.chance(mood.ahead, 4);
            match rng.below(34 + mood.restarts + mood.flushes) {
                0..=21 => Op::Write {
                    offset,
                    len,
                    fua,
                    ahead,
                },
                22..=26 => Op::Discard { offset, len },
                27..=31 => Op::Zero {
                    offset,
                    len,
                    keep: rng.chance(1, 2),
                    fua,
                },
                32 => Op::Checksum(rng.bits()),
                33 if rng.chance(1, 2) => Op::Snapshot,
                kind if kind < 34 + mood.restarts => match rng.below(8) {
                    0 => Op::Close,
                    1 => Op::Reopen,
                    2..=4 => Op::Kill,
                    5 => Op::Remount(rng.bits()),
                    _ => Op::Cut(rng.bits()),
                },
                _ => Op::Flush,
            }
        })
        .collect()
}

/// Leaves out whatever can be left out while `fails` stays true.
pub fn shrink(ops: &[Op], mut fails: impl FnMut(&[Op]) -> bool) -> Vec<Op> {
    let mut ops = ops.to_vec();
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..(at + chunk).min(ops.len()));
            if fails(&fewer) {
                ops = fewer;
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    ops
}
