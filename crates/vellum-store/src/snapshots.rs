//! What the store remembers of containerd's snapshots.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{PlacedLayer, Store, StoreGuard};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::run_dir::SNAPSHOT_MOUNTS;

const DIRECTORY: &str = "snapshots";

/// The kinds of containerd's snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// Read-only, made to look at its parent.
    View,
    /// Writable.
    Active,
    /// Never changes again; others can be made from it.
    Committed,
}

/// A snapshot: its name in containerd and the layers that it added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// containerd's key: any text.
    pub key: String,
    /// Names the record's file, the mount and the device; stays when a commit changes the key.
    pub id: Uuid,
    /// What it is.
    pub kind: SnapshotKind,
    /// Key of the snapshot that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The sealed layer that it lies on: its parent's last, or a template.
    pub base: Uuid,
    /// Its own layers from the bottom up: none for a view, more than one only where a commit was
    /// cut off, or where a registry's blocks stand for those of a parent that was unpacked.
    #[serde(default)]
    pub layers: Vec<Uuid>,
    /// Size of its device in bytes.
    pub virtual_size: u64,
    /// Bytes of data in its layers, known once it is committed.
    #[serde(default)]
    pub bytes: u64,
    /// Inodes in use in the file system that it was made from; `None` where nobody counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_inodes: Option<u64>,
    /// Inodes in use in its file system, known once it is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inodes: Option<u64>,
    /// containerd mounts its block device itself; it is not mounted below the store.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub device: bool,
    /// containerd's labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it got its kind.
    pub created: SystemTime,
    /// When its labels changed last.
    pub updated: SystemTime,
}

impl SnapshotRecord {
    /// The layer that a child lies on.
    pub fn top(&self) -> Uuid {
        self.layers.last().copied().unwrap_or(self.base)
    }
}

impl Store {
    /// Makes the directory of the snapshots' records where it is missing.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn prepare_snapshots(&self) -> Result<()> {
        let dir = self.root.join(DIRECTORY);
        match self.storage.create_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Error::io(format!("cannot make {}", dir.display()), error)),
            Ok(()) => self
                .storage
                .sync_dir(&self.root)
                .context(|| format!("cannot sync {}", self.root.display())),
        }
    }

    fn snapshot_path(&self, id: Uuid) -> PathBuf {
        self.root.join(DIRECTORY).join(format!("{id}.json"))
    }

    /// All snapshots; a record that cannot be read is passed to `damaged` and left out. A store
    /// that no snapshotter has used has none.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn snapshots(&self, damaged: impl FnMut(Error)) -> Result<Vec<SnapshotRecord>> {
        let dir = self.root.join(DIRECTORY);
        let there = self
            .storage
            .exists(&dir)
            .context(|| format!("cannot stat {}", dir.display()))?;
        if !there {
            return Ok(Vec::new());
        }
        self.read_records(DIRECTORY, damaged)
    }

    /// The snapshot with this key. Damaged records are left out.
    ///
    /// # Errors
    /// As [`Store::snapshots`].
    pub fn snapshot(&self, key: &str) -> Result<Option<SnapshotRecord>> {
        let all = self.snapshots(Store::warn_damaged)?;
        Ok(all.into_iter().find(|record| record.key == key))
    }

    /// Where a snapshot is mounted, while it is.
    pub fn snapshot_mount_dir(&self, id: Uuid) -> PathBuf {
        self.root.join(SNAPSHOT_MOUNTS).join(id.to_string())
    }

    /// Why a name is none of a container or image, where it is a snapshot's.
    pub(super) fn snapshot_hint(&self, name: &str) -> Option<Error> {
        let record = self.snapshot(name).ok().flatten()?;
        let what = match record.kind {
            SnapshotKind::Committed => "a layer of an image",
            SnapshotKind::Active | SnapshotKind::View => "a container",
        };
        Some(Error::new(
            ErrorKind::InUse,
            format!(
                "{name} is a snapshot of containerd's, {what} that is its own to change: use \
                 ctr, nerdctl, crictl or docker for that; `vellum inspect {name}` shows it"
            ),
        ))
    }

    /// Adds or replaces the record of a snapshot, durably. Its layers are published, but for `added`, which it
    /// is the first to name, and which is durable with it; `_pin` has kept them.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn put_snapshot(
        &self,
        record: &SnapshotRecord,
        added: Option<&PlacedLayer>,
        _pin: &StoreGuard,
    ) -> Result<()> {
        self.write_json_naming(&self.snapshot_path(record.id), record, added)
    }

    /// Removes the record of a snapshot, durably. Its layers are nobody's then: discard them.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn remove_snapshot(&self, id: Uuid) -> Result<()> {
        self.remove_json(&self.snapshot_path(id))
    }
}
