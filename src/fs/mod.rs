//! File systems on a device: ext4, and the host's table of mounts.

pub mod mountinfo;
