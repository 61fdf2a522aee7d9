//! Copy-up ahead of traffic.

use serde::{Deserialize, Serialize};

use super::Chain;
use super::base::BaseSource;
use super::device::read_only;
use crate::layer::{RangeGuard, SealedLayer, WritableLayer, once_here};
use vellum_base::block::{
    BlockDevice, BlockState, Blocks, Offset, Run, Span, check_range, part_mut,
};
use vellum_base::error::Result;

/// Blocks that are locked and copied at a time: a write to one of them waits for so many.
const CHUNK: Blocks = Blocks::new(64);

/// What [`Chain::copy_up`] did, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedUp {
    /// Copied from a layer below into the top.
    pub copied: u64,
    /// Zero below: allocated in the top.
    pub zeroed: u64,
    /// In the top before.
    pub present: u64,
}

impl CopiedUp {
    /// Adds another's blocks.
    pub fn add(&mut self, other: CopiedUp) {
        self.copied += other.copied;
        self.zeroed += other.zeroed;
        self.present += other.present;
    }
}

impl Chain {
    /// Allocates all blocks that `len` bytes from `offset` touch in the top layer, as they read now. No client sees a
    /// change: writers of a block wait for its copy, or the copy finds what they wrote. What a
    /// crash takes back reads the same as before.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::ReadOnly`] without a top, [`vellum_base::ErrorKind::OutOfRange`] past the end,
    /// [`vellum_base::ErrorKind::NoSpace`] when the host is full: what was copied so far stays.
    pub fn copy_up(&self, offset: Offset, len: u64) -> Result<CopiedUp> {
        check_range(offset.get(), len, self.size())?;
        let mut done = CopiedUp::default();
        let mut buf = vec![0; CHUNK.buffer_len()];
        for chunk in Span::touched_by(offset, len).pieces(CHUNK) {
            done.add(once_here(|| self.copy_up_chunk(chunk, &mut buf))?);
        }
        Ok(done)
    }

    fn copy_up_chunk(&self, chunk: Span, buf: &mut [u8]) -> Result<CopiedUp> {
        let guard = self.top.read();
        let top = guard.as_deref().ok_or_else(read_only)?;
        // Writers take the same lock: nobody changes a block between its reading and its writing.
        let held = top.lock_blocks(chunk)?;
        let mut missing = Vec::new();
        let mut done = CopiedUp::default();
        top.resolve(chunk, |run| match run.value {
            BlockState::Data => done.present += run.len().get(),
            BlockState::Zero => missing.push(Run::new(run.span, BaseSource::Zero)),
            BlockState::Parent => self.base.resolve(run.span, |below| missing.push(below)),
        });
        for run in missing {
            if let BaseSource::Layer(_, layer) = &run.value {
                copy(layer, top, &held, run.span, buf)?;
                done.copied += run.len().get();
            } else {
                top.allocate_zeroed(&held, run.span)?;
                done.zeroed += run.len().get();
            }
        }
        self.stats.prewarmed(done.copied, done.zeroed);
        Ok(done)
    }
}

/// Copies blocks by way of `buf`, which has room for them.
fn copy(
    layer: &SealedLayer,
    top: &WritableLayer,
    held: &RangeGuard<'_>,
    span: Span,
    buf: &mut [u8],
) -> Result<()> {
    let bytes = part_mut(buf, 0, span.len().buffer_len());
    layer.read_blocks(bytes, span.start())?;
    top.write_blocks(held, span.start(), bytes).map(drop)
}
