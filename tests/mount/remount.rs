//! The store's file system is shut down under its servers, and mounted again while the machine runs on:
//! the log of changes had been written back, the page cache is gone. Nothing that was flushed may be
//! missing, and nothing may read as what it never was. docs/durability.md, case 23.

use crate::server_support;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{TestStore, own_mounts, run, wait_until};
use crate::nbd_client::{Client, FLUSH};
use crate::server_support::{Container, row};
use vellum_export::local_disk::LocalDisk;
use vellum_export::loop_device::LoopDevice;

const BLOCK: usize = 4096;
/// [`common::SIZE`] in bytes.
const IMAGE: usize = 64 << 20;

/// A file system on a file, mounted on a directory of its own.
struct Disk {
    kind: &'static str,
    image: PathBuf,
    target: PathBuf,
}

impl Disk {
    fn new(dir: &Path, kind: &'static str) -> Disk {
        let (image, target) = (dir.join("disk.img"), dir.join("disk"));
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(&target).unwrap();
        let path = image.display().to_string();
        match kind {
            "xfs" => run("mkfs.xfs", &["-q", path.as_str()]),
            _ => run("mke2fs", &["-q", "-t", kind, "-F", path.as_str()]),
        };
        let disk = Disk {
            kind,
            image,
            target,
        };
        disk.mount();
        disk
    }

    fn mount(&self) {
        let loop_option = ["-t", self.kind, "-o", "loop"];
        let paths = [&self.image, &self.target].map(|path| path.display().to_string());
        let paths = paths.each_ref().map(String::as_str);
        run("mount", &[&loop_option[..], &paths].concat());
    }

    /// What is in memory stays there: the file system stops at once, and its journal is not written.
    fn shut_down(&self) {
        // XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN are one number; 2: as it is.
        const SHUTDOWN: libc::c_ulong = 0x8004_587d;
        let how = 2u32;
        let root = File::open(&self.target).unwrap();
        // SAFETY: the call reads the number that it is given the address of.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN as _, &raw const how) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    fn is_mounted(&self) -> bool {
        let target = format!(" {} ", self.target.display());
        fs::read_to_string("/proc/thread-self/mountinfo")
            .unwrap()
            .contains(&target)
    }

    /// Takes it down, and all that is mounted below; not lazily, so that it is gone.
    fn unmount(&self) {
        let below = format!(" {}/", self.target.display());
        wait_until("the file system is unmounted", || {
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            for line in mounts.lines().rev().filter(|line| line.contains(&below)) {
                let target = line.split(' ').nth(4).unwrap();
                let _ = Command::new("umount").args(["-l", target]).output();
            }
            for device in LoopDevice::attached().into_iter().flatten() {
                let file = device.backing_file();
                if file.is_some_and(|file| file.starts_with(&self.target)) {
                    let _ = device.detach_lazily();
                }
            }
            let _ = Command::new("umount").arg(&self.target).output();
            !self.is_mounted()
        });
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.is_mounted() && !std::thread::panicking() {
            self.unmount();
        } else {
            let _ = Command::new("umount")
                .args(["-l"])
                .arg(&self.target)
                .output();
        }
    }
}

/// What the host's write-back would do some seconds later: the log of changes reaches the disk.
fn write_logs_back(store: &TestStore) {
    let mut found = 0;
    for layer in fs::read_dir(store.root.join("layers")).unwrap() {
        let dir = layer.unwrap().path();
        if let Ok(log) = File::open(dir.join("live")) {
            log.sync_all().unwrap();
            File::open(&dir).unwrap().sync_all().unwrap();
            found += 1;
        }
    }
    assert!(found > 0, "no log of changes");
}

