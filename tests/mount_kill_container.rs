//! The worker of a container's device is killed again and again while its file system is in use:
//! first writes that no flush followed must be there for the next worker.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Running, TestStore, kill, run, wait_until};
use serde_json::Value;
use vellum::export::device::{control, status};

fn fio(directory: &Path, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command
        .arg("--name=verified")
        .arg(format!("--directory={}", directory.display()))
        .args([
            "--size=20m",
            "--rw=randwrite",
            "--bs=4k,8k",
            "--bssplit=4k/50:8k/50",
            "--ioengine=psync",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=42",
            "--numjobs=2",
            "--fallocate=none",
            "--group_reporting",
        ])
        .args(more)
        .stdin(Stdio::null());
    command
}

/// The directory of the only device of the store.
fn run_dir(store: &TestStore) -> PathBuf {
    let dirs: Vec<PathBuf> = std::fs::read_dir(store.root.join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(dirs.len(), 1, "{dirs:?}");
    dirs[0].clone()
}

fn worker(run_dir: &Path) -> i32 {
    let state = status(run_dir).unwrap().expect("a device").state;
    state.worker.expect("a worker").pid
}

#[test]
fn thirty_kills_of_the_worker_of_a_mounted_container_lose_no_write() {
    let store = TestStore::new();
    let tree = store.path("root");
    std::fs::create_dir_all(tree.join("data")).unwrap();
    store.ok(&["import", "base", tree.to_str().unwrap(), "--size", "256M"]);
    store.ok(&["create", "base", "--name", "c"]);
    let mounted = store.mount("c").join("data");
    let run_dir = run_dir(&store);
    let call = || control::call(&run_dir, "status", Value::Null, Duration::from_secs(20)).unwrap();

    let child = fio(
        &mounted,
        &[
            "--time_based",
            "--runtime=7",
            "--fsync=24",
            "--verify_backlog=64",
        ],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .expect("fio is missing: apt-get install fio");
    let mut load = Running(child);
    let mut pauses = Vec::new();
    for round in 0..30_u32 {
        // First writes keep coming: a new file each time, part of it in the page cache.
        std::fs::write(
            mounted.join(format!("new{round}")),
            vec![round as u8 + 1; 150_000],
        )
        .unwrap();
        if round % 3 == 0 {
            run("sync", &["-f", mounted.to_str().unwrap()]);
        }
        let before = worker(&run_dir);
        kill(before);
        wait_until("another worker serves", || worker(&run_dir) != before);
        pauses.push(call()["last_pause_us"].as_u64().unwrap());
        std::thread::sleep(Duration::from_millis(if round % 4 == 0 { 20 } else { 130 }));
    }
    assert!(
        load.0.try_wait().unwrap().is_none(),
        "the load ended too early"
    );
    let status = load.0.wait().unwrap();
    let mut text = String::new();
    use std::io::Read;
    load.0
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    load.0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(
        status.success() && !text.contains("verify:"),
        "fio: {status}\n{text}"
    );
    pauses.sort_unstable();
    println!("pauses, us: median {} longest {}", pauses[15], pauses[29]);
    let state = call();
    assert_eq!(state["failures"], 0, "{state}");
    assert_eq!(state["restarts"], 30, "{state}");

    // A whole pass over a file, checked now from the disk and again after another mount.
    let whole = ["--filename=whole", "--numjobs=1", "--end_fsync=1"];
    run_fio(&mounted, &[&whole[..], &["--do_verify=0"]].concat());
    kill(worker(&run_dir));
    let verify = [&whole[..2], &["--verify_only"]].concat();
    run("sh", &["-c", "echo 1 > /proc/sys/vm/drop_caches"]);
    run_fio(&mounted, &verify);
    check_new(&mounted);
    store.ok(&["umount", "c"]);

    let socket = store.path("nbd.sock");
    let child = store
        .command()
        .args(["-q", "nbd", "c", "--socket"])
        .arg(&socket)
        .spawn()
        .unwrap();
    let server = Running(child);
    wait_until("the server listens", || socket.exists());
    let raw = store.arg("out.raw");
    let uri = format!("nbd+unix:///c?socket={}", socket.display());
    run("nbdcopy", &[uri.as_str(), raw.as_str()]);
    run("e2fsck", &["-f", "-n", raw.as_str()]);
    drop(server);

    let mounted = store.mount("c").join("data");
    run_fio(&mounted, &verify);
    check_new(&mounted);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

fn run_fio(directory: &Path, more: &[&str]) {
    let output = fio(directory, more).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !text.contains("verify:"),
        "fio {more:?}\n{text}"
    );
}

fn check_new(directory: &Path) {
    for round in 0..30_u8 {
        let bytes = std::fs::read(directory.join(format!("new{round}"))).unwrap();
        assert!(bytes == vec![round + 1; 150_000], "file new{round} changed");
    }
}
