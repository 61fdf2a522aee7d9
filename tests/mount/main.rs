//! Devices and mounted containers: servers that die, hang or are replaced, real file systems.

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
#[path = "../support/nbd_client/mod.rs"]
mod nbd_client;
#[path = "../support/uring/mod.rs"]
mod uring;

mod come_up;
mod crash;
mod databases;
mod device;
mod durability;
mod ext4;
mod hang;
mod kill_container;
mod mount_support;
mod remount;
mod rename;
mod ring;
mod server_support;
mod servers;
mod snapshot;
mod stats;
