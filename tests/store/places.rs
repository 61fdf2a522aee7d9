//! Where a store lies and what happens to that place: it is moved, copied, restored; it lies on a file
//! system that cannot do what it must, that is mounted read-only, or that fails; containers are
//! mounted where others mount too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::{TestStore, VELLUM, kill, run, wait_until};
use crate::small_disk::Mounted;

/// A store with the image `i` and a container `c` of it.
fn with_container() -> TestStore {
    let store = TestStore::new();
    store.small_image("i");
    store.ok(&["create", "i", "--name", "c"]);
    store
}

/// A program that needs no libraries, `/bin/busybox` below `tree`.
fn add_busybox(tree: &Path) {
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox"))
        .expect("/bin/busybox: apt-get install busybox-static");
}

fn import_box(store: &TestStore, tree: &Path) {
    let tree = tree.display().to_string();
    store.ok(&["import", "box", &tree, "--size", "64M"]);
}

/// A store with the image `box`, which holds busybox and nothing else.
fn with_busybox() -> TestStore {
    let store = TestStore::new();
    let tree = store.path("tree");
    add_busybox(&tree);
    import_box(&store, &tree);
    store
}

/// The command on a store at `root`.
fn at(root: &Path, arguments: &[&str]) -> Output {
    Command::new(VELLUM)
        .arg("--root")
        .arg(root)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// As [`at`]; it must succeed. Returns its standard output.
fn ok_at(root: &Path, arguments: &[&str]) -> String {
    let output = at(root, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: vellum {arguments:?}: {error}",
        root.display()
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// As [`at`]; it must fail. Returns what it said.
fn refused_at(root: &Path, arguments: &[&str]) -> String {
    let output = at(root, arguments);
    assert_eq!(output.status.code(), Some(1), "vellum {arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run_dir(root: &Path, container: &str) -> PathBuf {
    let text = ok_at(root, &["inspect", container]);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let id = value[0]["container"]["id"].as_str().unwrap();
    root.join("run").join(id)
}

fn worker(run_dir: &Path) -> i32 {
    let text = fs::read_to_string(run_dir.join("state.json")).unwrap_or_default();
    let state: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    state["worker"]["pid"].as_i64().unwrap_or_default() as i32
}

/// A file system of its own in a store's directory.
fn disk(store: &TestStore, kind: &str, megabytes: u64, options: &str) -> Mounted {
    let image = store.arg(&format!("{kind}.img"));
    File::create(&image)
        .unwrap()
        .set_len(megabytes << 20)
        .unwrap();
    match kind {
        "xfs" => run("mkfs.xfs", &["-q", &image]),
        _ => run("mke2fs", &["-q", "-F", "-t", kind, &image]),
    };
    Mounted::new(&["-o", options, &image], &store.path(kind))
}

#[test]
fn a_store_that_is_moved_while_it_is_mounted_is_served_on_and_ended_where_it_is_now() {
    let store = with_container();
    let dir = store.mount("c");
    fs::write(dir.join("before"), "1").unwrap();
    let old = store.root.clone();
    let new = store.path("moved");
    fs::rename(&old, &new).unwrap();
    let moved = TestStore {
        root: new.canonicalize().unwrap(),
        dir: tempfile::tempdir().unwrap(),
        env: Vec::new(),
    };
    let run_dir = run_dir(&moved.root, "c");
    let rootfs = run_dir.join("rootfs");
    // The first worker has its files open; the ones after it look for them by name.
    for round in 0..3 {
        let pid = worker(&run_dir);
        kill(pid);
        let file = rootfs.join(format!("round-{round}"));
        let mut line = File::create(&file).unwrap();
        std::io::Write::write_all(&mut line, b"x").unwrap();
        line.sync_all().unwrap();
        wait_until("the state names the next worker", || {
            let next = worker(&run_dir);
            next != pid && next != 0
        });
    }
    assert!(!old.exists(), "nobody makes a store at the old place");
    // Whatever lies at the old place by then is not the store.
    fs::create_dir(&old).unwrap();
    kill(worker(&run_dir));
    run("sync", &["-f", &rootfs.display().to_string()]);
    assert_eq!(fs::read_dir(&old).unwrap().count(), 0);
    assert!(
        moved.ok(&["ps"]).contains("mounted at"),
        "{}",
        moved.ok(&["ps"])
    );
    // A new program takes it over where it is now.
    assert!(moved.ok(&["upgrade-servers"]).contains("served by"));
    moved.ok(&["umount", "c"]);
    moved.assert_nothing_runs();
    let again = moved.mount("c");
    for file in ["before", "round-0", "round-2"] {
        assert!(again.join(file).exists(), "{file}");
    }
    moved.ok(&["umount", "c"]);
    moved.ok(&["check"]);
}

/// Copies a store in one of the ways that people do.
fn back_up(how: &str, with_run: bool, from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let (f, t) = (from.display(), to.display());
    let no_run = match (how, with_run) {
        (_, true) => "",
        ("tar", _) => "--exclude=./run",
        ("cp", _) => "; rm -rf run",
        (_, _) => "--exclude=/run",
    };
    let script = match how {
        "cp" => format!("cp -a --sparse=always '{f}/.' '{t}' && cd '{t}' {no_run}"),
        "tar" => format!("tar -C '{f}' -S {no_run} -cf - . | tar -C '{t}' -xSf -"),
        options => format!("rsync {options} {no_run} '{f}/' '{t}/'"),
    };
    // Programs of a device that is served cannot be copied, and sockets by tar.
    let _ = Command::new("bash").args(["-c", &script]).output().unwrap();
}

/// A restored store does all that a store does.
fn works(root: &Path, what: &str) {
    for arguments in [
        &["check", "--repair"][..],
        &["check"],
        &["prune"],
        &["create", "i", "--name", "d"],
        &["mount", "c"],
    ] {
        let output = at(root, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{what}: {arguments:?}: {error}");
    }
    let dir = run_dir(root, "c").join("rootfs");
    assert_eq!(
        fs::read_to_string(dir.join("etc/hostname")).unwrap(),
        "base\n"
    );
    assert!(dir.join("kept").exists(), "{what}");
    for arguments in [&["umount", "c"][..], &["rm", "d"], &["umount", "c"]] {
        ok_at(root, arguments);
    }
    ok_at(root, &["mount", "c"]);
    wait_until("it is removed by force", || {
        at(root, &["rm", "--force", "c"]).status.success()
    });
    ok_at(root, &["check"]);
}

#[test]
fn a_store_restored_from_a_backup_works_however_it_was_copied() {
    let store = with_container();
    let dir = store.mount("c");
    fs::write(dir.join("kept"), "kept").unwrap();
    run("sync", &["-f", &dir.display().to_string()]);
    let away = store.path("away");
    for mounted in [true, false] {
        if !mounted {
            store.ok(&["umount", "c"]);
        }
        // Each way with and without `run`, in one state or the other.
        for (how, with_run) in [
            ("cp", mounted),
            ("-aS", mounted),
            ("-aSm", !mounted),
            ("tar", mounted),
        ] {
            let what = format!("{how}, run/: {with_run}, mounted: {mounted}");
            let copy = store.path("copy");
            back_up(how, with_run, &store.root, &copy);
            works(&copy.canonicalize().unwrap(), &what);
            if mounted {
                assert!(
                    dir.join("kept").exists(),
                    "{what}: the first is still mounted"
                );
                assert!(store.ok(&["ps"]).contains("mounted at"), "{what}");
            }
            fs::remove_dir_all(&copy).unwrap();
        }
        // At the path of the first, while that one lives on elsewhere.
        back_up("cp", true, &store.root, &away);
        fs::rename(&store.root, store.path("first")).unwrap();
        fs::rename(&away, &store.root).unwrap();
        works(&store.root, &format!("in its place, mounted: {mounted}"));
        fs::remove_dir_all(&store.root).unwrap();
        fs::rename(store.path("first"), &store.root).unwrap();
        if mounted {
            assert!(
                store
                    .root
                    .join("run")
                    .join(run_dir(&store.root, "c"))
                    .join("rootfs/kept")
                    .exists()
            );
        }
    }
    // A backup of when it was mounted comes back over the store that it is of.
    store.mount("c");
    back_up("-aS", true, &store.root, &away);
    store.ok(&["umount", "c"]);
    back_up("-aS", true, &away, &store.root);
    works(&store.root, "over the store itself");
    store.assert_nothing_runs();
}

#[test]
fn what_runs_in_the_original_is_not_touched_through_a_copy_of_its_store() {
    let store = with_busybox();
    let mut child = store
        .command()
        .args([
            "run",
            "box",
            "--name",
            "c",
            "--",
            "/bin/busybox",
            "sleep",
            "1000",
        ])
        .spawn()
        .unwrap();
    wait_until("it runs", || store.ok(&["ps"]).contains("running"));
    let copy = store.path("copy");
    back_up("cp", true, &store.root, &copy);
    assert!(!ok_at(&copy, &["ps"]).contains("running"));
    ok_at(&copy, &["rm", "--force", "c"]);
    assert!(child.try_wait().unwrap().is_none(), "it runs on");
    assert!(store.ok(&["ps"]).contains("running"));
    store.ok(&["exec", "c", "--", "/bin/busybox", "true"]);
    store.ok(&["rm", "--force", "c"]);
    child.wait().unwrap();
}

#[test]
fn what_a_container_writes_to_its_hosts_file_does_not_fill_the_disk_of_the_store() {
    let store = with_busybox();
    let script = "for f in hosts hostname resolv.conf; do \
                  dd if=/dev/zero of=/etc/$f bs=1M count=8; echo \"$f $?\"; done; \
                  echo 1.2.3.4 other > /etc/hosts; cat /etc/hosts";
    let output = store.output(&[
        "run",
        "box",
        "--name",
        "c",
        "--network",
        "host",
        "--",
        "/bin/busybox",
        "sh",
        "-c",
        script,
    ]);
    let said = String::from_utf8_lossy(&output.stdout);
    for line in ["hosts 1", "hostname 1", "resolv.conf 1", "1.2.3.4 other"] {
        assert!(said.lines().any(|said| said == line), "{line}: {output:?}");
    }
    store.assert_nothing_runs();
    // Without the two dashes too, as docker's.
    store.ok(&["exec", "c", "/bin/busybox", "ls", "-l", "/"]);
    store.ok(&["rm", "c"]);
    store.assert_nothing_runs();
}

fn options_of(target: &Path) -> Vec<String> {
    let all = vellum_fs::mountinfo::MountInfo::at(target).unwrap();
    let mount = all.expect("something is mounted there");
    mount.options.split(',').map(str::to_owned).collect()
}

#[test]
fn setuid_programs_and_device_nodes_of_a_container_do_nothing_on_the_host_unless_asked_for() {
    let store = with_container();
    let dir = store.path("m");
    fs::create_dir(&dir).unwrap();
    let dir = dir.canonicalize().unwrap();
    let text = dir.display().to_string();
    for (more, suid, dev) in [
        (&[][..], false, false),
        (&["--suid"], true, false),
        (&["--dev"], false, true),
        (&["--suid", "--dev"], true, true),
    ] {
        let mut arguments = vec!["mount", "c", &text];
        arguments.extend(more);
        store.ok(&arguments);
        let options = options_of(&dir);
        let has = |name: &str| options.iter().any(|option| option == name);
        assert_eq!((!has("nosuid"), !has("nodev")), (suid, dev), "{options:?}");
        store.ok(&["umount", "c"]);
    }
    let default = store.mount("c");
    let options = options_of(&default);
    assert!(options.contains(&"nosuid".to_owned()) && options.contains(&"nodev".to_owned()));
}

#[test]
fn a_command_in_a_mounted_container_has_its_setuid_programs_all_the_same() {
    let store = with_busybox();
    store.ok(&["create", "box", "--name", "c"]);
    let dir = store.mount("c");
    for _ in 0..2 {
        let mounts = store.ok(&[
            "exec",
            "c",
            "--",
            "/bin/busybox",
            "cat",
            "/proc/self/mountinfo",
        ]);
        let root = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some("/"));
        let root = root.expect("a root");
        assert!(
            !root.contains("nosuid") && !root.contains("nodev"),
            "{root}"
        );
        // As it was, and nothing more.
        assert!(options_of(&dir).contains(&"nosuid".to_owned()));
        let inner = run_dir(&store.root, "c").join("inner");
        assert!(!inner.exists());
    }
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn an_unmount_takes_nobody_elses_mounts_away() {
    let store = with_container();
    let dir = store.path("m");
    fs::create_dir(&dir).unwrap();
    let dir = dir.canonicalize().unwrap();
    let text = dir.display().to_string();
    let sub = dir.join("etc");
    let parent = dir.parent().unwrap().join("p");
    fs::create_dir_all(parent.join("m")).unwrap();
    let below_parent = parent.join("m");
    for (at, over, how) in [
        (&dir, dir.clone(), "on top of it"),
        (&dir, sub, "below it"),
        (&below_parent, parent.clone(), "over"),
    ] {
        store.ok(&["mount", "c", &at.display().to_string()]);
        let tmpfs = Mounted::new(&["-t", "tmpfs", "other"], &over);
        fs::write(over.join("file"), "theirs").unwrap();
        for arguments in [
            &["umount", "c"][..],
            &["umount", "--force", "c"],
            &["rm", "--force", "c"],
        ] {
            let said = store.fails(arguments);
            assert!(said.contains(how) && said.contains("umount"), "{said}");
            assert_eq!(fs::read_to_string(over.join("file")).unwrap(), "theirs");
        }
        assert!(store.ok(&["ps"]).contains("mounted at"));
        drop(tmpfs);
        store.ok(&["umount", "c"]);
    }
    // Stacked on each other they are unmounted in order.
    store.ok(&["create", "i", "--name", "b"]);
    store.ok(&["mount", "c", &text]);
    store.ok(&["mount", "b", &text]);
    assert!(store.fails(&["umount", "c"]).contains("on top of it"));
    store.ok(&["umount", "b"]);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn nothing_is_mounted_over_the_store() {
    let store = with_container();
    fs::create_dir_all(store.root.join("volumes/v")).unwrap();
    let link = store.path("link");
    std::os::unix::fs::symlink(store.root.join("layers"), &link).unwrap();
    let parent = store.root.parent().unwrap().to_owned();
    for dir in [
        store.root.clone(),
        store.root.join("layers"),
        store.root.join("volumes/v"),
        link,
        parent,
        PathBuf::from("/"),
    ] {
        let said = store.fails(&["mount", "c", &dir.display().to_string()]);
        assert!(
            said.contains("cannot mount at"),
            "{}: {said}",
            dir.display()
        );
        store.assert_nothing_runs();
    }
    store.ok(&["check"]);
}

#[test]
fn a_limit_on_the_size_of_files_is_named_and_does_not_bind_the_servers() {
    let store = with_container();
    let root = store.root.display();
    let limited = |command: &str| {
        let script =
            format!("ulimit -c 0; ulimit -Sf 4000; exec {VELLUM} --root '{root}' {command}");
        Command::new("bash").args(["-c", &script]).output().unwrap()
    };
    let output = limited("create i --name n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("ulimit -f"), "{said}");
    store.ok(&["check"]);
    let output = limited("mount c");
    assert!(output.status.success(), "{output:?}");
    for (pid, line) in store.processes() {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let size = limits
            .lines()
            .find(|line| line.starts_with("Max file size"));
        let words: Vec<&str> = size.unwrap().split_whitespace().collect();
        assert_eq!(words[3], words[4], "{line}: {limits}");
    }
    let dir = run_dir(&store.root, "c").join("rootfs");
    fs::write(dir.join("large"), vec![1; 20 << 20]).unwrap();
    run("sync", &["-f", &dir.display().to_string()]);
    store.ok(&["umount", "c"]);
}

#[test]
fn a_full_standard_output_is_a_failure_of_every_command_and_a_closed_one_is_none() {
    let store = with_container();
    let commands: &[&[&str]] = &[
        &["images"],
        &["ps"],
        &["ps", "--size"],
        &["inspect", "i"],
        &["history", "i"],
        &["create", "i"],
        &["stats"],
        &["stats", "c", "--watch", "--count", "1"],
        &["map", "c"],
        &["check"],
        &["prune"],
        &["doctor"],
        &["mount", "c"],
        &["upgrade-servers"],
        &["umount", "c"],
        &["commit", "c", "j"],
        &["rm", "c"],
        &["completions", "bash"],
        &["man"],
        &["--help"],
        &["--version"],
        &["mount", "--help"],
    ];
    let to = |out: Stdio, arguments: &[&str]| {
        store
            .command()
            .args(arguments)
            .stdout(out)
            .output()
            .unwrap()
    };
    let changes =
        |arguments: &[&str]| ["create", "mount", "umount", "commit", "rm"].contains(&arguments[0]);
    for arguments in commands.iter().filter(|a| !changes(a)) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = to(writer.into(), arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        let noisy = said.contains("vellum: ") || said.contains("panicked");
        assert!(
            !noisy && output.status.code().is_some(),
            "{arguments:?}: {said}"
        );
    }
    // With --json those that only look, before the others are done with the container.
    for json in [true, false] {
        for arguments in commands.iter().filter(|a| !json || !changes(a)) {
            let mut all = if json { vec!["--json"] } else { Vec::new() };
            all.extend(*arguments);
            let full = File::options().write(true).open("/dev/full").unwrap();
            let output = to(full.into(), &all);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{all:?}: {said}");
            assert!(said.contains("standard output"), "{all:?}: {said}");
        }
    }
    // Nobody to complain to, either.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = store.command();
    command.args(["inspect", "nothing"]).stderr(full);
    assert_eq!(command.status().unwrap().code(), Some(1));
}

#[test]
fn a_file_system_that_cannot_hold_a_store_is_refused_by_name() {
    let store = with_container();
    for kind in ["ext2", "ext3"] {
        let disk = disk(&store, kind, 64, "loop");
        let root = disk.0.join("store");
        let said = refused_at(&root, &["volume", "create", "v"]);
        assert!(said.contains(kind) && said.contains("fallocate"), "{said}");
        assert!(said.contains("XFS"), "{said}");
        assert!(!root.join("vellum.json").exists());
        let output = at(&root, &["doctor"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            !output.status.success() && text.contains("fallocate"),
            "{text}"
        );
        // One that was copied there is read, and not written.
        let copy = disk.0.join("copy");
        back_up("-aS", false, &store.root, &copy);
        assert!(ok_at(&copy, &["ps"]).contains('c'));
        ok_at(&copy, &["check"]);
        let said = refused_at(&copy, &["mount", "c"]);
        assert!(said.contains(kind) && said.contains("fallocate"), "{said}");
    }
}

#[test]
fn odd_characters_in_the_path_of_a_store_do_no_harm() {
    use std::os::unix::ffi::OsStrExt;
    let tree = tempfile::tempdir().unwrap();
    add_busybox(tree.path());
    for (name, runs) in [
        (&b"a:b"[..], true),
        (b"a b\\040\"'$#", true),
        (b"a\nb\tc", true),
        (b"a\xffb", false),
    ] {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path().join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir(&parent).unwrap();
        let store = TestStore::under(&parent);
        let root = &store.root;
        import_box(&store, tree.path());
        store.ok(&["create", "box", "--name", "c"]);
        ok_at(root, &["mount", "c"]);
        let dir = run_dir(root, "c").join("rootfs");
        assert!(dir.join("bin/busybox").exists());
        kill(worker(&run_dir(root, "c")));
        fs::write(dir.join("file"), "x").unwrap();
        for arguments in [&["ps"][..], &["--json", "ps"], &["check"], &["stats"]] {
            ok_at(root, arguments);
        }
        store.ok(&["umount", "c"]);
        store.assert_nothing_runs();
        for runtime in ["crun", "runc"] {
            let mut command = store.command();
            command.env("VELLUM_RUNTIME", runtime);
            let output = command
                .args(["run", "box", "--rm", "--", "/bin/busybox", "echo", "ran"])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), runs, "{runtime}: {said}");
            assert!(runs || said.contains("UTF-8"), "{said}");
        }
        store.assert_nothing_runs();
    }
}

/// A store on a disk of its own, ended without reading it when it is dropped.
struct OnDisk {
    store: TestStore,
    _disk: Mounted,
    _area: TestStore,
}

impl OnDisk {
    fn new(kind: &str) -> OnDisk {
        let area = TestStore::new();
        let disk = disk(&area, kind, 320, "loop");
        let store = TestStore {
            root: disk.0.canonicalize().unwrap().join("store"),
            dir: tempfile::tempdir().unwrap(),
            env: Vec::new(),
        };
        store.small_image("i");
        store.ok(&["create", "i", "--name", "c"]);
        OnDisk {
            store,
            _disk: disk,
            _area: area,
        }
    }

    fn mounted_at(&self) -> &Path {
        self.store.root.parent().unwrap()
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        let _ = at(&self.store.root, &["umount", "--force", "--all"]);
        self.store.kill_all();
    }
}

/// Every file below a directory with what it holds.
fn content(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(content(&path));
        } else {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

fn qemu_io(socket: &Path, name: &str, read_only: bool, commands: &[&str]) -> String {
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    let mut arguments = vec!["-f", "raw"];
    if read_only {
        arguments.push("-r");
    }
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    run("qemu-io", &arguments)
}

#[test]
fn a_store_that_cannot_be_written_is_looked_at_checked_and_served_read_only() {
    let on_disk = OnDisk::new("ext4");
    let store = &on_disk.store;
    let dir = store.mount("c");
    fs::write(dir.join("kept"), "kept").unwrap();
    store.ok(&["umount", "c"]);
    // One whose server was killed, with a flushed block in its journal alone, as after a power cut.
    store.ok(&["create", "i", "--name", "u"]);
    let (server, socket) = store.serve("u");
    qemu_io(&socket, "u", false, &["write -P 0xab 40M 8k", "flush"]);
    drop(server);
    let inspected = store.json(&["inspect", "u"]);
    let top = inspected[0]["container"]["top"].as_str().unwrap();
    let top = store.root.join("layers").join(top);
    fs::remove_file(top.join("live")).unwrap();
    let data = top.join("data").display().to_string();
    run("fallocate", &["-p", "-o", "40MiB", "-l", "8KiB", &data]);
    // As restored by a program that leaves out what is empty.
    for name in ["run", "staging", "trash"] {
        fs::remove_dir_all(store.root.join(name)).unwrap();
    }
    let before = content(&top);
    let disk = on_disk.mounted_at().display().to_string();
    run("mount", &["-o", "remount,ro", &disk]);

    for arguments in [
        &["ps"][..],
        &["ps", "--size"],
        &["images"],
        &["inspect", "i"],
        &["inspect", "c"],
        &["history", "i"],
        &["stats"],
        &["map", "c"],
        &["map", "u"],
        &["check"],
        &["check", "--scrub"],
        &["volume", "ls"],
    ] {
        store.ok(arguments);
    }
    for arguments in [
        &["create", "i", "--name", "x"][..],
        &["mount", "c"],
        &["prune"],
        &["rm", "c"],
        &["commit", "c", "j"],
    ] {
        let said = store.fails(arguments);
        assert!(
            said.contains("Read-only file system"),
            "{arguments:?}: {said}"
        );
    }
    let image = store.path("image");
    for name in ["i", "c", "u"] {
        let (server, socket) = store.serve(name);
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let info = run("nbdinfo", &["--json", &uri]);
        assert!(info.contains("\"is_read_only\": true"), "{info}");
        let _ = fs::remove_file(&image);
        run("nbdcopy", &[&uri, &image.display().to_string()]);
        if name == "u" {
            qemu_io(&socket, name, true, &["read -P 0xab 40M 8k"]);
        }
        server.end();
        let kept = Command::new("debugfs")
            .args(["-R", "cat /kept"])
            .arg(&image)
            .output()
            .unwrap();
        assert_eq!(kept.stdout == b"kept", name == "c", "{name}");
    }
    assert!(content(&top) == before, "nothing was written");
    // And what it was shown as is what it is recovered to.
    run("mount", &["-o", "remount,rw", &disk]);
    let (server, socket) = store.serve("u");
    qemu_io(&socket, "u", false, &["read -P 0xab 40M 8k"]);
    server.end();
}

#[test]
fn what_is_mounted_of_a_store_whose_disk_fails_is_ended_without_reading_it() {
    for (kind, everything_dies) in [("ext4", false), ("xfs", true)] {
        let on_disk = OnDisk::new(kind);
        let store = &on_disk.store;
        store.ok(&["create", "i", "--name", "d"]);
        let (m, n) = (store.path("m"), store.path("n"));
        for (name, dir) in [("c", &m), ("d", &n)] {
            fs::create_dir(dir).unwrap();
            store.ok(&["mount", name, &dir.display().to_string()]);
        }
        let id = run_dir(&store.root, "c");
        let id = id.file_name().unwrap().to_str().unwrap();
        let mut file = File::create(m.join("file")).unwrap();
        let disk = on_disk.mounted_at().display().to_string();
        run("xfs_io", &["-x", "-c", "shutdown", &disk]);
        let _ = std::io::Write::write_all(&mut file, &[1; 100_000]);
        let _ = file.sync_all();
        drop(file);
        if everything_dies {
            store.kill_all();
        }
        let said = refused_at(&store.root, &["umount", "--force", "nothing"]);
        assert!(said.contains("left of this store"), "{kind}: {said}");
        // Without a process nobody knows its name.
        let name = if everything_dies { id } else { "c" };
        ok_at(&store.root, &["umount", "--force", name]);
        assert!(vellum_fs::mountinfo::MountInfo::at(&m).unwrap().is_none());
        assert!(vellum_fs::mountinfo::MountInfo::at(&n).unwrap().is_some());
        ok_at(&store.root, &["umount", "--force", "--all"]);
        store.assert_nothing_runs();
        run("umount", &[&disk]);
    }
}

#[test]
fn umount_all_ends_what_a_store_has_mounted_and_makes_no_store_where_none_is() {
    let store = with_container();
    store.ok(&["create", "i", "--name", "d"]);
    store.mount("c");
    store.mount("d");
    store.ok(&["umount", "--all"]);
    store.assert_nothing_runs();
    let none = store.path("none");
    refused_at(&none, &["umount", "--all"]);
    refused_at(&none, &["umount", "c"]);
    assert!(!none.exists());
}
