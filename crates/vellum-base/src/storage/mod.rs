//! The seam between layers and the host: every byte that must survive a power cut goes through
//! [`Storage`] and [`StorageFile`], so that tests can put a simulated disk or faults behind it.

mod evidence;
#[cfg(feature = "sim")]
mod fault;
mod file;
mod holder;
mod host_file;
mod needs;
#[cfg(feature = "sim")]
mod op;
mod rng;
mod scratch;
mod shared_mapping;
#[cfg(feature = "sim")]
mod sim;
mod waiting;

pub use evidence::{Evidence, Proof, Witness};
#[cfg(feature = "sim")]
pub use fault::{Fault, FaultPlan, FaultStorage, Hook};
pub use file::FileStorage;
pub use holder::{Holder, by};
pub use host_file::write_dsync;
#[cfg(feature = "sim")]
pub use op::{OpCounts, OpKind};
pub use rng::SeededRng;
pub use scratch::ScratchStorage;
#[cfg(feature = "sim")]
pub use sim::{Moment, Observer, PowerCut, SimStorage, is_power_cut};
pub use waiting::{
    about_to_wait, clock_ns, monotonic_ns, refuses_to_stall, refuses_to_wait, unless_it_stalls,
    unless_it_waits, waits,
};
pub use waiting::{listen as listen_for_waits, note_waits_in};

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::in_memory;
use crate::crash_point;

/// A place or a length in a file as the kernel takes it.
///
/// # Errors
/// EOVERFLOW for one that no file can have.
fn host_offset(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// The byte behind a range.
///
/// # Errors
/// EOVERFLOW where that has no number.
fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len);
    end.ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Write,
    /// A new file, for reading and writing; an existing one is an error.
    CreateNew,
    /// As `Write`, creating the file where it is missing.
    Create,
}

/// The space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// All of it.
    pub size: u64,
    /// What files can still take, root's share included: where we have no right to that, it is the
    /// same at every look. To be compared with what it was before, not with what is wanted: hosts keep
    /// some back.
    pub free: u64,
    /// What files of everybody can still take, as `df` says.
    pub available: u64,
}

/// A directory entry, as [`Storage::list`] returns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file's name within its directory.
    pub name: String,
    /// True for a directory.
    pub is_dir: bool,
}

/// What a system says of a path at which there is nothing, also where its parent is a file.
fn names_nothing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Something of a storage that is not durable yet: see [`Storage::sync_together`].
#[derive(Debug, Clone)]
pub enum Unsynced {
    /// A file's content and metadata.
    File(Arc<dyn StorageFile>),
    /// The names in a directory.
    Names(PathBuf),
}

