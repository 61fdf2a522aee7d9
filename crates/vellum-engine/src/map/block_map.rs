//! The map itself, as `vellum map --json` prints it.

use serde::Serialize;
use uuid::Uuid;

/// Version of [`BlockMap`] as JSON: fields may be added, others only change with this number.
pub const MAP_SCHEMA: u32 = 1;

/// Which layer each block comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockMap {
    /// [`MAP_SCHEMA`].
    pub schema: u32,
    /// The container or image.
    pub name: String,
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// From the bottom up; the last of a container's is its writable layer.
    pub layers: Vec<MappedLayer>,
    /// Blocks that no layer says anything of.
    pub hole_blocks: u64,
    /// Blocks that a layer says are zero.
    pub zero_blocks: u64,
    /// All blocks in order: (how many, source), where the source is a layer's number, -1 for a hole
    /// or -2 for zero.
    pub runs: Vec<(u64, i64)>,
}

/// A layer on the map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MappedLayer {
    /// 0 is the bottom.
    pub number: usize,
    /// Its name in the store.
    pub uuid: Uuid,
    /// True for a container's writable layer.
    pub top: bool,
    /// Where it came from.
    pub origin: String,
    /// Blocks that come from it: those that no layer above covers.
    pub shown_blocks: u64,
}
