//! From an image to containers and back, by the command that users run.

use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{TestStore, run};

fn size_of(store: &TestStore, container: &str) -> u64 {
    let rows = store.json(&["ps", "-s"]);
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == container);
    row.expect("listed")["size"].as_u64().unwrap()
}

#[test]
fn a_life_from_import_to_rmi_leaves_nothing() {
    let store = TestStore::new();
    store.small_image("base");
    assert_eq!(store.ok(&["create", "base", "--name", "one"]), "one\n");
    assert_eq!(store.ok(&["create", "base"]), "base-1\n");
    assert_eq!(size_of(&store, "one"), 0, "untouched");

    let dir = store.mount("one");
    assert_eq!(
        fs::read_to_string(dir.join("etc/hostname")).unwrap(),
        "base\n"
    );
    fs::write(dir.join("etc/hostname"), "one\n").unwrap();
    fs::write(dir.join("new"), "new\n").unwrap();
    fs::remove_file(dir.join("file")).unwrap();
    assert_eq!(
        store.ok(&["diff", "one"]),
        "C /etc\nC /etc/hostname\nD /file\nA /new\n"
    );
    store.ok(&["umount", "one"]);
    assert_eq!(
        store.ok(&["diff", "one"]),
        "C /etc\nC /etc/hostname\nD /file\nA /new\n",
        "the same unmounted"
    );

    let other = store.mount("base-1");
    assert_eq!(
        fs::read_to_string(other.join("etc/hostname")).unwrap(),
        "base\n"
    );
    assert_eq!(fs::read(other.join("file")).unwrap().len(), 100_000);
    store.ok(&["umount", "base-1"]);
    store.ok(&["create", "base", "--name", "two"]);
    store.mount("two");
    store.ok(&["umount", "two"]);
    assert_eq!(
        size_of(&store, "two"),
        4096,
        "a mount writes the superblock"
    );

    store.ok(&["check", "--scrub"]);
    store.ok(&["rm", "one", "base-1", "two"]);
    store.ok(&["rmi", "base"]);
    store.ok(&["prune"]);
    assert_eq!(store.layers(), Vec::<String>::new());
    store.ok(&["check"]);
    store.assert_nothing_runs();
}

#[test]
fn fsx_finds_nothing_wrong_on_a_mounted_container_and_check_neither() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    // The second is a file of the image, which fsx cuts first.
    for (name, seed) in [("fsx", "1"), ("file", "2")] {
        let file = dir.join(name);
        run("fsx", &["-N", "3000", "-S", seed, file.to_str().unwrap()]);
    }
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    store.ok(&["rm", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_commit_under_writers_makes_a_clean_image_and_the_container_goes_on() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (dir, stop) = (dir.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut written = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let path = dir.join(format!("w{writer}-{}", written % 50));
                    let mut file = fs::File::create(path).unwrap();
                    file.write_all(&written.to_le_bytes().repeat(1000)).unwrap();
                    file.sync_all().unwrap();
                    written += 1;
                }
                written
            })
        })
        .collect();
    fs::write(dir.join("marker"), "before\n").unwrap();
    let report = store.json(&["commit", "c", "snap", "-m", "a remark"]);
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.join().unwrap() > 0);
    }
    assert!(report["frozen_seconds"].as_f64().unwrap() < 2.0, "{report}");
    fs::write(dir.join("marker"), "after\n").unwrap();
    store.ok(&["umount", "c"]);
    let dir = store.mount("c");
    assert_eq!(fs::read_to_string(dir.join("marker")).unwrap(), "after\n");
    store.ok(&["umount", "c"]);

    let history = store.ok(&["history", "snap"]);
    assert!(history.contains("vellum commit c"), "{history}");
    // Read-only, without the replay of a journal.
    let top = report["layer"].as_str().unwrap();
    let raw = store.path("snap.raw");
    copy_over_nbd(&store, "snap", &raw);
    let raw_arg = raw.display().to_string();
    let features = run("dumpe2fs", &["-h", &raw_arg]);
    assert!(
        !features.contains("needs_recovery"),
        "layer {top}: {features}"
    );
    run("e2fsck", &["-fn", &raw_arg]);

    store.ok(&["create", "snap", "--name", "d"]);
    let dir = store.mount("d");
    assert_eq!(fs::read_to_string(dir.join("marker")).unwrap(), "before\n");
    store.ok(&["umount", "d"]);
    store.ok(&["check", "--scrub"]);

    // The image is a layer of the container, the container no user of the image.
    store.ok(&["rm", "d"]);
    store.ok(&["rmi", "snap"]);
    let dir = store.mount("c");
    assert_eq!(fs::read_to_string(dir.join("marker")).unwrap(), "after\n");
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

