//! Block-level copy-on-write: layers on disk, and chains of them that read and write as one device.
//!
//! A *layer* is a directory: a header, the data, a map of the blocks that it holds, and, while it is
//! writable, a journal and a log of changes. A *chain* is a stack of sealed layers with at most one
//! writable layer on top. A write allocates 4 KiB blocks in the top (copy-up where it covers a block in
//! part); a read is answered by the uppermost layer that holds the block. What was flushed survives
//! power cuts and the death of the process at any moment.
//!
//! * [`layer`]: one layer: made, written, flushed, sealed, recovered, checked.
//! * [`chain`]: layers stacked into one [`BlockDevice`](vellum_base::block::BlockDevice) through one
//!   merged index.

pub mod chain;
pub mod layer;
