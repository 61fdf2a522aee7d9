//! `vellum save` and `vellum load`: archives that others read, and that others wrote.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{Running, TestStore, run, shell, wait_until};
use crate::image_support::{assert_same, snapshot};
use crate::registry_support::{clean, digests, store, with_images};

#[test]
fn several_images_go_through_one_archive_with_their_layers_as_they_were() {
    let (from, to) = (with_images(), store());
    let file = from.arg("images.tar");
    let saved = from.json(&["save", "web", "base", "-o", &file]);
    assert_eq!(saved["images"].as_array().unwrap().len(), 2, "{saved}");
    let loaded = to.json(&["load", "-i", &file]);
    for image in loaded["images"].as_array().unwrap() {
        assert_eq!(image["came"], "blocks", "{loaded}");
    }
    assert_eq!(to.names("images"), ["base", "web"]);
    for image in ["base", "web"] {
        assert_eq!(digests(&to, image), digests(&from, image));
        assert_same(&to.look(image, snapshot), &from.look(image, snapshot));
    }
    // A name is not moved, and nothing is done for the others then.
    to.ok(&["rmi", "base"]);
    let error = to.fails(&["load", "-i", &file]);
    assert!(error.contains("web"), "{error}");
    assert_eq!(to.names("images"), ["web"]);
    clean(&to);
    clean(&from);
}

#[test]
fn the_same_images_give_the_same_archive_and_each_blob_is_in_it_once() {
    let store = with_images();
    let (one, two) = (store.arg("one.tar"), store.arg("two.tar"));
    store.ok(&["save", "web", "base", "-o", &one]);
    store.ok(&["save", "web", "base", "-o", &two]);
    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
    let list = run("tar", &["tf", &one]);
    let mut members: Vec<&str> = list.lines().collect();
    let all = members.len();
    members.sort_unstable();
    members.dedup();
    assert_eq!(members.len(), all, "{list}");
    // What is there stays.
    let error = store.fails(&["save", "web", "-o", &one]);
    assert!(error.contains("--force"), "{error}");
    store.ok(&["save", "web", "-o", &one, "--force", "--format", "oci"]);
    let error = store.fails(&["save", "web", "web", "-o", &store.arg("three.tar")]);
    assert!(error.contains("twice"), "{error}");
    assert!(!store.path("three.tar").exists());
    clean(&store);
}

#[test]
fn layers_of_equal_content_are_in_an_archive_once() {
    let (from, to) = (with_images(), store());
    from.ok(&["create", "web", "--name", "c"]);
    // Two layers in which nothing was written.
    from.ok(&["snapshot", "c", "one"]);
    from.ok(&["snapshot", "c", "two"]);
    let file = from.arg("snapshot.tar");
    from.ok(&["save", "c@two", "-o", &file]);
    to.ok(&["load", "-i", &file]);
    let name = &to.names("images")[0];
    assert_eq!(digests(&to, name), digests(&from, "c@two"));
    clean(&to);
    clean(&from);
}

