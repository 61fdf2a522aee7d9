//! The buffers of the serving threads, in memory that outlives a killed server.
//!
//! A memfd holds one page of counters and, for each thread, a request buffer. The processes of a
//! device share it: counters go on across restarts, and on a kernel that cannot send requests
//! again the next server finds here the ones that the killed server had taken and not answered.
//!
//! A buffer is laid out so that data always begins on a page: the head of a request (header and
//! arguments, 80 bytes) ends where the first page ends, the data of a WRITE follows, and a READ is
//! filled into the same place with its reply header in front, so that one write(2) sends it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::abi;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::monotonic_ns;

/// Threads that serve a device whose requests wait for the host alone.
pub const USUAL_THREADS: usize = 16;
/// The most threads that serve one device: more than a loop device sends requests at once (128).
pub const MAX_THREADS: usize = 136;

/// Bytes in front of a request's data: header and arguments.
pub const HEAD_LEN: usize = abi::IN_HEADER_LEN + abi::WRITE_IN_LEN;

const PAGE: usize = 4096;
const HEAD_AT: usize = PAGE - HEAD_LEN;
const SLOT_LEN: usize = PAGE + abi::MAX_IO;
/// The shared counters take less than this.
const TABLE_LEN: usize = 8 * PAGE;
/// Bytes behind the buffers for whoever opens the device.
pub const EXTRA_LEN: usize = 64 << 10;
const EXTRA_AT: usize = TABLE_LEN + MAX_THREADS * SLOT_LEN;
const MEMORY_LEN: u64 = (EXTRA_AT + EXTRA_LEN) as u64;
/// Changes with the layout of [`Table`] and of the buffers.
const LAYOUT: u64 = 0x5645_4c46_5553_0004;
/// Threads that note what they wait for, each in a place of its own.
const WAIT_NOTES: usize = 2 * MAX_THREADS;

/// The thread holds no request.
const IDLE: u64 = 0;
/// The thread is taking a request: it may be there or not.
const TAKING: u64 = 1;
/// The thread has a request and has not carried it out.
const TAKEN: u64 = 2;
/// The thread has carried its request out, and may or may not have answered it. The state holds
/// the answer's errno above these bits.
const DONE: u64 = 3;
const STATE_BITS: u32 = 8;

/// The server ended because the session is over.
pub const ENDED_SESSION_OVER: u64 = 1;
/// The server ended because it was told to; the session lives on.
pub const ENDED_STOPPED: u64 = 2;

/// What all processes of one device count together. Times are CLOCK_MONOTONIC nanoseconds.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    layout: AtomicU64,
    /// Servers that replaced another.
    pub restarts: AtomicU64,
    /// When the last server was found dead, 0 if none was.
    pub death_ns: AtomicU64,
    /// How long the last replacement took, from the death seen to the next server ready.
    pub last_pause_ns: AtomicU64,
    /// The longest such pause.
    pub longest_pause_ns: AtomicU64,
    /// How the serving process said that it ended: one of the `ENDED_*`, or 0 while it runs.
    pub worker_ended: AtomicU64,
    /// Writes that the serving process holds while the host's disk is full: it waits for room, and
    /// does not hang.
    pub held: AtomicU64,
    /// Workers that were found to hang and killed.
    pub hangs: AtomicU64,
    /// The serving process. Its main thread beats, so 0 until it serves.
    pub worker: Pulse,
    /// The process that restarts the others.
    pub supervisor: Pulse,
    /// The process that waits, all 0 while there is none.
    pub standby: Pulse,
    /// Since when threads of the serving process wait for the host: see
    /// [`vellum_base::storage::note_waits_in`].
    pub waits: [AtomicU64; WAIT_NOTES],
    records: [Record; MAX_THREADS],
}

/// Who a process of the device is, and when it was last seen to run: what the others watch it by.
#[repr(C)]
#[derive(Debug)]
pub struct Pulse {
    /// Its pid, 0 for none.
    pub pid: AtomicU64,
    /// Its start time, as in /proc.
    pub start: AtomicU64,
    /// When it last said that it runs, 0 before the first time.
    pub beat_ns: AtomicU64,
}

