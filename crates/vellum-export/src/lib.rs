//! The chain device for clients: as a network export, as a local block device, or as the disk of a virtual
//! machine.

mod accept;
pub mod device;
pub mod fuse;
pub mod loop_device;
pub mod nbd;
pub mod opener;
mod pace;
pub mod unix_socket;
pub mod vhost;
