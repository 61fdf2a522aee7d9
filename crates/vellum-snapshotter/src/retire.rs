//! What comes after an answer: devices are detached, removed layers deleted, committed layers given
//! their checksums. All of it may be cut off: the next start finds what is left to do.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::mounts::Mounts;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::complete::complete_layer;
use vellum_store::{PruneReport, Store};

/// A device that is still in use is looked at again after this long.
const RETRY: Duration = Duration::from_secs(2);
/// How long the end of the snapshotter waits for devices in use, and between two looks at them.
const GRACE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);
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
    /// Its device was in use before.
    pub retried: bool,
}

#[derive(Debug, Default)]
struct Queue {
    ready: VecDeque<Job>,
    /// Devices that were in use, and when to look again.
    later: Vec<(Instant, Job)>,
    /// Jobs that are being carried out, and those of them whose device was in use before.
    running: usize,
    retrying: usize,
    stopping: bool,
    removals: Removals,
}

/// Layers whose removal is under way: a sweep that comes upon them has found no crash's rests.
#[derive(Debug, Default)]
struct Removals {
    expected: HashSet<Uuid>,
    /// Removed while a sweep ran.
    done: HashSet<Uuid>,
    sweeps: usize,
}

impl Removals {
    fn finish(&mut self, layer: Uuid) {
        if self.expected.remove(&layer) && self.sweeps > 0 {
            self.done.insert(layer);
        }
    }

    /// What a sweep that ends now found of a crash's, by the names of what it removed.
    fn end_sweep(&mut self, report: &PruneReport) -> (usize, usize) {
        let known = |id: &Uuid| self.expected.contains(id) || self.done.contains(id);
        let layers = report.layers.iter().filter(|layer| !known(layer)).count();
        let others = report.leftovers.iter().filter(|name| {
            let last = name.rsplit('/').next().unwrap_or_default();
            !Uuid::parse_str(last).is_ok_and(|id| known(&id))
        });
        let counts = (layers, others.count());
        self.sweeps -= 1;
        if self.sweeps == 0 {
            self.done.clear();
        }
        counts
    }
}

impl Queue {
    /// What to do now. What waits comes before what was in use when it was looked at: however many
    /// of those there are, they keep nobody waiting.
    fn take(&mut self, now: Instant) -> Option<Job> {
        let job = self.ready.pop_front().or_else(|| {
            let due = self.later.iter().position(|(at, _)| *at <= now)?;
            Some(self.later.swap_remove(due).1)
        })?;
        self.running += 1;
        self.retrying += usize::from(job.retried);
        Some(job)
    }

    /// True when all is done but what was in use.
    fn is_drained(&self) -> bool {
        self.ready.is_empty() && self.running == self.retrying
    }
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

    /// Says that the record that names these layers is about to go, and a [`Job`] to follow.
    pub fn announce(&self, layers: &[Uuid]) {
        self.shared.queue.lock().removals.expected.extend(layers);
    }

    /// Takes back what was [announced](Retirer::announce) of layers that stay.
    pub fn retract(&self, layers: &[Uuid]) {
        let mut queue = self.shared.queue.lock();
        for layer in layers {
            queue.removals.expected.remove(layer);
        }
    }

    /// True where the removal of one of these layers is under way.
    pub fn removes_any(&self, layers: &[Uuid]) -> bool {
        let queue = self.shared.queue.lock();
        let mut layers = layers.iter();
        layers.any(|layer| queue.removals.expected.contains(layer))
    }

    /// Has it done soon.
    pub fn push(&self, job: Job) {
        let mut queue = self.shared.queue.lock();
        queue.removals.expected.extend(&job.discard);
        queue.ready.push_back(job);
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Waits until nothing is left to do but what is in use, at most `limit`; says whether that
    /// is so.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut queue = self.shared.queue.lock();
        while !queue.is_drained() {
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

    /// Has what was in use looked at again now, as if for the first time.
    fn retry_now(&self) {
        let mut queue = self.shared.queue.lock();
        let later = std::mem::take(&mut queue.later);
        queue.ready.extend(later.into_iter().map(|(_, job)| Job {
            retried: false,
            ..job
        }));
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Does what can be done within `limit` and ends the threads. What is in use for a moment (a
    /// namespace that is being made has copies of all mounts) gets some more.
    pub fn stop(mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let grace = Instant::now() + GRACE.min(limit);
        let drained = loop {
            self.retry_now();
            let drained = self.drain(deadline.saturating_duration_since(Instant::now()));
            let done = self.shared.queue.lock().later.is_empty();
            if !drained || done || Instant::now() >= grace {
                break drained;
            }
            std::thread::sleep(PAUSE);
        };
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
            let retried = job.retried;
            self.carry_out(job);
            let mut queue = self.queue.lock();
            queue.running -= 1;
            queue.retrying -= usize::from(retried);
            drop(queue);
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(job) = queue.take(Instant::now()) {
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
        complete_layer(&self.store, layer)
    }

    fn later(&self, mut job: Job) {
        job.retried = true;
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
            self.queue.lock().removals.finish(layer);
            crash_point::here("retire: layer discarded");
        }
        if job.sweep {
            self.sweep();
        }
    }

    fn sweep(&self) {
        self.queue.lock().removals.sweeps += 1;
        let swept = self.store.sweep();
        let empty = PruneReport::default();
        let report = swept.as_ref().unwrap_or(&empty);
        let (layers, others) = self.queue.lock().removals.end_sweep(report);
        if layers + others > 0 {
            tracing::info!(layers, others, "removed what a crash left");
        }
        match swept {
            // Somebody makes a layer at this moment.
            Ok(report) if report.busy => self.later(Job {
                sweep: true,
                ..Job::default()
            }),
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "what crashes left is not removed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u128) -> Job {
        Job {
            id: Some(Uuid::from_u128(id)),
            ..Job::default()
        }
    }

    #[test]
    fn devices_in_use_keep_neither_other_jobs_nor_a_cleanup_waiting() {
        let mut queue = Queue::default();
        let now = Instant::now();
        for id in 0..100 {
            let retried = Job {
                retried: true,
                ..job(id)
            };
            queue.later.push((now, retried));
        }
        queue.ready.push_back(job(1000));
        assert_eq!(queue.take(now), Some(job(1000)), "before those in use");
        assert!(!queue.is_drained(), "it is being carried out");
        queue.running -= 1;
        assert!(queue.take(now).is_some_and(|job| job.retried));
        assert!(queue.is_drained(), "all that is left was in use");
    }

    #[test]
    fn a_sweep_takes_no_removal_that_is_under_way_for_the_rest_of_a_crash() {
        let [queued, removed, orphan] = [1, 2, 3].map(Uuid::from_u128);
        let mut removals = Removals::default();
        removals.expected.extend([queued, removed]);
        removals.sweeps += 1;
        removals.finish(removed);
        let report = PruneReport {
            layers: vec![queued, removed, orphan],
            leftovers: vec![format!("trash/{removed}"), format!("staging/{orphan}")],
            ..PruneReport::default()
        };
        assert_eq!(removals.end_sweep(&report), (1, 1));
        assert!(removals.done.is_empty() && removals.expected.contains(&queued));
    }
}
