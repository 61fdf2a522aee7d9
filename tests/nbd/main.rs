//! The NBD server, with real clients.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

#[path = "../support/common/mod.rs"]
mod common;
#[path = "../support/nbd_client/mod.rs"]
mod nbd_client;

mod contexts;
mod flush_ahead;
mod interop;
mod lab;
mod listen;
mod many;
mod nbd_server;
mod newer_clients;
mod raw;
mod restart;
mod server;
