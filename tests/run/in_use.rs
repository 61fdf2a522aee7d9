//! What is done to containers while commands run in them: they are copied from and into, and grow.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::run_support::{RUNTIMES, Store};
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;

fn store() -> Store {
    Store::new(RUNTIMES[0], |_| {})
}

/// True once a process has the root of a mounted container open.
fn has_root_open(child: &Child) -> bool {
    let fds = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
    fds.flatten().any(|fd| {
        fs::read_link(fd.path())
            .is_ok_and(|target| target.file_name().is_some_and(|name| name == "rootfs"))
    })
}

/// A tar with one file.
fn small_tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.set_mode(0o644);
    tar.append_data(&mut header, "late", &b"late"[..]).unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn a_run_that_ends_while_its_files_are_copied_keeps_its_status_and_is_unmounted_after_the_copy() {
    for option in [&[][..], &["--rm"]] {
        let store = store();
        let running = store.start("c", option);
        let mut copy = store
            .command(&["cp", "-", "c:/tmp"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        store.wait_until(|| has_root_open(&copy));
        running.signal(Signal::SIGTERM);
        assert_eq!(running.wait(), Some(42), "{option:?}");
        assert!(
            store.status("c").starts_with("mounted at"),
            "{}",
            store.status("c")
        );
        // Others go on with it.
        store.must(&["exec", "c", "--", "test", "-d", "/tmp"]);
        copy.stdin.take().unwrap().write_all(&small_tar()).unwrap();
        assert!(copy.wait().unwrap().success());
        store.assert_nothing_runs();
        let late = store.path("late");
        store.must(&["cp", "c:/tmp/late", late.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(late).unwrap(), "late");
        store.must(&["rm", "c"]);
    }
}

#[test]
fn what_is_mounted_for_people_stays_so_after_a_copy_from_it_whatever_ran_meanwhile() {
    let store = store();
    store.must(&["create", "box", "--name", "c"]);
    store.must(&["mount", "c"]);
    store.must(&["exec", "c", "--", "touch", "/tmp/made"]);
    store.must(&["cp", "c:/tmp/made", store.path("made").to_str().unwrap()]);
    assert!(store.status("c").starts_with("mounted at"));
    store.must(&["umount", "c"]);
    store.assert_nothing_runs();
}

fn size_of(store: &Store) -> u64 {
    let text = store.must(&["inspect", "c", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&text).unwrap();
    shown[0]["container"]["virtual_size"].as_u64().unwrap()
}

fn capacity(dir: &str) -> u64 {
    let stat = nix::sys::statvfs::statvfs(Path::new(dir)).unwrap();
    stat.blocks() * stat.fragment_size()
}

#[test]
fn a_container_grows_while_its_command_runs_or_nothing_changes_where_this_host_cannot() {
    let store = store();
    let running = store.start("c", &["--size", "11G"]);
    let before = size_of(&store);
    let status = store.status("c");
    if vellum_fs::ext4::may_grow_mounted().unwrap() {
        store.must(&["resize", "c", "12G"]);
        assert_eq!(size_of(&store), 12 << 30);
    } else {
        let said = store.vellum(&["resize", "c", "12G"]);
        assert_eq!(said.status, 1);
        assert!(said.err.contains("CAP_SYS_RESOURCE"), "{said:?}");
        assert!(said.err.contains("end what runs in c"), "{said:?}");
        assert_eq!(size_of(&store), before);
    }
    // Its command, and others, go on.
    assert_eq!(store.status("c"), status);
    store.must(&["exec", "c", "--", "touch", "/tmp/after"]);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait(), Some(42));
    store.must(&["resize", "c", "12G"]);
    let dir = store.must(&["mount", "c"]);
    assert!(capacity(dir.trim()) > 11 * 1024 * MIB);
    assert!(Path::new(dir.trim()).join("tmp/after").exists());
    store.must(&["umount", "c"]);
    store.assert_nothing_runs();
}