/// A tree of files. Names become durable with [`Storage::sync_dir`], contents with
/// [`StorageFile::sync`].
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Opens a file; never follows a symbolic link in the last component.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>>;
    /// Makes one directory; its parent must exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Atomically gives `from` the name `to`, replacing a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory and all below it; one that is not there is no error.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;
    /// The entries of a directory, sorted by name.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;
    /// True when a file or directory of that name is there; below a file nothing is.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// True where nothing can be written below this directory.
    fn is_read_only(&self, _path: &Path) -> bool {
        false
    }
    /// What the file system of a directory cannot do and a store needs.
    fn lacks(&self, _dir: &Path) -> io::Result<Vec<&'static str>> {
        Ok(Vec::new())
    }
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes all of it durable, in whatever order: where the storage can, side by side, so that it
    /// takes about as long as one sync. After an error any of it may be.
    fn sync_together(&self, unsynced: &[Unsynced]) -> io::Result<()> {
        unsynced.iter().try_for_each(|one| match one {
            Unsynced::File(file) => file.sync(),
            Unsynced::Names(dir) => self.sync_dir(dir),
        })
    }

    /// Locks the file `path` (made where it is missing) against other processes until the answer is
    /// dropped, also by their death; `None` where it is taken and `wait` is false. A storage of
    /// one process has nothing to lock.
    fn lock(
        &self,
        _path: &Path,
        _mode: LockMode,
        _wait: bool,
    ) -> io::Result<Option<Box<dyn Held>>> {
        Ok(Some(Box::new(())))
    }

    /// Who holds the lock on the file `path`, as far as this process can see.
    fn holder(&self, _path: &Path) -> Option<Holder> {
        None
    }

    /// Makes a file of `len` bytes whose content other processes of this boot see although it is
    /// never synced: see [`SharedFile`]. An older file of that name is emptied.
    fn open_shared(&self, path: &Path, len: u64) -> io::Result<Box<dyn SharedFile>> {
        let file = self.open(path, OpenMode::Create)?;
        file.set_len(0)?;
        file.set_len(len)?;
        Ok(Box::new(SharedByWriting(file)))
    }

    /// The space of the file system that files below `dir` share, as far as the host says; `None`
    /// where it cannot.
    fn disk_space(&self, _dir: &Path) -> io::Result<Option<DiskSpace>> {
        Ok(None)
    }

    /// Differs after each boot: what was only in memory is gone then.
    fn boot_id(&self) -> [u8; 16] {
        [0; 16]
    }

    /// Replaces the file `path` by `bytes` so that after any crash it holds the old or the new
    /// content whole: a temporary file beside it, synced, renamed, and the directory synced.
    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_atomic_after(path, bytes, Vec::new())
    }

    /// As [`Storage::write_atomic`], and makes `before` durable with it: after any crash in which the
    /// new content is there, so is all of that.
    fn write_atomic_after(
        &self,
        path: &Path,
        bytes: &[u8],
        before: Vec<Unsynced>,
    ) -> io::Result<()> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let mut tmp = name.to_os_string();
        tmp.push(".tmp");
        let tmp: PathBuf = dir.join(tmp);
        let write = || {
            let file = self.open(&tmp, OpenMode::Create)?;
            file.set_len(0)?;
            file.write_at(bytes, 0)?;
            let mut unsynced = before;
            unsynced.push(Unsynced::File(file));
            self.sync_together(&unsynced)?;
            drop(unsynced);
            crash_point::here("storage: file written aside");
            self.rename(&tmp, path)?;
            self.sync_dir(dir)
        };
        write().inspect_err(|_| {
            // On a full disk the space counts; where it is not there any more all is well.
            let _ = self.remove_file(&tmp);
        })
    }

    /// Makes a new file with this content, which is not durable yet, nor is its name.
    fn create_file(&self, path: &Path, bytes: &[u8]) -> io::Result<Unsynced> {
        let file = self.open(path, OpenMode::CreateNew)?;
        file.write_at(bytes, 0)?;
        Ok(Unsynced::File(file))
    }

    /// The whole content of a file of at most `limit` bytes.
    fn read_all(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.open(path, OpenMode::Read)?;
        let len = file.len()?;
        if len > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{len} bytes where at most {limit} are expected"),
            ));
        }
        let mut bytes = vec![0; in_memory(len)];
        file.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// Who else may hold a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Other holders of a shared lock.
    Shared,
    /// Nobody.
    Exclusive,
}

/// A lock, held until this is dropped.
pub trait Held: Send + Sync + std::fmt::Debug {}

impl Held for () {}

/// Memory that outlives the process that writes it, as long as the machine runs.
pub trait SharedFile: Send + Sync + std::fmt::Debug {
    /// Writes all of `bytes`; takes their space on the host first.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Takes the space of a range, so that writing there needs none.
    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// As [`StorageFile::id`].
    fn id(&self) -> io::Result<FileId>;
    /// Notes down, and sees to it that there is, what may prove later that this memory is still
    /// what it is now: see [`StorageFile::prove`].
    fn evidence(&self) -> io::Result<Evidence>;
}

/// Which file it is among all of the running host: a copy, a snapshot, or what a restored backup put in
/// its place is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileId {
    /// Number of the file system's device.
    pub device: u64,
    /// Number of the inode, which may be used again.
    pub inode: u64,
    /// When it was made, in nanoseconds; 0 where that is not known.
    pub born: u64,
}

