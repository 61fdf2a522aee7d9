//! The store: concurrency, power cuts, full disks, other places, scale.

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

#[path = "../support/common/mod.rs"]
mod common;

mod check;
mod concurrent;
mod concurrent_live;
mod crash;
mod full;
mod nearly_full;
mod places;
mod scale;
mod small_disk;
mod waits;
mod write_back;
