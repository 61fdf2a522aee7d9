//! A storage that fails where it is told to, and counts what is asked of it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::op::{OpCounts, OpKind};
use super::{
    Entry, Evidence, FileId, Held, LockMode, Mapping, OpenMode, Proof, Storage, StorageFile,
};

/// A short write ends at a multiple of this.
const SECTOR: u64 = 512;

/// Bytes of a block that a short synchronous write leaves whole.
const PIECE: usize = 4096;

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

    fn free_space(&self, dir: &Path) -> io::Result<Option<u64>> {
        self.inner.free_space(dir)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let kind = match mode {
            OpenMode::Read | OpenMode::Write => OpKind::Open,
            OpenMode::CreateNew | OpenMode::Create => OpKind::Create,
        };
        let inner = self
            .shared
            .run(kind, path, || self.inner.open(path, mode))?;
        let mut undo = Undo::default();
        self.shared.lost.lock().retain_mut(|lost| {
            let same = lost.path == path;
            if same {
                undo.lost.append(&mut lost.before);
            }
            !same
        });
        Ok(Arc::new(FaultFile {
            inner,
            path: path.to_owned(),
            shared: self.shared.clone(),
            undo: Mutex::new(undo),
        }))
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

/// What was in a range before it was changed.
#[derive(Debug)]
struct Before {
    offset: u64,
    bytes: Vec<u8>,
    len: u64,
}

#[derive(Debug)]
struct FaultFile {
    inner: Arc<dyn StorageFile>,
    path: PathBuf,
    shared: Arc<Shared>,
    undo: Mutex<Undo>,
}

/// Undoes writes, from the newest to the oldest.
fn put_back(file: &dyn StorageFile, lost: Vec<Before>) -> io::Result<()> {
    for before in lost.into_iter().rev() {
        file.write_at(&before.bytes, before.offset)?;
        file.set_len(before.len)?;
    }
    Ok(())
}

/// What was there before, oldest first.
#[derive(Debug, Default)]
struct Undo {
    /// Before writes that no sync has covered.
    unsynced: Vec<Before>,
    /// Before writes that a sync has lost.
    lost: Vec<Before>,
}

impl FaultFile {
    fn run<T>(&self, kind: OpKind, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.shared.run(kind, &self.path, work)
    }

    fn remember(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = vec![0; len as usize];
        self.inner.read_at(&mut bytes, offset)?;
        let len = self.inner.len()?;
        self.undo
            .lock()
            .unsynced
            .push(Before { offset, bytes, len });
        Ok(())
    }

    fn lose(&self) {
        let undo = &mut *self.undo.lock();
        undo.lost.append(&mut undo.unsynced);
    }

    /// A sync was successful: it covers what was written since the one that was lost.
    fn settle(&self) -> io::Result<()> {
        let certain = std::mem::take(&mut self.undo.lock().unsynced);
        if self.undo.lock().lost.is_empty() {
            return Ok(());
        }
        for before in certain {
            let mut now = before.bytes;
            self.inner.read_at(&mut now, before.offset)?;
            self.keep(&now, before.offset);
        }
        Ok(())
    }

    /// Brings back what was there before the writes that a sync lost.
    fn revert(&self) -> io::Result<()> {
        let lost = std::mem::take(&mut self.undo.lock().lost);
        put_back(&*self.inner, lost)
    }

    /// The bytes are durable: no lost sync takes them away.
    fn keep(&self, buf: &[u8], offset: u64) {
        let undo = &mut *self.undo.lock();
        for before in undo.unsynced.iter_mut().chain(&mut undo.lost) {
            let from = before.offset.max(offset);
            let to = (before.offset + before.bytes.len() as u64).min(offset + buf.len() as u64);
            if from < to {
                let target = (from - before.offset) as usize..(to - before.offset) as usize;
                let source = (from - offset) as usize..(to - offset) as usize;
                if let (Some(target), Some(source)) =
                    (before.bytes.get_mut(target), buf.get(source))
                {
                    target.copy_from_slice(source);
                }
            }
        }
    }

    /// A write that a sync has to follow.
    fn write_as(
        &self,
        kind: OpKind,
        buf: &[u8],
        offset: u64,
        write: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let fault = self.shared.next(kind, &self.path);
        let buf = match fault {
            None | Some(Fault::Done(_)) => buf,
            Some(Fault::Short(_)) => {
                let end = (offset + buf.len() as u64 / 2) / SECTOR * SECTOR;
                buf.get(..end.saturating_sub(offset) as usize)
                    .unwrap_or_default()
            }
            Some(_) => &[],
        };
        if !buf.is_empty() {
            self.remember(offset, buf.len() as u64)?;
            write(buf)?;
        }
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    fn sync_as(&self, kind: OpKind, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match self.shared.next(kind, &self.path) {
            Some(fault @ Fault::LostSync(_)) => {
                self.lose();
                Err(fault.error())
            }
            Some(fault @ Fault::Done(_)) => {
                work()?;
                self.settle()?;
                Err(fault.error())
            }
            Some(fault) => Err(fault.error()),
            None => {
                work()?;
                self.settle()
            }
        }
    }
}

impl Drop for FaultFile {
    fn drop(&mut self) {
        if self
            .shared
            .keeps_lost
            .load(std::sync::atomic::Ordering::Relaxed)
        {
            let before = std::mem::take(&mut self.undo.lock().lost);
            if !before.is_empty() {
                self.shared.lost.lock().push(LostFile {
                    path: self.path.clone(),
                    file: self.inner.clone(),
                    before,
                });
            }
            return;
        }
        // The disk below may have lost its power; then there is nothing to bring back.
        let _ = self.revert();
    }
}

impl StorageFile for FaultFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.run(OpKind::Read, || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_as(OpKind::Write, buf, offset, |buf| {
            self.inner.write_at(buf, offset)
        })
    }

    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let fault = self.shared.next(OpKind::WriteDurable, &self.path);
        let buf = match fault {
            None | Some(Fault::Done(_)) => buf,
            Some(Fault::Short(_)) => buf.get(..buf.len() / 2 / PIECE * PIECE).unwrap_or_default(),
            Some(_) => &[],
        };
        if !buf.is_empty() {
            self.inner.write_durable(buf, offset)?;
            self.keep(buf, offset);
        }
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    fn write_direct(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_as(OpKind::WriteDirect, buf, offset, |buf| {
            self.inner.write_direct(buf, offset)
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_as(OpKind::SyncData, || self.inner.sync_data())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_as(OpKind::Sync, || self.inner.sync())
    }

    fn len(&self) -> io::Result<u64> {
        self.run(OpKind::Look, || self.inner.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.run(OpKind::SetLen, || {
            let old = self.inner.len()?;
            self.remember(len.min(old), old.saturating_sub(len))?;
            self.inner.set_len(len)
        })
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(OpKind::Punch, || {
            self.remember(offset, len)?;
            self.inner.punch_hole(offset, len)
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(OpKind::Allocate, || self.inner.allocate(offset, len))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.run(OpKind::Look, || self.inner.allocated())
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(offset, len);
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.revert()?;
        self.inner.drop_cache()
    }

    fn id(&self) -> io::Result<FileId> {
        self.inner.id()
    }

    fn changed(&self) -> io::Result<u64> {
        self.inner.changed()
    }

    fn has_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.inner.has_hole(offset, len)
    }

    fn evidence(&self) -> io::Result<Evidence> {
        self.inner.evidence()
    }

    fn prove(&self, evidence: &Evidence) -> io::Result<Option<Proof>> {
        self.inner.prove(evidence)
    }

    fn map(&self, offset: u64, len: usize) -> io::Result<Mapping> {
        self.run(OpKind::Read, || self.inner.map(offset, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::SimStorage;

    fn storage() -> (FaultStorage, Arc<dyn StorageFile>) {
        let storage = FaultStorage::new(Arc::new(SimStorage::new()));
        let file = storage.open(Path::new("/f"), OpenMode::Create).unwrap();
        file.write_at(&[1; 8192], 0).unwrap();
        file.sync().unwrap();
        (storage, file)
    }

    fn plan(kind: OpKind, nth: u64, fault: Fault) -> FaultPlan {
        FaultPlan {
            kinds: vec![kind],
            nth,
            fault,
            lasting: false,
        }
    }

    fn read(file: &Arc<dyn StorageFile>) -> [u8; 8192] {
        let mut bytes = [0; 8192];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_nth_operation_of_its_kind_fails_and_no_other() {
        let (storage, file) = storage();
        storage.fail(plan(OpKind::Write, 2, Fault::Errno(libc::ENOSPC)));
        file.write_at(&[2; 10], 0).unwrap();
        file.sync().unwrap();
        let error = file.write_at(&[3; 10], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(read(&file)[0], 2);
        file.write_at(&[4; 10], 0).unwrap();
        assert_eq!(
            (storage.fired(), storage.counts().of(OpKind::Write)),
            (1, 4)
        );
    }

    #[test]
    fn a_short_write_leaves_whole_sectors_of_its_first_half() {
        let (storage, file) = storage();
        storage.fail(plan(OpKind::Write, 1, Fault::Short(libc::EIO)));
        file.write_at(&[2; 3000], 100).unwrap_err();
        assert_eq!((read(&file)[1535], read(&file)[1536]), (2, 1));
    }

    #[test]
    fn what_a_sync_lost_is_gone_once_the_file_is_closed_but_for_later_writes() {
        let (storage, file) = storage();
        file.write_at(&[2; 8192], 0).unwrap();
        file.punch_hole(0, 4096).unwrap();
        file.write_durable(&[3; 4096], 4096).unwrap();
        storage.fail(plan(OpKind::SyncData, 1, Fault::LostSync(libc::EIO)));
        file.sync_data().unwrap_err();
        assert_eq!(read(&file)[..4096], [0; 4096]);
        // The kernel reports it once.
        file.write_at(&[4; 512], 512).unwrap();
        file.sync_data().unwrap();
        drop(file);
        let file = storage.open(Path::new("/f"), OpenMode::Read).unwrap();
        let bytes = read(&file);
        assert_eq!(bytes[..512], [1; 512]);
        assert_eq!(bytes[512..1024], [4; 512]);
        assert_eq!(bytes[1024..4096], [1; 3072]);
        assert_eq!(bytes[4096..], [3; 4096]);
    }

    #[test]
    fn a_lasting_fault_lasts_until_it_is_healed() {
        let (storage, file) = storage();
        let fault = plan(OpKind::Write, 2, Fault::Errno(libc::EDQUOT));
        storage.fail(FaultPlan {
            lasting: true,
            ..fault
        });
        file.write_at(&[2], 0).unwrap();
        for _ in 0..3 {
            file.write_at(&[2], 0).unwrap_err();
        }
        storage.heal();
        file.write_at(&[2], 0).unwrap();
    }
}
