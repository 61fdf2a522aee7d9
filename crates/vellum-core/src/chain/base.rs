//! The sealed layers of a chain, merged into one index.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::layer::{Header, Index, IndexValue, SealedLayer};
use vellum_base::block::{Block, BlockState, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result};

/// So many runs of a recent layer are brought into the index while reads wait.
const MERGED_AT_ONCE: usize = 1024;

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
    /// Held by whoever brings layers into the index.
    merging: Mutex<()>,
    /// Blocks of a layer may be somewhere else.
    lazy: AtomicBool,
}

#[derive(Debug, Default)]
struct Merged {
    layers: Vec<Arc<SealedLayer>>,
    /// What the layers but the recent ones say.
    index: Index<Origin>,
    /// The topmost layers that the index does not have yet, or not all of, from the bottom up: they are asked
    /// first.
    recent: Vec<Recent>,
    /// The lowest layer lies on others, which are not asked.
    apart: bool,
}

/// A layer that is not merged yet.
#[derive(Debug, Clone)]
struct Recent {
    own: Origin,
    layer: Arc<SealedLayer>,
}

impl Recent {
    /// The first block that the layer does not have: what lies there is zero through it, also for larger
    /// layers above.
    fn end(&self) -> Block {
        Block::FIRST + self.layer.header().blocks()
    }

    /// The run at the front of `span`, which the layer has.
    fn first_run(&self, span: Span) -> Run<BlockState> {
        let run = self.layer.first_run(span);
        assert!(run.is_some(), "a recent layer without its map in memory");
        run.unwrap_or(Run::new(span, BlockState::Parent))
    }
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

    /// The layer's number, where one holds the blocks.
    pub(super) fn number(&self) -> Option<u32> {
        match self {
            BaseSource::Layer(number, _) => Some(*number),
            BaseSource::Hole | BaseSource::Zero => None,
        }
    }
}

impl Base {
    /// For layers that lie on each other and on others, which are not asked: where none of them says anything
    /// is a hole.
    pub(super) fn apart() -> Self {
        let merged = Merged {
            apart: true,
            ..Merged::default()
        };
        Base {
            merged: RwLock::new(merged),
            merging: Mutex::default(),
            lazy: AtomicBool::new(false),
        }
    }

    /// Takes the layers of another base in the place of its own: the same content, in other layers.
    pub(super) fn replace(&self, other: Base) {
        let _merging = self.merging.lock();
        self.lazy.fetch_or(other.is_lazy(), Ordering::AcqRel);
        *self.merged.write() = other.merged.into_inner();
    }

    /// Puts a layer on top.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when its parent is not the layer that was on top, and as
    /// [`SealedLayer::for_each_run`]: then part of it is on top, and the base is to be thrown away.
    pub fn push(&self, layer: Arc<SealedLayer>) -> Result<()> {
        let mut merged = self.merged.write();
        assert!(
            merged.recent.is_empty(),
            "a layer above one that is not merged"
        );
        let own = merged.put(&layer)?;
        self.lazy.fetch_or(layer.is_lazy(), Ordering::AcqRel);
        let index = &mut merged.index;
        index.truncate(Block::FIRST + layer.header().blocks());
        layer.for_each_run(|run| index.set(run.span, origin_of(run.value, own)))
    }

    /// True where blocks of a layer may be somewhere else.
    pub fn is_lazy(&self) -> bool {
        self.lazy.load(Ordering::Acquire)
    }

    /// The UUIDs of the layers, from the bottom up. The numbers of sources are places in this list.
    pub fn uuids(&self) -> Vec<Uuid> {
        let merged = self.merged.read();
        let layers = merged.layers.iter();
        layers.map(|layer| layer.header().uuid).collect()
    }

    /// As [`Base::push`], of a layer that was just sealed: it takes the same short time whatever the layer
    /// holds. [`Base::merge`] does the rest.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when its parent is not the layer that was on top; the base is as before.
    pub fn push_recent(&self, layer: Arc<SealedLayer>) -> Result<()> {
        let mut merged = self.merged.write();
        let own = merged.put(&layer)?;
        merged.recent.push(Recent { own, layer });
        Ok(())
    }

