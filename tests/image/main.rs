//! Container images, read, applied, compared and written.

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

#[path = "../support/image_support/mod.rs"]
mod image_support;

mod apply;
mod blocks;
mod diff;
mod qcow2;
mod source;
