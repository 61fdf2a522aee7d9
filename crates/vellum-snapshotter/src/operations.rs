//! The operations of the snapshots API on the store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::config::MountMode;
use super::failure::{Failure, Result, invalid, request};
use super::labels::{REF_LABEL, wanted_mode, wanted_size};
use super::metadata::Index;
use super::metrics::Metrics;
use super::mounts::Mounts;
use super::remote::Remote;
use super::retire::{Job, Retirer};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind};
use vellum_core::layer::{Header, SealedLayer, check_size};
use vellum_engine::registry::RemoteImage;
use vellum_engine::template;
use vellum_store::{LayerInfo, PlacedLayer, SnapshotKind, SnapshotRecord, Store};

/// A mount as containerd carries it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// Where we mounted the snapshot, or its device.
    pub source: PathBuf,
    /// The source is a block device with an ext4 on it.
    pub device: bool,
    /// Without writes.
    pub read_only: bool,
}

/// What snapshots are like that no label says anything else of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Defaults {
    /// Bytes of a file system.
    pub size: u64,
    /// How snapshots are handed out.
    pub mounts: MountMode,
}

/// The snapshots of one store, served to one containerd.
#[derive(Debug)]
pub struct Snapshotter {
    pub(super) store: Store,
    pub(super) index: Index,
    pub(super) mounts: Mounts,
    pub(super) retirer: Retirer,
    defaults: Defaults,
    pub(super) remote: Remote,
    pub(super) metrics: Metrics,
}

impl Snapshotter {
    /// Takes over what is there: records, devices and mounts of an earlier process. Devices that
    /// no snapshot needs are detached, and layers that a crash orphaned removed, in the background.
    ///
    /// # Errors
    /// Where the store cannot be read or the template not be made.
    pub fn start(store: &Store, defaults: Defaults, remote: Remote) -> vellum_base::Result<Self> {
        store.prepare_snapshots()?;
        let mounts = Mounts::new(store)?;
        let index = Index::load(store)?;
        {
            let pin = store.pin_layers()?;
            template::get(store, defaults.size, &pin)?;
        }
        let retirer = Retirer::start(store, &mounts)?;
        let records = index.all();
        let needed = |id: Uuid| {
            let mut live = records.iter();
            live.find(|record| record.id == id && record.kind != SnapshotKind::Committed)
        };
        let mut adopted = 0u32;
        for id in mounts.present()? {
            match needed(id) {
                Some(record) => {
                    adopted += u32::from(mounts.is_ready(record)?);
                    mounts.revive(record);
                }
                // Its device may keep layers from being removed until it is gone.
                None => retirer.push(Job {
                    id: Some(id),
                    sweep: true,
                    ..Job::default()
                }),
            }
        }
        retirer.push(Job {
            sweep: true,
            ..Job::default()
        });
        let committed = records
            .iter()
            .filter(|record| record.kind == SnapshotKind::Committed);
        let checksum: Vec<Uuid> = committed
            .flat_map(|record| record.layers.iter().copied())
            .filter(|layer| wants_checksums(store, *layer))
            .collect();
        if !checksum.is_empty() {
            retirer.push(Job {
                checksum,
                ..Job::default()
            });
        }
        tracing::info!(
            root = %store.root().display(),
            snapshots = records.len(),
            mounted = adopted,
            "started"
        );
        Ok(Snapshotter {
            store: store.clone(),
            index,
            mounts,
            retirer,
            defaults,
            remote,
            metrics: Metrics::default(),
        })
    }

