//! Mounts and loop devices, which end with the value that stands for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{poll_uninterrupted, report, run_whole};

/// A mounted directory (or file); unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    dir: Option<PathBuf>,
}

impl Mount {
    /// Mounts with mount(8), which is given `arguments` and then the directory, from the working
    /// directory `cwd`.
    pub fn new(dir: &Path, cwd: &Path, arguments: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        run_whole(
            Command::new("mount")
                .current_dir(cwd)
                .args(arguments)
                .arg(dir),
        )?;
        Ok(Self::existing(dir))
    }

    /// Takes over what somebody else has mounted.
    pub fn existing(dir: &Path) -> Self {
        Mount {
            dir: Some(dir.to_owned()),
        }
    }

    /// Where.
    pub fn dir(&self) -> &Path {
        self.dir.as_deref().unwrap_or(Path::new(""))
    }

    /// Unmounts; also through dropping, which only says what went wrong.
    pub fn unmount(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(dir) = self.dir.take() else {
            return Ok(());
        };
        let mut last = nix::errno::Errno::EBUSY;
        let done = poll_uninterrupted(Duration::from_secs(10), || {
            match nix::mount::umount2(&dir, nix::mount::MntFlags::empty()) {
                Ok(()) => true,
                Err(error) => {
                    last = error;
                    error != nix::errno::Errno::EBUSY
                }
            }
        });
        if !done || (last != nix::errno::Errno::EBUSY && is_mounted(&dir)) {
            let _ = nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_DETACH);
            bail!("cannot unmount {}: {last}; detached it", dir.display());
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        report(self.end());
    }
}

/// Whether something is mounted exactly there.
pub fn is_mounted(path: &Path) -> bool {
    let path = path.to_string_lossy();
    fs::read_to_string("/proc/self/mountinfo").is_ok_and(|table| {
        table
            .lines()
            .any(|line| line.split(' ').nth(4) == Some(&*path))
    })
}

/// Detaches whatever is still mounted below a directory, the last first: for what a program left that
/// did not end well.
pub fn detach_below(dir: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = table.lines().filter_map(|line| line.split(' ').nth(4));
    let mut below: Vec<&Path> = mounted.map(Path::new).collect();
    below.retain(|path| path.starts_with(dir) && *path != dir);
    for path in below.iter().rev() {
        let _ = nix::mount::umount2(*path, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A loop device; detached when dropped.
#[derive(Debug)]
pub struct Loop {
    device: String,
}

impl Loop {
    /// A loop device on a file, past the page cache.
    pub fn new(file: &Path) -> Result<Self> {
        Self::with(file, "--direct-io=on")
    }

    /// A loop device on a file, through the page cache.
    pub fn buffered(file: &Path) -> Result<Self> {
        Self::with(file, "--direct-io=off")
    }

    fn with(file: &Path, option: &str) -> Result<Self> {
        let mut command = Command::new("losetup");
        let shown = run_whole(command.args(["--find", "--show", option]).arg(file))?.stdout;
        Ok(Loop {
            device: shown.trim().to_owned(),
        })
    }

    /// Like `/dev/loop7`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Flush requests that the device has carried out so far (Documentation/block/stat.rst of
    /// Linux: the 16th figure).
    pub fn flushes(&self) -> Result<u64> {
        let name = self.device.trim_start_matches("/dev/");
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        stat.split_whitespace()
            .nth(15)
            .and_then(|figure| figure.parse().ok())
            .context("this kernel counts no flushes of block devices")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        report(detach(&self.device));
    }
}

fn detach(device: &str) -> Result<()> {
    // Not through `run`, which ends when the user interrupts.
    let status = Command::new("losetup").args(["-d", device]).status()?;
    if !status.success() {
        bail!("losetup -d {device}: {status}");
    }
    // The kernel detaches when the last user has closed it, perhaps a moment later.
    let name = device.trim_start_matches("/dev/").to_owned();
    let backing = PathBuf::from(format!("/sys/block/{name}/loop/backing_file"));
    poll_uninterrupted(Duration::from_secs(5), || !backing.exists());
    Ok(())
}
