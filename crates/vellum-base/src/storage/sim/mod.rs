//! A disk in memory that can lose power.
//!
//! Every file has a live image and a durable one, and between them the changes that no sync has
//! made certain. A power cut keeps any subset of them: of writes and holes sector by sector
//! (512 bytes), so that they are torn and reordered; of lengths, and of names. What the host must
//! guarantee, and the simulation therefore grants, is in docs/durability.md.

mod image;
mod tree;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::tree::{NodeId, Tree};
use super::op::{OpCounts, OpKind};
use super::rng::SeededRng;
use super::{Entry, Evidence, FileId, Mapping, OpenMode, Proof, Storage, StorageFile};

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

    /// Bytes that can still be taken.
    fn free(&self) -> Option<u64> {
        let capacity = self.capacity?;
        Some(capacity.saturating_sub(self.tree.allocated()))
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
        let wants = |free| match disk.tree.file(node) {
            Ok(file) => file.live.wants(offset, len) > free,
            Err(_) => false,
        };
        disk.free().is_some_and(wants)
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

    fn free_space(&self, _dir: &Path) -> io::Result<Option<u64>> {
        Ok(self.shared.disk.lock().free())
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
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
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

#[derive(Debug)]
struct SimFile {
    storage: SimStorage,
    path: PathBuf,
    node: NodeId,
    writable: bool,
}

impl SimFile {
    /// ENOSPC where there is no room for a write.
    fn want(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.storage.refuses(self.node, offset, len) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }

    fn change(
        &self,
        kind: OpKind,
        work: impl FnOnce(&mut image::SimContent),
        settle: impl FnOnce(&mut image::SimContent),
    ) -> io::Result<()> {
        if !self.writable {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        self.storage.change(
            kind,
            &self.path,
            |tree| tree.file_mut(self.node).map(work),
            |tree| tree.file_mut(self.node).map(settle),
        )
    }
}

impl StorageFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.look(OpKind::Read, |tree| {
            tree.file(self.node)?.live.read(buf, offset);
            Ok(())
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.want(offset, buf.len() as u64)?;
        self.change(OpKind::Write, |file| file.write(offset, buf), |_| {})
    }

    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.want(offset, buf.len() as u64)?;
        self.change(
            OpKind::WriteDurable,
            |file| file.write(offset, buf),
            |file| file.sync_range(offset, buf.len() as u64),
        )
    }

    fn write_direct(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.want(offset, buf.len() as u64)?;
        self.change(OpKind::WriteDirect, |file| file.write(offset, buf), |_| {})
    }

    fn sync_data(&self) -> io::Result<()> {
        self.change(OpKind::SyncData, |_| {}, image::SimContent::sync)
    }

    fn sync(&self) -> io::Result<()> {
        self.change(OpKind::Sync, |_| {}, image::SimContent::sync)
    }

    fn len(&self) -> io::Result<u64> {
        self.storage
            .look(OpKind::Look, |tree| Ok(tree.file(self.node)?.live.len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(OpKind::SetLen, |file| file.set_len(len), |_| {})
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(OpKind::Punch, |file| file.punch(offset, len), |_| {})
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.want(offset, len)?;
        self.change(OpKind::Allocate, |file| file.reserve(offset, len), |_| {})
    }

    fn allocated(&self) -> io::Result<u64> {
        self.storage.look(OpKind::Look, |tree| {
            Ok(tree.file(self.node)?.live.allocated())
        })
    }

    fn id(&self) -> io::Result<FileId> {
        Ok(FileId {
            inode: self.node,
            ..FileId::default()
        })
    }

    fn has_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.storage.look(OpKind::Look, |tree| {
            Ok(tree.file(self.node)?.live.has_hole(offset, len))
        })
    }

    fn evidence(&self) -> io::Result<Evidence> {
        Ok(Evidence {
            mounts: [self.storage.shared.disk.lock().mount, 0],
            ..Evidence::default()
        })
    }

    fn prove(&self, evidence: &Evidence) -> io::Result<Option<Proof>> {
        let mount = self.storage.shared.disk.lock().mount;
        Ok(evidence.mounts.contains(&mount).then_some(Proof::Mount))
    }

    fn map(&self, offset: u64, len: usize) -> io::Result<Mapping> {
        self.storage.look(OpKind::Read, |tree| {
            let file = tree.file(self.node)?;
            if offset.saturating_add(len as u64) > file.live.len {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let mut bytes = vec![0; len];
            file.live.read(&mut bytes, offset);
            Ok(Mapping::Owned(bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const DIR: &str = "/layer";

    fn path(name: &str) -> PathBuf {
        Path::new(DIR).join(name)
    }

    fn disk() -> SimStorage {
        let disk = SimStorage::new();
        disk.create_dir(Path::new(DIR)).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        disk
    }

    fn names(disk: &SimStorage) -> Vec<String> {
        let entries = disk.list(Path::new(DIR)).unwrap();
        entries.into_iter().map(|entry| entry.name).collect()
    }

    fn outcomes<T: Ord>(disk: &SimStorage, each: impl Fn(&SimStorage) -> T) -> BTreeSet<T> {
        (0..300).map(|seed| each(&disk.cut(seed))).collect()
    }

    #[test]
    fn names_of_an_unsynced_directory_survive_in_any_subset() {
        let disk = disk();
        disk.open(&path("a"), OpenMode::CreateNew).unwrap();
        disk.open(&path("b"), OpenMode::CreateNew).unwrap();
        assert_eq!(outcomes(&disk, names).len(), 4);
        disk.sync_dir(Path::new(DIR)).unwrap();
        assert_eq!(
            outcomes(&disk, names),
            [vec!["a".into(), "b".into()]].into()
        );
    }

    #[test]
    fn an_atomic_replacement_leaves_the_old_or_the_new_content_whole_after_any_cut() {
        let disk = disk();
        disk.write_atomic(&path("f"), &[1; 3000]).unwrap();
        let cuts = disk.changes();
        for n in 1.. {
            let again = disk.fork();
            again.arm(n);
            let result = again.write_atomic(&path("f"), &[2; 5000]);
            for seed in 0..50 {
                let bytes = again.cut(seed).read_all(&path("f"), 9000).unwrap();
                let new = bytes == [2; 5000];
                assert!(
                    new || (bytes == [1; 3000] && result.is_err()),
                    "cut {n}, seed {seed}"
                );
            }
            if result.is_ok() {
                assert!(n > 5 && cuts > 5);
                break;
            }
            assert!(again.is_off());
        }
    }

    #[test]
    fn after_the_cut_everything_fails_and_says_why() {
        let disk = disk();
        let file = disk.open(&path("f"), OpenMode::Create).unwrap();
        disk.arm(2);
        file.write_at(&[1; 512], 0).unwrap();
        assert!(is_power_cut(&file.sync_data().unwrap_err()));
        assert!(is_power_cut(&file.read_at(&mut [0], 0).unwrap_err()));
        assert!(is_power_cut(&disk.list(Path::new(DIR)).unwrap_err()));
    }

    #[test]
    fn a_seed_gives_the_same_disk_every_time() {
        let disk = disk();
        let file = disk.open(&path("f"), OpenMode::Create).unwrap();
        disk.sync_dir(Path::new(DIR)).unwrap();
        file.write_at(&[7; 40960], 0).unwrap();
        let read = |seed| disk.cut(seed).read_all(&path("f"), 50000).unwrap();
        for seed in 0..20 {
            assert_eq!(read(seed), read(seed));
        }
    }
}
