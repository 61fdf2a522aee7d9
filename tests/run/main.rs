//! Containers that run: confinement, users, networks, volumes.

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

mod background;
mod confinement;
mod container;
mod in_use;
mod run_support;
mod volumes;
