//! Devices and mounts of snapshots. Nothing of it is remembered here: the run directory and the
//! kernel's tables say what there is, also after the process before was killed.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use vellum_base::block::BLOCK_SIZE;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_core::layer::Header;
use vellum_engine::device::{DeviceStats, SEAL, Sealed, Target, attach_spec};
use vellum_engine::grow::{grow_device, grow_mounted, is_filled};
use vellum_engine::lazy::explain;
use vellum_engine::mount_point;
use vellum_engine::seal::seal_frozen;
use vellum_engine::stats::device_stats;
use vellum_engine::wire::decode;
use vellum_export::device::{self, DetachOptions, DeviceStatus, Status, control};
use vellum_export::local_disk::LocalDisk;
use vellum_export::loop_device::Lifetime;
use vellum_export::opener::process_with_open;
use vellum_fs::ext4;
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{RunDir, SNAPSHOT_MOUNTS};
use vellum_store::{SnapshotKind, SnapshotRecord, Store};

/// How long a file system that gave up may still be seen in namespaces that are being made or taken down.
const REVIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a server may take to flush and seal.
const SEAL_TIMEOUT: Duration = Duration::from_secs(120);

/// The devices and mounts of a store's snapshots.
#[derive(Debug, Clone)]
pub struct Mounts {
    store: Store,
}