impl Pulse {
    /// From now on this is about another process, which has not been seen to run.
    pub fn belongs_to(&self, pid: i32, start: u64) {
        self.beat_ns.store(0, Ordering::Release);
        self.start.store(start, Ordering::Release);
        self.pid.store(pid as u64, Ordering::Release);
    }

    /// Says that the process runs at `now_ns`.
    pub fn beat(&self, now_ns: u64) {
        self.beat_ns.store(now_ns, Ordering::Release);
    }
}

/// What one serving thread is doing.
#[repr(C, align(128))]
#[derive(Debug)]
struct Record {
    state: AtomicU64,
    served: AtomicU64,
    resent: AtomicU64,
    /// When the request came that it has, 0 while it has none.
    since_ns: AtomicU64,
    len: AtomicU64,
    head: [AtomicU64; HEAD_LEN / 8],
}

const _: () = assert!(size_of::<Table>() <= TABLE_LEN);

/// The memory that the processes of one device share.
#[derive(Debug)]
pub struct Shared {
    file: File,
    map: MmapRaw,
}

impl Shared {
    /// New memory for one device.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel has no memory for it.
    pub fn create() -> Result<Arc<Shared>> {
        let fd = memfd_create(c"vellum-device", MFdFlags::MFD_CLOEXEC)
            .context(|| "the shared memory of a device server cannot be made")?;
        let file = File::from(fd);
        file.set_len(MEMORY_LEN)
            .context(|| "the shared memory of a device server cannot be made")?;
        let shared = Shared::map(file)?;
        shared.table().layout.store(LAYOUT, Ordering::Release);
        Ok(Arc::new(shared))
    }

    /// The memory that an earlier program made; new memory where its layout is another one.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where it cannot be mapped.
    pub fn inherit(fd: OwnedFd) -> Result<Arc<Shared>> {
        let file = File::from(fd);
        let len = file
            .metadata()
            .context(|| "the shared memory of a device server is lost")?
            .len();
        if len != MEMORY_LEN {
            return Shared::create();
        }
        let shared = Shared::map(file)?;
        if shared.table().layout.load(Ordering::Acquire) != LAYOUT {
            return Shared::create();
        }
        Ok(Arc::new(shared))
    }

    fn map(file: File) -> Result<Shared> {
        let map = MmapOptions::new()
            .len(TABLE_LEN)
            .map_raw(&file)
            .context(|| "the shared memory of a device server cannot be mapped")?;
        Ok(Shared { file, map })
    }

    /// The descriptor, for a program that takes over.
    pub fn fd(&self) -> &File {
        &self.file
    }

    /// Where in the memory the [`EXTRA_LEN`] bytes are that are not the server's own. They are zero
    /// at first and never cleared again.
    pub fn extra_at(&self) -> u64 {
        EXTRA_AT as u64
    }

    /// The shared counters.
    pub fn table(&self) -> &Table {
        let table = self.map.as_mut_ptr().cast::<Table>();
        assert!(!table.is_null(), "a mapping has an address");
        // SAFETY: the mapping is TABLE_LEN bytes, page aligned, not null, and lives as long as
        // `self`; a `Table` is smaller, consists of atomics alone and every bit pattern is one.
        // The memfd is never shortened.
        unsafe { &*table }
    }

    /// Requests answered since the device was attached, by all servers.
    pub fn served(&self) -> u64 {
        let sum = |record: &Record| record.served.load(Ordering::Relaxed);
        self.table().records.iter().map(sum).sum()
    }

    /// Requests among them that the kernel had sent again.
    pub fn resent(&self) -> u64 {
        let sum = |record: &Record| record.resent.load(Ordering::Relaxed);
        self.table().records.iter().map(sum).sum()
    }

    /// Notes that thread `index` has a request, without a buffer of this memory.
    pub fn begun(&self, index: usize) {
        self.since(index, monotonic_ns());
    }

