//! Layers are completed although nobody waits for them. docs/lazy.md, "In the background".

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use super::super::Remote;
use super::super::stall::Pauses;
use super::{Fetcher, PAUSE};
use vellum_base::error::Result;

/// After failing for so long it counts as idle: the next fetcher begins again.
const PATIENCE: Duration = Duration::from_secs(600);

/// What is to be completed.
#[derive(Debug, Default)]
pub(super) struct Background {
    queue: Mutex<VecDeque<(Uuid, Option<NonZeroU64>)>>,
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

    /// Brings what is to be completed, piece by piece, whenever nobody waits for anything.
    pub fn work(&self, fetcher: &Fetcher) {
        let mut pauses = Pauses::default();
        while !fetcher.is_stopped() {
            let first = self.queue.lock().front().copied();
            let Some((layer, rate)) = first.filter(|_| !fetcher.wants_more()) else {
                std::thread::sleep(PAUSE);
                continue;
            };
            let began = Instant::now();
            match bring(fetcher, layer) {
                Ok(Some(stored)) => {
                    *self.failing.lock() = None;
                    pauses = Pauses::default();
                    keep(fetcher, rate, stored, began);
                }
                Ok(None) => self.queue.lock().retain(|(one, _)| *one != layer),
                Err(error) => {
                    tracing::warn!(%layer, "in the background: {error}");
                    self.failing.lock().get_or_insert_with(Instant::now);
                    fetcher.rest(pauses.next(None));
                    // Another one may be elsewhere.
                    self.queue.lock().rotate_left(1);
                }
            }
        }
    }
}

/// Waits as long as a rate wants.
fn keep(fetcher: &Fetcher, rate: Option<NonZeroU64>, stored: u64, began: Instant) {
    let Some(rate) = rate else { return };
    let due = Duration::from_secs_f64(stored as f64 / rate.get() as f64);
    fetcher.rest(due.saturating_sub(began.elapsed()));
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