impl Mounts {
    /// Makes the directory for mounts, and gives all of the root the modes that containerd and
    /// runc need: the way to the mounts can be walked by everybody, the rest is ours.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn new(store: &Store) -> Result<Self> {
        let root = store.root();
        let mounts = root.join(SNAPSHOT_MOUNTS);
        fs::create_dir_all(&mounts).context(|| format!("cannot make {}", mounts.display()))?;
        set_mode(root, 0o755)?;
        set_mode(&mounts, 0o711)?;
        for entry in fs::read_dir(root)
            .context(|| format!("cannot list {}", root.display()))?
            .flatten()
        {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir && entry.file_name() != SNAPSHOT_MOUNTS {
                set_mode(&entry.path(), 0o700)?;
            }
        }
        Ok(Mounts {
            store: store.clone(),
        })
    }

    /// Where a snapshot is mounted.
    pub fn dir(&self, id: Uuid) -> PathBuf {
        self.store.snapshot_mount_dir(id)
    }

    fn run_dir(&self, id: Uuid) -> RunDir {
        self.store.runs().dir(id)
    }

    /// The block device of a snapshot whose server works; `None` where a crash or a reboot took it.
    ///
    /// # Errors
    /// Where the run directory cannot be read.
    pub fn device(&self, id: Uuid) -> Result<Option<PathBuf>> {
        let status = device::status(&self.run_dir(id))?;
        let works = status.filter(|status| {
            status.alive && !matches!(status.state.status, Status::Failed | Status::Ended)
        });
        Ok(works.and_then(|status| status.disk).map(LocalDisk::path))
    }

    /// What state the device of a snapshot is in, `None` without one.
    ///
    /// # Errors
    /// Where the run directory cannot be read.
    pub fn device_status(&self, id: Uuid) -> Result<Option<DeviceStatus>> {
        device::status(&self.run_dir(id))
    }

    /// True while the snapshot is mounted and served; attached and served, where containerd mounts
    /// the device itself.
    ///
    /// # Errors
    /// Where the run directory cannot be read.
    pub fn is_ready(&self, record: &SnapshotRecord) -> Result<bool> {
        if record.device {
            return Ok(self.device(record.id)?.is_some());
        }
        Ok(is_mount_point(&self.dir(record.id)) && self.device(record.id)?.is_some())
    }

    /// True of an active snapshot whose file system met an error, as on a full disk, and takes no
    /// writes any more.
    ///
    /// # Errors
    /// Where the host's mounts cannot be read.
    pub fn has_given_up(&self, record: &SnapshotRecord) -> Result<bool> {
        if record.kind != SnapshotKind::Active || record.device {
            return Ok(false);
        }
        let mount = MountInfo::at(&self.dir(record.id))?;
        Ok(mount.is_some_and(|mount| ext4::has_given_up(&mount)))
    }

    /// Mounts a snapshot anew whose file system gave up, as one does that a full disk of the host
    /// kept from writing its journal; says so where that cannot be.
    pub fn revive(&self, record: &SnapshotRecord) {
        let outcome = match self.has_given_up(record) {
            Ok(false) => return,
            Ok(true) => self.mount_anew(record),
            Err(error) => Err(error),
        };
        let why = match outcome {
            Ok(true) => return,
            Ok(false) => "something else has it mounted: stop all that uses it, then start it (docker restart keeps it \
             mounted: docker stop, then docker start)"
                .to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            key = %record.key,
            why,
            "its file system gave up after an error and takes no writes; it cannot be mounted anew"
        );
    }

    /// False where somebody still has it mounted or uses it: the same device gives the same file
    /// system again then.
    fn mount_anew(&self, record: &SnapshotRecord) -> Result<bool> {
        let device = self.disk(record.id)?;
        let _held = device.hold()?;
        if !self.unmount_unshared(record.id, REVIVE_TIMEOUT)? {
            return Ok(false);
        }
        tracing::warn!(key = %record.key, "its file system gave up after an error: mounted anew");
        let dir = self.dir(record.id);
        self.mount_device(record, &device.path(), &dir)?;
        Ok(true)
    }

    /// Bytes that programs wrote and that have no blocks of the snapshot yet.
    pub fn delayed_bytes(&self, id: Uuid) -> u64 {
        let device = self.disk(id);
        device.map_or(0, |device| ext4::delayed_bytes(&device.path()))
    }

    /// Brings the mount of a snapshot back whose device is there and served: who has it mounted
    /// elsewhere keeps it, and one device gives one file system. `None` where there is no device,
    /// or it cannot be mounted; [`Mounts::mount`] makes another then.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn mount_again(&self, record: &SnapshotRecord) -> Result<Option<PathBuf>> {
        let dir = self.dir(record.id);
        let Some(device) = self.device(record.id)? else {
            return Ok(None);
        };
        if record.device || is_mount_point(&dir) {
            return Ok(None);
        }
        fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        match self.mount_device(record, &device, &dir) {
            Ok(()) => Ok(Some(dir)),
            Err(error) => {
                tracing::warn!(key = %record.key, %error, "its device is given up");
                Ok(None)
            }
        }
    }

    /// Attaches a snapshot that is not, and mounts it where containerd does not do that itself.
    /// What a crash left of an earlier device is cleared away. Returns what containerd mounts: a
    /// directory, or the device.
    ///
    /// # Errors
    /// What keeps the chain from being opened or mounted, with names.
    pub fn mount(&self, record: &SnapshotRecord) -> Result<PathBuf> {
        self.store.keep_room();
        self.store.with_room(|| self.mount_once(record))
    }

    fn mount_once(&self, record: &SnapshotRecord) -> Result<PathBuf> {
        let dir = self.dir(record.id);
        let run_dir = self.run_dir(record.id);
        self.clear(record.id)?;
        if !record.device {
            fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
            crash_point::here("mount: directory made");
        }
        let target = match record.kind {
            SnapshotKind::Active => Target::Layer(record.top()),
            SnapshotKind::View | SnapshotKind::Committed => Target::Sealed(record.top()),
        };
        let mut spec = attach_spec(&self.store, &target);
        if record.device {
            // containerd, or a machine, opens and closes it as it likes.
            spec.lifetime = Lifetime::Detach;
        }
        let attached = device::attach(&run_dir, &spec)
            .map_err(|error| error.context(format!("cannot attach snapshot {:?}", record.key)))?;
        crash_point::here("mount: device attached");
        let device = attached.device.path();
        let mounted = if record.device {
            self.grow(record)
        } else {
            self.mount_device(record, &device, &dir)
        };
        if mounted.is_err() {
            // The mount's failure is what matters.
            let _ = self.clear(record.id);
        }
        mounted.map_err(|error| {
            let what = format!("cannot mount snapshot {:?}", record.key);
            match target.layers(&self.store) {
                Ok(layers) => explain(&self.store, &layers, what, error),
                Err(_) => error.context(what),
            }
        })?;
        Ok(if record.device { device } else { dir })
    }

    /// Mounts the device of a snapshot below the store although containerd mounts it itself, so
    /// that it can be committed as others are. Its journal is replayed.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while a program, such as a virtual machine, has the device open: what
    /// it holds back cannot be known here.
    pub fn mount_for_commit(&self, record: &SnapshotRecord) -> Result<()> {
        let dir = self.dir(record.id);
        if is_mount_point(&dir) {
            return Ok(());
        }
        let device = self.disk(record.id)?;
        if let Some(pid) = process_with_open(&device.path())? {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "snapshot {:?}: process {pid} has its device {} open: stop it (a virtual \
                     machine that runs on it?) before the commit",
                    record.key,
                    device.path().display()
                ),
            ));
        }
        fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        ext4::mount(&device.path(), &dir, ext4::MountOptions::default())
    }

    fn mount_device(&self, record: &SnapshotRecord, device: &Path, dir: &Path) -> Result<()> {
        let options = ext4::MountOptions {
            read_only: record.kind != SnapshotKind::Active,
            ..ext4::MountOptions::default()
        };
        ext4::mount(device, dir, options)?;
        crash_point::here("mount: mounted");
        self.grow(record)
    }

    /// Makes the device of a snapshot that is attached, and its file system, as large as its record
    /// says, where they are not yet, also under whoever uses them.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where this process may not grow a file system that is in use: nothing
    /// is changed then. What else keeps it from being grown: the device may be larger by then.
    pub fn grow(&self, record: &SnapshotRecord) -> Result<()> {
        let base = Header::read(&**self.store.storage(), &self.store.layer_dir(record.base))?;
        let size = record.virtual_size;
        if record.kind != SnapshotKind::Active || base.virtual_size >= size {
            return Ok(());
        }
        let device = self.disk(record.id)?;
        let path = device.path();
        if device.size()? >= size && is_filled(&path, size)? {
            return Ok(());
        }
        let run_dir = self.run_dir(record.id);
        let Some(mounted) = self.mounted_at(record, device)? else {
            grow_device(&run_dir, device, size)?;
            // A machine that has it open, or a namespace that has it mounted, grows its own.
            if !device.is_claimed()? && process_with_open(&path)?.is_none() {
                ext4::grow_unmounted(&path)?;
                crash_point::here("mount: grown");
            }
            return Ok(());
        };
        let _held = device.hold()?;
        let unmount = || {
            if !record.device && self.unmount_unshared(record.id, Duration::ZERO)? {
                return Ok(());
            }
            Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "snapshot {:?} is in use, and growing a file system in use needs \
                     CAP_SYS_RESOURCE, which this process lacks: give it that, or stop the container",
                    record.key
                ),
            ))
        };
        let options = ext4::MountOptions::default();
        // The layer has all that there is to note.
        let note = || Ok(());
        grow_mounted(&run_dir, device, &mounted, size, options, note, unmount)?;
        crash_point::here("mount: grown");
        Ok(())
    }

    /// Where a snapshot that is attached is mounted, if it is: below the store, or where containerd mounted
    /// its device.
    ///
    /// # Errors
    /// Where the host's mounts or the device cannot be found out.
    pub fn place(&self, record: &SnapshotRecord) -> Result<Option<PathBuf>> {
        self.mounted_at(record, self.disk(record.id)?)
    }

    /// Where the device of a snapshot is mounted: below the store, or where containerd did so.
    fn mounted_at(&self, record: &SnapshotRecord, device: LocalDisk) -> Result<Option<PathBuf>> {
        let dir = self.dir(record.id);
        if is_mount_point(&dir) {
            return Ok(Some(dir));
        }
        let number = device.major_minor();
        let mut mounts = MountInfo::read()?.into_iter();
        Ok(mounts
            .find(|mount| Some(mount.major_minor) == number)
            .map(|mount| mount.target))
    }

    /// Inodes in use in the file system of a snapshot that is mounted below the store.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] while it is not mounted.
    pub fn inodes(&self, id: Uuid) -> Result<u64> {
        let dir = self.dir(id);
        if !is_mount_point(&dir) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{}: nothing is mounted there", dir.display()),
            ));
        }
        Ok(ext4::usage(&dir)?.files_used)
    }

    /// Takes away what there is of a snapshot's device, in use or not.
    fn clear(&self, id: Uuid) -> Result<()> {
        device::wake(&self.run_dir(id))?;
        let dir = self.dir(id);
        if is_mount_point(&dir) {
            ext4::unmount_lazily(&dir)?;
        }
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        device::detach(&self.run_dir(id), &options)
    }

    fn disk(&self, id: Uuid) -> Result<LocalDisk> {
        let status = device::status(&self.run_dir(id))?;
        status.and_then(|status| status.disk).ok_or_else(|| {
            Error::new(
                ErrorKind::Io,
                format!(
                    "the block device of {id} is gone (its server died?): `vellum check` says what is left of it; \
                     containerd makes the mount again at the next use"
                ),
            )
        })
    }

    /// Unmounts a snapshot if nobody else has it mounted, in whatever mount namespace, for longer than
    /// `patience`; says whether that was so. Otherwise it is still mounted at its place.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn unmount_unshared(&self, id: Uuid, patience: Duration) -> Result<bool> {
        let dir = self.dir(id);
        let device = self.disk(id)?;
        let _held = device.hold()?;
        let number = device.major_minor();
        let mounts = MountInfo::read()?;
        if mounts
            .iter()
            .filter(|m| Some(m.major_minor) == number)
            .count()
            != 1
        {
            return Ok(false);
        }
        match ext4::unmount(&dir, Duration::ZERO) {
            Err(error) if error.kind() == ErrorKind::InUse => return Ok(false),
            other => other?,
        }
        if !device.wait_unclaimed(patience)? {
            // A namespace that we do not see. The same device gives the same file system again.
            ext4::mount(&device.path(), &dir, ext4::MountOptions::default())?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Seals the layer of a snapshot that [`Mounts::unmount_unshared`] unmounted; returns the
    /// bytes of data in it.
    ///
    /// # Errors
    /// Where the host fails; the layer is not sealed then.
    pub fn seal(&self, id: Uuid) -> Result<u64> {
        let answer = control::call(&self.run_dir(id), SEAL, Value::Null, SEAL_TIMEOUT)?;
        let sealed: Sealed = decode(answer)?;
        Ok(sealed.blocks * BLOCK_SIZE)
    }

    /// Seals the layer of a snapshot under those who have it mounted, who go on in the layer
    /// `next`. Returns for how long their writes waited.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn seal_under_users(&self, id: Uuid, next: Uuid) -> Result<Duration> {
        let waited = seal_frozen(&self.run_dir(id), &self.dir(id), next)?;
        tracing::info!(%id, seconds = waited.as_secs_f64(), "sealed while it was mounted");
        Ok(waited)
    }

    /// The counters of a snapshot that is attached.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] while it is not.
    pub fn stats(&self, id: Uuid) -> Result<DeviceStats> {
        device_stats(&self.run_dir(id))
    }

    /// Takes the mount of a snapshot out of sight. Who has it mounted elsewhere keeps it.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn hide(&self, id: Uuid) -> Result<()> {
        let dir = self.dir(id);
        if is_mount_point(&dir) {
            ext4::unmount_lazily(&dir)?;
        }
        Ok(())
    }

    /// Detaches the device of a snapshot that is not needed any more and removes its directories.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while somebody still has it mounted.
    pub fn release(&self, id: Uuid) -> Result<()> {
        device::wake(&self.run_dir(id))?;
        self.hide(id)?;
        crash_point::here("retire: unmounted");
        let options = DetachOptions {
            force: false,
            timeout: Duration::from_millis(500),
        };
        device::detach(&self.run_dir(id), &options)?;
        crash_point::here("retire: device detached");
        mount_point::remove(&self.dir(id))
    }

    /// Every snapshot that has a mount directory or a device.
    ///
    /// # Errors
    /// Where the directories cannot be listed.
    pub fn present(&self) -> Result<Vec<Uuid>> {
        let mut found = std::collections::BTreeSet::new();
        let mounts = self.store.root().join(SNAPSHOT_MOUNTS);
        for dir in [mounts.as_path(), self.store.runs().path()] {
            let entries = fs::read_dir(dir).context(|| format!("cannot list {}", dir.display()))?;
            found.extend(
                entries
                    .flatten()
                    .filter_map(|entry| Uuid::parse_str(entry.file_name().to_str()?).ok()),
            );
        }
        Ok(found.into_iter().collect())
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .context(|| format!("cannot set the mode of {}", path.display()))
}

/// True when something is mounted at `dir`, also when that no longer answers.
fn is_mount_point(dir: &Path) -> bool {
    let Some(parent) = dir.parent().and_then(|parent| fs::metadata(parent).ok()) else {
        return false;
    };
    match fs::symlink_metadata(dir) {
        Ok(there) => there.dev() != parent.dev(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}
