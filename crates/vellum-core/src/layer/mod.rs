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
mod full;
mod header;
mod headroom;
mod index;
mod journal;
mod lazy;
mod live;
mod map_file;
mod map_state;
mod options;
mod prealloc;
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
pub use index::{Index, IndexValue};
pub(crate) use lazy::once_here;
pub use lazy::{Completion, Fetch, LazyContent, LazyLayer, fetch_by};
pub use live::CHANGES_AT_ONCE;
pub use options::LayerOptions;
pub use range_lock::{RangeGuard, RangeLock};
pub use recovery::data_blocks_on_disk;
pub use sealed::{Healer, ScrubReport, SealedLayer, seal_in_place};
pub use space::{RESERVE_FILE, SpaceStatus};
pub use stats::{LayerCounters, LayerStats, LayerStatsSnapshot};
pub use table::DIGEST_LEN;
pub use writable::WritableLayer;
