//! What of a layer may go again, for others to have its room.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::super::super::Remote;
use super::{Incoming, bytes_of};
use vellum_base::error::Result;
use vellum_store::Store;

impl Incoming {
    /// Whether windows of it may be evicted.
    pub fn is_evictable(&self) -> bool {
        !self.is_kept.load(Ordering::Acquire)
    }

    /// Looks whether somebody wants all of it by now.
    ///
    /// # Errors
    /// As [`Remote::read`].
    pub fn look_again(&self, store: &Store) -> Result<()> {
        let remote = Remote::read(&**store.storage(), self.lazy.dir())?;
        if remote.is_some_and(|remote| remote.is_kept()) {
            self.is_kept.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The windows that are here, and how many bytes each takes.
    pub fn held(&self) -> Vec<(u32, u64)> {
        let here = self.windows.iter();
        here.filter(|(number, _)| self.lazy.is_here(**number))
            .map(|(number, window)| (*number, bytes_of(window)))
            .collect()
    }

    /// Has readers note what they read.
    pub fn note_reads(&self) {
        if let Err(error) = self.lazy.note_reads() {
            tracing::warn!("reads of a lazy layer are not noted: {error}");
        }
    }

    /// Gives the space back of what is not here. Nobody fetches yet.
    pub fn give_back_unknown(&self) {
        if let Err(error) = self.lazy.evict_unknown() {
            tracing::warn!("what a lazy layer takes that is not here stays: {error}");
        }
    }

    /// Evicts those of these windows that were not read lately and that nobody is at. Returns the others.
    pub fn evict(&self, windows: &[u32]) -> BTreeSet<u32> {
        // Without waiting: whoever retires it may hold what others wait for.
        let retired = self.retired.try_read();
        if retired.as_deref() != Some(&false) {
            return windows.iter().copied().collect();
        }
        let mut stay = self.lazy.take_reads(windows);
        let claim = {
            let mut state = self.state.lock();
            let busy = |window: &&u32| state.on_their_way.contains(window);
            stay.extend(windows.iter().filter(busy));
            let go = windows.iter().filter(|window| !stay.contains(window));
            let go: Vec<u32> = go.copied().collect();
            self.take(&mut state, go)
        };
        if claim.windows.is_empty() {
            return stay;
        }
        // Somebody may want all of it by now.
        let evicted = match self.is_evictable() {
            true => self.lazy.evict(&claim.windows),
            false => Ok(false),
        };
        let evicted = evicted.unwrap_or_else(|error| {
            tracing::error!("windows of a lazy layer are not evicted: {error}");
            false
        });
        if !evicted {
            // They take their space.
            stay.extend(&claim.windows);
        }
        stay
    }
}
