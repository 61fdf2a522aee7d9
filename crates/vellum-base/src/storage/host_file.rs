//! One of the host's files: what is in memory is read without waiting, and what is to be durable is
//! written past the page cache where the host can.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use parking_lot::Mutex;

use super::waiting::{about_to_wait, refuses_to_wait, waits};
use super::{Evidence, FileId, Mapping, Proof, StorageFile, end_of, evidence, host_offset};
use crate::block::part_from;

/// Whether synchronous writes may bypass the page cache: found out at the first one.
#[derive(Debug, Default)]
struct Direct {
    state: AtomicU8,
    file: OnceLock<File>,
}

/// Values of [`Direct::state`]; 0 is: not tried yet.
const DIRECT_WORKS: u8 = 1;
const DIRECT_REFUSED: u8 = 2;

/// A byte that no file has.
const PAST_ALL: libc::off64_t = 1 << 62;

/// Alignment of the buffer, offset and length of an O_DIRECT write that suits any device.
const DIRECT_ALIGN: usize = 4096;

/// A file that is open.
#[derive(Debug)]
pub(super) struct HostFile {
    file: File,
    direct: Direct,
    /// A second descriptor, which asks whether write-back failed: the kernel tells each descriptor of a
    /// failure once, and the other one's sync would take the answer. From when somebody asks until all
    /// is durable; of a failure that nobody was told of by then, a new one is told.
    watch: Mutex<Option<File>>,
    /// The file system can say that a read would wait.
    reads_cached: AtomicBool,
    /// Whether what is said to be durable is: not in a file that is thrown away.
    durable: bool,
}

impl HostFile {
    pub(super) fn new(file: File) -> Self {
        HostFile {
            file,
            direct: Direct::default(),
            watch: Mutex::new(None),
            reads_cached: AtomicBool::new(true),
            durable: true,
        }
    }

    /// As [`HostFile::new`], a file that is thrown away before anybody could miss it.
    pub(super) fn scratch(file: File) -> Self {
        HostFile {
            durable: false,
            ..HostFile::new(file)
        }
    }

    /// A second descriptor of the same file with O_DIRECT, or `None` where the host refuses it.
    fn direct(&self) -> Option<&File> {
        match self.direct.state.load(Ordering::Acquire) {
            DIRECT_WORKS => self.direct.file.get(),
            DIRECT_REFUSED => None,
            _ => {
                let mut options = OpenOptions::new();
                let options = options.write(true).custom_flags(libc::O_DIRECT);
                let state = match self.open_again(options) {
                    Ok(file) => {
                        // Another thread may have been first: then ours is closed again.
                        let _ = self.direct.file.set(file);
                        DIRECT_WORKS
                    }
                    Err(_) => DIRECT_REFUSED,
                };
                self.direct.state.store(state, Ordering::Release);
                self.direct.file.get()
            }
        }
    }

    /// Another descriptor of the same file, which has its own flags and is told of errors by itself.
    fn open_again(&self, options: &OpenOptions) -> io::Result<File> {
        options.open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Writes all of `buf`, with O_DIRECT where buffer, offset and host allow it; `flags` are those of
    /// pwritev2(2).
    fn write_past_cache(
        &self,
        mut buf: &[u8],
        mut offset: u64,
        flags: libc::c_int,
    ) -> io::Result<()> {
        about_to_wait();
        let _waits = waits();
        while !buf.is_empty() {
            let aligned = (buf.as_ptr() as usize).is_multiple_of(DIRECT_ALIGN)
                && buf.len().is_multiple_of(DIRECT_ALIGN)
                && offset.is_multiple_of(DIRECT_ALIGN as u64);
            let direct = if aligned { self.direct() } else { None };
            let written = match write_once(direct.unwrap_or(&self.file), buf, offset, flags) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) if direct.is_some() && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.direct.state.store(DIRECT_REFUSED, Ordering::Release);
                    0
                }
                Err(error) => return Err(error),
            };
            buf = part_from(buf, written);
            offset += written as u64;
        }
        Ok(())
    }
}

/// One synchronous write (RWF_DSYNC); returns the bytes written.
pub fn write_dsync(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    write_once(file, buf, offset, libc::RWF_DSYNC)
}

