//! What the rest of Vellum stands on, and what knows nothing of layers.
//!
//! * [`error`]: one error type, its kinds, and how context is added.
//! * [`block`]: the vocabulary of blocks, and [`block::BlockDevice`], the seam between chains and
//!   exports.
//! * [`storage`]: the seam to the host's files. With the feature `sim` also a simulated disk that
//!   loses its power, and faults for any storage.
//! * [`interrupt`]: signals that ask a command to end.
//! * [`inherit`]: what a process does not take over from its caller.
//! * [`size`]: sizes as people type them; [`moment`]: moments as they read them.
//! * [`memory`]: what a process keeps of the memory it needed once.
//! * [`crash_point`]: where tests have a process die.
//! * [`fault`]: what a process that serves does after a fault of its own.

#![deny(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        reason = "tests make bytes of numbers that fit"
    )
)]

pub mod block;
pub mod crash_point;
pub mod error;
pub mod fault;
pub mod inherit;
pub mod interrupt;
pub mod memory;
pub mod moment;
pub mod size;
pub mod storage;

pub use error::{Error, ErrorKind, Result, ResultExt};
