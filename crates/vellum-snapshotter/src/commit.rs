//! Commits: an active snapshot becomes a committed one, under those who use it if need be, and what
//! a commit that was cut off left is put right.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::Snapshotter;
use super::failure::{Failure, Result, invalid, request};
use super::retire::Job;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind};
use vellum_core::layer::Header;
use vellum_store::{SnapshotKind, SnapshotRecord};

impl Snapshotter {
    /// Makes the last layer of an active snapshot one that can be written, after a commit was cut
    /// off on either side of the seal. A server that is there writes to the first of the layers
    /// that is not sealed. True where there was none: its device can only be read then.
    pub(super) fn settle(&self, record: &mut SnapshotRecord) -> Result<bool> {
        let sealed = |layer: Uuid| -> vellum_base::Result<bool> {
            let header = Header::read(&**self.store.storage(), &self.store.layer_dir(layer))?;
            Ok(header.sealed)
        };
        let mut layers = Vec::new();
        for layer in &record.layers {
            layers.push(*layer);
            if !sealed(*layer)? {
                break;
            }
        }
        let top = layers.last().copied().unwrap_or(record.base);
        let dropped: Vec<Uuid> = record.layers.iter().skip(layers.len()).copied().collect();
        let ended = sealed(top)?;
        if !ended && dropped.is_empty() {
            return Ok(false);
        }
        let pin = self.store.pin_layers()?;
        let added = match ended {
            true => Some(self.add_layer(top, record.virtual_size, &pin)?),
            false => None,
        };
        layers.extend(added.as_ref().map(|layer| layer.uuid));
        if layers != record.layers {
            tracing::warn!(key = %record.key, "a commit was cut off: goes on as before");
            record.layers = layers;
            self.store.put_snapshot(record, added.as_ref(), &pin)?;
            self.index.show(record.clone(), None);
            self.retirer.push(Job {
                discard: dropped,
                ..Job::default()
            });
        }
        Ok(ended)
    }

    /// Makes the active snapshot `key` the committed snapshot `name`. Also while it is mounted:
    /// its users go on in a layer that is thrown away.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for the name, [`ErrorKind::NotFound`] for the key,
    /// [`ErrorKind::InUse`] (a failed precondition) for one that is not active.
    pub fn commit(&self, name: &str, key: &str, labels: BTreeMap<String, String>) -> Result<()> {
        if name.is_empty() {
            return Err(invalid("a committed snapshot needs a name"));
        }
        let _lock = self.index.lock_key(key);
        let mut record = request(self.index.get(key))?;
        if record.kind != SnapshotKind::Active {
            return Err(Failure::Request(Error::new(
                ErrorKind::InUse,
                format!("snapshot {key:?} is not active: it cannot be committed"),
            )));
        }
        let now = SystemTime::now();
        let mut committed = SnapshotRecord {
            key: name.to_owned(),
            kind: SnapshotKind::Committed,
            labels,
            created: now,
            updated: now,
            ..record.clone()
        };
        request(self.index.reserve(&committed))?;
        let sealed = self.seal(&mut record, &mut committed);
        if let Err(failure) = sealed {
            self.index.forget(name);
            return Err(failure);
        }
        crash_point::here("commit: record in place");
        let job = Job {
            id: Some(record.id),
            checksum: committed.layers.clone(),
            discard: record
                .layers
                .iter()
                .filter(|layer| !committed.layers.contains(layer))
                .copied()
                .collect(),
            ..Job::default()
        };
        self.index.show(committed, Some(key));
        self.retirer.push(job);
        crash_point::here("commit: done");
        Ok(())
    }

    /// Seals the layers of `record` and writes the record `committed` of it.
    fn seal(&self, record: &mut SnapshotRecord, committed: &mut SnapshotRecord) -> Result<()> {
        self.ensure_mounted(record)?;
        let id = record.id;
        if record.device {
            self.mounts.mount_for_commit(record).map_err(|error| {
                match error.kind() {
                    // containerd shall say so, and not take it for a fault of the host.
                    ErrorKind::InUse => Failure::Request(error),
                    _ => Failure::Host(error),
                }
            })?;
        }
        crash_point::here("commit: mounted");
        // A growth may have failed before it came to the layer.
        let top = self.store.layer_dir(record.top());
        let size = Header::read(&**self.store.storage(), &top)?.virtual_size;
        committed.virtual_size = size;
        // A missing number is no reason to fail.
        committed.inodes = self.mounts.inodes(id).ok();
        committed.layers.clone_from(&record.layers);
        let pin = self.store.pin_layers()?;
        if self.mounts.unmount_unshared(id, Duration::ZERO)? {
            crash_point::here("commit: unmounted");
            self.mounts.seal(id)?;
            crash_point::here("commit: sealed");
        } else {
            // Written first: once the top is sealed, its users are in the next.
            let next = self.add_layer(record.top(), size, &pin)?;
            crash_point::here("commit: next layer published");
            record.layers.push(next.uuid);
            self.store.put_snapshot(record, Some(&next), &pin)?;
            self.index.show(record.clone(), None);
            crash_point::here("commit: next layer recorded");
            let waited = self.mounts.seal_under_users(id, next.uuid)?;
            self.metrics.frozen(waited);
            self.mounts.hide(id)?;
            crash_point::here("commit: hidden");
        }
        committed.bytes = self.sealed_bytes(&committed.layers)?;
        self.store.put_snapshot(committed, None, &pin)?;
        Ok(())
    }
}
