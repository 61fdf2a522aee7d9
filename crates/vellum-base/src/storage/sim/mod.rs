//! A disk in memory that can lose power.
//!
//! Every file has a live image and a durable one, and between them the changes that no sync has
//! made certain. A power cut keeps any subset of them: of writes and holes sector by sector
//! (512 bytes), so that they are torn and reordered; of lengths, and of names. What the host must
//! guarantee, and the simulation therefore grants, is in docs/durability.md.

mod file;
mod image;
mod tree;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::file::SimFile;
use self::tree::{NodeId, Tree};
use super::op::{OpCounts, OpKind};
use super::rng::SeededRng;
use super::{DiskSpace, Entry, OpenMode, Storage, StorageFile, names_nothing};

/// How much of what is not certain survives a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Survival {
    Nothing,
    Everything,
    /// Each change whole or not at all, one in two.
    SomeChanges,
    /// Each sector by itself, this many in eight.
    SomeSectors(u64),
}

impl Survival {
    fn pick(rng: &mut SeededRng) -> Self {
        match rng.below(8) {
            0 => Survival::Nothing,
            1 => Survival::Everything,
            2 | 3 => Survival::SomeChanges,
            4 => Survival::SomeSectors(1),
            5 => Survival::SomeSectors(7),
            _ => Survival::SomeSectors(4),
        }
    }

    /// Whether a change that is one piece survives.
    fn whole(self, rng: &mut SeededRng) -> bool {
        match self {
            Survival::Nothing => false,
            Survival::Everything => true,
            Survival::SomeChanges => rng.chance(1, 2),
            Survival::SomeSectors(eighths) => rng.chance(eighths, 8),
        }
    }

    /// Whether a sector survives of a change of which `whole` was drawn.
    fn sector(self, whole: bool, rng: &mut SeededRng) -> bool {
        match self {
            Survival::SomeSectors(eighths) => rng.chance(eighths, 8),
            _ => whole,
        }
    }
}

/// The cause of every [`io::Error`] after the power has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the simulated power is off")]
pub struct PowerCut;

/// True for an error that a power cut caused.
pub fn is_power_cut(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|source| source.is::<PowerCut>())
}

/// Numbers boots and mounts, so that no two are alike.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

fn number() -> u64 {
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

#[derive(Debug, Clone)]
struct Disk {
    tree: Tree,
    /// Differs after each power cut.
    boot: u64,
    /// Differs after each power cut, and after each time that the file system went away alone.
    mount: u64,
    /// Operations that changed something or made it durable.
    changes: u64,
    counts: OpCounts,
    /// The change in which the power goes.
    cut_at: Option<u64>,
    off: bool,
    /// Bytes that all files together can take.
    capacity: Option<u64>,
}

impl Disk {
    fn cut(&self, seed: u64) -> Disk {
        Disk::with(self.tree.cut(&mut SeededRng::new(seed), None))
    }

    fn remount(&self, seed: u64, kept: Option<&str>) -> Disk {
        Disk {
            boot: self.boot,
            ..Disk::with(self.tree.cut(&mut SeededRng::new(seed), kept))
        }
    }

    fn with(tree: Tree) -> Disk {
        Disk {
            tree,
            boot: number(),
            mount: number(),
            changes: 0,
            counts: OpCounts::default(),
            cut_at: None,
            off: false,
            capacity: None,
        }
    }

    /// What can still be taken, of a disk with a limit.
    fn space(&self) -> Option<DiskSpace> {
        let size = self.capacity?;
        let allocated = self.tree.allocated();
        let free = size.max(allocated) - allocated;
        Some(DiskSpace {
            size,
            free,
            available: free,
        })
    }
}

/// A moment at which the power could go: an operation has begun, and nothing that it would make
/// durable is certain yet.
pub struct Moment<'a> {
    /// Number of the change, from 1.
    pub change: u64,
    /// What is being done.
    pub kind: OpKind,
    /// To what.
    pub path: &'a Path,
    disk: &'a Disk,
}

impl Moment<'_> {
    /// The disk as it would be found if the power went now; `seed` decides what survives.
    pub fn cut(&self, seed: u64) -> SimStorage {
        SimStorage::of(self.disk.cut(seed))
    }

    /// As [`SimStorage::remount`], at this moment.
    pub fn remount(&self, seed: u64, kept: Option<&str>) -> SimStorage {
        SimStorage::of(self.disk.remount(seed, kept))
    }
}

impl fmt::Debug for Moment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} {} (change {})",
            self.kind,
            self.path.display(),
            self.change
        )
    }
}

/// Looks at every moment; see [`SimStorage::observe`].
pub type Observer = Arc<dyn Fn(&Moment<'_>) + Send + Sync>;

struct Shared {
    disk: Mutex<Disk>,
    observer: RwLock<Option<Observer>>,
}

/// A simulated disk. Clones are the same disk; [`SimStorage::fork`] and [`SimStorage::cut`] make
/// others. With one thread and one seed everything happens again in the same way.
#[derive(Clone)]
pub struct SimStorage {
    shared: Arc<Shared>,
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimStorage")
    }
}

impl Default for SimStorage {
    fn default() -> Self {
        SimStorage::of(Disk::with(Tree::new()))
    }
}

impl SimStorage {
    /// An empty disk.
    pub fn new() -> Self {
        SimStorage::default()
    }

    fn of(disk: Disk) -> Self {
        SimStorage {
            shared: Arc::new(Shared {
                disk: Mutex::new(disk),
                observer: RwLock::new(None),
            }),
        }
    }

    /// From now on files can take so many bytes more; beyond that they get ENOSPC. Names take
    /// nothing. A disk after a power cut is without a limit again.
    pub fn limit(&self, more: u64) {
        let mut disk = self.shared.disk.lock();
        disk.capacity = Some(disk.tree.allocated() + more);
    }

