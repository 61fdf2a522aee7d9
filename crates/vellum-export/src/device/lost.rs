//! Devices found and ended without a look into their run directories, whose disk may fail.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use super::command_line::{argument, command_line};
use super::detach::{DetachOptions, clean, remove_files};
use crate::fuse::session::FS_TYPE;
use crate::local_disk::LocalDisk;
use crate::loop_device::LoopDevice;
use vellum_base::error::{Result, ResultExt};
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{RunDir, RunRoot};

/// A device that something is left of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDevice {
    /// Its run directory.
    pub run_dir: RunDir,
    /// Where its block device is mounted.
    pub mounts: Vec<PathBuf>,
    /// The arguments of its processes; none where all are dead.
    arguments: Vec<OsString>,
}

impl FoundDevice {
    /// What its processes were given with an option.
    pub fn argument(&self, option: &str) -> Option<String> {
        argument(&self.arguments, option)?
            .to_str()
            .map(str::to_owned)
    }
}

/// What is left of devices whose run directories lie in `runs`: processes by their command lines,
/// loop devices by their backing files, sessions and mounts by the table of mounts.
///
/// # Errors
/// Where /proc or /sys are missing.
pub fn find_devices(runs: &RunRoot) -> Result<Vec<FoundDevice>> {
    let mut found: Vec<FoundDevice> = Vec::new();
    let mut add = |run_dir: RunDir, arguments: Vec<OsString>, mounts: Vec<PathBuf>| {
        if !runs.has(&run_dir) {
            return;
        }
        match found.iter_mut().find(|device| device.run_dir == run_dir) {
            Some(device) => {
                device.mounts.extend(mounts);
                if device.arguments.is_empty() {
                    device.arguments = arguments;
                }
            }
            None => found.push(FoundDevice {
                run_dir,
                mounts,
                arguments,
            }),
        }
    };
    for entry in fs::read_dir("/proc")
        .context(|| "/proc: cannot be read")?
        .flatten()
    {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some((run_dir, arguments)) = command_line(pid) {
            // Where it is now, if it was moved; the link is read without asking the disk.
            let held = held_paths(pid).into_iter();
            for dir in held.filter_map(|path| runs.dir_at(path)).chain([run_dir]) {
                add(dir, arguments.clone(), Vec::new());
            }
        }
    }
    let mounts = MountInfo::read()?;
    for device in LoopDevice::attached()? {
        let Some(backing) = device.backing_file() else {
            continue;
        };
        if let Some(dir) = RunDir::of_dev(&backing) {
            let number = LocalDisk::from(device).major_minor();
            let on_it = mounts
                .iter()
                .filter(|mount| Some(mount.major_minor) == number);
            add(
                dir,
                Vec::new(),
                on_it.map(|mount| mount.target.clone()).collect(),
            );
        }
    }
    let sessions = mounts.iter().filter(|mount| mount.fs_type == FS_TYPE);
    for dir in sessions.filter_map(|mount| RunDir::of_dev(&mount.target)) {
        add(dir, Vec::new(), Vec::new());
    }
    Ok(found)
}

/// The paths of what a process has open.
fn held_paths(pid: i32) -> Vec<PathBuf> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    let links = files.into_iter().flatten().flatten();
    links
        .filter_map(|file| fs::read_link(file.path()).ok())
        .collect()
}

/// Ends a device by force: processes, mounts, loop devices, session. Its files stay, as far as they
/// cannot be removed.
///
/// # Errors
/// [`vellum_base::ErrorKind::InUse`] where others mounted something on it, [`vellum_base::ErrorKind::Timeout`]
/// where a process does not die.
pub fn end_lost(run_dir: &RunDir, options: &DetachOptions) -> Result<()> {
    clean(run_dir, options)?;
    // If its disk works after all, nothing is left; if not, a later `umount` or `check` finds files.
    let _ = remove_files(run_dir);
    Ok(())
}
