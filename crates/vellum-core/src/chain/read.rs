//! What a chain reads as: the top's blocks over those of the base.

use super::Chain;
use super::base::BaseSource;
use super::device::top_run;
use crate::layer::WritableLayer;
use vellum_base::block::{
    BLOCK_LEN, Block, BlockState, Extent, ExtentKind, Offset, Run, Span, in_memory, part,
};
use vellum_base::error::Result;

impl Chain {
    /// Fills `buf` from `offset`: whole blocks straight into it, the ends through a block of ours.
    pub(super) fn read_bytes(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let guard = self.top.read();
        let top = guard.as_deref();
        let head = buf.len().min(in_memory(offset.to_border()));
        let (head, rest) = buf.split_at_mut(head);
        let (whole, tail) = rest.split_at_mut(rest.len() / BLOCK_LEN * BLOCK_LEN);
        let next = offset + head.len() as u64;
        if !head.is_empty() {
            self.read_partial(top, head, offset)?;
        }
        if !whole.is_empty() {
            self.read_blocks(top, whole, next.block())?;
        }
        if !tail.is_empty() {
            self.read_partial(top, tail, next + whole.len() as u64)?;
        }
        Ok(())
    }

    /// Reads whole blocks as they are now, `top` over base.
    fn read_blocks(&self, top: Option<&WritableLayer>, buf: &mut [u8], start: Block) -> Result<()> {
        let Some(top) = top else {
            return self.read_base(buf, start);
        };
        let mut rest = buf;
        let mut span = Span::of_buffer(start, rest);
        while !span.is_empty() {
            let run = top.first_run(span);
            let (piece, tail) = rest.split_at_mut(run.len().buffer_len());
            self.read_run(top, piece, run)?;
            rest = tail;
            span = span.from(run.end());
        }
        Ok(())
    }

    /// Reads bytes within one block.
    fn read_partial(
        &self,
        top: Option<&WritableLayer>,
        buf: &mut [u8],
        offset: Offset,
    ) -> Result<()> {
        let mut block = [0; BLOCK_LEN];
        self.read_blocks(top, &mut block, offset.block())?;
        buf.copy_from_slice(part(&block, offset.within_block(), buf.len()));
        Ok(())
    }

    fn read_run(&self, top: &WritableLayer, piece: &mut [u8], run: Run<BlockState>) -> Result<()> {
        match run.value {
            BlockState::Data => {
                self.stats.read_from_top(run.len());
                top.read_blocks(piece, run.start())
            }
            BlockState::Parent => self.read_base(piece, run.start()),
            BlockState::Zero => {
                self.stats.read_from(None, run.len());
                piece.fill(0);
                Ok(())
            }
        }
    }

    fn read_base(&self, buf: &mut [u8], start: Block) -> Result<()> {
        self.base.read_blocks(buf, start, |run| {
            self.stats.read_from(run.value.number(), run.len());
            self.note_touch(run);
        })
    }

    /// As [`vellum_base::block::BlockDevice::extents`], of a range that the device has.
    pub(super) fn extents_in(&self, offset: Offset, len: u64, max: usize) -> Vec<Extent> {
        let mut out = ExtentList {
            offset,
            end: offset + len,
            max,
            list: Vec::new(),
        };
        let guard = self.top.read();
        let mut span = Span::touched_by(offset, len);
        while !span.is_empty() && !out.full() {
            let run = top_run(guard.as_deref(), span);
            match run.value {
                BlockState::Data => out.push(run.span, ExtentKind::Data),
                BlockState::Zero => out.push(run.span, ExtentKind::Zero),
                BlockState::Parent => self.base.resolve(run.span, |run| {
                    let kind = match run.value {
                        BaseSource::Hole => ExtentKind::Hole,
                        BaseSource::Zero => ExtentKind::Zero,
                        BaseSource::Layer(..) => ExtentKind::Data,
                    };
                    out.push(run.span, kind);
                }),
            }
            span = span.from(run.end());
        }
        out.list
    }

    /// A hint that blocks will be read soon.
    pub(super) fn prefetch_blocks(&self, span: Span) -> Result<()> {
        let guard = self.top.read();
        let mut rest = span;
        while !rest.is_empty() {
            let run = top_run(guard.as_deref(), rest);
            match (run.value, guard.as_deref()) {
                (BlockState::Data, Some(top)) => top.prefetch(run.span)?,
                (BlockState::Parent, _) => self.prefetch_base(run.span)?,
                // Zeros are nowhere.
                _ => {}
            }
            rest = rest.from(run.end());
        }
        Ok(())
    }

    fn prefetch_base(&self, span: Span) -> Result<()> {
        let mut result = Ok(());
        self.base.resolve(span, |run| {
            if let (BaseSource::Layer(_, layer), Ok(())) = (&run.value, &result) {
                result = layer.prefetch(run.span);
            }
        });
        result
    }
}

/// Collects extents in bytes, clipped to a range, joined where they touch, up to a number.
struct ExtentList {
    offset: Offset,
    end: Offset,
    max: usize,
    list: Vec<Extent>,
}

impl ExtentList {
    fn full(&self) -> bool {
        self.list.len() >= self.max
    }

    fn push(&mut self, span: Span, kind: ExtentKind) {
        let from = span.offset().max(self.offset);
        let to = span.end().offset().min(self.end);
        let full = self.full();
        match self.list.last_mut() {
            Some(last) if last.kind == kind && last.offset + last.len == from.get() => {
                last.len += to - from;
            }
            _ if full => {}
            _ => self.list.push(Extent {
                offset: from.get(),
                len: to - from,
                kind,
            }),
        }
    }
}