    /// Brings recent layers into the index, bit by bit, so that reads never wait for long.
    pub fn merge(&self) {
        let _merging = self.merging.lock();
        loop {
            let Some(recent) = self.merged.read().recent.first().cloned() else {
                return;
            };
            self.merged.write().index.truncate(recent.end());
            let mut rest = Span::between(Block::FIRST, recent.end());
            while !rest.is_empty() {
                let mut batch = Vec::new();
                while !rest.is_empty() && batch.len() < MERGED_AT_ONCE {
                    let run = recent.first_run(rest);
                    rest = rest.from(run.end());
                    // What the layer says nothing of stays as it is.
                    batch.extend((run.value != BlockState::Parent).then_some(run));
                }
                let index = &mut self.merged.write().index;
                for run in batch {
                    index.set(run.span, origin_of(run.value, recent.own));
                }
            }
            self.merged.write().recent.remove(0);
        }
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
        let mut rest = span;
        while !rest.is_empty() {
            let run = merged.first_run(rest);
            rest = rest.from(run.end());
            each(merged.describe(run));
        }
    }

    /// Reads whole blocks from `start`; each is checked against its checksum. `each` is told what came
    /// from where.
    ///
    /// # Errors
    /// As [`SealedLayer::read_blocks`].
    pub fn read_blocks(
        &self,
        buf: &mut [u8],
        start: Block,
        mut each: impl FnMut(&Run<BaseSource>),
    ) -> Result<()> {
        let mut rest = buf;
        let mut span = Span::of_buffer(start, rest);
        while !span.is_empty() {
            let run = {
                let merged = self.merged.read();
                merged.describe(merged.first_run(span))
            };
            let (piece, tail) = rest.split_at_mut(run.len().buffer_len());
            match &run.value {
                BaseSource::Layer(_, layer) => layer.read_blocks(piece, run.start())?,
                BaseSource::Hole | BaseSource::Zero => piece.fill(0),
            }
            each(&run);
            rest = tail;
            span = span.from(run.end());
        }
        Ok(())
    }
}

/// What the merged index says of blocks that a layer says this of.
fn origin_of(state: BlockState, own: Origin) -> Origin {
    match state {
        BlockState::Data => own,
        BlockState::Zero | BlockState::Parent => Origin::ZERO,
    }
}

impl Merged {
    /// Puts a layer on top, and says how the index calls it.
    fn put(&mut self, layer: &Arc<SealedLayer>) -> Result<Origin> {
        let below = self.layers.last().map(|below| below.header());
        let who = layer.dir().display().to_string();
        if below.is_some() || !self.apart {
            check_parent(layer.header(), below, &who)?;
        }
        let own = Origin::layer(self.layers.len())
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "too many layers in the chain"))?;
        self.layers.push(layer.clone());
        Ok(own)
    }

    /// The run of one origin at the front of `span`.
    fn first_run(&self, span: Span) -> Run<Origin> {
        let mut span = span;
        for recent in self.recent.iter().rev() {
            if span.start() >= recent.end() {
                return Run::new(span, Origin::ABSENT);
            }
            span = Span::between(span.start(), span.end().min(recent.end()));
            let run = recent.first_run(span);
            if run.value != BlockState::Parent {
                return Run::new(run.span, origin_of(run.value, recent.own));
            }
            span = run.span;
        }
        self.index.first_run(span)
    }

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
pub(super) fn check_parent(layer: &Header, below: Option<&Header>, who: &str) -> Result<()> {
    if layer.fits_on(below) {
        return Ok(());
    }
    let name = |uuid: Option<uuid::Uuid>| uuid.map_or("no parent".into(), |uuid| uuid.to_string());
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "{who}: its parent is {}, but the layer below is {}: a layer fits only the parent that \
             it was made on",
            name(layer.parent),
            name(below.map(|below| below.uuid))
        ),
    ))
}
