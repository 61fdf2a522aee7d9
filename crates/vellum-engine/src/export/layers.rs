//! An image's block layers as they are, in a layer file. docs/images.md, "Layer files".

use std::io::Write;

use super::super::complete::checksum_layer;
use super::super::layer_file::{Description, Known};
use super::super::template;
use super::super::watch::Watch;
use super::subject::Subject;
use vellum_backup::{LAYER_HEADER_LEN, LayerEntry, LayerWriter};
use vellum_base::block::{Block, BlockState, Blocks, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::layer::{LazyLayer, SealedLayer};
use vellum_image::{HistoryEntry, ImageConfig, Progress};
use vellum_store::{ImageRecord, Store, now};

/// Blocks read at a time.
const PIECE: Blocks = Blocks::new(256);

/// What was written.
pub(crate) struct Written {
    /// Layers whose blocks are in it.
    pub layers: usize,
    /// Bytes of data in these.
    pub bytes: u64,
}

/// Writes the layers of a subject, all of them sealed, but for those of `without`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] where `without` has none of them; [`ErrorKind::ReadOnly`] for a layer without checksums in
/// a store that cannot be written; [`ErrorKind::Corrupt`] for a damaged block.
pub(crate) fn write(
    subject: &Subject<'_>,
    without: Option<&ImageRecord>,
    out: &mut dyn Write,
    watch: &dyn Watch,
) -> Result<Written> {
    if subject.container.is_some() {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!(
                "the container {} has a layer that is written, and the store cannot be changed to seal it: \
                 export a snapshot of it, or as --format raw",
                subject.name
            ),
        ));
    }
    let is_left_out = |layer| without.is_some_and(|image| image.layers.contains(layer));
    if let Some(image) = without
        && !subject.layers.iter().any(is_left_out)
    {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} has no layer of the image {}: export it without --without",
                subject.name, image.name
            ),
        ));
    }
    let description = Description {
        vellum: env!("CARGO_PKG_VERSION").into(),
        name: subject.name.clone(),
        without: without.map(|image| image.name.clone()),
        disk: subject.disk.clone(),
        config: config(subject),
        created: now(),
    };
    let mut writer = LayerWriter::new(out, subject.layers.len(), &description.encode()?)?;
    let mut written = Written {
        layers: 0,
        bytes: 0,
    };
    for layer in &subject.layers {
        let sealed = checksummed(subject.store, *layer)?;
        let left_out = is_left_out(layer);
        writer.layer(&entry(subject.store, &sealed, left_out)?)?;
        if !left_out {
            let size = sealed.data_blocks().bytes();
            let progress = watch.begin(&layer.to_string(), Some(size));
            each_piece(&sealed, progress, |piece| match piece {
                Piece::Zero(span) => writer.zero(span),
                Piece::Data(block, bytes) => writer.data(block, bytes),
            })?;
            watch.done();
            written.layers += 1;
            written.bytes += size;
        }
    }
    writer.finish()?;
    Ok(written)
}

/// Opens a layer that has its digest; one that has none yet gets it.
pub(crate) fn checksummed(store: &Store, layer: uuid::Uuid) -> Result<SealedLayer> {
    let open = || SealedLayer::open(&**store.storage(), &store.layer_dir(layer));
    let sealed = open()?;
    if sealed.is_checksummed() {
        return Ok(sealed);
    }
    drop(sealed);
    checksum_layer(store, layer, |_| {}).context(|| {
        format!("the layer {layer} has no checksums yet, without which it is not carried")
    })?;
    open()
}

/// The digest of a sealed layer, which is made where it has none yet; of a lazy one the digest that it will have.
///
/// # Errors
/// Where the layer cannot be read.
pub(crate) fn digest_of_layer(store: &Store, layer: uuid::Uuid) -> Result<[u8; 32]> {
    let lazy = LazyLayer::open(&**store.storage(), &store.layer_dir(layer))?;
    if let Some(lazy) = lazy {
        return Ok(*lazy.digest());
    }
    let digest = checksummed(store, layer)?.digest();
    digest.ok_or_else(|| Error::internal("a layer with checksums has no digest"))
}

/// What is said of a layer.
fn entry(store: &Store, sealed: &SealedLayer, left_out: bool) -> Result<LayerEntry> {
    let header = sealed.header();
    let digest = sealed
        .digest()
        .ok_or_else(|| Error::internal("a layer with checksums has no digest"))?;
    let bytes: [u8; LAYER_HEADER_LEN] = header
        .encode()
        .try_into()
        .map_err(|_| Error::internal("the header of a layer has another length"))?;
    let known = Known::of(store.layer_info(header.uuid)?);
    Ok(LayerEntry {
        digest,
        virtual_size: header.virtual_size,
        left_out,
        header: bytes,
        info: known.encode()?,
    })
}

/// What a layer says of blocks, a piece at a time.
pub(crate) enum Piece<'a> {
    /// They are zero.
    Zero(Span),
    /// From a block on they hold this.
    Data(Block, &'a [u8]),
}

/// Says what a layer says, in order: blocks that it says nothing of are the parent's.
pub(crate) fn each_piece(
    sealed: &SealedLayer,
    mut progress: Option<Progress<'static>>,
    mut each: impl FnMut(Piece<'_>) -> Result<()>,
) -> Result<()> {
    let mut runs: Vec<Run<BlockState>> = Vec::new();
    sealed.for_each_run(|run| runs.push(run))?;
    let mut buffer = vec![0; PIECE.buffer_len()];
    for run in runs {
        match run.value {
            BlockState::Parent => {}
            BlockState::Zero => each(Piece::Zero(run.span))?,
            BlockState::Data => {
                for span in run.span.pieces(PIECE) {
                    interrupt::check()?;
                    let (piece, _) = buffer.split_at_mut(span.len().buffer_len());
                    sealed.read_blocks(piece, span.start())?;
                    each(Piece::Data(span.start(), piece))?;
                    if let Some(progress) = &mut progress {
                        progress(span.len().bytes());
                    }
                }
            }
        }
    }
    Ok(())
}

/// The configuration, with a step of the history for each layer.
pub(crate) fn config(subject: &Subject<'_>) -> ImageConfig {
    let mut config = subject.config.clone();
    if subject.is_image {
        return config;
    }
    let own = template::count(subject.store, &subject.layers) + 1;
    config.settle_history(subject.layers.len().saturating_sub(own));
    config.history.push(HistoryEntry {
        created: Some(now()),
        created_by: Some(format!("vellum export {}", subject.name)),
        ..HistoryEntry::default()
    });
    config
}
