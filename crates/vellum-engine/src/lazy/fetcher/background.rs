//! Layers are completed although nobody waits for them. docs/lazy.md, "In the background".

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use super::super::Remote;
use super::super::stall::Pauses;
use super::Fetcher;
use vellum_base::error::Result;

/// How long it waits for those who read, and for something to do.
const PAUSE: Duration = Duration::from_millis(50);
/// After failing for so long it counts as idle: the next fetcher begins again.
const PATIENCE: Duration = Duration::from_secs(600);

/// What is to be completed.
#[derive(Debug, Default)]
pub(super) struct Background {
    queue: Mutex<VecDeque<(Uuid, Option<NonZeroU64>)>>,
    stopped: AtomicBool,
    /// Since when nothing came, while something should.
    failing: Mutex<Option<Instant>>,
}

impl Background {
    /// Looks for layers of the store that are to be completed.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn look(&self, fetcher: &Fetcher) -> Result<()> {
        let store = &fetcher.store;
        for layer in store.layers()? {
            let dir = store.layer_dir(layer);
            let Some(background) = Remote::background(&**store.storage(), &dir) else {
                continue;
            };
            let mut queue = self.queue.lock();
            if queue.iter().all(|(known, _)| *known != layer) {
                queue.push_back((layer, background.rate));
            }
        }
        Ok(())
    }

    /// Whether something is to be done that can be done.
    pub fn is_busy(&self) -> bool {
        let failing = *self.failing.lock();
        let in_vain = failing.is_some_and(|since| since.elapsed() >= PATIENCE);
        !in_vain && !self.queue.lock().is_empty()
    }

    /// Ends [`Background::work`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Brings what is to be completed, piece by piece, whenever nobody waits for anything.
    pub fn work(&self, fetcher: &Fetcher) {
        let mut pauses = Pauses::default();
        while !self.stopped.load(Ordering::Acquire) {
            let first = self.queue.lock().front().copied();
            let Some((layer, rate)) = first.filter(|_| !fetcher.somebody_waits()) else {
                std::thread::sleep(PAUSE);
                continue;
            };
            let began = Instant::now();
            match bring(fetcher, layer) {
                Ok(Some(stored)) => {
                    *self.failing.lock() = None;
                    pauses = Pauses::default();
                    self.keep(rate, stored, began);
                }
                Ok(None) => self.queue.lock().retain(|(one, _)| *one != layer),
                Err(error) => {
                    tracing::warn!(%layer, "in the background: {error}");
                    self.failing.lock().get_or_insert_with(Instant::now);
                    self.rest(pauses.next(None));
                    // Another one may be elsewhere.
                    self.queue.lock().rotate_left(1);
                }
            }
        }
    }

    /// Waits as long as a rate wants.
    fn keep(&self, rate: Option<NonZeroU64>, stored: u64, began: Instant) {
        let Some(rate) = rate else { return };
        let due = Duration::from_secs_f64(stored as f64 / rate.get() as f64);
        self.rest(due.saturating_sub(began.elapsed()));
    }

    fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end && !self.stopped.load(Ordering::Acquire) {
            std::thread::sleep(PAUSE.min(end.saturating_duration_since(Instant::now())));
        }
    }
}

/// Brings the next windows of a layer in one request, and returns how many bytes that were; `None` where all of it is
/// here, or it is gone.
fn bring(fetcher: &Fetcher, layer: Uuid) -> Result<Option<u64>> {
    if !fetcher.store.layer_dir(layer).exists() {
        return Ok(None);
    }
    let Some(open) = fetcher.layer(layer)? else {
        return Ok(None);
    };
    if let Some(stored) = open.bring_next()? {
        return Ok(Some(stored));
    }
    if !open.is_all_here() {
        // Others are at the rest.
        std::thread::sleep(PAUSE);
        return Ok(Some(0));
    }
    fetcher.complete(layer, &open)?;
    Ok(None)
}

/// Runs [`Background::work`] in a thread until it is dropped.
pub(super) struct Worker {
    fetcher: Arc<Fetcher>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn start(fetcher: &Arc<Fetcher>) -> std::io::Result<Self> {
        let own = Arc::clone(fetcher);
        let builder = std::thread::Builder::new().name("background".to_owned());
        Ok(Worker {
            fetcher: Arc::clone(fetcher),
            thread: Some(builder.spawn(move || own.background.work(&own))?),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.fetcher.background.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread for the background panicked");
        }
    }
}
