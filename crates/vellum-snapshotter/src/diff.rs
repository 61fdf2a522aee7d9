//! What a snapshot changed, as a layer in containerd's content store.
//!
//! The changes are found by the blocks that differ (`engine::diff`), so what is read is in proportion to
//! them, and the contents of new and changed files come from where the snapshot is mounted.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use tonic::metadata::AsciiMetadataValue;
use uuid::Uuid;

use super::Snapshotter;
use super::content::{ContentStore, Naming, Owner};
use super::failure::{Failure, Result, invalid, not_ours, request};
use super::operations::MountSpec;
use vellum_base::error::{Error, ErrorKind, ResultExt};
use vellum_engine::diff::{DiffOptions, MountedState, Newer, SealedState, diff_states};
use vellum_engine::mount_point::Mounted;
use vellum_engine::temporary::TemporaryMount;
use vellum_fs::ext4;
use vellum_fs::mountinfo::MountInfo;
use vellum_image::{Change, Compression, LayerBlob, LayerTarOptions, write_blob, write_layer_tar};
use vellum_store::{SnapshotKind, SnapshotRecord};

/// A layer that containerd wants.
#[derive(Debug, Clone)]
pub struct WantedLayer {
    /// The snapshot that it lies on; `None` for an empty one.
    pub older: Option<MountSpec>,
    /// The snapshot that it leads to.
    pub newer: MountSpec,
    /// How it is compressed.
    pub compression: Compression,
    /// What it is stored as.
    pub naming: Naming,
    /// No file in it is newer, in seconds since 1970.
    pub newest: Option<i64>,
    /// The namespace for whose client it is, where containerd says that.
    pub namespace: Option<AsciiMetadataValue>,
    /// What keeps the layer until something names it, where containerd says that.
    pub lease: Option<AsciiMetadataValue>,
}

impl WantedLayer {
    /// For whom it is. containerd's server passes the namespace on to proxy plugins in some builds only
    /// (containerd/containerd#12328), but begins the snapshot's key with it.
    fn owner(&self, key: &str) -> Result<Owner> {
        let namespace = self.namespace.clone().or_else(|| namespace_of(key));
        let namespace = namespace.ok_or_else(|| {
            invalid(format!(
                "the request names no namespace (containerd-namespace), nor does the snapshot's key {key:?}: \
                 a layer is stored in one of containerd's namespaces"
            ))
        })?;
        Ok(Owner {
            namespace,
            lease: self.lease.clone(),
        })
    }
}

/// The namespace in a key of containerd's: `NAMESPACE/NUMBER/KEY`.
fn namespace_of(key: &str) -> Option<AsciiMetadataValue> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number) = (parts.next()?, parts.next()?);
    parts.next()?;
    number.parse::<u64>().ok()?;
    AsciiMetadataValue::try_from(namespace)
        .ok()
        .filter(|namespace| !namespace.is_empty())
}

/// What a snapshot changed, and its files.
struct Changed {
    changes: Vec<Change>,
    /// The root of its files, open: so whatever becomes of the snapshot, they are there.
    root: File,
    /// Programs may change them.
    changing: bool,
    temporary: Option<TemporaryMount>,
}

impl Changed {
    fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()))
    }

    fn end(self) -> vellum_base::Result<()> {
        drop(self.root);
        self.temporary.map_or(Ok(()), TemporaryMount::end)
    }
}

/// What cannot be done here, another differ may do.
fn or_not_ours(failure: Failure) -> Failure {
    match failure {
        Failure::Host(error) if error.kind() == ErrorKind::Unsupported => Failure::Request(error),
        failure => failure,
    }
}

fn open(dir: &Path) -> vellum_base::Result<File> {
    File::open(dir).context(|| format!("cannot open {}", dir.display()))
}

impl Snapshotter {
    /// Stores what one snapshot changed against one below it as a layer.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], of the request, for what another differ has to compare: mounts that are
    /// not of these snapshots, snapshots that do not lie on each other, names that a layer cannot hold. What
    /// containerd answers.
    pub fn diff(&self, wanted: &WantedLayer, content: &ContentStore) -> Result<LayerBlob> {
        let key = self.snapshot_at(&wanted.newer)?.key;
        let owner = wanted.owner(&key)?;
        let changed = self.changed(wanted.older.as_ref(), &key);
        let changed = changed.map_err(or_not_ours)?;
        let options = LayerTarOptions {
            changing: changed.changing,
            dense: true,
            newest: wanted.newest,
        };
        let stored = content.put(&owner, &wanted.naming, |upload| {
            let write = |output: &mut dyn std::io::Write| {
                write_layer_tar(&changed.root(), &changed.changes, output, options, None)
            };
            write_blob(upload, wanted.compression, write).map(|(_, blob)| blob)
        });
        let ended = changed.end();
        let blob = stored.map_err(or_not_ours)?;
        if let Err(error) = ended {
            tracing::warn!(%error, "a temporary mount is left to the next command");
        }
        Ok(blob)
    }

