//! Devices whose requests come by io_uring: what they hold, and servers of theirs that die.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use vellum_base::ErrorKind;
use vellum_export::device::{Attached, TransportChoice, attach};

use crate::common::{Running, TestStore};
use crate::crash::{Load, finish};
use crate::mount_support::{Device, kill, run, wait_until};
use crate::server_support::{Container, row};
use crate::uring::Offered;

/// A device that is served by a ring.
fn attached(size: u64, more: &[&str]) -> Device {
    let _offered = Offered::new("Y");
    let mut device = Device::new(size);
    let spec = device.spec(more);
    device.attach_as(&vellum_export::device::AttachSpec {
        transport: TransportChoice::Ring,
        ..spec
    });
    assert_eq!(device.call("status")["transport"], "ring");
    device
}

#[test]
fn fio_verifies_random_writes_of_every_size_through_a_ring() {
    let device = attached(64 << 20, &[]);
    device.verify_with_fio(&[
        ("libaio", "512-128k"),
        ("psync", "4k-1m"),
        ("libaio", "256k-1m"),
    ]);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn file_system_exerciser_finds_no_difference_on_a_device_of_a_ring() {
    let device = attached(256 << 20, &[]);
    device.exercise_its_file_system();
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_full_host_comes_out_as_an_error_through_a_ring() {
    let small = tempfile::tempdir().unwrap();
    let target = small.path().to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs", target]);
    let _unmount = Unmount(small.path());
    let offered = Offered::new("Y");
    let mut device = Device::new_in(Some(small.path()), 64 << 20);
    let spec = device.spec(&[]);
    device.attach_as(&vellum_export::device::AttachSpec {
        transport: TransportChoice::Ring,
        ..spec
    });
    drop(offered);
    let node = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device.path())
        .unwrap();
    let block = vec![1; 1 << 20];
    let error = (0..64u64).find_map(|n| {
        let written = node.write_all_at(&block, (n % 64) << 20);
        written.and_then(|()| node.sync_data()).err()
    });
    let error = error.expect("24 MiB cannot hold 64");
    assert!(
        matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EIO)),
        "{error}"
    );
    drop(node);
    device.detach();
    device.assert_nothing_left();
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn sixty_kills_of_the_worker_of_a_ring_under_verified_load_are_not_seen() {
    let device = attached(256 << 20, &[]);
    device.mkfs();
    device.mount();
    let mut load = Load::start(&device, 6);
    let mut pauses = Vec::new();
    for round in 0..60u64 {
        if !load.is_running() {
            load.finish();
            load = Load::start(&device, 3);
        }
        let status = device.call("status");
        kill(i32::try_from(status["pid"].as_i64().unwrap()).unwrap());
        // Some kills hit a worker that has no standby behind it, and some one that is just beginning.
        std::thread::sleep(Duration::from_millis(match round % 4 {
            0 => 2,
            1 => 30,
            _ => 150,
        }));
        pauses.push(device.call("status")["last_pause_us"].as_u64().unwrap());
    }
    load.finish();
    pauses.sort_unstable();
    let status = device.call("status");
    println!(
        "pauses, us: median {} longest {}; status {status}",
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    assert_eq!(status["restarts"], 60);
    assert_eq!(status["failures"], 0);
    assert!(
        status["resent"].as_u64().unwrap() > 0,
        "no kill hit a request"
    );
    finish(&device);
}

/// Direct writes of many at once to the FUSE file itself, checked; returns what fio says.
fn fio_on_the_file(device: &Device) -> Command {
    let mut fio = Command::new("fio");
    fio.arg("--name=direct")
        .arg(format!("--filename={}", device.run_dir.dev().display()))
        .args([
            "--size=64m",
            "--bs=4k-32k",
            "--rw=randrw",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=64",
            "--verify_state_save=0",
            "--time_based",
            "--runtime=60",
            "--allow_file_create=0",
        ])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    fio
}

/// Kills workers until the load ends or `kills` are dead; true where the load ended first, with an error. `before`
/// each of them something else is done.
fn load_fails_within(device: &Device, kills: u32, before: impl Fn()) -> bool {
    let mut fio = Running(
        fio_on_the_file(device)
            .spawn()
            .expect("fio: apt-get install fio"),
    );
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(60));
        if let Some(status) = fio.0.try_wait().unwrap() {
            assert!(!status.success(), "the load ended before the kills");
            return true;
        }
        before();
        kill(i32::try_from(device.call("status")["pid"].as_i64().unwrap()).unwrap());
    }
    false
}

