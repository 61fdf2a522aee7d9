//! File systems on a device: ext4, the host's table of mounts, and where a mounted device keeps its files.
//!
//! * [`ext4`]: the template that all containers start from, mount, growth, trim, usage.
//! * `e2fsprogs`: its programs, started so that nobody else's file system keeps them waiting.
//! * [`freeze`]: a file system held still for a moment, that is never left frozen.
//! * [`held_dir`]: a directory that is held open, and so known wherever it is moved.
//! * [`superblock`]: what the driver must know of an ext4 without mounting it.
//! * [`mountinfo`]: what is mounted where.
//! * [`run_dir`]: the directory of a mounted device, and what lies in it.
//! * [`unmounted`]: the files of an ext4 read from its blocks, and what two states of one differ in.

mod e2fsprogs;
pub mod ext4;
mod fields;
pub mod freeze;
pub mod held_dir;
pub mod mountinfo;
pub mod run_dir;
pub mod superblock;
pub mod unmounted;
