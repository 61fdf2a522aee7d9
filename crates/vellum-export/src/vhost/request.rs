//! What a chain asks for (virtio 1.2, section 5.2.6).

use super::Disk;
use super::chain::{Chain, Malformed, Memory};
use super::config::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEG, MAX_ZERO_SECTORS, MAX_ZERO_SEG, SECTOR};
use vellum_base::block::ZeroMode;

/// Bytes of a request's header: type, a reserved field, sector.
pub(super) const HEADER: u64 = 16;
/// Bytes of a range to be discarded or zeroed: sector, number of sectors, flags.
const RANGE: u64 = 16;
/// Bytes of the answer to [`kind::GET_ID`].
pub(super) const ID: usize = 20;
/// The one flag of a range: its space may be given back.
const UNMAP: u32 = 1;

/// Types of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// What the guest is told of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// It was carried out.
    Ok = 0,
    /// It was not.
    IoErr = 1,
    /// The device knows nothing like it.
    Unsupported = 2,
}

/// A range of the device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) mode: ZeroMode,
}

/// A request that can be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// Why a request is not carried out, and what the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused(pub(super) Status, pub(super) &'static str);

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Refused(Status::IoErr, malformed.0)
    }
}

const fn io_error<T>(why: &'static str) -> Result<T, Refused> {
    Err(Refused(Status::IoErr, why))
}

impl Request {
    /// What a chain with a byte for the status asks for.
    pub(super) fn parse(chain: &Chain, memory: &Memory, disk: &Disk) -> Result<Request, Refused> {
        let mut header = [0; HEADER as usize];
        chain.read(memory, 0, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let payload = chain.readable() - HEADER;
        let wanted = chain.writable().saturating_sub(1);
        let request = match u32::from_le_bytes([k0, k1, k2, k3]) {
            kind::IN => Request::Read {
                offset: checked(disk, sector, wanted)?,
                len: wanted,
            },
            kind::OUT => Request::Write {
                offset: checked(disk, sector, payload)?,
                len: payload,
            },
            kind::FLUSH => Request::Flush,
            kind::GET_ID if wanted < ID as u64 => return io_error("it has no room for an id"),
            kind::GET_ID => Request::GetId,
            kind::DISCARD => Request::Discard(discards(chain, memory, disk)?),
            kind::WRITE_ZEROES => Request::WriteZeroes(zeroes(chain, memory, disk)?),
            _ => {
                return Err(Refused(
                    Status::Unsupported,
                    "no request of this type is known",
                ));
            }
        };
        match request {
            Request::Read { .. } | Request::Flush | Request::GetId => Ok(request),
            _ if disk.is_read_only() => io_error("the disk is read-only"),
            _ => Ok(request),
        }
    }
}

/// The offset of a range that lies in the device, in whole sectors.
fn checked(disk: &Disk, sector: u64, len: u64) -> Result<u64, Refused> {
    if !len.is_multiple_of(SECTOR) {
        return io_error("its length is no multiple of 512 bytes");
    }
    let offset = sector.checked_mul(SECTOR);
    let end = offset.and_then(|offset| offset.checked_add(len));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= disk.device.size() => Ok(offset),
        _ => io_error("it reaches past the end of the disk"),
    }
}

fn discards(chain: &Chain, memory: &Memory, disk: &Disk) -> Result<Vec<Range>, Refused> {
    let ranges = ranges(chain, memory, disk, MAX_DISCARD_SEG, MAX_DISCARD_SECTORS)?;
    match ranges.iter().any(|range| range.flags != 0) {
        true => Err(Refused(Status::Unsupported, "a discard has no flags")),
        false => Ok(ranges
            .iter()
            .map(|range| range.of(ZeroMode::MayUnmap))
            .collect()),
    }
}

fn zeroes(chain: &Chain, memory: &Memory, disk: &Disk) -> Result<Vec<Range>, Refused> {
    let ranges = ranges(chain, memory, disk, MAX_ZERO_SEG, MAX_ZERO_SECTORS)?;
    if ranges.iter().any(|range| range.flags & !UNMAP != 0) {
        return Err(Refused(
            Status::Unsupported,
            "it has flags that are not known",
        ));
    }
    let mode = |flags: u32| match flags & UNMAP {
        0 => ZeroMode::KeepAllocated,
        _ => ZeroMode::MayUnmap,
    };
    Ok(ranges
        .iter()
        .map(|range| range.of(mode(range.flags)))
        .collect())
}

struct Flagged {
    offset: u64,
    len: u64,
    flags: u32,
}

impl Flagged {
    fn of(&self, mode: ZeroMode) -> Range {
        Range {
            offset: self.offset,
            len: self.len,
            mode,
        }
    }
}

fn ranges(
    chain: &Chain,
    memory: &Memory,
    disk: &Disk,
    most: u32,
    longest: u32,
) -> Result<Vec<Flagged>, Refused> {
    let payload = chain.readable() - HEADER;
    let count = payload / RANGE;
    if payload == 0 || !payload.is_multiple_of(RANGE) || count > u64::from(most) {
        return io_error("it has a number of ranges that cannot be");
    }
    (0..count)
        .map(|number| {
            let mut bytes = [0; RANGE as usize];
            chain.read(memory, HEADER + number * RANGE, &mut bytes)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if sectors > longest {
                return io_error("a range is longer than the configuration allows");
            }
            let len = u64::from(sectors) * SECTOR;
            Ok(Flagged {
                offset: checked(disk, sector, len)?,
                len,
                flags: u32::from_le_bytes(flags),
            })
        })
        .collect()
}
