//! The store: images, containers, layers and volumes under one root directory, with locks between
//! processes and no step whose interruption shows.
//!
//! ```text
//! ROOT/vellum.json           format marker
//! ROOT/lock, gc.lock         locks (see below)
//! ROOT/layers/UUID/          layers (format.md), each with info.json
//! ROOT/images/NAME.json      records; names are percent-encoded
//! ROOT/containers/NAME.json  whose name is the container's, whatever the record says
//! ROOT/templates/SIZE.json   empty file systems that images begin with
//! ROOT/volumes/NAME/         named volumes; `.NAME.*` beside them while they are filled
//! ROOT/snapshots/UUID.json   containerd's snapshots; ROOT/mnt/UUID/ where they are mounted
//! ROOT/staging/UUID/         being made; ROOT/trash/ being removed
//! ROOT/reserve               room for commands while the disk is full
//! ROOT/space.json            what is done before it is full; made when it is set
//! ROOT/cache.json            how much fetched blocks may take; made when it is set
//! ROOT/registry-blobs.json   which repositories have which blobs: a hint
//! ROOT/salts/                 salts by which pushes encrypt, one for each namespace; made when needed
//! ROOT/quarantine/            records whose layers are damaged; made when needed
//! ROOT/run/CONTAINER/        mounts and processes of the running system
//! ```
//!
//! Everything is built under `staging`, synced, renamed into place, and only then named by a
//! record, which is replaced atomically. An empty layer is synced when it has its place, together with
//! the bytes of its record, before that record gets its name. Removal goes the other way round. So what
//! a crash leaves is never visible, and [`Store::prune`] collects it.
//!
//! Two locks: `lock` is held exclusively while records are read and changed together; `gc.lock` is
//! shared by whoever has layers that no record names yet, and exclusive for removing such layers.

mod blob_places;
mod confinement;
mod container_snapshots;
mod containers;
mod forks;
mod images;
mod layers;
mod lazy_cache;
mod names;
mod prune;
mod quarantine;
mod records;
mod rename;
mod restored;
mod room;
mod snapshots;
mod space_policy;
mod trash;
mod volumes;

pub use confinement::{Confinement, Network, PidsLimit, Seccomp};
pub use container_snapshots::{Consistency, ContainerSnapshot};
pub use containers::{NewContainer, Resolved, now};
pub use forks::Fork;
pub use layers::{LayerLease, PlacedLayer, StagedLayer};
pub use lazy_cache::CacheLimit;
pub use names::{check_name, check_reference};
pub use prune::{Orphans, PruneReport};
pub use quarantine::{Quarantined, Records};
pub use records::{
    ContainerRecord, DiskInfo, FsInfo, ImageRecord, LastRun, LayerInfo, MountPoint, RunEnd,
    Scaffold, TemplateRecord, Touched, VolumeMount,
};
pub use rename::ContainerRef;
pub use restored::{Restored, RunAs};
pub use snapshots::{SnapshotKind, SnapshotRecord};
pub use space_policy::{SpacePolicy, SpaceState, StoreSpace, Threshold};
pub use volumes::VolumePlace;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Entry, FileStorage, Held, LockMode, Storage, Unsynced};
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{RUN, RunDir, RunRoot, SNAPSHOT_MOUNTS};

/// The version of the store's own files that this build writes: of a store without snapshots of
/// containers, and of one that may have some. It reads both.
const STORE_FORMAT: u32 = 1;
const STORE_FORMAT_SNAPSHOTS: u32 = 2;
/// The file that says that a directory is a store.
pub const MARKER: &str = "vellum.json";
const DIRECTORIES: [&str; 7] = [
    "layers",
    "images",
    "containers",
    "templates",
    "staging",
    "trash",
    RUN,
];
/// A record is never larger.
const MAX_RECORD: u64 = 16 << 20;

/// A store, open in this process. Cheap to clone; holds no lock by itself.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    storage: Arc<dyn Storage>,
    read_only: bool,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Marker {
    vellum: String,
    format: u32,
}

impl Marker {
    fn new(format: u32) -> Self {
        Marker {
            vellum: env!("CARGO_PKG_VERSION").into(),
            format,
        }
    }
}

/// A lock on the store, until it is dropped.
#[derive(Debug)]
pub struct StoreGuard {
    _held: Box<dyn Held>,
}

/// Ends the names of records' files.
pub(crate) const RECORD_SUFFIX: &str = ".json";

/// A record as it lies on disk.
fn record_bytes<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(record).map_err(|error| {
        Error::with_source(ErrorKind::InvalidInput, "a record cannot be written", error)
    })
}

