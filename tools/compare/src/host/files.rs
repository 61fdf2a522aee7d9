//! What lies on the host's disks: read, copied, counted, written back.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::{CLEANING_UP, interrupted, out_of_time, run};

/// Bytes that a file or all files of a tree take on the disk. Files that vanish meanwhile count
/// nothing; other file systems mounted below are left out.
pub fn allocated(path: &Path) -> u64 {
    files_below(path)
        .iter()
        .map(|(_, metadata)| metadata.blocks() * 512)
        .sum()
}

/// What lies below a path on its own file system, each file once.
fn files_below(path: &Path) -> Vec<(PathBuf, fs::Metadata)> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Vec::new();
    };
    let device = metadata.dev();
    let mut seen = std::collections::HashSet::new();
    let mut found = Vec::new();
    let mut todo = vec![path.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            todo.extend(entries.map(|entry| entry.path()));
        } else if metadata.nlink() > 1 && !seen.insert(metadata.ino()) {
            continue;
        }
        found.push((path, metadata));
    }
    found
}

/// Reads all data of the files below a path once, so that a cache below the host's disk, as that of
/// a virtual machine has one, knows the image of each driver alike: what was copied just now is in
/// it, and what was made an hour ago may take a hundred times as long to come.
pub fn read_all(path: &Path) -> Result<()> {
    let mut buf = vec![0; 1 << 20];
    for (path, metadata) in files_below(path) {
        if interrupted() || (out_of_time() && CLEANING_UP.load(Ordering::Relaxed) == 0) {
            bail!(
                "not read to its end, since the time is over: {}",
                path.display()
            );
        }
        // What is only a hole takes nothing from the disk.
        if !metadata.is_file() || metadata.blocks() == 0 {
            continue;
        }
        match File::open(&path) {
            Ok(file) => read_data(&file, &mut buf),
            // Gone meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
        .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Reads the extents of a file that hold data.
fn read_data(file: &File, buf: &mut [u8]) -> Result<()> {
    let len = file.metadata()?.len();
    let mut at = 0;
    while at < len {
        at = match lseek(file, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, at as i64, Whence::SeekHole)? as u64;
        while at < end {
            let piece = (end - at).min(buf.len() as u64) as usize;
            match file.read_at(buf.get_mut(..piece).unwrap_or_default(), at)? {
                0 => return Ok(()),
                read => at += read as u64,
            }
        }
    }
    Ok(())
}

/// What reads all files of a tree, as a program does that looks at everything.
pub fn reading(dir: &Path) -> Command {
    // To a pipe: GNU tar reads nothing when it writes to /dev/null.
    let script = "tar -C \"$0\" -cf - . | cat >/dev/null";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(dir);
    command
}

/// Reads all files of a tree.
pub fn read_files(dir: &Path) -> Result<()> {
    run(&mut reading(dir)).map(drop)
}

/// Bytes that the disk below a path was asked to write so far, by everybody (Documentation/block/
/// stat.rst of Linux: the 7th figure, in sectors of 512 bytes); none of a tmpfs.
pub fn written(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let sectors: u64 = stat.split_whitespace().nth(6)?.parse().ok()?;
    Some(sectors * 512)
}

/// Writes back all that is dirty on the file system of a path.
pub fn sync_fs(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    nix::unistd::syncfs(&file).with_context(|| format!("syncfs {}", path.display()))
}

/// Makes the page cache cold. What is on these paths is written back first.
pub fn drop_caches(paths: &[&Path]) -> Result<()> {
    for path in paths {
        sync_fs(path)?;
    }
    fs::write("/proc/sys/vm/drop_caches", "3").context("/proc/sys/vm/drop_caches")
}

/// Copies a tree with `cp -a`.
pub fn copy_tree(from: &Path, to: &Path, options: &[&str]) -> Result<()> {
    fs::create_dir_all(to)?;
    run(Command::new("cp")
        .arg("-a")
        .args(options)
        .arg(from.join("."))
        .arg(to))?;
    Ok(())
}