fn copy_over_nbd(store: &TestStore, name: &str, target: &std::path::Path) {
    let (server, socket) = store.serve(name);
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    run("nbdcopy", &[uri.as_str(), target.to_str().unwrap()]);
    server.end();
}

#[test]
fn what_is_in_use_is_not_removed_and_the_message_names_the_user() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let error = store.fails(&["rmi", "base"]);
    assert!(error.contains("in use by container c"), "{error}");
    assert!(error.contains("vellum rm c"), "{error}");

    let dir = store.mount("c");
    let shown = dir.display().to_string();
    for command in [&["rm", "c"][..], &["mount", "c"]] {
        let error = store.fails(command);
        assert!(error.contains(&shown), "{command:?}: {error}");
        assert!(error.contains("vellum umount c"), "{command:?}: {error}");
    }
    let socket = store.arg("refused.sock");
    let error = store.fails(&["nbd", "c", "--socket", &socket]);
    assert!(error.contains("in use by another process"), "{error}");

    let open = fs::File::open(dir.join("file")).unwrap();
    let error = store.fails(&["umount", "c"]);
    assert!(error.contains("cannot unmount c"), "{error}");
    drop(open);
    store.ok(&["umount", "c"]);

    let (server, _) = store.serve("c");
    let pid = server.0.id().to_string();
    for command in [
        &["mount", "c"][..],
        &["rm", "c"],
        &["diff", "c"],
        &["umount", "c"],
    ] {
        let error = store.fails(command);
        assert!(
            error.contains("in use") || error.contains("served over NBD by process"),
            "{command:?}: {error}"
        );
        // Which process, its command, and since when.
        for word in [&pid, "vellum -q nbd c", "since 2"] {
            assert!(error.contains(word), "{command:?}: {error}");
        }
    }
    let error = store.fails(&["umount", "--force", "c"]);
    assert!(error.contains("served over NBD by process"), "{error}");
    let row = store.json(&["ps"])[0].clone();
    let status = row["status"].as_str().unwrap();
    let says = format!("served over nbd by {pid} since 2");
    assert!(status.starts_with(&says), "{status}");
    assert_eq!(row["serving"]["by"], "nbd");
    assert_eq!(row["serving"]["pid"].to_string(), pid);
    server.end();
    assert_eq!(store.json(&["ps"])[0]["serving"], serde_json::Value::Null);
    // What is not mounted need not be unmounted.
    let output = store.output(&["umount", "c"]);
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("c is not mounted"), "{said}");
    assert_eq!(store.names("ps"), ["c"]);
    store.ok(&["rm", "c"]);
    store.ok(&["rmi", "base"]);
    store.assert_nothing_runs();
}

#[test]
fn an_image_that_is_served_is_not_removed() {
    let store = TestStore::new();
    store.small_image("base");
    let (server, _) = store.serve("base");
    let error = store.fails(&["rmi", "base"]);
    assert!(error.contains("in use by another process"), "{error}");
    assert_eq!(store.names("images"), ["base"]);
    server.end();
    store.ok(&["rmi", "base"]);
}

