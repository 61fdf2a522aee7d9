//! Where each block comes from.

use super::Chain;
use super::base::BaseSource;
use super::device::top_run;
use vellum_base::block::{Block, BlockDevice, BlockState, Blocks, Run, Span, push_run};

/// Blocks that are looked up at a time: an answer may end within them.
const STEP: Blocks = Blocks::new(1 << 16);

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

impl Chain {
    /// The sources of the blocks from `start` on, in order and without gaps, in at most `max`
    /// runs; neighbours may be of one source. The end of the device ends the list.
    pub fn sources(&self, start: Block, max: usize) -> Vec<Run<Source>> {
        self.sources_of(start, Block::FIRST + Blocks::to_hold(self.size()), max)
    }

    /// As [`Chain::sources`], up to the block `end`, or the end of the device.
    pub fn sources_of(&self, start: Block, end: Block, max: usize) -> Vec<Run<Source>> {
        let end = end.min(Block::FIRST + Blocks::to_hold(self.size()));
        let mut runs = Vec::new();
        let guard = self.top.read();
        let mut at = start;
        while at < end && runs.len() < max {
            let run = top_run(guard.as_deref(), Span::between(at, end).at_most(STEP));
            match run.value {
                BlockState::Data => push_run(&mut runs, Run::new(run.span, Source::Top)),
                BlockState::Zero => push_run(&mut runs, Run::new(run.span, Source::Zero)),
                BlockState::Parent => self.base.resolve(run.span, |run| {
                    let source = match run.value {
                        BaseSource::Hole => Source::Hole,
                        BaseSource::Zero => Source::Zero,
                        BaseSource::Layer(number, _) => Source::Sealed(number),
                    };
                    push_run(&mut runs, Run::new(run.span, source));
                }),
            }
            at = run.end();
        }
        runs.truncate(max);
        runs
    }
}
