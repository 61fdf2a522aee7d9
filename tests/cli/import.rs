//! Import of what real tools make: archives, layouts, roots, disk images.

use crate::image_support;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::{SIZE, TestStore, run, shell};
use crate::image_support::snapshot;

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
    let mut found = store.look(image, snapshot);
    // What every ext4 has.
    found.retain(|path, _| !path.starts_with("lost+found"));
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
pub fn make_layout(store: &TestStore) {
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

    let noise = store.arg("noise.raw");
    let error = store.fails(&["import", "noise", &noise]);
    assert!(error.contains("--format raw"), "{error}");
    store.ok(&["import", "noise", &noise, "--format", "raw"]);
    store.ok(&["create", "noise", "--name", "n"]);
    let error = store.fails(&["mount", "n"]);
    assert!(error.contains("vellum nbd n"), "{error}");
    store.ok(&["check", "--scrub"]);
}

/// The bytes of a disk image, read back over NBD.
fn exported(store: &TestStore, name: &str) -> Vec<u8> {
    let (server, socket) = store.serve(name);
    let copy = store.path("exported");
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    run("nbdcopy", &[uri.as_str(), copy.to_str().unwrap()]);
    server.end();
    fs::read(copy).unwrap()
}

#[test]
fn a_disk_keeps_its_size_to_the_sector_and_a_block_device_its_content() {
    let store = TestStore::new();
    for extra in [0, 512, 1024, 3584] {
        let name = format!("d{extra}");
        // A partition table, and bytes in the last sector, where GPT has its second one.
        let mut source = vec![0; (32 << 20) + extra];
        source[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
        source[510..512].copy_from_slice(&[0x55, 0xaa]);
        let end = source.len();
        source[end - 512..].fill(7);
        fs::write(store.path(&name), &source).unwrap();
        let text = store.ok(&["import", &name, &store.arg(&name)]);
        assert!(text.contains("partition table of type dos"), "{text}");
        assert!(exported(&store, &name) == source, "{name}");
        // A container is as large, unless it is made larger.
        store.ok(&["create", &name, "--name", &format!("c{extra}")]);
        assert!(exported(&store, &format!("c{extra}")) == source, "{name}");
        store.ok(&[
            "create",
            &name,
            "--name",
            &format!("l{extra}"),
            "--size",
            "40M",
        ]);
        assert_eq!(exported(&store, &format!("l{extra}")).len(), 40 << 20);
        let error = store.fails(&["mount", &format!("c{extra}")]);
        assert!(error.contains("partition table of type dos"), "{error}");
        assert!(error.contains("vellum nbd"), "{error}");
    }
    // What a commit makes has the size of what it was made from.
    store.ok(&["commit", "c512", "again"]);
    assert!(exported(&store, "again") == fs::read(store.path("d512")).unwrap());

    let device = run("losetup", &["-f", "--show", &store.arg("d512")]);
    let device = Detach(device.trim().to_owned());
    store.ok(&["import", "device", &device.0]);
    assert!(exported(&store, "device") == fs::read(store.path("d512")).unwrap());
    store.ok(&["check", "--scrub"]);
}

/// A loop device that goes when it is dropped.
struct Detach(String);

impl Drop for Detach {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["-d", &self.0])
            .status();
    }
}

