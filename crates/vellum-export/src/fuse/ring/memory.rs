//! The memory of a ring's entries, which outlives a killed worker at the same addresses.
//!
//! docs/local-device.md, "FUSE over io_uring", has the layout and the order of the notes.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::abi;
use crate::fuse::abi as fuse;
use crate::fuse::slot::oldest;
use vellum_base::block::part_mut;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::monotonic_ns;

/// Entries that each queue may have.
pub const ENTRIES: usize = 16;
/// So many it has from the start, and so many more at a time where its requests wait for the host.
pub const ENTRIES_AT_ONCE: usize = 4;
/// Bytes of data that one request carries at most: several entries with less are filled and served side by
/// side, and take less time to map in a successor.
pub const PAYLOAD: usize = 256 << 10;
/// A host with more processors than this is served in the classic way: each needs a queue.
pub const MAX_QUEUES: usize = 64;

const PAGE: usize = 4096;
/// The page of the header, then the notes.
const NOTES_AT: usize = PAGE;
const NOTES_LEN: usize = MAX_QUEUES * ENTRIES * size_of::<Note>();
const SLOTS_AT: usize = NOTES_AT + NOTES_LEN;
const SLOT_LEN: usize = PAGE + PAYLOAD;
/// Changes with everything above and with [`Note`].
pub const LAYOUT: u64 = 0x5645_4c52_494e_0002;
/// Where it is mapped, in every process: the kernel remembers the addresses of entries.
#[cfg(not(target_arch = "aarch64"))]
const ADDRESS: usize = 0x2000_0000_0000;
/// With 39 bits of addresses, which some kernels have.
#[cfg(target_arch = "aarch64")]
const ADDRESS: usize = 0x20_0000_0000;

const _: () = assert!(size_of::<Header>() <= PAGE && size_of::<Note>() == 64);
const _: () = assert!(NOTES_LEN.is_multiple_of(PAGE));

#[repr(C)]
struct Header {
    layout: AtomicU64,
    queues: AtomicU64,
}

/// What is known of the request in one entry: the ids are the kernel's, 0 for none.
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct Note {
    /// The request whose opcode is noted: it may have been carried out in part.
    seen: AtomicU64,
    /// The request that was carried out, with `errno`; not of a READ.
    done: AtomicU64,
    /// The request whose answer the kernel has.
    committed: AtomicU64,
    opcode: AtomicU32,
    errno: AtomicU32,
    /// When a worker got the request that it has, 0 while it has none.
    since_ns: AtomicU64,
}

/// One entry of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u16);

impl Slot {
    /// Entry `entry` of queue `queue`.
    pub fn new(queue: usize, entry: usize) -> Slot {
        assert!(queue < MAX_QUEUES && entry < ENTRIES, "no such entry");
        Slot((queue * ENTRIES + entry) as u16)
    }

    /// Its queue, which is a processor's number.
    pub fn queue(self) -> usize {
        self.index() / ENTRIES
    }

    /// Its number in its queue.
    pub fn entry(self) -> usize {
        self.index() % ENTRIES
    }

    /// Its number among all.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The entry with this number.
    pub fn from_index(index: usize) -> Slot {
        Slot::new(index / ENTRIES, index % ENTRIES)
    }
}

/// The memory that the workers of one device use one after the other.
#[derive(Debug)]
pub struct RingMemory {
    file: File,
    base: NonNull<u8>,
    queues: usize,
}

