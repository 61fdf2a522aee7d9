//! The sealed layers of a chain, merged into one index.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::layer::{Index, IndexValue, SealedLayer};
use vellum_base::block::{Block, BlockState, Blocks, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result};

/// What the merged index says of a block, in four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Origin(u32);

impl Origin {
    /// Some layer says that it is zero.
    const ZERO: Origin = Origin(u32::MAX - 1);

    /// The layer with this number holds it; `None` for a number that no layer can have.
    fn layer(number: usize) -> Option<Origin> {
        let origin = Origin(u32::try_from(number).ok()?);
        (origin.0 < Origin::ZERO.0).then_some(origin)
    }
}

/// Few layers have a number that is no byte; the two largest stand for what is no layer.
impl IndexValue for Origin {
    const ABSENT: Origin = Origin(u32::MAX);
    type Small = u8;

    fn small(self) -> Option<u8> {
        match self {
            Origin::ABSENT => Some(u8::MAX),
            Origin::ZERO => Some(u8::MAX - 1),
            Origin(number) => u8::try_from(number).ok().filter(|&byte| byte < u8::MAX - 1),
        }
    }

    fn of_small(small: u8) -> Origin {
        const ZERO: u8 = u8::MAX - 1;
        match small {
            u8::MAX => Origin::ABSENT,
            ZERO => Origin::ZERO,
            number => Origin(number.into()),
        }
    }
}

/// Sealed layers from the bottom up, and for each block the topmost that says something of it.
#[derive(Debug, Default)]
pub struct Base {
    merged: RwLock<Merged>,
}

#[derive(Debug, Default)]
struct Merged {
    layers: Vec<Arc<SealedLayer>>,
    index: Index<Origin>,
}

/// Where the bytes of a run of blocks come from.
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
    /// [`ErrorKind::Corrupt`] when its parent is not the layer that was on top, and as
    /// [`SealedLayer::for_each_run`]: then part of it is on top, and the base is to be thrown away.
    pub fn push(&self, layer: Arc<SealedLayer>) -> Result<()> {
        let mut merged = self.merged.write();
        let below = merged.layers.last().map(|below| below.header().uuid);
        check_parent(
            layer.header().parent,
            below,
            &layer.dir().display().to_string(),
        )?;
        let own = Origin::layer(merged.layers.len())
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "too many layers in the chain"))?;
        let Merged { layers, index } = &mut *merged;
        layers.push(layer.clone());
        // What lies beyond the layer's end is zero through it, also for larger layers above.
        index.truncate(Block::FIRST + layer.header().blocks());
        layer.for_each_run(|run| {
            let origin = match run.value {
                BlockState::Data => own,
                BlockState::Zero | BlockState::Parent => Origin::ZERO,
            };
            index.set(run.span, origin);
        })
    }

    /// The layers, from the bottom up.
    pub fn layers(&self) -> Vec<Arc<SealedLayer>> {
        self.merged.read().layers.clone()
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.merged.read().layers.len()
    }

    /// Calls `each` with the runs that cover `span`, in order.
    pub fn resolve(&self, span: Span, mut each: impl FnMut(Run<BaseSource>)) {
        let merged = self.merged.read();
        for run in merged.index.cover(span) {
            each(merged.describe(run));
        }
    }

    /// Reads whole blocks from `start`; each is checked against its checksum. `count` is told how
    /// many came from which layer, `None` for zeros.
    ///
    /// # Errors
    /// As [`SealedLayer::read_blocks`].
    pub fn read_blocks(
        &self,
        buf: &mut [u8],
        start: Block,
        mut count: impl FnMut(Option<u32>, Blocks),
    ) -> Result<()> {
        let mut rest = buf;
        let mut span = Span::of_buffer(start, rest);
        while !span.is_empty() {
            let run = {
                let merged = self.merged.read();
                merged.describe(merged.index.first_run(span))
            };
            let (piece, tail) = rest.split_at_mut(run.len().buffer_len());
            match &run.value {
                BaseSource::Layer(number, layer) => {
                    layer.read_blocks(piece, run.start())?;
                    count(Some(*number), run.len());
                }
                BaseSource::Hole | BaseSource::Zero => {
                    piece.fill(0);
                    count(None, run.len());
                }
            }
            rest = tail;
            span = span.from(run.end());
        }
        Ok(())
    }
}

impl Merged {
    #[expect(
        clippy::indexing_slicing,
        reason = "the index names layers that are in the list"
    )]
    fn describe(&self, run: Run<Origin>) -> Run<BaseSource> {
        let source = match run.value {
            Origin::ABSENT => BaseSource::Hole,
            Origin::ZERO => BaseSource::Zero,
            Origin(number) => BaseSource::Layer(number, self.layers[number as usize].clone()),
        };
        Run::new(run.span, source)
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
