//! A block device through FUSE and loop: attaching, I/O, discard, detaching.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "helpers of tests fail the test"
)]

mod mount_support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use mount_support::{Device, run};

#[test]
fn attached_device_holds_ext4_and_detaching_leaves_nothing() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    fs::write(device.mount_point.join("file"), "content").unwrap();
    device.umount();
    run("e2fsck", &["-fn", &device.path()]);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn attach_mount_umount_detach_is_fast() {
    let mut device = Device::attached(256 << 20);
    device.mkfs();
    device.detach();
    let mut rounds = Vec::new();
    for _ in 0..10 {
        let start = Instant::now();
        device.attach(&[]);
        let attached = start.elapsed();
        device.mount();
        let mounted = start.elapsed();
        device.umount();
        let unmounted = start.elapsed();
        device.detach();
        rounds.push([
            attached,
            mounted - attached,
            unmounted - mounted,
            start.elapsed() - unmounted,
            start.elapsed(),
        ]);
    }
    for round in &rounds {
        println!(
            "attach {:?} mount {:?} umount {:?} detach {:?} all {:?}",
            round[0], round[1], round[2], round[3], round[4]
        );
    }
    let _ = fs::metadata(&device.backing).unwrap().blocks();
}
