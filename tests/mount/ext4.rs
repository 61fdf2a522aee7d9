//! ext4 on a local device: the template, mount, freeze, trim, growth.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::mount_support::{Device, kill, need_root, run, try_run, wait_until};
use uuid::Uuid;
use vellum_base::ErrorKind;
use vellum_export::device::command::FileDevice;
use vellum_export::local_disk::LocalDisk;
use vellum_fs::ext4::{self, MakeOptions, MountOptions};
use vellum_fs::freeze::freeze;
use vellum_fs::superblock::Superblock;

const UUID: Uuid = Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888);
const LONG: Duration = Duration::from_secs(120);

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// A template on the device's backing file, attached and mounted.
fn mounted(size: u64) -> Device {
    let mut device = Device::new(size);
    ext4::make(&device.backing, size, &MakeOptions::new(UUID)).unwrap();
    device.attach(&[]);
    let path = PathBuf::from(device.path());
    ext4::mount(&path, &device.mount_point, MountOptions::default()).unwrap();
    device
}

fn finish(device: &Device) {
    ext4::unmount(&device.mount_point, LONG).unwrap();
    assert!(!ext4::is_mounted(&device.mount_point).unwrap());
    run("e2fsck", &["-fn", &device.path()]);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn template_is_the_same_every_time_thin_and_empty() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let size = 256 << 20;
    ext4::make(&one, size, &MakeOptions::new(UUID)).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    ext4::make(&two, size, &MakeOptions::new(UUID)).unwrap();
    run("cmp", &[one.to_str().unwrap(), two.to_str().unwrap()]);
    let size = 10 << 30;
    ext4::make(&one, size, &MakeOptions::new(UUID)).unwrap();
    assert_eq!(one.metadata().unwrap().len(), size);
    assert!(
        allocated(&one) <= 256 << 10,
        "a template of 10 GiB takes {} bytes",
        allocated(&one)
    );
    run("e2fsck", &["-fn", one.to_str().unwrap()]);
    let superblock = Superblock::read(&FileDevice::open(&one, true).unwrap()).unwrap();
    assert!(superblock.clean);
    assert_eq!(superblock.size, size);
    assert_eq!(superblock.uuid, UUID);
    let journal: u64 = superblock.journal.iter().map(|r| r.end - r.start).sum();
    assert_eq!(journal, (16 << 20) - 4096);
}

#[test]
fn small_and_odd_sizes_are_made_or_refused_with_a_reason() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small");
    ext4::make(&path, 16 << 20, &MakeOptions::new(UUID)).unwrap();
    run("e2fsck", &["-fn", path.to_str().unwrap()]);
    for size in [0, 4096, (16 << 20) + 512] {
        let error = ext4::make(&path, size, &MakeOptions::new(UUID)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn mounted_template_stays_thin_has_no_lost_and_found_and_does_not_fill_itself() {
    let device = mounted(10 << 30);
    assert_eq!(fs::read_dir(&device.mount_point).unwrap().count(), 0);
    fs::write(device.mount_point.join("file"), vec![7; 8192]).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    ext4::unmount(&device.mount_point, LONG).unwrap();
    assert!(
        allocated(&device.backing) <= 512 << 10,
        "{} bytes",
        allocated(&device.backing)
    );
    finish(&device);
}

#[test]
fn journal_of_a_clean_file_system_can_be_dropped() {
    let device = mounted(256 << 20);
    for n in 0..200 {
        let path = device.mount_point.join(format!("file{n}"));
        fs::write(&path, format!("content {n}")).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
    }
    let dirty = Superblock::read(&file_device(&device)).unwrap();
    assert!(!dirty.clean, "mounted and written to");
    ext4::unmount(&device.mount_point, LONG).unwrap();
    let path = device.path();
    device.detach();
    let before = allocated(&device.backing);
    let file = FileDevice::open(&device.backing, false).unwrap();
    let superblock = Superblock::read(&file).unwrap();
    assert!(superblock.clean);
    for range in &superblock.journal {
        use vellum_base::block::BlockDevice;
        file.discard(range.start, range.end - range.start).unwrap();
    }
    drop(file);
    assert!(allocated(&device.backing) + (1 << 20) < before, "{path}");
    run("e2fsck", &["-fn", device.backing.to_str().unwrap()]);
    let mut device = device;
    device.attach(&[]);
    let path = PathBuf::from(device.path());
    ext4::mount(&path, &device.mount_point, MountOptions::default()).unwrap();
    let text = fs::read_to_string(device.mount_point.join("file199")).unwrap();
    assert_eq!(text, "content 199");
    finish(&device);
}

/// The backing file of an attached device, whose lock its worker holds.
fn file_device(device: &Device) -> vellum_base::block::MemoryDevice {
    use vellum_base::block::{BlockDevice, Durability, MemoryDevice};
    let copy = MemoryDevice::new(4096);
    let mut block = [0; 4096];
    File::open(&device.backing)
        .unwrap()
        .read_exact_at(&mut block, 0)
        .unwrap();
    copy.write_at(&block, 0, Durability::Buffered).unwrap();
    copy
}

#[test]
fn deleted_files_and_trim_give_their_space_back() {
    let device = mounted(512 << 20);
    let path = device.mount_point.join("big");
    fs::write(&path, vec![1; 64 << 20]).unwrap();
    run("sync", &["-f", path.to_str().unwrap()]);
    let full = allocated(&device.backing);
    assert!(full > 64 << 20);
    fs::remove_file(&path).unwrap();
    run("sync", &["-f", device.mount_point.to_str().unwrap()]);
    wait_until("discards have come", || {
        allocated(&device.backing) < 40 << 20
    });
    let trimmed = ext4::trim(&device.mount_point).unwrap();
    // ext4 keeps what a discard is still under way for: here at most the file's 64 MiB.
    assert!(trimmed > 300 << 20, "{trimmed} bytes trimmed");
    assert!(allocated(&device.backing) < 40 << 20);
    let usage = ext4::usage(&device.mount_point).unwrap();
    assert!(usage.used < 1 << 20 && usage.free > 400 << 20, "{usage:?}");
    finish(&device);
}

#[test]
fn frozen_file_system_is_clean_below_and_goes_on_after_the_thaw() {
    let device = mounted(256 << 20);
    fs::write(device.mount_point.join("before"), "x").unwrap();
    let frozen = freeze(&device.mount_point, LONG).unwrap();
    assert!(Superblock::read(&file_device(&device)).unwrap().clean);
    let second = freeze(&device.mount_point, LONG).unwrap_err();
    assert_eq!(second.kind(), ErrorKind::InUse);
    let late = device.mount_point.join("after");
    let writer = std::thread::spawn(move || fs::write(late, "y"));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!writer.is_finished(), "a frozen file system took a write");
    frozen.thaw().unwrap();
    writer.join().unwrap().unwrap();
    finish(&device);
}

#[test]
fn freeze_that_lasts_too_long_thaws_by_itself_and_says_so() {
    let device = mounted(64 << 20);
    let frozen = freeze(&device.mount_point, Duration::from_millis(100)).unwrap();
    let start = Instant::now();
    fs::write(device.mount_point.join("file"), "x").unwrap();
    assert!(start.elapsed() < Duration::from_secs(50));
    assert_eq!(frozen.thaw().unwrap_err().kind(), ErrorKind::Timeout);
    finish(&device);
}

#[test]
fn killed_owner_of_a_freeze_leaves_the_file_system_thawed() {
    let device = mounted(64 << 20);
    // This test program again, as a process that freezes and then sleeps.
    let mut owner = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "ext4::freezes_and_waits",
            "--ignored",
            "--nocapture",
        ])
        .env("VELLUM_TEST_FREEZE", &device.mount_point)
        .spawn()
        .unwrap();
    let marker = device.dir.path().join("frozen");
    wait_until("it is frozen", || marker.exists());
    kill(i32::try_from(owner.id()).unwrap());
    owner.wait().unwrap();
    let start = Instant::now();
    fs::write(device.mount_point.join("file"), "x").unwrap();
    assert!(start.elapsed() < Duration::from_secs(50));
    finish(&device);
}

