//! What the threads of a ring share: who has work for whom.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};

use super::memory::{RingMemory, Slot};
use vellum_base::error::{Result, ResultExt};

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

/// Where a thread with a ring is told things.
#[derive(Debug)]
pub(super) struct Inbox {
    words: Mutex<Vec<Word>>,
    any: AtomicBool,
    /// Its thread waits in the kernel, or is about to.
    asleep: AtomicBool,
    wake: EventFd,
}

impl Inbox {
    fn new() -> Result<Inbox> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Inbox {
            words: Mutex::default(),
            any: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: EventFd::from_flags(flags).context(|| "an eventfd cannot be made")?,
        })
    }

    /// What its thread is woken by.
    pub(super) fn wake_fd(&self) -> i32 {
        self.wake.as_fd().as_raw_fd()
    }

    pub(super) fn tell(&self, words: impl IntoIterator<Item = Word>) {
        self.words.lock().extend(words);
        self.any.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        // It can only fail where it has been written 2^64 times.
        let _ = self.wake.write(1);
    }

    /// Takes what was said.
    pub(super) fn take(&self) -> Vec<Word> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut words = self.words.lock();
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut words)
    }

    pub(super) fn has_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Says that the thread will wait; false where it has been told something.
    pub(super) fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            self.get_up();
            return false;
        }
        true
    }

    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    pub(super) fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::SeqCst)
    }
}

/// A request that has to wait, and the thread whose ring will commit it.
pub(super) type Job = (Slot, usize);

/// What the threads that serve one session by rings share.
#[derive(Debug)]
pub struct Crew {
    pub(super) memory: Arc<RingMemory>,
    pub(super) session: Arc<File>,
    pub(super) inboxes: Vec<Inbox>,
    /// Requests of each queue that are fetched and not committed.
    in_hand: Vec<AtomicU32>,
    jobs: Mutex<VecDeque<Job>>,
    job_comes: Condvar,
    stop: AtomicBool,
    /// Keeps the kernel to the order in which a dying thread lets go of its entries: see the page.
    pub(super) guarded: bool,
    /// Another worker served before.
    pub(super) resume: bool,
}

impl Crew {
    /// For the threads of one worker.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) with too many open files.
    pub fn new(
        memory: Arc<RingMemory>,
        session: Arc<File>,
        resume: bool,
        guarded: bool,
    ) -> Result<Crew> {
        let rings = online().clamp(1, MAX_RINGS).min(memory.queues());
        let inboxes = (0..rings).map(|_| Inbox::new());
        Ok(Crew {
            in_hand: (0..memory.queues()).map(|_| AtomicU32::new(0)).collect(),
            inboxes: inboxes.collect::<Result<_>>()?,
            memory,
            session,
            jobs: Mutex::default(),
            job_comes: Condvar::new(),
            stop: AtomicBool::new(false),
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

    /// True where no other request of its queue is with a worker.
    pub(super) fn is_alone(&self, slot: Slot) -> bool {
        self.hand(slot).load(Ordering::Relaxed) <= 1
    }

    /// Hands a request to a spare thread.
    pub(super) fn hand_over(&self, job: Job) {
        self.jobs.lock().push_back(job);
        self.job_comes.notify_one();
    }

    /// Waits for a request that has to wait; `None` when the threads are to end.
    pub(super) fn next_job(&self) -> Option<Job> {
        let mut jobs = self.jobs.lock();
        loop {
            if self.is_stopped() {
                return None;
            }
            if let Some(job) = jobs.pop_front() {
                return Some(job);
            }
            self.job_comes.wait(&mut jobs);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends the threads: what they have and did not commit is left for the next worker.
    pub fn stop(&self) {
        let jobs = self.jobs.lock();
        self.stop.store(true, Ordering::Release);
        drop(jobs);
        self.job_comes.notify_all();
        for inbox in &self.inboxes {
            inbox.wake();
        }
    }

    pub(super) fn session_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// Processors that run now.
fn online() -> usize {
    // SAFETY: the call takes a number and returns one.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(online).unwrap_or(1)
}
