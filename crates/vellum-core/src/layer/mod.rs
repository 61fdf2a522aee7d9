//! The on-disk layer: a directory with a header, data, a map, and a journal or a seal.
//! The bytes are specified in docs/format.md, the crash cases argued in docs/durability.md.
//!
//! * [`WritableLayer`]: the top of a container's chain.
//! * [`SealedLayer`]: everything below; never changes again, checksummed.
//! * [`Index`]: block → value, in memory.

mod check;
mod checkpoint;
mod codec;
mod data;
mod files;
mod flush;
mod header;
mod index;
mod journal;
mod live;
mod map_file;
mod map_state;
mod options;
mod range_lock;
mod recovery;
mod sealed;
mod shared;
mod space;
mod stats;
mod table;
mod writable;

pub use check::{Finding, Repair, Severity, check_layer, fail_on_damage, repair_layer};
pub use header::{FORMAT_VERSION, HEADER_FILE, Header, check_size};
pub use index::{ABSENT, Index, Runs, ValueRun};
pub use live::CHANGES_AT_ONCE;
pub use options::LayerOptions;
pub use range_lock::{RangeGuard, RangeLock};
pub use recovery::data_blocks_on_disk;
pub use sealed::{ScrubReport, SealedLayer, seal_in_place};
pub use space::{RESERVE_FILE, SpaceStatus};
pub use stats::{LayerCounters, LayerStats, LayerStatsSnapshot};
pub use table::{DIGEST_LEN, MapExtent};
pub use writable::WritableLayer;

/// The index value of a block that holds data.
pub const STATE_DATA: u32 = 1;
/// The index value of a block that is zero.
pub const STATE_ZERO: u32 = 2;

/// The state that an index value of a layer's own map stands for.
pub(crate) fn state_of_value(value: u32) -> vellum_base::block::BlockState {
    match value {
        STATE_DATA => vellum_base::block::BlockState::Data,
        STATE_ZERO => vellum_base::block::BlockState::Zero,
        _ => vellum_base::block::BlockState::Parent,
    }
}

/// The index value of a state.
pub(crate) fn value_of_state(state: vellum_base::block::BlockState) -> u32 {
    match state {
        vellum_base::block::BlockState::Parent => ABSENT,
        vellum_base::block::BlockState::Data => STATE_DATA,
        vellum_base::block::BlockState::Zero => STATE_ZERO,
    }
}
