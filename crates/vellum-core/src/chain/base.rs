//! The sealed layers of a chain, merged into one index.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::layer::{ABSENT, Index, SealedLayer, ValueRun};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, BlockState};
use vellum_base::error::{Error, ErrorKind, Result};

/// The index value of a block that some layer says is zero.
const ZERO: u32 = u32::MAX - 1;

/// Sealed layers from the bottom up, and for each block the topmost that says something of it.
#[derive(Debug, Default)]
pub struct Base {
    merged: RwLock<Merged>,
}

#[derive(Debug, Default)]
struct Merged {
    layers: Vec<Arc<SealedLayer>>,
    index: Index,
}

/// What the base says of a run of blocks.
#[derive(Debug, Clone)]
pub struct BaseRun {
    /// First block.
    pub start: u64,
    /// Length in blocks.
    pub len: u64,
    /// Who answers.
    pub source: BaseSource,
}

/// Where the bytes of a [`BaseRun`] come from.
#[derive(Debug, Clone)]
pub enum BaseSource {
    /// No layer says anything: zeros.
    Hole,
    /// A layer says: zeros.
    Zero,
    /// The layer with this number (0 is the bottom) holds them.
    Layer(u32, Arc<SealedLayer>),
}

impl BaseSource {
    /// True when the blocks read as zeros.
    pub fn is_zero(&self) -> bool {
        !matches!(self, BaseSource::Layer(..))
    }
}

impl Base {
    /// Puts a layer on top.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when its parent is not the layer that was on top.
    pub fn push(&self, layer: Arc<SealedLayer>) -> Result<()> {
        let mut merged = self.merged.write();
        let below = merged.layers.last().map(|below| below.header().uuid);
        check_parent(
            layer.header().parent,
            below,
            &layer.dir().display().to_string(),
        )?;
        let number = merged.layers.len() as u32;
        if number >= ZERO {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "too many layers in the chain",
            ));
        }
        let index = &mut merged.index;
        // What lies beyond the layer's end is zero through it, also for larger layers above.
        index.truncate(layer.header().blocks());
        layer.for_each_extent(|extent| {
            let value = if extent.state == BlockState::Data {
                number
            } else {
                ZERO
            };
            index.set(extent.start, u64::from(extent.len), value);
        });
        merged.layers.push(layer);
        Ok(())
    }

    /// The layers, from the bottom up.
    pub fn layers(&self) -> Vec<Arc<SealedLayer>> {
        self.merged.read().layers.clone()
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.merged.read().layers.len()
    }

    /// Calls `each` with the runs that cover `len` blocks from `start`, in order.
    pub fn resolve(&self, start: u64, len: u64, mut each: impl FnMut(BaseRun)) {
        let merged = self.merged.read();
        let mut at = start;
        while at < start + len {
            let run = merged.index.run_at(at, start + len - at);
            at += run.len;
            each(merged.describe(run));
        }
    }

    /// Reads whole blocks from `block`; each is checked against its checksum. `count` is told how
    /// many came from which layer, `None` for zeros.
    ///
    /// # Errors
    /// As [`SealedLayer::read_blocks`].
    pub fn read_blocks(
        &self,
        buf: &mut [u8],
        block: u64,
        mut count: impl FnMut(Option<u32>, u64),
    ) -> Result<()> {
        let mut rest = buf;
        let mut at = block;
        while !rest.is_empty() {
            let run = {
                let merged = self.merged.read();
                let run = merged
                    .index
                    .run_at(at, (rest.len() / BLOCK_LEN).max(1) as u64);
                merged.describe(run)
            };
            let len = (run.len * BLOCK_SIZE) as usize;
            let (piece, tail) = rest.split_at_mut(len.min(rest.len()));
            match run.source {
                BaseSource::Layer(number, layer) => {
                    layer.read_blocks(piece, at)?;
                    count(Some(number), run.len);
                }
                _ => {
                    piece.fill(0);
                    count(None, run.len);
                }
            }
            rest = tail;
            at += run.len;
        }
        Ok(())
    }
}

impl Merged {
    fn describe(&self, run: ValueRun) -> BaseRun {
        let source = match run.value {
            ABSENT => BaseSource::Hole,
            ZERO => BaseSource::Zero,
            number => match self.layers.get(number as usize) {
                Some(layer) => BaseSource::Layer(number, layer.clone()),
                None => BaseSource::Hole,
            },
        };
        BaseRun {
            start: run.start,
            len: run.len,
            source,
        }
    }
}

/// Checks that a layer fits on the one below it.
pub(super) fn check_parent(
    stated: Option<uuid::Uuid>,
    below: Option<uuid::Uuid>,
    who: &str,
) -> Result<()> {
    if stated == below {
        return Ok(());
    }
    let name = |uuid: Option<uuid::Uuid>| uuid.map_or("no parent".into(), |uuid| uuid.to_string());
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "{who}: its parent is {}, but the layer below is {}: a layer fits only the parent that \
             it was made on",
            name(stated),
            name(below)
        ),
    ))
}
