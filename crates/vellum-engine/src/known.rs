//! What the rows of a list ask of the store again and again, read once: every image on a layer wants
//! its size, every snapshot the bytes of all that it was made from.

use std::cell::{OnceCell, RefCell};
use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::lazy::{Waiting, waiting};
use vellum_core::layer::Header;
use vellum_store::{SnapshotRecord, Store};

/// The memory of one list.
#[derive(Debug)]
pub struct Known<'a> {
    store: &'a Store,
    snapshots: HashMap<&'a str, &'a SnapshotRecord>,
    bytes: RefCell<HashMap<Uuid, u64>>,
    depths: RefCell<HashMap<Uuid, usize>>,
    totals: RefCell<HashMap<&'a str, u64>>,
    /// Who waits for blocks of lazy layers.
    waiting: OnceCell<Vec<Waiting>>,
}

impl<'a> Known<'a> {
    /// Nothing is known yet; `snapshots` are all of the store.
    pub fn new(store: &'a Store, snapshots: &'a [SnapshotRecord]) -> Self {
        let by_key = snapshots.iter().map(|record| (record.key.as_str(), record));
        Known {
            store,
            snapshots: by_key.collect(),
            bytes: RefCell::default(),
            depths: RefCell::default(),
            totals: RefCell::default(),
            waiting: OnceCell::new(),
        }
    }

    /// In words, who waits for a registry to bring blocks of these layers, for how long and why.
    pub fn waiting_for(&self, layers: &[Uuid]) -> Option<String> {
        let waiting = self.waiting.get_or_init(|| {
            let asked = waiting(&self.store.runs());
            asked.unwrap_or_else(|error| {
                tracing::warn!("who waits for a registry is not known: {error}");
                Vec::new()
            })
        });
        let waits = |one: &&Waiting| one.requests > 0 && layers.contains(&one.layer);
        let ours = waiting.iter().filter(waits);
        let (mut requests, mut longest) = (0, None);
        for one in ours {
            requests += one.requests;
            longest = longest.max(Some((one.seconds, &one.error)));
        }
        let (seconds, error) = longest?;
        let plural = if requests == 1 { "" } else { "s" };
        let why = error
            .as_ref()
            .map_or(String::new(), |error| format!(": {error}"));
        Some(format!(
            "waiting for registry {seconds} s ({requests} read{plural}){why}"
        ))
    }

    /// The store.
    pub fn store(&self) -> &'a Store {
        self.store
    }

    /// Bytes of data in these layers; one that cannot be read counts as none.
    pub fn bytes_of(&self, layers: &[Uuid]) -> u64 {
        let mut known = self.bytes.borrow_mut();
        let mut bytes = |layer: &Uuid| {
            let read = || self.store.layer_info(*layer).map_or(0, |info| info.bytes);
            *known.entry(*layer).or_insert_with(read)
        };
        layers.iter().map(&mut bytes).sum()
    }

    /// Layers of the chain that ends in `top`; 0 where one of them cannot be read.
    pub fn depth(&self, top: Uuid) -> usize {
        let mut known = self.depths.borrow_mut();
        let mut above = Vec::new();
        let mut seen = HashSet::new();
        let mut at = Some(top);
        let mut depth = Some(0);
        while let Some(layer) = at {
            if let Some(&there) = known.get(&layer) {
                depth = Some(there).filter(|there| *there > 0);
                break;
            }
            above.push(layer);
            let header = Header::read(&**self.store.storage(), &self.store.layer_dir(layer));
            match header {
                // Its own ancestor is nobody's.
                Ok(header) if seen.insert(layer) => at = header.parent,
                _ => {
                    depth = None;
                    break;
                }
            }
        }
        for layer in above.into_iter().rev() {
            depth = depth.map(|depth| depth + 1);
            known.insert(layer, depth.unwrap_or(0));
        }
        depth.unwrap_or(0)
    }

    /// Bytes of the snapshot with this key and of all that it was made from.
    pub fn total(&self, key: Option<&str>) -> u64 {
        let mut known = self.totals.borrow_mut();
        let mut above = Vec::new();
        let mut seen = HashSet::new();
        let mut at = key;
        let mut total = 0;
        // Each has a parent that is older than itself, so this ends; records may be damaged though.
        while let Some((key, record)) = at.and_then(|key| self.snapshots.get_key_value(key)) {
            if let Some(there) = known.get(key) {
                total = *there;
                break;
            }
            if !seen.insert(*key) {
                break;
            }
            above.push((*key, record.bytes));
            at = record.parent.as_deref();
        }
        for (key, bytes) in above.into_iter().rev() {
            total += bytes;
            known.insert(key, total);
        }
        total
    }
}
