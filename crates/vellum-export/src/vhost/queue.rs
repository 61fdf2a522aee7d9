//! The threads of a queue.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, MutexGuard};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

use super::Disk;
use super::chain::Memory;
use super::exec::{Executor, Outcome, Understood, answer, class, expects_flush, understand};
use super::request::Request;
use super::ring::Ring;
use crate::pace::Pace;
use vellum_base::block::Durability;
use vellum_base::crash_point;
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::unless_it_stalls;

/// Threads of a queue at most, hence its requests that are carried out at once, where none waits for what others bring;
/// else it may have one for each request that there can be, and one to take them.
const USUAL_THREADS: usize = 16;
/// Bytes of its buffer that a thread keeps while it waits for the lead.
const KEPT_BUFFER: usize = 128 << 10;

/// What a queue is made of beside its rings.
pub(super) struct Parts {
    /// Its number.
    pub(super) index: u16,
    pub(super) disk: Arc<Disk>,
    pub(super) memory: GuestMemoryAtomic<Memory>,
    /// The guest says here that it made a request.
    pub(super) kick: File,
    /// The client hears here that the queue is broken.
    pub(super) broken: Option<File>,
    /// What a write is when it was answered.
    pub(super) durability: Durability,
    /// What cannot be done now is the next server's, which finds it in the inflight region.
    pub(super) leaves: bool,
}

/// A queue that is served until it is dropped.
pub(super) struct RunningQueue {
    shared: Arc<Shared>,
}

struct Shared {
    parts: Parts,
    ring: Mutex<Ring>,
    /// Held by the thread that takes requests.
    lead: Mutex<()>,
    /// Threads that wait for the lead.
    followers: AtomicUsize,
    pace: Pace,
    /// What was written last is likely to be flushed next, and nothing was done ahead of that yet.
    expects_flush: AtomicBool,
    stopping: AtomicBool,
    /// Readable for ever once the queue stops.
    stop: EventFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many have not ended.
    live: AtomicUsize,
    /// How many these may be.
    most: usize,
}

impl RunningQueue {
    /// Serves a queue.
    ///
    /// # Errors
    /// Where the process has no file descriptors or threads left.
    pub(super) fn start(parts: Parts, ring: Ring) -> Result<RunningQueue> {
        let mut ring = ring;
        if ring.left() > 0 {
            tracing::info!(
                disk = %parts.disk.serial, queue = parts.index, requests = ring.left(),
                "does again what the server before did not answer"
            );
        }
        // The one before may have died between an answer and its interrupt.
        ring.interrupt();
        let most = match parts.disk.device.may_stall() {
            true => USUAL_THREADS.max(usize::from(ring.size()) + 1),
            false => USUAL_THREADS,
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            parts,
            ring: Mutex::new(ring),
            lead: Mutex::default(),
            followers: AtomicUsize::new(0),
            pace: Pace::default(),
            expects_flush: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            stop: EventFd::from_value_and_flags(0, flags).context(|| "making an eventfd")?,
            threads: Mutex::default(),
            live: AtomicUsize::new(0),
            most,
        });
        shared
            .add_thread()
            .context(|| "starting the thread of a queue")?;
        Ok(RunningQueue { shared })
    }

    /// Interrupts the guest by another descriptor from now on.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.shared.ring.lock().set_call(call);
    }

    /// Stops once what was taken is answered; the next entry of the available ring.
    pub(super) fn stop(&self) -> u16 {
        let shared = &self.shared;
        shared.stopping.store(true, SeqCst);
        // The counter cannot overflow, which is all that could fail.
        let _ = shared.stop.write(1);
        // A thread that was there before the flag was set may have started another.
        loop {
            let Some(thread) = shared.threads.lock().pop() else {
                break;
            };
            let ended = thread.join();
            debug_assert!(ended.is_ok(), "a panic ends the process");
        }
        shared.ring.lock().next_available()
    }
}

impl Drop for RunningQueue {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn add_thread(self: &Arc<Self>) -> std::io::Result<()> {
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        let shared = Arc::clone(self);
        let number = self.live.fetch_add(1, SeqCst);
        let name = format!("vhost-{}.{number}", self.parts.index);
        let thread = thread::Builder::new().name(name);
        let started = thread.spawn(move || shared.serve());
        if started.is_err() {
            self.live.fetch_sub(1, SeqCst);
        }
        threads.push(started?);
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    /// What a thread does.
    fn serve(self: &Arc<Self>) {
        let mut buffer = Vec::new();
        let mut lead = self.follow();
        while !self.stopping() {
            let memory = self.parts.memory.memory();
            match self.take(&memory) {
                Ok(Some(head)) => {
                    let kept = self.carry_out(lead, &memory, head, &mut buffer);
                    drop(memory);
                    lead = match kept {
                        Some(lead) => lead,
                        None => {
                            self.flush_ahead();
                            if self.leaves_others_enough() {
                                return;
                            }
                            buffer.truncate(0);
                            buffer.shrink_to(KEPT_BUFFER);
                            self.follow()
                        }
                    };
                }
                Ok(None) => {
                    // What the client takes away meanwhile is not to stay mapped.
                    drop(memory);
                    self.flush_ahead();
                    self.wait();
                }
                Err(error) => {
                    self.give_up(&error);
                    return;
                }
            }
        }
    }

