//! FUSE over io_uring: the entries of a ring wait in the kernel for requests, one queue a processor, and a
//! client's request is answered on the processor that it runs on.
//!
//! docs/local-device.md, "FUSE over io_uring", has the protocol with the kernel, the notes in memory, and
//! why a killed worker's successor neither loses a request nor carries one out twice.
//!
//! * [`abi`]: the bytes of the kernel's protocol.
//! * [`memory`]: the entries and what is noted of them, in memory that outlives a killed worker.
//! * [`crew`]: what the threads share, and how they hand requests to each other.
//! * [`place`]: on which processors they run.
//! * [`thread`]: those that have a ring, and those that wait for the disk in their place.

pub mod abi;
pub mod crew;
pub mod host;
pub mod memory;
mod place;
pub mod thread;
