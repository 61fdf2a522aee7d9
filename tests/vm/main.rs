//! Whole virtual machines: growth in use, power cuts, disks of machines.

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

#[path = "../support/snapshotter_support/mod.rs"]
mod snapshotter_support;

mod grow;
mod power;
mod ublk;
mod vhost;