/// One pwritev2(2); returns the bytes written.
fn write_once(file: &File, buf: &[u8], offset: u64, flags: libc::c_int) -> io::Result<usize> {
    let at = host_offset(offset)?;
    let iov = libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the descriptor is open for the call, and `iov` describes `buf`, which outlives it
    // and is only read.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), &iov, 1, at, flags) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Reads what the page cache holds at `offset`; EAGAIN where the rest would have to wait for the disk,
/// EOPNOTSUPP where the file system cannot tell (preadv2(2), RWF_NOWAIT).
fn read_cached(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let at = host_offset(offset)?;
    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the descriptor is open for the call, and `iov` describes `buf`, which outlives it and
    // is borrowed for writing.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &iov, 1, at, libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

impl StorageFile for HostFile {
    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        // What is in memory is read without a word; only the rest waits.
        let mut cached = self.reads_cached.load(Ordering::Relaxed);
        while !buf.is_empty() {
            let read = if cached {
                read_cached(&self.file, buf, offset)
            } else {
                let _waits = waits();
                self.file.read_at(buf, offset)
            };
            match read {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(read) => {
                    buf = buf.split_at_mut(read).1;
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if cached => {
                    if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                        self.reads_cached.store(false, Ordering::Relaxed);
                    }
                    if refuses_to_wait() {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    cached = false;
                    about_to_wait();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _waits = waits();
        self.file.write_all_at(buf, offset)
    }

    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if !self.durable {
            return self.write_at(buf, offset);
        }
        self.write_past_cache(buf, offset, libc::RWF_DSYNC)
    }

    fn write_direct(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if !self.durable {
            return self.write_at(buf, offset);
        }
        self.write_past_cache(buf, offset, 0)
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        about_to_wait();
        let _waits = waits();
        self.file.sync_data()?;
        *self.watch.lock() = None;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        about_to_wait();
        let _waits = waits();
        self.file.sync_all()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _waits = waits();
        self.file.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let _waits = waits();
        fallocate(
            self.file.as_fd(),
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            host_offset(offset)?,
            host_offset(len)?,
        )?;
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let _waits = waits();
        fallocate(
            self.file.as_fd(),
            FallocateFlags::empty(),
            host_offset(offset)?,
            host_offset(len)?,
        )?;
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn visit_allocated(&self, each: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        let _waits = waits();
        for extent in fiemap::Fiemap::new(&self.file) {
            let extent = extent?;
            let end = extent.fe_logical.saturating_add(extent.fe_length);
            each(extent.fe_logical..end);
        }
        Ok(())
    }

    fn start_writing_back(&self) {
        if !self.durable {
            return;
        }
        // SAFETY: the descriptor is open for the call, which takes integers alone. It neither waits
        // for what it starts nor takes note of errors, so those are still the next sync's to tell.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn check_written_back(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE;
        let mut watch = self.watch.lock();
        if watch.is_none() {
            *watch = self.open_again(OpenOptions::new().read(true)).ok();
        }
        // Where the host refuses a second one the first asks.
        let watch = watch.as_ref().unwrap_or(&self.file).as_raw_fd();
        // SAFETY: the descriptor is open for the call, which takes integers alone. It waits for what is
        // being written of a range that has nothing, and tells of an error anywhere in the file.
        let asked = unsafe { libc::sync_file_range(watch, PAST_ALL, 1, flags) };
        match Errno::result(asked) {
            // Whoever has no such question, or does not let us ask, has not said that something failed.
            Ok(_) | Err(Errno::ENOSYS | Errno::EPERM | Errno::EINVAL | Errno::ESPIPE) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let soon = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        // A hint: a refusal changes nothing.
        if let (Ok(at), Ok(len)) = (host_offset(offset), host_offset(len)) {
            let _ = nix::fcntl::posix_fadvise(&self.file, at, len, soon);
        }
    }

    fn drop_cache(&self) -> io::Result<()> {
        // To the end of the file.
        nix::fcntl::posix_fadvise(
            &self.file,
            0,
            0,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        )?;
        Ok(())
    }

    fn id(&self) -> io::Result<FileId> {
        evidence::file_id(&self.file)
    }

    fn changed(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        let nanoseconds = metadata.ctime_nsec().cast_unsigned();
        Ok(evidence::nanoseconds(metadata.ctime(), nanoseconds))
    }

    fn has_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        evidence::has_hole(&self.file, offset, len)
    }

    fn evidence(&self) -> io::Result<Evidence> {
        evidence::gather(&self.file)
    }

    fn prove(&self, evidence: &Evidence) -> io::Result<Option<Proof>> {
        evidence::prove(&self.file, evidence)
    }

    fn map(&self, offset: u64, len: usize) -> io::Result<Mapping> {
        if len == 0 {
            return Ok(Mapping::Owned(Vec::new()));
        }
        if end_of(offset, len as u64)? > self.len()? {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        // SAFETY: only what nobody changes is mapped: sealed files, and the table of a map, which
        // is replaced and never written again. The store is writable by its owner alone, and the
        // range was just found to lie within the file.
        let map = unsafe {
            memmap2::MmapOptions::new()
                .offset(offset)
                .len(len)
                .map(&self.file)?
        };
        Ok(Mapping::Mapped(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{FileStorage, OpenMode, Storage};
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn a_thread_hears_of_reads_that_wait_for_the_disk_and_of_syncs_but_not_of_reads_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = FileStorage.open(&path, OpenMode::CreateNew).unwrap();
        file.write_at(&[7; 8192], 0).unwrap();
        let waits = Rc::new(Cell::new(0));
        let heard = Rc::clone(&waits);
        crate::storage::listen_for_waits(move || heard.set(heard.get() + 1));
        file.sync_data().unwrap();
        assert_eq!(waits.get(), 1);
        let mut buf = [0; 8192];
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!((waits.get(), buf), (1, [7; 8192]));
        let in_memory = nix::sys::statfs::fstatfs(File::open(&path).unwrap())
            .unwrap()
            .filesystem_type()
            == nix::sys::statfs::TMPFS_MAGIC;
        if !in_memory {
            // The kernel drops what nobody else works on at that moment.
            for _ in 0..1000 {
                file.drop_cache().unwrap();
                file.read_at(&mut buf, 0).unwrap();
                if waits.get() > 1 {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            assert_eq!((waits.get(), buf), (2, [7; 8192]));
        }
        // Beyond the end: zeros, as in a hole.
        file.read_at(&mut buf, 4096).unwrap();
        assert_eq!(
            (&buf[..4096], &buf[4096..]),
            (&[7; 4096][..], &[0; 4096][..])
        );
    }
}
