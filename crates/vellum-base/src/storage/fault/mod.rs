//! A storage that fails where it is told to, and counts what is asked of it.

mod file;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use self::file::{Before, FaultFile, put_back};
use super::op::{OpCounts, OpKind};
use super::{DiskSpace, Entry, Held, LockMode, OpenMode, Storage, StorageFile};

/// How an operation fails. The number is the errno that it fails with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens.
    Errno(i32),
    /// A write writes its first half, up to a whole sector of 512 bytes; all else does nothing.
    Short(i32),
    /// As the page cache does when writeback fails: a sync loses every write of the file since the
    /// last sync. They can be read until the file is closed (see [`FaultStorage::keep_lost`]), and
    /// are gone then; later syncs succeed and do not bring them to the disk. All else does nothing.
    LostSync(i32),
    /// It happens, and is reported as failed all the same.
    Done(i32),
}

impl Fault {
    fn error(self) -> io::Error {
        let (Fault::Errno(code) | Fault::Short(code) | Fault::LostSync(code) | Fault::Done(code)) =
            self;
        io::Error::from_raw_os_error(code)
    }
}

/// Which operation fails, and how.
#[derive(Debug, Clone)]
pub struct FaultPlan {
    /// Kinds that count; empty: every kind.
    pub kinds: Vec<OpKind>,
    /// The one that fails, from 1, counted from when the plan was set.
    pub nth: u64,
    /// How it fails.
    pub fault: Fault,
    /// Whether all later ones of these kinds fail too, until [`FaultStorage::heal`].
    pub lasting: bool,
}

impl FaultPlan {
    /// A process that dies in its first operation, of whatever kind: that one fails, and all later ones.
    pub fn death() -> Self {
        FaultPlan {
            kinds: Vec::new(),
            nth: 1,
            fault: Fault::Errno(libc::EIO),
            lasting: true,
        }
    }

    /// Has `survive` meet this fault in operation [`FaultPlan::nth`], then in the next one, and so on, until
    /// it answers false: there was no such operation.
    ///
    /// # Errors
    /// What `survive` says, after the plan that it says it of.
    pub fn in_each_operation(
        mut self,
        mut survive: impl FnMut(&FaultPlan) -> Result<bool, String>,
    ) -> Result<(), String> {
        while survive(&self).map_err(|why| format!("{self:?}: {why}"))? {
            self.nth += 1;
        }
        Ok(())
    }
}

/// Called before each operation, on its thread; it may block.
pub type Hook = Arc<dyn Fn(OpKind, &Path) + Send + Sync>;

#[derive(Default)]
struct State {
    counts: OpCounts,
    plan: Option<FaultPlan>,
    /// Operations that the plan counted.
    seen: u64,
    fired: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    hook: RwLock<Option<Hook>>,
    /// What syncs have lost stays readable when its file is closed.
    keeps_lost: std::sync::atomic::AtomicBool,
    /// What was there before the writes that syncs have lost, of files that are closed.
    lost: Mutex<Vec<LostFile>>,
}

struct LostFile {
    path: PathBuf,
    file: Arc<dyn StorageFile>,
    before: Vec<Before>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    /// Counts an operation; says whether it is to fail.
    fn next(&self, kind: OpKind, path: &Path) -> Option<Fault> {
        let hook = self.hook.read().clone();
        if let Some(hook) = hook {
            hook(kind, path);
        }
        let state = &mut *self.state.lock();
        state.counts.add(kind);
        let plan = state.plan.as_ref()?;
        if !plan.kinds.is_empty() && !plan.kinds.contains(&kind) {
            return None;
        }
        state.seen += 1;
        let fails = state.seen == plan.nth || plan.lasting && state.seen > plan.nth;
        state.fired += u64::from(fails);
        fails.then_some(plan.fault)
    }

    fn run<T>(
        &self,
        kind: OpKind,
        path: &Path,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match self.next(kind, path) {
            None => work(),
            Some(fault) => {
                if let Fault::Done(_) = fault {
                    work()?;
                }
                Err(fault.error())
            }
        }
    }
}

/// Wraps any storage. Clones share their plan and their counts.
#[derive(Debug, Clone)]
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    shared: Arc<Shared>,
}

impl FaultStorage {
    /// A storage that does not fail yet.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        FaultStorage {
            inner,
            shared: Arc::default(),
        }
    }

    /// Sets the plan, in place of the one before.
    pub fn fail(&self, plan: FaultPlan) {
        let state = &mut *self.shared.state.lock();
        state.plan = Some(plan);
        state.seen = 0;
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.shared.state.lock().plan = None;
    }

    /// Operations that were made to fail.
    pub fn fired(&self) -> u64 {
        self.shared.state.lock().fired
    }

    /// Operations so far, failed ones too.
    pub fn counts(&self) -> OpCounts {
        self.shared.state.lock().counts
    }

    /// From now on, what a sync has lost can be read after its file was closed too, as on a real
    /// host: until [`StorageFile::drop_cache`] or [`FaultStorage::evict`]. Keyed by path, so not
    /// for files that are renamed.
    pub fn keep_lost(&self) {
        let order = std::sync::atomic::Ordering::Relaxed;
        self.shared.keeps_lost.store(true, order);
    }

    /// The host needs its memory: what syncs have lost, of files that are closed, is gone.
    ///
    /// # Errors
    /// Where the storage below fails.
    pub fn evict(&self) -> io::Result<()> {
        for lost in std::mem::take(&mut *self.shared.lost.lock()) {
            put_back(&*lost.file, lost.before)?;
        }
        Ok(())
    }

    /// Has `hook` called before each operation.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.shared.hook.write() = hook;
    }
}

impl Storage for FaultStorage {
    fn boot_id(&self) -> [u8; 16] {
        self.inner.boot_id()
    }

    fn disk_space(&self, dir: &Path) -> io::Result<Option<DiskSpace>> {
        self.inner.disk_space(dir)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let kind = match mode {
            OpenMode::Read | OpenMode::Write => OpKind::Open,
            OpenMode::CreateNew | OpenMode::Create => OpKind::Create,
        };
        let inner = self
            .shared
            .run(kind, path, || self.inner.open(path, mode))?;
        let mut before = Vec::new();
        self.shared.lost.lock().retain_mut(|lost| {
            let same = lost.path == path;
            if same {
                before.append(&mut lost.before);
            }
            !same
        });
        let shared = self.shared.clone();
        Ok(Arc::new(FaultFile::new(inner, path, shared, before)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.shared
            .run(OpKind::CreateDir, path, || self.inner.create_dir(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.shared
            .run(OpKind::Rename, to, || self.inner.rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.shared
            .run(OpKind::Remove, path, || self.inner.remove_file(path))
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.shared
            .run(OpKind::Remove, path, || self.inner.remove_tree(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.shared
            .run(OpKind::Look, path, || self.inner.list(path))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.shared
            .run(OpKind::Look, path, || self.inner.exists(path))
    }

    fn lock(&self, path: &Path, mode: LockMode, wait: bool) -> io::Result<Option<Box<dyn Held>>> {
        self.inner.lock(path, mode, wait)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.shared
            .run(OpKind::SyncDir, path, || self.inner.sync_dir(path))
    }
}

#[cfg(test)]
mod tests;
