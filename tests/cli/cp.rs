//! `vellum cp`: names, links, attributes, tars, and what is left when it is cut off.

use std::fs::{self, File, FileTimes, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::common::{Running, TestStore, run, shell, wait_until};
use crate::interrupted::{end, listens, send, start};

/// A store with a container `c`, mounted or not.
fn with_container(mounted: bool) -> TestStore {
    let store = TestStore::new();
    let tree = store.path("tree");
    shell(
        store.dir.path(),
        "mkdir -p tree/etc tree/dir/sub tree/empty tree/var tree/run
         echo inside > tree/etc/secret
         echo one > tree/dir/one; echo two > tree/dir/sub/two; echo old > tree/file
         ln -s /etc tree/abs; ln -s ../../../../etc tree/rel; ln -s dir tree/link; ln -s file tree/flink
         ln -s /run tree/var/run; ln -s nowhere tree/dangling; ln -s loop tree/loop",
    );
    store.ok(&["import", "base", tree.to_str().unwrap(), "--size", "64M"]);
    store.ok(&["create", "base", "--name", "c"]);
    if mounted {
        store.mount("c");
    }
    store
}

fn files_below(dir: &Path) -> Vec<String> {
    let text = run(
        "find",
        &[dir.to_str().unwrap(), "-mindepth", "1", "-printf", "%P\n"],
    );
    let mut names: Vec<String> = text.lines().map(str::to_owned).collect();
    names.sort();
    names
}

/// What a container has at a path, by the names in a tar.
fn listed(store: &TestStore, path: &str) -> Vec<String> {
    let output = store.output(&["cp", path, "-"]);
    assert!(output.status.success(), "{path}: {output:?}");
    let mut names = tar_names(&output.stdout);
    names.sort();
    names
}

fn tar_names(tar: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap();
    entries
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect()
}

fn content(store: &TestStore, path: &str) -> String {
    let output = store.output(&["cp", path, "-"]);
    assert!(output.status.success(), "{path}: {output:?}");
    let mut archive = tar::Archive::new(output.stdout.as_slice());
    let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
    let mut text = String::new();
    entry.read_to_string(&mut text).unwrap();
    text
}

/// Runs the command with a tar as its input.
fn with_input(store: &TestStore, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = store
        .command()
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that refuses it does not read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// What is there after a copy, or what the refusal says.
type Outcome = Result<&'static [&'static str], &'static str>;

/// Source, target, and what is there then below the target's directory `out` (which has a directory
/// `there` and a file `taken`).
const NAMES: [(&str, &str, Outcome); 16] = [
    ("file", "out/new", Ok(&["new"])),
    ("file", "out", Ok(&["file"])),
    ("file", "out/", Ok(&["file"])),
    ("file", "out/there", Ok(&["there/file"])),
    ("file", "out/taken", Ok(&[])),
    ("file", "out/new/", Err("to copy into: make it first")),
    ("file", "out/no/new", Err("there is no directory")),
    ("file", "out/taken/new", Err("is no directory")),
    (
        "dir",
        "out/new",
        Ok(&["new", "new/one", "new/sub", "new/sub/two"]),
    ),
    (
        "dir",
        "out/new/",
        Ok(&["new", "new/one", "new/sub", "new/sub/two"]),
    ),
    (
        "dir/.",
        "out/new",
        Ok(&["new", "new/one", "new/sub", "new/sub/two"]),
    ),
    (
        "dir",
        "out/there",
        Ok(&[
            "there/dir",
            "there/dir/one",
            "there/dir/sub",
            "there/dir/sub/two",
        ]),
    ),
    (
        "dir/",
        "out/there",
        Ok(&[
            "there/dir",
            "there/dir/one",
            "there/dir/sub",
            "there/dir/sub/two",
        ]),
    ),
    (
        "dir/.",
        "out/there",
        Ok(&["there/one", "there/sub", "there/sub/two"]),
    ),
    ("dir", "out/taken", Err("is no directory, so the directory")),
    ("file/", "out/new", Err("is no directory")),
];

fn prepare_out(out: &Path) {
    let _ = fs::remove_dir_all(out);
    fs::create_dir_all(out.join("there")).unwrap();
    fs::write(out.join("taken"), "taken\n").unwrap();
}

fn expected(more: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = ["taken", "there"]
        .iter()
        .chain(more)
        .map(|n| (*n).into())
        .collect();
    names.sort();
    names
}

#[test]
fn out_of_a_container_the_target_is_called_as_docker_calls_it() {
    for mounted in [false, true] {
        let store = with_container(mounted);
        let out = store.path("out");
        for (source, target, outcome) in NAMES {
            prepare_out(&out);
            let arguments = ["cp", &format!("c:/{source}"), &store.arg(target)];
            match outcome {
                Ok(more) => {
                    store.ok(&arguments);
                    assert_eq!(files_below(&out), expected(more), "{source} to {target}");
                    let replaced = target == "out/taken";
                    let taken = fs::read_to_string(out.join("taken")).unwrap();
                    assert_eq!(taken, if replaced { "old\n" } else { "taken\n" });
                }
                Err(says) => {
                    let error = store.fails(&arguments);
                    assert!(error.contains(says), "{source} to {target}: {error}");
                    assert_eq!(files_below(&out), expected(&[]), "{source} to {target}");
                }
            }
        }
        if mounted {
            store.ok(&["umount", "c"]);
        }
        store.assert_nothing_runs();
    }
}

#[test]
fn into_a_container_the_target_is_called_as_docker_calls_it() {
    let store = with_container(true);
    let dir = PathBuf::from(store.json(&["ps"])[0]["mounted"]["dir"].as_str().unwrap());
    let tree = store.arg("tree");
    let out = dir.join("out");
    for (source, target, outcome) in NAMES {
        prepare_out(&out);
        // As a path from where it is started, too.
        for source in [format!("{tree}/{source}"), format!("./tree/{source}")] {
            prepare_out(&out);
            let target = format!("c:{target}");
            let output = store
                .command()
                .current_dir(store.dir.path())
                .args(["cp", &source, &target])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            match outcome {
                Ok(more) => {
                    assert!(output.status.success(), "{source} to {target}: {said}");
                    assert_eq!(files_below(&out), expected(more), "{source} to {target}");
                }
                Err(says) => {
                    assert_eq!(output.status.code(), Some(1));
                    assert!(said.contains(says), "{source} to {target}: {said}");
                    assert_eq!(files_below(&out), expected(&[]), "{source} to {target}");
                }
            }
        }
    }
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_is_not_mounted_keeps_what_was_copied_into_it() {
    let store = with_container(false);
    fs::write(store.path("new"), "new\n").unwrap();
    store.ok(&["cp", &store.arg("new"), "c:/dir"]);
    store.assert_nothing_runs();
    assert_eq!(store.ok(&["diff", "c"]), "C /dir\nA /dir/new\n");
    assert_eq!(content(&store, "c:dir/new"), "new\n");
    let report = store.json(&["cp", "c:/dir/.", &store.arg("copy")]);
    assert_eq!(
        (&report["files"], &report["directories"]),
        (&3.into(), &2.into())
    );
    store.ok(&["check", "--scrub"]);
}

// --- Links --------------------------------------------------------------------------------------

#[test]
fn links_in_a_container_lead_nowhere_out_of_it() {
    for mounted in [false, true] {
        let store = with_container(mounted);
        // They mean the container's own.
        for path in [
            "c:/abs/secret",
            "c:/rel/secret",
            "c:abs/../../../etc/secret",
        ] {
            assert_eq!(content(&store, path), "inside\n", "{path}");
        }
        let error = store.fails(&["cp", "c:/abs/shadow", "-"]);
        assert!(error.contains("there is no c:/etc/shadow"), "{error}");
        let error = store.fails(&["cp", "c:/loop/x", "-"]);
        assert!(error.contains("symbolic links"), "{error}");
        let name = format!("vellum-test-{}", std::process::id());
        fs::write(store.path(&name), "x").unwrap();
        for target in ["c:/abs", "c:/rel", "c:/var/run"] {
            store.ok(&["cp", &store.arg(&name), target]);
            assert!(!Path::new("/etc").join(&name).exists());
            assert!(!Path::new("/run").join(&name).exists());
        }
        assert!(listed(&store, "c:/etc").contains(&format!("etc/{name}")));
        assert!(listed(&store, "c:/run").contains(&format!("run/{name}")));
        // One that dangles is followed to where a file can be made.
        store.ok(&["cp", &store.arg(&name), "c:/dangling"]);
        assert_eq!(content(&store, "c:/nowhere"), "x");
        assert_eq!(content(&store, "c:/dangling"), "", "and is a link still");
        // A tar's own links, and those that are there.
        fs::create_dir_all(store.path("t/run/deep")).unwrap();
        fs::write(store.path("t/run/deep/file"), "deep\n").unwrap();
        let tar = shell(
            store.dir.path(),
            "ln -sf /etc t/out; tar -C t -cf t.tar run/deep/file out; cat t.tar",
        );
        let output = with_input(&store, &["cp", "-", "c:/var"], tar.as_bytes());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(content(&store, "c:/run/deep/file"), "deep\n");
        if mounted {
            store.ok(&["umount", "c"]);
        }
        store.assert_nothing_runs();
    }
}

#[test]
fn a_link_is_copied_as_one_unless_what_it_leads_to_is_asked_for() {
    let store = with_container(true);
    let out = store.path("out");
    fs::create_dir(&out).unwrap();
    let target = |name: &str| fs::read_link(out.join(name)).ok();
    store.ok(&["cp", "c:/flink", &store.arg("out")]);
    store.ok(&["cp", "c:/link", &store.arg("out")]);
    assert_eq!(target("flink").unwrap(), Path::new("file"));
    assert_eq!(target("link").unwrap(), Path::new("dir"));
    fs::remove_file(out.join("link")).unwrap();
    store.ok(&["cp", "-L", "c:/link", &store.arg("out")]);
    assert_eq!(fs::read_to_string(out.join("link/one")).unwrap(), "one\n");
    fs::remove_file(out.join("flink")).unwrap();
    store.ok(&["cp", "-L", "c:/flink", &store.arg("out")]);
    assert_eq!(fs::read_to_string(out.join("flink")).unwrap(), "old\n");
    // A slash asks too.
    let other = store.path("other");
    fs::create_dir(&other).unwrap();
    store.ok(&["cp", "c:/link/", &store.arg("other")]);
    assert_eq!(
        files_below(&other),
        ["link", "link/one", "link/sub", "link/sub/two"]
    );
    assert!(other.join("link").symlink_metadata().unwrap().is_dir());

    // From the host.
    symlink("tree/file", store.path("hlink")).unwrap();
    store.ok(&["cp", &store.arg("hlink"), "c:/empty"]);
    store.ok(&["cp", "-L", &store.arg("hlink"), "c:/empty/followed"]);
    assert_eq!(content(&store, "c:/empty/followed"), "old\n");
    assert_eq!(
        listed(&store, "c:/empty"),
        ["empty/", "empty/followed", "empty/hlink"]
    );
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

// --- Attributes ---------------------------------------------------------------------------------

/// All that a file is besides its name and content, for comparison.
fn attributes(path: &Path) -> String {
    let meta = path.symlink_metadata().unwrap();
    let mut xattrs: Vec<_> = xattr::list(path)
        .unwrap()
        .filter(|name| !name.to_string_lossy().starts_with("security.selinux"))
        .map(|name| (name.clone(), xattr::get(path, &name).unwrap()))
        .collect();
    xattrs.sort();
    format!(
        "{:o} {}:{} {}.{:09} {} {:?} {xattrs:?}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.rdev(),
        meta.file_type()
            .is_symlink()
            .then(|| fs::read_link(path).unwrap()),
    )
}

/// A tree with one of everything.
fn make_zoo(zoo: &Path) {
    fs::create_dir_all(zoo.join("dir/inner")).unwrap();
    let file = zoo.join("file");
    fs::write(&file, "content\n").unwrap();
    fs::hard_link(&file, zoo.join("dir/same")).unwrap();
    xattr::set(&file, "user.colour", b"green").unwrap();
    symlink("../file", zoo.join("dir/link")).unwrap();
    let tool = zoo.join("tool");
    fs::write(&tool, "#!/bin/sh\n").unwrap();
    // cap_net_raw=ep
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    for path in [&file, &tool] {
        std::os::unix::fs::chown(path, Some(1234), Some(4321)).unwrap();
    }
    fs::set_permissions(&tool, Permissions::from_mode(0o6755)).unwrap();
    xattr::set(&tool, "security.capability", &capability).unwrap();
    let sparse = File::create(zoo.join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (50 << 20) - 3).unwrap();
    let node = |name: &str, kind, device| {
        mknod(
            &zoo.join(name),
            kind,
            Mode::from_bits_truncate(0o640),
            device,
        )
        .unwrap();
    };
    node("fifo", SFlag::S_IFIFO, 0);
    node("null", SFlag::S_IFCHR, makedev(1, 3));
    std::os::unix::fs::chown(zoo.join("dir"), Some(7), Some(8)).unwrap();
    fs::set_permissions(zoo.join("dir"), Permissions::from_mode(0o1770)).unwrap();
    // From the inside out, since making files changes those of directories.
    for name in ["file", "tool", "sparse", "dir/inner", "dir", ""] {
        let time = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        let file = File::open(zoo.join(name)).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
    }
}

#[test]
fn with_archive_all_that_belongs_to_files_goes_in_and_comes_out_again() {
    for mounted in [false, true] {
        let store = with_container(mounted);
        let zoo = store.path("zoo");
        make_zoo(&zoo);
        store.ok(&["cp", "-a", &store.arg("zoo"), "c:/empty"]);
        store.ok(&["cp", "-a", "c:/empty/zoo", &store.arg("back")]);
        let back = store.path("back");
        assert_eq!(files_below(&back), files_below(&zoo));
        for name in files_below(&zoo).iter().map(String::as_str).chain([""]) {
            assert_eq!(
                attributes(&back.join(name)),
                attributes(&zoo.join(name)),
                "{name}"
            );
        }
        let inode = |name: &str| back.join(name).metadata().unwrap().ino();
        assert_eq!(inode("file"), inode("dir/same"));
        let sparse = back.join("sparse").metadata().unwrap();
        assert_eq!(sparse.len(), 50 << 20);
        assert!(
            sparse.blocks() * 512 < 1 << 20,
            "{} blocks",
            sparse.blocks()
        );
        assert!(fs::read(back.join("sparse")).unwrap().ends_with(b"\0end"));
        // GNU tar agrees.
        let tar = store.output(&["cp", "c:/empty/zoo/.", "-"]);
        let third = store.path("third");
        fs::create_dir(&third).unwrap();
        fs::write(store.path("zoo.tar"), &tar.stdout).unwrap();
        shell(
            store.dir.path(),
            "tar --xattrs --xattrs-include='*' -xpf zoo.tar -C third",
        );
        for name in files_below(&zoo) {
            assert_eq!(
                attributes(&third.join(&name)),
                attributes(&zoo.join(&name)),
                "{name}"
            );
        }
        if mounted {
            store.ok(&["umount", "c"]);
        }
        store.assert_nothing_runs();
    }
}

#[test]
fn without_archive_files_are_roots_inside_and_ours_outside_and_do_nothing_for_a_new_owner() {
    let store = with_container(true);
    let mount = PathBuf::from(store.json(&["ps"])[0]["mounted"]["dir"].as_str().unwrap());
    make_zoo(&store.path("zoo"));
    let own = store.path("zoo/roots");
    fs::write(&own, "").unwrap();
    fs::set_permissions(&own, Permissions::from_mode(0o4755)).unwrap();
    store.ok(&["cp", &store.arg("zoo"), "c:/empty"]);
    let inside = mount.join("empty/zoo");
    let tool = inside.join("tool");
    let meta = tool.metadata().unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (0, 0, 0o755)
    );
    assert_eq!(xattr::get(&tool, "security.capability").unwrap(), None);
    assert_eq!(
        inside.join("roots").metadata().unwrap().mode() & 0o7777,
        0o4755
    );
    assert_eq!(
        xattr::get(inside.join("file"), "user.colour")
            .unwrap()
            .unwrap(),
        b"green"
    );
    assert!(
        inside
            .join("null")
            .metadata()
            .unwrap()
            .file_type()
            .is_char_device()
    );

    // A device of the container would be the host's outside.
    std::os::unix::fs::chown(&tool, Some(99), Some(99)).unwrap();
    fs::set_permissions(&tool, Permissions::from_mode(0o4755)).unwrap();
    let output = store.output(&["cp", "c:/empty/zoo", &store.arg("back")]);
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("zoo/null") || said.contains("back/null"),
        "{said}"
    );
    let back = store.path("back");
    assert!(!back.join("null").exists());
    assert!(
        back.join("fifo")
            .symlink_metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let meta = back.join("tool").metadata().unwrap();
    let ours = nix::unistd::geteuid().as_raw();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (ours, 0o755));
    store.ok(&["umount", "c"]);
}

// --- Tars ---------------------------------------------------------------------------------------

#[test]
fn tars_that_others_write_are_unpacked_plain_and_compressed_and_what_is_none_is_refused() {
    let store = with_container(false);
    let dir = store.dir.path();
    let tar = |script: &str| {
        shell(dir, &format!("{script} > t"));
        fs::read(store.path("t")).unwrap()
    };
    shell(
        dir,
        "mkdir -p t1/a; echo x > t1/a/f; chown 11:12 t1/a/f; ln t1/a/f t1/a/g",
    );
    for (script, name) in [
        ("tar -C t1 -c .", "plain"),
        ("tar -C t1 -cz .", "gzip"),
        ("tar -C t1 -c --zstd .", "zstd"),
        ("tar -C t1 -c --format=v7 a", "v7"),
    ] {
        shell(dir, &format!("mkdir -p tree/{name}"));
        store.ok(&["cp", &store.arg(&format!("tree/{name}")), "c:/empty"]);
        let output = with_input(
            &store,
            &["cp", "-", &format!("c:/empty/{name}")],
            &tar(script),
        );
        assert!(output.status.success(), "{name}: {output:?}");
        let tar = store
            .output(&["cp", &format!("c:/empty/{name}/a/f"), "-"])
            .stdout;
        let mut archive = tar::Archive::new(tar.as_slice());
        let entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(
            (entry.header().uid().unwrap(), entry.header().gid().unwrap()),
            (11, 12)
        );
    }
    let whole = tar("tar -C t1 -c .");
    let refused = |target: &str, input: &[u8], says: &str| {
        let output = with_input(&store, &["cp", "-", target], input);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{target}: {said}");
        assert!(said.contains(says), "{target}: {said}");
        store.assert_nothing_runs();
    };
    refused("c:/file", &whole, "is no directory");
    refused("c:/none", &whole, "is no directory");
    refused("c:/none/x", &whole, "there is no directory");
    refused("c:/empty", b"", "nothing came");
    refused("c:/empty", b"this is no tar at all", "cut off");
    // In the content of a file, and in the header of its other name.
    refused("c:/empty", &whole[..1537], "cut off");
    refused("c:/empty", &whole[..2300], "cut off");
    refused("c:/empty", &tar("tar -C t1 -cJ ."), "xz -d");
    refused(
        "c:/empty",
        &tar("tar -C t1/a -cP ../../t1/a/f"),
        "it has a \"..\"",
    );
    // A file does not take a directory's place, nor a directory a file's.
    shell(
        dir,
        "mkdir -p t2 t3/file; echo x > t2/dir; echo x > t3/file/x",
    );
    refused("c:/", &tar("tar -C t2 -c dir"), "a directory is there");
    refused("c:/", &tar("tar -C t3 -c file/x"), "is no directory");
    refused("c:/", &tar("tar -C t3 -c file"), "no directory is there");
    assert_eq!(content(&store, "c:/file"), "old\n");
    assert!(listed(&store, "c:/dir").contains(&"dir/one".to_owned()));
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_tar_goes_from_one_container_to_another_through_a_pipe_and_names_are_those_of_the_path() {
    let store = with_container(false);
    store.ok(&["create", "base", "--name", "d"]);
    assert_eq!(
        listed(&store, "c:/dir"),
        ["dir/", "dir/one", "dir/sub/", "dir/sub/two"]
    );
    assert_eq!(listed(&store, "c:/dir/."), ["./", "one", "sub/", "sub/two"]);
    assert_eq!(listed(&store, "c:file"), ["file"]);
    assert!(listed(&store, "c:/").contains(&"dir/sub/two".to_owned()));
    let tar = store.output(&["cp", "c:/dir", "-"]).stdout;
    let output = with_input(&store, &["cp", "-", "d:/empty"], &tar);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(content(&store, "d:/empty/dir/sub/two"), "two\n");
    for (command, says) in [
        (&["cp", "c:/dir", "d:/empty"][..], "vellum cp - B:DIR"),
        (&["cp", "a", "b"], "neither is in a container"),
        (&["cp", "-", "-"], "neither is in a container"),
        (&["cp", "c:", "-"], "names no path"),
        (&["cp", "none:/x", "-"], "there is no container none"),
    ] {
        let error = store.fails(command);
        assert!(error.contains(says), "{command:?}: {error}");
    }
    // A reader that has seen enough is no failure.
    let script = format!(
        "'{}' --root '{}' cp c:/ - | head -c 1000 > /dev/null",
        crate::common::VELLUM,
        store.root.display()
    );
    run("bash", &["-o", "pipefail", "-c", &script]);
    store.assert_nothing_runs();
}

// --- While others are at it ---------------------------------------------------------------------

#[test]
fn files_that_come_and_go_while_a_container_is_copied_are_in_the_copy_or_not() {
    let store = with_container(true);
    let mount = PathBuf::from(store.json(&["ps"])[0]["mounted"]["dir"].as_str().unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = (0..2)
        .map(|number| {
            let (dir, stop) = (mount.join("empty"), stop.clone());
            std::thread::spawn(move || {
                let mut round = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let name = dir.join(format!("d{number}-{}", round % 7));
                    fs::create_dir(&name).unwrap();
                    fs::write(name.join("file"), "x").unwrap();
                    fs::remove_dir_all(&name).unwrap();
                    round += 1;
                }
            })
        })
        .collect();
    for round in 0..30 {
        let target = store.path(&format!("copy{round}"));
        store.ok(&["cp", "c:/", target.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(target.join("dir/one")).unwrap(), "one\n");
    }
    stop.store(true, Ordering::Relaxed);
    others.into_iter().for_each(|other| other.join().unwrap());
    store.ok(&["umount", "c"]);
}

#[test]
fn a_directory_is_not_copied_into_itself() {
    let store = with_container(false);
    let dir = store.path("mnt");
    fs::create_dir(&dir).unwrap();
    store.ok(&["mount", "c", dir.to_str().unwrap()]);
    let error = store.fails(&["cp", "c:/", &store.arg("mnt/empty")]);
    assert!(error.contains("cannot be copied into itself"), "{error}");
    let error = store.fails(&["cp", &store.arg("mnt/."), "c:/empty/new"]);
    assert!(error.contains("cannot be copied into itself"), "{error}");
    store.ok(&["umount", "c"]);
}

#[test]
fn what_is_served_over_nbd_or_has_no_files_is_refused() {
    let store = with_container(false);
    let (server, _) = store.serve("c");
    for arguments in [["cp", "c:/file", "-"], ["cp", "/etc/hostname", "c:/"]] {
        let error = store.fails(&arguments);
        assert!(error.contains("served over NBD by process"), "{error}");
    }
    server.end();
    let raw = store.path("raw.img");
    File::create(&raw).unwrap().set_len(1 << 20).unwrap();
    store.ok(&["import", "raw", raw.to_str().unwrap(), "--format", "raw"]);
    store.ok(&["create", "raw", "--name", "disk"]);
    let error = store.fails(&["cp", "disk:/x", "-"]);
    assert!(error.contains("holds no ext4"), "{error}");
}

#[test]
fn a_copy_that_waits_for_its_pipe_ends_with_a_signal_and_leaves_nothing_mounted() {
    let store = with_container(false);
    // Longer than a pipe is.
    fs::write(store.path("large"), vec![1; 4 << 20]).unwrap();
    store.ok(&["cp", &store.arg("large"), "c:/empty"]);
    for arguments in [["cp", "-", "c:/empty"], ["cp", "c:/empty/large", "-"]] {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
            let child = start(&store, &arguments);
            wait_until("it is mounted", || {
                !store.leftovers().is_empty() && listens(&child)
            });
            wait_until("its file system is there", || {
                store
                    .leftovers()
                    .iter()
                    .any(|left| left.starts_with("mounted:"))
            });
            send(&child, signal);
            if signal == Signal::SIGKILL {
                drop(Running(child));
                // The next command takes over.
                assert_eq!(content(&store, "c:/file"), "old\n");
            } else {
                let output = end(child, "a copy that waits");
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(128 + signal as i32), "{said}");
            }
            store.assert_nothing_runs();
        }
    }
    store.ok(&["check", "--scrub"]);
}
