//! The chain as a block device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::base::{Base, BaseSource};
use super::stats::ChainStats;
use crate::layer::{ABSENT, CHANGES_AT_ONCE, STATE_DATA, SealedLayer, ValueRun, WritableLayer};
use vellum_base::block::{
    BLOCK_LEN, BLOCK_SIZE, BlockDevice, BlockState, Durability, Extent, ExtentKind, ZeroMode,
    check_range,
};
use vellum_base::error::{Error, ErrorKind, Result};

/// Flushes that one piece of a request may take for room in the log of changes.
const FLUSHES_AT_MOST: usize = 64;
/// A request for zeros is carried out in pieces of so many bytes.
const ZERO_PIECE: u64 = CHANGES_AT_ONCE * BLOCK_SIZE;

/// A stack of layers: sealed ones and, unless it is read-only, a writable one on top.
#[derive(Debug)]
pub struct Chain {
    /// Bytes, whole blocks; grows with the top.
    size: AtomicU64,
    /// Bytes at the end that the device does not show: less than a block.
    hidden: AtomicU64,
    pub(super) base: Base,
    /// Swapped when the top is sealed under a live device. Held for reading over each request.
    pub(super) top: RwLock<Option<Arc<WritableLayer>>>,
    pub(super) stats: Arc<ChainStats>,
}

/// The blocks that a byte range touches.
pub(super) fn blocks_of(offset: u64, len: u64) -> (u64, u64) {
    let first = offset / BLOCK_SIZE;
    (first, (offset + len).div_ceil(BLOCK_SIZE) - first)
}

impl Chain {
    /// Does something with the chain that is nobody's request, and that no counter shows.
    pub fn uncounted<T>(&mut self, work: impl FnOnce(&Chain) -> T) -> T {
        let none = Arc::new(ChainStats::default().counting(false));
        let counters = std::mem::replace(&mut self.stats, none);
        let result = work(self);
        self.stats = counters;
        result
    }

    /// A chain of a base and a top that fits on it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when there is no layer at all.
    pub fn new(base: Base, top: Option<Arc<WritableLayer>>) -> Result<Self> {
        Chain::counted(base, top, Arc::default())
    }

    /// As [`Chain::new`], counting in `stats`.
    pub(super) fn counted(
        base: Base,
        top: Option<Arc<WritableLayer>>,
        stats: Arc<ChainStats>,
    ) -> Result<Self> {
        let size = match &top {
            Some(top) => top.size(),
            None => base
                .layers()
                .last()
                .map(|layer| layer.header().virtual_size)
                .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a chain without layers"))?,
        };
        stats.set_depth(base.depth());
        Ok(Chain {
            size: AtomicU64::new(size),
            hidden: AtomicU64::new(0),
            base,
            top: RwLock::new(top),
            stats,
        })
    }

    /// The sealed layers.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The writable layer, if there is one.
    pub fn top(&self) -> Option<Arc<WritableLayer>> {
        self.top.read().clone()
    }

    /// Counters of requests and copy-ups.
    pub fn stats(&self) -> &Arc<ChainStats> {
        &self.stats
    }