#[test]
fn names_that_are_taken_bad_or_unknown_are_refused_with_what_to_do() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    store.ok(&["snapshot", "c", "s"]);
    store.ok(&["tag", "base", "hub/b:1"]);
    let root = store.arg("small-root");
    for (command, says) in [
        (&["create", "base", "--name", "c"][..], "vellum rm c"),
        (
            &["import", "base", &root, "--size", "64M"],
            "vellum rmi base",
        ),
        (&["commit", "c", "base"], "vellum rmi base"),
        (&["create", "base", "--name", "../c"], "cannot be the name"),
        (&["create", "none"], "there is no image none"),
        (&["mount", "none"], "there is no container none"),
        (&["rm", "none"], "there is no container none"),
        (&["check", "none"], "there is no"),
        (
            &["create", "base", "--size", "32M"],
            "smaller than the image",
        ),
        (&["import", "new", "/nonexistent"], "/nonexistent"),
        // What is there, and is something else.
        (&["cp", "c@s:/file", "."], "vellum fork c NEW --from s"),
        (&["resize", "c@s", "1G"], "vellum fork c NEW --from s"),
        (&["trim", "c@s"], "vellum fork c NEW --from s"),
        (&["rename", "c@s", "b"], "c@s is a snapshot"),
        (
            &["trim", "c@never"],
            "the container c has no snapshot never",
        ),
        (&["trim", "none@s"], "cannot be the name of a container"),
        (&["cp", "base:/file", "."], "vellum create base"),
        (
            &["changed", "hub/b:1", "--since", "s"],
            "hub/b:1 is an image",
        ),
        (
            &["tag", "base", "no such"],
            "cannot be the name of an image",
        ),
    ] {
        let error = store.fails(command);
        assert!(error.contains(says), "{command:?}: {error}");
    }
    let usage = store.output(&["create"]);
    assert_eq!(usage.status.code(), Some(2));
    assert_eq!(store.output(&["nonsense"]).status.code(), Some(2));
    assert_eq!(store.names("images"), ["base", "hub/b:1"]);
    assert_eq!(store.names("ps"), ["c"]);
}

#[test]
fn every_command_that_prints_has_json() {
    let store = TestStore::new();
    let root = store.arg("root");
    fs::create_dir(&root).unwrap();
    let report = store.json(&["import", "base", &root, "--size", "64M"]);
    assert_eq!(report["image"]["name"], "base");
    assert_eq!(store.json(&["create", "base", "--name", "c"])["name"], "c");
    assert_eq!(store.json(&["images"])[0]["name"], "base");
    assert_eq!(store.json(&["ps", "-s"])[0]["size"], 0);
    assert!(store.json(&["history", "base"]).as_array().unwrap().len() >= 2);
    assert_eq!(
        store.json(&["inspect", "base", "c"])[1]["type"],
        "container"
    );
    let dir = store.json(&["mount", "c"])["dir"]
        .as_str()
        .unwrap()
        .to_owned();
    fs::write(format!("{dir}/new"), "x").unwrap();
    assert_eq!(store.json(&["diff", "c"])[0]["path"], "/new");
    assert_eq!(store.json(&["commit", "c", "two"])["image"]["name"], "two");
    assert_eq!(store.json(&["umount", "c"])[0], "c");
    assert_eq!(
        store.json(&["check", "--scrub"])["findings"],
        serde_json::json!([])
    );
    assert_eq!(store.json(&["volume", "ls"]), serde_json::json!([]));
    assert_eq!(store.json(&["rm", "c"])[0], "c");
    assert_eq!(store.json(&["rmi", "two"])[0], "two");
    assert_eq!(store.json(&["prune"])["layers"], serde_json::json!([]));
}

#[test]
fn a_larger_container_has_a_larger_file_system() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c", "--size", "256M"]);
    for _ in 0..2 {
        let dir = store.mount("c");
        let stat = nix::sys::statvfs::statvfs(&dir).unwrap();
        let bytes = stat.blocks() * stat.fragment_size();
        assert!(bytes > 200 << 20, "{bytes} bytes");
        assert_eq!(fs::read(dir.join("file")).unwrap(), vec![7; 100_000]);
        store.ok(&["umount", "c"]);
    }
    store.ok(&["check"]);
}

