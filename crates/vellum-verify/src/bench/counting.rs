//! What the counters of a chain cost: the same requests to a chain that counts and to one that does
//! not, in turns of a few hundred. Measured is the CPU time of this thread, which other work on the
//! machine changes little.

use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};

use super::{Bench, CaseResult, Cases, DEVICE, median};
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability};
use vellum_base::error::{Result, ResultExt};
use vellum_core::chain::{Chain, ChainStats};

/// Requests of one turn.
const TURN: u64 = 256;
/// Turns of each side in a round.
const TURNS: u64 = 128;
const BLOCKS: u64 = DEVICE / BLOCK_SIZE;

/// A kind of request.
struct Case {
    name: &'static str,
    /// Write every block before.
    filled: bool,
    request: fn(&Chain, u64, &mut [u8]) -> Result<()>,
}

fn write(chain: &Chain, offset: u64, buf: &mut [u8]) -> Result<()> {
    chain.write_at(buf, offset, Durability::Buffered)
}

fn read(chain: &Chain, offset: u64, buf: &mut [u8]) -> Result<()> {
    chain.read_at(buf, offset)
}

const CASES: &[Case] = &[
    Case {
        name: "counted: first write, 4 KiB at random",
        filled: false,
        request: write,
    },
    Case {
        name: "counted: rewrite, 4 KiB at random",
        filled: true,
        request: write,
    },
    Case {
        name: "counted: read, 4 KiB of the top at random",
        filled: true,
        request: read,
    },
    Case {
        name: "counted: read, 4 KiB of a layer below at random",
        filled: false,
        request: read,
    },
];

/// Runs the cases.
pub(super) fn run<D: FnMut(&CaseResult)>(bench: &Bench, cases: &mut Cases<'_, D>) -> Result<()> {
    for case in CASES {
        if !cases.wants(case.name) {
            continue;
        }
        let mut mine = Vec::new();
        let mut other = Vec::new();
        // The first round warms up and does not count.
        for round in 0..=cases.rounds.max(1) {
            // Which of the two chains was made first matters by more than the counters do.
            let (with, without) = one_round(bench, case, false)?;
            let (with_too, without_too) = one_round(bench, case, true)?;
            if round > 0 {
                mine.push((with + with_too) / 2.0);
                other.push((without + without_too) / 2.0);
            }
        }
        cases.note(CaseResult::new(
            case.name,
            "the same, not counted (CPU time)",
            &mut mine,
            &mut other,
        ));
    }
    Ok(())
}

/// CPU seconds a request: (counted, not counted).
#[expect(clippy::indexing_slicing, reason = "there are two sides")]
fn one_round(bench: &Bench, case: &Case, swapped: bool) -> Result<(f64, f64)> {
    let (_first, first) = bench.counted_chain(counters(!swapped))?;
    let (_second, second) = bench.counted_chain(counters(swapped))?;
    let (with, without) = if swapped {
        (second, first)
    } else {
        (first, second)
    };
    let mut buf = vec![0xa5; BLOCK_SIZE as usize];
    if case.filled {
        for chain in [&with, &without] {
            let chunk = vec![1; 1 << 20];
            for at in (0..DEVICE).step_by(1 << 20) {
                chain.write_at(&chunk, at, Durability::Buffered)?;
            }
            chain.flush()?;
        }
    }
    let mut turns = [Vec::new(), Vec::new()];
    // An odd stride visits every block of a power of two once.
    let stride = (BLOCKS as f64 * 0.618) as u64 | 1;
    for turn in 0..TURNS {
        // Who comes first changes, in case it matters.
        let mut sides = [(&with, 0), (&without, 1)];
        if turn % 2 == 1 {
            sides.reverse();
        }
        for (chain, side) in sides {
            let begin = cpu_seconds()?;
            for request in turn * TURN..(turn + 1) * TURN {
                (case.request)(chain, request * stride % BLOCKS * BLOCK_SIZE, &mut buf)?;
            }
            let seconds = cpu_seconds()? - begin;
            turns[side].push(seconds / TURN as f64);
        }
    }
    let [mut with, mut without] = turns;
    Ok((median(&mut with), median(&mut without)))
}

fn counters(on: bool) -> Arc<ChainStats> {
    Arc::new(if on {
        ChainStats::default()
    } else {
        ChainStats::off()
    })
}

fn cpu_seconds() -> Result<f64> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .context(|| "this thread's CPU time cannot be read")?;
    Ok(now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9)
}
