//! What is done to containers that live on: they become larger, and give space back.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::json;
use vellum_engine::device::Target;
use vellum_store::Store;

use crate::common::{Running, TestStore, own_mounts, run, wait_until};

const MIB: u64 = 1 << 20;

/// Bytes of a mounted file system.
fn capacity(dir: &Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(dir).unwrap();
    stat.blocks() * stat.fragment_size()
}

fn size_of(store: &TestStore, container: &str) -> u64 {
    let shown = store.json(&["inspect", container]);
    shown[0]["container"]["virtual_size"].as_u64().unwrap()
}

#[test]
fn a_container_grows_under_those_who_write_it_and_its_file_system_with_it() {
    own_mounts();
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (dir, stop) = (dir.clone(), stop.clone());
        move || {
            let mut written = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let mut file = File::create(dir.join(format!("w{}", written % 20))).unwrap();
                file.write_all(&written.to_le_bytes().repeat(1000)).unwrap();
                file.sync_all().unwrap();
                written += 1;
            }
            written
        }
    });
    let mut writer = Some(writer);
    let mut end = || {
        stop.store(true, Ordering::Relaxed);
        if let Some(writer) = writer.take() {
            assert!(writer.join().unwrap() > 0);
        }
    };
    if !vellum_fs::ext4::may_grow_mounted().unwrap() {
        // Root of this host lacks the right: nothing changes while somebody uses it.
        let busy = File::open(&dir).unwrap();
        let error = store.fails(&["resize", "c", "256M"]);
        assert!(error.contains("CAP_SYS_RESOURCE"), "{error}");
        assert_eq!(size_of(&store, "c"), 64 * MIB);
        end();
        drop(busy);
    }
    let report = store.json(&["resize", "c", "256M"]);
    assert_eq!(report["before"].as_u64(), Some(64 * MIB));
    assert_eq!(report["size"].as_u64(), Some(256 * MIB));
    assert!(capacity(&dir) > 200 * MIB, "{} bytes", capacity(&dir));
    fs::write(dir.join("large"), vec![5; 100 * MIB as usize]).unwrap();
    end();
    assert_eq!(size_of(&store, "c"), 256 * MIB);
    // What is made of it has its size.
    store.ok(&["commit", "c", "image"]);
    store.ok(&["resize", "c", "512M"]);
    assert!(capacity(&dir) > 400 * MIB);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    store.ok(&["create", "image", "--name", "d"]);
    assert_eq!(size_of(&store, "d"), 256 * MIB);
    for (name, least) in [("c", 400 * MIB), ("d", 200 * MIB)] {
        let dir = store.mount(name);
        assert!(capacity(&dir) > least, "{name}");
        assert_eq!(
            fs::read(dir.join("large")).unwrap().len(),
            100 * MIB as usize
        );
        store.ok(&["umount", name]);
    }
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_is_not_mounted_grows_with_its_file_system() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let said = store.ok(&["resize", "c", "256M"]);
    assert_eq!(said, "resized c from 67.1MB to 268MB\n");
    store.assert_nothing_runs();
    // The file system has it already, whoever mounts it.
    let (server, socket) = store.serve("c");
    let uri = format!("nbd+unix:///c?socket={}", socket.display());
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "268435456");
    let raw = store.arg("c.raw");
    run("nbdcopy", &[&uri, &raw]);
    run("e2fsck", &["-fn", &raw]);
    let told = run("dumpe2fs", &["-h", &raw]);
    let blocks = told.lines().find_map(|l| l.strip_prefix("Block count:"));
    assert_eq!(blocks.unwrap().trim(), "65536");
    let error = store.fails(&["resize", "c", "512M"]);
    assert!(error.contains("served over NBD by process"), "{error}");
    server.end();
    store.ok(&["resize", "c", "256M"]);
    store.ok(&["commit", "c", "image"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_size_that_is_smaller_or_none_is_refused_and_nothing_changes() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let refused = |size: &str, says: &str| {
        let error = store.fails(&["resize", "c", size]);
        assert!(error.contains(says), "{size}: {error}");
        assert_eq!(size_of(&store, "c"), 64 * MIB);
    };
    for mounted in [false, true] {
        if mounted {
            store.mount("c");
        }
        refused("32M", "cannot be made smaller");
        let output = store.output(&["resize", "c", "65T"]);
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("out of range"), "{error}");
        assert_eq!(size_of(&store, "c"), 64 * MIB);
    }
    store.ok(&["umount", "c"]);
    let error = store.fails(&["resize", "none", "1G"]);
    assert!(error.contains("there is no container none"), "{error}");
}

