//! Requests are carried out.

use vellum_base::block::{BlockDevice, Durability};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::refuses_to_stall;

use super::Disk;
use super::chain::{Chain, Malformed, Memory, Table};
use super::request::{HEADER, ID, Range, Refused, Request, Status};
use crate::pace::Class;

/// Requests go between guest and device in pieces of this many bytes.
const PIECE: usize = 1 << 20;
/// Requests with more bytes than this count as long.
const SHORT: u64 = 64 << 10;

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The guest gets this answer.
    Done(Status),
    /// It waited for room on the host's disk, and the server ends or the machine is paused: whoever comes next
    /// does it.
    Left,
}

/// Carries out a queue's requests.
pub(super) struct Executor<'a> {
    pub(super) disk: &'a Disk,
    pub(super) memory: &'a Memory,
    /// What a write is when it was answered.
    pub(super) durability: Durability,
    /// Nobody is to wait any more.
    pub(super) ends: &'a dyn Fn() -> bool,
    /// Bytes on their way; kept from one request to the next.
    pub(super) buffer: &'a mut Vec<u8>,
}

/// What a head stands for.
pub(super) enum Understood {
    /// To be carried out, and answered by [`answer`].
    Request(Chain, Request),
    /// No request that can be carried out; its answer has so many bytes, which are written.
    Answered(u32),
}

/// Follows a head of a queue's table to what it asks for.
pub(super) fn understand(disk: &Disk, memory: &Memory, table: Table, head: u16) -> Understood {
    let chain = match Chain::follow(memory, table, head) {
        Ok(chain) if chain.writable() > 0 => chain,
        Ok(_) => return answer_nothing(disk, Malformed("it has no byte for the status")),
        Err(malformed) => return answer_nothing(disk, malformed),
    };
    match Request::parse(&chain, memory, disk) {
        Ok(request) => Understood::Request(chain, request),
        Err(refused) => Understood::Answered(answer(disk, memory, &chain, refuse(disk, refused))),
    }
}

fn answer_nothing(disk: &Disk, malformed: Malformed) -> Understood {
    refuse(disk, malformed.into());
    Understood::Answered(0)
}

/// Writes the status of a chain, which has a byte for it; how many bytes the answer has.
pub(super) fn answer(disk: &Disk, memory: &Memory, chain: &Chain, status: Status) -> u32 {
    let len = chain.writable();
    if let Err(malformed) = chain.write(memory, len - 1, &[status as u8]) {
        refuse(disk, malformed.into());
        return 0;
    }
    crash_point::here("vhost: done");
    len as u32
}

/// How long a request may be expected to take.
pub(super) fn class(request: &Request, durability: Durability) -> Class {
    match request {
        Request::Read { len, .. } if *len > SHORT => Class::LongRead,
        Request::Read { .. } => Class::Read,
        Request::Flush => Class::Durable,
        Request::GetId => Class::Other,
        _ if durability == Durability::Durable => Class::Durable,
        Request::Write { len, .. } if *len > SHORT => Class::LongWrite,
        Request::Write { .. } => Class::Write,
        Request::Discard(_) | Request::WriteZeroes(_) => Class::Zero,
    }
}

/// To be asked after each request: `Some` where it says something of whether a flush comes next.
pub(super) fn expects_flush(
    device: &dyn BlockDevice,
    request: &Request,
    durability: Durability,
) -> Option<bool> {
    match request {
        Request::Write { .. } if durability == Durability::Buffered => Some(device.expects_flush()),
        Request::Write { .. } | Request::Flush => Some(false),
        Request::Read { .. } | Request::GetId | Request::Discard(_) | Request::WriteZeroes(_) => {
            None
        }
    }
}

