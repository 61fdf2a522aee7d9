//! The snapshotter, under containerd, Docker and its own client.

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

#[path = "../support/ports/mod.rs"]
mod ports;
#[path = "../support/snapshotter_support/mod.rs"]
mod snapshotter_support;

mod api;
mod containerd;
mod daemon;
mod diff;
mod dist;
mod docker;
mod export;
mod growth;
mod kill;
mod metrics;
mod suite;
