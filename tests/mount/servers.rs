//! The servers of mounted containers, as a user sees them: replaced by a newer program, dead, or
//! dying again and again.

use crate::common;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::{Running, TestStore, VELLUM, kill, wait_until};
use crate::server_support::{Container, Load, fsck, row, wait_long};
use nix::sys::signal::Signal;
use serde_json::Value;
use vellum_export::device::control;
use vellum_export::local_disk::LocalDisk;
use vellum_export::loop_device::LoopDevice;

// --- Upgrade ------------------------------------------------------------------------------------

/// The command from another file.
fn installed(store: &TestStore, program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .arg("--root")
        .arg(&store.root)
        .args(arguments)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn exe(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

/// Puts a new file in the place of the program, as a package manager does; returns its inode.
fn install(program: &Path) -> u64 {
    let new = program.with_extension("new");
    fs::copy(VELLUM, &new).unwrap();
    fs::rename(&new, program).unwrap();
    fs::metadata(program).unwrap().ino()
}

/// Commands to a device's server, one after the other: each must be answered.
struct Calls {
    finish: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl Calls {
    fn start(container: &Container) -> Calls {
        let finish = Arc::new(AtomicBool::new(false));
        let run_dir = container.run_dir.clone();
        let thread = std::thread::spawn({
            let finish = finish.clone();
            move || {
                let mut calls = 0;
                while !finish.load(Ordering::Acquire) {
                    let wait = Duration::from_secs(120);
                    control::call(&run_dir, "flush", Value::Null, wait).unwrap();
                    calls += 1;
                }
                calls
            }
        });
        Calls { finish, thread }
    }

    fn finish(self) {
        self.finish.store(true, Ordering::Release);
        println!("{} calls were answered", self.thread.join().unwrap());
    }
}

#[test]
fn upgrade_servers_has_every_mounted_container_served_by_the_new_program_under_load() {
    let store = TestStore::new();
    let program = store.path("vellum").canonicalize();
    assert!(program.is_err(), "not there yet");
    let program = store.dir.path().canonicalize().unwrap().join("vellum");
    install(&program);
    for name in ["busy", "idle", "unmounted"] {
        // Also makes the image at the first.
        let container = Container::mounted(&store, name);
        store.ok(&["umount", container.name]);
    }
    let mount = |name: &'static str| {
        let dir = installed(&store, &program, &["mount", name]);
        Container::at(&store, name, PathBuf::from(dir.trim_end()))
    };
    let (busy, idle) = (mount("busy"), mount("idle"));
    let loads = [Load::synced(&busy.data()), Load::buffered(&busy.data())];
    let calls = Calls::start(&idle);
    let mut killed = None;
    for round in 1..=3 {
        let inode = install(&program);
        for container in [&busy, &idle] {
            let old = exe(container.settled().worker.unwrap().pid);
            assert!(
                old.to_string_lossy().ends_with("vellum (deleted)"),
                "{old:?}"
            );
        }
        let text = installed(&store, &program, &["--json", "upgrade-servers"]);
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(rows.as_array().unwrap().len(), 2, "{rows}");
        for (container, row) in [&busy, &idle].into_iter().zip(rows.as_array().unwrap()) {
            assert_eq!(row["name"], container.name);
            assert_eq!(row["upgraded"], true);
            println!("round {round}, {}: {} us", container.name, row["pause_us"]);
            let state = container.settled();
            assert_eq!(state.generation, round);
            assert_eq!(row["pid"], state.worker.unwrap().pid);
            for process in [
                state.supervisor,
                state.worker.unwrap(),
                state.standby.unwrap(),
            ] {
                assert_eq!(exe(process.pid), program);
                let running = fs::metadata(format!("/proc/{}/exe", process.pid)).unwrap();
                assert_eq!(running.ino(), inode);
            }
        }
        assert!(loads.iter().all(Load::is_running), "round {round}");
        // The new program's processes save each other as the old ones did. An upgrade that comes at
        // once waits for the standby that the death took.
        killed = busy.served(None).worker.map(|worker| worker.pid);
        kill(killed.unwrap());
    }
    busy.served(killed);
    busy.settled();
    calls.finish();
    // A second time there is nothing to do.
    let workers = [&busy, &idle].map(|container| container.settled().worker);
    let text = installed(&store, &program, &["upgrade-servers", "busy", "idle"]);
    assert_eq!(text.matches("by this program already").count(), 2, "{text}");
    assert_eq!(
        [&busy, &idle].map(|container| container.settled().worker),
        workers
    );
    let error = store.fails(&["upgrade-servers", "unmounted"]);
    assert!(error.contains("unmounted is not mounted"), "{error}");

    let done = loads.map(Load::finish);
    for (job, pass) in &done {
        job.verify(&busy.data(), *pass);
    }
    assert_eq!(busy.call("status")["failures"], 0);
    store.ok(&["umount", "busy", "idle"]);
    fsck(&store, "busy");
    store.assert_nothing_runs();
}

#[test]
fn upgrade_servers_finds_a_server_that_has_just_lost_its_supervisor() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let before = container.settled();
    kill(before.standby.unwrap().pid);
    kill(before.supervisor.pid);
    wait_until("the worker is alone", || {
        !before.supervisor.is_alive() && !before.standby.unwrap().is_alive()
    });
    store.ok(&["upgrade-servers"]);
    container.kill_worker();
    fs::write(container.data().join("file"), "written").unwrap();
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

// --- Deaths -------------------------------------------------------------------------------------

#[test]
fn a_dead_supervisor_is_replaced_and_one_without_standby_is_reported_and_repaired() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let loads = [
        Load::synced(&container.data()),
        Load::buffered(&container.data()),
    ];
    let before = container.settled();
    kill(before.supervisor.pid);
    wait_until("the standby is the supervisor", || {
        container.state().supervisor.pid == before.standby.unwrap().pid
    });
    assert_eq!(
        container.state().worker,
        before.worker,
        "the worker goes on"
    );
    container.kill_worker();

    // Supervisor and worker at once.
    let before = container.settled();
    kill(before.worker.unwrap().pid);
    kill(before.supervisor.pid);
    container.served(Some(before.worker.unwrap().pid));

    // Supervisor and standby, while the worker cannot help itself.
    let before = container.settled();
    signal(before.worker.unwrap().pid, Signal::SIGSTOP);
    kill(before.standby.unwrap().pid);
    kill(before.supervisor.pid);
    wait_until("the worker is alone", || {
        row(&store, "c")["device"]["supervised"] == false
    });
    let listed = store.ok(&["ps"]);
    // On a busy host it takes the worker a moment to stop.
    let said = ["halted", "without a supervisor"];
    assert!(said.iter().any(|said| listed.contains(said)), "{listed}");
    let output = store.output(&["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("nobody would restart it"), "{text}");
    // Then it starts a supervisor, unless the repair comes first.
    signal(before.worker.unwrap().pid, Signal::SIGCONT);
    store.ok(&["check", "--repair"]);
    let after = container.settled();
    assert_eq!(after.worker, before.worker, "the worker goes on");
    assert_ne!(after.supervisor, before.supervisor);
    container.kill_worker();
    let listed = store.ok(&["ps"]);
    assert!(
        listed.contains("mounted at") && !listed.contains("supervisor"),
        "{listed}"
    );

    for load in loads {
        load.finish();
    }
    assert_eq!(container.call("status")["failures"], 0);
    store.ok(&["umount", "c"]);
    fsck(&store, "c");
    store.assert_nothing_runs();
}

fn signal(pid: i32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn a_supervisor_killed_while_it_replaces_the_worker_is_replaced_and_the_device_is_not_taken_for_dead()
 {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let load = Load::synced(&container.data());
    for round in 0..8 {
        let before = container.settled();
        kill(before.worker.unwrap().pid);
        // From before it has noticed until after the standby has taken over.
        std::thread::sleep(Duration::from_millis(round));
        kill(before.supervisor.pid);
        wait_until("the supervisor is dead", || !before.supervisor.is_alive());
        // Also where the state names no worker yet.
        let row = row(&store, "c");
        assert_eq!(row["device"]["alive"], true, "round {round}: {row}");
        let error = store.fails(&["mount", "c"]);
        assert!(error.contains("is mounted at"), "{error}");
    }
    container.settled();
    assert!(load.is_running());
    load.finish();
    assert_eq!(container.call("status")["failures"], 0);
    store.ok(&["umount", "c"]);
    fsck(&store, "c");
    store.assert_nothing_runs();
}

/// Appends numbers to a file and syncs each, until that fails.
struct Log {
    synced: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Log {
    fn start(path: &Path) -> Log {
        let mut file = File::create(path).unwrap();
        file.sync_all().unwrap();
        File::open(path.parent().unwrap())
            .unwrap()
            .sync_all()
            .unwrap();
        let synced = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let synced = synced.clone();
            move || {
                for number in 0_u64.. {
                    let written = file.write_all(&number.to_le_bytes());
                    if written.and_then(|()| file.sync_data()).is_err() {
                        break;
                    }
                    synced.store(number + 1, Ordering::Release);
                }
            }
        });
        Log { synced, thread }
    }

    fn synced(&self) -> u64 {
        self.synced.load(Ordering::Acquire)
    }

    /// Waits for the failure; returns how many numbers were acknowledged.
    fn end(self) -> u64 {
        self.thread.join().unwrap();
        self.synced.load(Ordering::Acquire)
    }
}

fn check_log(path: &Path, acknowledged: u64) {
    let found = fs::read(path).unwrap();
    let found: Vec<u64> = found
        .chunks_exact(8)
        .map(|number| u64::from_le_bytes(number.try_into().unwrap()))
        .collect();
    let expected: Vec<u64> = (0..found.len() as u64).collect();
    assert_eq!(found, expected);
    assert!(
        found.len() as u64 >= acknowledged,
        "{} of {acknowledged} synced numbers are there",
        found.len()
    );
}

/// Kills supervisor, standby and worker of a container in use, and cleans up with `arguments`;
/// what was synced must be there.
fn kill_everything_then(arguments: &[&str], mounted_after: bool) {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let path = container.data().join("log");
    let log = Log::start(&path);
    wait_long("numbers are synced", || log.synced() > 50);
    container.kill_everything();
    let acknowledged = log.end();
    println!("{acknowledged} numbers were synced");

    let dead = row(&store, "c");
    let status = dead["status"].as_str().unwrap();
    assert!(status.starts_with("failed: its server is dead"), "{status}");
    assert_eq!(dead["device"]["alive"], false);
    let output = store.output(&["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("its server is dead"), "{text}");
    assert!(text.contains("is still mounted"), "{text}");

    store.ok(arguments);
    if mounted_after {
        check_log(&path, acknowledged);
        store.ok(&["umount", "c"]);
    }
    store.assert_nothing_runs();
    store.ok(&["check", "--scrub"]);
    fsck(&store, "c");
    let mounted = store.mount("c");
    check_log(&mounted.join("data/log"), acknowledged);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn everything_killed_loses_nothing_synced_and_umount_cleans_up() {
    kill_everything_then(&["umount", "c"], false);
}

#[test]
fn everything_killed_loses_nothing_synced_and_the_next_mount_cleans_up() {
    kill_everything_then(&["mount", "c"], true);
}

#[test]
fn everything_killed_loses_nothing_synced_and_check_repair_cleans_up() {
    kill_everything_then(&["check", "--repair"], false);
}

#[test]
fn a_container_whose_worker_has_just_died_is_removed_by_force_every_time() {
    let store = TestStore::new();
    for round in 0..15 {
        let container = Container::mounted(&store, "c");
        // Unflushed, so that the worker has something to let go of.
        fs::write(container.data().join("file"), vec![1; 4 << 20]).unwrap();
        let before = container.served(None).worker.unwrap();
        kill(before.pid);
        let output = store.output(&["rm", "--force", "c"]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "round {round}: {error}");
    }
    store.assert_nothing_runs();
}

#[test]
fn processes_of_other_users_that_pretend_to_be_a_devices_are_neither_killed_nor_waited_for() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let pretend = Command::new("sh")
        .arg0("@vellum-device")
        .args(["-c", "read line", "--run-dir"])
        .arg(container.run_dir.path())
        .uid(65534)
        .gid(65534)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pretend = Running(pretend);
    store.ok(&["umount", "--force", "c"]);
    assert!(pretend.0.try_wait().unwrap().is_none(), "it was killed");
    drop(pretend);
    store.assert_nothing_runs();
}

// --- Namespaces ---------------------------------------------------------------------------------

/// The loop device of a container, and which of its attachments it is.
fn attachment(store: &TestStore, name: &str) -> (LoopDevice, Option<u64>) {
    let path = row(store, name)["device"]["disk"].clone();
    let device = LoopDevice::from_path(Path::new(path.as_str().unwrap())).unwrap();
    (device, LocalDisk::from(device).diskseq())
}

/// Fails where the device is attached as it was.
fn assert_detached((device, diskseq): (LoopDevice, Option<u64>)) {
    let there = || device.backing_file().is_some() && LocalDisk::from(device).diskseq() == diskseq;
    // The kernel detaches when the last who looks at it is gone.
    wait_until("the loop device is detached", || !there());
}

/// Runs a command of the store in namespaces of its own.
fn unshared(store: &TestStore, namespaces: &[&str], arguments: &[&str]) -> Output {
    Command::new("unshare")
        .args(namespaces)
        .arg("--fork")
        .arg(VELLUM)
        .arg("--root")
        .arg(&store.root)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_loop_device_that_lost_its_name_with_a_namespace_or_by_an_unmount_is_detached_all_the_same() {
    let store = TestStore::new();
    Container::mounted(&store, "c");
    store.ok(&["umount", "c"]);
    for cleanup in [
        &["umount", "c"][..],
        &["check", "--repair"],
        &["mount", "c"],
    ] {
        // All processes end with the pid namespace, and the FUSE file with the mount namespace: the
        // kernel detaches what was mounted there.
        let lost = attached_elsewhere(&store, "c");
        wait_long("the server is dead", || {
            row(&store, "c")["device"]["alive"] == false
        });
        assert_detached(lost);
        store.ok(cleanup);
        store.ok(&["umount", "c"]);
        store.assert_nothing_runs();
    }
    // An administrator unmounts the dead file.
    let container = Container::at(&store, "c", store.mount("c"));
    let lost = attachment(&store, "c");
    container.kill_everything();
    common::run(
        "umount",
        &["-l", container.run_dir.path().join("dev").to_str().unwrap()],
    );
    let output = store.output(&["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let path = lost.0.path().display().to_string();
    assert!(text.contains(&path), "{text}");
    store.ok(&["check", "--repair"]);
    assert_detached(lost);
    // And removed whole, as prune finds it.
    let container = Container::at(&store, "c", store.mount("c"));
    let lost = attachment(&store, "c");
    container.kill_everything();
    common::run(
        "umount",
        &["-l", container.run_dir.path().join("dev").to_str().unwrap()],
    );
    fs::remove_file(store.root.join("containers/c.json")).unwrap();
    store.ok(&["prune"]);
    assert_detached(lost);
    store.assert_nothing_runs();
}

#[test]
fn a_store_inside_a_container_that_is_unmounted_under_it_leaves_no_loop_device_and_no_server() {
    let outer = TestStore::new();
    let container = Container::mounted(&outer, "c");
    let inner = TestStore {
        root: container.data().join("store"),
        dir: tempfile::tempdir().unwrap(),
        env: Vec::new(),
    };
    let within = Container::mounted(&inner, "within");
    fs::write(within.data().join("file"), "written").unwrap();
    let lost = attachment(&inner, "within");
    // With all that is mounted below.
    common::run("umount", &["-l", container.mounted.to_str().unwrap()]);
    assert_detached(lost);
    wait_long("its servers have ended", || inner.processes().is_empty());
    outer.ok(&["umount", "c"]);
    outer.assert_nothing_runs();
}

/// Mounts a container in a pid namespace and a mount namespace, which end; returns what was attached
/// there.
fn attached_elsewhere(store: &TestStore, name: &str) -> (LoopDevice, Option<u64>) {
    let root = store.root.display();
    let script = format!("{VELLUM} --root {root} mount {name} >&2 && cat {root}/run/*/loop");
    let output = Command::new("unshare")
        .args(["--pid", "--mount-proc", "--fork", "sh", "-c", &script])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let note: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let device = LoopDevice::from_path(Path::new(note["device"].as_str().unwrap())).unwrap();
    (device, note["diskseq"].as_u64())
}

#[test]
fn commands_in_other_pid_and_time_namespaces_take_no_living_server_for_dead() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let before = container.settled();
    for namespaces in [
        &["--pid", "--mount-proc"][..],
        &["--time", "--boottime", "1000000"],
    ] {
        for arguments in [&["check"][..], &["prune"]] {
            let output = unshared(&store, namespaces, arguments);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success(),
                "{namespaces:?} {arguments:?}: {text}"
            );
        }
        let output = unshared(&store, namespaces, &["ps"]);
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!listed.contains("dead"), "{namespaces:?}: {listed}");
        let output = unshared(&store, namespaces, &["mount", "c"]);
        assert!(!output.status.success(), "{namespaces:?}");
    }
    // From where its processes cannot be seen it is not taken away from under them.
    let output = unshared(
        &store,
        &["--pid", "--mount-proc"],
        &["umount", "--force", "c"],
    );
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("another pid namespace"), "{error}");
    let after = container.settled();
    assert_eq!(
        (after.worker, after.supervisor),
        (before.worker, before.supervisor)
    );
    store.ok(&["umount", "--force", "c"]);
    store.assert_nothing_runs();
}

/// Mounts a container in a private mount namespace; returns the shell that keeps that.
fn mounted_elsewhere(store: &TestStore, name: &str) -> Running {
    let dir = store.arg("elsewhere");
    fs::create_dir_all(&dir).unwrap();
    let script = format!(
        "{VELLUM} --root {} mount {name} {dir} >&2; echo ready; read line",
        store.root.display()
    );
    let shell = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shell = Running(shell);
    let mut ready = [0; 6];
    std::io::Read::read_exact(shell.0.stdout.as_mut().unwrap(), &mut ready).unwrap();
    shell
}

#[test]
fn a_container_mounted_in_another_mount_namespace_is_named_with_its_process_and_the_way_there() {
    let store = TestStore::new();
    Container::mounted(&store, "c");
    store.ok(&["umount", "c"]);
    let shell = mounted_elsewhere(&store, "c");
    let pid = shell.0.id();
    for arguments in [
        &["mount", "c"][..],
        &["umount", "c"],
        &["exec", "c", "--", "true"],
    ] {
        let output = store.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let whose = format!("in the mount namespace of process {pid} (");
        let named = error.contains(&whose) && error.contains(&format!("nsenter -t {pid} -m"));
        assert!(!output.status.success() && named, "{arguments:?}: {error}");
    }
    // The mount goes with the namespace; the server does not keep it.
    drop(shell);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

// --- Deaths without end -------------------------------------------------------------------------

#[test]
fn a_server_that_cannot_open_its_layer_again_is_given_up_and_ps_says_why() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let path = container.data().join("log");
    let log = Log::start(&path);
    wait_long("numbers are synced", || log.synced() > 50);
    let top = row(&store, "c")["top"].as_str().unwrap().to_owned();
    let layer = store.root.join("layers").join(&top);
    let hidden = store.root.join("layers").join("hidden");
    container.settled();

    // The layer of a server that works may be renamed; the next one does not find it.
    fs::rename(&layer, &hidden).unwrap();
    kill(container.served(None).worker.unwrap().pid);
    let mut seen = Vec::new();
    wait_long("it is given up", || {
        let row = row(&store, "c");
        let status = row["device"]["state"]["status"]
            .as_str()
            .unwrap()
            .to_owned();
        seen.push((status.clone(), row["status"].as_str().unwrap().to_owned()));
        status == "failed"
    });
    let acknowledged = log.end();
    // The waits between the last attempts are long enough to be seen.
    let waited = |(status, shown): &(String, String)| {
        status == "restarting" && shown.contains("failures in a row") && shown.contains(&top)
    };
    assert!(seen.iter().any(waited), "{seen:#?}");

    let failed = row(&store, "c");
    let state = &failed["device"]["state"];
    assert_eq!(state["deaths"], 6, "{state}");
    assert!(state["error"].as_str().unwrap().contains(&top), "{state}");
    let listed = store.ok(&["ps"]);
    for part in ["failed: ", "6 times in a row", &top, "`vellum umount c`"] {
        assert!(listed.contains(part), "{part} is not in {listed}");
    }
    // Nobody tries for ever.
    wait_until("nothing runs", || store.processes().is_empty());
    assert_eq!(row(&store, "c")["device"]["alive"], false);
    let more = File::create(container.data().join("more"));
    let synced = more.and_then(|mut file| file.write_all(b"x").and_then(|()| file.sync_all()));
    assert!(synced.is_err(), "its users see errors");

    // As it says: nothing synced is lost.
    fs::rename(&hidden, &layer).unwrap();
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
    let mounted = store.mount("c");
    check_log(&mounted.join("data/log"), acknowledged);
    store.ok(&["umount", "c"]);
    store.ok(&["check"]);
    store.assert_nothing_runs();
}

#[test]
fn a_server_that_opens_its_layer_again_before_it_is_given_up_serves_on() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let load = Load::synced(&container.data());
    let top = row(&store, "c")["top"].as_str().unwrap().to_owned();
    let layer = store.root.join("layers").join(&top);
    let hidden = store.root.join("layers").join("hidden");
    let before = container.settled().worker.unwrap().pid;
    fs::rename(&layer, &hidden).unwrap();
    kill(before);
    wait_long("some attempts failed", || container.state().deaths >= 2);
    fs::rename(&hidden, &layer).unwrap();
    let state = container.served(Some(before));
    println!(
        "served after {} deaths, {} us",
        state.deaths, state.last_pause_us
    );
    load.finish();
    assert_eq!(container.call("status")["failures"], 0);
    store.ok(&["umount", "c"]);
    fsck(&store, "c");
    store.assert_nothing_runs();
}

// --- Mount namespaces -----------------------------------------------------------------------------

/// The mounts that a process sees, as (target, type).
fn mounts_of(pid: i32) -> Vec<(String, String)> {
    let text =
        String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/mountinfo")).unwrap()).into_owned();
    let fields = |line: &str| {
        let (before, after) = line.split_once(" - ").unwrap();
        let target = before.split(' ').nth(4).unwrap().to_owned();
        (target, after.split(' ').next().unwrap().to_owned())
    };
    text.lines().map(fields).collect()
}

#[test]
fn servers_keep_no_mount_namespace_and_end_at_once_when_theirs_was_the_last_user_of_the_mount() {
    let store = TestStore::new();
    let other = Container::mounted(&store, "other");
    store.ok(&["create", "data", "--name", "c"]);
    for killed in [false, true] {
        // As in a container that ends: with the command its namespace goes, and the mount in it.
        let shell = mounted_elsewhere(&store, "c");
        let container = Container::at(&store, "c", PathBuf::new());
        let state = container.settled();
        let worker = state.worker.unwrap().pid;
        for pid in [worker, state.supervisor.pid] {
            let seen = mounts_of(pid);
            let foreign = |(target, kind): &&(String, String)| {
                kind == "fuse.vellum" || (kind == "ext4" && target.contains("rootfs"))
            };
            assert!(seen.iter().find(foreign).is_none(), "{seen:?}");
            assert!(seen.len() < 12, "{seen:?}");
        }
        let processes = [worker, state.supervisor.pid, state.standby.unwrap().pid];
        if killed {
            common::kill_together(&processes);
        }
        drop(shell);
        // The last of them once waited for itself, and every sync(2) of the host with it.
        for pid in processes {
            wait_long("a server without users has ended", || {
                !Path::new(&format!("/proc/{pid}")).exists()
            });
        }
        // It can be mounted again, and the other one never noticed.
        store.ok(&["mount", "c"]);
        store.ok(&["umount", "c"]);
    }
    fs::write(other.data().join("file"), "works").unwrap();
    store.ok(&["umount", "other"]);
}
