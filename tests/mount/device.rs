//! A block device through FUSE and loop: attaching, I/O, discard, detaching.

use crate::mount_support;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::mount_support::{Device, kill_together, run, wait_until};
use vellum_base::ErrorKind;
use vellum_export::device::{DetachOptions, detach};
use vellum_export::loop_device::Lifetime;

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
fn attach_mount_umount_detach_takes_a_small_part_of_the_container_budget() {
    let mut device = Device::attached(256 << 20);
    device.mkfs();
    device.detach();
    let mut rounds = Vec::new();
    let mut plain = Vec::new();
    for _ in 0..9 {
        // The same without us, on a plain file: what the host takes for it beside whatever else it does.
        let start = Instant::now();
        let image = device.backing.to_str().unwrap();
        let target = device.mount_point.to_str().unwrap();
        run("mount", &["-t", "ext4", "-o", "loop", image, target]);
        device.umount();
        plain.push(start.elapsed());
        let start = Instant::now();
        device.attach(&[]);
        let attached = start.elapsed();
        device.mount();
        device.umount();
        let unmounted = start.elapsed();
        device.detach();
        let all = start.elapsed();
        println!(
            "attach {attached:?} detach {:?} all {all:?}",
            all - unmounted
        );
        rounds.push(all);
    }
    rounds.sort_unstable();
    plain.sort_unstable();
    // About 11 ms here. The fastest, since whatever else runs beside it slows down the others. A host
    // that is busy all the time is one where a plain mount takes long.
    let limit = Duration::from_millis(200).max(plain[0] * 15);
    assert!(rounds[0] < limit, "{rounds:?}; plain mounts {plain:?}");
}