    /// Bytes of its layers: whole blocks.
    pub fn whole_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Lets the device show `size` bytes, less than a block short of what its layers have: a disk
    /// whose size is no multiple of a block has its last sector there. Until it grows.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for another size: whoever noted it meant other layers.
    pub fn show(&self, size: u64) -> Result<()> {
        let whole = self.whole_size();
        if size == 0 || size > whole || whole - size >= BLOCK_SIZE {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{size} bytes of a device are to be shown, but its layers have {whole}"),
            ));
        }
        self.hidden.store(whole - size, Ordering::Release);
        Ok(())
    }

    /// Flushes the top and leaves nothing to recover.
    ///
    /// # Errors
    /// As [`WritableLayer::close`].
    pub fn close(&self) -> Result<()> {
        self.top().map_or(Ok(()), |top| top.close())
    }

    /// Makes the device `size` bytes large, durably, by way of its top; it may be in use. What it
    /// gains reads as zeros.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for less than it has; [`ErrorKind::ReadOnly`] without a top; as
    /// [`WritableLayer::grow`].
    pub fn grow(&self, size: u64) -> Result<()> {
        let top = self.top.read();
        let top = top.as_ref().ok_or_else(read_only)?;
        let before = self.whole_size();
        if size < before {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the device has {before} bytes and cannot shrink to {size}"),
            ));
        }
        top.grow(size)?;
        // Not before: what it tells of its size must hold after any crash.
        self.size.fetch_max(size, Ordering::AcqRel);
        if size > before {
            self.hidden.store(0, Ordering::Release);
        }
        Ok(())
    }

    /// Seals the top as it is at this moment and goes on in `next`, an empty layer whose parent is
    /// the old top. Requests wait meanwhile: about as long as a flush takes. What was written and
    /// not flushed is part of the sealed layer. The caller freezes the file system above before.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] without a top; [`ErrorKind::InvalidInput`] where `next` does not
    /// fit; as [`WritableLayer::seal`]. The chain is as before.
    pub fn seal_top(&self, next: Arc<WritableLayer>) -> Result<Arc<SealedLayer>> {
        let mut top = self.top.write();
        let old = top.as_ref().ok_or_else(read_only)?;
        super::base::check_parent(
            next.header().parent,
            Some(old.header().uuid),
            &next.dir().display().to_string(),
        )?;
        if next.size() != self.whole_size() || !next.is_untouched() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: not an empty layer of the same size",
                    next.dir().display()
                ),
            ));
        }
        let sealed = self.seal_into_base(old)?;
        *top = Some(next);
        Ok(sealed)
    }

    /// Seals the top as it is at this moment; the chain is read-only from then on. The caller sees
    /// to it that nobody writes.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] without a top; as [`WritableLayer::seal`]. The chain is as before.
    pub fn seal_last(&self) -> Result<Arc<SealedLayer>> {
        let mut top = self.top.write();
        let old = top.as_ref().ok_or_else(read_only)?;
        let sealed = self.seal_into_base(old)?;
        *top = None;
        Ok(sealed)
    }

    /// Seals a top layer and makes it the topmost of the base.
    fn seal_into_base(&self, old: &WritableLayer) -> Result<Arc<SealedLayer>> {
        old.seal()?;
        SealedLayer::open(old.storage(), old.dir())
            .map(Arc::new)
            .and_then(|sealed| self.base.push(sealed.clone()).map(|()| sealed))
            .inspect(|_| self.stats.set_depth(self.base.depth()))
            // It is sealed and may not be written, but we cannot go on above it.
            .map_err(|error| old.poison(&error))
    }

    /// Reads whole blocks as they are now, `top` over base.
    fn read_blocks(&self, top: Option<&WritableLayer>, buf: &mut [u8], block: u64) -> Result<()> {
        let Some(top) = top else {
            return self.read_base(buf, block);
        };
        let mut rest = buf;
        let mut at = block;
        while !rest.is_empty() {
            let run = top.run_at(at, (rest.len() / BLOCK_LEN).max(1) as u64);
            let len = (run.len * BLOCK_SIZE) as usize;
            let (piece, tail) = rest.split_at_mut(len.min(rest.len()));
            self.read_run(top, piece, run)?;
            rest = tail;
            at += run.len;
        }
        Ok(())
    }

    /// Reads bytes within one block.
    fn read_partial(&self, top: Option<&WritableLayer>, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut block = [0; BLOCK_LEN];
        self.read_blocks(top, &mut block, offset / BLOCK_SIZE)?;
        let within = (offset % BLOCK_SIZE) as usize;
        buf.copy_from_slice(block.get(within..within + buf.len()).unwrap_or_default());
        Ok(())
    }

    fn read_run(&self, top: &WritableLayer, piece: &mut [u8], run: ValueRun) -> Result<()> {
        match run.value {
            STATE_DATA => {
                self.stats.read_from_top(run.len);
                top.read(piece, run.start * BLOCK_SIZE)
            }
            ABSENT => self.read_base(piece, run.start),
            _ => {
                self.stats.read_from(None, run.len);
                piece.fill(0);
                Ok(())
            }
        }
    }

    fn flush_top(&self, top: &WritableLayer) -> Result<()> {
        let began = self.stats.begin_flush();
        let result = top.flush();
        self.stats.flushed(began);
        result
    }

    fn read_base(&self, buf: &mut [u8], block: u64) -> Result<()> {
        self.base.read_blocks(buf, block, |layer, blocks| {
            self.stats.read_from(layer, blocks);
        })
    }

    /// Writes bytes within one block: in place where the top has it, else with a copy-up. Returns
    /// how many blocks that allocated.
    fn write_partial(&self, top: &WritableLayer, buf: &[u8], offset: u64) -> Result<u64> {
        self.write_partial_by(top, buf, offset, WritableLayer::write_blocks)
    }

    /// As [`Chain::write_partial`], where the whole block is written by `write`.
    fn write_partial_by(
        &self,
        top: &WritableLayer,
        buf: &[u8],
        offset: u64,
        write: impl Fn(&WritableLayer, u64, &[u8]) -> Result<u64>,
    ) -> Result<u64> {
        let block = offset / BLOCK_SIZE;
        let state = top.run_at(block, 1);
        if state.value == STATE_DATA {
            self.stats.stored(buf.len() as u64);
            return top.write_within(offset, buf).map(|()| 0);
        }
        let mut whole = [0; BLOCK_LEN];
        let mut copied = false;
        if state.value == ABSENT {
            self.base.read_blocks(&mut whole, block, |layer, _| {
                copied = layer.is_some();
            })?;
        }
        let within = (offset % BLOCK_SIZE) as usize;
        if let Some(target) = whole.get_mut(within..within + buf.len()) {
            target.copy_from_slice(buf);
        }
        let allocated = write(top, block, &whole)?;
        self.stats.stored(BLOCK_SIZE);
        if copied {
            self.stats.copied_up(BLOCK_SIZE - buf.len() as u64);
        }
        Ok(allocated)
    }

    /// Returns how many blocks the write allocated.
    fn write_buffered(&self, top: &WritableLayer, buf: &[u8], offset: u64) -> Result<u64> {
        with_room_in_log(top, || self.write_once(top, buf, offset))
    }

    fn write_once(&self, top: &WritableLayer, buf: &[u8], offset: u64) -> Result<u64> {
        let (first, blocks) = blocks_of(offset, buf.len() as u64);
        let _lock = top.lock_blocks(first, blocks);
        let (head, whole, tail) = split_buf(buf, offset);
        let mut allocated = 0;
        if !head.is_empty() {
            allocated += self.write_partial(top, head, offset)?;
        }
        if !whole.is_empty() {
            allocated += top.write_blocks((offset + head.len() as u64) / BLOCK_SIZE, whole)?;
            self.stats.stored(whole.len() as u64);
        }
        if !tail.is_empty() {
            allocated +=
                self.write_partial(top, tail, offset + (head.len() + whole.len()) as u64)?;
        }
        Ok(allocated)
    }

    /// Zeros for a byte range. In pieces, since each may want a flush first: where a range is made
    /// of many runs, each run is a change of its own in the log of changes.
    fn zero(&self, top: &WritableLayer, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = (at / ZERO_PIECE * ZERO_PIECE + ZERO_PIECE).min(end);
            with_room_in_log(top, || self.zero_piece(top, at, next - at, mode))?;
            at = next;
        }
        Ok(())
    }

    /// As [`Chain::zero`]: whole blocks change state, the ends are written.
    fn zero_piece(&self, top: &WritableLayer, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let mut allocated = 0;
        let (first, blocks) = blocks_of(offset, len);
        let _lock = top.lock_blocks(first, blocks);
        let head = (offset.next_multiple_of(BLOCK_SIZE) - offset).min(len);
        let tail = (offset + len) % BLOCK_SIZE;
        if head > 0 {
            allocated += self.zero_partial(top, offset, head)?;
        }
        let whole = (len - head) / BLOCK_SIZE;
        if whole > 0 {
            let start = (offset + head) / BLOCK_SIZE;
            match mode {
                ZeroMode::MayUnmap => self.clear(top, start, whole)?,
                ZeroMode::KeepAllocated => top.allocate_zeroed(start, whole)?,
            }
        }
        if tail > 0 && len > head {
            allocated += self.zero_partial(top, offset + len - tail, tail)?;
        }
        self.stats.zeroed(len, allocated);
        Ok(())
    }

    /// Returns how many blocks that allocated.
    fn zero_partial(&self, top: &WritableLayer, offset: u64, len: u64) -> Result<u64> {
        let block = offset / BLOCK_SIZE;
        if self.reads_as_zero(top, block) {
            return Ok(0);
        }
        let zeros = [0; BLOCK_LEN];
        let zeros = zeros.get(..len as usize).unwrap_or_default();
        self.write_partial_by(top, zeros, offset, WritableLayer::write_zeroed_block)
    }

    /// True when the map alone says that the block is zero.
    fn reads_as_zero(&self, top: &WritableLayer, block: u64) -> bool {
        match top.state(block) {
            BlockState::Data => false,
            BlockState::Zero => true,
            BlockState::Parent => {
                let mut zero = true;
                self.base
                    .resolve(block, 1, |run| zero = run.source.is_zero());
                zero
            }
        }
    }

    /// Makes whole blocks zero without taking space: over something below, a durable zero; over
    /// nothing, back to saying nothing.
    fn clear(&self, top: &WritableLayer, start: u64, len: u64) -> Result<()> {
        let mut runs = Vec::new();
        top.resolve(start, len, |run| runs.push(run));
        for run in runs {
            let mut below = Vec::new();
            self.base.resolve(run.start, run.len, |run| {
                below.push((run.start, run.len, run.source.is_zero()));
            });
            for (start, len, zero_below) in below {
                match (run.value, zero_below) {
                    (STATE_DATA, true) => top.clear_blocks(start, len, BlockState::Parent)?,
                    (STATE_DATA | ABSENT, false) => {
                        top.clear_blocks(start, len, BlockState::Zero)?;
                    }
                    // It reads as zero already.
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Does what changes blocks, after a flush where the log of changes wants one: before, or because it
/// found no room there on a full disk. The work must bear being repeated; each time gets further.
fn with_room_in_log<T>(top: &WritableLayer, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..FLUSHES_AT_MOST {
        top.flush_if_due()?;
        match work() {
            Err(error) if error.kind() == ErrorKind::NoSpace && top.is_flush_due() => {}
            other => return other,
        }
    }
    top.flush_if_due()?;
    work()
}

/// Splits a buffer at block borders: the part before the first, whole blocks, the part after.
fn split_buf(buf: &[u8], offset: u64) -> (&[u8], &[u8], &[u8]) {
    let head = (offset.next_multiple_of(BLOCK_SIZE) - offset).min(buf.len() as u64) as usize;
    let (head, rest) = buf.split_at(head);
    let (whole, tail) = rest.split_at(rest.len() / BLOCK_LEN * BLOCK_LEN);
    (head, whole, tail)
}

/// What the top says from `start` on, for at most `len` blocks; without one, nothing.
pub(super) fn top_run(top: Option<&WritableLayer>, start: u64, len: u64) -> ValueRun {
    match top {
        Some(top) => top.run_at(start, len),
        None => ValueRun {
            start,
            len,
            value: ABSENT,
        },
    }
}

pub(super) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the chain has no writable layer")
}

impl BlockDevice for Chain {
    fn size(&self) -> u64 {
        self.whole_size() - self.hidden.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.top.read().is_none()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.stats.read(buf.len() as u64);
        let guard = self.top.read();
        let top = guard.as_deref();
        // Whole blocks straight into the buffer, the ends through one of ours.
        let head = (offset.next_multiple_of(BLOCK_SIZE) - offset).min(buf.len() as u64) as usize;
        let (head, rest) = buf.split_at_mut(head);
        let whole_len = rest.len() / BLOCK_LEN * BLOCK_LEN;
        let (whole, tail) = rest.split_at_mut(whole_len);
        let next = offset + head.len() as u64;
        if !head.is_empty() {
            self.read_partial(top, head, offset)?;
        }
        if !whole.is_empty() {
            self.read_blocks(top, whole, next / BLOCK_SIZE)?;
        }
        if !tail.is_empty() {
            self.read_partial(top, tail, next + whole_len as u64)?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        if buf.is_empty() {
            return Ok(());
        }
        let began = self.stats.begin();
        let guard = self.top.read();
        let top = guard.as_deref().ok_or_else(read_only)?;
        let allocated = self.write_buffered(top, buf, offset)?;
        self.stats.wrote(began, buf.len() as u64, allocated);
        match durability {
            Durability::Buffered => Ok(()),
            Durability::Durable => self.flush_top(top),
        }
    }

    fn flush(&self) -> Result<()> {
        let guard = self.top.read();
        guard.as_deref().map_or(Ok(()), |top| self.flush_top(top))
    }

    fn flush_ahead(&self) {
        if let Some(top) = self.top.read().as_deref()
            && top.expects_flush()
        {
            top.flush_ahead();
        }
    }

    fn wait_for_room(&self) -> bool {
        // Not under the lock, which a commit wants.
        self.top().is_some_and(|top| top.wait_for_room())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroMode::MayUnmap, Durability::Buffered)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<()> {
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(());
        }
        let guard = self.top.read();
        let top = guard.as_deref().ok_or_else(read_only)?;
        self.zero(top, offset, len, mode)?;
        match durability {
            Durability::Buffered => Ok(()),
            Durability::Durable => self.flush_top(top),
        }
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        check_range(offset, len, self.size())?;
        let mut out = ExtentList {
            offset,
            end: offset + len,
            max,
            list: Vec::new(),
        };
        if len == 0 || max == 0 {
            return Ok(out.list);
        }
        let guard = self.top.read();
        let (first, blocks) = blocks_of(offset, len);
        let mut at = first;
        while at < first + blocks && !out.full() {
            let run = top_run(guard.as_deref(), at, first + blocks - at);
            match run.value {
                STATE_DATA => out.push(run.start, run.len, ExtentKind::Data),
                ABSENT => self.base.resolve(run.start, run.len, |run| {
                    let kind = match run.source {
                        BaseSource::Hole => ExtentKind::Hole,
                        BaseSource::Zero => ExtentKind::Zero,
                        BaseSource::Layer(..) => ExtentKind::Data,
                    };
                    out.push(run.start, run.len, kind);
                }),
                _ => out.push(run.start, run.len, ExtentKind::Zero),
            }
            at += run.len;
        }
        Ok(out.list)
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        let guard = self.top.read();
        let (first, blocks) = blocks_of(offset, len);
        let mut at = first;
        while at < first + blocks {
            let run = top_run(guard.as_deref(), at, first + blocks - at);
            if let (STATE_DATA, Some(top)) = (run.value, guard.as_deref()) {
                top.prefetch(run.start * BLOCK_SIZE, run.len * BLOCK_SIZE)?;
            } else if run.value == ABSENT {
                let mut result = Ok(());
                self.base.resolve(run.start, run.len, |run| {
                    if let (BaseSource::Layer(_, layer), Ok(())) = (&run.source, &result) {
                        result = layer.prefetch(run.start, run.len);
                    }
                });
                result?;
            }
            at += run.len;
        }
        Ok(())
    }
}

/// Collects extents in bytes, clipped to a range, joined where they touch, up to a number.
struct ExtentList {
    offset: u64,
    end: u64,
    max: usize,
    list: Vec<Extent>,
}

impl ExtentList {
    fn full(&self) -> bool {
        self.list.len() >= self.max
    }

    fn push(&mut self, start: u64, len: u64, kind: ExtentKind) {
        let from = (start * BLOCK_SIZE).max(self.offset);
        let to = ((start + len) * BLOCK_SIZE).min(self.end);
        if let Some(last) = self.list.last_mut()
            && last.kind == kind
            && last.offset + last.len == from
        {
            last.len += to - from;
        } else if !self.full() {
            self.list.push(Extent {
                offset: from,
                len: to - from,
                kind,
            });
        }
    }
}
