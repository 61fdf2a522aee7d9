//! Images and containers as files that other programs read: qemu-img, GNU tar, skopeo and umoci say whether
//! they are what they should be, and imported again they are what they were.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::common::{SIZE, TestStore, VELLUM, run, shell};
use crate::image_support::{Snapshot, assert_same, make_rich_tree, snapshot};

/// An image `base` of a root with one of everything, an image `next` on it, and a container `c` of that,
/// which has its own changes and discarded some of what lies below.
fn prepared() -> TestStore {
    prepared_without(&[])
}

fn prepared_without(names: &[&str]) -> TestStore {
    let store = TestStore::new();
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    make_rich_tree(&root);
    for name in names {
        fs::remove_file(root.join(name)).unwrap();
    }
    fs::write(root.join("gone"), vec![9; 3 << 20]).unwrap();
    fs::write(root.join("etc/old"), "old\n").unwrap();
    store.ok(&["import", "base", &store.arg("root"), "--size", "256M"]);
    store.ok(&["create", "base", "--name", "b"]);
    let dir = store.mount("b");
    fs::write(dir.join("etc/next"), vec![5; 200_000]).unwrap();
    fs::remove_file(dir.join("etc/old")).unwrap();
    store.ok(&["commit", "b", "next"]);
    store.ok(&["umount", "b"]);
    store.ok(&["rm", "b"]);
    store.ok(&["create", "next", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("etc/mine"), vec![6; 70_001]).unwrap();
    fs::write(dir.join("etc/next"), "other\n").unwrap();
    fs::remove_file(dir.join("gone")).unwrap();
    run("fstrim", &[&dir]);
    store.ok(&["umount", "c"]);
    store
}

/// The files of an image or container, without what every ext4 has.
fn files_of(store: &TestStore, name: &str) -> Snapshot {
    let is_container = store.names("ps").iter().any(|there| there == name);
    if !is_container {
        store.ok(&["create", name, "--name", "look"]);
    }
    let container = if is_container { name } else { "look" };
    let dir = store.mount(container);
    let mut found = snapshot(&dir);
    found.retain(|path, _| !path.starts_with("lost+found"));
    store.ok(&["umount", container]);
    if !is_container {
        store.ok(&["rm", "look"]);
    }
    found
}

/// The disk, as others read it over NBD.
fn over_nbd(store: &TestStore, name: &str) -> PathBuf {
    let path = store.path(&format!("{name}.nbd"));
    let (server, socket) = store.serve_with(name, &["--read-only"]);
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    let _ = fs::remove_file(&path);
    run("nbdcopy", &[uri.as_str(), path.to_str().unwrap()]);
    server.end();
    path
}

#[track_caller]
fn assert_equal(one: &Path, two: &Path) {
    run("cmp", &[one, two]);
}

/// What is left in the directory beside the store, for there must be nothing half made.
fn half_made(store: &TestStore) -> Vec<String> {
    let names = fs::read_dir(store.dir.path()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_disk_comes_out_raw_and_as_qcow2_and_back_byte_for_byte() {
    let store = prepared();
    for name in ["next", "c"] {
        let expected = over_nbd(&store, name);
        let raw = store.path("out.raw");
        store.ok(&[
            "export",
            name,
            &store.arg("out.raw"),
            "--format",
            "raw",
            "--force",
        ]);
        assert_equal(&expected, &raw);
        let meta = raw.metadata().unwrap();
        assert!(meta.blocks() * 512 < meta.len() / 4, "{meta:?}");
        assert_eq!(meta.mode() & 0o7777, 0o644);

        store.ok(&[
            "export",
            name,
            &store.arg("out.qcow2"),
            "--format",
            "qcow2",
            "--force",
        ]);
        shell(
            store.dir.path(),
            "qemu-img check -q -f qcow2 out.qcow2
             qemu-img compare -q -f raw -F qcow2 out.raw out.qcow2",
        );
        // Holes are no clusters.
        let size = store.path("out.qcow2").metadata().unwrap().len();
        assert!(size < meta.len() / 4, "{size}");

        let output = store
            .command()
            .args(["export", name, "-", "--format", "raw"])
            .stdout(Stdio::from(fs::File::create(store.path("piped")).unwrap()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_equal(&raw, &store.path("piped"));

        for format in ["raw", "qcow2"] {
            let again = format!("again-{name}-{format}");
            store.ok(&["import", &again, &store.arg(&format!("out.{format}"))]);
            store.ok(&[
                "export",
                &again,
                &store.arg("again.raw"),
                "--format",
                "raw",
                "--force",
            ]);
            assert_equal(&raw, &store.path("again.raw"));
            assert_same(&files_of(&store, &again), &files_of(&store, name));
        }
    }
    assert_eq!(half_made(&store), [""; 0]);
    store.ok(&["check"]);
}

#[test]
fn a_disk_that_ends_within_a_block_keeps_its_size() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        "truncate -s 10000384 odd.raw; printf end | dd of=odd.raw bs=1 seek=10000381 conv=notrunc status=none",
    );
    store.ok(&["import", "odd", &store.arg("odd.raw"), "--format", "raw"]);
    store.ok(&["create", "odd", "--name", "c"]);
    for name in ["odd", "c"] {
        store.ok(&[
            "export",
            name,
            &store.arg("out.raw"),
            "--format",
            "raw",
            "--force",
        ]);
        assert_equal(&store.path("odd.raw"), &store.path("out.raw"));
        assert_equal(&store.path("odd.raw"), &over_nbd(&store, name));
        store.ok(&[
            "export",
            name,
            &store.arg("out.qcow2"),
            "--format",
            "qcow2",
            "--force",
        ]);
        let info = run(
            "qemu-img",
            &["info", "--output=json", &store.arg("out.qcow2")],
        );
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 10_000_384);
        store.ok(&["import", &format!("{name}-again"), &store.arg("out.qcow2")]);
        let again = over_nbd(&store, &format!("{name}-again"));
        assert_equal(&store.path("odd.raw"), &again);
    }
    // It holds no files.
    let said = store.fails(&["export", "odd", &store.arg("out.tar"), "--format", "tar"]);
    assert!(said.contains("raw or qcow2"), "{said}");
}

#[test]
fn layers_come_out_as_a_chain_of_qcow2_which_may_be_moved() {
    let store = prepared();
    store.ok(&[
        "export",
        "c",
        &store.arg("chain"),
        "--format",
        "qcow2",
        "--layers",
    ]);
    let moved = store.path("moved");
    fs::rename(store.path("chain"), &moved).unwrap();
    let top = moved.join("top.qcow2");
    let info = run(
        "qemu-img",
        &[
            "info",
            "--backing-chain",
            "--output=json",
            top.to_str().unwrap(),
        ],
    );
    let info: Vec<Value> = serde_json::from_str(&info).unwrap();
    let inspected = store.json(&["inspect", "c"]);
    // The empty file system, both images' and the container's own, which has no file of its name.
    let layers = inspected[0]["layers"].as_array().unwrap();
    assert_eq!((info.len(), layers.len()), (4, 4));
    for file in fs::read_dir(&moved).unwrap() {
        let file = file.unwrap().path();
        run(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", file.to_str().unwrap()],
        );
    }
    // Each is the state of its layer: the container's, the image's, and that of the image below.
    let layer = |index: usize| {
        let uuid = layers[index]["uuid"].as_str().unwrap();
        moved.join(format!("{uuid}.qcow2"))
    };
    for (name, file) in [("c", top.clone()), ("next", layer(2)), ("base", layer(1))] {
        let raw = store.arg("state.raw");
        store.ok(&["export", name, &raw, "--format", "raw", "--force"]);
        let file = file.to_str().unwrap();
        run(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, file],
        );
    }
    store.ok(&["import", "again", top.to_str().unwrap()]);
    store.ok(&["export", "c", &store.arg("c.raw"), "--format", "raw"]);
    store.ok(&[
        "export",
        "again",
        &store.arg("again.raw"),
        "--format",
        "raw",
    ]);
    assert_equal(&store.path("c.raw"), &store.path("again.raw"));
    assert_eq!(half_made(&store), [""; 0]);
}

#[test]
fn files_come_out_as_a_tar_with_everything_and_back() {
    let store = prepared();
    let expected = files_of(&store, "c");
    store.ok(&["export", "c", &store.arg("c.tar"), "--format", "tar"]);
    store.ok(&["export", "c", &store.arg("same.tar"), "--format", "tar"]);
    assert_equal(&store.path("c.tar"), &store.path("same.tar"));
    shell(
        store.dir.path(),
        "mkdir out; tar --xattrs --xattrs-include='*' --numeric-owner --same-owner -xpf c.tar -C out",
    );
    assert_same(&snapshot(&store.path("out")), &expected);
    // Holes stayed holes.
    let sparse = store.path("out/sparse").metadata().unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "{sparse:?}");
    assert!(store.path("c.tar").metadata().unwrap().len() < 20 << 20);

    store.ok(&["import", "again", &store.arg("c.tar"), "--size", "256M"]);
    assert_same(&files_of(&store, "again"), &expected);
    let output = store
        .command()
        .args(["export", "again", "-", "--format", "tar"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{:?}", output.stderr);
    assert!(output.stdout == fs::read(store.path("c.tar")).unwrap());
    store.assert_nothing_runs();
}

/// What the configuration of an OCI layout says of its layers is what they are.
#[track_caller]
fn check_layout(layout: &Path, layers: usize) -> Value {
    let read =
        |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let blob = |described: &Value| {
        let digest = described["digest"].as_str().unwrap();
        let path = layout.join("blobs").join(digest.replace(':', "/"));
        let bytes = fs::read(&path).unwrap();
        assert_eq!(described["size"], bytes.len(), "{digest}");
        assert_eq!(digest, sha256(&bytes));
        path
    };
    let index = read(layout.join("index.json"));
    let manifest = read(blob(&index["manifests"][0]));
    let config = read(blob(&manifest["config"]));
    let all = manifest["layers"].as_array().unwrap();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    assert_eq!((all.len(), diff_ids.len()), (layers, layers));
    for (layer, diff_id) in all.iter().zip(diff_ids) {
        let path = blob(layer).display().to_string();
        let kind = layer["mediaType"].as_str().unwrap();
        let tool = match kind.rsplit(['+', '.']).next().unwrap() {
            "gzip" => "gzip -dc",
            "zstd" => "zstd -dcq",
            "tar" => "cat",
            other => panic!("{other}"),
        };
        let sum = run("sh", &["-c", &format!("{tool} <'{path}' | sha256sum")]);
        let sum = sum.split_whitespace().next().unwrap();
        assert_eq!(*diff_id, format!("sha256:{sum}"));
    }
    let steps = config["history"].as_array().unwrap();
    let made = steps.iter().filter(|step| step["empty_layer"] != true);
    assert_eq!(made.count(), layers);
    config
}

fn sha256(bytes: &[u8]) -> String {
    let sum = Sha256::digest(bytes);
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The files that umoci makes of an OCI layout's image.
fn unpacked(store: &TestStore, image: &str) -> Snapshot {
    let bundle = store.path("bundle");
    let _ = fs::remove_dir_all(&bundle);
    run(
        "umoci",
        &["unpack", "--image", image, bundle.to_str().unwrap()],
    );
    snapshot(&bundle.join("rootfs"))
}

/// umoci and podman take the names of attributes as they stand in the tar, where `=` and `%` are escaped as GNU tar and
/// libarchive do it.
fn as_go_programs_have_it(mut files: Snapshot) -> Snapshot {
    let line = files.get_mut(Path::new("etc/empty")).unwrap();
    assert!(line.contains("user.e=quals%25"), "{line}");
    *line = line.replace("user.e=quals%25", "user.e%3Dquals%2525");
    files
}

#[test]
fn layers_come_out_as_an_oci_image_that_skopeo_and_umoci_take() {
    let store = prepared();
    let expected = files_of(&store, "c");
    let layout = store.path("layout");
    store.ok(&["export", "c", &store.arg("layout"), "--format", "oci"]);
    let config = check_layout(&layout, 3);
    let steps = config["history"].as_array().unwrap();
    let words: Vec<_> = steps
        .iter()
        .map(|step| step["created_by"].as_str().unwrap())
        .collect();
    assert_eq!(
        words,
        ["vellum import root", "vellum commit b", "vellum export c"]
    );
    let source = format!("oci:{}:latest", layout.display());
    let inspected = run("skopeo", &["inspect", "--no-tags", &source]);
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Layers"].as_array().unwrap().len(), 3);
    let image = format!("{}:latest", layout.display());
    assert_same(
        &unpacked(&store, &image),
        &as_go_programs_have_it(expected.clone()),
    );
    // Two of the layers are the image's, and those of an image are the same however often they come out.
    for name in ["one", "two"] {
        store.ok(&["export", "next", &store.arg(name), "--format", "oci"]);
    }
    run("diff", &["-r", &store.arg("one"), &store.arg("two")]);
    let config = check_layout(&store.path("one"), 2);
    assert!(config["created"].is_string());
    assert_eq!(half_made(&store), [""; 0]);
    store.assert_nothing_runs();
}

#[test]
fn an_oci_archive_of_any_compression_and_from_a_pipe_comes_back() {
    let store = prepared();
    let expected = files_of(&store, "c");
    for (compression, name) in [("gzip", "a.tar"), ("zstd", "b.tar"), ("none", "c.tar")] {
        store.ok(&[
            "export",
            "c",
            &store.arg(name),
            "--format",
            "oci",
            "--compression",
            compression,
            "--name",
            "registry.example/Team/app:7",
        ]);
        let from = format!("oci-archive:{}", store.arg(name));
        let to = format!("oci:{}:x", store.arg(&format!("copied-{compression}")));
        run("skopeo", &["copy", "--insecure-policy", "-q", &from, &to]);
        check_layout(&store.path(&format!("copied-{compression}")), 3);
        let again = format!("again-{compression}");
        let select = "registry.example/team/app:7";
        store.ok(&[
            "import",
            &again,
            &store.arg(name),
            "--size",
            "256M",
            "--select",
            select,
        ]);
        assert_same(&files_of(&store, &again), &expected);
    }
    let output = store
        .command()
        .args(["export", "c", "-", "--format", "oci"])
        .stdout(Stdio::from(
            fs::File::create(store.path("piped.tar")).unwrap(),
        ))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    store.ok(&["import", "piped", &store.arg("piped.tar"), "--size", "256M"]);
    assert_same(&files_of(&store, "piped"), &expected);
    assert_eq!(half_made(&store), [""; 0]);
    store.assert_nothing_runs();
}

#[test]
fn layers_come_out_as_a_docker_archive_that_skopeo_takes_and_back() {
    let store = prepared();
    let expected = files_of(&store, "c");
    store.ok(&["export", "c", &store.arg("c.tar"), "--format", "docker"]);
    let manifest = run("tar", &["-xOf", &store.arg("c.tar"), "manifest.json"]);
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest[0]["RepoTags"][0], "c:latest");
    let from = format!("docker-archive:{}", store.arg("c.tar"));
    let inspected = run("skopeo", &["inspect", "--no-tags", &from]);
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Layers"].as_array().unwrap().len(), 3);
    for source in [
        from,
        format!("docker-archive:{}:c:latest", store.arg("c.tar")),
    ] {
        let to = format!("oci:{}:x", store.arg("copied"));
        run("skopeo", &["copy", "--insecure-policy", "-q", &source, &to]);
    }
    check_layout(&store.path("copied"), 3);
    let image = format!("{}:x", store.arg("copied"));
    assert_same(
        &unpacked(&store, &image),
        &as_go_programs_have_it(expected.clone()),
    );
    for format in ["docker", "oci"] {
        let again = format!("again-{format}");
        store.ok(&[
            "import",
            &again,
            &store.arg("c.tar"),
            "--size",
            "256M",
            "--format",
            format,
        ]);
        assert_same(&files_of(&store, &again), &expected);
    }
}

/// podman keeps no ACLs, no attributes but those of users and capabilities, no times before 1970, and none
/// of the root.
fn as_podman_has_it(files: Snapshot) -> Snapshot {
    let keeps = |word: &str| {
        !["\"system.", "\"trusted."]
            .iter()
            .any(|name| word.starts_with(name))
    };
    let mut files = as_go_programs_have_it(files);
    files.remove(Path::new(""));
    for line in files.values_mut() {
        // Values have blanks after their commas only.
        let words = line.replace(", ", ",");
        let kept: Vec<&str> = words.split(' ').filter(|word| keeps(word)).collect();
        *line = kept.join(" ").replace(',', ", ");
    }
    let old = files.get_mut(Path::new("etc/empty")).unwrap();
    *old = old.replace("-315619200.250000000", "0.000000000");
    files
}

/// podman, with all that it keeps beside the store, but for its running state: the path of that has 50 bytes
/// at most.
fn podman(store: &TestStore, running: &Path, arguments: &[&str]) -> String {
    let home = |name: &str| store.arg(&format!("podman/{name}"));
    let own = [
        "--root",
        &home("root"),
        "--runroot",
        running.to_str().unwrap(),
        "--tmpdir",
        &home("tmp"),
        "--storage-driver",
        "vfs",
        "--events-backend",
        "none",
        "--cgroup-manager",
        "cgroupfs",
    ];
    run("podman", &[&own[..], arguments].concat())
}

#[test]
fn container_images_are_loaded_by_podman_with_the_same_files() {
    // It copies each layer for the next one, and writes out what are holes.
    let store = prepared_without(&["sparse"]);
    let expected = as_podman_has_it(files_of(&store, "c"));
    let running = tempfile::Builder::new()
        .prefix("podman-")
        .tempdir_in("/run");
    let running = running.unwrap();
    let podman = |arguments: &[&str]| podman(&store, running.path(), arguments);
    for (format, more) in [("docker", &[][..]), ("oci", &["--compression", "zstd"])] {
        let tar = store.arg("c.tar");
        let export = ["export", "c", &tar, "--force", "--format", format];
        store.ok(&[&export[..], more].concat());
        podman(&["load", "--quiet", "--input", &tar]);
        let dir = podman(&["image", "mount", "c:latest"]);
        let mut found = snapshot(Path::new(dir.trim_end()));
        found.remove(Path::new(""));
        assert_same(&found, &expected);
        podman(&["image", "unmount", "c:latest"]);
        podman(&["rmi", "--force", "c:latest"]);
    }
}

#[test]
fn what_can_be_a_stream_goes_through_pipes_into_the_programs_that_read_it() {
    let store = prepared();
    let expected = files_of(&store, "c");
    store.ok(&["export", "c", &store.arg("c.raw"), "--format", "raw"]);
    fs::create_dir(store.path("files")).unwrap();
    fs::create_dir(store.path("layout")).unwrap();
    let root = store.root.display();
    let script = format!(
        "vellum() {{ {VELLUM} --root {root} \"$@\"; }}
         stream() {{ vellum export c - --format $1; }}
         stream raw | cmp - c.raw
         stream raw | dd of=copied.raw bs=1M iflag=fullblock conv=sparse status=none
         cmp copied.raw c.raw
         stream tar | tar -t | grep -x etc/mine >/dev/null
         stream tar | tar --xattrs --xattrs-include='*' --numeric-owner -xpf - -C files
         stream tar | vellum import from-tar - --size 256M
         stream oci | tar -xf - -C layout
         skopeo copy -q --insecure-policy oci:layout:latest oci:copied:x
         stream oci | vellum import from-oci - --size 256M
         stream docker | vellum import from-docker - --size 256M
         mkfifo fifo
         cat fifo >fifo.raw &
         vellum export c fifo --format raw
         wait
         cmp fifo.raw c.raw"
    );
    let script = format!("cd {}; {script}", store.dir.path().display());
    run("bash", &["-euo", "pipefail", "-c", &script]);
    assert_same(&snapshot(&store.path("files")), &expected);
    check_layout(&store.path("copied"), 3);
    for name in ["from-tar", "from-oci", "from-docker"] {
        assert_same(&files_of(&store, name), &expected);
    }
    // A reader that goes away ends it.
    let script =
        format!("{VELLUM} --root {root} export c - --format raw | head -c 5000 >/dev/null");
    let output = Command::new("bash")
        .args(["-o", "pipefail", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Broken pipe"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(half_made(&store), [""; 0]);
    store.assert_nothing_runs();
}

#[test]
fn an_imported_image_keeps_its_configuration_and_a_container_without_changes_is_its_image() {
    let store = TestStore::new();
    super::import::make_layout(&store);
    let layout = store.arg("layout");
    store.ok(&["import", "two", &layout, "--select", "two", "--size", SIZE]);
    store.ok(&["create", "two", "--name", "c"]);
    let original = run(
        "skopeo",
        &["inspect", "--config", &format!("oci:{layout}:two")],
    );
    let mut original: Value = serde_json::from_str(&original).unwrap();
    for name in ["two", "c"] {
        let out = format!("out-{name}");
        store.ok(&["export", name, &store.arg(&out), "--format", "oci"]);
        let layers = original["rootfs"]["diff_ids"].as_array().unwrap().len();
        let mut config = check_layout(&store.path(&out), layers);
        assert_eq!(config["history"], original["history"]);
        // The tars are others, and a container is of now.
        for config in [&mut config, &mut original] {
            config["rootfs"] = Value::Null;
            config["created"] = Value::Null;
        }
        assert_eq!(config, original);
        original = serde_json::from_str(&run(
            "skopeo",
            &["inspect", "--config", &format!("oci:{layout}:two")],
        ))
        .unwrap();
    }
}

#[test]
fn an_image_that_was_a_disk_comes_out_as_one_layer_of_files() {
    let store = prepared();
    store.ok(&["export", "base", &store.arg("base.raw"), "--format", "raw"]);
    store.ok(&["import", "disk", &store.arg("base.raw")]);
    store.ok(&["export", "disk", &store.arg("layout"), "--format", "oci"]);
    check_layout(&store.path("layout"), 1);
    store.ok(&["import", "again", &store.arg("layout"), "--size", "256M"]);
    assert_same(&files_of(&store, "again"), &files_of(&store, "base"));
}

#[test]
fn what_is_there_is_not_replaced_unless_it_is_asked_for_and_nothing_half_made_stays() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let out = store.arg("out");
    fs::write(store.path("out"), "mine").unwrap();
    for format in ["raw", "qcow2", "tar", "docker"] {
        let said = store.fails(&["export", "c", &out, "--format", format]);
        assert!(said.contains("--force"), "{said}");
    }
    store.fails(&["export", "c", &out, "--format", "oci"]);
    store.fails(&["export", "c", &out, "--format", "qcow2", "--layers"]);
    assert_eq!(fs::read_to_string(store.path("out")).unwrap(), "mine");
    // Of a link, what it leads to.
    std::os::unix::fs::symlink("out", store.path("link")).unwrap();
    store.ok(&[
        "export",
        "c",
        &store.arg("link"),
        "--format",
        "raw",
        "--force",
    ]);
    assert!(store.path("link").is_symlink() && fs::metadata(store.path("out")).unwrap().len() > 4);

    fs::create_dir(store.path("full")).unwrap();
    fs::write(store.path("full/mine"), "mine").unwrap();
    for format in ["raw", "oci"] {
        store.fails(&[
            "export",
            "c",
            &store.arg("full"),
            "--format",
            format,
            "--force",
        ]);
    }
    fs::create_dir(store.path("empty")).unwrap();
    store.ok(&["export", "c", &store.arg("empty"), "--format", "oci"]);
    assert!(store.path("empty/index.json").exists());
    let mode = store.path("empty").metadata().unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755);
    assert_eq!(half_made(&store), [""; 0]);
}

#[test]
fn what_cannot_be_exported_is_refused_with_what_to_do() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let out = store.arg("out");
    let refused = |arguments: &[&str], words: &str| {
        let said = store.fails(&[&["export"], arguments].concat());
        assert!(said.contains(words), "{arguments:?}: {said}");
    };
    refused(&["nobody", &out, "--format", "raw"], "nobody");
    refused(&["c", "-", "--format", "qcow2"], "name a file");
    refused(&["c", &out, "--format", "raw", "--layers"], "--layers");
    refused(
        &["c", &out, "--format", "tar", "--compression", "zstd"],
        "--compression",
    );
    refused(&["c", &out, "--format", "tar", "--name", "x"], "--name");
    refused(&["c", &store.arg("no/where"), "--format", "raw"], "no");
    refused(&["--json", "c", "-", "--format", "raw"], "standard output");
    let (server, _) = store.serve("c");
    refused(&["c", &out, "--format", "raw"], "in use");
    server.end();
    // A stream that takes nothing.
    for format in ["raw", "tar", "oci", "docker"] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = store
            .command()
            .args(["export", "c", "-", "--format", format])
            .stdout(full)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("standard output"), "{said}");
    }
    let device = store.fails(&["export", "c", "/dev/full", "--format", "tar"]);
    assert!(device.contains("/dev/full"), "{device}");
    let report = store.json(&["export", "c", &out, "--format", "raw"]);
    assert_eq!(report["format"], "raw");
    assert!(report["bytes"].as_u64().unwrap() > 100_000, "{report}");
    store.assert_nothing_runs();
}

