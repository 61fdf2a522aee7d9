//! Vellum: a block-level copy-on-write storage driver for containers.
//!
//! Container images become stacks of thin, read-only block layers; each container gets a thin
//! writable layer that allocates 4 KiB blocks on first write and resolves every other read down
//! the chain. Dependencies point one way:
//!
//! `block ← storage ← layer ← chain ← {export, fs} ← store ← engine ← cli`, with `image`, which
//! knows of files only, below `store`.
//!
//! * [`block`]: the vocabulary: blocks, extents, the [`block::BlockDevice`] trait.
//! * [`storage`]: the seam to the host's files, so that tests can simulate power cuts and faults.
//! * [`layer`]: the on-disk layer: header, map, journal, data, seal.
//! * [`chain`]: layers stacked into one device through one merged index.
//! * [`store`]: names, references, locks and garbage collection.
//! * [`export`]: the chain device as an NBD export or as a local block device.
//! * [`fs`]: ext4 on top of a device: make, mount, freeze, compare.
//! * [`image`]: container images in their many shapes.
//! * [`engine`]: import, mount, run, commit, compare, serve: what commands are made of.
//! * [`snapshotter`]: the store as a containerd snapshotter, over gRPC.
//! * [`cli`]: the `vellum` command, one file a command.
//! * [`crash_point`]: where tests have a process die.
//! * [`inherit`]: what a process does not take over from its caller.
//! * [`interrupt`]: signals that ask a command to end.
//! * [`memory`]: what a process keeps of the memory it needed once.
//! * [`size`]: sizes as people type them.

pub mod block;
pub mod chain;
pub mod cli;
pub mod crash_point;
pub mod engine;
pub mod error;
pub mod export;
pub mod fs;
pub mod image;
pub mod inherit;
pub mod interrupt;
pub mod layer;
pub mod memory;
pub mod size;
pub mod snapshotter;
pub mod storage;
pub mod store;

pub use error::{Error, ErrorKind, Result};
