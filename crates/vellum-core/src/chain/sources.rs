//! Where each block comes from.

use super::Chain;
use super::base::BaseSource;
use super::device::top_run;
use crate::layer::{ABSENT, STATE_DATA};
use vellum_base::block::BlockDevice;

/// Blocks that are looked up at a time: an answer may end within them.
const STEP: u64 = 1 << 16;

/// Who answers for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// No layer says anything: zeros.
    Hole,
    /// A layer says that it is zero.
    Zero,
    /// The sealed layer with this number, counted from the bottom.
    Sealed(u32),
    /// The writable layer.
    Top,
}

/// A run of blocks of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRun {
    /// First block.
    pub start: u64,
    /// Length in blocks, never 0.
    pub len: u64,
    /// Who answers.
    pub source: Source,
}

impl Chain {
    /// The sources of the blocks from `start` on, in order and without gaps, in at most `max`
    /// runs; neighbours may be of one source. The end of the device ends the list.
    pub fn sources(&self, start: u64, max: usize) -> Vec<SourceRun> {
        let end = self.size().div_ceil(vellum_base::block::BLOCK_SIZE);
        let mut runs: Vec<SourceRun> = Vec::new();
        let guard = self.top.read();
        let mut at = start;
        while at < end && runs.len() < max {
            let run = top_run(guard.as_deref(), at, STEP.min(end - at));
            match run.value {
                STATE_DATA => push(&mut runs, run.start, run.len, Source::Top),
                ABSENT => self.base.resolve(run.start, run.len, |run| {
                    let source = match run.source {
                        BaseSource::Hole => Source::Hole,
                        BaseSource::Zero => Source::Zero,
                        BaseSource::Layer(number, _) => Source::Sealed(number),
                    };
                    push(&mut runs, run.start, run.len, source);
                }),
                _ => push(&mut runs, run.start, run.len, Source::Zero),
            }
            at += run.len;
        }
        runs.truncate(max);
        runs
    }
}

fn push(runs: &mut Vec<SourceRun>, start: u64, len: u64, source: Source) {
    match runs.last_mut() {
        Some(last) if last.source == source && last.start + last.len == start => last.len += len,
        _ => runs.push(SourceRun { start, len, source }),
    }
}
