//! How much fetched blocks take, and which of them go when that is too much. docs/lazy.md, "A bounded cache".

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use uuid::Uuid;

use super::layer::Incoming;

/// Evicted at a time, beyond what has to go: this part of the bound. Each time costs a sync.
const BEYOND: u64 = 16;

/// The windows that may be evicted, of all open layers.
#[derive(Default)]
pub(super) struct Cache {
    state: Mutex<State>,
    /// Held while windows are evicted: whoever wants room then waits until it is there.
    evicting: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Bytes; none is no bound.
    limit: Option<u64>,
    /// Bytes of the windows in the queue, and of those that are being evicted.
    used: u64,
    layers: HashMap<Uuid, Weak<Incoming>>,
    /// The next to go first, unless it was read since it was put here.
    queue: VecDeque<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    layer: Uuid,
    window: u32,
    bytes: u64,
}

fn bytes_of(entries: &[Entry]) -> u64 {
    entries.iter().map(|entry| entry.bytes).sum()
}

impl State {
    fn push(&mut self, layer: Uuid, window: u32, bytes: u64) {
        self.used += bytes;
        self.queue.push_back(Entry {
            layer,
            window,
            bytes,
        });
    }
}

impl Cache {
    /// Sets the bound.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.state.lock().limit = limit;
    }

    /// Whether there is a bound.
    pub fn is_bounded(&self) -> bool {
        self.state.lock().limit.is_some()
    }

    /// Whether windows of a layer may be evicted.
    pub fn holds(&self, layer: Uuid) -> bool {
        self.state.lock().layers.contains_key(&layer)
    }

    /// From now on windows of a layer may be evicted, which nobody has yet: those that are here first.
    pub fn adopt(&self, layer: Uuid, open: &Arc<Incoming>) {
        if self.is_bounded() {
            open.give_back_unknown();
        }
        let mut state = self.state.lock();
        state.layers.insert(layer, Arc::downgrade(open));
        for (window, bytes) in open.held() {
            state.push(layer, window, bytes);
        }
    }

    /// Has those who read note it, so that what is read stays.
    pub fn note_reads(&self) {
        let layers: Vec<_> = self.state.lock().layers.values().cloned().collect();
        for open in layers.iter().filter_map(Weak::upgrade) {
            open.note_reads();
        }
    }

    /// Nothing of a layer is evicted any more.
    pub fn release(&self, layer: Uuid) {
        let mut state = self.state.lock();
        if state.layers.remove(&layer).is_none() {
            return;
        }
        let mut gone = 0;
        state.queue.retain(|entry| {
            let stays = entry.layer != layer;
            gone += if stays { 0 } else { entry.bytes };
            stays
        });
        state.used -= gone;
    }

    /// A window has come.
    pub fn came(&self, layer: Uuid, window: u32, bytes: u64) {
        let mut state = self.state.lock();
        if state.layers.contains_key(&layer) {
            state.push(layer, window, bytes);
        }
    }

    /// Evicts what is too much once `coming` more bytes are here.
    pub fn make_room(&self, coming: u64) {
        if self.excess(coming) == 0 {
            return;
        }
        let _evicting = self.evicting.lock();
        // Others may have made it.
        self.evict_alone(self.excess(coming));
    }

    /// How much is to be evicted before `coming` more bytes are here.
    fn excess(&self, coming: u64) -> u64 {
        let state = self.state.lock();
        let Some(limit) = state.limit else { return 0 };
        match (state.used + coming).saturating_sub(limit) {
            0 => 0,
            excess => excess + limit / BEYOND,
        }
    }

    /// Evicts so many bytes of the windows that were not read for longest, if there are as many.
    pub fn evict(&self, bytes: u64) {
        let _evicting = self.evicting.lock();
        self.evict_alone(bytes);
    }

    /// As [`Cache::evict`], for whoever holds `evicting`.
    fn evict_alone(&self, bytes: u64) {
        let mut left = bytes;
        // Who was read has one more turn, in which it is not asked for that again.
        let mut turns = 2 * self.state.lock().queue.len();
        while left > 0 && turns > 0 {
            let batch = self.take(left, turns);
            if batch.is_empty() {
                return;
            }
            turns -= batch.len();
            let mut layers: BTreeMap<Uuid, Vec<Entry>> = BTreeMap::new();
            for entry in batch {
                layers.entry(entry.layer).or_default().push(entry);
            }
            for (layer, entries) in layers {
                left = left.saturating_sub(self.evict_of(layer, entries));
            }
        }
    }

    /// Takes the next windows from the queue.
    fn take(&self, bytes: u64, most: usize) -> Vec<Entry> {
        let mut state = self.state.lock();
        let mut batch: Vec<Entry> = Vec::new();
        let mut taken = 0;
        while taken < bytes
            && batch.len() < most
            && let Some(entry) = state.queue.pop_front()
        {
            taken += entry.bytes;
            batch.push(entry);
        }
        batch
    }

    /// Evicts windows of a layer; those that were read, or that somebody is at, go behind all others. Returns how many bytes
    /// went.
    fn evict_of(&self, layer: Uuid, entries: Vec<Entry>) -> u64 {
        let open = self.state.lock().layers.get(&layer).and_then(Weak::upgrade);
        let Some(open) = open else {
            // It was opened anew, or removed.
            return self.gone(&entries);
        };
        let windows: Vec<u32> = entries.iter().map(|entry| entry.window).collect();
        let stay = open.evict(&windows);
        let (stay, gone): (Vec<Entry>, Vec<Entry>) = entries
            .into_iter()
            .partition(|entry| stay.contains(&entry.window));
        let mut state = self.state.lock();
        let known = state.layers.get(&layer);
        if known.is_some_and(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(&open))) {
            state.queue.extend(stay);
        } else {
            // Those that it has count anew.
            state.used -= bytes_of(&stay);
        }
        drop(state);
        self.gone(&gone)
    }

    /// These take no space any more. Returns how many bytes that were.
    fn gone(&self, entries: &[Entry]) -> u64 {
        let bytes = bytes_of(entries);
        self.state.lock().used -= bytes;
        bytes
    }
}