    /// Notes that it gave the request to another thread.
    pub fn handed_over(&self, index: usize) {
        self.since(index, 0);
    }

    /// Notes and counts that it answered.
    pub fn served_one(&self, index: usize) {
        self.since(index, 0);
        self.count_served(index);
    }

    fn since(&self, index: usize, now_ns: u64) {
        if let Some(record) = self.table().records.get(index) {
            record.since_ns.store(now_ns, Ordering::Release);
        }
    }

    /// Counts a request that thread `index` answered without a buffer of this memory.
    pub fn count_served(&self, index: usize) {
        if let Some(record) = self.table().records.get(index) {
            record.served.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts one that it found where a dead server had left it.
    pub fn count_resent(&self, index: usize) {
        if let Some(record) = self.table().records.get(index) {
            record.resent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many nanoseconds the oldest request is old that a thread has and has not answered.
    pub fn oldest_request(&self) -> Option<u64> {
        oldest(self.table().records.iter().map(|record| &record.since_ns))
    }

    /// How many nanoseconds ago the longest wait for the host began that goes on.
    pub fn longest_wait(&self) -> Option<u64> {
        oldest(self.table().waits.iter())
    }

    /// Forgets what the threads of a server that is dead noted. Nobody may be serving.
    pub fn forget_notes(&self) {
        let table = self.table();
        let since = table.records.iter().map(|record| &record.since_ns);
        for note in since.chain(&table.waits) {
            note.store(0, Ordering::Release);
        }
    }

    /// True when a server that is dead now may have taken a request without answering it.
    pub fn owes_answers(&self) -> bool {
        let owes = |record: &Record| record.state.load(Ordering::Acquire) != IDLE;
        self.table().records.iter().any(owes)
    }

    /// The buffer of thread `index`. At most one thread of all processes may use it at a time. Its
    /// memory is there whole from [`Slot::populate`] on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] beyond [`MAX_THREADS`].
    pub fn slot(self: &Arc<Self>, index: usize) -> Result<Slot> {
        if index >= MAX_THREADS {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a device is served by at most {MAX_THREADS} threads"),
            ));
        }
        let buf = self.map_slot(index, false)?;
        Ok(Slot {
            shared: Arc::clone(self),
            index,
            buf,
            populated: false,
        })
    }

    fn map_slot(&self, index: usize, populate: bool) -> Result<MmapMut> {
        let mut options = MmapOptions::new();
        options
            .offset((TABLE_LEN + index * SLOT_LEN) as u64)
            .len(SLOT_LEN);
        if populate {
            options.populate();
        }
        // SAFETY: the memfd is ours and never shortened. Two processes never use one slot at the
        // same time: the next server starts when the last one is dead.
        let buf = unsafe { options.map_mut(self.file.as_raw_fd()) };
        buf.context(|| "a request buffer cannot be mapped")
    }
}

/// The age of the oldest of these notes, those that are 0 left out.
pub(crate) fn oldest<'a>(notes: impl Iterator<Item = &'a AtomicU64>) -> Option<u64> {
    let since = notes.map(|note| note.load(Ordering::Acquire));
    let first = since.filter(|since| *since != 0).min()?;
    Some(monotonic_ns().saturating_sub(first))
}

/// A request that a dead server left in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// Bytes of the request.
    pub len: usize,
    /// The errno of its answer (0 for success), if it was carried out. The kernel may have got that
    /// answer and written the same place again since: it must not be carried out twice.
    pub done: Option<i32>,
}

/// The request buffer of one serving thread.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    index: usize,
    buf: MmapMut,
    populated: bool,
}

