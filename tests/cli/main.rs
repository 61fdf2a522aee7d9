//! The command line: import, interrupted commands, lives of containers, backups, layer files, `verify-durability`, `vhost`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

#[path = "../support/common/mod.rs"]
mod common;
#[path = "../support/image_support/mod.rs"]
mod image_support;

mod backup;
mod cp;
mod cp_hostile;
mod diff;
mod export;
mod habits;
mod import;
mod interrupted;
mod layer_file;
mod lifecycle;
mod live;
mod names;
mod package;
mod same_bytes;
mod verify_durability;
mod vhost;
