//! A directory that is held open. It stays the same one wherever it is moved to, and a copy of it is
//! another, also under the path that it had.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Which file or directory something is among all of the running host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// Device number of its file system.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
}

impl Place {
    /// What is at `path`, links followed.
    ///
    /// # Errors
    /// As stat(2).
    pub fn of(path: &Path) -> io::Result<Place> {
        fs::metadata(path).map(|metadata| Place::from(&metadata))
    }
}

impl From<&Metadata> for Place {
    fn from(metadata: &Metadata) -> Self {
        Place {
            dev: metadata.dev(),
            ino: metadata.ino(),
        }
    }
}

/// A directory that is open, and the path under which it was opened.
#[derive(Debug)]
pub struct HeldDir {
    dir: File,
    opened_as: PathBuf,
}

impl HeldDir {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(path: &Path) -> io::Result<HeldDir> {
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)?;
        Ok(HeldDir {
            dir,
            opened_as: path.to_owned(),
        })
    }

    /// Which directory it is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn place(&self) -> io::Result<Place> {
        self.dir.metadata().map(|metadata| Place::from(&metadata))
    }

    /// A path that leads to it now: the one it was opened under unless it was moved. Where none does
    /// (it was deleted, or its file system fails), nothing can be made below the answer.
    pub fn path(&self) -> PathBuf {
        let Ok(place) = self.place() else {
            return self.opened_as.clone();
        };
        let leads_here = |path: &Path| match Place::of(path) {
            Ok(there) => there == place,
            // The file system fails: that says nothing of where it is.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        };
        if leads_here(&self.opened_as) {
            return self.opened_as.clone();
        }
        let link = PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd()));
        match fs::read_link(&link) {
            Ok(moved) if leads_here(&moved) => moved,
            _ => link,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_directory_is_followed_when_it_moves_and_not_taken_for_another_at_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        fs::create_dir(&old).unwrap();
        let held = HeldDir::open(&old).unwrap();
        assert_eq!(held.path(), old);
        fs::rename(&old, &new).unwrap();
        assert_eq!(held.path(), new.canonicalize().unwrap());
        fs::create_dir(&old).unwrap();
        assert_eq!(held.path(), new.canonicalize().unwrap());
        fs::remove_dir(&new).unwrap();
        let gone = held.path();
        assert_ne!(gone, old);
        fs::write(gone.join("file"), b"").unwrap_err();
        assert!(fs::read_dir(&old).unwrap().next().is_none());
    }
}
