//! The chain device for clients: as a network export, as a local block device, or as the disk of a virtual
//! machine.

mod accept;
mod block_node;
pub mod device;
pub mod fuse;
mod inbox;
pub mod local_disk;
pub mod loop_device;
pub mod nbd;
pub mod opener;
mod pace;
pub mod shortage;
pub mod space_thread;
#[cfg(test)]
mod stalling;
mod ublk;
pub mod unix_socket;
mod uring;
pub mod vhost;