/// Why a request stops half-way.
enum Stop {
    Failed(Error),
    Refused(Malformed),
    Left,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

impl From<Malformed> for Stop {
    fn from(malformed: Malformed) -> Self {
        Stop::Refused(malformed)
    }
}

impl Executor<'_> {
    /// Carries out a request of a chain.
    pub(super) fn execute(&mut self, chain: &Chain, request: &Request) -> Outcome {
        let done = match request {
            Request::Read { offset, len } => self.read(chain, *offset, *len),
            Request::Write { offset, len } => self.write(chain, *offset, *len),
            Request::Flush => self.disk.device.flush().map_err(Stop::from),
            Request::GetId => self.id(chain),
            Request::Discard(ranges) | Request::WriteZeroes(ranges) => self.zero(ranges),
        };
        match done {
            Ok(()) => Outcome::Done(Status::Ok),
            Err(Stop::Left) => Outcome::Left,
            Err(Stop::Failed(error)) => {
                match error.kind() {
                    // It is done again by a thread that may wait for the blocks.
                    ErrorKind::Absent if refuses_to_stall() => {
                        tracing::debug!(?request, "{error}");
                    }
                    _ => {
                        tracing::warn!(disk = %self.disk.serial, ?request, "request failed: {error}");
                    }
                }
                Outcome::Done(Status::IoErr)
            }
            Err(Stop::Refused(malformed)) => Outcome::Done(refuse(self.disk, malformed.into())),
        }
    }

    fn read(&mut self, chain: &Chain, offset: u64, len: u64) -> Result<(), Stop> {
        for (at, piece) in pieces(len) {
            let buffer = sized(self.buffer, piece);
            self.disk.device.read_at(buffer, offset + at)?;
            chain.write(self.memory, at, buffer)?;
        }
        Ok(())
    }

    fn write(&mut self, chain: &Chain, offset: u64, len: u64) -> Result<(), Stop> {
        let device = &self.disk.device;
        for (at, piece) in pieces(len) {
            let buffer = sized(self.buffer, piece);
            // A copy: the guest may change its own while the layer makes checksums of it.
            chain.read(self.memory, HEADER + at, buffer)?;
            let last = at + piece as u64 == len;
            let durability = match last {
                true => self.durability,
                false => Durability::Buffered,
            };
            patiently(self.disk, self.ends, || {
                device.write_at(buffer, offset + at, durability)
            })?;
        }
        Ok(())
    }

    fn zero(&self, ranges: &[Range]) -> Result<(), Stop> {
        let device = &self.disk.device;
        for range in ranges {
            patiently(self.disk, self.ends, || {
                device.write_zeroes(range.offset, range.len, range.mode, Durability::Buffered)
            })?;
        }
        match self.durability {
            Durability::Durable => Ok(device.flush()?),
            Durability::Buffered => Ok(()),
        }
    }

    fn id(&self, chain: &Chain) -> Result<(), Stop> {
        let mut id = [0; ID];
        for (to, from) in id.iter_mut().zip(self.disk.serial.bytes()) {
            *to = from;
        }
        Ok(chain.write(self.memory, 0, &id)?)
    }
}

/// Says why a request is not carried out; what the guest is told.
pub(super) fn refuse(disk: &Disk, refused: Refused) -> Status {
    let Refused(status, why) = refused;
    tracing::debug!(disk = %disk.serial, ?status, "request refused: {why}");
    status
}

/// Does what wants space, and again while a full disk may become less so.
fn patiently(
    disk: &Disk,
    ends: &dyn Fn() -> bool,
    mut work: impl FnMut() -> Result<()>,
) -> Result<(), Stop> {
    loop {
        match work() {
            Err(error) if error.is_full_disk() => {
                if ends() {
                    return Err(Stop::Left);
                }
                if !disk.device.wait_for_room() {
                    return Err(error.into());
                }
            }
            done => return Ok(done?),
        }
    }
}

/// The pieces of `len` bytes, as offset and length.
fn pieces(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len)
        .step_by(PIECE)
        .map(move |at| (at, (len - at).min(PIECE as u64) as usize))
}

/// The first `len` bytes of a buffer that grows to that.
fn sized(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.split_at_mut(len).0
}