    /// Whether a thread that has given up the lead may end: others wait for it, and there are more than are needed once no
    /// request waits for what others bring. It counts as ended then.
    fn leaves_others_enough(&self) -> bool {
        let fewer = |live: usize| (live > USUAL_THREADS).then(|| live - 1);
        self.followers.load(SeqCst) > 0 && self.live.fetch_update(SeqCst, SeqCst, fewer).is_ok()
    }

    /// Begins what the next flush would have to do, where one is likely to come next and nothing else is
    /// to be done for the guest.
    fn flush_ahead(&self) {
        if self.expects_flush.load(SeqCst)
            && self.ring.lock().is_idle(&self.parts.memory.memory())
            && self.expects_flush.swap(false, SeqCst)
        {
            self.parts.disk.device.flush_ahead();
        }
    }

    fn follow(&self) -> MutexGuard<'_, ()> {
        self.followers.fetch_add(1, SeqCst);
        let lead = self.lead.lock();
        self.followers.fetch_sub(1, SeqCst);
        lead
    }

    /// Takes a request; `None` where there is none and a kick will tell of the next.
    fn take(&self, memory: &Memory) -> Result<Option<u16>> {
        let mut ring = self.ring.lock();
        loop {
            if let Some(head) = ring.take(memory)? {
                ring.want_kicks(memory, false)?;
                return Ok(Some(head));
            }
            if !ring.want_kicks(memory, true)? {
                return Ok(None);
            }
        }
    }

    /// Waits for a kick, or for the end.
    fn wait(&self) {
        let mut fds = [
            PollFd::new(self.parts.kick.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
        ];
        match nix::poll::poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            // It fails for nothing that a client does to its descriptor.
            Err(errno) => tracing::error!("waiting for a guest: {errno}"),
        }
        let [kick, _] = &fds;
        if kick.any().unwrap_or(false) {
            // Only this thread reads it, so it does not block.
            let _ = (&self.parts.kick).read(&mut [0; 8]);
        }
    }

    /// The queue is not served any more until the client starts it again.
    fn give_up(&self, error: &vellum_base::Error) {
        tracing::warn!(
            disk = %self.parts.disk.serial, queue = self.parts.index,
            "{error}: the queue stops until the machine resets it"
        );
        self.stopping.store(true, SeqCst);
        let _ = self.stop.write(1);
        if let Some(mut file) = self.parts.broken.as_ref() {
            let _ = file.write(&1u64.to_ne_bytes());
        }
    }

    /// Carries out a request. Gives up the lead before, where it may take long, and where it has to wait for blocks from
    /// elsewhere.
    fn carry_out<'a>(
        self: &'a Arc<Self>,
        lead: MutexGuard<'a, ()>,
        memory: &Memory,
        head: u16,
        buffer: &mut Vec<u8>,
    ) -> Option<MutexGuard<'a, ()>> {
        let parts = &self.parts;
        let table = self.ring.lock().table();
        let (chain, request) = match understand(&parts.disk, memory, table, head) {
            Understood::Request(chain, request) => (chain, request),
            Understood::Answered(len) => {
                self.put(memory, head, len);
                return Some(lead);
            }
        };
        let class = class(&request, parts.durability);
        let mut kept = Some(lead);
        if self.pace.is_slow(class) {
            self.hand_over(&mut kept);
        }
        let began = Instant::now();
        if matches!(request, Request::Flush) {
            crash_point::here("vhost: flush");
        }
        let mut executor = Executor {
            disk: &parts.disk,
            memory,
            durability: parts.durability,
            ends: &|| parts.leaves && self.stopping(),
            buffer,
        };
        let mut execute = || executor.execute(&chain, &request);
        let at_once = match kept {
            Some(_) => unless_it_stalls(&mut execute),
            None => None,
        };
        let outcome = at_once.unwrap_or_else(|| {
            self.hand_over(&mut kept);
            execute()
        });
        self.pace.record(class, began.elapsed());
        match outcome {
            Outcome::Done(status) => {
                let device = &*parts.disk.device;
                if let Some(expected) = expects_flush(device, &request, parts.durability) {
                    self.expects_flush.store(expected, SeqCst);
                }
                let len = answer(&parts.disk, memory, &chain, status);
                self.put(memory, head, len);
            }
            Outcome::Left => {
                tracing::info!(head, "a write waits for room, and for the next server")
            }
        }
        kept
    }

    /// Gives up the lead, unless it was given up before.
    fn hand_over(self: &Arc<Self>, kept: &mut Option<MutexGuard<'_, ()>>) {
        if kept.take().is_some() {
            self.want_follower();
        }
    }

    /// Sees to it that somebody takes requests while this thread does not.
    fn want_follower(self: &Arc<Self>) {
        let enough = self.followers.load(SeqCst) > 0
            || self.stopping()
            || self.live.load(SeqCst) >= self.most;
        if enough {
            return;
        }
        if let Err(error) = self.add_thread() {
            tracing::warn!("a queue has to do with fewer threads: {error}");
        }
    }

    fn put(&self, memory: &Memory, head: u16, len: u32) {
        let answered = self.ring.lock().answer(memory, head, len);
        if let Err(error) = answered {
            self.give_up(&error);
        }
    }
}
