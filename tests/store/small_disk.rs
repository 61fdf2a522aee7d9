//! A store on a disk of its own that is soon full.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::common::{self, TestStore, run};

/// A small file system of its own for a store, on a loop device.
pub struct SmallDisk {
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
        common::need_root();
        let dir = tempfile::tempdir_in(parent).unwrap();
        let image = dir.path().join("disk");
        let mount_point = dir.path().join("mnt");
        fs::create_dir(&mount_point).unwrap();
        let (image, target) = (image.to_str().unwrap(), mount_point.to_str().unwrap());
        run("truncate", &["-s", size, image]);
        let arguments: Vec<&str> = make[1..].iter().copied().chain([image]).collect();
        run(make[0], &arguments);
        run("mount", &["-o", "loop", image, target]);
        SmallDisk {
            _dir: dir,
            mount_point,
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = self.mount_point.display().to_string();
        let _ = std::process::Command::new("umount").arg(&target).output();
        let _ = std::process::Command::new("umount")
            .args(["-l", &target])
            .output();
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