// SAFETY: the mapping belongs to the value and stays where it is; header and notes are atomics, and of
// each entry one thread at a time has the bytes, as `RingMemory::payload` demands.
unsafe impl Send for RingMemory {}
// SAFETY: as above.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// New memory with a queue for each possible processor, mapped.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel has no memory for it, or something else lies there.
    pub fn create(queues: usize) -> Result<Arc<RingMemory>> {
        let what = || "the memory of a ring cannot be made";
        assert!((1..=MAX_QUEUES).contains(&queues), "{queues} queues");
        let file = File::from(memfd_create(c"vellum-ring", MFdFlags::MFD_CLOEXEC).context(what)?);
        file.set_len(length(queues) as u64).context(what)?;
        let memory = RingMemory::map(file, queues)?;
        memory
            .header()
            .queues
            .store(queues as u64, Ordering::Relaxed);
        memory.header().layout.store(LAYOUT, Ordering::Release);
        Ok(Arc::new(memory))
    }

    /// The memory that an earlier program made, mapped where it was.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where its layout is another one, [`ErrorKind::Io`] where it cannot be
    /// mapped there.
    pub fn inherit(fd: OwnedFd) -> Result<Arc<RingMemory>> {
        let file = File::from(fd);
        let len = file.metadata().context(|| "the memory of a ring")?.len();
        let queues = (1..=MAX_QUEUES).find(|queues| length(*queues) as u64 == len);
        let memory = queues
            .map(|queues| RingMemory::map(file, queues))
            .transpose()?;
        match memory {
            Some(memory) if memory.header().layout.load(Ordering::Acquire) == LAYOUT => {
                Ok(Arc::new(memory))
            }
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "the ring of this device was made by a version whose memory is laid out in another way",
            )),
        }
    }

    fn map(file: File, queues: usize) -> Result<RingMemory> {
        let what = || format!("the memory of a ring cannot be mapped at {ADDRESS:#x}");
        // SAFETY: a new mapping of a file of ours, which is never shortened; with MAP_FIXED_NOREPLACE it
        // takes the place of nothing.
        let base = unsafe {
            mmap(
                NonZeroUsize::new(ADDRESS),
                NonZeroUsize::MIN.saturating_add(length(queues) - 1),
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE,
                &file,
                0,
            )
        };
        let base = base.context(what)?.cast();
        let memory = RingMemory { file, base, queues };
        // A kernel before 4.17 takes the address for a wish.
        if memory.base.as_ptr() as usize != ADDRESS {
            return Err(Error::new(ErrorKind::Unsupported, what()));
        }
        Ok(memory)
    }

    /// The descriptor, for a program that takes over.
    pub fn fd(&self) -> &File {
        &self.file
    }

    /// Queues: one for each processor that the host may have.
    pub fn queues(&self) -> usize {
        self.queues
    }

    /// All entries of a queue.
    pub fn slots_of(&self, queue: usize) -> impl Iterator<Item = Slot> + use<> {
        (0..ENTRIES).map(move |entry| Slot::new(queue, entry))
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < length(self.queues), "beyond the memory");
        // SAFETY: the offset lies within the mapping.
        unsafe { self.base.add(offset) }
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping begins with a page for it; it consists of atomics, for which every bit
        // pattern is a value.
        unsafe { self.at(0).cast().as_ref() }
    }

    pub(super) fn note(&self, slot: Slot) -> &Note {
        let at = NOTES_AT + slot.index() * size_of::<Note>();
        // SAFETY: the mapping has room for the notes of MAX_QUEUES queues, aligned; they consist of
        // atomics, for which every bit pattern is a value.
        unsafe { self.at(at).cast().as_ref() }
    }

    /// The iovecs of an entry, with which it is registered.
    pub fn iovecs(&self, slot: Slot) -> [libc::iovec; 2] {
        let piece = |at: usize, len| libc::iovec {
            iov_base: self.at(at).as_ptr().cast(),
            iov_len: len,
        };
        let at = SLOTS_AT + slot.index() * SLOT_LEN;
        [piece(at, abi::HEADER_LEN), piece(at + PAGE, PAYLOAD)]
    }

    /// Sees to it that this process has every page of an entry, before the kernel copies to it: a thread
    /// that is being killed gets no page any more.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel has no memory for it.
    pub fn populate(&self, slot: Slot) -> Result<()> {
        let at = self.at(SLOTS_AT + slot.index() * SLOT_LEN);
        // SAFETY: the range is that of the entry in our own mapping, whose content the call does not change.
        let result =
            unsafe { libc::madvise(at.as_ptr().cast(), SLOT_LEN, libc::MADV_POPULATE_WRITE) };
        nix::errno::Errno::result(result)
            .map(drop)
            .context(|| "the memory of a ring cannot be filled")
    }

    /// A field of an entry's header.
    fn field<const N: usize>(&self, slot: Slot, at: usize) -> [u8; N] {
        let at = self.at(SLOTS_AT + slot.index() * SLOT_LEN + at);
        // SAFETY: it lies within the entry's page. The kernel writes it only while the entry is its own,
        // whose answer we read after the completion.
        unsafe { at.cast::<[u8; N]>().read_unaligned() }
    }

    fn set_field<const N: usize>(&self, slot: Slot, at: usize, value: [u8; N]) {
        let at = self.at(SLOTS_AT + slot.index() * SLOT_LEN + at);
        // SAFETY: it lies within the entry's page, and the entry is ours.
        unsafe { at.cast::<[u8; N]>().write_unaligned(value) }
    }

    /// The id of the request that lies in an entry, 0 before the first.
    pub fn commit_id(&self, slot: Slot) -> u64 {
        u64::from_ne_bytes(self.field(slot, abi::COMMIT_ID))
    }

    /// The arguments of the request.
    pub fn arguments(&self, slot: Slot) -> &[u8] {
        let at = self.at(SLOTS_AT + slot.index() * SLOT_LEN + abi::OP_IN);
        // SAFETY: they lie within the entry's page. The kernel writes them before the completion, and we
        // never do.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), abi::OP_IN_LEN) }
    }

    /// The data of an entry.
    ///
    /// # Safety
    /// The entry's request was fetched and is not committed, no other thread has it, and no other slice
    /// of it lives.
    #[expect(clippy::mut_from_ref, reason = "the caller has the entry alone")]
    pub unsafe fn payload(&self, slot: Slot) -> &mut [u8] {
        let at = self.at(SLOTS_AT + slot.index() * SLOT_LEN + PAGE);
        // SAFETY: the entry has that many bytes there, and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), PAYLOAD) }
    }

    /// True where a dead worker may owe the answer to the request in an entry.
    pub fn owes(&self, slot: Slot) -> bool {
        let id = self.commit_id(slot);
        id != 0 && self.note(slot).committed.load(Ordering::Acquire) != id
    }

    /// Notes that a worker has the request of an entry; returns its opcode.
    pub fn begin(&self, slot: Slot) -> u32 {
        let (id, note) = (self.commit_id(slot), self.note(slot));
        note.since_ns.store(monotonic_ns(), Ordering::Release);
        if note.seen.load(Ordering::Acquire) != id {
            let opcode = u32::from_ne_bytes(self.field(slot, abi::OPCODE));
            note.opcode.store(opcode, Ordering::Relaxed);
            note.seen.store(id, Ordering::Release);
        }
        note.opcode.load(Ordering::Relaxed)
    }

    /// The opcode of the request that [`RingMemory::begin`] was called for.
    pub fn opcode(&self, slot: Slot) -> u32 {
        self.note(slot).opcode.load(Ordering::Relaxed)
    }

    /// The errno with which the request was carried out, if it was.
    pub fn carried_out(&self, slot: Slot) -> Option<i32> {
        let note = self.note(slot);
        let done = note.done.load(Ordering::Acquire) == self.commit_id(slot);
        done.then(|| note.errno.load(Ordering::Relaxed) as i32)
    }

    /// Lays the reply over the request, which is noted first as carried out, for a successor: the bytes
    /// of a WRITE are not whole afterwards. What a READ read lies in the payload already.
    pub fn reply(&self, slot: Slot, errno: i32, len: usize, body: Option<&[u8]>) {
        let (id, note) = (self.commit_id(slot), self.note(slot));
        if fuse::changes_data(self.opcode(slot)) {
            note.errno.store(errno.unsigned_abs(), Ordering::Relaxed);
            note.done.store(id, Ordering::Release);
        }
        if let Some(body) = body {
            // SAFETY: the caller has the entry's request and does not commit it before this returns; the
            // slices that it had of it are gone, since the answer is there.
            let payload = unsafe { self.payload(slot) };
            part_mut(payload, 0, body.len()).copy_from_slice(body);
        }
        self.set_field(slot, abi::IN_OUT, fuse::out_header(id, errno, len));
        self.set_field(slot, abi::PAYLOAD_LEN, (len as u32).to_ne_bytes());
    }

    /// Notes that a worker has no request of an entry any more: it is on its way to the kernel.
    pub fn sent(&self, slot: Slot) {
        self.note(slot).since_ns.store(0, Ordering::Release);
    }

    /// Notes that the kernel has the answer to request `id`, which lay in an entry.
    pub fn committed(&self, slot: Slot, id: u64) {
        self.note(slot).committed.store(id, Ordering::Release);
    }

    /// How many nanoseconds the oldest request is old that a worker has and has not answered.
    pub fn oldest_request(&self) -> Option<u64> {
        oldest(self.since())
    }

    /// Forgets since when a worker that is dead had its requests. Nobody may be serving.
    pub fn forget_requests(&self) {
        for since in self.since() {
            since.store(0, Ordering::Release);
        }
    }

    fn since(&self) -> impl Iterator<Item = &AtomicU64> {
        let slots = (0..self.queues).flat_map(|queue| self.slots_of(queue));
        slots.map(|slot| &self.note(slot).since_ns)
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nothing borrowed from it outlives the value.
        let _ = unsafe { munmap(self.base.cast(), length(self.queues)) };
    }
}

