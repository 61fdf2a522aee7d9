//! The chain device for clients: as a network export or as a local block device.

pub mod device;
pub mod fuse;
pub mod loop_device;
pub mod nbd;
pub mod opener;
pub mod unix_socket;