    /// Whether writing a range of a file would take more than is left.
    fn refuses(&self, node: NodeId, offset: u64, len: u64) -> bool {
        let disk = self.shared.disk.lock();
        let wants = |space: DiskSpace| match disk.tree.file(node) {
            Ok(file) => file.live.wants(offset, len) > space.free,
            Err(_) => false,
        };
        disk.space().is_some_and(wants)
    }

    /// The disk as it is found after a power cut now; `seed` decides what survives. This disk is
    /// as before.
    pub fn cut(&self, seed: u64) -> SimStorage {
        SimStorage::of(self.shared.disk.lock().cut(seed))
    }

    /// The disk as it is found in the same boot after its file system was shut down and mounted
    /// again: the page cache is gone, and of what was not certain `seed` decides what survives. Files
    /// called `kept` survive whole: the host had just written them back. This disk is as before.
    pub fn remount(&self, seed: u64, kept: Option<&str>) -> SimStorage {
        SimStorage::of(self.shared.disk.lock().remount(seed, kept))
    }

    /// An independent copy, with all that is uncertain still uncertain.
    pub fn fork(&self) -> SimStorage {
        let disk = self.shared.disk.lock();
        SimStorage::of(Disk {
            boot: disk.boot,
            mount: disk.mount,
            ..Disk::with(disk.tree.clone())
        })
    }

    /// The power goes in the `n`th change from now (from 1): it takes effect, but nothing is made
    /// durable by it, and it and all that follows fail with [`PowerCut`].
    pub fn arm(&self, n: u64) {
        let mut disk = self.shared.disk.lock();
        disk.cut_at = Some(disk.changes + n);
    }

    /// True when the power has gone.
    pub fn is_off(&self) -> bool {
        self.shared.disk.lock().off
    }

    /// Changes so far: what [`SimStorage::arm`] counts.
    pub fn changes(&self) -> u64 {
        self.shared.disk.lock().changes
    }

    /// Operations so far, by kind.
    pub fn counts(&self) -> OpCounts {
        self.shared.disk.lock().counts
    }

    /// Has `observer` called within every change, before it makes anything durable. It must not
    /// use this disk, which stands still meanwhile, but through [`Moment`].
    pub fn observe(&self, observer: Option<Observer>) {
        *self.shared.observer.write() = observer;
    }

    /// An operation that changes nothing.
    fn look<T>(&self, kind: OpKind, work: impl FnOnce(&Tree) -> io::Result<T>) -> io::Result<T> {
        let mut disk = self.shared.disk.lock();
        if disk.off {
            return Err(io::Error::other(PowerCut));
        }
        disk.counts.add(kind);
        work(&disk.tree)
    }

    /// A change: `work` has its effect, which is not durable; `settle` makes durable what the
    /// operation promises to.
    fn change<T>(
        &self,
        kind: OpKind,
        path: &Path,
        work: impl FnOnce(&mut Tree) -> io::Result<T>,
        settle: impl FnOnce(&mut Tree) -> io::Result<()>,
    ) -> io::Result<T> {
        let mut disk = self.shared.disk.lock();
        if disk.off {
            return Err(io::Error::other(PowerCut));
        }
        disk.counts.add(kind);
        disk.changes += 1;
        let result = work(&mut disk.tree)?;
        if disk.cut_at == Some(disk.changes) {
            disk.off = true;
            return Err(io::Error::other(PowerCut));
        }
        if let Some(observer) = self.shared.observer.read().as_ref() {
            observer(&Moment {
                change: disk.changes,
                kind,
                path,
                disk: &disk,
            });
        }
        settle(&mut disk.tree)?;
        Ok(result)
    }
}

fn nothing(_: &mut Tree) -> io::Result<()> {
    Ok(())
}

impl Storage for SimStorage {
    fn boot_id(&self) -> [u8; 16] {
        u128::from(self.shared.disk.lock().boot).to_le_bytes()
    }

    fn disk_space(&self, _dir: &Path) -> io::Result<Option<DiskSpace>> {
        Ok(self.shared.disk.lock().space())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let found = self.look(OpKind::Open, |tree| match tree.find(path) {
            Ok(node) => Ok(Some(node)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })?;
        let node = match (found, mode) {
            (Some(_), OpenMode::CreateNew) => {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            (Some(node), _) => node,
            (None, OpenMode::CreateNew | OpenMode::Create) => {
                self.change(OpKind::Create, path, |tree| tree.create_file(path), nothing)?
            }
            (None, _) => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
        };
        self.look(OpKind::Look, |tree| tree.file(node).map(drop))?;
        Ok(Arc::new(SimFile {
            storage: self.clone(),
            path: path.to_owned(),
            node,
            writable: mode != OpenMode::Read,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.change(
            OpKind::CreateDir,
            path,
            |tree| tree.create_dir(path),
            nothing,
        )
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(OpKind::Rename, to, |tree| tree.rename(from, to), nothing)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(OpKind::Remove, path, |tree| tree.remove_file(path), nothing)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.change(OpKind::Remove, path, |tree| tree.remove_tree(path), nothing)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let names = self.look(OpKind::Look, |tree| tree.list(path))?;
        Ok(names
            .into_iter()
            .map(|(name, is_dir)| Entry { name, is_dir })
            .collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.look(OpKind::Look, |tree| match tree.find(path) {
            Ok(_) => Ok(true),
            Err(error) if names_nothing(&error) => Ok(false),
            Err(error) => Err(error),
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change(
            OpKind::SyncDir,
            path,
            |tree| tree.find(path).map(drop),
            |tree| tree.sync_dir(path),
        )
    }
}

#[cfg(test)]
mod tests;
