//! What the device says of itself: features, and the configuration space of virtio 1.2, section 5.2.4.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::Disk;
use vellum_base::block::part_mut;

/// Bytes of a sector, in which the protocol counts whatever the size of a block.
pub(super) const SECTOR: u64 = 512;
/// Entries of a queue at most.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;
/// Queues of a disk at most.
pub const MAX_QUEUES: u16 = 256;
/// Queues of a disk unless told.
pub const DEFAULT_QUEUES: u16 = 16;
/// Bytes of the configuration space, as far as a client may ask: the protocol has no room for more.
pub(super) const CONFIG_LEN: usize = 256;

/// Segments of a request: those of a queue of 128 entries, without header and status.
const SEG_MAX: u32 = 126;
/// 4096 bytes, as a power of two of logical blocks.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// The same in logical blocks, and in sectors.
const BLOCK_SECTORS: u16 = 8;
/// Sectors of a range to be discarded: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Ranges to be discarded in one request.
pub(super) const MAX_DISCARD_SEG: u32 = 32;
/// Sectors of a range to be zeroed, which may have to be written: 128 MiB.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 18;
/// Ranges to be zeroed in one request.
pub(super) const MAX_ZERO_SEG: u32 = 1;

/// Feature bits (virtio 1.2, sections 5.2.3 and 6).
pub(super) mod feature {
    pub(in super::super) const SEG_MAX: u64 = 1 << 2;
    pub(in super::super) const RO: u64 = 1 << 5;
    pub(in super::super) const BLK_SIZE: u64 = 1 << 6;
    pub(in super::super) const FLUSH: u64 = 1 << 9;
    pub(in super::super) const TOPOLOGY: u64 = 1 << 10;
    pub(in super::super) const MQ: u64 = 1 << 12;
    pub(in super::super) const DISCARD: u64 = 1 << 13;
    pub(in super::super) const WRITE_ZEROES: u64 = 1 << 14;
    pub(in super::super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(in super::super) const EVENT_IDX: u64 = 1 << 29;
    pub(in super::super) const VERSION_1: u64 = 1 << 32;
}

/// The features of a disk.
pub(super) fn features(disk: &Disk) -> u64 {
    let common = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::MQ
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::VERSION_1
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    match disk.is_read_only() {
        true => common | feature::RO,
        false => common | feature::DISCARD | feature::WRITE_ZEROES,
    }
}

/// What of the vhost-user protocol is spoken.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// The configuration space of a disk with so many queues; zeros after the fields.
pub(super) fn space(disk: &Disk, queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at, bytes: &[u8]| {
        part_mut(&mut space, at, bytes.len()).copy_from_slice(bytes);
    };
    put(0, &(disk.device.size() / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP]);
    put(26, &BLOCK_SECTORS.to_le_bytes());
    put(34, &queues.to_le_bytes());
    if !disk.is_read_only() {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEG.to_le_bytes());
        put(44, &u32::from(BLOCK_SECTORS).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_SEG.to_le_bytes());
        put(56, &[1]);
    }
    space
}
