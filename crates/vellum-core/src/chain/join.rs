//! Several sealed layers on each other become one: docs/snapshots.md, "Joining layers".

use std::sync::Arc;

use super::Base;
use super::base::BaseSource;
use crate::layer::{SealedLayer, WritableLayer};
use vellum_base::block::{Block, BlockState, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result};

/// Blocks copied at a time: 1 MiB.
const PIECE: Blocks = Blocks::new(256);

/// Writes into an empty layer what the layers in `group`, from the bottom up, say together: the topmost of them
/// that says something of a block says it there. Each block is read against its checksum. What lies below
/// the group is not looked at, so blocks that are zero in it stay so. `progress` is called with the number
/// of data blocks just copied.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a target that is not empty or has another size than the uppermost; as
/// [`Base::push`], [`SealedLayer::read_blocks`] and [`WritableLayer::write_blocks`].
pub fn join_layers(
    group: Vec<Arc<SealedLayer>>,
    into: &WritableLayer,
    mut progress: impl FnMut(Blocks),
) -> Result<()> {
    let base = Base::apart();
    for layer in group {
        base.push(layer)?;
    }
    let uppermost = base
        .layers()
        .last()
        .map(|layer| layer.header().virtual_size);
    if uppermost != Some(into.size()) || !into.is_untouched() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{}: not an empty layer of the uppermost's size",
                into.dir().display()
            ),
        ));
    }
    let mut runs = Vec::new();
    let all = Span::between(Block::FIRST, Block::FIRST + Blocks::whole_in(into.size()));
    base.resolve(all, |run| runs.push(run));
    let mut buf = Vec::new();
    for run in runs {
        match run.value {
            BaseSource::Hole => {}
            BaseSource::Zero => {
                let held = into.lock_blocks(run.span)?;
                into.clear_blocks(&held, run.span, BlockState::Zero)?;
            }
            BaseSource::Layer(_, layer) => {
                for piece in run.span.pieces(PIECE) {
                    vellum_base::interrupt::check()?;
                    buf.resize(piece.len().buffer_len(), 0);
                    layer.read_blocks(&mut buf, piece.start())?;
                    let held = into.lock_blocks(piece)?;
                    into.write_blocks(&held, piece.start(), &buf)?;
                    progress(piece.len());
                }
            }
        }
    }
    Ok(())
}
