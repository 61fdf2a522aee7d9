//! Files of a simulated disk.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use super::SimStorage;
use super::image::SimContent;
use super::tree::{NodeId, Tree};
use crate::storage::op::OpKind;
use crate::storage::{Evidence, FileId, Mapping, Proof, StorageFile, end_of};

/// An open file of a simulated disk.
#[derive(Debug)]
pub(super) struct SimFile {
    pub(super) storage: SimStorage,
    pub(super) path: PathBuf,
    pub(super) node: NodeId,
    pub(super) writable: bool,
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
        work: impl FnOnce(&mut SimContent),
        settle: impl FnOnce(&mut SimContent),
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
        self.change(OpKind::SyncData, |_| {}, SimContent::sync)
    }

    fn sync(&self) -> io::Result<()> {
        self.change(OpKind::Sync, |_| {}, SimContent::sync)
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

    fn visit_allocated(&self, each: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        let look = |tree: &Tree| Ok(tree.file(self.node)?.live.allocated_pages());
        let pages = self.storage.look(OpKind::Look, look)?;
        pages.into_iter().for_each(each);
        Ok(())
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
            if end_of(offset, len as u64)? > file.live.len {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let mut bytes = vec![0; len];
            file.live.read(&mut bytes, offset);
            Ok(Mapping::Owned(bytes))
        })
    }
}
