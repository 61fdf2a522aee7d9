//! Holes of files in a tar: told by a map, as GNU tar has it, or written as zeros.

use tar_core::SparseEntry;

use super::node::{Extent, Kind, Node};

/// The most bytes that the size field of a ustar header holds.
const MAX_USTAR_SIZE: u64 = 0o77_777_777_777;
/// Bytes of holes that are written as zeros for those who cannot read sparse files, at most: a disk image or a log with
/// more would make a layer that nobody wants.
const LARGEST: u64 = 256 << 20;

/// The map of a file of `size` bytes that has data in `extents` alone.
pub(super) fn map(extents: &[Extent], size: u64) -> Vec<SparseEntry> {
    let data = extents.iter().map(|extent| SparseEntry {
        offset: extent.offset,
        length: extent.length,
    });
    let mut map: Vec<SparseEntry> = data.collect();
    // An empty run tells readers where the file ends, as GNU tar has it.
    if extents.last().and_then(|last| last.end()) != Some(size) {
        map.push(SparseEntry {
            offset: size,
            length: 0,
        });
    }
    map
}

/// Has the holes of a file written as zeros where a map in front of so much data has no room in the header's size field.
pub(super) fn fill_without_room(node: &mut Node) {
    if let Some((size, data)) = sizes(node)
        && data > MAX_USTAR_SIZE / 2
    {
        tracing::debug!(size, "holes are written as zeros");
        fill(node);
    }
}

/// Has the holes of a file written as zeros for those who cannot read sparse files, unless that would be too much.
pub(super) fn fill_for_all(node: &mut Node) {
    let Some((size, data)) = sizes(node) else {
        return;
    };
    let holes = size.saturating_sub(data);
    if holes > LARGEST {
        tracing::warn!(
            "{}: is written as a sparse file, since it has {holes} bytes of holes: not every program can read that",
            node.shown()
        );
        return;
    }
    fill(node);
}

/// The bytes of a file, and how many of them are data; `None` of what has no holes.
fn sizes(node: &Node) -> Option<(u64, u64)> {
    match &node.kind {
        Kind::File {
            size,
            extents: Some(runs),
        } => Some((*size, runs.iter().map(|run| run.length).sum())),
        _ => None,
    }
}

fn fill(node: &mut Node) {
    if let Kind::File { extents, .. } = &mut node.kind {
        *extents = None;
    }
}
