//! Writes to a chain: whole blocks go to the top, parts of a block by way of a copy-up where the top
//! does not have it, and zeros are a state where they can be.

use super::Chain;
use crate::layer::{CHANGES_AT_ONCE, RangeGuard, WritableLayer};
use vellum_base::block::{
    BLOCK_LEN, BLOCK_SIZE, Block, BlockState, Blocks, Offset, Run, Span, ZeroMode, in_memory, part,
    part_mut,
};
use vellum_base::error::{ErrorKind, Result};

/// Flushes that one piece of a request may take for room in the log of changes.
const FLUSHES_AT_MOST: usize = 64;
/// A request for zeros is carried out in pieces of so many bytes.
const ZERO_PIECE: u64 = CHANGES_AT_ONCE * BLOCK_SIZE;

/// A range of bytes, cut at the borders of blocks: a part of a block, whole blocks, a part of a block.
struct Cut {
    /// Bytes before the first border.
    head: u64,
    /// The whole blocks behind them.
    whole: Span,
    /// Bytes behind the last border, unless it is the first.
    tail: u64,
}

impl Cut {
    fn of(offset: Offset, len: u64) -> Cut {
        let head = offset.to_border().min(len);
        let whole = Blocks::whole_in(len - head);
        Cut {
            head,
            whole: Span::new((offset + head).block_from(), whole),
            tail: len - head - whole.bytes(),
        }
    }
}

impl Chain {
    /// Writes `buf` at `offset`, buffered. Returns how many blocks that allocated.
    pub(super) fn write_bytes(
        &self,
        top: &WritableLayer,
        buf: &[u8],
        offset: Offset,
    ) -> Result<Blocks> {
        let touched = Span::touched_by(offset, buf.len() as u64);
        with_blocks(top, touched, |held| self.write_once(top, held, buf, offset))
    }

    fn write_once(
        &self,
        top: &WritableLayer,
        held: &RangeGuard<'_>,
        buf: &[u8],
        offset: Offset,
    ) -> Result<Blocks> {
        let cut = Cut::of(offset, buf.len() as u64);
        let (head, rest) = buf.split_at(in_memory(cut.head));
        let (whole, tail) = rest.split_at(cut.whole.len().buffer_len());
        let mut allocated = Blocks::NONE;
        if !head.is_empty() {
            allocated += self.write_partial(top, held, head, offset)?;
        }
        if !whole.is_empty() {
            allocated += top.write_blocks(held, cut.whole.start(), whole)?;
            self.stats.stored(whole.len() as u64);
        }
        if !tail.is_empty() {
            allocated += self.write_partial(top, held, tail, cut.whole.end().offset())?;
        }
        Ok(allocated)
    }

    /// Writes bytes within one block: in place where the top has it, else with a copy-up. Returns
    /// how many blocks that allocated.
    fn write_partial(
        &self,
        top: &WritableLayer,
        held: &RangeGuard<'_>,
        buf: &[u8],
        offset: Offset,
    ) -> Result<Blocks> {
        self.write_partial_by(top, held, buf, offset, WritableLayer::write_blocks)
    }

    /// As [`Chain::write_partial`], where the whole block is written by `write`.
    fn write_partial_by(
        &self,
        top: &WritableLayer,
        held: &RangeGuard<'_>,
        buf: &[u8],
        offset: Offset,
        write: impl Fn(&WritableLayer, &RangeGuard<'_>, Block, &[u8]) -> Result<Blocks>,
    ) -> Result<Blocks> {
        let block = offset.block();
        let state = top.state(block);
        if state == BlockState::Data {
            self.stats.stored(buf.len() as u64);
            return top.write_within(held, offset, buf).map(|()| Blocks::NONE);
        }
        let mut whole = [0; BLOCK_LEN];
        let mut copied = false;
        if state == BlockState::Parent {
            self.base.read_blocks(&mut whole, block, |run| {
                copied = !run.value.is_zero();
                self.note_touch(run);
            })?;
        }
        part_mut(&mut whole, offset.within_block(), buf.len()).copy_from_slice(buf);
        let allocated = write(top, held, block, &whole)?;
        self.stats.stored(BLOCK_SIZE);
        if copied {
            self.stats.copied_up(BLOCK_SIZE - buf.len() as u64);
        }
        Ok(allocated)
    }

    /// Zeros for a byte range. In pieces, since each may want a flush first: where a range is made
    /// of many runs, each run is a change of its own in the log of changes.
    pub(super) fn zero_bytes(
        &self,
        top: &WritableLayer,
        offset: Offset,
        len: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let to_border = ZERO_PIECE - at.get() % ZERO_PIECE;
            let piece = to_border.min(end - at);
            let touched = Span::touched_by(at, piece);
            with_blocks(top, touched, |held| {
                self.zero_piece(top, held, at, piece, mode)
            })?;
            at = at + piece;
        }
        Ok(())
    }