/// As a `vellum resize` leaves it that was killed before it noted the size.
#[test]
fn a_growth_that_was_cut_off_after_the_layer_is_finished_by_the_next_mount_commit_or_resize() {
    let store = TestStore::new();
    store.small_image("base");
    for finish in ["mount", "commit", "resize"] {
        store.ok(&["create", "base", "--name", finish]);
        let library = Store::open(&store.root).unwrap();
        let open = Target::of(&library.container(finish).unwrap())
            .open(&library)
            .unwrap();
        open.chain().grow(256 * MIB).unwrap();
        drop(open);
        match finish {
            "mount" => {}
            "commit" => drop(store.ok(&["commit", finish, "image"])),
            _ => drop(store.ok(&["resize", finish, "256M"])),
        }
        let dir = store.mount(finish);
        assert!(capacity(&dir) > 200 * MIB, "{finish}");
        store.ok(&["umount", finish]);
    }
    store.ok(&["create", "image", "--name", "d"]);
    assert!(capacity(&store.mount("d")) > 200 * MIB);
    store.ok(&["umount", "d"]);
    store.ok(&["check", "--scrub"]);
}

/// The steps at which a resize of a container that is, or is not, mounted can be killed here: a file system
/// in use is grown as it is, or unmounted for a moment.
fn steps(mounted: bool) -> &'static [&'static str] {
    match (mounted, vellum_fs::ext4::may_grow_mounted().unwrap()) {
        (false, _) => &["resize: layer grown", "resize: record in place"],
        (true, true) => &["grow: layer grown", "grow: device grown"],
        (true, false) => &[
            "resize: unmounted",
            "grow: layer grown",
            "grow: device grown",
            "resize: file system grown",
        ],
    }
}

#[test]
fn a_resize_that_is_killed_at_any_step_is_finished_by_the_next_mount_or_did_nothing() {
    own_mounts();
    let store = TestStore::new();
    store.small_image("base");
    for mounted in [false, true] {
        for step in steps(mounted) {
            store.ok(&["create", "base", "--name", "c"]);
            if mounted {
                fs::write(store.mount("c").join("mine"), "kept").unwrap();
            }
            let killed = store
                .command()
                .args(["resize", "c", "256M"])
                .env(vellum_base::crash_point::VARIABLE, step)
                .output()
                .unwrap();
            assert_eq!(killed.status.code(), None, "{step}: {killed:?}");
            // It may be mounted still.
            store.output(&["umount", "c"]);
            let dir = store.mount("c");
            let grown = capacity(&dir) > 200 * MIB;
            assert_eq!(grown, *step != "resize: unmounted", "{step}");
            if mounted {
                assert_eq!(fs::read_to_string(dir.join("mine")).unwrap(), "kept");
            }
            store.ok(&["resize", "c", "256M"]);
            assert_eq!(size_of(&store, "c"), 256 * MIB, "{step}");
            assert!(capacity(&dir) > 200 * MIB, "{step}");
            store.ok(&["umount", "c"]);
            store.assert_nothing_runs();
            store.ok(&["check", "--scrub"]);
            store.ok(&["rm", "c"]);
        }
    }
}

/// Whether a process has a child that runs this program.
fn has_child(parent: u32, program: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut stats =
        processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.any(|stat| {
        let named = stat.contains(&format!("({program})"));
        let above = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1));
        named && above == Some(&parent.to_string())
    })
}

/// Begins to grow `c` to 1 TiB, in a process group of its own, until resize2fs is at it. Where the kernel
/// grows it, there is none, and it is over.
fn begin_to_grow(store: &TestStore) -> (Running, Option<ExitStatus>) {
    let mut command = store.command();
    command.args(["resize", "c", "1T"]).process_group(0);
    let mut child = Running(command.spawn().unwrap());
    let mut over = None;
    wait_until("it grows", || {
        over = child.0.try_wait().unwrap();
        over.is_some() || has_child(child.0.id(), "resize2fs")
    });
    assert_eq!(over.is_some(), vellum_fs::ext4::may_grow_mounted().unwrap());
    (child, over)
}

#[test]
fn ctrl_c_does_not_cut_a_growing_file_system_off() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let (mut child, over) = begin_to_grow(&store);
    let status = over.unwrap_or_else(|| {
        // As a terminal sends it: to all of its group.
        let group = Pid::from_raw(child.0.id() as i32);
        killpg(group, Signal::SIGINT).unwrap();
        child.0.wait().unwrap()
    });
    assert!(status.success(), "{status}");
    store.assert_nothing_runs();
    assert!(capacity(&store.mount("c")) > 1000 << 30);
    store.ok(&["umount", "c"]);
}

