//! A serving thread with a ring of its own: its entries wait in the kernel for the requests of its
//! processors, and one system call commits what was answered and fetches what has come.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;

use super::abi::Command;
use super::crew::{self, Crew, Word};
use super::memory::{ENTRIES, ENTRIES_AT_ONCE, PAYLOAD, RingMemory, Slot};
use super::place::Place;
use crate::fuse::abi::{self as fuse, ParseError, Request};
use crate::fuse::slot::Shared;
use crate::fuse::transport::{Ended, Fetched, Patience, Reply, Transport};
use crate::inbox::Inbox;
use crate::uring::{Crowd, is_passing};
use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// What a completion is about, in the upper half of its user data; the entry is in the lower.
const REGISTER: u64 = 1 << 32;
const COMMIT: u64 = 2 << 32;
const GUARD: u64 = 3 << 32;
const WAKE: u64 = 4 << 32;

/// A thread with a ring; [`Transport`] for it.
pub struct RingThread<'a> {
    crew: &'a Crew,
    shared: &'a Shared,
    index: usize,
    /// Never closed: the kernel would let go of its entries later, and lose a request that it gives one
    /// of them meanwhile. At the end of its thread it does so in order.
    ring: ManuallyDrop<IoUring<Entry128, cqueue::Entry>>,
    /// What the guard waits for, which never happens.
    idle: ManuallyDrop<IoUring>,
    /// Requests that were fetched, to be answered.
    ready: VecDeque<Slot>,
    /// Answers whose submission the kernel has not taken: the entry and the request's id.
    sending: Vec<(Slot, u64)>,
    /// How many entries each queue of the session has in this ring; of others' queues none.
    entries: Vec<usize>,
    /// Those of each entry, which the submissions that register them name.
    iovecs: Box<[[libc::iovec; 2]]>,
    crowd: Crowd,
    place: Place,
    /// The session is over.
    over: bool,
}

