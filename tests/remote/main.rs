//! Remote snapshots: images that `vellum push` put into a registry are used under containerd before they are here.
//! docs/containerd.md, "Remote snapshots".

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
#[path = "../support/ports/mod.rs"]
mod ports;
#[path = "../support/registry_support/mod.rs"]
mod registry_support;
#[path = "../support/snapshotter_support/mod.rs"]
mod snapshotter_support;

mod api;
mod cri;
mod image;
mod kubernetes;
mod secrets;
