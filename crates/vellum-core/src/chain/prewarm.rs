//! Copy-up ahead of traffic.

use serde::{Deserialize, Serialize};

use super::Chain;
use super::base::BaseSource;
use super::device::{blocks_of, read_only};
use crate::layer::STATE_DATA;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, BlockDevice, check_range};
use vellum_base::error::Result;

/// Blocks that are locked and copied at a time: a write to one of them waits for so many.
const CHUNK: u64 = 64;

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
    /// Allocates all blocks of a byte range in the top layer, as they read now. No client sees a
    /// change: writers of a block wait for its copy, or the copy finds what they wrote. What a
    /// crash takes back reads the same as before.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::ReadOnly`] without a top, [`vellum_base::ErrorKind::OutOfRange`] past the end,
    /// [`vellum_base::ErrorKind::NoSpace`] when the host is full: what was copied so far stays.
    pub fn copy_up(&self, offset: u64, len: u64) -> Result<CopiedUp> {
        check_range(offset, len, self.size())?;
        let mut done = CopiedUp::default();
        if len == 0 {
            return Ok(done);
        }
        let (first, blocks) = blocks_of(offset, len);
        let mut buf = vec![0; CHUNK as usize * BLOCK_LEN];
        let end = first + blocks;
        let mut at = first;
        while at < end {
            let piece = CHUNK.min(end - at);
            done.add(self.copy_up_chunk(at, piece, &mut buf)?);
            at += piece;
        }
        Ok(done)
    }

    fn copy_up_chunk(&self, start: u64, len: u64, buf: &mut [u8]) -> Result<CopiedUp> {
        let guard = self.top.read();
        let top = guard.as_deref().ok_or_else(read_only)?;
        top.flush_if_due()?;
        // Writers take the same lock: nobody changes a block between its reading and its writing.
        let _lock = top.lock_blocks(start, len);
        let mut missing = Vec::new();
        let mut done = CopiedUp::default();
        top.resolve(start, len, |run| match run.value {
            STATE_DATA => done.present += run.len,
            value => missing.push((run.start, run.len, value == crate::layer::ABSENT)),
        });
        for (start, len, below) in missing {
            if !below {
                top.allocate_zeroed(start, len)?;
                done.zeroed += len;
                continue;
            }
            let mut runs = Vec::new();
            self.base.resolve(start, len, |run| runs.push(run));
            for run in runs {
                if let BaseSource::Layer(_, layer) = &run.source {
                    let bytes = buf.get_mut(..(run.len * BLOCK_SIZE) as usize);
                    let bytes = bytes.unwrap_or_default();
                    layer.read_blocks(bytes, run.start)?;
                    top.write_blocks(run.start, bytes)?;
                    done.copied += run.len;
                } else {
                    top.allocate_zeroed(run.start, run.len)?;
                    done.zeroed += run.len;
                }
            }
        }
        self.stats.prewarmed(done.copied, done.zeroed);
        Ok(done)
    }
}