/// The guard is what keeps errors away: without it the same kills are seen, so the other test could see
/// them.
#[test]
fn without_its_guard_a_ring_loses_requests_when_its_worker_is_killed() {
    let device = attached(64 << 20, &["--no-guard"]);
    assert!(
        load_fails_within(&device, 200, || ()),
        "200 kills were not seen"
    );
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn kills_under_direct_load_of_depth_16_are_not_seen_where_there_is_a_guard() {
    let device = attached(64 << 20, &[]);
    assert!(!load_fails_within(&device, 60, || ()), "{}", device.log());
    wait_until("a worker serves", || device.call("status")["failures"] == 0);
    device.detach();
    device.assert_nothing_left();
}

/// Then its queues have more entries than they begin with, of which the next worker finds some with requests.
#[test]
fn kills_are_not_seen_either_while_reads_wait_for_the_disk() {
    let device = attached(64 << 20, &[]);
    let file = File::open(&device.backing).unwrap();
    let forget = || {
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(!load_fails_within(&device, 60, forget), "{}", device.log());
    wait_until("a worker serves", || device.call("status")["failures"] == 0);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_ring_outlives_its_supervisor_and_an_upgrade() {
    let device = attached(256 << 20, &[]);
    device.mkfs();
    device.mount();
    let load = Load::start(&device, 4);
    for _ in 0..3 {
        let state = device.wait_for_standby();
        kill(state.supervisor.pid);
        kill(state.worker.unwrap().pid);
        let before = state.supervisor.pid;
        wait_until("another supervisor", || {
            device.state().supervisor.pid != before
        });
    }
    device.wait_for_standby();
    let program = Path::new(env!("CARGO_BIN_EXE_vellum"));
    let timeout = Duration::from_secs(120);
    for _ in 0..3 {
        vellum_export::device::upgrade(&device.run_dir, program, timeout).unwrap();
        assert_eq!(device.call("status")["transport"], "ring");
        kill(i32::try_from(device.call("status")["pid"].as_i64().unwrap()).unwrap());
        device.wait_for_standby();
    }
    load.finish();
    assert_eq!(device.call("status")["failures"], 0);
    finish(&device);
}

#[test]
fn a_program_that_does_not_know_the_ring_does_not_take_it_over() {
    let device = attached(64 << 20, &[]);
    device.wait_for_standby();
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("old");
    let mut file = File::create(&program).unwrap();
    // As an earlier version answers to an option that it has not.
    let text = "#!/bin/sh\ncase \"$*\" in *--ring-layout*) exit 2;; esac\necho vellum-device 1\n";
    file.write_all(text.as_bytes()).unwrap();
    drop(file);
    run("chmod", &["755", program.to_str().unwrap()]);
    let timeout = Duration::from_secs(60);
    let error = vellum_export::device::upgrade(&device.run_dir, &program, timeout).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(device.call("status")["transport"], "ring");
    device.detach();
}

#[test]
fn a_host_that_does_not_offer_it_refuses_a_ring_with_what_to_set_and_auto_is_classic() {
    let _offered = Offered::new("N");
    let mut device = Device::new(64 << 20);
    let spec = |transport| vellum_export::device::AttachSpec {
        transport,
        ..device.spec(&[])
    };
    let (ring, auto) = (spec(TransportChoice::Ring), spec(TransportChoice::Auto));
    let refused: Result<Attached, _> = attach(&device.run_dir, &ring);
    let error = refused.unwrap_err();
    assert!(error.to_string().contains("enable_uring"), "{error}");
    device.attach_as(&auto);
    assert_eq!(device.call("status")["transport"], "classic");
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn auto_takes_the_ring_after_a_self_test_that_is_run_once_a_boot() {
    let result = Path::new("/run/vellum/ring-self-test.json");
    let _ = fs::remove_file(result);
    let store = TestStore::new();
    let not_offered = Offered::new("N");
    let container = Container::mounted(&store, "c");
    drop(not_offered);
    let _offered = Offered::new("Y");
    assert_eq!(container.call("status")["transport"], "classic");
    store.ok(&["umount", "c"]);
    assert!(!result.exists(), "a self-test that nobody wanted");
    store.ok(&["mount", "c"]);
    assert_eq!(
        row(&store, "c")["device"]["state"]["features"]["ring"],
        true
    );
    assert_eq!(container.call("status")["transport"], "ring");
    let tested = fs::metadata(result).unwrap().modified().unwrap();
    fs::write(container.data().join("file"), "written").unwrap();
    container.kill_worker();
    assert_eq!(fs::read(container.data().join("file")).unwrap(), b"written");
    store.ok(&["umount", "c"]);
    store.ok(&["mount", "c", "--transport", "classic"]);
    assert_eq!(container.call("status")["transport"], "classic");
    store.ok(&["umount", "c"]);
    store.ok(&["mount", "c", "--transport", "auto"]);
    assert_eq!(fs::metadata(result).unwrap().modified().unwrap(), tested);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}
