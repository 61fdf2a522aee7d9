//! A store on a disk of its own that is soon full.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{self, TestStore, run};

/// Unmounts what it names when it is dropped, also when a test failed.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// By mount(8) with these arguments; `target` is made where it is missing.
    pub fn new(arguments: &[&str], target: &Path) -> Mounted {
        common::need_root();
        fs::create_dir_all(target).unwrap();
        let target_text = target.display().to_string();
        let mut all = arguments.to_vec();
        all.push(&target_text);
        run("mount", &all);
        Mounted(target.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let umount = |options: &[&str]| Command::new("umount").args(options).arg(&self.0).output();
        // Never a second time: the mount below it may be somebody else's.
        if !umount(&[]).is_ok_and(|output| output.status.success()) {
            let _ = umount(&["-l"]);
        }
    }
}

/// A small file system of its own for a store, on a loop device.
pub struct SmallDisk {
    // Unmounted before its image goes.
    _mounted: Mounted,
    _dir: tempfile::TempDir,
    pub mount_point: PathBuf,
}

impl SmallDisk {
    pub fn new(size: &str) -> Self {
        SmallDisk::of(&["mke2fs", "-q", "-t", "ext4", "-m", "0"], size)
    }

    /// Made by the program `make` with its arguments and the path.
    pub fn of(make: &[&str], size: &str) -> Self {
        SmallDisk::below(&std::env::temp_dir(), make, size)
    }

    /// The same, of a file in a directory below `parent`.
    pub fn below(parent: &Path, make: &[&str], size: &str) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let image = dir.path().join("disk");
        let image = image.to_str().unwrap();
        run("truncate", &["-s", size, image]);
        let arguments: Vec<&str> = make[1..].iter().copied().chain([image]).collect();
        run(make[0], &arguments);
        let mount_point = dir.path().join("mnt");
        SmallDisk {
            _mounted: Mounted::new(&["-o", "loop", image], &mount_point),
            _dir: dir,
            mount_point,
        }
    }
}

/// Writes a file and syncs it.
pub fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// What `vellum ps` says of a container.
pub fn row(store: &TestStore, name: &str) -> serde_json::Value {
    let rows = store.json(&["ps"]);
    let all = rows.as_array().unwrap();
    all.iter().find(|row| row["name"] == name).unwrap().clone()
}
