//! What the threads of a ring share: who has work for whom.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::memory::{RingMemory, Slot};
use crate::inbox::{Inbox, Jobs};
use crate::shortage::Shortage;
use vellum_base::error::Result;

/// Threads with a ring of their own at most; each has the queues of its processors.
const MAX_RINGS: usize = 4;

/// A word from one thread to one that has a ring.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    /// Carry this request out.
    Answer(Slot),
    /// The answer to this one lies in its entry: commit it.
    Commit(Slot),
}

/// A request that has to wait, and the thread whose ring will commit it.
pub(super) type Job = (Slot, usize);

/// What the threads that serve one session by rings share.
#[derive(Debug)]
pub struct Crew {
    pub(super) memory: Arc<RingMemory>,
    pub(super) session: Arc<File>,
    pub(super) inboxes: Vec<Inbox<Word>>,
    /// Requests of each queue that are fetched and not committed.
    in_hand: Vec<AtomicU32>,
    jobs: Jobs<Job>,
    /// Keeps the kernel to the order in which a dying thread lets go of its entries: see the page.
    pub(super) guarded: bool,
    /// Another worker served before.
    pub(super) resume: bool,
}

impl Crew {
    /// For the threads of one worker. `shortage` is told when none is spare any more.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) with too many open files.
    pub fn new(
        memory: Arc<RingMemory>,
        session: Arc<File>,
        resume: bool,
        guarded: bool,
        shortage: Shortage,
    ) -> Result<Crew> {
        let rings = online().clamp(1, MAX_RINGS).min(memory.queues());
        let inboxes = (0..rings).map(|_| Inbox::new());
        Ok(Crew {
            in_hand: (0..memory.queues()).map(|_| AtomicU32::new(0)).collect(),
            inboxes: inboxes.collect::<Result<_>>()?,
            memory,
            session,
            jobs: Jobs::new(shortage),
            guarded,
            resume,
        })
    }

    /// Threads that have a ring.
    pub fn rings(&self) -> usize {
        self.inboxes.len()
    }

    /// The thread that a queue belongs to.
    pub(super) fn owner(&self, queue: usize) -> usize {
        queue % self.rings()
    }

    /// The queues of a thread.
    pub(super) fn queues_of(&self, thread: usize) -> impl Iterator<Item = usize> + use<> {
        (thread..self.memory.queues()).step_by(self.rings())
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "a slot is one of the memory's queues"
    )]
    fn hand(&self, slot: Slot) -> &AtomicU32 {
        &self.in_hand[slot.queue()]
    }

    pub(super) fn arrived(&self, slot: Slot) {
        self.hand(slot).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn gone(&self, slot: Slot) {
        self.hand(slot).fetch_sub(1, Ordering::Relaxed);
    }

    /// Requests of a queue that are with a worker.
    pub(super) fn in_hand(&self, queue: usize) -> usize {
        let hand = self.in_hand.get(queue);
        hand.map_or(0, |hand| hand.load(Ordering::Relaxed) as usize)
    }

    /// True where no other request of its queue is with a worker.
    pub(super) fn is_alone(&self, slot: Slot) -> bool {
        self.in_hand(slot.queue()) <= 1
    }

    /// Hands a request to a spare thread.
    pub(super) fn hand_over(&self, job: Job) {
        self.jobs.put(job);
    }

    /// Waits for a request that has to wait; `None` when the threads are to end.
    pub(super) fn next_job(&self) -> Option<Job> {
        self.jobs.next()
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.jobs.is_stopped()
    }

    /// Ends the threads: what they have and did not commit is left for the next worker.
    pub fn stop(&self) {
        self.jobs.stop();
        for inbox in &self.inboxes {
            inbox.wake();
        }
    }

    pub(super) fn session_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// Processors that run now.
pub(super) fn online() -> usize {
    // SAFETY: the call takes a number and returns one.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(online).unwrap_or(1)
}
