//! A file of a storage that fails: short writes, and syncs that lose what was written.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Fault, LostFile, Shared};
use crate::block::{in_memory, part, part_mut};
use crate::storage::op::OpKind;
use crate::storage::{Evidence, FileId, Mapping, Proof, StorageFile};

/// A short write ends at a multiple of this.
const SECTOR: u64 = 512;

/// Bytes of a block that a short synchronous write leaves whole.
const PIECE: usize = 4096;

/// What was in a range before it was changed.
#[derive(Debug)]
pub(super) struct Before {
    offset: u64,
    bytes: Vec<u8>,
    len: u64,
}

/// A file whose operations fail where the plan says.
#[derive(Debug)]
pub(super) struct FaultFile {
    inner: Arc<dyn StorageFile>,
    path: PathBuf,
    shared: Arc<Shared>,
    undo: Mutex<Undo>,
}

/// Undoes writes, from the newest to the oldest.
pub(super) fn put_back(file: &dyn StorageFile, lost: Vec<Before>) -> io::Result<()> {
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
    /// `lost` is what was there before writes that a sync has lost.
    pub(super) fn new(
        inner: Arc<dyn StorageFile>,
        path: &Path,
        shared: Arc<Shared>,
        lost: Vec<Before>,
    ) -> Self {
        FaultFile {
            inner,
            path: path.to_owned(),
            shared,
            undo: Mutex::new(Undo {
                lost,
                ..Undo::default()
            }),
        }
    }

    fn run<T>(&self, kind: OpKind, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.shared.run(kind, &self.path, work)
    }

    fn remember(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = vec![0; in_memory(len)];
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
                let len = in_memory(to - from);
                let target = in_memory(from - before.offset);
                part_mut(&mut before.bytes, target, len).copy_from_slice(part(
                    buf,
                    in_memory(from - offset),
                    len,
                ));
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
                // The last border of a sector in its first half; there may be none.
                let end = (offset + buf.len() as u64 / 2) / SECTOR * SECTOR;
                part(buf, 0, in_memory(end.max(offset) - offset))
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
            Some(Fault::Short(_)) => part(buf, 0, buf.len() / 2 / PIECE * PIECE),
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
            if len < old {
                self.remember(len, old - len)?;
            } else {
                self.remember(old, 0)?;
            }
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

    fn visit_allocated(&self, each: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        self.run(OpKind::Look, || self.inner.visit_allocated(each))
    }

    fn check_written_back(&self) -> io::Result<()> {
        let fault = self.shared.next(OpKind::CheckWrittenBack, &self.path);
        let Some(fault) = fault else {
            return self.inner.check_written_back();
        };
        if let Fault::LostSync(_) = fault {
            self.lose();
        }
        Err(fault.error())
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
