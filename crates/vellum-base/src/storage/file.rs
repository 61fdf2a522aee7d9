//! Real files behind the storage seam.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

use super::waiting::{about_to_wait, waits};
use super::{
    Entry, Evidence, FileId, Held, Holder, LockMode, Mapping, OpenMode, Proof, SharedFile, Storage,
    StorageFile, evidence,
};
use crate::interrupt;

/// The host's own files. Directories are made with mode 0700, files with 0600.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileStorage;

impl Storage for FileStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let _waits = waits();
        let mut options = OpenOptions::new();
        options
            .read(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        match mode {
            OpenMode::Read => {}
            OpenMode::Write => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
            OpenMode::Create => {
                options.write(true).create(true);
            }
        }
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(Arc::new(HostFile {
            file,
            direct: Direct::default(),
            reads_cached: AtomicBool::new(true),
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let _waits = waits();
        fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _waits = waits();
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let _waits = waits();
        fs::remove_file(path)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        let _waits = waits();
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let _waits = waits();
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // A name that is not UTF-8 is not one of ours.
            if let Ok(name) = entry.file_name().into_string() {
                entries.push(Entry {
                    name,
                    is_dir: entry.file_type()?.is_dir(),
                });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let _waits = waits();
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn is_read_only(&self, path: &Path) -> bool {
        use nix::errno::Errno;
        let may = nix::unistd::access(path, nix::unistd::AccessFlags::W_OK);
        matches!(may, Err(Errno::EROFS | Errno::EACCES | Errno::EPERM))
    }

    fn lacks(&self, dir: &Path) -> io::Result<Vec<&'static str>> {
        super::needs::lacks(dir)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let _waits = waits();
        File::open(path)?.sync_all()
    }

    fn open_shared(&self, path: &Path, len: u64) -> io::Result<Box<dyn SharedFile>> {
        let _waits = waits();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        file.set_len(len)?;
        // SAFETY: the file was just made by us, in a directory that only its owner writes, and
        // nobody cuts it while the layer's lease is held.
        let map = unsafe { memmap2::MmapMut::map_mut(&file)? };
        // Otherwise the first touch reads around itself: megabytes of zeros, and milliseconds.
        map.advise(memmap2::Advice::Random)?;
        let pieces = len.div_ceil(RESERVE) as usize;
        Ok(Box::new(SharedMapping {
            file,
            map,
            reserved: vec![false; pieces],
        }))
    }

    fn free_space(&self, dir: &Path) -> io::Result<Option<u64>> {
        let there = nix::sys::statvfs::statvfs(dir)?;
        // Root's share too: where we have no right to it, it is the same at every look.
        Ok(Some(there.blocks_free() * there.fragment_size()))
    }

    fn boot_id(&self) -> [u8; 16] {
        boot_id()
    }

    fn lock(&self, path: &Path, mode: LockMode, wait: bool) -> io::Result<Option<Box<dyn Held>>> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        let made = options.clone().write(true).create(true).open(path);
        let file = match made {
            // Its directory is missing too, and cannot be made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut above = path.ancestors().skip(1);
                let there = above.find(|dir| dir.exists());
                return match there.is_some_and(|dir| self.is_read_only(dir)) {
                    true => Ok(Some(Box::new(()))),
                    false => Err(error),
                };
            }
            Err(error) if cannot_be_written(&error) => match options.open(path) {
                // Whoever could hold it would have made it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Some(Box::new(())));
                }
                other => other?,
            },
            other => other?,
        };
        let _waits = waits();
        let attempt = || match (mode, wait) {
            (LockMode::Exclusive, true) => file.lock().map_err(TryLockError::Error),
            (LockMode::Shared, true) => file.lock_shared().map_err(TryLockError::Error),
            (LockMode::Exclusive, false) => file.try_lock(),
            (LockMode::Shared, false) => file.try_lock_shared(),
        };
        let outcome = loop {
            match attempt() {
                // A signal that ends nothing, such as that of a terminal's new size.
                Err(TryLockError::Error(error))
                    if error.kind() == io::ErrorKind::Interrupted && interrupt::check().is_ok() => {
                }
                other => break other,
            }
        };
        match outcome {
            Ok(()) => Ok(Some(Box::new(FileLock { _file: file }))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn holder(&self, path: &Path) -> Option<Holder> {
        Holder::of_lock(path)
    }
}

/// The id of the running boot. Where it cannot be told it is one of this process alone: then no
/// process trusts what another left in memory.
fn boot_id() -> [u8; 16] {
    static ID: std::sync::OnceLock<uuid::Uuid> = std::sync::OnceLock::new();
    let id = ID.get_or_init(|| {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        uuid::Uuid::parse_str(text.trim()).unwrap_or_else(|_| uuid::Uuid::new_v4())
    });
    id.into_bytes()
}

/// True for the errors of a read-only file system, and of files that belong to somebody else.
fn cannot_be_written(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EROFS | libc::EACCES | libc::EPERM)
    )
}

fn id(file: &File) -> io::Result<FileId> {
    let metadata = file.metadata()?;
    Ok(FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
        born: evidence::born(file),
    })
}