#[test]
fn every_ext_file_system_mounts_and_grows_where_it_can_be_grown() {
    let store = TestStore::new();
    shell(store.dir.path(), "mkdir tree; echo raw > tree/file");
    for (name, options, grows) in [
        ("ext2", "-t ext2", true),
        ("ext3", "-t ext3", true),
        ("small-blocks", "-t ext4 -b 1024", true),
        ("bigalloc", "-t ext4 -O bigalloc", false),
    ] {
        shell(
            store.dir.path(),
            &format!("truncate -s 100M {name}; mke2fs -q -F {options} -d tree {name} 2>/dev/null"),
        );
        store.ok(&["import", name, &store.arg(name)]);
        if !grows {
            for arguments in [
                &["create", name, "--size", "200M"][..],
                &["import", "larger", &store.arg(name), "--size", "200M"],
            ] {
                let error = store.fails(arguments);
                assert!(
                    error.contains("bigalloc") && error.contains("--size"),
                    "{error}"
                );
            }
        }
        let size: &[&str] = if grows { &["--size", "200M"] } else { &[] };
        store.ok(&[&["create", name, "--name", name][..], size].concat());
        let dir = store.mount(name);
        assert_eq!(
            fs::read_to_string(dir.join("file")).unwrap(),
            "raw\n",
            "{name}"
        );
        let stat = nix::sys::statvfs::statvfs(&dir).unwrap();
        let bytes = stat.blocks() * stat.fragment_size();
        assert_eq!(bytes > 150 << 20, grows, "{name}: {bytes}");
        fs::write(dir.join("more"), vec![7; 1 << 20]).unwrap();
        store.ok(&["umount", name]);
        let image = exported(&store, name);
        fs::write(store.path("check"), image).unwrap();
        run("e2fsck", &["-fn", &store.arg("check")]);
    }
}

#[test]
fn a_file_system_that_cannot_be_grown_is_mounted_as_it_is() {
    let store = TestStore::new();
    // Smaller than its disk, so that the first mount would grow it.
    shell(
        store.dir.path(),
        "truncate -s 100M disk; mke2fs -q -F -t ext4 -O bigalloc disk 2>/dev/null; truncate -s 150M disk",
    );
    store.ok(&["import", "disk", &store.arg("disk")]);
    store.ok(&["create", "disk", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("file"), "x").unwrap();
    store.ok(&["umount", "c"]);
    fs::write(store.path("check"), exported(&store, "c")).unwrap();
    run("e2fsck", &["-fn", &store.arg("check")]);
}

#[test]
fn a_full_image_says_which_limit_it_reached_and_what_to_do() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        "mkdir big many; head -c 80000000 /dev/urandom > big/file
         i=0; while [ $i -lt 5000 ]; do : > many/$i; i=$((i+1)); done
         tar -cf big.tar big; tar -cf many.tar many",
    );
    for (source, what) in [
        ("big", "is full"),
        ("big.tar", "is full"),
        ("many", "inodes"),
        ("many.tar", "inodes"),
    ] {
        let error = store.fails(&["import", "x", &store.arg(source), "--size", SIZE]);
        assert!(
            error.contains(what) && error.contains("--size"),
            "{source}: {error}"
        );
    }
    // Without --size there is room.
    store.ok(&["import", "many", &store.arg("many.tar")]);
    store.small_image("base");
    let error = store.fails(&["import", "x", &store.arg("big.tar"), "--from", "base"]);
    assert!(error.contains("--from"), "{error}");
}

#[test]
fn attributes_larger_than_a_block_and_acls_of_a_tar_come_along() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        "mkdir tree; echo x > tree/large; echo x > tree/acl
         setfattr -n user.large -v \"$(head -c 30000 /dev/zero | tr '\\0' v)\" tree/large 2>/dev/null ||
             echo none > no-large
         setfacl -m u:1000:r,g:12:w tree/acl; getfacl -nc tree/acl > expected
         tar --acls --numeric-owner -C tree -cf acls.tar .",
    );
    if store.path("no-large").exists() {
        // The file system of the tests has no room for it: the tar is made by hand.
        use image_support::Tar;
        use tar_core::EntryType;
        let value = "v".repeat(30_000);
        let record = format!(" SCHILY.xattr.user.large={value}\n");
        let length = record.len() + 5;
        let record = format!("{length}{record}");
        assert_eq!(record.len(), length);
        let mut pax = Tar::entry(EntryType::XHeader, "pax", 0o644);
        pax.size(record.len() as u64).unwrap();
        let tar = Tar::new()
            .raw(pax, record.as_bytes())
            .file("large", "x")
            .end();
        fs::write(store.path("xattrs.tar"), tar).unwrap();
    } else {
        shell(
            store.dir.path(),
            "tar --xattrs --xattrs-include='*' -C tree -cf xattrs.tar large",
        );
    }
    store.ok(&["import", "xattrs", &store.arg("xattrs.tar"), "--size", SIZE]);
    store.ok(&["import", "acls", &store.arg("acls.tar"), "--size", SIZE]);
    store.ok(&["create", "xattrs", "--name", "x"]);
    let dir = store.mount("x");
    let value = xattr::get(dir.join("large"), "user.large")
        .unwrap()
        .unwrap();
    assert_eq!(value, "v".repeat(30_000).into_bytes());
    // The container can set its own as well.
    xattr::set(dir.join("large"), "user.other", &[7; 50_000]).unwrap();
    store.ok(&["create", "acls", "--name", "a"]);
    let dir = store.mount("a");
    let found = run("getfacl", &["-nc", dir.join("acl").to_str().unwrap()]);
    assert_eq!(found, fs::read_to_string(store.path("expected")).unwrap());
}

