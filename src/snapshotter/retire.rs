//! What comes after an answer: devices are detached, removed layers deleted, committed layers given
//! their checksums. All of it may be cut off: the next start finds what is left to do.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::mounts::Mounts;
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

    fn carry_out(&self, job: Job) {
        if let Some(id) = job.id {
            match self.mounts.release(id) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::InUse => {
                    tracing::debug!(%id, %error, "still in use");
                    self.queue.lock().later.push((Instant::now() + RETRY, job));
                    return;
                }
                Err(error) => {
                    // Its layers stay too: something may still read them.
                    tracing::warn!(%id, %error, "a device was not detached: the next start tries again");
                    return;
                }
            }
        }
        for layer in job.discard {
            if let Err(error) = self.store.discard_snapshot_layer(layer) {
                tracing::warn!(%layer, %error, "a layer was not removed");
            }
        }
        for layer in job.checksum {
            let dir = self.store.layer_dir(layer);
            // The count first: a layer without checksums is done again at the next start.
            let counted = count_layer(&self.store, layer);
            match counted
                .and_then(|()| seal_in_place(&**self.store.storage(), &dir, |_| {}).map(drop))
            {
                Ok(()) => {}
                // Removed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => tracing::error!(%layer, %error, "a layer got no checksums"),
            }
        }
    }
}
