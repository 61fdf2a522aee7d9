//! Layers and chains: models, power cuts, faults, hostile bytes, races.

#![allow(
    clippy::too_many_lines,
    reason = "a test is one story, told in one piece"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod chain_model;
mod chain_prewarm;
mod crash;
mod crash_grow;
mod crash_layer;
mod fault_cost;
mod fault_layer;
mod format_page;
mod golden;
mod healing;
mod hostile_layer;
mod lazy_evict;
mod lazy_layer;
mod live_layer;
mod page_cache;
mod preallocate;
mod stress_layer;
