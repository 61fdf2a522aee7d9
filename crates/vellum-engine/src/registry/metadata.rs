//! Which windows of the layers that are pushed hold the metadata of their file system: docs/registry.md, "Hot pack".

use std::collections::BTreeSet;

use vellum_base::block::{BLOCK_SIZE, Block, BlockState, Blocks, Span};
use vellum_base::error::{ErrorKind, Result};
use vellum_fs::unmounted::{Piece, metadata};

use super::super::device::Target;
use super::super::diff::top_of;
use super::super::export::subject::Subject;
use super::hot::{Of, Written};

/// Of the bytes that layers take as they are stored, their metadata may be one part in so many.
const SHARE: u64 = 10;
/// So many bytes it may always be: what a small image has.
const ALWAYS: u64 = 8 << 20;
/// And so many at most.
const MOST: u64 = 64 << 20;
/// Blocks of metadata that are looked at, at most, by what they are for: some 60 million files have as many.
const LOOKED_AT: u64 = 4 << 20;

/// Where the metadata of a subject's file system lies; none of a disk without an ext4, or of one that cannot be read
/// here.
///
/// # Errors
/// Where a layer cannot be read.
pub(super) fn find(subject: &Subject<'_>) -> Result<Vec<Piece>> {
    if subject.disk.fs.is_none() {
        return Ok(Vec::new());
    }
    let open = Target::Sealed(top_of(&subject.layers)?).open(subject.store)?;
    match metadata(&**open.chain()) {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt) => {
            tracing::warn!(
                "{}: no hot pack brings the file system's metadata: {error}",
                subject.name
            );
            Ok(Vec::new())
        }
        found => found,
    }
}

/// The windows in which these pieces lie, in the order of the disk: as many as may be, by what they are for.
pub(super) fn windows(pieces: &[Piece], layers: &[Written]) -> Vec<Of> {
    let stored = |layer: &Written| -> u64 {
        let lens = layer.chunks.iter().map(|chunk| u64::from(chunk.len));
        lens.sum()
    };
    let all: u64 = layers.iter().map(stored).sum();
    within((all / SHARE).clamp(ALWAYS, MOST), pieces, layers)
}

/// As [`windows`], of which the stored bytes are at most `limit`.
fn within(limit: u64, pieces: &[Piece], layers: &[Written]) -> Vec<Of> {
    let mut pieces: Vec<&Piece> = pieces.iter().collect();
    pieces.sort_unstable_by_key(|(purpose, bytes)| (*purpose, bytes.start));
    // In the order of the disk.
    let mut found: BTreeSet<(u64, Of)> = BTreeSet::new();
    let (mut left, mut looked_at) = (limit, 0);
    for (_, bytes) in pieces {
        let blocks = bytes.start / BLOCK_SIZE..bytes.end.div_ceil(BLOCK_SIZE);
        looked_at += blocks.end - blocks.start;
        if looked_at > LOOKED_AT {
            tracing::warn!("the hot pack leaves metadata out: there is too much of it");
            break;
        }
        // Where pieces meet, a block's window is found by the second time, or did not fit and does not now.
        for block in blocks.map(Block::new) {
            let Some((number, layer)) = holder(block, layers) else {
                continue;
            };
            let window = layer.power.window_of(block);
            let start = u64::from(window) << layer.power.get();
            let Some(chunk) = layer.chunk(window) else {
                continue;
            };
            if found.contains(&(start, (number, window))) {
                continue;
            }
            if let Some(less) = left.checked_sub(chunk.len.into()) {
                left = less;
                found.insert((start, (number, window)));
            }
        }
    }
    found.into_iter().map(|(_, window)| window).collect()
}

/// The layer that has the data of a block, and its number; `None` where it is zero.
fn holder(block: Block, layers: &[Written]) -> Option<(usize, &Written)> {
    let says = |layer: &Written| {
        let behind = layer
            .extents
            .partition_point(|run| run.span.start() <= block);
        let run = layer.extents.get(behind.checked_sub(1)?)?;
        let one = Span::new(block, Blocks::new(1));
        run.span.contains(one).then_some(run.value)
    };
    let mut above = layers.iter().enumerate().rev();
    let (number, layer, state) =
        above.find_map(|(number, layer)| Some((number, layer, says(layer)?)))?;
    (state == BlockState::Data).then_some((number, layer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;
    use vellum_base::block::{Run, WindowPower};
    use vellum_fs::unmounted::Purpose;
    use vellum_registry::artifact::Chunk;

    const BLOCK: u64 = BLOCK_SIZE;

    /// A layer with data, or zeros, in these blocks; a chunk has 10 bytes for each window.
    fn layer(extents: &[(Range<u64>, BlockState)]) -> Written {
        let power = WindowPower::LEAST;
        let run = |(blocks, value): &(Range<u64>, BlockState)| {
            let len = Blocks::new(blocks.end - blocks.start);
            let span = Span::new(Block::new(blocks.start), len);
            Run {
                span,
                value: *value,
            }
        };
        let data = extents
            .iter()
            .filter(|(_, state)| *state == BlockState::Data);
        let windows: BTreeSet<u32> = data
            .flat_map(|(blocks, _)| blocks.clone())
            .map(|block| power.window_of(Block::new(block)))
            .collect();
        let chunk = |window| Chunk {
            window,
            len: 10,
            offset: 0,
            sha256: [0; 32],
            key: None,
        };
        Written {
            digest: String::new(),
            power,
            extents: extents.iter().map(run).collect(),
            chunks: windows.into_iter().map(chunk).collect(),
            data: None,
        }
    }

    fn piece(purpose: Purpose, blocks: Range<u64>) -> Piece {
        (purpose, blocks.start * BLOCK..blocks.end * BLOCK)
    }

    #[test]
    fn a_window_is_of_the_topmost_layer_that_says_something_and_none_where_that_says_zero() {
        let layers = [
            layer(&[(0..64, BlockState::Data)]),
            layer(&[(17..18, BlockState::Data), (32..48, BlockState::Zero)]),
        ];
        let pieces = [
            piece(Purpose::Names, 32..33),
            piece(Purpose::Bitmaps, 50..51),
            piece(Purpose::Names, 16..18),
            piece(Purpose::Mount, 0..1),
            piece(Purpose::Mount, 1000..1001),
        ];
        let found = within(1000, &pieces, &layers);
        assert_eq!(found, [(0, 0), (0, 1), (1, 1), (0, 3)]);
    }

    #[test]
    fn what_does_not_fit_is_what_matters_least_and_the_rest_is_in_the_order_of_the_disk() {
        let layers = [layer(&[(0..64, BlockState::Data)])];
        let pieces = [
            piece(Purpose::Bitmaps, 0..1),
            piece(Purpose::Mount, 48..49),
            piece(Purpose::Files, 32..33),
            piece(Purpose::Names, 16..17),
        ];
        assert_eq!(within(20, &pieces, &layers), [(0, 1), (0, 3)]);
        assert_eq!(within(39, &pieces, &layers), [(0, 1), (0, 2), (0, 3)]);
        assert_eq!(within(40, &pieces, &layers).len(), 4);
        assert!(within(9, &pieces, &layers).is_empty());
    }
}