/// Bytes of the memory for so many queues.
fn length(queues: usize) -> usize {
    SLOTS_AT + queues * ENTRIES * SLOT_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u32 = 15;
    const WRITE: u32 = 16;

    /// What the kernel does when it copies a request to an entry.
    fn arrive(memory: &RingMemory, slot: Slot, id: u64, opcode: u32) {
        memory.set_field(slot, abi::OPCODE, opcode.to_ne_bytes());
        memory.set_field(slot, abi::OP_IN + 16, 4u32.to_ne_bytes());
        // SAFETY: nobody has the entry.
        let payload = unsafe { memory.payload(slot) };
        payload[..8].copy_from_slice(b"new data");
        memory.set_field(slot, abi::COMMIT_ID, id.to_ne_bytes());
    }

    /// The memory as the successor of a killed worker maps it.
    fn inherited(memory: Arc<RingMemory>) -> Arc<RingMemory> {
        let fd = memory.fd().try_clone().unwrap();
        // Two cannot lie at one address.
        drop(memory);
        RingMemory::inherit(fd.into()).unwrap()
    }

    /// What a successor finds of a request whose worker was killed after so many of its steps.
    fn left_after(steps: usize, opcode: u32) -> (bool, u32, Option<i32>, Vec<u8>) {
        let memory = RingMemory::create(2).unwrap();
        let slot = Slot::new(1, ENTRIES - 1);
        // An earlier request, answered whole.
        arrive(&memory, slot, 10, WRITE);
        memory.begin(slot);
        memory.reply(slot, libc::ENOSPC, 0, None);
        memory.committed(slot, 10);
        if steps > 0 {
            arrive(&memory, slot, 12, opcode);
        }
        if steps > 1 {
            memory.begin(slot);
        }
        if steps > 2 {
            memory.reply(slot, 0, 8, Some(b"RREEPPLL"));
        }
        if steps > 3 {
            memory.committed(slot, 12);
        }
        let memory = inherited(memory);
        let owes = memory.owes(slot);
        if owes {
            memory.begin(slot);
        }
        // SAFETY: nobody else has the entry.
        let data = unsafe { memory.payload(slot) }[..8].to_vec();
        let found = memory.opcode(slot);
        (owes, found, memory.carried_out(slot).filter(|_| owes), data)
    }

    #[test]
    fn a_free_entry_owes_nothing_and_one_that_was_committed_neither() {
        assert!(!left_after(0, WRITE).0);
        assert!(!left_after(4, WRITE).0);
        let memory = RingMemory::create(1).unwrap();
        assert!(memory.slots_of(0).all(|slot| !memory.owes(slot)));
    }

    #[test]
    fn a_request_that_was_copied_or_begun_is_carried_out_with_its_own_data() {
        for steps in [1, 2] {
            let expected = (true, WRITE, None, b"new data".to_vec());
            assert_eq!(left_after(steps, WRITE), expected);
        }
    }

    /// Its data are not whole any more, and the client may have written there since.
    #[test]
    fn a_write_whose_answer_was_laid_over_it_is_answered_and_not_carried_out_again() {
        let (owes, opcode, done, _) = left_after(3, WRITE);
        assert_eq!((owes, opcode, done), (true, WRITE, Some(0)));
    }

    #[test]
    fn a_read_whose_answer_was_laid_over_it_is_carried_out_again() {
        let (owes, opcode, done, _) = left_after(3, READ);
        assert_eq!((owes, opcode, done), (true, READ, None));
    }

    #[test]
    fn an_answer_keeps_its_errno_for_the_successor_and_the_arguments() {
        let memory = RingMemory::create(1).unwrap();
        let slot = Slot::new(0, 0);
        arrive(&memory, slot, 2, WRITE);
        memory.begin(slot);
        assert!(memory.oldest_request().is_some());
        memory.reply(slot, libc::ENOSPC, 0, None);
        memory.sent(slot);
        assert_eq!(memory.oldest_request(), None);
        assert_eq!(memory.carried_out(slot), Some(libc::ENOSPC));
        assert_eq!(memory.arguments(slot)[16..20], 4u32.to_ne_bytes());
        let error: [u8; 4] = memory.field(slot, abi::IN_OUT + 4);
        assert_eq!(i32::from_ne_bytes(error), -libc::ENOSPC);
    }

    #[test]
    fn memory_of_another_layout_is_refused_and_not_taken() {
        let memory = RingMemory::create(1).unwrap();
        memory.header().layout.store(LAYOUT + 1, Ordering::Release);
        let fd = memory.fd().try_clone().unwrap();
        drop(memory);
        let error = RingMemory::inherit(fd.into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let file = tempfile::tempfile().unwrap();
        let error = RingMemory::inherit(file.into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn an_entry_is_in_memory_whole_once_it_is_populated() {
        use std::os::unix::fs::MetadataExt;
        let memory = RingMemory::create(2).unwrap();
        let in_memory = || memory.fd().metadata().unwrap().blocks() * 512;
        let before = in_memory();
        memory.populate(Slot::new(1, ENTRIES - 1)).unwrap();
        assert!(in_memory() >= before + SLOT_LEN as u64);
    }
}
