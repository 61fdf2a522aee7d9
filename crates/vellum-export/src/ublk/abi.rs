//! The bytes of ublk: commands to the control device and to a device, and what the kernel says of requests.
//!
//! Source: include/uapi/linux/ublk_cmd.h, Linux 6.12. All numbers are in host byte order.

use serde::{Deserialize, Serialize};

use vellum_base::block::{array_at, part_mut};

/// The number of a device: N of /dev/ublkbN and /dev/ublkcN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub u32);

/// The number of a request among those that a device may have at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tag(pub(super) u16);

/// Requests that a device may have at once.
pub(super) const DEPTH: u16 = 128;
/// The largest request, in bytes.
pub(super) const MAX_IO: usize = 1 << 20;
/// Bytes of a sector, in which the kernel counts.
pub(super) const SECTOR: u64 = 512;
/// Sectors that one discard or write-zeroes names at most: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Features of a device (`UBLK_F_*`).
pub(super) mod feature {
    /// The kernel keeps the device when its server dies.
    pub const USER_RECOVERY: u64 = 1 << 3;
    /// And sends what was not answered again.
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Commands are numbered as ioctls are.
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// Data go by read(2) and write(2).
    pub const USER_COPY: u64 = 1 << 7;
    /// A device grows in use.
    pub const UPDATE_SIZE: u64 = 1 << 10;
}

/// What a device cannot do without.
pub(super) const NEEDED: u64 =
    feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::USER_COPY;

const fn ioctl(direction: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | (b'u' as u32) << 8 | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// Bytes of `ublksrv_ctrl_cmd`.
const CONTROL_LEN: u32 = 32;
/// Bytes of `ublksrv_io_cmd`.
const IO_LEN: u32 = 16;

/// Commands to /dev/ublk-control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Verb {
    Info = ioctl(READ, 0x02, CONTROL_LEN),
    Add = ioctl(READ_WRITE, 0x04, CONTROL_LEN),
    Delete = ioctl(READ_WRITE, 0x05, CONTROL_LEN),
    Start = ioctl(READ_WRITE, 0x06, CONTROL_LEN),
    SetParameters = ioctl(READ_WRITE, 0x08, CONTROL_LEN),
    StartRecovery = ioctl(READ_WRITE, 0x10, CONTROL_LEN),
    EndRecovery = ioctl(READ_WRITE, 0x11, CONTROL_LEN),
    Features = ioctl(READ, 0x13, CONTROL_LEN),
    DeleteAsync = ioctl(READ, 0x14, CONTROL_LEN),
    UpdateSize = ioctl(READ_WRITE, 0x15, CONTROL_LEN),
}

/// Commands to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum IoVerb {
    Fetch = ioctl(READ_WRITE, 0x20, IO_LEN),
    CommitAndFetch = ioctl(READ_WRITE, 0x21, IO_LEN),
}

/// `ublksrv_ctrl_cmd`, with room behind it as a large submission has: to device `id`, with `len` bytes at
/// `addr` and a number.
pub(super) fn control_command(id: u32, addr: u64, len: u16, number: u64) -> [u8; 80] {
    const NO_QUEUE: u16 = u16::MAX;
    let mut bytes = [0; 80];
    let mut put = |at, field: &[u8]| part_mut(&mut bytes, at, field.len()).copy_from_slice(field);
    put(0, &id.to_ne_bytes());
    put(4, &NO_QUEUE.to_ne_bytes());
    put(6, &len.to_ne_bytes());
    put(8, &addr.to_ne_bytes());
    put(16, &number.to_ne_bytes());
    bytes
}

/// `ublksrv_io_cmd` about a request of the first queue: `result` is bytes, or an errno below 0.
pub(super) fn io_command(tag: Tag, result: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    part_mut(&mut bytes, 2, 2).copy_from_slice(&tag.0.to_ne_bytes());
    part_mut(&mut bytes, 4, 4).copy_from_slice(&result.to_ne_bytes());
    bytes
}

