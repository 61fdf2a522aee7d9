//! Import of what real tools make: archives, layouts, roots, disk images.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;
#[path = "image_support/mod.rs"]
mod image_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{SIZE, TestStore, run, shell};
use image_support::snapshot;

/// A root with one of each: modes, links, times, a capability.
fn sample_root(store: &TestStore) -> PathBuf {
    let root = store.path("sample");
    fs::create_dir(&root).unwrap();
    shell(
        &root,
        "mkdir -p etc usr/bin var/empty
         echo hello > etc/motd
         head -c 300000 /dev/urandom > usr/bin/tool
         chmod 4755 usr/bin/tool
         ln usr/bin/tool usr/bin/same
         ln -s ../etc/motd var/link
         mknod var/null c 1 3
         mkfifo var/fifo
         chown 12:34 etc/motd
         truncate -s 10M var/sparse
         setfattr -n user.note -v kept etc/motd
         touch -d '2001-02-03 04:05:06.789' etc/motd
         touch -h -d '2002-01-01' var/link
         chmod 700 var/empty
         touch -d '2003-01-01' etc usr/bin usr var .",
    );
    root
}

/// Mounts a new container of an image, describes its files, and removes it.
fn files_of(store: &TestStore, image: &str) -> image_support::Snapshot {
    store.ok(&["create", image, "--name", "look"]);
    let dir = store.mount("look");
    let mut found = snapshot(&dir);
    // What every ext4 has.
    found.retain(|path, _| !path.starts_with("lost+found"));
    store.ok(&["umount", "look"]);
    store.ok(&["rm", "look"]);
    found
}

fn without_root(mut snapshot: image_support::Snapshot) -> image_support::Snapshot {
    snapshot.remove(Path::new(""));
    snapshot
}

#[test]
fn a_root_comes_out_the_same_from_a_directory_and_every_kind_of_tar() {
    let store = TestStore::new();
    let root = sample_root(&store);
    let expected = without_root(snapshot(&root));
    shell(
        store.dir.path(),
        "tar --xattrs --xattrs-include='*' --numeric-owner --format=posix --sort=name -C sample -cf root.tar .
         gzip -k root.tar
         zstd -q root.tar",
    );
    let mut images = Vec::new();
    for (name, source) in [
        ("dir", store.arg("sample")),
        ("tar", store.arg("root.tar")),
        ("gz", store.arg("root.tar.gz")),
        ("zst", store.arg("root.tar.zst")),
    ] {
        store.ok(&["import", name, &source, "--size", SIZE]);
        images.push(name);
    }
    for (name, file) in [("stdin", "root.tar"), ("stdin-zst", "root.tar.zst")] {
        let output = store
            .command()
            .args(["import", name, "-", "--size", SIZE])
            .stdin(Stdio::from(fs::File::open(store.path(file)).unwrap()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        images.push(name);
    }
    for image in images {
        assert_eq!(without_root(files_of(&store, image)), expected, "{image}");
    }
    store.ok(&["check", "--scrub"]);
}

/// An OCI layout with two layers, the second of which deletes, and steps without layers.
fn make_layout(store: &TestStore) {
    let base = sample_root(store);
    fs::rename(base, store.path("base")).unwrap();
    shell(
        store.dir.path(),
        "umoci init --layout layout
         umoci new --image layout:one
         umoci unpack --image layout:one bundle
         cp -a base/. bundle/rootfs/
         umoci repack --image layout:one bundle
         umoci config --image layout:one --config.env A=b --config.cmd /bin/sh \
            --config.workingdir /var --config.label who=me
         rm -rf bundle
         umoci unpack --image layout:one bundle
         rm bundle/rootfs/etc/motd
         rm -r bundle/rootfs/var/empty
         echo more > bundle/rootfs/etc/more
         umoci repack --image layout:two bundle
         umoci config --image layout:two --config.user 12:34",
    );
}

#[test]
fn images_share_layers_and_say_so_and_whiteouts_delete() {
    let store = TestStore::new();
    make_layout(&store);
    let layout = store.arg("layout");
    store.ok(&["import", "one", &layout, "--select", "one", "--size", SIZE]);
    let (layers, disk) = (store.layers().len(), store.disk_usage());

    let output = store.output(&["import", "two", &layout, "--select", "two", "--size", SIZE]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(
        errors.matches("Layer already exists").count(),
        1,
        "{errors}"
    );
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("2 layers, 1 of them there already"), "{text}");
    assert_eq!(store.layers().len(), layers + 1);

    let grown = store.disk_usage() - disk;
    assert!(grown < 512 << 10, "the second takes {grown} bytes more");
    let before = store.disk_usage();
    let again = store.json(&[
        "import", "again", &layout, "--select", "two", "--size", SIZE,
    ]);
    assert!(
        again["layers"]
            .as_array()
            .unwrap()
            .iter()
            .all(|l| l["existed"] == true)
    );
    let grown = store.disk_usage() - before;
    assert!(grown <= 16 << 10, "the same again takes {grown} bytes more");

    let (one, two) = (files_of(&store, "one"), files_of(&store, "two"));
    let motd = Path::new("etc/motd");
    assert!(one.contains_key(motd) && !two.contains_key(motd));
    assert!(!two.contains_key(Path::new("var/empty")));
    assert!(two.contains_key(Path::new("etc/more")));
    let tool = Path::new("usr/bin/tool");
    assert_eq!(one[tool], two[tool]);

    let config = &store.json(&["inspect", "two"])[0]["image"]["config"];
    let text = config.to_string();
    for kept in ["A=b", "/bin/sh", "/var", "who", "12:34"] {
        assert!(text.contains(kept), "{kept}: {text}");
    }
    let steps = store.json(&["history", "two"]);
    let steps = steps.as_array().unwrap();
    assert!(
        steps.iter().any(|step| step["layer"].is_null()),
        "{steps:?}"
    );
    let made = steps.iter().filter(|step| !step["layer"].is_null()).count();
    assert_eq!(made, 3, "the file system and two layers: {steps:?}");

    // What is shared stays until the last user is gone.
    store.ok(&["rmi", "one", "again"]);
    assert_eq!(files_of(&store, "two"), two);
    store.ok(&["rmi", "two"]);
    store.ok(&["prune"]);
    assert_eq!(store.layers(), Vec::<String>::new());
}

#[test]
fn the_same_image_is_recognised_in_every_wrapping() {
    let store = TestStore::new();
    make_layout(&store);
    shell(
        store.dir.path(),
        "skopeo copy -q oci:layout:two oci-archive:oci.tar:two
         skopeo copy -q oci:layout:two docker-archive:docker.tar:two:latest",
    );
    let layout = store.arg("layout");
    store.ok(&[
        "import", "layout", &layout, "--select", "two", "--size", SIZE,
    ]);
    let expected = files_of(&store, "layout");
    for (name, file) in [("oci", "oci.tar"), ("docker", "docker.tar")] {
        let report = store.json(&["import", name, &store.arg(file), "--size", SIZE]);
        let layers = report["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        assert!(
            layers.iter().all(|layer| layer["existed"] == true),
            "{name}: {report}"
        );
        assert_eq!(files_of(&store, name), expected, "{name}");
    }
    store.ok(&["check", "--scrub"]);
}

#[test]
fn from_adds_a_layer_to_an_image() {
    let store = TestStore::new();
    store.small_image("base");
    let layers = store.layers();
    let more = store.path("more");
    fs::create_dir_all(more.join("opt")).unwrap();
    fs::write(more.join("opt/app"), "app").unwrap();
    shell(store.dir.path(), "tar -C more -cf more.tar .");
    store.ok(&["import", "app", &store.arg("more.tar"), "--from", "base"]);
    assert_eq!(store.layers().len(), layers.len() + 1);
    let files = files_of(&store, "app");
    assert!(files.contains_key(Path::new("opt/app")));
    assert!(files.contains_key(Path::new("etc/hostname")));
    assert!(!files_of(&store, "base").contains_key(Path::new("opt/app")));
    let error = store.fails(&["import", "x", &store.arg("more.tar"), "--from", "none"]);
    assert!(error.contains("no image none"), "{error}");
}

#[test]
fn a_raw_ext4_image_mounts_and_one_that_is_not_ext4_is_for_nbd_alone() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        "mkdir tree; echo raw > tree/file
         truncate -s 32M disk.raw; mke2fs -q -t ext4 -d tree disk.raw
         head -c 1M /dev/urandom > noise.raw",
    );
    store.ok(&["import", "disk", &store.arg("disk.raw")]);
    store.ok(&["create", "disk", "--name", "c"]);
    let dir = store.mount("c");
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "raw\n");
    fs::write(dir.join("file"), "changed\n").unwrap();
    store.ok(&["umount", "c"]);

    store.ok(&["import", "noise", &store.arg("noise.raw")]);
    store.ok(&["create", "noise", "--name", "n"]);
    let error = store.fails(&["mount", "n"]);
    assert!(error.contains("vellum nbd n"), "{error}");
    store.ok(&["check", "--scrub"]);
}

