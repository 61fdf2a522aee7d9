//! What registries are asked, and what becomes of their answers, by a server that fails as it is told.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod fake;
mod flaky;
mod keychain;
mod ranges;
mod stream;
