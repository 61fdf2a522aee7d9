//! A store whose disk is full.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{TestStore, run};

/// A small ext4 of its own for a store, on a loop device.
struct SmallDisk {
    _dir: tempfile::TempDir,
    mount_point: PathBuf,
}

impl SmallDisk {
    fn new(size: &str) -> Self {
        common::need_root();
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        let mount_point = dir.path().join("mnt");
        fs::create_dir(&mount_point).unwrap();
        let (image, target) = (image.to_str().unwrap(), mount_point.to_str().unwrap());
        run("truncate", &["-s", size, image]);
        run("mke2fs", &["-q", "-t", "ext4", "-m", "0", image]);
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

/// Writes and syncs 256 KiB files until one fails; returns how many there are and the failure.
fn fill(dir: &Path) -> (u32, std::io::Error) {
    let mut number = 0u32;
    loop {
        let write = || {
            let mut file = fs::File::create(dir.join(format!("fill-{number}")))?;
            file.write_all(&vec![number as u8 | 1; 256 << 10])?;
            file.sync_all()
        };
        match write() {
            Ok(()) => number += 1,
            Err(error) => return (number, error),
        }
    }
}

#[test]
fn a_full_disk_is_no_space_and_harms_nothing_that_was_synced() {
    let disk = SmallDisk::new("96M");
    let store = TestStore::under(&disk.mount_point);
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "base\n").unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    for name in ["hog", "other"] {
        store.ok(&["create", "base", "--name", name]);
    }
    let other = store.mount("other");
    fs::write(other.join("mine"), "mine\n").unwrap();
    fs::File::open(other.join("mine"))
        .unwrap()
        .sync_all()
        .unwrap();

    let hog = store.mount("hog");
    let (written, error) = fill(&hog);
    println!("after {written} files of 256 KiB: {error}");
    assert!(written > 20, "{written}");
    // ext4 reports what its device could not take as ENOSPC or, for its own metadata, as EIO or a
    // file system turned read-only.
    assert!(
        matches!(
            error.raw_os_error(),
            Some(libc::ENOSPC | libc::EIO | libc::EROFS)
        ),
        "{error}"
    );

    // The neighbour reads, and keeps what it has.
    assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "base\n");
    assert_eq!(fs::read_to_string(other.join("mine")).unwrap(), "mine\n");
    // A command that needs room says that there is none.
    let error = store.fails(&["create", "base", "--name", "late"]);
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(store.names("ps"), ["hog", "other"]);

    // The hog goes, and there is room again.
    store.ok(&["umount", "--force", "hog"]);
    store.ok(&["check"]);
    store.ok(&["rm", "hog"]);
    fs::write(other.join("after"), vec![5; 1 << 20]).unwrap();
    fs::File::open(other.join("after"))
        .unwrap()
        .sync_all()
        .unwrap();
    store.ok(&["umount", "other"]);
    let other = store.mount("other");
    assert_eq!(fs::read_to_string(other.join("mine")).unwrap(), "mine\n");
    assert_eq!(fs::read(other.join("after")).unwrap(), vec![5; 1 << 20]);
    store.ok(&["umount", "other"]);
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_met_a_full_disk_keeps_what_it_synced_and_writes_once_there_is_room() {
    let disk = SmallDisk::new("64M");
    let store = TestStore::under(&disk.mount_point);
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    store.ok(&["create", "base", "--name", "c"]);
    let ballast = store.path("ballast");
    run("fallocate", &["-l", "16M", ballast.to_str().unwrap()]);
    let dir = store.mount("c");
    let (written, error) = fill(&dir);
    println!("after {written} files of 256 KiB: {error}");
    fs::remove_file(&ballast).unwrap();
    // Where ext4 turned read-only it has to be mounted anew; otherwise it goes on as it is.
    let goes_on = fs::write(dir.join("goes-on"), "x").is_ok();
    println!("goes on without a new mount: {goes_on}");
    store.ok(&["umount", "--force", "c"]);
    let dir = store.mount("c");
    for number in 0..written {
        let body = fs::read(dir.join(format!("fill-{number}"))).unwrap();
        assert_eq!(body, vec![number as u8 | 1; 256 << 10], "file {number}");
    }
    let mut file = fs::File::create(dir.join("new")).unwrap();
    file.write_all(&vec![6; 4 << 20]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}