impl<'a> RingThread<'a> {
    /// A ring for thread `index`, its guard, and fresh entries for its queues in the kernel's hands; what
    /// a dead worker owes is what it fetches first. The calling thread alone may use it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel refuses.
    pub fn new(crew: &'a Crew, shared: &'a Shared, index: usize) -> Result<RingThread<'a>> {
        let what = || "a ring cannot be set up";
        let place = Place::new(crew.queues_of(index), crew::online());
        let slots = crew.memory.queues() * ENTRIES;
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_clamp()
            .build(slots as u32 * 2 + 8)
            .context(what)?;
        let session = [crew.session_fd().as_raw_fd()];
        ring.submitter().register_files(&session).context(what)?;
        let mut thread = RingThread {
            crew,
            shared,
            index,
            ring: ManuallyDrop::new(ring),
            idle: ManuallyDrop::new(IoUring::new(2).context(what)?),
            ready: VecDeque::new(),
            sending: Vec::new(),
            entries: vec![0; crew.memory.queues()],
            iovecs: (0..slots)
                .map(|index| crew.memory.iovecs(Slot::from_index(index)))
                .collect(),
            crowd: Crowd::new(),
            place,
            over: false,
        };
        thread.begin()?;
        Ok(thread)
    }

    /// The guard first, then fresh entries, and what is owed last: new requests do not wait for it.
    fn begin(&mut self) -> Result<()> {
        if self.crew.guarded {
            let idle = types::Fd(self.idle.as_raw_fd());
            let guard = opcode::PollAdd::new(idle, libc::POLLPRI as u32);
            self.push(Entry128::from(guard.build().user_data(GUARD)))?;
        }
        self.listen()?;
        let mut owed = Vec::new();
        for queue in self.crew.queues_of(self.index) {
            self.grow(queue)?;
            let slots = self.crew.memory.slots_of(queue);
            let owing = slots.filter(|slot| self.crew.memory.owes(*slot));
            for slot in owing.collect::<Vec<_>>() {
                // What is committed stays with the queue: its entry must not be registered once more later.
                while !self.has(slot) {
                    self.grow(queue)?;
                }
                self.crew.memory.populate(slot)?;
                owed.push(slot);
            }
        }
        self.submit(0)?;
        if self.crew.resume {
            for queue in self.crew.queues_of(self.index) {
                self.kick(queue);
            }
        }
        for slot in owed {
            self.crew.arrived(slot);
            self.ready.push_back(slot);
            self.shared.count_resent(self.index);
        }
        Ok(())
    }

    /// Whether an entry is one that its queue has in this ring.
    #[expect(clippy::indexing_slicing, reason = "there is one for each queue")]
    fn has(&self, slot: Slot) -> bool {
        slot.entry() < self.entries[slot.queue()]
    }

    /// Gives a queue some entries more, up to all that it may have. What an entry owes is seen to first.
    #[expect(clippy::indexing_slicing, reason = "there is one for each queue")]
    fn grow(&mut self, queue: usize) -> Result<()> {
        let has = self.entries[queue];
        let more = (ENTRIES - has).min(ENTRIES_AT_ONCE);
        for slot in self.crew.memory.slots_of(queue).skip(has).take(more) {
            if !self.crew.memory.owes(slot) {
                self.crew.memory.populate(slot)?;
                self.register(slot)?;
            }
        }
        self.entries[queue] = has + more;
        Ok(())
    }

    /// More requests of a queue may be on their way where all that are wait for the host.
    #[expect(clippy::indexing_slicing, reason = "there is one for each queue")]
    fn grow_where_all_wait(&mut self, queue: usize) {
        let ours = self.crew.owner(queue) == self.index;
        let all_wait = self.crew.in_hand(queue) >= self.entries[queue];
        if ours
            && all_wait
            && self.entries[queue] < ENTRIES
            && let Err(error) = self.grow(queue)
        {
            // It goes on with those that it has.
            tracing::warn!("queue {queue} gets no more entries: {error}");
        }
    }

    /// Has the kernel send a request of its own to a queue. What waits there for an entry is fetched only
    /// by the commit of another request, so without it a client could wait for ever.
    fn kick(&self, queue: usize) {
        self.place.at(queue, || {
            let id = fuse::kick_id(queue);
            // A processor that is off has no clients. Of a session that is over, the ring says so.
            let sent = nix::unistd::write(self.crew.session_fd(), &fuse::notify_retrieve(id));
            if let Err(errno) = sent {
                tracing::debug!("queue {queue} is not kicked: {errno}");
            }
        });
    }

    /// Asks to be woken when the others have something to say.
    fn listen(&mut self) -> Result<()> {
        let wake = types::Fd(self.inbox().wake_fd());
        let poll = opcode::PollAdd::new(wake, libc::POLLIN as u32).multi(true);
        self.push(Entry128::from(poll.build().user_data(WAKE)))
    }

    #[expect(clippy::indexing_slicing, reason = "`Crew::rings` counts the inboxes")]
    fn inbox(&self) -> &'a Inbox<Word> {
        &self.crew.inboxes[self.index]
    }

    fn push(&mut self, entry: Entry128) -> Result<()> {
        if self.ring.submission().is_full() {
            self.submit(0)?;
        }
        // SAFETY: iovecs that an entry names live in `self.iovecs` until the kernel has read them, which it
        // does in the submission, and what those name is the memory of the ring, which outlives it;
        // descriptors are the crew's.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| Error::internal("the queue of submissions is full after a submission"))
    }

    #[expect(clippy::indexing_slicing, reason = "a slot is one of the memory's")]
    fn register(&mut self, slot: Slot) -> Result<()> {
        let command = Command::Register((&raw const self.iovecs[slot.index()]) as u64);
        let user_data = REGISTER | slot.index() as u64;
        self.push(command.submission(slot.queue() as u16, user_data))
    }

    /// Puts the answer that lies in an entry on its way.
    fn send(&mut self, slot: Slot) -> Result<()> {
        let id = self.crew.memory.commit_id(slot);
        self.crew.memory.sent(slot);
        self.crew.gone(slot);
        self.shared.count_served(self.index);
        self.sending.push((slot, id));
        let user_data = COMMIT | slot.index() as u64;
        self.push(Command::CommitAndFetch(id).submission(slot.queue() as u16, user_data))
    }

    /// Submits all, waits for `want` completions, and notes what the kernel has taken.
    fn submit(&mut self, want: usize) -> Result<()> {
        match self.ring.submitter().submit_and_wait(want) {
            Ok(_) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(Error::io("a ring does not go on", error)),
        }
        if self.ring.submission().is_empty() {
            for (slot, id) in self.sending.drain(..) {
                self.crew.memory.committed(slot, id);
            }
        }
        self.reap()
    }

    /// Takes the completions.
    fn reap(&mut self) -> Result<()> {
        let completions: Vec<(u64, i32, bool)> = self
            .ring
            .completion()
            .map(|done| (done.user_data(), done.result(), cqueue::more(done.flags())))
            .collect();
        for (user_data, result, more) in completions {
            let kind = user_data >> 32 << 32;
            match (kind, -result) {
                (WAKE, _) if more => {}
                (WAKE, _) => self.listen()?,
                (GUARD, _) => return Err(Error::internal("the guard of a ring ended")),
                (_, 0) => {
                    let slot = Slot::from_index(user_data as u32 as usize);
                    self.crew.arrived(slot);
                    self.ready.push_back(slot);
                }
                // A dead worker had answered it, and could not note so.
                (COMMIT, libc::ENOENT) => {
                    self.register(Slot::from_index(user_data as u32 as usize))?;
                }
                (_, libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV) => self.over = true,
                (_, errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    return Err(Error::io("an entry of a ring failed", error));
                }
            }
        }
        Ok(())
    }

    /// Does what the others said.
    fn listen_to_others(&mut self) -> Result<()> {
        for word in self.inbox().take() {
            match word {
                Word::Answer(slot) => self.ready.push_back(slot),
                Word::Commit(slot) => self.send(slot)?,
            }
        }
        Ok(())
    }

    /// Gives half of what is there to a thread that has nothing to do.
    fn share(&mut self) {
        if self.ready.len() < 2 {
            return;
        }
        if let Some(inbox) = self.idle_other() {
            let half = self.ready.split_off(self.ready.len().div_ceil(2));
            inbox.tell(half.into_iter().map(Word::Answer));
        }
    }

    /// A thread that has nothing to do.
    fn idle_other(&self) -> Option<&'a Inbox<Word>> {
        let others = self.crew.inboxes.iter().enumerate();
        let mut idle = others.filter(|(index, inbox)| *index != self.index && inbox.is_asleep());
        idle.next().map(|(_, inbox)| inbox)
    }

    fn memory(&self) -> &'a RingMemory {
        &self.crew.memory
    }
}