fn over_nbd(kind: &'static str) {
    own_mounts();
    // Outside of the disk, so that it can be unmounted.
    let outside = tempfile::tempdir().unwrap();
    let disk = Disk::new(outside.path(), kind);
    let mut store = TestStore::new();
    store.root = disk.target.join("store");
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let (server, socket) = store.serve("c");
    let mut client = Client::new(&socket, "c");
    let before = client.content(IMAGE);
    // Each flush carries a first write in the journal; then come some that no flush covers.
    let (flushed, unflushed) = (8000..8100, 9000..9100);
    for at in flushed.clone() {
        client.write(at * BLOCK, BLOCK, 0x51);
        client.request(FLUSH, 0, 0, 0, &[]);
    }
    for at in unflushed.clone() {
        client.write(at * BLOCK, BLOCK, 0x52);
    }
    write_logs_back(&store);
    disk.shut_down();
    drop(server);
    disk.unmount();
    disk.mount();
    let (server, socket) = store.serve("c");
    let after = Client::new(&socket, "c").content(IMAGE);
    let missing = flushed
        .filter(|at| after[at * BLOCK..][..BLOCK] != [0x51; BLOCK])
        .count();
    assert_eq!(missing, 0, "{kind}: flushed blocks are missing");
    for at in unflushed {
        for sector in 0..8 {
            let range = at * BLOCK + sector * 512..at * BLOCK + (sector + 1) * 512;
            let (old, new) = (&before[range.clone()], [0x52; 512]);
            let found = &after[range];
            assert!(
                found == old || found == new,
                "{kind}: block {at}: {}",
                found[0]
            );
        }
    }
    server.end();
    store.ok(&["check", "--scrub"]);
    drop(store);
    disk.unmount();
}

fn in_a_mount(kind: &'static str) {
    own_mounts();
    let outside = tempfile::tempdir().unwrap();
    let disk = Disk::new(outside.path(), kind);
    let mut store = TestStore::new();
    store.root = disk.target.join("store");
    let container = Container::mounted(&store, "c");
    let data = container.data();
    let file = |number: usize| data.join(format!("file{number}"));
    for number in 0..60 {
        fs::write(file(number), vec![number as u8 + 1; 9000]).unwrap();
        File::open(file(number)).unwrap().sync_all().unwrap();
    }
    for number in 60..90 {
        fs::write(file(number), vec![0xee; 9000]).unwrap();
    }
    // The container's own file system writes back, and flushes nothing.
    write_logs_back(&store);
    let device = row(&store, "c")["device"]["disk"].clone();
    let device = LoopDevice::from_path(Path::new(device.as_str().unwrap())).unwrap();
    let diskseq = LocalDisk::from(device).diskseq();
    disk.shut_down();
    assert!(store.kill_all());
    disk.unmount();
    // The note of it may be lost with the page cache, and the name of its backing file is.
    wait_until("the loop device went with its mount", || {
        device.backing_file().is_none() || LocalDisk::from(device).diskseq() != diskseq
    });
    disk.mount();
    let mounted = store.mount("c");
    for number in 0..60 {
        let found = fs::read(mounted.join(format!("data/file{number}"))).unwrap();
        assert!(
            found == vec![number as u8 + 1; 9000],
            "{kind}: file {number}, {} bytes",
            found.len()
        );
    }
    store.ok(&["umount", "c"]);
    server_support::fsck(&store, "c");
    store.ok(&["check", "--scrub"]);
    drop(store);
    disk.unmount();
}

#[test]
fn over_nbd_nothing_flushed_is_missing_after_xfs_was_shut_down_and_mounted_again() {
    over_nbd("xfs");
}

#[test]
fn over_nbd_nothing_flushed_is_missing_after_ext4_was_shut_down_and_mounted_again() {
    over_nbd("ext4");
}

#[test]
fn in_a_mount_nothing_synced_is_missing_after_xfs_was_shut_down_and_mounted_again() {
    in_a_mount("xfs");
}

#[test]
fn in_a_mount_nothing_synced_is_missing_after_ext4_was_shut_down_and_mounted_again() {
    in_a_mount("ext4");
}
