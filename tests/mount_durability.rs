//! `vellum verify-durability` on a container's mount, whose server is killed meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Running, TestStore, kill, wait_until};
use vellum::export::device::{Status, status};

/// The run directory of the only container.
fn run_dir(store: &TestStore) -> PathBuf {
    let record = &store.json(&["inspect", "web"]);
    let text = record.to_string();
    let run = store.root.join("run");
    fs::read_dir(&run)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let id = path.file_name().unwrap().to_str().unwrap();
            path.is_dir() && text.contains(id)
        })
        .unwrap()
}

/// The worker that serves now, once a standby is there too.
fn worker(run_dir: &Path) -> i32 {
    let mut pid = 0;
    wait_until("a worker serves and a standby waits", || {
        let Some(found) = status(run_dir).unwrap() else {
            return false;
        };
        let state = found.state;
        let both = [state.worker, state.standby];
        let alive = both.iter().all(|p| p.is_some_and(|p| p.is_alive()));
        pid = state.worker.map_or(0, |worker| worker.pid);
        alive && state.status == Status::Serving
    });
    pid
}

fn check(store: &TestStore, dir: &Path, log: &Path) {
    let report = store.json(&[
        "verify-durability",
        "check",
        &dir.display().to_string(),
        "--log",
        &log.display().to_string(),
    ]);
    assert_eq!(report["lost"], 0, "{report}");
    assert!(
        report["acknowledged_writes"].as_u64().unwrap() > 100,
        "{report}"
    );
}

#[test]
fn a_mount_has_all_that_it_acknowledged_when_workers_are_killed_and_when_all_of_its_server_is() {
    let store = TestStore::new();
    store.small_image("image");
    store.ok(&["create", "image", "--name", "web", "--size", "256M"]);
    let mount = store.mount("web");
    let run = run_dir(&store);
    let log = store.path("log");
    let write = |log: &Path, seconds: &str| {
        let child = store
            .command()
            .args(["-q", "verify-durability", "write"])
            .arg(&mount)
            .arg("--log")
            .arg(log)
            .args(["--size", "16M", "--seconds", seconds])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let lines = || fs::read_to_string(log).unwrap_or_default().lines().count();
        wait_until("acknowledgements are logged", || lines() > 120);
        Running(child)
    };
    // Workers alone: their successors go on, and the writer notices nothing.
    let mut writer = write(&log, "8");
    for _ in 0..3 {
        kill(worker(&run));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    let ended = loop {
        if let Some(ended) = writer.0.try_wait().unwrap() {
            break ended;
        }
        assert!(Instant::now() < deadline, "the writer does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(ended.success(), "the writer saw an error");
    check(&store, &mount, &log);
    store.ok(&["umount", "web"]);
    let mount_again = store.mount("web");
    check(&store, &mount_again, &log);

    // All of them: the mount is gone, and what it acknowledged is not.
    let log = store.path("log2");
    let mut writer = write(&log, "600");
    let state = status(&run).unwrap().unwrap().state;
    let all = [Some(state.supervisor), state.standby, state.worker];
    for process in all.into_iter().flatten() {
        kill(process.pid);
    }
    for (pid, line) in store.processes() {
        if line.starts_with("@vellum-device") {
            kill(pid);
        }
    }
    wait_until("the writer fails", || {
        writer.0.try_wait().unwrap().is_some()
    });
    assert!(!writer.0.wait().unwrap().success());
    store.ok(&["umount", "--force", "web"]);
    let mount = store.mount("web");
    check(&store, &mount, &log);
    store.ok(&["umount", "web"]);
}