    fn changed(&self, older: Option<&MountSpec>, key: &str) -> Result<Changed> {
        // Neither committed nor removed until it was compared.
        let _lock = self.index.lock_key(key);
        let mut record = request(self.index.get(key))?;
        if record.kind == SnapshotKind::Active {
            self.ensure_mounted(&mut record)?;
        }
        let _pin = self.store.pin_layers()?;
        let mut layers = self.store.ancestry(Some(record.top()))?;
        if record.kind == SnapshotKind::Active {
            // Its own, which is written.
            layers.pop();
        }
        let older = SealedState {
            layers: self.older_layers(older, &layers)?,
            ..SealedState::default()
        };
        match record.kind {
            SnapshotKind::Active => self.changed_mounted(&older, &record, layers),
            SnapshotKind::View | SnapshotKind::Committed => {
                self.changed_sealed(&older, &mut record, layers)
            }
        }
    }

    /// The layers of the older state, which are the lowest of the newer one's.
    fn older_layers(&self, older: Option<&MountSpec>, newer: &[Uuid]) -> Result<Vec<Uuid>> {
        let Some(older) = older else {
            // An empty file system.
            return Ok(newer.iter().take(1).copied().collect());
        };
        let record = self.snapshot_at(older)?;
        if record.kind == SnapshotKind::Active {
            return Err(not_ours(format!(
                "snapshot {:?}, which another is compared with, is written itself",
                record.key
            )));
        }
        let layers = self.store.ancestry(Some(record.top()))?;
        if newer.starts_with(&layers) {
            return Ok(layers);
        }
        Err(not_ours(format!(
            "the one snapshot does not lie on the other, {:?}",
            record.key
        )))
    }

    fn changed_mounted(
        &self,
        older: &SealedState,
        record: &SnapshotRecord,
        layers: Vec<Uuid>,
    ) -> Result<Changed> {
        let key = &record.key;
        let device = self.mounts.device(record.id)?;
        let device = device.ok_or_else(|| {
            let text = format!("the device of snapshot {key:?} is gone: ask for its mounts again");
            Error::new(ErrorKind::Io, text)
        })?;
        let Some(dir) = self.mounts.place(record)? else {
            return Err(not_ours(format!(
                "snapshot {key:?} is a device that is not mounted on this host"
            )));
        };
        let root = open(&dir)?;
        let given_up = MountInfo::at(&dir)?.is_some_and(|mount| ext4::has_given_up(&mount));
        let state = MountedState {
            id: record.id,
            layers,
            mount: Mounted {
                dir,
                device,
                given_up,
            },
        };
        Ok(Changed {
            changes: self.compare(older, Newer::Mounted(&state))?,
            root,
            changing: true,
            temporary: None,
        })
    }

    fn changed_sealed(
        &self,
        older: &SealedState,
        record: &mut SnapshotRecord,
        layers: Vec<Uuid>,
    ) -> Result<Changed> {
        let (root, temporary) = match record.device {
            true => {
                let mount = TemporaryMount::of_image(&self.store, record.top())?;
                (open(mount.dir())?, Some(mount))
            }
            false => (open(&self.ensure_mounted(record)?)?, None),
        };
        let state = SealedState {
            layers,
            ..SealedState::default()
        };
        Ok(Changed {
            changes: self.compare(older, Newer::Sealed(&state))?,
            root,
            changing: false,
            temporary,
        })
    }

    fn compare(&self, older: &SealedState, newer: Newer<'_>) -> Result<Vec<Change>> {
        let found = diff_states(&self.store, older, newer, DiffOptions::default())?;
        Ok(found.into_iter().map(|found| found.change).collect())
    }

    /// The snapshot that was handed out as this mount.
    fn snapshot_at(&self, spec: &MountSpec) -> Result<SnapshotRecord> {
        let is_it = |record: &SnapshotRecord| -> vellum_base::Result<bool> {
            if record.device != spec.device || record.kind == SnapshotKind::Committed {
                return Ok(false);
            }
            Ok(match record.device {
                true => self.mounts.device(record.id)?.as_ref() == Some(&spec.source),
                false => self.mounts.dir(record.id) == spec.source,
            })
        };
        for record in self.index.all() {
            if is_it(&record)? {
                return Ok(record);
            }
        }
        Err(not_ours(format!(
            "{} is no mount of a snapshot of this store",
            spec.source.display()
        )))
    }
}