impl Transport for RingThread<'_> {
    type Ticket = Slot;

    fn fetch(&mut self) -> Result<Fetched<Slot>> {
        loop {
            if self.crew.is_stopped() {
                self.submit(0)?;
                return Ok(Fetched::Over(Ended::Stopped));
            }
            self.listen_to_others()?;
            if let Some(slot) = self.ready.pop_front() {
                self.memory().begin(slot);
                self.crowd.begin();
                return Ok(Fetched::Request(slot));
            }
            if self.over {
                return Ok(Fetched::Over(Ended::SessionOver));
            }
            self.place.look();
            if self.inbox().lie_down() {
                let submitted = self.submit(1);
                self.inbox().get_up();
                submitted?;
                self.share();
            }
        }
    }

    fn request(&self, slot: Slot) -> Result<std::result::Result<Request<'_>, ParseError>> {
        Ok(request(self.memory(), slot))
    }

    fn carried_out(&self, slot: Slot) -> Option<i32> {
        self.memory().carried_out(slot)
    }

    fn data(&mut self, slot: Slot, len: usize) -> Option<&mut [u8]> {
        // SAFETY: this thread has the entry's request until it is committed or handed over, and the
        // slice borrows `self` until then.
        unsafe { self.crew.memory.payload(slot) }.get_mut(..len)
    }

    fn commit(&mut self, slot: Slot, reply: Reply) -> Result<Option<Ended>> {
        lay(self.memory(), slot, &reply);
        self.crowd.done(|| self.ring.submission().taskrun());
        let owner = self.crew.owner(slot.queue());
        if owner != self.index && self.crew.is_alone(slot) {
            // Its client has one request at a time: its entries go home, where it runs.
            if let Some(inbox) = self.crew.inboxes.get(owner) {
                inbox.tell([Word::Commit(slot)]);
                return Ok(None);
            }
        }
        self.send(slot)?;
        Ok(None)
    }

    fn flush(&mut self) -> Result<()> {
        self.submit(0)
    }

    fn patience(&self) -> Patience {
        if self.crowd.is_calm() && self.ready.is_empty() && !self.inbox().has_any() {
            Patience::Host
        } else {
            Patience::None
        }
    }

    fn hand_over(&mut self, slot: Slot) {
        self.crowd.handed_over();
        self.crew.hand_over((slot, self.index));
        self.grow_where_all_wait(slot.queue());
    }
}