impl Slot {
    /// Sees to it that all of the buffer's memory is there, to be called before a request is taken:
    /// a thread that is killed while the kernel copies a request to a page that is not there yet
    /// ends that request with EIO.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel has no memory for it.
    pub fn populate(&mut self) -> Result<()> {
        if !self.populated {
            self.buf = self.shared.map_slot(self.index, true)?;
            self.populated = true;
        }
        Ok(())
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "`Shared::slot` lets no other index through"
    )]
    fn record(&self) -> &Record {
        &self.shared.table().records[self.index]
    }

    /// Where the kernel puts the next request. With `remember` the thread's record says that one
    /// is being taken, for a successor.
    #[expect(clippy::indexing_slicing, reason = "a buffer is SLOT_LEN bytes")]
    pub fn take(&mut self, remember: bool) -> &mut [u8] {
        if remember {
            // A request that arrives is told from an old one by its length.
            self.buf[HEAD_AT..HEAD_AT + 4].fill(0);
            self.record().state.store(TAKING, Ordering::Release);
        }
        &mut self.buf[HEAD_AT..]
    }

    /// Notes that a request came, for whoever watches.
    pub fn begun(&mut self) {
        self.record()
            .since_ns
            .store(monotonic_ns(), Ordering::Release);
    }

    /// Notes that a request of `len` bytes came, for a successor.
    #[expect(clippy::indexing_slicing, reason = "a buffer is SLOT_LEN bytes")]
    pub fn taken(&mut self, len: usize) {
        let record = self.record();
        let (head, rest) = self.buf[HEAD_AT..PAGE].as_chunks();
        assert!(head.len() == record.head.len() && rest.is_empty());
        for (word, bytes) in record.head.iter().zip(head) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        record.len.store(len as u64, Ordering::Relaxed);
        record.state.store(TAKEN, Ordering::Release);
    }

    /// Counts a request that was answered.
    pub fn answered(&mut self, was_resent: bool) {
        let record = self.record();
        record.state.store(IDLE, Ordering::Release);
        record.since_ns.store(0, Ordering::Release);
        record.served.fetch_add(1, Ordering::Relaxed);
        if was_resent {
            record.resent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes, for a successor, that the request was carried out and is about to be answered.
    pub fn done(&mut self, errno: i32) {
        let errno = u64::from(errno.unsigned_abs()) << STATE_BITS;
        self.record().state.store(DONE | errno, Ordering::Release);
    }

    /// Puts back the request that a dead server may owe an answer.
    #[expect(clippy::indexing_slicing, reason = "a buffer is SLOT_LEN bytes")]
    pub fn owed(&mut self) -> Option<Owed> {
        let record = self.record();
        let state = record.state.load(Ordering::Acquire);
        let mut head = [0; HEAD_LEN];
        for (word, bytes) in record.head.iter().zip(head.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        let remembered = record.len.load(Ordering::Relaxed) as usize;
        record.state.store(IDLE, Ordering::Release);
        let done = match state & ((1 << STATE_BITS) - 1) {
            TAKEN => None,
            DONE => Some((state >> STATE_BITS) as i32),
            TAKING => {
                let (len, _) = self.buf[HEAD_AT..].split_first_chunk()?;
                let len = u32::from_ne_bytes(*len) as usize;
                return (len >= abi::IN_HEADER_LEN).then_some(Owed { len, done: None });
            }
            _ => return None,
        };
        self.buf[HEAD_AT..PAGE].copy_from_slice(&head);
        Some(Owed {
            len: remembered,
            done,
        })
    }

    /// The bytes of a request of `len` bytes, a length that the kernel gave, to this process or to
    /// the one before.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a request that is longer than any buffer.
    #[expect(clippy::indexing_slicing, reason = "a buffer is SLOT_LEN bytes")]
    pub fn request(&self, len: usize) -> Result<&[u8]> {
        self.buf[HEAD_AT..].get(..len).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the shared memory of a device server names a request of {len} bytes"),
            )
        })
    }

    /// Where `len` bytes of a READ's data go; `None` where it asks for more than was agreed on.
    pub fn data(&mut self, len: usize) -> Option<&mut [u8]> {
        self.buf.get_mut(PAGE..PAGE.checked_add(len)?)
    }

    /// The reply to a READ: `header` in front of the `len` bytes that [`Slot::data`] handed out.
    #[expect(
        clippy::indexing_slicing,
        reason = "a buffer is SLOT_LEN bytes, of which `data` handed out `len`"
    )]
    pub fn read_reply(&mut self, header: [u8; abi::OUT_HEADER_LEN], len: usize) -> &[u8] {
        let start = PAGE - abi::OUT_HEADER_LEN;
        self.buf[start..PAGE].copy_from_slice(&header);
        &self.buf[start..PAGE + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_taken_and_not_answered_is_found_by_the_next_process() {
        let shared = Shared::create().unwrap();
        let mut slot = shared.slot(1).unwrap();
        assert_eq!(slot.owed(), None);
        slot.take(true)[..4].copy_from_slice(&48u32.to_ne_bytes());
        slot.take(false)[40..48].copy_from_slice(b"argument");
        slot.taken(48);
        // A READ's reply overwrites the end of its own request.
        slot.read_reply([0xff; 16], 0);
        assert!(shared.owes_answers());
        drop(slot);

        let inherited = Shared::inherit(shared.fd().try_clone().unwrap().into()).unwrap();
        let mut slot = inherited.slot(1).unwrap();
        assert_eq!(
            slot.owed(),
            Some(Owed {
                len: 48,
                done: None
            })
        );
        assert_eq!(&slot.request(48).unwrap()[40..], b"argument");
        assert_eq!(slot.owed(), None);
    }

    #[test]
    fn a_request_that_arrived_while_the_server_was_killed_is_found_by_its_length() {
        let shared = Shared::create().unwrap();
        let mut slot = shared.slot(0).unwrap();
        slot.take(true);
        assert_eq!(slot.owed(), None);
        slot.take(true)[..4].copy_from_slice(&56u32.to_ne_bytes());
        assert_eq!(
            slot.owed(),
            Some(Owed {
                len: 56,
                done: None
            })
        );
    }

    #[test]
    fn a_length_that_no_request_has_is_an_error_and_no_short_request() {
        let shared = Shared::create().unwrap();
        let slot = shared.slot(0).unwrap();
        assert_eq!(
            slot.request(HEAD_LEN + abi::MAX_IO).unwrap().len(),
            SLOT_LEN - HEAD_AT
        );
        for len in [HEAD_LEN + abi::MAX_IO + 1, usize::MAX] {
            let error = slot.request(len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn a_request_carried_out_keeps_its_errno_until_it_is_answered() {
        let shared = Shared::create().unwrap();
        let mut slot = shared.slot(0).unwrap();
        slot.taken(40);
        slot.done(libc::ENOSPC);
        let done = Some(libc::ENOSPC);
        assert_eq!(slot.owed(), Some(Owed { len: 40, done }));
        slot.taken(40);
        slot.done(0);
        slot.answered(false);
        assert_eq!(slot.owed(), None);
    }

    /// Otherwise a thread that is killed while the kernel fills it fails that request.
    #[test]
    fn a_buffer_is_in_memory_whole_before_a_request_is_taken() {
        use std::os::unix::fs::MetadataExt;
        let shared = Shared::create().unwrap();
        let mut slot = shared.slot(MAX_THREADS - 1).unwrap();
        let in_memory = || shared.fd().metadata().unwrap().blocks() * 512;
        let before = in_memory();
        assert!(before < SLOT_LEN as u64);
        slot.populate().unwrap();
        assert!(in_memory() >= before + SLOT_LEN as u64);
    }

    #[test]
    fn data_is_page_aligned_and_answers_are_counted() {
        let shared = Shared::create().unwrap();
        let mut slot = shared.slot(0).unwrap();
        assert_eq!(slot.data(abi::MAX_IO).unwrap().as_ptr() as usize % 4096, 0);
        assert!(slot.data(abi::MAX_IO + 1).is_none());
        slot.begun();
        assert!(shared.oldest_request().is_some());
        slot.answered(true);
        assert_eq!(shared.oldest_request(), None);
        slot.answered(false);
        assert_eq!((shared.served(), shared.resent()), (2, 1));
        assert!(shared.slot(MAX_THREADS).is_err());
    }
}
