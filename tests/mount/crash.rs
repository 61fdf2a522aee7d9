//! Processes of a device are killed while it is mounted and under verified load.

use crate::mount_support;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::mount_support::{Device, kill, kill_together, run, wait_until};
use vellum_export::device::{Status, attach, ensure_supervised, find_leaks, upgrade};
use vellum_fs::run_dir::RunRoot;

/// fio with checksums and fsync on a mounted device; its end is waited for on drop.
pub struct Load(Child);

impl Load {
    pub fn start(device: &Device, seconds: u32) -> Load {
        let directory = format!("--directory={}", device.mount_point.display());
        let runtime = format!("--runtime={seconds}");
        let child = Command::new("fio")
            .args([
                "--name=verified",
                &directory,
                "--size=24m",
                "--rw=randwrite",
                "--bs=8k",
                "--ioengine=psync",
                "--fsync=8",
                "--verify=crc32c",
                "--verify_backlog=256",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--numjobs=2",
                "--time_based",
                &runtime,
                "--group_reporting",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("fio is missing: apt-get install fio");
        Load(child)
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    pub fn finish(mut self) {
        let child = std::mem::replace(&mut self.0, Command::new("true").spawn().unwrap());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "fio: {}\n{text}", output.status);
        assert!(!text.contains("verify:"), "fio found wrong data\n{text}");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn worker_pid(device: &Device) -> i32 {
    let pid = device.call("status")["pid"].as_i64().unwrap();
    i32::try_from(pid).unwrap()
}

/// Unmounts, checks the file system with e2fsck, detaches and looks for leftovers.
pub fn finish(device: &Device) {
    device.umount();
    run("e2fsck", &["-fn", &device.path()]);
    device.detach();
    device.assert_nothing_left();
}

fn kill_worker_under_load(more: &[&str], kills: u32) {
    let mut device = Device::new(256 << 20);
    device.attach(more);
    device.mkfs();
    device.mount();
    let mut load = Load::start(&device, 6);
    let served = || device.call("status")["served"].as_u64().unwrap();
    let before = served();
    wait_until("fio lays its files out", || served() > before + 100);
    let mut pauses = Vec::new();
    for round in 0..kills {
        // On a busy host the kills may take longer than a load.
        if !load.is_running() {
            load.finish();
            load = Load::start(&device, 3);
        }
        let status = device.call("status");
        kill(i32::try_from(status["pid"].as_i64().unwrap()).unwrap());
        // Some kills hit a worker that has no standby behind it.
        std::thread::sleep(Duration::from_millis(if round % 3 == 0 { 30 } else { 200 }));
        let status = device.call("status");
        pauses.push(status["last_pause_us"].as_u64().unwrap());
    }
    load.finish();
    pauses.sort_unstable();
    let status = device.call("status");
    println!(
        "pauses of {kills} kills, us: median {} longest {}; status {status}",
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    assert_eq!(status["restarts"], kills);
    assert_eq!(status["failures"], 0);
    finish(&device);
}

#[test]
fn thirty_kills_of_the_worker_under_verified_load_are_not_seen() {
    kill_worker_under_load(&[], 30);
}

#[test]
fn kills_of_the_worker_on_a_kernel_without_resend_are_not_seen() {
    kill_worker_under_load(&["--no-resend"], 30);
}

#[test]
fn twenty_kills_of_an_idle_worker_are_not_taken_for_its_own_fault() {
    let device = Device::attached(64 << 20);
    for _ in 0..20 {
        kill(worker_pid(&device));
    }
    device.mkfs();
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn killed_supervisor_is_replaced_by_the_standby_and_kills_of_workers_go_on_unseen() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    let load = Load::start(&device, 3);
    for _ in 0..3 {
        let before = device.wait_for_standby();
        kill(before.supervisor.pid);
        wait_until("the standby is the supervisor", || {
            device.state().supervisor.pid == before.standby.unwrap().pid
        });
        let worker = worker_pid(&device);
        assert_eq!(worker, before.worker.unwrap().pid, "the worker goes on");
        kill(worker);
        wait_until("another worker serves", || worker_pid(&device) != worker);
    }
    load.finish();
    finish(&device);
}

#[test]
fn supervisor_and_worker_killed_together_are_both_replaced() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    let state = device.wait_for_standby();
    let load = Load::start(&device, 2);
    std::thread::sleep(Duration::from_millis(300));
    kill(state.worker.unwrap().pid);
    kill(state.supervisor.pid);
    load.finish();
    assert_ne!(worker_pid(&device), state.worker.unwrap().pid);
    finish(&device);
}

#[test]
fn worker_without_supervisor_and_standby_serves_and_is_detached() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    let state = device.wait_for_standby();
    kill(state.standby.unwrap().pid);
    kill(state.supervisor.pid);
    let load = Load::start(&device, 1);
    load.finish();
    assert_eq!(worker_pid(&device), state.worker.unwrap().pid);
    finish(&device);
}

#[test]
fn worker_without_supervisor_and_standby_starts_a_supervisor_that_restarts_it() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    let state = device.wait_for_standby();
    let wait = Duration::from_secs(120);
    assert!(!ensure_supervised(&device.run_dir, wait).unwrap());
    kill(state.standby.unwrap().pid);
    kill(state.supervisor.pid);
    let load = Load::start(&device, 2);
    wait_until("there is another supervisor", || {
        let now = device.state().supervisor;
        now != state.supervisor && now.is_alive()
    });
    assert_eq!(worker_pid(&device), state.worker.unwrap().pid);
    assert!(!ensure_supervised(&device.run_dir, wait).unwrap());
    for _ in 0..3 {
        device.wait_for_standby();
        let worker = worker_pid(&device);
        kill(worker);
        wait_until("another worker serves", || worker_pid(&device) != worker);
    }
    load.finish();
    finish(&device);
}

#[test]
fn everything_killed_is_found_and_detached_although_it_was_mounted() {
    let device = Device::attached(64 << 20);
    device.mkfs();
    device.mount();
    let state = device.wait_for_standby();
    let root = &RunRoot::of_store(device.dir.path());
    assert_eq!(find_leaks(root).unwrap(), []);
    kill_together(&[
        state.standby.unwrap().pid,
        state.supervisor.pid,
        state.worker.unwrap().pid,
    ]);
    wait_until("all are dead", || !device.state().is_alive());
    let leaks = find_leaks(root).unwrap();
    assert_eq!(leaks.len(), 1);
    assert_eq!(leaks[0].run_dir, device.run_dir.canonical().unwrap());
    assert!(leaks[0].what.contains(&device.path()), "{}", leaks[0].what);
    device.detach();
    device.assert_nothing_left();
    assert_eq!(find_leaks(root).unwrap(), []);
    // Detaching what is not there is fine.
    device.detach();
}

#[test]
fn attach_after_everything_was_killed_cleans_up_first() {
    let mut device = Device::attached(64 << 20);
    device.mkfs();
    let state = device.wait_for_standby();
    kill_together(&[
        state.standby.unwrap().pid,
        state.supervisor.pid,
        state.worker.unwrap().pid,
    ]);
    wait_until("all are dead", || !device.state().is_alive());
    device.attach(&[]);
    device.mount();
    finish(&device);
}

#[test]
fn worker_that_always_dies_is_given_up_with_a_reason_and_an_io_error() {
    let mut device = Device::new(64 << 20);
    device.attach(&["--abort-on-write"]);
    let start = Instant::now();
    let output = mount_support::try_run(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", device.path()),
            "bs=4k",
            "count=1",
            "oflag=direct",
        ],
    );
    assert!(!output.status.success(), "dd must see the failure");
    assert!(start.elapsed() < Duration::from_secs(60));
    let state = device.state();
    assert_eq!(state.status, Status::Failed);
    let error = state.error.unwrap();
    assert!(error.contains("6 times"), "{error}");
    wait_until("nothing of it runs", || !device.state().is_alive());
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn device_that_cannot_be_opened_gives_its_whole_error_to_the_caller() {
    let device = Device::new(64 << 20);
    std::fs::remove_file(&device.backing).unwrap();
    let error = attach(&device.run_dir, &device.spec(&[])).unwrap_err();
    assert_eq!(error.kind(), vellum_base::ErrorKind::NotFound);
    let text = error.to_string();
    assert!(text.contains(device.backing.to_str().unwrap()), "{text}");
    device.assert_nothing_left();
}

#[test]
fn program_that_is_no_device_server_gives_its_last_words_to_the_caller() {
    let device = Device::new(64 << 20);
    let error = attach(&device.run_dir, &device.spec(&["--nonsense"])).unwrap_err();
    assert_eq!(error.kind(), vellum_base::ErrorKind::Command);
    assert!(error.to_string().contains("--nonsense"), "{error}");
    device.assert_nothing_left();
}

#[test]
fn second_attach_to_a_run_directory_is_refused() {
    let device = Device::attached(64 << 20);
    let error = attach(&device.run_dir, &device.spec(&[])).unwrap_err();
    assert_eq!(error.kind(), vellum_base::ErrorKind::AlreadyExists);
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn upgrade_under_load_is_not_seen_and_starts_the_new_program() {
    let device = Device::attached(256 << 20);
    device.mkfs();
    device.mount();
    let load = Load::start(&device, 4);
    let program = device.dir.path().join("vellum-new");
    std::fs::copy(env!("CARGO_BIN_EXE_vellum"), &program).unwrap();
    for generation in 1..=3 {
        let before = worker_pid(&device);
        let status = upgrade(&device.run_dir, &program, Duration::from_secs(120)).unwrap();
        assert_eq!(status["generation"], generation);
        assert_ne!(status["pid"].as_i64().unwrap(), i64::from(before));
        println!("upgrade: pause {} us", status["last_pause_us"]);
        let exe = std::fs::read_link(format!("/proc/{}/exe", status["pid"])).unwrap();
        assert_eq!(exe, program.canonicalize().unwrap());
        // The new program's processes save each other as the old ones did.
        device.wait_for_standby();
        kill(worker_pid(&device));
    }
    load.finish();
    finish(&device);
}

#[test]
fn upgrade_to_a_program_that_cannot_take_over_leaves_the_old_one_serving() {
    let device = Device::attached(64 << 20);
    device.mkfs();
    device.mount();
    let before = worker_pid(&device);
    // The second failure has the same words as the first and is told all the same.
    for failed in 1..=2 {
        let error = upgrade(
            &device.run_dir,
            std::path::Path::new("/bin/true"),
            Duration::from_secs(120),
        )
        .unwrap_err();
        assert_eq!(error.kind(), vellum_base::ErrorKind::Unsupported);
        assert!(error.to_string().contains("/bin/true"), "{error}");
        assert_eq!(device.state().failed_upgrades, failed);
    }
    assert_eq!(worker_pid(&device), before);
    finish(&device);
}
