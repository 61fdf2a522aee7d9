//! Who waits for windows of a layer, who is at which, and what goes into one request.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use super::super::coming::Coming;
use super::Incoming;
use super::near::{Near, REGION, Worth};

/// Stored bytes that one request asks for, at most, but for a single window.
const MAX_REQUEST: u64 = 4 << 20;
/// As that, of one that nobody waits for: whoever wants something meanwhile has to share the link with it.
const REQUEST_IN_BACKGROUND: u64 = 1 << 20;
/// Windows that come with one that somebody waits for, in one request: others come beside it.
const AT_ONCE: u32 = 4;

#[derive(Default)]
pub(super) struct State {
    /// Windows that somebody fetches.
    pub on_their_way: BTreeSet<u32>,
    /// When those who wait began, by the order in which they came.
    pub waiting: BTreeMap<u64, Instant>,
    came: u64,
    pub error: Option<String>,
    near: Near,
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

    /// Takes the first of those windows that nobody fetches, with what is near it and can come in the same
    /// request; `None` where others fetch all of them. What else is near comes beside it.
    pub(in super::super) fn claim(&self, missing: &[u32]) -> Option<Claim<'_>> {
        let is_bounded = self.is_bounded();
        let mut state = self.state.lock();
        let first = self.first_to_fetch(&state, missing)?;
        let last = *missing.last()?;
        let worth = self.worth(&mut state, first);
        let most = if is_bounded { REGION } else { AT_ONCE };
        let start = (first - first % most).max(*worth.block.start());
        let end = start.saturating_add(most - 1).min(*worth.block.end());
        let start = self.free_down_to(&state, first, start);
        let windows = self.neighbours(&state, start..=end.max(last), MAX_REQUEST);
        let claim = self.take(&mut state, windows);
        if !is_bounded {
            self.bring_beside(first, &worth);
        }
        Some(claim)
    }

    /// One who reads has come to windows that are on their way: what is behind those comes, too.
    pub(super) fn caught_up(&self, missing: &[u32]) {
        if self.is_bounded() {
            return;
        }
        let mut state = self.state.lock();
        if let Some(first) = self.first_missing(missing) {
            let worth = self.worth(&mut state, first);
            self.bring_beside(first, &worth);
        }
    }

    /// Whether what comes before it is wanted may be evicted before it is read, or evict what is.
    fn is_bounded(&self) -> bool {
        self.is_evictable() && self.cache.is_bounded()
    }

    /// What is worth fetching with a window that is missing.
    fn worth(&self, state: &mut State, window: u32) -> Worth {
        let follows = window.checked_sub(1).is_some_and(|before| {
            self.lazy.is_here(before) || state.on_their_way.contains(&before)
        });
        state.near.missed(window, follows)
    }

    /// Has windows around one that somebody waits for come: first those behind it.
    fn bring_beside(&self, window: u32, worth: &Worth) {
        let (start, end) = (*worth.block.start(), *worth.block.end());
        if let Some(before) = window.checked_sub(1) {
            self.ahead.push(self.layer, start..=before);
        }
        let behind = window.saturating_add(1)..=end.saturating_add(worth.ahead);
        self.ahead.push(self.layer, behind);
    }

    /// The lowest window from which on all up to one that is missing can come with it, not below `start`.
    fn free_down_to(&self, state: &State, window: u32, start: u32) -> u32 {
        let mut bytes = 0;
        let below = self.windows.range(start..window).rev();
        let free = below.take_while(|(number, below)| {
            bytes += u64::from(below.chunk.len);
            // The other half is for the window itself, and what is behind it.
            bytes <= MAX_REQUEST / 2 && self.is_free(state, **number)
        });
        free.last().map_or(window, |(number, _)| *number)
    }

    /// Whether a window is neither here, nor on its way, nor about to come with a hot pack.
    fn is_free(&self, state: &State, number: u32) -> bool {
        !state.on_their_way.contains(&number)
            && !self.lazy.is_here(number)
            && !state.comes_soon(self.layer, number)
    }

    /// As [`Incoming::claim`], for nobody who reads.
    pub(super) fn claim_next(&self) -> Option<Claim<'_>> {
        let missing = self.lazy.missing();
        let mut state = self.state.lock();
        let first = self.first_to_fetch(&state, &missing)?;
        let windows = self.neighbours(&state, first..=u32::MAX, REQUEST_IN_BACKGROUND);
        Some(self.take(&mut state, windows))
    }

    /// As [`Incoming::claim`], of those of a range that nobody waits for.
    pub(super) fn claim_in(&self, range: &RangeInclusive<u32>) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        let mut windows = self.windows.range(range.clone());
        let (first, _) = windows.find(|(number, _)| self.is_free(&state, **number))?;
        let windows = self.neighbours(&state, *first..=*range.end(), REQUEST_IN_BACKGROUND);
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
            let is_free = bytes <= most && self.is_free(state, *number);
            // Whoever chose the first one knows that nobody is at it.
            if !windows.is_empty() && !is_free {
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
