//! Random workloads that a seed decides, and their shrinking.

use vellum::block::BLOCK_SIZE;
use vellum::storage::SeededRng;

/// Blocks of the device under test.
pub const BLOCKS: u64 = 48;
pub const SIZE: u64 = BLOCKS * BLOCK_SIZE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Write {
        offset: u64,
        len: u64,
        fua: bool,
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
}

fn range(rng: &mut SeededRng) -> (u64, u64) {
    // Most requests meet on a few blocks.
    let block = if rng.chance(3, 4) {
        rng.below(12)
    } else {
        rng.below(BLOCKS)
    };
    let offset = block * BLOCK_SIZE;
    let (offset, len) = match rng.below(8) {
        0..=2 => (offset, BLOCK_SIZE),
        3 => (offset, BLOCK_SIZE * (1 + rng.below(5))),
        4 => (offset, BLOCK_SIZE * (1 + rng.below(BLOCKS))),
        5 => (offset + 512 * rng.below(8), 512 * (1 + rng.below(20))),
        6 => (offset + rng.below(4096), 1 + rng.below(300)),
        _ => (offset + rng.below(4096), 1 + rng.below(9000)),
    };
    (offset, len.min(SIZE - offset))
}

/// A workload of `count` operations.
pub fn generate(seed: u64, count: usize) -> Vec<Op> {
    let mut rng = SeededRng::new(seed);
    // Some workloads flush all the time, some hardly ever.
    let flushes = [2, 8, 20][rng.below(3) as usize];
    (0..count)
        .map(|_| {
            let (offset, len) = range(&mut rng);
            let fua = rng.chance(1, 6);
            match rng.below(40 + flushes) {
                0..=21 => Op::Write { offset, len, fua },
                22..=25 => Op::Discard { offset, len },
                26..=29 => Op::Zero {
                    offset,
                    len,
                    keep: rng.chance(1, 2),
                    fua,
                },
                30 | 31 => Op::Snapshot,
                32 => Op::Checksum(rng.bits()),
                33 => Op::Close,
                34 => Op::Reopen,
                35 | 36 => Op::Kill,
                37..=39 => Op::Cut(rng.bits()),
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