    /// As [`Chain::zero_bytes`]: whole blocks change state, the ends are written.
    fn zero_piece(
        &self,
        top: &WritableLayer,
        held: &RangeGuard<'_>,
        offset: Offset,
        len: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        let mut allocated = Blocks::NONE;
        let cut = Cut::of(offset, len);
        if cut.head > 0 {
            allocated += self.zero_partial(top, held, offset, cut.head)?;
        }
        if !cut.whole.is_empty() {
            match mode {
                ZeroMode::MayUnmap => self.clear(top, held, cut.whole)?,
                ZeroMode::KeepAllocated => top.allocate_zeroed(held, cut.whole)?,
            }
        }
        if cut.tail > 0 {
            allocated += self.zero_partial(top, held, cut.whole.end().offset(), cut.tail)?;
        }
        self.stats.zeroed(len, allocated);
        Ok(())
    }

    /// Returns how many blocks that allocated.
    fn zero_partial(
        &self,
        top: &WritableLayer,
        held: &RangeGuard<'_>,
        offset: Offset,
        len: u64,
    ) -> Result<Blocks> {
        if self.reads_as_zero(top, offset.block()) {
            return Ok(Blocks::NONE);
        }
        let zeros = [0; BLOCK_LEN];
        let zeros = part(&zeros, 0, in_memory(len));
        self.write_partial_by(top, held, zeros, offset, WritableLayer::write_zeroed_block)
    }

    /// True when the map alone says that the block is zero.
    fn reads_as_zero(&self, top: &WritableLayer, block: Block) -> bool {
        match top.state(block) {
            BlockState::Data => false,
            BlockState::Zero => true,
            BlockState::Parent => {
                let mut zero = true;
                self.base
                    .resolve(Span::of(block), |run| zero = run.value.is_zero());
                zero
            }
        }
    }

    /// Makes whole blocks zero without taking space: over something below, a durable zero; over
    /// nothing, back to saying nothing.
    fn clear(&self, top: &WritableLayer, held: &RangeGuard<'_>, span: Span) -> Result<()> {
        let mut runs = Vec::new();
        top.resolve(span, |run| runs.push(run));
        for run in runs {
            let mut below = Vec::new();
            self.base.resolve(run.span, |run| {
                below.push(Run::new(run.span, run.value.is_zero()));
            });
            for Run {
                span,
                value: zero_below,
            } in below
            {
                match (run.value, zero_below) {
                    (BlockState::Data, true) => top.clear_blocks(held, span, BlockState::Parent)?,
                    (BlockState::Data | BlockState::Parent, false) => {
                        top.clear_blocks(held, span, BlockState::Zero)?;
                    }
                    // It reads as zero already.
                    (BlockState::Parent, true) | (BlockState::Zero, _) => {}
                }
            }
        }
        Ok(())
    }
}

/// Does what changes blocks, with these held. Again, after a flush, where it found no room in the log
/// of changes on a full disk: the work must bear being repeated, and each time gets further.
fn with_blocks<T>(
    top: &WritableLayer,
    span: Span,
    mut work: impl FnMut(&RangeGuard<'_>) -> Result<T>,
) -> Result<T> {
    for _ in 0..FLUSHES_AT_MOST {
        let held = top.lock_blocks(span)?;
        match work(&held) {
            Err(error) if error.kind() == ErrorKind::NoSpace && top.is_flush_due() => {}
            other => return other,
        }
    }
    work(&top.lock_blocks(span)?)
}
