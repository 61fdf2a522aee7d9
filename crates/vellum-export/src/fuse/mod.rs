//! A block device as ONE regular file in a FUSE mount whose root is that file.
//!
//! The few opcodes that a loop device uses are spoken by hand, since a session whose server may
//! be killed and replaced needs what the crates do not give together: a handshake made by another
//! process than the one that serves, requests that are sent again, and a reply written where the
//! data was read to.
//!
//! * [`abi`]: the bytes of the kernel's protocol, parsed from slices.
//! * [`session`]: the mount and the handshake; what the process that owns the descriptor does.
//! * [`slot`]: the buffer of one serving thread, which outlives a killed server.
//! * [`readers`]: which threads take requests while others wait for the disk.
//! * [`transport`]: how requests come and answers go, behind one trait.
//! * [`ring`]: the other way, over io_uring.
//! * [`server`]: the loop that answers requests from a [`vellum_base::block::BlockDevice`].

pub mod abi;
pub mod readers;
pub mod ring;
pub mod server;
pub mod session;
pub mod slot;
pub mod transport;
