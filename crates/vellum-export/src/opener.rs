//! Who has a block device open.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vellum_base::error::{Result, ResultExt};

/// A process that has the block device `path` open; mounts do not count.
///
/// # Errors
/// Where there is no such device, or no /proc.
pub fn process_with_open(path: &Path) -> Result<Option<u32>> {
    let number = fs::metadata(path)
        .context(|| format!("cannot stat {}", path.display()))?
        .rdev();
    let processes = fs::read_dir("/proc").context(|| "cannot list /proc")?;
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // One that ends meanwhile has nothing open.
        let files = fs::read_dir(process.path().join("fd"));
        for file in files.into_iter().flatten().flatten() {
            if block_device(&file.path()) == Some(number) {
                return Ok(Some(pid));
            }
        }
    }
    Ok(None)
}

/// The number of the block device that is open as `file` of /proc/PID/fd. No other file is asked for
/// anything: the server of a FUSE file may hang, and hangs whoever asks with it.
fn block_device(file: &Path) -> Option<u64> {
    let path = CString::new(file.as_os_str().as_bytes()).ok()?;
    // SAFETY: the structure holds numbers alone, for which zeros are a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a string that ends with a zero, and the kernel writes the structure that
    // the reference names.
    let result = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_STATX_DONT_SYNC,
            libc::STATX_TYPE,
            &mut found,
        )
    };
    let is_device = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    let number = || libc::makedev(found.stx_rdev_major, found.stx_rdev_minor);
    (result == 0 && is_device).then(number)
}