#[test]
fn a_container_whose_processes_were_killed_is_cleaned_up_and_keeps_what_it_synced() {
    let store = TestStore::new();
    store.small_image("base");
    for (container, command) in [("a", &["umount", "a"][..]), ("b", &["check", "--repair"])] {
        store.ok(&["create", "base", "--name", container]);
        let dir = store.mount(container);
        let mut file = fs::File::create(dir.join("synced")).unwrap();
        file.write_all(b"kept\n").unwrap();
        file.sync_all().unwrap();
        drop(file);
        fs::File::open(&dir).unwrap().sync_all().unwrap();
        assert!(store.kill_all());
        let listed = store.ok(&["ps"]);
        assert!(listed.contains("failed: its server is dead"), "{listed}");
        let error = store.fails(&["check"]);
        assert!(error.contains("1 warning"), "{error}");
        store.ok(command);
        store.assert_nothing_runs();
        store.ok(&["check"]);
        let dir = store.mount(container);
        assert_eq!(fs::read_to_string(dir.join("synced")).unwrap(), "kept\n");
        store.ok(&["umount", container]);
    }
    store.mount("a");
    assert!(store.kill_all());
    store.ok(&["rm", "--force", "a"]);
    store.ok(&["rm", "b"]);
    store.assert_nothing_runs();
    store.ok(&["check"]);
}

#[test]
fn access_times_cost_nothing_unless_somebody_wants_them() {
    let store = TestStore::new();
    store.small_image("base");
    let options = |container: &str, more: &[&str]| {
        let mut arguments = vec!["mount", container];
        arguments.extend(more);
        let dir = store.ok(&arguments);
        let mounts =
            String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        let line = mounts.lines().find(|line| line.contains(dir.trim_end()));
        let options = line.unwrap().split(' ').nth(5).unwrap().to_owned();
        store.ok(&["umount", container]);
        options
    };
    store.ok(&["create", "base", "--name", "c"]);
    assert!(options("c", &[]).contains("noatime"));
    assert!(options("c", &["--atime", "relatime"]).contains("relatime"));
    assert!(
        options("c", &[]).contains("noatime"),
        "for that mount alone"
    );
    store.ok(&["create", "base", "--name", "d", "--atime", "relatime"]);
    assert!(options("d", &[]).contains("relatime"), "each time");
    let strict = options("d", &["--atime", "strictatime"]);
    assert!(
        !strict.contains("noatime") && !strict.contains("relatime"),
        "{strict}"
    );

    let before = size_of(&store, "c");
    let dir = store.mount("c");
    run(
        "sh",
        &[
            "-c",
            &format!("cat $(find {} -type f) > /dev/null", dir.display()),
        ],
    );
    store.ok(&["umount", "c"]);
    assert_eq!(size_of(&store, "c"), before, "reading writes nothing");
    store.ok(&["rm", "c", "d"]);
}

/// A file: its path, what it holds and where, and the time of its last change.
type Seen = (
    std::path::PathBuf,
    Vec<(i64, Vec<u8>)>,
    std::time::SystemTime,
);

/// Every file below a directory.
fn files(dir: &std::path::Path, found: &mut Vec<Seen>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        if metadata.is_dir() {
            files(&path, found);
        } else if metadata.is_file() {
            let data = data_of(&fs::File::open(&path).unwrap());
            found.push((path, data, metadata.modified().unwrap()));
        }
    }
}

/// The parts of a file that are no hole: layers are sparse and long.
fn data_of(file: &fs::File) -> Vec<(i64, Vec<u8>)> {
    use nix::unistd::{Whence, lseek};
    let mut parts = Vec::new();
    let mut at = 0;
    while let Ok(start) = lseek(file, at, Whence::SeekData) {
        at = lseek(file, start, Whence::SeekHole).unwrap();
        let mut bytes = vec![0; (at - start) as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, start as u64).unwrap();
        parts.push((start, bytes));
    }
    parts
}

