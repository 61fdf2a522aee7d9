//! Processes of a device that live and do nothing: stopped, or hanging. Somebody notices, and whoever
//! uses the device, or another store, sees a pause at most.

use crate::common;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{TestStore, kill};
use crate::mount_support::Device;
use crate::server_support::{Container, fsck, row, wait_long};
use nix::sys::signal::Signal;
use vellum_export::device::{Identity, RunState};
use vellum_fs::ext4;

fn signal(pid: i32, signal: Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

/// Writes one block of `byte` past the caches and reads it back.
fn write_and_read(device: &Device, byte: u8) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device.path())
        .unwrap();
    // Aligned as direct I/O wants it.
    let mut block = memmap2::MmapMut::map_anon(4096).unwrap();
    block.fill(byte);
    file.write_all_at(&block, 4096 * u64::from(byte)).unwrap();
    block.fill(0);
    file.read_exact_at(&mut block, 4096 * u64::from(byte))
        .unwrap();
    assert!(block.iter().all(|read| *read == byte));
}

/// A device whose worker is taken for one that hangs after `seconds`, and does what the files in the
/// answered directory say.
fn faulty(seconds: &str) -> (Device, std::path::PathBuf) {
    let mut device = Device::new(16 << 20);
    let faults = device.dir.path().join("faults");
    fs::create_dir(&faults).unwrap();
    let arguments = [
        "--hang-after",
        seconds,
        "--faults",
        faults.to_str().unwrap(),
    ];
    device.attach(&arguments);
    (device, faults)
}

#[test]
fn a_worker_that_hangs_or_computes_without_end_is_replaced_and_its_clients_see_no_error() {
    let (device, faults) = faulty("2");
    for (number, fault) in [(1, "hang"), (2, "spin")] {
        device.wait_for_standby();
        fs::write(faults.join(fault), "").unwrap();
        let start = Instant::now();
        write_and_read(&device, number);
        println!("{fault}: {:?}", start.elapsed());
        let state = device.wait_for_standby();
        assert_eq!(
            (state.hangs, state.restarts),
            (number.into(), number.into())
        );
        assert!(state.hang.unwrap().contains("while requests waited"));
        assert_eq!(device.call("status")["failures"], 0);
    }
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_worker_that_hangs_at_every_attempt_is_given_up_so_that_nobody_waits_for_ever() {
    let (device, faults) = faulty("1");
    let stop = Arc::new(AtomicBool::new(false));
    let again = std::thread::spawn({
        let (stop, faults) = (Arc::clone(&stop), faults.clone());
        move || {
            while !stop.load(Ordering::Acquire) {
                let _ = fs::write(faults.join("hang"), "");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    wait_long("it will hang", || faults.join("hang").exists());
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device.path())
        .unwrap();
    let block = memmap2::MmapMut::map_anon(4096).unwrap();
    let written = file.write_all_at(&block, 0);
    stop.store(true, Ordering::Release);
    again.join().unwrap();
    assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(file);
    wait_long("it is given up", || device.state().error.is_some());
    let error = device.state().error.unwrap();
    assert!(error.contains("hung 6 times in a row"), "{error}");
    device.detach();
    device.assert_nothing_left();
}

#[test]
fn a_worker_that_waits_for_the_host_is_left_alone_however_long_that_takes() {
    let (device, faults) = faulty("1");
    let before = device.wait_for_standby();
    fs::write(faults.join("wait"), "").unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_and_read(&device, 7));
        wait_long("it has waited for far longer than it may hang", || {
            device.call("status")["longest_wait_ms"].as_u64() > Some(5000)
        });
        assert!(!writer.is_finished());
        fs::remove_file(faults.join("wait")).unwrap();
    });
    let after = device.state();
    assert_eq!((after.hangs, after.worker), (0, before.worker));
    device.detach();
    device.assert_nothing_left();
}

/// Stops a process, and sees that it is stopped: on a busy host that takes a moment.
fn stop(process: Identity) {
    signal(process.pid, Signal::SIGSTOP);
    wait_long("it is stopped", || {
        process.is_stopped() || !process.is_alive()
    });
}

/// The processes of a device once all are there and run, and those `gone` do not.
fn all_run(device: &Device, gone: &[Identity]) -> RunState {
    let mut found = None;
    wait_long("all processes run", || {
        let state = device.state();
        let processes = [Some(state.supervisor), state.worker, state.standby];
        let runs = |one: Option<Identity>| {
            one.is_some_and(|one| one.is_alive() && !one.is_stopped() && !gone.contains(&one))
        };
        let all = processes.into_iter().all(runs) && !gone.iter().any(|one| one.is_alive());
        found = Some(state).filter(|_| all);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn whichever_of_a_devices_processes_are_stopped_the_others_replace_them_and_it_serves_on() {
    let check = |which: &'static [usize]| {
        let device = Device::attached(16 << 20);
        let state = device.wait_for_standby();
        let all = [
            state.worker.unwrap(),
            state.supervisor,
            state.standby.unwrap(),
        ];
        let mut gone: Vec<Identity> = which.iter().map(|index| all[*index]).collect();
        gone.iter().for_each(|process| stop(*process));
        // Whoever is not stopped may die just then.
        if which == [1] {
            kill(all[0].pid);
            gone.push(all[0]);
        }
        write_and_read(&device, 1);
        let after = all_run(&device, &gone);
        // They look after each other as those before did.
        kill(after.worker.unwrap().pid);
        write_and_read(&device, 2);
        assert_eq!(device.call("status")["failures"], 0);
        device.detach();
        device.assert_nothing_left();
    };
    std::thread::scope(|scope| {
        for which in [&[0][..], &[1], &[2], &[0, 1], &[0, 2], &[1, 2]] {
            scope.spawn(move || check(which));
        }
    });
}

#[test]
fn a_stopped_standby_is_not_sent_to_work_when_the_worker_dies() {
    let device = Device::attached(16 << 20);
    let before = device.wait_for_standby();
    let (worker, standby) = (before.worker.unwrap(), before.standby.unwrap());
    stop(standby);
    kill(worker.pid);
    write_and_read(&device, 1);
    all_run(&device, &[worker, standby]);
    device.detach();
    device.assert_nothing_left();
}

/// Lets processes go on when a test ends, and in any case soon: on a host where they are stopped,
/// programs that have nothing to do with them hang.
struct Halted(Arc<Vec<i32>>);

impl Halted {
    fn new(pids: Vec<i32>) -> Halted {
        let pids = Arc::new(pids);
        pids.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
        let mine = Arc::clone(&pids);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(120));
            mine.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
        });
        Halted(pids)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
    }
}

