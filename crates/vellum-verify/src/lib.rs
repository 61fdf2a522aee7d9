//! What Vellum says of itself, shown on the machine at hand.
//!
//! * [`durability`]: whether a file system, device or NBD export keeps what it acknowledged as flushed.
//! * [`mod@bench`]: what copy-on-write costs on this disk, in turns with plain calls.

pub mod bench;
pub mod durability;