/// Bytes of [`DeviceInfo`].
pub(super) const INFO_LEN: usize = 64;
/// The kernel chooses the number.
pub(super) const ANY_ID: u32 = u32::MAX;

/// The device has no server, and waits for one: `UBLK_S_DEV_QUIESCED`.
const QUIESCED: u16 = 2;

/// What the kernel says of a device: `ublksrv_ctrl_dev_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    pub(super) id: u32,
    state: u16,
    pub(super) flags: u64,
    /// A number of ours, which the kernel keeps.
    pub(super) mark: u64,
}

impl DeviceInfo {
    pub(super) fn parse(bytes: &[u8; INFO_LEN]) -> DeviceInfo {
        DeviceInfo {
            state: u16_at(bytes, 4),
            id: u32_at(bytes, 12),
            flags: u64_at(bytes, 24),
            mark: u64_at(bytes, 32),
        }
    }

    /// Its server died, and the next may begin.
    pub(super) fn waits_for_a_server(&self) -> bool {
        self.state == QUIESCED
    }

    /// What ADD_DEV is given: a device of one queue with these features.
    pub(super) fn wanted(flags: u64, mark: u64) -> [u8; INFO_LEN] {
        let mut bytes = [0; INFO_LEN];
        let mut put =
            |at, field: &[u8]| part_mut(&mut bytes, at, field.len()).copy_from_slice(field);
        put(0, &1u16.to_ne_bytes());
        put(2, &DEPTH.to_ne_bytes());
        put(8, &(MAX_IO as u32).to_ne_bytes());
        put(12, &ANY_ID.to_ne_bytes());
        put(24, &flags.to_ne_bytes());
        put(32, &mark.to_ne_bytes());
        bytes
    }
}

/// Bytes of `ublk_params` as far as we set them.
pub(super) const PARAMETERS_LEN: usize = 60;

/// What a device is like: `ublk_params`. `size` is in bytes.
pub(super) fn parameters(size: u64, read_only: bool) -> [u8; PARAMETERS_LEN] {
    const BASIC_AND_DISCARD: u32 = 1 | 2;
    const ATTR_READ_ONLY: u32 = 1;
    const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
    const ATTR_FUA: u32 = 1 << 3;
    const SECTOR_SHIFT: u8 = 9;
    const BLOCK_SHIFT: u8 = 12;
    let read_only = if read_only { ATTR_READ_ONLY } else { 0 };
    let attributes = read_only | ATTR_VOLATILE_CACHE | ATTR_FUA;
    let mut bytes = [0; PARAMETERS_LEN];
    let mut put = |at, field: &[u8]| part_mut(&mut bytes, at, field.len()).copy_from_slice(field);
    put(0, &(PARAMETERS_LEN as u32).to_ne_bytes());
    put(4, &BASIC_AND_DISCARD.to_ne_bytes());
    put(8, &attributes.to_ne_bytes());
    // Logical and physical block, optimal and smallest request.
    put(12, &[SECTOR_SHIFT, BLOCK_SHIFT, 0, BLOCK_SHIFT]);
    put(16, &((MAX_IO as u64 / SECTOR) as u32).to_ne_bytes());
    put(24, &(size / SECTOR).to_ne_bytes());
    put(44, &4096u32.to_ne_bytes());
    put(48, &MAX_DISCARD_SECTORS.to_ne_bytes());
    put(52, &MAX_DISCARD_SECTORS.to_ne_bytes());
    put(56, &1u16.to_ne_bytes());
    bytes
}

/// Bytes of `ublksrv_io_desc`.
pub(super) const DESCRIPTOR_LEN: usize = 24;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// One that we never said we know.
    Other(u8),
}

/// A request: `ublksrv_io_desc`. Offset and length are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// A WRITE is durable when it is answered.
    pub(super) fua: bool,
    /// What WRITE_ZEROES names stays allocated.
    pub(super) keep_allocated: bool,
}