/// The page cache is such memory.
#[derive(Debug)]
struct SharedByWriting(Arc<dyn StorageFile>);

impl SharedFile for SharedByWriting {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.0.allocate(offset, len)
    }

    fn id(&self) -> io::Result<FileId> {
        self.0.id()
    }

    fn evidence(&self) -> io::Result<Evidence> {
        self.0.evidence()
    }
}

/// An open file. All offsets and lengths are bytes. Calls may come from many threads.
pub trait StorageFile: Send + Sync + std::fmt::Debug {
    /// Fills `buf` from `offset`; bytes beyond the end of the file read as zeros, as in a hole.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf`; in the kernel on return, durable after [`StorageFile::sync_data`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` and returns when it is durable: one synchronous write. `offset` and
    /// the length are multiples of 4096 within the file's length.
    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// As [`StorageFile::write_durable`], but durable only after [`StorageFile::sync_data`]: past the
    /// page cache where the host can, so that this has nothing left to write.
    fn write_direct(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes content (and the length) durable: fdatasync.
    fn sync_data(&self) -> io::Result<()>;
    /// Makes content and all metadata durable: fsync.
    fn sync(&self) -> io::Result<()>;
    /// Current length.
    fn len(&self) -> io::Result<u64>;
    /// True when the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends (with a hole) to `len`.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Frees the range, which then reads as zeros; the length stays.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves space for the range, which reads as zeros where nothing was written.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Bytes that the file takes on the host.
    fn allocated(&self) -> io::Result<u64>;
    /// Calls `each` with the ranges of bytes that take space on the host, written or only reserved, in
    /// order. With none where the storage cannot tell.
    fn visit_allocated(&self, _each: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        Ok(())
    }
    /// A hint that what was written should begin its way to the disk, without waiting for it: the
    /// next sync has less to do then. It says nothing of whether that went well.
    fn start_writing_back(&self) {}
    /// Fails where the host could not write back what was written, and has not said so here yet: memory may
    /// have let go of it then, and show what was there before. Waits for nothing. A sync that is told of it
    /// does not take the answer from here, where this was asked once before that sync began.
    fn check_written_back(&self) -> io::Result<()> {
        Ok(())
    }
    /// A hint that the range will be read soon.
    fn prefetch(&self, _offset: u64, _len: u64) {}
    /// Has the next read come from the disk: after a failed sync memory may show what is not there.
    /// What was not synced stays in memory.
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
    /// Which file this is. Equal where the storage cannot tell.
    fn id(&self) -> io::Result<FileId> {
        Ok(FileId::default())
    }
    /// When the file, its names or rights were changed last, in nanoseconds: nobody can set that.
    fn changed(&self) -> io::Result<u64> {
        Ok(0)
    }
    /// True where part of the range was never written, or was punched or only reserved since. False
    /// where the storage cannot tell.
    fn has_hole(&self, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(false)
    }
    /// As [`SharedFile::evidence`].
    fn evidence(&self) -> io::Result<Evidence> {
        Ok(Evidence::default())
    }
    /// How it is proved that what processes wrote here, synced or not, is what is read, since
    /// `evidence` was noted down of this file; `None` where nothing proves it.
    fn prove(&self, _evidence: &Evidence) -> io::Result<Option<Proof>> {
        Ok(None)
    }
    /// The content in memory, shared with the page cache where the storage can.
    fn map(&self, offset: u64, len: usize) -> io::Result<Mapping>;
}

/// Read-only bytes of a file, as [`StorageFile::map`] returns them.
#[derive(Debug)]
pub enum Mapping {
    /// Shared with the page cache.
    Mapped(memmap2::Mmap),
    /// A copy.
    Owned(Vec<u8>),
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        match self {
            Mapping::Mapped(map) => map,
            Mapping::Owned(bytes) => bytes,
        }
    }
}
