//! Container images, read, applied, compared and written.

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
mod diff;
mod source;
