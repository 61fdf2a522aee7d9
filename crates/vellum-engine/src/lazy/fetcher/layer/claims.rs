//! Who waits for windows of a layer, who is at which, and what goes into one request.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use super::super::coming::Coming;
use super::Incoming;

/// Stored bytes that one request asks for, at most, but for a single window.
const MAX_REQUEST: u64 = 4 << 20;
/// As that, of one that nobody waits for: whoever wants something meanwhile has to share the link with it.
const REQUEST_IN_BACKGROUND: u64 = 1 << 20;
/// Windows that are fetched ahead of one who reads in order, at most.
const MAX_AHEAD: u32 = 32;

#[derive(Default)]
pub(super) struct State {
    /// Windows that somebody fetches.
    pub on_their_way: BTreeSet<u32>,
    /// When those who wait began, by the order in which they came.
    pub waiting: BTreeMap<u64, Instant>,
    came: u64,
    pub error: Option<String>,
    /// Where one who reads in order reads next, and how much is fetched for them.
    next: u32,
    ahead: u32,
    /// Hot packs that may bring windows.
    pub packs: Vec<Arc<Coming>>,
}

impl State {
    /// Those of these windows that nobody fetches.
    pub fn free(&self, missing: &[u32]) -> impl Iterator<Item = u32> {
        let missing = missing.iter().copied();
        missing.filter(|window| !self.on_their_way.contains(window))
    }

    /// Whether a hot pack is about to bring a window.
    pub fn comes_soon(&self, layer: Uuid, window: u32) -> bool {
        let mut packs = self.packs.iter();
        packs.any(|pack| pack.brings_soon(layer, window))
    }
}

/// One who waits.
pub(super) struct Waiter<'a> {
    layer: &'a Incoming,
    number: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.layer.state.lock().waiting.remove(&self.number);
    }
}

/// Windows that this thread fetches; whoever waits for them looks again when it is dropped.
pub(in super::super) struct Claim<'a> {
    layer: &'a Incoming,
    pub windows: Vec<u32>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.layer.state.lock();
        for window in &self.windows {
            state.on_their_way.remove(window);
        }
        self.layer.changed.notify_all();
    }
}

impl Incoming {
    pub(super) fn wait(&self) -> Waiter<'_> {
        let mut state = self.state.lock();
        let number = state.came;
        state.came += 1;
        state.waiting.insert(number, Instant::now());
        Waiter {
            layer: self,
            number,
        }
    }

    /// Takes the first of those windows that nobody fetches, with what follows it and can come in the same
    /// request; `None` where others fetch all of them.
    pub(in super::super) fn claim(&self, missing: &[u32]) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        let first = self.first_to_fetch(&state, missing)?;
        let last = *missing.last()?;
        state.ahead = match state.next == first {
            true => (state.ahead * 2).clamp(1, MAX_AHEAD),
            false => 0,
        };
        let end = last.saturating_add(state.ahead);
        let windows = self.neighbours(&state, first..=end, MAX_REQUEST);
        state.next = windows.last().map_or(first, |last| last + 1);
        Some(self.take(&mut state, windows))
    }

    /// As [`Incoming::claim`], for nobody who reads.
    pub(super) fn claim_next(&self) -> Option<Claim<'_>> {
        let missing = self.lazy.missing();
        let mut state = self.state.lock();
        let first = self.first_to_fetch(&state, &missing)?;
        let windows = self.neighbours(&state, first..=u32::MAX, REQUEST_IN_BACKGROUND);
        Some(self.take(&mut state, windows))
    }

    /// The first of those windows that nobody fetches, and that has not come since somebody saw it missing.
    fn first_to_fetch(&self, state: &State, missing: &[u32]) -> Option<u32> {
        let mut free = state.free(missing);
        free.find(|window| !self.lazy.is_here(*window))
    }

    /// The first of those windows, with what follows it and fits in a request of `most` bytes.
    fn neighbours(&self, state: &State, range: RangeInclusive<u32>, most: u64) -> Vec<u32> {
        let mut windows = Vec::new();
        let mut bytes = 0;
        for (number, window) in self.windows.range(range) {
            // Chunks of neighbours lie next to each other; one that is here, or on its way, ends the request.
            bytes += u64::from(window.chunk.len);
            let more = windows.is_empty() || bytes <= most;
            if !more || state.on_their_way.contains(number) || self.lazy.is_here(*number) {
                break;
            }
            if !windows.is_empty() && state.comes_soon(self.layer, *number) {
                break;
            }
            windows.push(*number);
        }
        windows
    }

    pub(super) fn take(&self, state: &mut State, windows: Vec<u32>) -> Claim<'_> {
        state.on_their_way.extend(&windows);
        Claim {
            layer: self,
            windows,
        }
    }
}
