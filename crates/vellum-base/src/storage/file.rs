//! Real files behind the storage seam.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::host_file::HostFile;
use super::shared_mapping::SharedMapping;
use super::waiting::{about_to_wait, waits};
use super::{
    DiskSpace, Entry, Held, Holder, LockMode, OpenMode, SharedFile, Storage, StorageFile, Unsynced,
    names_nothing,
};
use crate::interrupt;

/// The host's own files. Directories are made with mode 0700, files with 0600.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileStorage;

impl Storage for FileStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        Ok(Arc::new(HostFile::new(open_plain(path, mode)?)))
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
            Err(error) if names_nothing(&error) => Ok(false),
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

    fn sync_together(&self, unsynced: &[Unsynced]) -> io::Result<()> {
        let Some((first, others)) = unsynced.split_first() else {
            return Ok(());
        };
        about_to_wait();
        let _waits = waits();
        // Where all of it has its place in the file system first, one commit of its journal has all.
        for one in unsynced {
            if let Unsynced::File(file) = one {
                file.start_writing_back();
            }
        }
        let sync = |one: &Unsynced| match one {
            Unsynced::File(file) => file.sync(),
            Unsynced::Names(dir) => self.sync_dir(dir),
        };
        std::thread::scope(|scope| {
            let begun: Vec<_> = others
                .iter()
                .map(|one| {
                    (
                        one,
                        std::thread::Builder::new().spawn_scoped(scope, || sync(one)),
                    )
                })
                .collect();
            let mut outcome = sync(first);
            for (one, thread) in begun {
                let synced = match thread {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    // Where there is no thread it is done in turn.
                    Err(_) => sync(one),
                };
                outcome = outcome.and(synced);
            }
            outcome
        })
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
        Ok(Box::new(SharedMapping::new(file, len)?))
    }

    fn disk_space(&self, dir: &Path) -> io::Result<Option<DiskSpace>> {
        let there = nix::sys::statvfs::statvfs(dir)?;
        let bytes = |blocks: u64| blocks.saturating_mul(there.fragment_size());
        Ok(Some(DiskSpace {
            size: bytes(there.blocks()),
            free: bytes(there.blocks_free()),
            available: bytes(there.blocks_available()),
        }))
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
            Ok(()) => Ok(Some(Box::new(FileLock::of(file)))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn holder(&self, path: &Path) -> Option<Holder> {
        Holder::of_lock(path)
    }
}

/// Opens a plain file.
pub(super) fn open_plain(path: &Path, mode: OpenMode) -> io::Result<File> {
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
    Ok(file)
}

/// The id of the running boot. Where it cannot be told it is one of this process alone: then no
/// process trusts what another left in memory.
fn boot_id() -> [u8; 16] {
    static ID: std::sync::OnceLock<uuid::Uuid> = std::sync::OnceLock::new();
    let id = ID.get_or_init(|| {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let boot = text.and_then(|text| uuid::Uuid::parse_str(text.trim()).ok());
        boot.unwrap_or_else(uuid::Uuid::new_v4)
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

/// A flock(2) on an open file.
#[derive(Debug)]
struct FileLock {
    file: File,
    /// A fork of this process that drops its copy leaves the lock.
    owner: u32,
}

impl FileLock {
    fn of(file: File) -> Self {
        FileLock {
            file,
            owner: std::process::id(),
        }
    }
}

impl Held for FileLock {}

impl Drop for FileLock {
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // To close it is not enough: a program that another thread has begun to start has the file too, until
            // the kernel closes it there. What cannot be unlocked goes with the last copy.
            let _ = self.file.unlock();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_when_it_is_dropped_although_a_copy_of_its_file_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = || FileStorage.lock(&path, LockMode::Exclusive, false).unwrap();
        // As a program that is being started has it, until its exec.
        let file = File::create(&path).unwrap();
        let copy = file.try_clone().unwrap();
        file.try_lock().unwrap();
        let held = FileLock::of(file);
        assert!(lock().is_none());
        drop(held);
        assert!(lock().is_some());
        drop(copy);
    }

    #[test]
    fn what_is_synced_together_fails_where_any_of_it_does() {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str| {
            let path = dir.path().join(name);
            FileStorage.create_file(&path, b"content").unwrap()
        };
        let names = |name: &str| Unsynced::Names(dir.path().join(name));
        let good = [made("a"), names("."), made("b")];
        FileStorage.sync_together(&good).unwrap();
        FileStorage.sync_together(&[]).unwrap();
        for place in 0..=good.len() {
            let mut all = good.to_vec();
            all.insert(place, names("missing"));
            let error = FileStorage.sync_together(&all).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }
}
