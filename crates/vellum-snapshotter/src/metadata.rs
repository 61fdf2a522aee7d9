//! What containerd knows of snapshots: the records, by key, in memory; each change is on disk
//! before it is seen.

use std::collections::{HashMap, HashSet};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::{SnapshotKind, SnapshotRecord, Store};

#[derive(Debug)]
struct Entry {
    record: SnapshotRecord,
    /// False while it is being made: others must not see it, but the key is taken and the parent
    /// is in use.
    visible: bool,
    /// True while it is being removed: nothing can be made from it any more.
    going: bool,
}

/// The snapshots of a store.
#[derive(Debug, Default)]
pub struct Index {
    entries: Mutex<HashMap<String, Entry>>,
    busy: Mutex<HashSet<String>>,
    freed: Condvar,
}

/// Keeps others from changing the snapshot of a key, until it is dropped.
#[derive(Debug)]
pub struct KeyLock<'a> {
    index: &'a Index,
    key: String,
}

impl Drop for KeyLock<'_> {
    fn drop(&mut self) {
        self.index.busy.lock().remove(&self.key);
        self.index.freed.notify_all();
    }
}

fn not_found(key: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("snapshot {key:?}: not found"))
}

fn exists(key: &str) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("snapshot {key:?}: already exists"),
    )
}

impl Index {
    /// Reads all records of the store. One that is damaged is left out and said so.
    ///
    /// # Errors
    /// Where their directory cannot be read.
    pub fn load(store: &Store) -> Result<Self> {
        let index = Index::default();
        let records = store.snapshots(|error| {
            tracing::error!(%error, "a snapshot is left out: its record is damaged");
        })?;
        let mut entries = index.entries.lock();
        for record in records {
            let entry = Entry {
                record,
                visible: true,
                going: false,
            };
            entries.insert(entry.record.key.clone(), entry);
        }
        drop(entries);
        Ok(index)
    }

    /// Waits until nobody else changes the snapshot of that key.
    pub fn lock_key(&self, key: &str) -> KeyLock<'_> {
        let mut busy = self.busy.lock();
        while !busy.insert(key.to_owned()) {
            self.freed.wait(&mut busy);
        }
        KeyLock {
            index: self,
            key: key.to_owned(),
        }
    }

    /// The snapshot of that key.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn get(&self, key: &str) -> Result<SnapshotRecord> {
        let entries = self.entries.lock();
        let entry = entries.get(key).filter(|entry| entry.visible);
        entry
            .map(|entry| entry.record.clone())
            .ok_or_else(|| not_found(key))
    }

    /// All snapshots, by key.
    pub fn all(&self) -> Vec<SnapshotRecord> {
        let entries = self.entries.lock();
        let visible = entries.values().filter(|entry| entry.visible);
        let mut all: Vec<SnapshotRecord> = visible.map(|entry| entry.record.clone()).collect();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }

    /// The committed snapshot that another can be made from.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for one that is not committed.
    pub fn parent(&self, key: &str) -> Result<SnapshotRecord> {
        parent_in(&self.entries.lock(), key)
    }

    /// Takes the record's key and holds its parent, without showing it yet.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for the key; as [`Index::parent`].
    pub fn reserve(&self, record: &SnapshotRecord) -> Result<()> {
        let mut entries = self.entries.lock();
        if entries.contains_key(&record.key) {
            return Err(exists(&record.key));
        }
        if let Some(parent) = &record.parent {
            parent_in(&entries, parent)?;
        }
        let entry = Entry {
            record: record.clone(),
            visible: false,
            going: false,
        };
        entries.insert(record.key.clone(), entry);
        Ok(())
    }

    /// Shows a record, new or changed, under its key; what was under `old` is gone then.
    pub fn show(&self, record: SnapshotRecord, old: Option<&str>) {
        let mut entries = self.entries.lock();
        if let Some(old) = old {
            entries.remove(old);
        }
        let entry = Entry {
            visible: true,
            going: false,
            record,
        };
        entries.insert(entry.record.key.clone(), entry);
    }

    /// Gives a key up.
    pub fn forget(&self, key: &str) {
        self.entries.lock().remove(key);
    }

    /// Begins to remove a snapshot: nothing can be made from it any more.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] while others were made from it.
    pub fn begin_removal(&self, key: &str) -> Result<SnapshotRecord> {
        let mut entries = self.entries.lock();
        let children: Vec<String> = entries
            .values()
            .filter(|entry| entry.record.parent.as_deref() == Some(key))
            .map(|entry| format!("{:?}", entry.record.key))
            .take(3)
            .collect();
        let entry = entries.get_mut(key).filter(|entry| entry.visible);
        let entry = entry.ok_or_else(|| not_found(key))?;
        if !children.is_empty() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "cannot remove snapshot {key:?}: others are made from it ({})",
                    children.join(", ")
                ),
            ));
        }
        entry.going = true;
        Ok(entry.record.clone())
    }

    /// Takes [`Index::begin_removal`] back.
    pub fn keep(&self, key: &str) {
        if let Some(entry) = self.entries.lock().get_mut(key) {
            entry.going = false;
        }
    }

    /// True when a snapshot names the layer, or lies on it.
    pub fn lies_on(&self, layer: Uuid) -> bool {
        let entries = self.entries.lock();
        entries
            .values()
            .any(|entry| entry.record.base == layer || entry.record.layers.contains(&layer))
    }

    /// True when a snapshot other than `id` names the layer.
    pub fn names_layer(&self, layer: Uuid, id: Uuid) -> bool {
        let entries = self.entries.lock();
        entries
            .values()
            .any(|entry| entry.record.id != id && entry.record.layers.contains(&layer))
    }
}

fn parent_in(entries: &HashMap<String, Entry>, key: &str) -> Result<SnapshotRecord> {
    let entry = entries
        .get(key)
        .filter(|entry| entry.visible && !entry.going)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("parent {key:?}: not found")))?;
    if entry.record.kind != SnapshotKind::Committed {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("parent {key:?} is not a committed snapshot"),
        ));
    }
    Ok(entry.record.clone())
}