/// Runs a command of a store, which must not hang.
fn bounded(store: &TestStore, arguments: &[&str]) -> Output {
    bounded_as(store, &[], arguments)
}

/// As [`bounded`], started by another program.
fn bounded_as(store: &TestStore, starter: &[&str], arguments: &[&str]) -> Output {
    let start = Instant::now();
    let output = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .args(starter)
        .args([common::VELLUM, "--root"])
        .arg(&store.root)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    println!("{arguments:?}: {} {:?}", output.status, start.elapsed());
    assert!(output.status.code().is_some(), "{arguments:?} hangs");
    output
}

#[test]
fn a_device_whose_processes_are_all_stopped_hangs_no_command_neither_of_its_store_nor_of_another() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    fs::write(container.data().join("file"), "kept").unwrap();
    nix::unistd::syncfs(fs::File::open(container.data()).unwrap()).unwrap();
    let other = TestStore::new();
    let busy = Container::mounted(&other, "busy");
    fs::write(busy.data().join("file"), "written").unwrap();
    other.ok(&["create", "data", "--name", "idle"]);
    other.ok(&["create", "data", "--name", "larger", "--size", "320M"]);
    let tree = other.arg("root");

    let state = container.settled();
    let pids = [Some(state.supervisor), state.worker, state.standby];
    let pids: Vec<i32> = pids.into_iter().flatten().map(|one| one.pid).collect();
    let halted = Halted::new(pids.clone());
    for arguments in [
        &["mount", "idle"][..],
        &["ps"],
        &["check"],
        &["stats"],
        &["umount", "busy", "idle"],
        &["rm", "busy", "idle"],
        &["prune"],
        &["doctor"],
        // Makes a file system, for which mke2fs looks at what is mounted.
        &["import", "new-size", &tree, "--size", "72M"],
    ] {
        let output = bounded(&other, arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
    }
    // Without that right resize2fs lets the file system grow, and looks likewise.
    let poor = [
        "setpriv",
        "--inh-caps=-sys_resource",
        "--bounding-set=-sys_resource",
    ];
    let output = bounded_as(&other, &poor, &["mount", "larger"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && text.is_empty(), "{text}");
    let larger = String::from_utf8(output.stdout).unwrap();
    let usage = ext4::usage(std::path::Path::new(larger.trim_end())).unwrap();
    assert!(usage.size > 290 << 20, "{usage:?}");
    other.ok(&["umount", "larger"]);
    // Its own store says what is the matter, and what to do.
    let listed = String::from_utf8(bounded(&store, &["ps"]).stdout).unwrap();
    let cure = format!("kill -CONT {}", pids[0]);
    assert!(
        listed.contains("halted") && listed.contains(&cure),
        "{listed}"
    );
    let checked = bounded(&store, &["check"]);
    assert_eq!(checked.status.code(), Some(1));
    for arguments in [
        &["umount", "c"][..],
        &["commit", "c", "image"],
        &["mount", "c"],
    ] {
        let output = bounded(&store, arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let named = text.contains("kill -CONT") || text.contains("is mounted at");
        assert!(named, "{arguments:?}: {text}");
    }
    assert!(bounded(&store, &["prune"]).status.success());
    assert!(
        bounded(&store, &["umount", "--force", "c"])
            .status
            .success()
    );
    drop(halted);
    store.assert_nothing_runs();
    fsck(&store, "c");
    let mounted = store.mount("c");
    assert_eq!(
        fs::read_to_string(mounted.join("data/file")).unwrap(),
        "kept"
    );
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_stopped_worker_delays_the_commands_of_its_container_and_fails_none() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let before = container.settled().worker.unwrap();
    stop(before);
    let listed = store.ok(&["ps"]);
    // Unless that has happened by now.
    let replaced = || container.state().hangs > 0;
    assert!(
        listed.contains("is being replaced") || replaced(),
        "{listed}"
    );
    store.ok(&["stats", "c"]);
    let after = container.served(Some(before.pid));
    assert_eq!(after.hangs, 1);
    assert_eq!(row(&store, "c")["device"]["state"]["hangs"], 1);
    stop(container.settled().worker.unwrap());
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
    fsck(&store, "c");
}
