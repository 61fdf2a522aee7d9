//! The requests that a guest's memory holds, on the caller's thread.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::Disk;
use super::chain::Memory;
use super::exec::{Executor, Outcome, Understood, answer, understand};
use super::inflight::Region;
use super::ring::{Place, Ring};
use vellum_base::block::Durability;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Requests that are served at most: a guest whose answers are its next requests could go on for ever.
const MOST: usize = 1024;

/// Serves the queue at `place` of a guest whose memory is `memory`, from address 0 on, until it has no more
/// requests, or 1024 were answered; how many were. With the bytes of an `inflight` region, what these say that a server
/// before left is done first.
///
/// This is the server's own code but for the vhost-user protocol and threads: what a fuzzer or a test feeds
/// bytes to.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] where there can be no such queue, [`ErrorKind::Unsupported`] for an inflight
/// region of another kind, [`ErrorKind::Protocol`] where the rings say what no driver could. None of them is a
/// fault of the server.
pub fn serve_memory(
    disk: &Disk,
    memory: &mut [u8],
    place: Place,
    inflight: Option<&[u8]>,
) -> Result<usize> {
    let guest = Memory::from_ranges(&[(GuestAddress(0), memory.len())]).map_err(unusable)?;
    guest
        .write_slice(memory, GuestAddress(0))
        .map_err(unusable)?;
    let served = serve(disk, &guest, place, inflight);
    guest
        .read_slice(memory, GuestAddress(0))
        .map_err(unusable)?;
    served
}

fn unusable(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::with_source(ErrorKind::InvalidInput, "the memory of a guest", error)
}

fn serve(disk: &Disk, guest: &Memory, place: Place, inflight: Option<&[u8]>) -> Result<usize> {
    let inflight = match inflight {
        None => None,
        Some(bytes) => {
            let (told, file) = Region::create(1, place.size)?;
            let len = bytes.len().min(told.mmap_size as usize);
            let (bytes, _) = bytes.split_at(len);
            file.write_all_at(bytes, 0)
                .context(|| "an inflight region")?;
            Some(Region::open(&told, file)?.queue(0, place.size)?)
        }
    };
    let mut ring = Ring::new(place, guest, inflight, None)?;
    let (mut buffer, mut served) = (Vec::new(), 0);
    while served < MOST
        && let Some(head) = ring.take(guest)?
    {
        ring.want_kicks(guest, false)?;
        let len = match understand(disk, guest, ring.table(), head) {
            Understood::Answered(len) => len,
            Understood::Request(chain, request) => {
                let outcome = Executor {
                    disk,
                    memory: guest,
                    durability: Durability::Buffered,
                    ends: &|| true,
                    buffer: &mut buffer,
                }
                .execute(&chain, &request);
                match outcome {
                    Outcome::Done(status) => answer(disk, guest, &chain, status),
                    // Nobody comes to make room.
                    Outcome::Left => return Ok(served),
                }
            }
        };
        ring.answer(guest, head, len)?;
        served += 1;
    }
    Ok(served)
}