    /// Makes a snapshot of `kind` on `parent` and mounts it.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for the key, [`ErrorKind::NotFound`] for the parent,
    /// [`ErrorKind::InvalidInput`] for a parent that is not committed, or a size that cannot be.
    pub fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        kind: SnapshotKind,
    ) -> Result<MountSpec> {
        if key.is_empty() {
            return Err(invalid("a snapshot needs a key"));
        }
        if kind == SnapshotKind::Active {
            self.store.check_space_for("snapshot")?;
        }
        let wanted = wanted_size(&labels)?;
        let device = wanted_mode(&labels)?.unwrap_or(self.defaults.mounts) == MountMode::Device;
        let _lock = self.index.lock_key(key);
        let remote = match kind {
            SnapshotKind::Active => self.remote.look(&self.store, &labels),
            SnapshotKind::View | SnapshotKind::Committed => None,
        };
        let pin = self.store.pin_layers()?;
        let parent = (!parent.is_empty()).then_some(parent);
        let (base, least, base_inodes) = match parent {
            Some(parent) => {
                let parent = request(self.index.parent(parent))?;
                (parent.top(), parent.virtual_size, parent.inodes)
            }
            None => {
                let size = wanted.unwrap_or(self.defaults.size);
                let template = template::get(&self.store, size, &pin)?;
                let inodes = self.template_inodes(template.layer)?;
                (template.layer, size, Some(inodes))
            }
        };
        let virtual_size = wanted.unwrap_or(least);
        if virtual_size < least {
            return Err(invalid(format!(
                "snapshot {key:?}: {virtual_size} bytes are wanted, but its image has {least}: a \
                 file system can only grow; set a smaller default_size before images are unpacked"
            )));
        }
        let now = SystemTime::now();
        let mut record = SnapshotRecord {
            key: key.to_owned(),
            id: Uuid::new_v4(),
            kind,
            parent: parent.map(str::to_owned),
            base,
            layers: Vec::new(),
            virtual_size,
            bytes: 0,
            base_inodes,
            inodes: None,
            device,
            labels,
            created: now,
            updated: now,
        };
        request(self.index.reserve(&record))?;
        crash_point::here("prepare: key taken");
        let made = self.make(&mut record, remote.as_deref(), &pin);
        drop(pin);
        match made {
            Ok(mount) => {
                self.index.show(record, None);
                crash_point::here("prepare: done");
                Ok(mount)
            }
            Err(failure) => {
                self.undo(&record);
                Err(failure)
            }
        }
    }

    /// The part of [`Snapshotter::prepare`] that touches the host.
    fn make(
        &self,
        record: &mut SnapshotRecord,
        remote: Option<&RemoteImage>,
        pin: &vellum_store::StoreGuard,
    ) -> Result<MountSpec> {
        let mut added = None;
        if record.kind == SnapshotKind::Active {
            let lend = |image| self.lend(record, image, pin);
            if self.adopt(record, pin)? || remote.is_some_and(lend) {
                return Err(Failure::Request(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("target snapshot {:?}: already exists", record.key),
                )));
            }
            let layer = self.add_layer(record.base, record.virtual_size, pin)?;
            crash_point::here("prepare: layer published");
            record.layers.push(layer.uuid);
            added = Some(layer);
        }
        let record = &*record;
        // Layer and record are durable before the answer, not before the mount: that takes as long, and
        // what no record names is cleared away like any other rest.
        let write = || -> vellum_base::Result<()> {
            self.store.put_snapshot(record, added.as_ref(), pin)?;
            crash_point::here("prepare: record in place");
            Ok(())
        };
        let (written, mounted) = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, write);
            let mounted = self.mounts.mount(record);
            let written = match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(_) => write(),
            };
            (written, mounted)
        });
        written?;
        Ok(mount_spec(record, mounted?))
    }

    /// Where a layer with this reference is there already, on the same layers, under another
    /// name (another of containerd's namespaces unpacked it): makes the snapshot that containerd
    /// then finds by its label and does not unpack again.
    fn adopt(&self, record: &SnapshotRecord, pin: &vellum_store::StoreGuard) -> Result<bool> {
        let Some(reference) = record.labels.get(REF_LABEL) else {
            return Ok(false);
        };
        let found = self.index.all().into_iter().find(|other| {
            other.kind == SnapshotKind::Committed
                && other.base == record.base
                && other.labels.get(REF_LABEL) == Some(reference)
                && !other.layers.is_empty()
        });
        let Some(found) = found else {
            return Ok(false);
        };
        let shared = SnapshotRecord {
            key: format!("{} {}", record.key, found.id),
            id: Uuid::new_v4(),
            kind: SnapshotKind::Committed,
            layers: found.layers,
            bytes: found.bytes,
            inodes: found.inodes,
            virtual_size: found.virtual_size,
            ..record.clone()
        };
        request(self.index.reserve(&shared))?;
        if let Err(error) = self.store.put_snapshot(&shared, None, pin) {
            self.index.forget(&shared.key);
            return Err(error.into());
        }
        crash_point::here("remote: record in place");
        // The other may have been removed meanwhile, and its layers with it.
        if request(self.index.get(&found.key)).is_err() {
            self.store.remove_snapshot(shared.id)?;
            self.index.forget(&shared.key);
            return Ok(false);
        }
        self.index.show(shared, None);
        Ok(true)
    }

    /// Makes an empty layer, which is durable with the record that names it.
    pub(super) fn add_layer(
        &self,
        parent: Uuid,
        virtual_size: u64,
        pin: &vellum_store::StoreGuard,
    ) -> vellum_base::Result<PlacedLayer> {
        let info = LayerInfo {
            origin: "containerd snapshot".into(),
            ..LayerInfo::default()
        };
        let staged = self.store.stage_layer(Some(parent), virtual_size)?;
        crash_point::here("prepare: layer made");
        staged.place(&info, pin)
    }

    /// Takes back what a failed [`Snapshotter::prepare`] did.
    fn undo(&self, record: &SnapshotRecord) {
        self.retirer.announce(&record.layers);
        let removed = self.store.remove_snapshot(record.id);
        let discard = to_discard(record, removed);
        if discard.is_empty() {
            self.retirer.retract(&record.layers);
        }
        self.index.forget(&record.key);
        self.retirer.push(Job {
            id: Some(record.id),
            discard,
            ..Job::default()
        });
    }

    /// How to mount a view or an active snapshot; attaches and mounts it where a reboot or a crash
    /// took that away.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] (a failed precondition) for a committed one.
    pub fn mounts(&self, key: &str) -> Result<MountSpec> {
        let _lock = self.index.lock_key(key);
        let mut record = request(self.index.get(key))?;
        if record.kind == SnapshotKind::Committed {
            return Err(Failure::Request(Error::new(
                ErrorKind::InUse,
                format!("snapshot {key:?} is committed: it is not mounted itself"),
            )));
        }
        let source = self.ensure_mounted(&mut record)?;
        Ok(mount_spec(&record, source))
    }

    pub(super) fn ensure_mounted(&self, record: &mut SnapshotRecord) -> Result<PathBuf> {
        // A commit may have been cut off with the device still there.
        let stale = record.kind == SnapshotKind::Active && self.settle(record)?;
        if !stale && self.mounts.is_ready(record)? {
            self.mounts.revive(record);
            // Whoever mounted it, or was to make it larger, may have been killed before this. What
            // is there can be used as it is, though.
            if let Err(error) = self.mounts.grow(record) {
                tracing::warn!(key = %record.key, %error, "is smaller than it should be");
            }
            let device = match record.device {
                true => self.mounts.device(record.id)?,
                false => None,
            };
            return Ok(device.unwrap_or_else(|| self.mounts.dir(record.id)));
        }
        tracing::info!(key = %record.key, "mounts again");
        if !stale && let Some(dir) = self.mounts.mount_again(record)? {
            return Ok(dir);
        }
        Ok(self.mounts.mount(record)?)
    }

    /// Removes a snapshot. Who still has it mounted keeps that until it is unmounted.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] while others are made from it.
    pub fn remove(&self, key: &str) -> Result<()> {
        let _lock = self.index.lock_key(key);
        let record = request(self.index.begin_removal(key))?;
        crash_point::here("remove: begun");
        self.retirer.announce(&record.layers);
        if let Err(error) = self.store.remove_snapshot(record.id) {
            self.retirer.retract(&record.layers);
            self.index.keep(key);
            return Err(error.into());
        }
        self.index.forget(key);
        crash_point::here("remove: record gone");
        if let Err(error) = self.mounts.hide(record.id) {
            tracing::warn!(key, %error, "a removed snapshot is still mounted");
        }
        crash_point::here("remove: hidden");
        let shared = |layer: &Uuid| self.index.names_layer(*layer, record.id);
        let (kept, discard) = record
            .layers
            .iter()
            .partition::<Vec<Uuid>, _>(|l| shared(l));
        self.retirer.retract(&kept);
        let sweep = record.kind == SnapshotKind::Committed && self.is_left(record.base);
        self.retirer.push(Job {
            id: Some(record.id),
            discard,
            sweep,
            ..Job::default()
        });
        crash_point::here("remove: done");
        Ok(())
    }

    /// One snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn stat(&self, key: &str) -> Result<SnapshotRecord> {
        request(self.index.get(key))
    }

    /// All snapshots, by key.
    pub fn list(&self) -> Vec<SnapshotRecord> {
        self.index.all()
    }

    /// Changes labels: those that `paths` name (`labels`, `labels.KEY`), all where it names none.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for a path that cannot change.
    pub fn update(
        &self,
        key: &str,
        labels: &BTreeMap<String, String>,
        paths: &[String],
    ) -> Result<SnapshotRecord> {
        let _lock = self.index.lock_key(key);
        let mut record = request(self.index.get(key))?;
        if paths.is_empty() {
            record.labels.clone_from(labels);
        }
        for path in paths {
            match path.strip_prefix("labels.") {
                Some(label) => {
                    let value = labels.get(label).cloned().unwrap_or_default();
                    record.labels.insert(label.to_owned(), value);
                }
                None if path == "labels" => record.labels.clone_from(labels),
                None => {
                    return Err(invalid(format!(
                        "cannot update {path:?} of snapshot {key:?}: only labels change"
                    )));
                }
            }
        }
        // An empty value removes a label.
        record.labels.retain(|_, value| !value.is_empty());
        let size = wanted_size(&record.labels)?.unwrap_or(record.virtual_size);
        if record.kind == SnapshotKind::Active && size < record.virtual_size {
            return Err(invalid(format!(
                "snapshot {key:?} has {} bytes, and the labels would say {size}: a file system can \
                 only grow",
                record.virtual_size
            )));
        }
        record.updated = SystemTime::now();
        if record.kind == SnapshotKind::Active && size > record.virtual_size {
            return self.grow(record, size);
        }
        self.put(&record)?;
        Ok(record)
    }

    fn put(&self, record: &SnapshotRecord) -> Result<()> {
        let pin = self.store.pin_layers()?;
        self.store.put_snapshot(record, None, &pin)?;
        self.index.show(record.clone(), None);
        Ok(())
    }

    /// Makes an active snapshot larger, whose new labels `record` has, also under its users. The
    /// record is written first: from then on the next Mounts or Update finishes what is cut off.
    fn grow(&self, mut record: SnapshotRecord, size: u64) -> Result<SnapshotRecord> {
        request(check_size(size))?;
        let mut before = request(self.index.get(&record.key))?;
        self.ensure_mounted(&mut before)?;
        // Settling may have changed them.
        record.layers.clone_from(&before.layers);
        record.virtual_size = size;
        self.put(&record)?;
        crash_point::here("update: record in place");
        let Err(error) = self.mounts.grow(&record) else {
            return Ok(record);
        };
        let top = self.store.layer_dir(record.top());
        let header = Header::read(&**self.store.storage(), &top)?;
        if header.virtual_size < size {
            self.put(&before)?;
        }
        let error = error.context(format!(
            "snapshot {:?} cannot grow to {size} bytes",
            record.key
        ));
        Err(match error.kind() {
            ErrorKind::InUse => Failure::Request(error),
            _ => Failure::Host(error),
        })
    }

    /// The counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The devices and mounts of its snapshots.
    pub fn devices(&self) -> &Mounts {
        &self.mounts
    }

    /// The store that it serves.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Jobs that wait to be done, those on devices in use included.
    pub fn backlog(&self) -> usize {
        self.retirer.backlog()
    }

    /// Waits a while for the space of removed snapshots to be free, and of what nothing names.
    pub fn cleanup(&self) {
        self.retirer.push(Job {
            sweep: true,
            ..Job::default()
        });
        if !self.retirer.drain(Duration::from_secs(20)) {
            tracing::warn!("removed snapshots are still being cleared away");
        }
    }

    /// Ends what is under way. Devices and mounts of snapshots stay.
    pub fn stop(self) {
        self.retirer.stop(Duration::from_secs(15));
    }
}