#[test]
fn fio_verifies_random_writes_of_every_size_on_the_block_device() {
    let device = Device::attached(64 << 20);
    device.verify_with_fio(&[("libaio", "512-128k"), ("psync", "4k-1m")]);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn file_system_exerciser_finds_no_difference_on_a_mounted_device() {
    let device = Device::attached(256 << 20);
    device.exercise_its_file_system();
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn discard_of_the_block_device_frees_space_and_reads_zeros() {
    let device = Device::attached(64 << 20);
    let of = format!("of={}", device.path());
    run(
        "dd",
        &["if=/dev/urandom", &of, "bs=1M", "count=32", "oflag=direct"],
    );
    assert!(device.backing.metadata().unwrap().blocks() * 512 >= 32 << 20);
    run("blkdiscard", &["-l", "16M", &device.path()]);
    let taken = device.backing.metadata().unwrap().blocks() * 512;
    assert!(taken <= 17 << 20, "{taken} bytes");
    run(
        "blkdiscard",
        &["-z", "-o", "16M", "-l", "16M", &device.path()],
    );
    run("cmp", &["-n", "33554432", &device.path(), "/dev/zero"]);
    assert_eq!(device.call("status")["failures"], 0);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn full_host_comes_out_as_enospc_even_with_the_log_on_it_and_room_heals_it() {
    // The store on a small file system of its own, which is full before the device is.
    let small = tempfile::tempdir().unwrap();
    let target = small.path().to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs", target]);
    let device = Device::new_in(Some(small.path()), 64 << 20);
    let cleanup = Unmount(small.path());
    let mut device = device;
    device.attach(&[]);
    let ballast = small.path().join("ballast");
    fs::write(&ballast, vec![1; 12 << 20]).unwrap();
    let node = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device.path())
        .unwrap();
    // Aligned as direct I/O wants it.
    let block = memmap2::MmapMut::map_anon(1 << 20).unwrap();
    let error = (0..32u64)
        .find_map(|n| node.write_all_at(&block, n << 20).err())
        .expect("24 MiB cannot hold 32");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    fs::remove_file(&ballast).unwrap();
    node.write_all_at(&block, 18 << 20).unwrap();
    drop(node);
    device.detach();
    device.assert_nothing_left();
    drop(device);
    drop(cleanup);
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn mounted_device_is_not_detached_and_the_error_says_where_it_is_mounted() {
    let device = Device::attached(64 << 20);
    device.mkfs();
    device.mount();
    let error = detach(&device.run_dir, &DetachOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    let mount_point = device.mount_point.to_str().unwrap();
    assert!(error.to_string().contains(mount_point), "{error}");
    fs::write(device.mount_point.join("still"), "works").unwrap();
    device.umount();
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_loop_device_goes_with_its_last_mount_or_opener_without_any_command() {
    let device = Device::attached(64 << 20);
    let loop_device = device.loop_device.unwrap();
    device.mkfs();
    device.mount();
    let copy = tempfile::tempdir().unwrap();
    let copy = copy.path().to_str().unwrap();
    run(
        "mount",
        &["--bind", device.mount_point.to_str().unwrap(), copy],
    );
    device.let_go();
    device.umount();
    assert!(loop_device.backing_file().is_some(), "it is still mounted");
    // The note of it is lost, and its backing file has no name any more.
    fs::remove_file(device.run_dir.path().join("loop")).unwrap();
    run(
        "umount",
        &["-l", device.run_dir.path().join("dev").to_str().unwrap()],
    );
    run("umount", &[copy]);
    wait_until("it is detached", || loop_device.backing_file().is_none());

    // Nor does one stay that was never mounted, as when a command dies.
    let mut device = Device::attached(64 << 20);
    let loop_device = device.loop_device.unwrap();
    device.let_go();
    wait_until("it is detached", || loop_device.backing_file().is_none());
    device.detach();
    // Unless others are to mount it.
    let mut spec = device.spec(&[]);
    spec.lifetime = Lifetime::Detach;
    device.attach_as(&spec);
    device.let_go();
    let loop_device = device.loop_device.unwrap();
    drop(File::open(loop_device.path()).unwrap());
    // What the kernel does then it does within a moment.
    std::thread::sleep(Duration::from_millis(100));
    assert!(loop_device.backing_file().is_some());
    // It is found by the note of it where its backing file has no name any more.
    let state = device.wait_for_standby();
    let all = [state.standby, Some(state.supervisor), state.worker];
    let pids: Vec<i32> = all.into_iter().flatten().map(|one| one.pid).collect();
    kill_together(&pids);
    wait_until("all are dead", || !device.state().is_alive());
    run(
        "umount",
        &["-l", device.run_dir.path().join("dev").to_str().unwrap()],
    );
    device.detach();
    wait_until("it is detached", || loop_device.backing_file().is_none());
    device.assert_nothing_left();
}

#[test]
fn open_device_is_not_detached_and_keeps_working() {
    let device = Device::attached(64 << 20);
    let held = File::open(device.path()).unwrap();
    let options = DetachOptions {
        force: false,
        timeout: Duration::from_millis(100),
    };
    let error = detach(&device.run_dir, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    let holder = format!("process {} (", std::process::id());
    assert!(error.to_string().contains(&holder), "{error}");
    drop(held);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_device_that_another_mount_namespace_has_mounted_is_not_detached_and_the_error_says_whose() {
    let device = Device::attached(64 << 20);
    device.mkfs();
    device.mount();
    device.let_go();
    // Its copy of the mount stays when ours goes.
    let mut other = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("echo ready; read line")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(&mut other.stdout.take().unwrap(), &mut ready).unwrap();
    device.umount();
    let options = DetachOptions {
        force: false,
        timeout: Duration::from_millis(100),
    };
    let error = detach(&device.run_dir, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    let whose = format!("in the mount namespace of process {} (", other.id());
    drop(other.stdin.take());
    other.wait().unwrap();
    assert!(error.to_string().contains(&whose), "{error}");
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn two_devices_at_once_do_not_mix_and_one_outlives_the_other() {
    let one = Device::attached(64 << 20);
    let two = Device::attached(64 << 20);
    assert_ne!(one.path(), two.path());
    for device in [&one, &two] {
        device.mkfs();
        device.mount();
    }
    fs::write(one.mount_point.join("file"), "one").unwrap();
    fs::write(two.mount_point.join("file"), "two").unwrap();
    assert_eq!(
        fs::read_to_string(one.mount_point.join("file")).unwrap(),
        "one"
    );
    one.umount();
    one.detach();
    one.assert_nothing_left();
    assert_eq!(
        fs::read_to_string(two.mount_point.join("file")).unwrap(),
        "two"
    );
    two.umount();
    two.detach();
    two.assert_nothing_left();
}

#[test]
fn many_devices_attached_at_the_same_time_each_get_a_loop_device_of_their_own() {
    let threads: Vec<_> = (0..6)
        .map(|_| std::thread::spawn(|| Device::attached(16 << 20)))
        .collect();
    let devices: Vec<Device> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    let mut paths: Vec<String> = devices.iter().map(Device::path).collect();
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), devices.len());
    for device in &devices {
        device.detach();
        device.assert_nothing_left();
    }
}

#[test]
fn unknown_and_broken_commands_get_an_error_and_the_device_goes_on() {
    let device = Device::attached(16 << 20);
    let wait = Duration::from_secs(5);
    let call = |verb: &str| {
        vellum_export::device::control::call(&device.run_dir, verb, serde_json::Value::Null, wait)
    };
    assert_eq!(call("dance").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(call("upgrade").unwrap_err().kind(), ErrorKind::InvalidInput);
    call("flush").unwrap();
    let status = call("status").unwrap();
    assert_eq!(status["size"], 16 << 20);
    let mode = fs::metadata(device.run_dir.path().join("control.sock"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        fs::metadata(device.run_dir.path()).unwrap().mode() & 0o777,
        0o700
    );
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn stop_command_ends_the_processes_and_detach_removes_the_rest() {
    let device = Device::attached(16 << 20);
    device.call("stop");
    mount_support::wait_until("it has ended", || !device.state().is_alive());
    device.detach();
    device.assert_nothing_left();
}
