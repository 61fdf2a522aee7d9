//! Files that are thrown away before a crash could matter to them.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::file::open_plain;
use super::host_file::HostFile;
use super::{
    DiskSpace, Entry, FileStorage, Held, Holder, LockMode, OpenMode, SharedFile, Storage,
    StorageFile, Unsynced,
};

/// The host's own files, of which nothing is made durable: for a layer in `staging` that another one is made
/// of, or that only takes what a mount writes. Other processes see what was written, as long as the
/// machine runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScratchStorage;

impl Storage for ScratchStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        Ok(Arc::new(HostFile::scratch(open_plain(path, mode)?)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        FileStorage.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        FileStorage.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        FileStorage.remove_file(path)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        FileStorage.remove_tree(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        FileStorage.list(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        FileStorage.exists(path)
    }

    fn is_read_only(&self, path: &Path) -> bool {
        FileStorage.is_read_only(path)
    }

    fn lacks(&self, dir: &Path) -> io::Result<Vec<&'static str>> {
        FileStorage.lacks(dir)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_together(&self, _unsynced: &[Unsynced]) -> io::Result<()> {
        Ok(())
    }

    fn open_shared(&self, path: &Path, len: u64) -> io::Result<Box<dyn SharedFile>> {
        FileStorage.open_shared(path, len)
    }

    fn disk_space(&self, dir: &Path) -> io::Result<Option<DiskSpace>> {
        FileStorage.disk_space(dir)
    }

    fn boot_id(&self) -> [u8; 16] {
        FileStorage.boot_id()
    }

    fn lock(&self, path: &Path, mode: LockMode, wait: bool) -> io::Result<Option<Box<dyn Held>>> {
        FileStorage.lock(path, mode, wait)
    }

    fn holder(&self, path: &Path) -> Option<Holder> {
        FileStorage.holder(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_there_for_others_and_nobody_waits_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = ScratchStorage.open(&path, OpenMode::CreateNew).unwrap();
        file.set_len(8192).unwrap();
        let waited = std::rc::Rc::new(std::cell::Cell::new(false));
        let heard = std::rc::Rc::clone(&waited);
        crate::storage::listen_for_waits(move || heard.set(true));
        file.write_durable(&[7; 4096], 4096).unwrap();
        file.write_direct(&[8; 4096], 0).unwrap();
        file.sync_data().unwrap();
        file.sync().unwrap();
        assert!(!waited.get());
        let seen = FileStorage.read_all(&path, 8192).unwrap();
        assert_eq!(seen, [[8; 4096], [7; 4096]].as_flattened());
    }
}
