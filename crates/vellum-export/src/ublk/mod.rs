//! A block device of the kernel's own whose requests come to this program by io_uring: no loop device, no
//! FUSE.
//!
//! The kernel keeps the device when its server dies, and sends what was not answered to the next one
//! (USER_RECOVERY and REISSUE, Linux 6.1). Data go by read(2) and write(2) on the device's character device
//! (USER_COPY, Linux 6.5), so that a buffer belongs to a thread and not to each of the requests that may
//! come. A device has one queue, which one thread fetches from: docs/local-device.md says why.
//!
//! Source: Documentation/block/ublk.rst and include/uapi/linux/ublk_cmd.h, Linux 6.12.

mod abi;
pub(crate) mod control;
pub(crate) mod crew;
pub(crate) mod disk;
pub(crate) mod thread;

pub(crate) use abi::DeviceId;