/// The layers of a failed snapshot that no record names. A record that stays names whole layers.
fn to_discard(record: &SnapshotRecord, removed: vellum_base::Result<()>) -> Vec<Uuid> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(%error, "the record of a failed snapshot stays, and its layer");
            Vec::new()
        }
        _ => record.layers.clone(),
    }
}

fn mount_spec(record: &SnapshotRecord, source: PathBuf) -> MountSpec {
    MountSpec {
        source,
        device: record.device,
        read_only: record.kind != SnapshotKind::Active,
    }
}

fn wants_checksums(store: &Store, layer: Uuid) -> bool {
    // One that cannot be opened says so when it is used; of a lazy one the fetcher sees to them.
    SealedLayer::open(&**store.storage(), &store.layer_dir(layer))
        .is_ok_and(|layer| !layer.is_checksummed() && !layer.is_lazy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_snapshot_keeps_its_layers_where_its_record_stays() {
        let layer = Uuid::from_u128(1);
        let record = SnapshotRecord {
            key: "key".into(),
            id: Uuid::from_u128(2),
            kind: SnapshotKind::Active,
            parent: None,
            base: Uuid::from_u128(3),
            layers: vec![layer],
            virtual_size: 1 << 20,
            bytes: 0,
            base_inodes: None,
            inodes: None,
            device: false,
            labels: BTreeMap::new(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
        };
        let failed = |kind| Err(Error::new(kind, "a test's"));
        assert!(to_discard(&record, failed(ErrorKind::Io)).is_empty());
        let gone = to_discard(&record, failed(ErrorKind::NotFound));
        assert_eq!(
            (gone, to_discard(&record, Ok(()))),
            (vec![layer], vec![layer])
        );
    }
}
