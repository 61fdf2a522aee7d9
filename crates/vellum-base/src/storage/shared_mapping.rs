//! Files that are written through shared memory.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::fcntl::{FallocateFlags, fallocate};

use super::waiting::waits;
use super::{Evidence, FileId, SharedFile, end_of, evidence, host_offset};
use crate::block::in_memory;

/// A file that is written through a shared mapping: a store in memory instead of a system call.
#[derive(Debug)]
pub(super) struct SharedMapping {
    file: File,
    map: memmap2::MmapMut,
    /// By piece: its space was taken.
    reserved: Vec<bool>,
}

/// Space is taken in pieces of this size.
const RESERVE: u64 = 128 << 10;

impl SharedMapping {
    /// Maps a new file, which it makes `len` bytes long.
    pub(super) fn new(file: File, len: u64) -> io::Result<Self> {
        file.set_len(len)?;
        // SAFETY: the file was just made by us, in a directory that only its owner writes, and
        // nobody cuts it while the layer's lease is held.
        let map = unsafe { memmap2::MmapMut::map_mut(&file)? };
        // Otherwise the first touch reads around itself: megabytes of zeros, and milliseconds.
        map.advise(memmap2::Advice::Random)?;
        Ok(SharedMapping {
            file,
            map,
            reserved: vec![false; in_memory(len.div_ceil(RESERVE))],
        })
    }

    /// Takes the space of the pieces that the range touches; `use_soon`: their memory too.
    fn take(&mut self, offset: u64, len: u64, use_soon: bool) -> io::Result<()> {
        let (first, end) = (offset / RESERVE, end_of(offset, len)?.div_ceil(RESERVE));
        let pieces = self.reserved.iter_mut().enumerate();
        let range = in_memory(first)..in_memory(end);
        for (piece, taken) in pieces.skip(range.start).take(range.len()) {
            if *taken {
                continue;
            }
            let _waits = waits();
            let start = piece as u64 * RESERVE;
            let len = RESERVE.min(self.map.len() as u64 - start);
            let (at, size) = (host_offset(start)?, host_offset(len)?);
            fallocate(self.file.as_fd(), FallocateFlags::empty(), at, size)?;
            if use_soon {
                // All its pages at once cost less than a fault for each; kernels before 5.14 cannot.
                let soon = memmap2::Advice::PopulateWrite;
                let _ = self
                    .map
                    .advise_range(soon, in_memory(start), in_memory(len));
            }
            *taken = true;
        }
        Ok(())
    }
}

impl SharedFile for SharedMapping {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = end_of(offset, bytes.len() as u64)?;
        // A store to a page without space would kill the process.
        self.take(offset, bytes.len() as u64, true)?;
        match self.map.get_mut(in_memory(offset)..in_memory(end)) {
            Some(target) => target.copy_from_slice(bytes),
            None => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
        // The bytes are in place before whatever the program does next.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        Ok(())
    }

    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.take(offset, len, false)
    }

    fn id(&self) -> io::Result<FileId> {
        evidence::file_id(&self.file)
    }

    fn evidence(&self) -> io::Result<Evidence> {
        evidence::gather(&self.file)
    }
}
