//! A layer that an import filled, written once more in the one way that its files determine, so that equal
//! layers of images have equal bytes wherever they were imported.

use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::device::{OpenChain, Target};
use super::staged::open_staged;
use vellum_base::block::{BLOCK_SIZE, Block, BlockState, Offset, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::WritableLayer;
use vellum_fs::unmounted::{self, Apart, FileSystem, Replayed, Sink};
use vellum_image::Aside;
use vellum_store::{StagedLayer, Store};

/// Bytes that are written at a time.
const BATCH: usize = 1 << 20;

/// Writes what the top of `filled`, whose file system was unmounted, changed on the sealed layer `parent` into
/// a new layer; what new files hold is `aside`, where it is not in their file system. `None` where the file
/// system is none that can be laid out, as in an image of a disk that came from elsewhere.
///
/// # Errors
/// Where one of the two cannot be read, or the new one not be written.
pub(super) fn lay_out(
    store: &Store,
    parent: Uuid,
    filled: &OpenChain,
    aside: &Aside,
) -> Result<Option<(StagedLayer, Arc<WritableLayer>)>> {
    let newer = filled.chain();
    let top = newer.top();
    let top = top.ok_or_else(|| Error::internal("a layer that is being made has no top"))?;
    let older = Target::Sealed(parent).open(store)?;
    let staged = store.stage_layer(Some(parent), newer.whole_size())?;
    let layer = open_staged(store, &staged)?;
    let mut writer = Writer::new(&layer);
    let laid = lay_out_devices(
        &**older.chain(),
        &**newer,
        &bytes_in(&top, newer.whole_size()),
        aside,
        &mut writer,
    );
    match laid.and_then(|()| writer.write()) {
        Ok(()) => Ok(Some((staged, layer))),
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NoSpace) => {
            tracing::warn!(
                %error,
                "the layer stays as the kernel wrote it: the same import elsewhere has another digest"
            );
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn lay_out_devices(
    older: &dyn unmounted::Source,
    newer: &dyn unmounted::Source,
    differing: &[Range<u64>],
    aside: &Aside,
    sink: &mut dyn Sink,
) -> Result<()> {
    let (older, newer) = (Replayed::new(older)?, Replayed::new(newer)?);
    let (older, newer) = (FileSystem::open(&older)?, FileSystem::open(&newer)?);
    unmounted::lay_out(&older, &newer, differing, &Contents(aside), sink)
}

/// What an import keeps aside of files, as the layout asks for it.
struct Contents<'a>(&'a Aside);

impl Apart for Contents<'_> {
    fn blocks(&self, inode: u32) -> Option<Vec<Range<u64>>> {
        let bytes = self.0.written(inode.into())?;
        let blocks = bytes
            .iter()
            .map(|bytes| bytes.start / BLOCK_SIZE..bytes.end.div_ceil(BLOCK_SIZE));
        Some(blocks.collect())
    }

    fn fill(&self, inode: u32, buf: &mut [u8], block: u64) -> Result<()> {
        self.0.fill(inode.into(), buf, block * BLOCK_SIZE)
    }
}

/// The bytes of which a layer says something.
fn bytes_in(layer: &WritableLayer, size: u64) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let whole = Span::between(Block::new(0), Offset::new(size).block_from());
    layer.resolve(whole, |run| {
        if run.value != BlockState::Parent {
            let range = run.start().offset().get()..run.end().offset().get();
            ranges.push(range);
        }
    });
    ranges
}

/// Writes blocks into a layer, those behind each other together.
struct Writer<'a> {
    layer: &'a WritableLayer,
    first: u64,
    bytes: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(layer: &'a WritableLayer) -> Self {
        Writer {
            layer,
            first: 0,
            bytes: Vec::with_capacity(BATCH),
        }
    }

    /// Writes what was put and is not written yet.
    fn write(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            let start = Block::new(self.first);
            let held = self
                .layer
                .lock_blocks(Span::of_buffer(start, &self.bytes))?;
            self.layer.write_blocks(&held, start, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }
}

impl Sink for Writer<'_> {
    fn put(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let goes_on = first == self.first + self.bytes.len() as u64 / BLOCK_SIZE;
        if !goes_on || self.bytes.len() + bytes.len() > BATCH {
            self.write()?;
        }
        if bytes.len() == BATCH {
            let start = Block::new(first);
            let held = self.layer.lock_blocks(Span::of_buffer(start, bytes))?;
            return self.layer.write_blocks(&held, start, bytes).map(drop);
        }
        if self.bytes.is_empty() {
            self.first = first;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}
