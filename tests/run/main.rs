//! Containers that run: confinement, users, networks, volumes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod confinement;
mod container;
mod run_support;
