//! A queue's rings: requests are taken from one and answered in the other, each step noted in the inflight
//! region in the order of docs/vhost.md.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::Ordering::Acquire;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::chain::{Memory, Table};
use super::inflight::Inflight;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};

/// Where a queue is, and where it is at.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Entries.
    pub size: u16,
    /// The guest's address of the table of descriptors.
    pub descriptors: u64,
    /// That of the ring of requests.
    pub available: u64,
    /// That of the ring of answers.
    pub used: u64,
    /// The next entry of the available ring, where no inflight region says it.
    pub next_available: u16,
    /// Interrupts are asked for by index.
    pub event_idx: bool,
}

/// The rings of a queue that is served.
#[derive(Debug)]
pub(super) struct Ring {
    queue: Queue,
    inflight: Option<Inflight>,
    /// What was taken and is not answered.
    taken: HashSet<u16>,
    /// What a server before took.
    again: VecDeque<u16>,
    counter: u64,
    /// Interrupts the guest.
    call: Option<File>,
}

impl Ring {
    /// The rings at a place in the guest's memory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where there can be none.
    pub(super) fn new(
        place: Place,
        memory: &Memory,
        inflight: Option<Inflight>,
        call: Option<File>,
    ) -> Result<Ring> {
        let mut queue = Queue::new(place.size).map_err(bad_ring)?;
        queue.try_set_size(place.size).map_err(bad_ring)?;
        queue
            .try_set_desc_table_address(GuestAddress(place.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(place.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(place.used)))
            .map_err(bad_ring)?;
        queue.set_event_idx(place.event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the rings of a queue do not lie in the machine's memory",
            ));
        }
        let used = queue.used_idx(memory, Acquire).map_err(bad_ring)?.0;
        queue.set_next_used(used);
        let (again, counter, next) = match &inflight {
            Some(inflight) => {
                let left = inflight.settle(used);
                let next = used.wrapping_add(left.heads.len() as u16);
                (VecDeque::from(left.heads), left.counter, next)
            }
            None => (VecDeque::new(), 0, place.next_available),
        };
        queue.set_next_avail(next);
        Ok(Ring {
            taken: again.iter().copied().collect(),
            queue,
            inflight,
            again,
            counter,
            call,
        })
    }

    /// How many requests a server before took.
    pub(super) fn left(&self) -> usize {
        self.again.len()
    }

    /// Interrupts the guest by another descriptor from now on, and once at once: QEMU hands over one that leads
    /// nowhere first, and requests may have been answered since.
    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        self.interrupt();
    }

    /// The next entry of the available ring.
    pub(super) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// How many requests there can be.
    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The table that chains begin in.
    pub(super) fn table(&self) -> Table {
        Table {
            at: self.queue.desc_table(),
            len: self.queue.size().into(),
        }
    }

    /// Takes a request, where there is one: its head.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where the ring says what no driver could have said.
    pub(super) fn take(&mut self, memory: &Memory) -> Result<Option<u16>> {
        if let Some(head) = self.again.pop_front() {
            return Ok(Some(head));
        }
        let mut available = self.queue.iter(memory).map_err(broken)?;
        let Some(chain) = available.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        if head >= self.queue.size() || !self.taken.insert(head) {
            return Err(broken(format!(
                "a head {head} that is none, or is taken already"
            )));
        }
        if let Some(inflight) = &self.inflight {
            inflight.taken(head, self.counter);
            self.counter = self.counter.wrapping_add(1);
        }
        crash_point::here("vhost: taken");
        Ok(Some(head))
    }

    /// True while the guest has no request that is not answered. A ring that cannot be read is none that is
    /// idle: whoever takes from it says so.
    pub(super) fn is_idle(&self, memory: &Memory) -> bool {
        let available = self.queue.avail_idx(memory, Acquire);
        self.taken.is_empty() && available.is_ok_and(|index| index.0 == self.queue.next_avail())
    }

    /// Asks the guest for kicks, or not. When asked for: whether there is a request by now.
    ///
    /// # Errors
    /// Where the rings are not in the guest's memory any more.
    pub(super) fn want_kicks(&mut self, memory: &Memory, want: bool) -> Result<bool> {
        match want {
            true => self.queue.enable_notification(memory).map_err(broken),
            false => self
                .queue
                .disable_notification(memory)
                .map_err(broken)
                .map(|()| false),
        }
    }

    /// Answers a request: `len` bytes were written to its chain.
    ///
    /// # Errors
    /// Where the rings are not in the guest's memory any more.
    pub(super) fn answer(&mut self, memory: &Memory, head: u16, len: u32) -> Result<()> {
        if let Some(inflight) = &self.inflight {
            inflight.answers(head);
        }
        crash_point::here("vhost: answers");
        self.queue.add_used(memory, head, len).map_err(broken)?;
        crash_point::here("vhost: answered");
        if let Some(inflight) = &self.inflight {
            inflight.answered(head, self.queue.next_used());
        }
        self.taken.remove(&head);
        if self.queue.needs_notification(memory).map_err(broken)? {
            self.interrupt();
        }
        Ok(())
    }

    /// Interrupts the guest, wanted or not.
    pub(super) fn interrupt(&mut self) {
        if let Some(call) = &mut self.call {
            // An eventfd whose counter is full has somebody to wake already.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }
}

fn bad_ring(error: virtio_queue::Error) -> Error {
    Error::with_source(
        ErrorKind::InvalidInput,
        "the rings of a queue cannot be where they are",
        error,
    )
}

fn broken(why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Protocol,
        format!("the guest's driver broke its queue: {why}"),
    )
}
