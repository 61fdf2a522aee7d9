//! Layers stacked into one device: reads resolve through one merged index at the same cost
//! whatever the depth; writes go to the top layer, copying up the rest of a block that they touch
//! first and only in part.

mod base;
mod device;
mod join;
mod open;
mod prewarm;
mod read;
mod sources;
mod stats;
mod write;

pub use base::Base;
pub use device::{Chain, Touches};
pub use join::join_layers;
pub use open::{ChainSpec, look_at_chain, open_chain, open_counted_chain, open_read_only_chain};
pub use prewarm::CopiedUp;
pub use sources::Source;
pub use stats::{
    ChainStats, ChainStatsSnapshot, LatencySnapshot, MAX_COUNTED_LAYERS, SAMPLE_EVERY, STATS_LEN,
    Sample,
};