impl Store {
    /// Opens the store at `root` and makes it where there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a directory that another program or version uses.
    pub fn open_or_create(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root)
            .context(|| format!("cannot make the store {}", root.display()))?;
        let root = root
            .canonicalize()
            .context(|| format!("cannot open the store {}", root.display()))?;
        Store::with_storage(&root, Arc::new(FileStorage))
    }

    /// Opens the store at `root`, which must be there: for processes that outlive the command that
    /// found it, and must not make an empty one where it was.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none; as [`Store::open_or_create`].
    pub fn open(root: &Path) -> Result<Self> {
        let found = root.canonicalize();
        let root = found.context(|| format!("cannot open the store {}", root.display()))?;
        Store::load(&root, Arc::new(FileStorage))?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no store at {} any more: it was moved or removed",
                    root.display()
                ),
            )
        })
    }

    /// As [`Store::open_or_create`], on any storage. The directory `root` is there already.
    ///
    /// # Errors
    /// As [`Store::open_or_create`].
    pub fn with_storage(root: &Path, storage: Arc<dyn Storage>) -> Result<Self> {
        if let Some(store) = Store::load(root, storage.clone())? {
            return Ok(store);
        }
        let store = Store {
            root: root.to_owned(),
            storage,
            read_only: false,
        };
        store.initialise(&root.join(MARKER))?;
        Ok(store)
    }

    /// The store at `root`; `None` where there is none.
    fn load(root: &Path, storage: Arc<dyn Storage>) -> Result<Option<Self>> {
        let store = Store {
            root: root.to_owned(),
            read_only: storage.is_read_only(root),
            storage,
        };
        match store.read_json::<Marker>(&root.join(MARKER))? {
            Some(marker) if [STORE_FORMAT, STORE_FORMAT_SNAPSHOTS].contains(&marker.format) => {}
            Some(marker) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{} is a store of format {}; this build reads formats {STORE_FORMAT} to \
                         {STORE_FORMAT_SNAPSHOTS}: use the vellum that made it (vellum {})",
                        root.display(),
                        marker.format,
                        marker.vellum
                    ),
                ));
            }
            None => return Ok(None),
        }
        if !store.read_only {
            store.make_directories()?;
        }
        Ok(Some(store))
    }

    /// Makes those of the store's directories that are not there: backups leave `run` out, and some
    /// programs that make them leave out whatever is empty.
    fn make_directories(&self) -> Result<()> {
        for name in DIRECTORIES.iter().chain(&["volumes"]) {
            let dir = self.root.join(name);
            let there = self
                .storage
                .exists(&dir)
                .context(|| format!("cannot look for {}", dir.display()))?;
            if there {
                continue;
            }
            match self.storage.create_dir(&dir) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("cannot make {}", dir.display()), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn initialise(&self, marker_path: &Path) -> Result<()> {
        let root = self.root.display();
        let entries = self
            .storage
            .list(&self.root)
            .context(|| format!("cannot list {root}"))?;
        let known = |name: &str| {
            DIRECTORIES.contains(&name)
                || name == "volumes"
                || quarantine::is_quarantine(name)
                || name.starts_with(MARKER)
                || [
                    "lock",
                    "gc.lock",
                    "lost+found",
                    "reserve",
                    "snapshots",
                    SNAPSHOT_MOUNTS,
                ]
                .contains(&name)
        };
        if let Some(foreign) = entries.iter().find(|entry| !known(&entry.name)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{root} is not empty ({}) and not a Vellum store: name another directory with \
                     --root",
                    foreign.name
                ),
            ));
        }
        self.check_place()?;
        self.make_directories()?;
        self.storage
            .sync_dir(&self.root)
            .context(|| format!("cannot sync {root}"))?;
        // Last: a root with a marker is whole.
        self.write_json(marker_path, &Marker::new(STORE_FORMAT))
    }

    /// Makes the store one whose containers have snapshots, before the first is named: a program that
    /// does not know them would collect their layers, and refuses the store from now on.
    fn allow_snapshots(&self) -> Result<()> {
        let path = self.root.join(MARKER);
        match self.read_json::<Marker>(&path)? {
            Some(marker) if marker.format == STORE_FORMAT_SNAPSHOTS => Ok(()),
            _ => self.write_json(&path, &Marker::new(STORE_FORMAT_SNAPSHOTS)),
        }
    }

    /// Makes sure that the file system under the store can do what layers need.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], with what it cannot do.
    pub fn check_place(&self) -> Result<()> {
        let root = self.root.display();
        let missing = self
            .storage
            .lacks(&self.root)
            .context(|| format!("cannot write to {root}"))?;
        if missing.is_empty() {
            return Ok(());
        }
        let kind = MountInfo::of(&self.root).ok().flatten();
        let kind = kind.map_or("its file system".into(), |mount| mount.fs_type);
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{root} is no place for a store: {kind} cannot {}: put the store on ext4, XFS or btrfs \
                 (--root)",
                missing.join(", nor ")
            ),
        ))
    }

    /// True where nothing can be written: its file system is mounted read-only, or it is somebody
    /// else's. It can be looked at, checked and served read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the store's files are kept.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Where all running state is: the run directories, and what lies beside them.
    pub fn runs(&self) -> RunRoot {
        RunRoot::of_store(&self.root)
    }

    /// The directory for the running state of a container.
    pub fn run_dir(&self, container: &ContainerRecord) -> RunDir {
        self.runs().dir(container.id)
    }

    /// Waits until no other process changes records, and keeps them from doing so.
    ///
    /// # Errors
    /// Where the lock file cannot be opened.
    pub fn lock(&self) -> Result<StoreGuard> {
        self.take_lock("lock", LockMode::Exclusive, true)?
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Io,
                    format!("cannot lock the store {}", self.root.display()),
                )
            })
    }

    /// Keeps layers that no record names yet from being collected. Take it before [`Store::lock`].
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn pin_layers(&self) -> Result<StoreGuard> {
        self.take_lock("gc.lock", LockMode::Shared, true)?
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Io,
                    format!("cannot lock the store {}", self.root.display()),
                )
            })
    }

    /// The right to remove what no record names; `None` while somebody pins layers or has a
    /// temporary mount.
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn try_collection_lock(&self) -> Result<Option<StoreGuard>> {
        self.take_lock("gc.lock", LockMode::Exclusive, false)
    }

    fn take_lock(&self, name: &str, mode: LockMode, wait: bool) -> Result<Option<StoreGuard>> {
        let path = self.root.join(name);
        let held = self
            .storage
            .lock(&path, mode, wait)
            .context(|| format!("cannot lock {}", path.display()))?;
        Ok(held.map(|held| StoreGuard { _held: held }))
    }

    /// The record at `path`; `None` where there is none.
    fn read_json<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>> {
        match self.storage.read_all(path, MAX_RECORD) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                Error::with_source(
                    ErrorKind::Corrupt,
                    format!("{} is damaged", path.display()),
                    error,
                )
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }

    /// Replaces the record at `path`, durably.
    fn write_json<T: Serialize>(&self, path: &Path, record: &T) -> Result<()> {
        self.write_json_naming(path, record, None)
    }

    /// As [`Store::write_json`], for a record that is the first to name `layer`: that becomes durable
    /// together with the record's bytes, before the record has its name.
    fn write_json_naming<T: Serialize>(
        &self,
        path: &Path,
        record: &T,
        layer: Option<&PlacedLayer>,
    ) -> Result<()> {
        let bytes = record_bytes(record)?;
        let before = layer.map_or_else(Vec::new, |layer| {
            let mut unsynced = layer.unsynced.clone();
            unsynced.push(Unsynced::Names(self.layers_dir()));
            unsynced
        });
        self.storage
            .write_atomic_after(path, &bytes, before)
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Removes the record at `path`, durably.
    fn remove_json(&self, path: &Path) -> Result<()> {
        let remove = || {
            self.storage.remove_file(path)?;
            path.parent()
                .map_or(Ok(()), |dir| self.storage.sync_dir(dir))
        };
        remove().context(|| format!("cannot remove {}", path.display()))
    }

    /// All records of a directory. One that cannot be read is passed to `damaged` and left out, so
    /// that one bad file never stops the others.
    fn read_records<T: DeserializeOwned>(
        &self,
        directory: &str,
        mut damaged: impl FnMut(Error),
    ) -> Result<Vec<T>> {
        let dir = self.root.join(directory);
        let mut records = Vec::new();
        for name in self.record_names(directory)? {
            match self.read_json(&dir.join(format!("{name}{RECORD_SUFFIX}"))) {
                Ok(record) => records.extend(record),
                Err(error) => damaged(error),
            }
        }
        Ok(records)
    }

    /// The names of the files of records in a directory, without what they all end with.
    fn record_names(&self, directory: &str) -> Result<BTreeSet<String>> {
        let entries = self.list(&self.root.join(directory))?;
        let names = entries.iter();
        Ok(names
            .filter_map(|entry| entry.name.strip_suffix(RECORD_SUFFIX))
            .map(str::to_owned)
            .collect())
    }

    /// The entries of one of the store's directories.
    fn list(&self, dir: &Path) -> Result<Vec<Entry>> {
        match self.storage.list(dir) {
            // A backup without empty directories, where they cannot be made.
            Err(error) if self.read_only && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Vec::new())
            }
            other => other.context(|| format!("cannot list {}", dir.display())),
        }
    }

    /// Says which records cannot be read.
    pub fn warn_damaged(error: Error) {
        tracing::warn!(%error, "left out: see `vellum check`");
    }
}