#[test]
fn a_mounted_container_comes_out_as_it_was_at_one_moment_and_goes_on_and_so_does_a_snapshot() {
    let store = prepared();
    let dir = store.mount("c");
    fs::write(dir.join("etc/open"), "before\n").unwrap();
    store.ok(&["snapshot", "c", "kept", "--freeze"]);
    fs::write(dir.join("etc/open"), "at the export\n").unwrap();
    let expected = |text: &str, name: &str| {
        store.ok(&["import", name, &store.arg("out"), "--size", "256M"]);
        store.ok(&["create", name, "--name", "look"]);
        let look = store.mount("look");
        assert_eq!(
            fs::read_to_string(look.join("etc/open")).unwrap(),
            text,
            "{name}"
        );
        assert_eq!(
            fs::read(look.join("etc/mine")).unwrap(),
            vec![6; 70_001],
            "{name}"
        );
        assert!(
            !look.join("etc/old").exists() && !look.join("gone").exists(),
            "{name}"
        );
        store.ok(&["umount", "look"]);
        store.ok(&["rm", "look"]);
        run("rm", &["-r", &store.arg("out")]);
    };
    for format in ["tar", "docker", "oci"] {
        store.ok(&["export", "c", &store.arg("out"), "--format", format]);
        if format == "oci" {
            // The layers of its own that changed something: at the snapshot, and at the first of these exports.
            let config = check_layout(&store.path("out"), 4);
            let last = config["history"].as_array().unwrap().last().unwrap();
            assert_eq!(last["created_by"], "vellum export c");
        }
        expected("at the export\n", &format!("now-{format}"));
        store.ok(&["export", "c@kept", &store.arg("out"), "--format", format]);
        expected("before\n", &format!("kept-{format}"));
    }
    store.ok(&[
        "export",
        "c@kept",
        &store.arg("kept.qcow2"),
        "--format",
        "qcow2",
    ]);
    let kept = over_nbd(&store, "c@kept");
    let (raw, qcow2) = (kept.to_str().unwrap(), store.arg("kept.qcow2"));
    run(
        "qemu-img",
        &["compare", "-q", "-f", "raw", "-F", "qcow2", raw, &qcow2],
    );
    // It went on, and what was exported can go.
    fs::write(dir.join("etc/open"), "after\n").unwrap();
    store.ok(&["umount", "c"]);
    store.ok(&["check"]);
}