/// A thread without a ring, for requests that wait.
pub struct SpareThread<'a> {
    crew: &'a Crew,
    /// Whose ring commits the request that it has.
    from: usize,
}

impl<'a> SpareThread<'a> {
    /// One of several.
    pub fn new(crew: &'a Crew) -> SpareThread<'a> {
        SpareThread { crew, from: 0 }
    }
}

impl Transport for SpareThread<'_> {
    type Ticket = Slot;

    fn fetch(&mut self) -> Result<Fetched<Slot>> {
        let Some((slot, from)) = self.crew.next_job() else {
            return Ok(Fetched::Over(Ended::Stopped));
        };
        self.from = from;
        Ok(Fetched::Request(slot))
    }

    fn request(&self, slot: Slot) -> Result<std::result::Result<Request<'_>, ParseError>> {
        Ok(request(&self.crew.memory, slot))
    }

    fn carried_out(&self, slot: Slot) -> Option<i32> {
        self.crew.memory.carried_out(slot)
    }

    fn data(&mut self, slot: Slot, len: usize) -> Option<&mut [u8]> {
        // SAFETY: this thread was given the entry's request alone, and has it until it is committed; the
        // slice borrows `self` until then.
        unsafe { self.crew.memory.payload(slot) }.get_mut(..len)
    }

    fn commit(&mut self, slot: Slot, reply: Reply) -> Result<Option<Ended>> {
        lay(&self.crew.memory, slot, &reply);
        let inbox = self.crew.inboxes.get(self.from).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                "a request of a thread that is not there",
            )
        })?;
        inbox.tell([Word::Commit(slot)]);
        Ok(None)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn patience(&self) -> Patience {
        Patience::Any
    }

    fn hand_over(&mut self, slot: Slot) {
        self.crew.hand_over((slot, self.from));
    }
}

fn request(memory: &RingMemory, slot: Slot) -> std::result::Result<Request<'_>, ParseError> {
    // SAFETY: the caller has the entry's request until it answers, which it does after it has done with
    // what is borrowed here.
    let payload = unsafe { memory.payload(slot) };
    let (opcode, arguments) = (memory.opcode(slot), memory.arguments(slot));
    Request::from_parts(opcode, memory.commit_id(slot), arguments, payload)
}

fn lay(memory: &RingMemory, slot: Slot, reply: &Reply) {
    match reply {
        Reply::None => memory.reply(slot, 0, 0, None),
        Reply::Errno(errno) => memory.reply(slot, *errno, 0, None),
        Reply::Body(body) => memory.reply(slot, 0, body.bytes().len(), Some(body.bytes())),
        Reply::Data(len) => {
            assert!(*len <= PAYLOAD, "more was read than was asked for");
            memory.reply(slot, 0, *len, None);
        }
    }
}