#[test]
fn a_growth_goes_on_where_its_command_was_killed_and_the_next_mount_has_all_of_it() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let (child, _) = begin_to_grow(&store);
    drop(child);
    let dir = store.mount("c");
    assert!(capacity(&dir) > 1000 << 30, "{}", capacity(&dir));
    assert_eq!(fs::read(dir.join("file")).unwrap(), vec![7; 100_000]);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_container_that_is_mounted_twice_grows_with_both_mounts_or_not_at_all() {
    own_mounts();
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let second = store.path("second");
    fs::create_dir(&second).unwrap();
    run(
        "mount",
        &["--bind", dir.to_str().unwrap(), second.to_str().unwrap()],
    );
    if !vellum_fs::ext4::may_grow_mounted().unwrap() {
        let error = store.fails(&["resize", "c", "256M"]);
        assert!(error.contains(second.to_str().unwrap()), "{error}");
        assert!(error.contains("CAP_SYS_RESOURCE"), "{error}");
        assert_eq!(size_of(&store, "c"), 64 * MIB);
        assert_eq!(fs::read(second.join("file")).unwrap().len(), 100_000);
        run("umount", &[&second]);
    }
    store.ok(&["resize", "c", "256M"]);
    assert!(capacity(&dir) > 200 * MIB);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_disk_of_odd_sectors_that_grows_shows_all_of_it() {
    let store = TestStore::new();
    let raw = store.path("odd.img");
    File::create(&raw).unwrap().set_len(MIB + 512).unwrap();
    store.ok(&["import", "odd", raw.to_str().unwrap(), "--format", "raw"]);
    store.ok(&["create", "odd", "--name", "c"]);
    let served = || {
        let (server, socket) = store.serve("c");
        let uri = format!("nbd+unix:///c?socket={}", socket.display());
        let size = run("nbdinfo", &["--size", &uri]);
        server.end();
        size.trim().parse::<u64>().unwrap()
    };
    assert_eq!(served(), MIB + 512);
    let resize = |size: u64| store.json(&["resize", "c", &size.to_string()]);
    resize(MIB + 512);
    assert_eq!(served(), MIB + 512);
    let error = store.fails(&["resize", "c", &MIB.to_string()]);
    assert!(error.contains("has 1049088 bytes"), "{error}");
    // The rest of its last block is there already, and not shown.
    let resized = resize(MIB + 4096);
    assert_eq!(
        (&resized["before"], &resized["size"]),
        (&json!(MIB + 512), &json!(MIB + 4096))
    );
    assert_eq!(served(), MIB + 4096);
    resize(8 * MIB);
    assert_eq!(served(), 8 * MIB);
    // A new container is as large as is said.
    for (name, size) in [("d", MIB + 512), ("e", MIB + 4096)] {
        store.ok(&["create", "odd", "--name", name, "--size", &size.to_string()]);
        assert_eq!(store.content(name).len() as u64, size);
    }
    store.ok(&["check"]);
}

#[test]
fn an_ext4_on_odd_sectors_mounts_without_complaint_and_gets_its_last_block_while_it_is_mounted() {
    let store = TestStore::new();
    let raw = store.arg("odd.img");
    File::create(&raw).unwrap().set_len(16 * MIB + 512).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", &raw]);
    store.ok(&["import", "odd", &raw]);
    store.ok(&["create", "odd", "--name", "c"]);
    let mounted = store.output(&["mount", "c"]);
    let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
    assert!(
        mounted.status.success() && !said.contains("stays as large"),
        "{said}"
    );
    let dir = String::from_utf8(mounted.stdout).unwrap();
    let device = run("findmnt", &["-no", "SOURCE", dir.trim()]);
    let shown = || run("blockdev", &["--getsize64", device.trim()]);
    assert_eq!(shown().trim(), (16 * MIB + 512).to_string());
    let whole = (16 * MIB + 4096).to_string();
    let before = capacity(Path::new(dir.trim()));
    store.ok(&["resize", "c", &whole]);
    assert_eq!(shown().trim(), whole);
    assert_eq!(capacity(Path::new(dir.trim())), before + 4096);
    store.ok(&["umount", "c"]);
    assert_eq!(store.content("c").len().to_string(), whole);
    store.ok(&["check", "--scrub"]);
}

// --- Trim ---------------------------------------------------------------------------------------

/// Bytes that a container's layer takes of the host's disk, as du counts them.
fn du(store: &TestStore, container: &str) -> u64 {
    let shown = store.json(&["inspect", container]);
    let top = shown[0]["container"]["top"].as_str().unwrap().to_owned();
    let dir = store.root.join("layers").join(top);
    let text = run("du", &["-s", "-B1", dir.to_str().unwrap()]);
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// Fills a container whose file system does not tell of deleted files, and deletes all of it.
fn fill_and_delete(dir: &Path) {
    run("mount", &["-o", "remount,nodiscard", dir.to_str().unwrap()]);
    let mut file = File::create(dir.join("large")).unwrap();
    file.write_all(&vec![9; 40 * MIB as usize]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::remove_file(dir.join("large")).unwrap();
    run("sync", &["-f", dir.to_str().unwrap()]);
}

#[test]
fn a_trim_gives_back_what_deleted_files_took_mounted_or_not() {
    let store = TestStore::new();
    store.small_image("base");
    for (name, mounted) in [("mounted", true), ("not", false)] {
        store.ok(&["create", "base", "--name", name]);
        let dir = store.mount(name);
        fill_and_delete(&dir);
        if !mounted {
            store.ok(&["umount", name]);
        }
        let before = du(&store, name);
        assert!(before > 40 * MIB, "{name}: {before}");
        let report = store.json(&["trim", name]);
        let returned = report[0]["returned_bytes"].as_u64().unwrap();
        assert!(returned > 38 * MIB, "{report}");
        assert_eq!(report[0]["mounted"], !mounted);
        let after = du(&store, name);
        assert!(after < before - 38 * MIB, "{name}: {before}, then {after}");
        // There is nothing more.
        let again = store.json(&["trim", name]);
        let returned = again[0]["returned_bytes"].as_u64().unwrap();
        assert!(returned < MIB, "{again}");
        if mounted {
            assert_eq!(fs::read(dir.join("file")).unwrap(), vec![7; 100_000]);
            store.ok(&["umount", name]);
        }
    }
    store.assert_nothing_runs();
    store.ok(&["check", "--scrub"]);
    assert_eq!(store.ok(&["diff", "not"]), "");
}

#[test]
fn all_are_trimmed_but_those_that_others_serve_or_that_have_no_file_system() {
    let store = TestStore::new();
    store.small_image("base");
    let raw = store.path("raw.img");
    File::create(&raw).unwrap().set_len(MIB).unwrap();
    store.ok(&["import", "raw", raw.to_str().unwrap(), "--format", "raw"]);
    store.ok(&["create", "raw", "--name", "disk"]);
    for name in ["a", "b", "served"] {
        store.ok(&["create", "base", "--name", name]);
    }
    let dir = store.mount("a");
    fill_and_delete(&dir);
    let (server, _) = store.serve("served");
    let report = store.json(&["trim", "--all"]);
    let names: Vec<&str> = report
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert!(report[0]["returned_bytes"].as_u64().unwrap() > 38 * MIB);
    let error = store.fails(&["trim", "served"]);
    assert!(error.contains("served over NBD by process"), "{error}");
    let error = store.fails(&["trim", "disk"]);
    assert!(error.contains("holds no ext4"), "{error}");
    server.end();
    let text = store.ok(&["trim", "a", "b"]);
    assert_eq!(text.lines().count(), 2, "{text}");
    store.ok(&["umount", "a"]);
    store.assert_nothing_runs();
}

#[test]
fn the_units_for_a_periodic_trim_are_whole_and_their_command_is_one() {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
    let dir = tempfile::tempdir().unwrap();
    let command = dir.path().join("vellum");
    std::os::unix::fs::symlink(crate::common::VELLUM, &command).unwrap();
    let mut exec = String::new();
    for name in ["vellum-trim.service", "vellum-trim.timer"] {
        let text = fs::read_to_string(dist.join(name)).unwrap();
        let found = text.lines().find_map(|l| l.strip_prefix("ExecStart="));
        if let Some(found) = found {
            exec = found.to_owned();
        }
        let text = text.replace("=vellum ", &format!("={} ", command.display()));
        fs::write(dir.path().join(name), text).unwrap();
    }
    let units = ["vellum-trim.service", "vellum-trim.timer"].map(|name| dir.path().join(name));
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&units)
        .output()
        .unwrap_or_else(|error| panic!("systemd-analyze: {error}: apt-get install systemd"));
    let said = String::from_utf8_lossy(&output.stderr);
    let about_them = said.lines().find(|line| line.contains("vellum-trim"));
    assert_eq!(about_them, None);
    let words: Vec<&str> = exec.split(' ').collect();
    // systemd looks where both packages and installations by hand put it.
    assert_eq!(words[0], "vellum");
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let said = store.ok(&words[1..]);
    assert!(said.starts_with("c: "), "{said}");
}
