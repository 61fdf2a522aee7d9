//! The chain as a block device.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use uuid::Uuid;

use super::base::{Base, BaseSource};
use super::stats::ChainStats;
use crate::layer::{SealedLayer, WritableLayer, once_here};
use vellum_base::block::{
    BLOCK_SIZE, BlockDevice, BlockState, Durability, Extent, Offset, Run, Span, ZeroMode,
    check_range,
};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Storage;

/// Bytes that have to be here at once, at most, of what is read where blocks come when they are wanted: much less than the
/// least bound of their cache, so that the end of a read does not evict its beginning before it was read (lazy.md).
const AT_ONCE: usize = 1 << 20;

/// Hears what is read of sealed layers: for a trace (registry.md).
pub trait Touches: std::fmt::Debug + Send + Sync {
    /// Data blocks of that layer were read, or copied up. Threads call it at once, and wait for it.
    fn touched(&self, layer: Uuid, blocks: Span);
}

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
    /// Hears what is read of sealed layers, where somebody wants to know.
    touches: OnceLock<Box<dyn Touches>>,
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
            touches: OnceLock::new(),
        })
    }

    /// Changes the top by `work`, which has to bear being repeated, and makes that durable where it is to be.
    fn change(
        &self,
        durability: Durability,
        mut work: impl FnMut(&WritableLayer) -> Result<()>,
    ) -> Result<()> {
        once_here(|| {
            let guard = self.top.read();
            let top = guard.as_deref().ok_or_else(read_only)?;
            work(top)?;
            match durability {
                Durability::Buffered => Ok(()),
                Durability::Durable => self.flush_top(top),
            }
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

    /// From now on `touches` hears what requests read of sealed layers. Only the first call counts.
    pub fn tell_touches(&self, touches: Box<dyn Touches>) {
        let _ = self.touches.set(touches);
    }

    pub(super) fn note_touch(&self, run: &Run<BaseSource>) {
        if let (Some(touches), BaseSource::Layer(_, layer)) = (self.touches.get(), &run.value) {
            touches.touched(layer.header().uuid, run.span);
        }
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
    /// whose size is no multiple of a block has its last sector there. Until it [grows](Chain::grow).
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

    /// Makes the device `size` bytes large, durably, by way of its top; it may be in use. What its layers
    /// gain reads as zeros. It shows all that they have then, also where that was so large before: whoever
    /// [noted](Chain::show) another size notes that first.
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
        self.hidden.store(0, Ordering::Release);
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
            &next.header(),
            Some(&old.header()),
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
        drop(top);
        self.base.merge();
        Ok(sealed)
    }

    /// Goes on with other sealed layers of the same content below its top: some were joined into one. Those that
    /// are not used any more are closed, so that their space comes back.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the top does not lie on the last of them; as
    /// [`SealedLayer::open`]. The chain is as before.
    pub fn replace_sealed(&self, storage: &Arc<dyn Storage>, sealed: &[PathBuf]) -> Result<()> {
        let base = super::open::open_base(storage, sealed)?;
        // No seal comes in between.
        let top = self.top.write();
        let last = base.layers().last().cloned();
        let below = last.as_ref().map(|layer| layer.header());
        if let Some(top) = top.as_ref() {
            let who = top.dir().display().to_string();
            super::base::check_parent(&top.header(), below, &who)?;
        }
        self.base.replace(base);
        self.stats.set_depth(self.base.depth());
        Ok(())
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
        drop(top);
        self.base.merge();
        Ok(sealed)
    }

    /// Seals a top layer and makes it the topmost of the base, in which [`Base::merge`] is to be called.
    fn seal_into_base(&self, old: &WritableLayer) -> Result<Arc<SealedLayer>> {
        old.seal()?;
        let sealed = Arc::new(old.as_sealed());
        self.base
            .push_recent(sealed.clone())
            // It is sealed and may not be written, but we cannot go on above it.
            .map_err(|error| old.poison(&error))?;
        self.stats.set_depth(self.base.depth());
        Ok(sealed)
    }

    fn flush_top(&self, top: &WritableLayer) -> Result<()> {
        let began = self.stats.begin_flush();
        let result = top.flush();
        self.stats.flushed(began);
        result
    }
}

/// What the top says at the front of `span`; without one, nothing.
pub(super) fn top_run(top: Option<&WritableLayer>, span: Span) -> Run<BlockState> {
    match top {
        Some(top) => top.first_run(span),
        None => Run::new(span, BlockState::Parent),
    }
}

pub(super) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the chain has no writable layer")
}

/// Here bytes as clients count them become blocks and offsets.
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
        let most = match self.base.is_lazy() {
            true => AT_ONCE,
            false => buf.len().max(1),
        };
        let mut offset = offset;
        for piece in buf.chunks_mut(most) {
            once_here(|| self.read_bytes(piece, Offset::new(offset)))?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        if buf.is_empty() {
            return Ok(());
        }
        let began = self.stats.begin();
        self.change(durability, |top| {
            let allocated = self.write_bytes(top, buf, Offset::new(offset))?;
            self.stats.wrote(began, buf.len() as u64, allocated);
            Ok(())
        })
    }

    fn flush(&self) -> Result<()> {
        let guard = self.top.read();
        guard.as_deref().map_or(Ok(()), |top| self.flush_top(top))
    }

    fn may_stall(&self) -> bool {
        self.base.is_lazy()
    }

    fn expects_flush(&self) -> bool {
        let top = self.top.read();
        top.as_deref().is_some_and(WritableLayer::expects_flush)
    }

    fn flush_ahead(&self) {
        if let Some(top) = self.top.read().as_deref() {
            top.flush_ahead();
        }
    }

    fn wait_for_room(&self) -> bool {
        // Not under the lock, which a commit wants.
        self.top().is_some_and(|top| top.wait_for_room())
    }

    fn look_after_space(&self) {
        // Not under the lock, which a commit wants.
        if let Some(top) = self.top() {
            top.look_after_space();
        }
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
        self.change(durability, |top| {
            self.zero_bytes(top, Offset::new(offset), len, mode)
        })
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        check_range(offset, len, self.size())?;
        Ok(self.extents_in(Offset::new(offset), len, max))
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.prefetch_blocks(Span::touched_by(Offset::new(offset), len))
    }
}