#[test]
fn an_import_that_fails_leaves_nothing() {
    let store = TestStore::new();
    let root = sample_root(&store);
    shell(
        store.dir.path(),
        "tar -C sample -cf root.tar .; head -c 200000 root.tar > cut.tar",
    );
    let error = store.fails(&["import", "cut", &store.arg("cut.tar"), "--size", SIZE]);
    assert!(error.contains("cut.tar"), "{error}");
    assert!(store.names("images").is_empty());
    fs::write(root.join("big"), vec![1; 80 << 20]).unwrap();
    let error = store.fails(&["import", "full", &store.arg("sample"), "--size", SIZE]);
    assert!(error.contains("No space left"), "{error}");
    store.ok(&["prune"]);
    store.ok(&["check"]);
    assert_eq!(store.layers(), Vec::<String>::new());
    store.assert_nothing_runs();
}

/// A Debian root, made once and kept beside the build.
fn debian_tar() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-bookworm.tar");
    if !path.exists() {
        let unfinished = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let target = unfinished.path().display().to_string();
        let arguments = [
            "--quiet",
            "--variant=minbase",
            "--format=tar",
            "bookworm",
            &target,
        ];
        run("mmdebstrap", &arguments);
        unfinished.persist(&path).unwrap();
    }
    path
}

#[test]
fn a_debian_root_is_the_same_file_by_file() {
    let store = TestStore::under(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let tar = debian_tar().display().to_string();
    store.ok(&["import", "debian", &tar, "--size", "2G"]);
    let extracted = store.arg("extracted");
    fs::create_dir(&extracted).unwrap();
    run(
        "tar",
        &[
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-xpf",
            &tar,
            "-C",
            &extracted,
        ],
    );
    let expected = snapshot(Path::new(&extracted));
    let found = files_of(&store, "debian");
    assert!(expected.len() > 5000, "{} files", expected.len());
    assert!(expected.values().any(|line| line.contains("mode 4755")));
    let differ: Vec<_> = expected
        .keys()
        .chain(found.keys())
        .filter(|path| expected.get(*path) != found.get(*path))
        .map(|path| (path, expected.get(path), found.get(path)))
        .take(10)
        .collect();
    assert!(differ.is_empty(), "{differ:#?}");
    store.ok(&["check", "--scrub"]);
}