#[test]
fn an_archive_goes_through_a_pipe_compressed_too() {
    let (from, to) = (with_images(), store());
    let mut save = from.command();
    let mut save = save
        .args(["save", "web", "-o", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let load = to
        .command()
        .args(["load", "-i", "-"])
        .stdin(save.stdout.take().unwrap())
        .status();
    assert!(load.unwrap().success());
    assert!(save.wait().unwrap().success());
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    from.ok(&["save", "base", "-o", &from.arg("base.tar")]);
    shell(from.dir.path(), "gzip -1 base.tar");
    to.ok(&["load", "-i", &from.arg("base.tar.gz")]);
    assert_eq!(digests(&to, "base"), digests(&from, "base"));
    clean(&to);
}

#[test]
fn skopeo_and_umoci_take_the_plain_image_of_an_archive_and_what_skopeo_writes_is_loaded() {
    let (from, to) = (with_images(), store());
    from.ok(&["save", "web", "-o", &from.arg("web.tar")]);
    from.ok(&["save", "web", "base", "-o", &from.arg("both.tar")]);
    shell(
        from.dir.path(),
        "skopeo copy -q --insecure-policy oci-archive:web.tar:latest oci:layout:x
         umoci unpack --image layout:x bundle >/dev/null 2>&1
         test \"$(cat bundle/rootfs/etc/web)\" = web
         test ! -e bundle/rootfs/noise
         skopeo inspect oci-archive:both.tar:docker.io/library/base:latest >/dev/null
         skopeo copy -q --insecure-policy oci-archive:web.tar oci-archive:plain.tar:plain:1
         skopeo copy -q --all --insecure-policy oci-archive:web.tar oci-archive:all.tar:all:1
         skopeo copy -q --insecure-policy oci-archive:web.tar oci-archive:unnamed.tar",
    );
    let plain = to.json(&["load", "-i", &from.arg("plain.tar")]);
    assert_eq!(plain["images"][0]["image"]["name"], "plain:1", "{plain}");
    assert_eq!(plain["images"][0]["came"], "tars", "{plain}");
    let said = to.ok(&[
        "run",
        "--rm",
        "plain:1",
        "--",
        "/bin/sh",
        "-c",
        "cat /etc/web",
    ]);
    assert_eq!(said, "web\n");
    let all = to.json(&["load", "-i", &from.arg("all.tar")]);
    assert_eq!(all["images"][0]["came"], "blocks", "{all}");
    assert_eq!(digests(&to, "all:1"), digests(&from, "web"));
    let error = to.fails(&["load", "-i", &from.arg("unnamed.tar")]);
    assert!(error.contains("vellum import NAME"), "{error}");
    clean(&to);
}

/// A containerd of this test's own.
fn containerd(store: &TestStore) -> (Running, String) {
    let dir = store.arg("containerd");
    fs::create_dir_all(&dir).unwrap();
    let socket = format!("{dir}/s");
    let config = format!(
        "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\ndisabled_plugins = \
         [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{socket}\"\n"
    );
    let file = format!("{dir}/config.toml");
    fs::write(&file, config).unwrap();
    let child = Command::new("containerd")
        .args(["-c", &file])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("apt-get install containerd");
    wait_until("containerd answers", || {
        let version = Command::new("ctr")
            .args(["-a", &socket, "version"])
            .output();
        version.unwrap().status.success()
    });
    (Running(child), socket)
}

#[test]
fn containerd_and_podman_take_an_archive_and_what_containerd_writes_is_loaded() {
    let (from, to) = (with_images(), store());
    let (both, one) = (from.arg("both.tar"), from.arg("one.tar"));
    from.ok(&["save", "web", "base", "-o", &both]);
    from.ok(&["save", "web", "-o", &one]);
    let (_containerd, socket) = containerd(&from);
    let ctr = |arguments: &[&str]| run("ctr", &[&["-a", &socket, "images"], arguments].concat());
    ctr(&["import", "--snapshotter", "native", &both]);
    assert_eq!(
        ctr(&["ls", "-q"]),
        "docker.io/library/base:latest\ndocker.io/library/web:latest\n"
    );
    let back = from.arg("back.tar");
    ctr(&["export", &back, "docker.io/library/web:latest"]);
    to.ok(&["load", "-i", &back]);
    let said = to.ok(&["run", "--rm", "web", "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    let (root, runroot) = (from.arg("podman"), from.arg("runroot"));
    let podman = [
        "--root",
        &root,
        "--runroot",
        &runroot,
        "--storage-driver",
        "vfs",
    ];
    let loaded = run("podman", &[&podman[..], &["load", "-i", &one]].concat());
    assert!(loaded.contains("docker.io/library/web:latest"), "{loaded}");
    run("podman", &[&podman[..], &["rmi", "-f", "-a"]].concat());
    clean(&to);
}

#[test]
fn the_archive_of_an_exported_image_is_loaded_and_what_is_no_archive_is_refused() {
    let (from, to) = (with_images(), store());
    from.ok(&["export", "web", &from.arg("oci.tar"), "--format", "oci"]);
    from.ok(&[
        "export",
        "base",
        &from.arg("docker.tar"),
        "--format",
        "docker",
    ]);
    to.ok(&["load", "-i", &from.arg("oci.tar")]);
    to.ok(&["load", "-i", &from.arg("docker.tar")]);
    assert_eq!(to.names("images"), ["base:latest", "web:latest"]);
    fs::write(from.path("text"), "x".repeat(2000)).unwrap();
    shell(from.dir.path(), "tar cf files.tar text");
    for (file, words) in [
        ("text", "does not begin as a tar"),
        ("files.tar", "no OCI archive"),
        ("absent.tar", "absent.tar"),
    ] {
        let error = to.fails(&["load", "-i", &from.arg(file)]);
        assert!(error.contains(words), "{file}: {error}");
    }
    clean(&to);
}

#[test]
fn an_archive_with_a_flipped_byte_is_refused_and_leaves_nothing() {
    let (from, to) = (with_images(), store());
    from.ok(&["save", "web", "-o", &from.arg("web.tar")]);
    let whole = fs::read(from.path("web.tar")).unwrap();
    let list = run("tar", &["tRf", &from.arg("web.tar")]);
    let mut flipped = 0;
    for line in list.lines().filter(|line| line.contains("blobs/sha256/")) {
        let block: usize = line
            .strip_prefix("block ")
            .and_then(|rest| rest.split(':').next())
            .and_then(|block| block.parse().ok())
            .unwrap();
        if line.ends_with('/') {
            continue;
        }
        let mut bytes = whole.clone();
        bytes[(block + 1) * 512 + 20] ^= 1;
        fs::write(from.path("flipped.tar"), &bytes).unwrap();
        let output = to.output(&["--json", "load", "-i", &from.arg("flipped.tar")]);
        if output.status.success() {
            // It is a blob of the plain image, which is not read.
            let loaded: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(loaded["images"][0]["came"], "blocks", "{line}");
            assert_eq!(digests(&to, "web"), digests(&from, "web"));
            to.ok(&["rmi", "web"]);
            to.ok(&["prune"]);
            continue;
        }
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("damaged"), "{line}: {error}");
        assert!(to.names("images").is_empty());
        flipped += 1;
    }
    assert!(flipped > 4, "{flipped}");
    to.ok(&["prune"]);
    clean(&to);
}