impl Descriptor {
    pub(super) fn parse(bytes: &[u8; DESCRIPTOR_LEN]) -> Descriptor {
        const F_FUA: u32 = 1 << 13;
        const F_NOUNMAP: u32 = 1 << 15;
        let op_flags = u32_at(bytes, 0);
        Descriptor {
            op: match op_flags as u8 {
                0 => Op::Read,
                1 => Op::Write,
                2 => Op::Flush,
                3 => Op::Discard,
                5 => Op::WriteZeroes,
                other => Op::Other(other),
            },
            len: u64::from(u32_at(bytes, 4)) * SECTOR,
            offset: u64_at(bytes, 8).wrapping_mul(SECTOR),
            fua: op_flags & F_FUA != 0,
            keep_allocated: op_flags & F_NOUNMAP != 0,
        }
    }
}

/// Where in a device's character device the data of a request of the first queue begin.
pub(super) fn data_offset(tag: Tag) -> u64 {
    const IO_BUF_OFFSET: u64 = 0x8000_0000;
    const TAG_SHIFT: u32 = 25;
    IO_BUF_OFFSET + (u64::from(tag.0) << TAG_SHIFT)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    number(bytes, at, u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    number(bytes, at, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    number(bytes, at, u64::from_ne_bytes)
}

fn number<const N: usize, T>(bytes: &[u8], at: usize, decode: fn([u8; N]) -> T) -> T {
    decode(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From `gcc -E` of the header.
    #[test]
    fn commands_have_the_kernels_numbers() {
        assert_eq!(Verb::Add as u32, 0xc020_7504);
        assert_eq!(Verb::Info as u32, 0x8020_7502);
        assert_eq!(Verb::DeleteAsync as u32, 0x8020_7514);
        assert_eq!(IoVerb::Fetch as u32, 0xc010_7520);
        assert_eq!(IoVerb::CommitAndFetch as u32, 0xc010_7521);
    }

    #[test]
    fn what_is_wanted_of_a_device_reads_back_as_the_kernel_would_say_it() {
        let info = DeviceInfo::parse(&DeviceInfo::wanted(NEEDED, 7));
        assert_eq!((info.id, info.flags, info.mark), (ANY_ID, NEEDED, 7));
        assert!(!info.waits_for_a_server());
    }

    #[test]
    fn parameters_name_size_discard_and_a_volatile_cache() {
        let bytes = parameters(1 << 30, true);
        assert_eq!(u32_at(&bytes, 0), 60);
        assert_eq!(u32_at(&bytes, 8), 1 | 4 | 8);
        assert_eq!(u64_at(&bytes, 24), 1 << 21);
        assert_eq!(u32_at(&bytes, 16), 2048);
        assert_eq!(u16_at(&bytes, 56), 1);
        assert_eq!(u32_at(&parameters(4096, false), 8), 4 | 8);
    }

    #[test]
    fn a_request_is_read_from_its_descriptor() {
        let mut bytes = [0; DESCRIPTOR_LEN];
        part_mut(&mut bytes, 0, 4).copy_from_slice(&(1u32 | 1 << 13).to_ne_bytes());
        part_mut(&mut bytes, 4, 4).copy_from_slice(&8u32.to_ne_bytes());
        part_mut(&mut bytes, 8, 8).copy_from_slice(&3u64.to_ne_bytes());
        let write = Descriptor {
            op: Op::Write,
            offset: 1536,
            len: 4096,
            fua: true,
            keep_allocated: false,
        };
        assert_eq!(Descriptor::parse(&bytes), write);
        part_mut(&mut bytes, 0, 4).copy_from_slice(&(5u32 | 1 << 15).to_ne_bytes());
        let zeroes = Descriptor::parse(&bytes);
        assert!(zeroes.op == Op::WriteZeroes && zeroes.keep_allocated && !zeroes.fua);
        part_mut(&mut bytes, 0, 4).copy_from_slice(&99u32.to_ne_bytes());
        assert_eq!(Descriptor::parse(&bytes).op, Op::Other(99));
    }

    #[test]
    fn the_data_of_requests_lie_32_mib_apart() {
        assert_eq!(data_offset(Tag(0)), 0x8000_0000);
        assert_eq!(data_offset(Tag(3)) - data_offset(Tag(2)), 32 << 20);
    }
}
