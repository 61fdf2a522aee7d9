//! `vellum verify-durability` on a container's mount, whose server is killed meanwhile.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use crate::common::{Running, TestStore, kill, wait_until};
use crate::server_support::{Container, wait_long};

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
    let container = Container::at(&store, "web", store.mount("web"));
    let mount = container.mounted.clone();
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
        let child = Running(child);
        let lines = || fs::read_to_string(log).unwrap_or_default().lines().count();
        wait_until("acknowledgements are logged", || lines() > 120);
        child
    };
    // Workers alone: their successors go on, and the writer notices nothing.
    let mut writer = write(&log, "8");
    for _ in 0..3 {
        kill(container.settled().worker.unwrap().pid);
    }
    let mut ended = None;
    wait_long("the writer ends", || {
        ended = writer.0.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success(), "the writer saw an error");
    check(&store, &mount, &log);
    store.ok(&["umount", "web"]);
    let mount_again = store.mount("web");
    check(&store, &mount_again, &log);

    // All of them: the mount is gone, and what it acknowledged is not.
    let log = store.path("log2");
    let mut writer = write(&log, "600");
    container.kill_everything();
    wait_until("the writer fails", || {
        writer.0.try_wait().unwrap().is_some()
    });
    assert!(!writer.0.wait().unwrap().success());
    store.ok(&["umount", "--force", "web"]);
    let mount = store.mount("web");
    check(&store, &mount, &log);
    store.ok(&["umount", "web"]);
}