#[test]
#[ignore = "the process that another test kills"]
fn freezes_and_waits() {
    let Some(target) = std::env::var_os("VELLUM_TEST_FREEZE") else {
        return;
    };
    let target = PathBuf::from(target);
    let _frozen = freeze(&target, Duration::from_secs(60)).unwrap();
    fs::write(target.parent().unwrap().join("frozen"), "").unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn device_and_file_system_grow() {
    let device = mounted(64 << 20);
    fs::write(device.mount_point.join("file"), "kept").unwrap();
    let size = 20 << 30;
    File::options()
        .write(true)
        .open(&device.backing)
        .unwrap()
        .set_len(size)
        .unwrap();
    let attached = device.loop_device.unwrap();
    attached.resize().unwrap();
    assert_eq!(LocalDisk::from(attached).size().unwrap(), size);
    match ext4::grow(&device.mount_point, size) {
        Ok(()) => {}
        // Root of this host lacks CAP_SYS_RESOURCE: the other way must work.
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
            assert!(error.to_string().contains("CAP_SYS_RESOURCE"), "{error}");
            ext4::unmount(&device.mount_point, LONG).unwrap();
            ext4::grow_unmounted(Path::new(&device.path())).unwrap();
            device.mount();
        }
    }
    let usage = ext4::usage(&device.mount_point).unwrap();
    assert!(usage.size > 19 << 30, "{usage:?}");
    assert_eq!(
        fs::read_to_string(device.mount_point.join("file")).unwrap(),
        "kept"
    );
    assert!(allocated(&device.backing) < 4 << 20);
    finish(&device);
}

#[test]
fn busy_file_system_is_not_unmounted_and_says_so() {
    let device = mounted(64 << 20);
    let held = File::create(device.mount_point.join("held")).unwrap();
    let error = ext4::unmount(&device.mount_point, Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop(held);
    finish(&device);
}

#[test]
fn mounting_what_is_no_ext4_is_refused_with_the_device_named() {
    let device = Device::attached(64 << 20);
    let path = PathBuf::from(device.path());
    let error = ext4::mount(&path, &device.mount_point, MountOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains(&device.path()), "{error}");
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn read_only_device_mounts_read_only_and_takes_no_write() {
    let mut device = Device::new(64 << 20);
    ext4::make(&device.backing, 64 << 20, &MakeOptions::new(UUID)).unwrap();
    let mut spec = device.spec(&[]);
    spec.read_only = true;
    device.attach_as(&spec);
    let of = format!("of={}", device.path());
    assert!(
        !try_run("dd", &["if=/dev/zero", &of, "count=1"])
            .status
            .success()
    );
    let path = PathBuf::from(device.path());
    let options = MountOptions {
        read_only: true,
        ..MountOptions::default()
    };
    ext4::mount(&path, &device.mount_point, options).unwrap();
    assert!(fs::write(device.mount_point.join("file"), "x").is_err());
    finish(&device);
}