#[test]
fn looking_changes_no_file_of_the_store() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("new"), vec![3; 300_000]).unwrap();
    fs::remove_file(dir.join("file")).unwrap();
    store.ok(&["umount", "c"]);
    let all = || {
        let mut found = Vec::new();
        files(&store.root, &mut found);
        found.sort();
        found
    };
    let archive = store.arg("c.raw");
    for command in [
        &["diff", "c"][..],
        &["cp", "c:/etc", "-"],
        &["images"],
        &["history", "base"],
        &["inspect", "c", "base"],
        &["ps"],
        &["ps", "-s"],
        &["stats"],
        &["stats", "c"],
        &["map", "c"],
        &["map", "base"],
        &["check"],
        &["check", "--scrub"],
        &["doctor"],
        &["volume", "ls"],
        &["export", "c", &archive, "--format", "raw", "--force"],
        &["export", "base", &archive, "--format", "qcow2", "--force"],
        &["export", "c", &archive, "--format", "tar", "--force"],
        &["export", "c", &archive, "--format", "docker", "--force"],
        &["nbd"],
    ] {
        let before = all();
        match command {
            // Whether the host is fine is another question.
            ["doctor"] => drop(store.output(command)),
            ["nbd"] => {
                for name in ["base", "c"] {
                    let (server, socket) = store.serve_with(name, &["--read-only"]);
                    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
                    run("nbdcopy", &[uri.as_str(), &archive]);
                    server.end();
                }
            }
            _ => drop(store.ok(command)),
        }
        let after = all();
        // An empty lock may be new.
        let is_new_lock = |entry: &&Seen| {
            let is_new = before.iter().all(|(path, ..)| *path != entry.0);
            let lock =
                entry.0.ends_with("readers") || entry.0.extension().is_some_and(|e| e == "lock");
            is_new && lock && entry.0.metadata().unwrap().len() == 0
        };
        let changed: Vec<_> = after
            .iter()
            .filter(|entry| !before.contains(entry) && !is_new_lock(entry))
            .map(|(path, ..)| path)
            .collect();
        assert!(changed.is_empty(), "{command:?} changed {changed:?}");
        let gone: Vec<_> = before.iter().filter(|(path, ..)| !path.exists()).collect();
        assert!(gone.is_empty(), "{command:?} removed {gone:?}");
    }
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_a_crash_left_can_be_looked_at_and_its_file_system_is_not_touched() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let mut file = fs::File::create(dir.join("synced")).unwrap();
    file.write_all(b"kept\n").unwrap();
    file.sync_all().unwrap();
    fs::File::open(&dir).unwrap().sync_all().unwrap();
    drop(file);
    assert!(store.kill_all());
    store.ok(&["umount", "c"]);
    // Its ext4 has a journal to be replayed: twice the same, since looking does not do it for good.
    for _ in 0..2 {
        let diff = store.ok(&["diff", "c"]);
        assert!(diff.contains("A /synced"), "{diff}");
        let raw = store.path("c.raw");
        copy_over_nbd(&store, "c", &raw);
        let features = run("dumpe2fs", &["-h", raw.to_str().unwrap()]);
        assert!(features.contains("needs_recovery"), "{features}");
    }
    // A commit replays it, since nobody could later.
    store.ok(&["commit", "c", "snap"]);
    store.ok(&["create", "snap", "--name", "d"]);
    let dir = store.mount("d");
    assert_eq!(fs::read_to_string(dir.join("synced")).unwrap(), "kept\n");
    store.ok(&["umount", "d"]);
    assert_eq!(fs::read_dir(store.root.join("staging")).unwrap().count(), 0);
    store.assert_nothing_runs();
    store.ok(&["check", "--scrub"]);
}
