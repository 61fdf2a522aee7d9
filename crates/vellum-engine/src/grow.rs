//! A device grows, and the ext4 on it, under whoever uses them: docs/durability.md says what a crash
//! finds after each step. All of it can be cut off anywhere and called again.

use std::path::Path;
use std::time::{Duration, Instant};

use super::device::{GROW, Grow};
use super::mount_point::UNMOUNT_TIMEOUT;
use super::wire::encode;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_export::device::control;
use vellum_export::local_disk::LocalDisk;
use vellum_fs::ext4;
use vellum_fs::run_dir::RunDir;
use vellum_fs::superblock::Superblock;

/// How long a server may take to make everything durable and write a header.
pub(super) const GROW_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the kernel may take to believe the new size.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes the layer behind a device that is served from `run_dir`, and the device, at least `size`
/// bytes large.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the server is of a version that cannot; where the host refuses.
pub fn grow_device(run_dir: &RunDir, device: LocalDisk, size: u64) -> Result<()> {
    if device.size()? >= size {
        return Ok(());
    }
    grow_layer(run_dir, size)?;
    crash_point::here("grow: layer grown");
    // The kernel drops what it is told of a FUSE file's size where a write was answered meanwhile:
    // under a writer it takes a few attempts.
    let deadline = Instant::now() + RESIZE_TIMEOUT;
    loop {
        device.resize(size)?;
        let now = device.size()?;
        if now >= size {
            break;
        }
        if Instant::now() > deadline {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "{}: the kernel says {now} bytes after it grew to {size}",
                    device.path().display()
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    crash_point::here("grow: device grown");
    Ok(())
}

fn grow_layer(run_dir: &RunDir, size: u64) -> Result<()> {
    let args = encode(&Grow { size })?;
    let ask = || control::call(run_dir, GROW, args.clone(), GROW_TIMEOUT).map(drop);
    match ask() {
        // Its worker may have died over it: the next one answers, and finds what is done.
        Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Protocol) => {
            tracing::warn!(%error, "asks the server once more to grow");
            ask()
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => Err(error.context(
            "the device's server is of an older version: `vellum upgrade-servers` brings it up to \
             date",
        )),
        other => other,
    }
}

/// Lets the ext4 on `device`, mounted at `dir`, fill `size` bytes, where it does not yet. A mounted
/// one can be grown by whoever has CAP_SYS_RESOURCE; others have it unmounted for a moment, by
/// `unmount`, which refuses where it is in use, and mounted again with `options`.
///
/// # Errors
/// What `unmount` says; what keeps it from being grown.
pub fn grow_file_system(
    device: &Path,
    dir: &Path,
    size: u64,
    options: ext4::MountOptions,
    unmount: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let superblock = Superblock::of_file(device)?;
    if superblock.fills(size) {
        return Ok(());
    }
    if let Some(why) = superblock.fixed() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the ext4 on {} cannot be grown, since {why}",
                device.display()
            ),
        ));
    }
    match ext4::grow(dir, size) {
        Err(error) if error.kind() == ErrorKind::Permission => {
            unmount()?;
            let grown = unclaimed(device).and_then(|()| ext4::grow_unmounted(device));
            ext4::mount(device, dir, options)?;
            grown
        }
        other => other,
    }
}

/// Makes the layer behind a device that is served from `run_dir`, the device, and the ext4 on it that is
/// mounted at `dir`, `size` bytes large. Where this process may not grow a mounted one, `unmount` unmounts
/// it for a moment, or refuses, before anything is changed; it is mounted again with `options`. The caller
/// holds the device, which would be detached otherwise. `note` is called before the first change, and notes
/// what the layer does not of its size.
///
/// # Errors
/// As [`grow_device`] and [`grow_file_system`]; what `note` says.
pub fn grow_mounted(
    run_dir: &RunDir,
    device: LocalDisk,
    dir: &Path,
    size: u64,
    options: ext4::MountOptions,
    note: impl FnOnce() -> Result<()>,
    unmount: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let path = device.path();
    if ext4::may_grow_mounted()? {
        note()?;
        grow_device(run_dir, device, size)?;
        return grow_file_system(&path, dir, size, options, unmount);
    }
    unmount().map_err(lacks_right)?;
    crash_point::here("resize: unmounted");
    let grown = unclaimed(&path)
        .map_err(lacks_right)
        .and_then(|()| note())
        .and_then(|()| grow_device(run_dir, device, size))
        .and_then(|()| ext4::grow_unmounted(&path));
    crash_point::here("resize: file system grown");
    ext4::mount(&path, dir, options)?;
    grown
}

fn lacks_right(error: Error) -> Error {
    error.context("growing a file system in use needs CAP_SYS_RESOURCE, which this process lacks")
}

/// Waits until no mount has a device that was unmounted here. One in another mount namespace, such as that of
/// a container that runs, may keep it.
fn unclaimed(device: &Path) -> Result<()> {
    match LocalDisk::from_path(device) {
        Some(device) if !device.wait_unclaimed(UNMOUNT_TIMEOUT)? => {
            Err(Error::new(ErrorKind::InUse, device.user()))
        }
        _ => Ok(()),
    }
}

/// True when the ext4 on `device` takes `size` bytes, or more.
pub fn is_filled(device: &Path, size: u64) -> Result<bool> {
    Ok(Superblock::of_file(device)?.fills(size))
}