/// A file that is written through a shared mapping: a store in memory instead of a system call.
#[derive(Debug)]
struct SharedMapping {
    file: File,
    map: memmap2::MmapMut,
    /// By piece: its space was taken.
    reserved: Vec<bool>,
}

/// Space is taken in pieces of this size.
const RESERVE: u64 = 128 << 10;

impl SharedMapping {
    /// Takes the space of the pieces that the range touches; `use_soon`: their memory too.
    fn take(&mut self, offset: u64, len: u64, use_soon: bool) -> io::Result<()> {
        for piece in offset / RESERVE..(offset + len).div_ceil(RESERVE) {
            if self.reserved.get(piece as usize) != Some(&false) {
                continue;
            }
            let _waits = waits();
            let start = piece * RESERVE;
            let len = RESERVE.min(self.map.len() as u64 - start);
            fallocate(
                self.file.as_fd(),
                FallocateFlags::empty(),
                start as libc::off_t,
                len as libc::off_t,
            )?;
            if use_soon {
                // All its pages at once cost less than a fault for each; kernels before 5.14 cannot.
                let _ = self.map.advise_range(
                    memmap2::Advice::PopulateWrite,
                    start as usize,
                    len as usize,
                );
            }
            if let Some(slot) = self.reserved.get_mut(piece as usize) {
                *slot = true;
            }
        }
        Ok(())
    }
}

impl SharedFile for SharedMapping {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        // A store to a page without space would kill the process.
        self.take(offset, bytes.len() as u64, true)?;
        match self.map.get_mut(offset as usize..end as usize) {
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
        id(&self.file)
    }

    fn evidence(&self) -> io::Result<Evidence> {
        evidence::gather(&self.file)
    }
}

/// A flock(2) on an open file.
#[derive(Debug)]
struct FileLock {
    _file: File,
}

impl Held for FileLock {}

/// Whether synchronous writes may bypass the page cache: found out at the first one.
#[derive(Debug, Default)]
struct Direct {
    state: AtomicU8,
    file: std::sync::OnceLock<File>,
}

/// Values of [`Direct::state`]; 0 is: not tried yet.
const DIRECT_WORKS: u8 = 1;
const DIRECT_REFUSED: u8 = 2;

/// Alignment of the buffer, offset and length of an O_DIRECT write that suits any device.
const DIRECT_ALIGN: usize = 4096;

#[derive(Debug)]
struct HostFile {
    file: File,
    direct: Direct,
    /// The file system can say that a read would wait.
    reads_cached: AtomicBool,
}

impl HostFile {
    /// A second descriptor of the same file with O_DIRECT, or `None` where the host refuses it.
    fn direct(&self) -> Option<&File> {
        match self.direct.state.load(Ordering::Acquire) {
            DIRECT_WORKS => self.direct.file.get(),
            DIRECT_REFUSED => None,
            _ => {
                let opened = OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
                    .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
                let state = match opened {
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
            buf = buf.get(written..).unwrap_or_default();
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
    let iov = libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the descriptor is open for the call, and `iov` describes `buf`, which outlives it
    // and is only read.
    let written =
        unsafe { libc::pwritev2(file.as_raw_fd(), &iov, 1, offset as libc::off_t, flags) };
    if written < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(written as usize)
    }
}

/// Reads what the page cache holds at `offset`; EAGAIN where the rest would have to wait for the disk,
/// EOPNOTSUPP where the file system cannot tell (preadv2(2), RWF_NOWAIT).
fn read_cached(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the descriptor is open for the call, and `iov` describes `buf`, which outlives it and
    // is borrowed for writing.
    let read = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            &iov,
            1,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    if read < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(read as usize)
    }
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
                    buf = buf.get_mut(read..).unwrap_or_default();
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if cached => {
                    if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                        self.reads_cached.store(false, Ordering::Relaxed);
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
        self.write_past_cache(buf, offset, libc::RWF_DSYNC)
    }

    fn write_direct(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_past_cache(buf, offset, 0)
    }

    fn sync_data(&self) -> io::Result<()> {
        about_to_wait();
        let _waits = waits();
        self.file.sync_data()
    }

    fn sync(&self) -> io::Result<()> {
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
            offset as libc::off_t,
            len as libc::off_t,
        )?;
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let _waits = waits();
        fallocate(
            self.file.as_fd(),
            FallocateFlags::empty(),
            offset as libc::off_t,
            len as libc::off_t,
        )?;
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn start_writing_back(&self) {
        // SAFETY: the descriptor is open for the call, which takes integers alone. It neither waits
        // for what it starts nor takes note of errors, so those are still the next sync's to tell.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn prefetch(&self, offset: u64, len: u64) {
        // A hint: a refusal changes nothing.
        let _ = nix::fcntl::posix_fadvise(
            &self.file,
            offset as libc::off_t,
            len as libc::off_t,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
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
        id(&self.file)
    }

    fn changed(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        Ok(evidence::nanoseconds(
            metadata.ctime(),
            metadata.ctime_nsec() as u32,
        ))
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
        let end = offset.saturating_add(len as u64);
        if end > self.len()? {
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
        super::super::listen_for_waits(move || heard.set(heard.get() + 1));
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
