//! What a store needs of the file system that it lies on, found out by trying: what is missing is told
//! before anything is written, by name.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::host_offset;

/// Length of the file to try with, how much of it is reserved, and how much is written. Each device that comes
/// up tries, so it is little.
const LEN: u64 = 1 << 20;
const RESERVED: u64 = 128 << 10;
const WRITTEN: usize = 4 << 10;

/// What the file system of the directory `dir` cannot do and a store needs; empty where it has all.
/// Leaves nothing behind. Where there is no room to try, nothing is known to be missing.
///
/// # Errors
/// Where nothing can be written there.
pub(super) fn lacks(dir: &Path) -> io::Result<Vec<&'static str>> {
    let file = match tempfile::tempfile_in(dir) {
        Err(error) if is_full(&error) => return Ok(Vec::new()),
        other => other?,
    };
    match try_all(&file) {
        Err(error) if is_full(&error) => Ok(Vec::new()),
        other => other,
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

fn try_all(file: &File) -> io::Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    file.set_len(LEN)?;
    let len = host_offset(RESERVED)?;
    if !is_there(fallocate(file, FallocateFlags::empty(), 0, len))? {
        missing.push("reserve space for a file (fallocate)");
    }
    // Before anything is written: older kernels wait for the disk where a hole is made in what is not there yet.
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if !is_there(fallocate(file, punch, 0, len))? {
        missing.push("punch holes into files");
    }
    file.write_all_at(&[1; WRITTEN], 0)?;
    // Some refuse, some say yes and do nothing.
    let set = file.set_permissions(Permissions::from_mode(0o600));
    if set.is_err() || file.metadata()?.mode() & 0o777 != 0o600 {
        missing.push("keep the modes of files, so others could read them");
    }
    let locked = file.try_lock_shared();
    if let Err(std::fs::TryLockError::Error(error)) = locked
        && is_missing(&error)
    {
        missing.push("lock files (flock)");
    }
    // SAFETY: the file has no name, so nobody else cuts it while the mapping lives, which ends here.
    if let Err(error) = unsafe { memmap2::MmapMut::map_mut(file) } {
        match is_missing(&error) {
            true => missing.push("map files into memory for writing"),
            false => return Err(error),
        }
    }
    Ok(missing)
}

/// False where the file system says that it knows no such operation.
fn is_there(result: nix::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOLCK | libc::ENODEV | libc::EINVAL)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_stores_are_kept_on_lacks_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(lacks(dir.path()).unwrap(), Vec::<&str>::new());
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
        lacks(&dir.path().join("none")).unwrap_err();
    }
}
