//! What comes after an answer: devices are detached, removed layers deleted, committed layers given
//! their checksums. All of it may be cut off: the next start finds what is left to do.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::mounts::Mounts;
use crate::crash_point;
use crate::engine::check::count_layer;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::seal_in_place;
use crate::store::Store;

/// A device that is still in use is looked at again after this long.
const RETRY: Duration = Duration::from_secs(2);
const THREADS: usize = 2;

/// What is to be done once a device is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Job {
    /// The snapshot whose device and mount are not needed any more.
    pub id: Option<Uuid>,
    /// Committed layers that get their checksums.
    pub checksum: Vec<Uuid>,
    /// Layers that no record names.
    pub discard: Vec<Uuid>,
    /// Then remove everything that no record names: what it was, a killed process knew.
    pub sweep: bool,
}

#[derive(Debug, Default)]
struct Queue {
    ready: VecDeque<Job>,
    /// Devices that were in use, and when to look again.
    later: Vec<(Instant, Job)>,
    running: usize,
    stopping: bool,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    mounts: Mounts,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// The threads that do it.
#[derive(Debug)]
pub struct Retirer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Retirer {
    /// Starts the threads.
    ///
    /// # Errors
    /// Where the host refuses a thread.
    pub fn start(store: &Store, mounts: &Mounts) -> Result<Self> {
        let shared = Arc::new(Shared {
            store: store.clone(),
            mounts: mounts.clone(),
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut threads = Vec::new();
        for _ in 0..THREADS {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("retire".into());
            let thread = thread.spawn(move || shared.work());
            threads.push(thread.map_err(|error| Error::io("a thread cannot be started", error))?);
        }
        Ok(Retirer { shared, threads })
    }

    /// Has it done soon.
    pub fn push(&self, job: Job) {
        self.shared.queue.lock().ready.push_back(job);
        self.shared.changed.notify_all();
    }

    /// Waits until nothing is left to do but what is in use, at most `limit`; says whether that
    /// is so.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut queue = self.shared.queue.lock();
        while !queue.ready.is_empty() || queue.running > 0 {
            let waited = self.shared.changed.wait_until(&mut queue, deadline);
            if waited.timed_out() {
                return false;
            }
        }
        true
    }

    /// Jobs that are not done, those on devices in use included.
    pub fn backlog(&self) -> usize {
        let queue = self.shared.queue.lock();
        queue.ready.len() + queue.later.len() + queue.running
    }

    /// Does what can be done within `limit` and ends the threads.
    pub fn stop(mut self, limit: Duration) {
        // What was in use a moment ago may not be any more.
        {
            let mut queue = self.shared.queue.lock();
            let later = std::mem::take(&mut queue.later);
            queue.ready.extend(later.into_iter().map(|(_, job)| job));
            self.shared.changed.notify_all();
        }
        let drained = self.drain(limit);
        self.shared.queue.lock().stopping = true;
        self.shared.changed.notify_all();
        if drained {
            for thread in self.threads.drain(..) {
                // A thread that panicked has said so.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next() {
            self.carry_out(job);
            self.queue.lock().running -= 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopping {
                return None;
            }
            let now = Instant::now();
            let due = queue.later.iter().position(|(at, _)| *at <= now);
            let job = match due {
                Some(due) => Some(queue.later.swap_remove(due).1),
                None => queue.ready.pop_front(),
            };
            if let Some(job) = job {
                queue.running += 1;
                return Some(job);
            }
            match queue.later.iter().map(|(at, _)| *at).min() {
                Some(at) => {
                    self.changed.wait_until(&mut queue, at);
                }
                None => self.changed.wait(&mut queue),
            }
        }
    }

    /// Gives a sealed layer what it got no time for at the commit: its size in its description,
    /// then checksums, by which a later start tells that it is done.
    fn complete(&self, layer: Uuid) -> Result<()> {
        count_layer(&self.store, layer)?;
        let dir = self.store.layer_dir(layer);
        seal_in_place(&**self.store.storage(), &dir, |_| {}).map(drop)
    }

    fn later(&self, job: Job) {
        self.queue.lock().later.push((Instant::now() + RETRY, job));
    }

    fn carry_out(&self, mut job: Job) {
        let mut in_use = false;
        if let Some(id) = job.id {
            match self.mounts.release(id) {
                Ok(()) => crash_point::here("retire: released"),
                Err(error) if error.kind() == ErrorKind::InUse => {
                    tracing::debug!(%id, %error, "still in use");
                    in_use = true;
                }
                Err(error) => {
                    // Its layers stay too: something may still read them.
                    tracing::warn!(%id, %error, "a device was not detached: the next start tries again");
                    return;
                }
            }
        }
        // Sealed layers do not change, so this need not wait for those who read them.
        for layer in std::mem::take(&mut job.checksum) {
            match self.complete(layer) {
                Ok(()) => {}
                // Removed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => tracing::error!(%layer, %error, "a layer got no checksums"),
            }
            crash_point::here("retire: checksums made");
        }
        if in_use {
            return self.later(job);
        }
        for layer in std::mem::take(&mut job.discard) {
            if let Err(error) = self.store.discard_layer(layer) {
                tracing::warn!(%layer, %error, "a layer was not removed");
            }
            crash_point::here("retire: layer discarded");
        }
        if job.sweep {
            match self.store.sweep() {
                // Somebody makes a layer at this moment.
                Ok(report) if report.busy => self.later(Job {
                    sweep: true,
                    ..Job::default()
                }),
                Ok(report) => {
                    if !report.layers.is_empty() || !report.leftovers.is_empty() {
                        tracing::info!(
                            layers = report.layers.len(),
                            others = report.leftovers.len(),
                            "removed what a crash left"
                        );
                    }
                }
                Err(error) => tracing::error!(%error, "what crashes left is not removed"),
            }
        }
    }
}
