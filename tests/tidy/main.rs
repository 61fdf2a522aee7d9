//! The project says the same thing everywhere: the arrows between crates, the tests and commands
//! that docs name, the links, the rule that no mistake of ours becomes silence, and that the names in
//! a run directory are one type's. Functions of more than 70 lines are clippy's to find (`clippy.toml`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod arrows;
mod pages;
mod run_dirs;
mod silence;
mod tree;
