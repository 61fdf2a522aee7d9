//! Whether a storage stack keeps what it acknowledged, for any stack: a directory on a mount, a
//! file, a block device, an NBD export.
//!
//! [`write()`] fills a target with blocks that say what they are, from several threads, and makes
//! them durable again and again. What the target acknowledged goes to a log that is kept elsewhere.
//! Then the stack is killed, or the whole machine. [`check()`] reads the target and compares it with
//! the log: whatever was acknowledged must be there.

mod block;
mod check;
mod log;
mod nbd;
mod target;
mod write;

pub use check::{CheckReport, Loss, LossKind, check};
pub use log::Log;
pub use target::Target;
pub use write::{WriteOptions, WriteReport, write};
