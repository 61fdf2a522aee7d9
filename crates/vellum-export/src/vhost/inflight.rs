//! The inflight region: which requests were taken and not answered, in a file that the client keeps for the
//! next server. The bytes, and what a crash leaves at each step, are on docs/vhost.md.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::config::{MAX_QUEUE_SIZE, MAX_QUEUES};
use super::memory::check_file;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Bytes before the descriptors of a queue.
const HEADER: usize = 16;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// A queue's bytes are a multiple of this.
const ALIGN: usize = 64;
/// The version of the region of a split queue.
const VERSION: u16 = 1;

/// Offsets in a queue.
mod at {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    /// In a descriptor.
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

/// Bytes of a queue with so many entries.
fn queue_len(queue_size: u16) -> usize {
    (HEADER + DESCRIPTOR * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// The region of all queues.
#[derive(Debug, Clone)]
pub(super) struct Region {
    map: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

impl Region {
    /// A new one: the file, and what the client is told of it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for more than a disk has; where the host has no memory.
    pub(super) fn create(queues: u16, queue_size: u16) -> Result<(VhostUserInflight, File)> {
        check(queues, queue_size)?;
        let len = (queue_len(queue_size) * usize::from(queues)) as u64;
        let doing = || "making an inflight region";
        let file = memfd_create("vellum-inflight", MFdFlags::MFD_CLOEXEC).context(doing)?;
        let file = File::from(file);
        file.set_len(len).context(doing)?;
        Ok((VhostUserInflight::new(len, 0, queues, queue_size), file))
    }

    /// The one that a client kept.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where it cannot be one; where it cannot be mapped.
    pub(super) fn open(told: &VhostUserInflight, file: File) -> Result<Region> {
        let VhostUserInflight {
            mmap_size,
            mmap_offset,
            num_queues,
            queue_size,
        } = *told;
        check(num_queues, queue_size)?;
        let len = queue_len(queue_size) * usize::from(num_queues);
        if mmap_size < len as u64 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("an inflight region of {mmap_size} bytes, of which {len} are needed"),
            ));
        }
        check_file(&file, mmap_offset, len as u64)?;
        let map =
            MmapRegion::from_file(FileOffset::new(file, mmap_offset), len).map_err(|error| {
                Error::with_source(ErrorKind::InvalidInput, "an inflight region", error)
            })?;
        Ok(Region {
            map: Arc::new(map),
            queues: num_queues,
            queue_size,
        })
    }

    /// The part of a queue with so many entries.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where the region has none for it; [`ErrorKind::Unsupported`] for one that
    /// another program wrote.
    pub(super) fn queue(&self, index: u16, size: u16) -> Result<Inflight> {
        if index >= self.queues || size > self.queue_size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "queue {index} of {size} entries: the inflight region has {} queues of {}",
                    self.queues, self.queue_size
                ),
            ));
        }
        let inflight = Inflight {
            map: Arc::clone(&self.map),
            start: queue_len(self.queue_size) * usize::from(index),
            size,
        };
        match (
            inflight.load::<u16>(at::VERSION),
            inflight.load::<u16>(at::DESC_NUM),
        ) {
            (0, _) => {
                inflight.store(at::DESC_NUM, self.queue_size);
                inflight.store(at::VERSION, VERSION);
            }
            (VERSION, desc_num) if desc_num == self.queue_size => {}
            (version, desc_num) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "the inflight region is of version {version} with {desc_num} entries a queue, not of \
                         version {VERSION} with {}: another program wrote it, so start the machine again",
                        self.queue_size
                    ),
                ));
            }
        }
        Ok(inflight)
    }
}

fn check(queues: u16, queue_size: u16) -> Result<()> {
    if queues == 0 || queues > MAX_QUEUES || queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("an inflight region for {queues} queues of {queue_size} entries"),
        ));
    }
    Ok(())
}

/// What is in flight in one queue. Its users hold the queue's lock.
#[derive(Debug)]
pub(super) struct Inflight {
    map: Arc<MmapRegion>,
    start: usize,
    size: u16,
}

/// What the server before left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// The heads of what it took and did not answer, in the order in which it took them.
    pub(super) heads: Vec<u16>,
    /// No request has this counter, or a larger one.
    pub(super) counter: u64,
}

impl Inflight {
    /// T2 and T3: a request was taken.
    pub(super) fn taken(&self, head: u16, counter: u64) {
        let descriptor = self.descriptor(head);
        self.store(descriptor + at::COUNTER, counter);
        self.store(descriptor + at::INFLIGHT, 1u8);
    }

    /// A1: a request is about to be answered.
    pub(super) fn answers(&self, head: u16) {
        self.store(self.descriptor(head) + at::NEXT, 0u16);
        self.store(at::LAST_BATCH_HEAD, head);
    }

    /// A3 and A4: the request was answered, and the used ring has this index now.
    pub(super) fn answered(&self, head: u16, used_idx: u16) {
        self.store(self.descriptor(head) + at::INFLIGHT, 0u8);
        self.store(at::USED_IDX, used_idx);
    }

    /// Settles what the server before was at, where the used ring has this index.
    pub(super) fn settle(&self, used_idx: u16) -> Left {
        if self.load::<u16>(at::USED_IDX) != used_idx {
            let last: u16 = self.load(at::LAST_BATCH_HEAD);
            if last < self.size {
                self.store(self.descriptor(last) + at::INFLIGHT, 0u8);
            }
            self.store(at::USED_IDX, used_idx);
        }
        let taken = |head: &u16| self.load::<u8>(self.descriptor(*head) + at::INFLIGHT) != 0;
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(taken)
            .map(|head| (self.load(self.descriptor(head) + at::COUNTER), head))
            .collect();
        left.sort_unstable();
        Left {
            counter: left
                .last()
                .map_or(0, |(counter, _)| counter.wrapping_add(1)),
            heads: left.into_iter().map(|(_, head)| head).collect(),
        }
    }

    fn descriptor(&self, head: u16) -> usize {
        assert!(head < self.size, "a queue knows its heads");
        HEADER + DESCRIPTOR * usize::from(head)
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let stored = self
            .map
            .as_volatile_slice()
            .store(value, self.start + at, Release);
        assert!(stored.is_ok(), "the region was measured when it was mapped");
    }

    #[expect(
        clippy::expect_used,
        reason = "the region was measured when it was mapped"
    )]
    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        let slice = self.map.as_volatile_slice();
        slice
            .load(self.start + at, Acquire)
            .expect("a field of the region")
    }
}