#[test]
fn a_step_of_the_history_stands_beside_its_own_layer_whatever_the_image_says() {
    let store = TestStore::new();
    for (name, history) in [
        ("none", "[]"),
        ("short", r#"[{"created_by":"ADD one"}]"#),
        (
            "long",
            r#"[{"created_by":"ADD one"},{"created_by":"ADD two"},{"created_by":"ENV A=1"}]"#,
        ),
    ] {
        docker_archive(&store, name, history);
        store.ok(&["import", name, &store.arg(name), "--size", SIZE]);
        let steps = store.json(&["history", name]);
        let made: Vec<_> = steps
            .as_array()
            .unwrap()
            .iter()
            .filter(|step| !step["layer"].is_null())
            .collect();
        assert_eq!(made.len(), 3, "{name}: {steps}");
        for (step, (by, least)) in made.iter().rev().zip([
            ("empty ext4", 0),
            ("ADD one", 3 << 20),
            ("ADD two", 1 << 20),
        ]) {
            let size = step["size"].as_u64().unwrap();
            assert!(
                size >= least && (least == 0 || size < 2 * least),
                "{name}: {steps}"
            );
            let said = step["created_by"].as_str().unwrap_or_default();
            assert!(said.is_empty() || said.contains(by), "{name}: {steps}");
        }
        // Twice from one container, so that a commit's layer lies below another's.
        store.ok(&["create", name, "--name", name]);
        let (first, second) = (format!("{name}-1"), format!("{name}-2"));
        store.ok(&["commit", name, &first]);
        let report = store.json(&["commit", name, &second]);
        let steps = store.json(&["history", &second]);
        let top = &steps[0];
        assert_eq!(top["layer"], report["layer"], "{name}: {steps}");
        assert!(
            top["created_by"].as_str().unwrap().contains("commit"),
            "{steps}"
        );
    }
}

/// A Docker archive of two layers, of three and one megabytes, with this history.
fn docker_archive(store: &TestStore, name: &str, history: &str) {
    use image_support::Tar;
    use sha2::Digest;
    let layers = [(3, "one"), (1, "two")].map(|(megabytes, file)| {
        let content: Vec<u8> = (0..megabytes << 20)
            .map(|i: u32| (i / 7) as u8 | 1)
            .collect();
        Tar::new().bytes(file, &content).end()
    });
    let ids = layers.each_ref().map(|layer| {
        let sum = sha2::Sha256::digest(layer);
        let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    });
    let history: serde_json::Value = serde_json::from_str(history).unwrap();
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "history": history,
        "rootfs": {"type": "layers", "diff_ids": ids}});
    let manifest = serde_json::json!([{"Config": "c", "Layers": ["0.tar", "1.tar"]}]);
    let tar = Tar::new()
        .file("c", &config.to_string())
        .bytes("0.tar", &layers[0])
        .bytes("1.tar", &layers[1])
        .file("manifest.json", &manifest.to_string());
    fs::write(store.path(name), tar.end()).unwrap();
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
    assert!(
        error.contains("No space left") && error.contains("--size"),
        "{error}"
    );
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
