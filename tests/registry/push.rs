//! What is pushed serves everybody: block layers for another store, a plain image for other programs.

use std::fs;

use crate::common::{TestStore, run, shell};
use crate::image_support::{assert_same, snapshot};
use crate::registry_support::{Registry, clean, digests, store, with_images};

fn files(store: &TestStore, image: &str) -> crate::image_support::Snapshot {
    store.look(image, snapshot)
}

#[test]
fn another_store_pulls_the_same_layers_and_runs_them() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let name = registry.image("team/web:1");
    let pushed = from.json(&["push", "web", &name]);
    let pulled = to.json(&["pull", &name]);
    assert_eq!(pulled["came"], "blocks", "{pulled}");
    assert_eq!(digests(&from, "web"), digests(&to, &name));
    assert_same(&files(&from, "web"), &files(&to, &name));
    let said = to.ok(&["run", "--rm", &name, "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    clean(&to);
    clean(&from);
    // From there again: nothing is new, whoever pushes it.
    let again = to.json(&[
        "push",
        &name,
        &registry.image("team/web:2"),
        "--format",
        "blocks",
    ]);
    assert_eq!(
        (&again["sent"], &again["sent_bytes"]),
        (&0.into(), &0.into()),
        "{again}"
    );
    assert_eq!(pushed["format"], "both");
}

#[test]
fn a_second_push_sends_nothing_and_another_repository_mounts() {
    let (registry, store) = (Registry::new(), with_images());
    let first = store.json(&["push", "web", &registry.image("one/web:1")]);
    assert!(first["sent"].as_u64().unwrap() > 6, "{first}");
    let blobs = registry.blobs();
    let second = store.json(&["push", "web", &registry.image("one/web:1")]);
    assert_eq!(second["sent"], 0, "{second}");
    assert_eq!(second["existed"], first["sent"]);
    assert_eq!(second["digest"], first["digest"]);
    let other = store.json(&["push", "web", &registry.image("other/web:1")]);
    assert_eq!(
        (&other["sent"], &other["mounted"]),
        (&0.into(), &first["sent"]),
        "{other}"
    );
    assert_eq!(registry.blobs(), blobs);
    // Without the hint it is sent.
    fs::write(store.root.join("registry-blobs.json"), "damaged").unwrap();
    let third = store.json(&["push", "web", &registry.image("third/web:1")]);
    assert_eq!(
        (&third["sent"], &third["mounted"]),
        (&first["sent"], &0.into()),
        "{third}"
    );
    let said = store.output(&["push", "web", &registry.image("one/web:1")]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("Layer already exists"), "{said}");
}

#[test]
fn layers_that_the_store_has_are_not_fetched() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    from.ok(&["push", "base", &registry.image("base:1")]);
    from.ok(&["push", "web", &registry.image("web:1")]);
    let base = to.json(&["pull", &registry.image("base:1"), "base"]);
    let existed = |pulled: &serde_json::Value| -> Vec<bool> {
        let layers = pulled["layers"].as_array().unwrap().iter();
        layers
            .map(|layer| layer["existed"].as_bool().unwrap())
            .collect()
    };
    // The empty file system below is made rather than fetched.
    assert_eq!(existed(&base), [true, false]);
    let web = to.json(&["pull", &registry.image("web:1"), "web"]);
    assert_eq!(existed(&web), [true, true, false]);
    let again = to.json(&["pull", &registry.image("web:1"), "again"]);
    assert_eq!(existed(&again), [true, true, true]);
    assert_eq!(digests(&to, "again"), digests(&from, "web"));
    clean(&to);
}

#[test]
fn skopeo_podman_and_containerd_take_the_plain_image_and_never_the_blocks() {
    let (registry, store) = (Registry::new(), with_images());
    let name = registry.image("team/web:1");
    store.ok(&["push", "web", &name]);
    let tls = "--tls-verify=false";
    let inspected = run(
        "skopeo",
        &["inspect", "--no-tags", tls, &registry.skopeo("team/web:1")],
    );
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(
        inspected["Layers"].as_array().unwrap().len(),
        2,
        "{inspected}"
    );
    shell(
        store.dir.path(),
        &format!(
            "skopeo copy -q --insecure-policy --src-tls-verify=false {} oci:layout:x
             umoci unpack --image layout:x bundle >/dev/null 2>&1
             test \"$(cat bundle/rootfs/etc/web)\" = web
             test ! -e bundle/rootfs/noise",
            registry.skopeo("team/web:1")
        ),
    );
    let root = store.arg("podman");
    let podman = [
        "--root",
        &root,
        "--runroot",
        &store.arg("runroot"),
        "--storage-driver",
        "vfs",
    ];
    let podman = |more: &[&str]| run("podman", &[&podman[..], more].concat());
    podman(&["pull", "-q", tls, &name]);
    let mounted = podman(&["image", "mount", &name]);
    let mounted = mounted.trim();
    assert_eq!(
        fs::read_to_string(format!("{mounted}/etc/web")).unwrap(),
        "web\n"
    );
    podman(&["image", "umount", "-f", &name]);
    podman(&["rmi", "-f", &name]);
    // skopeo takes all of it along, the blocks too.
    shell(
        store.dir.path(),
        &format!(
            "skopeo copy -q --all --insecure-policy --src-tls-verify=false --dest-tls-verify=false {} {}",
            registry.skopeo("team/web:1"),
            registry.skopeo("copied/web:1")
        ),
    );
    let pulled = store.json(&["pull", &registry.image("copied/web:1"), "copied"]);
    assert_eq!(pulled["came"], "blocks");
    // Of one platform it does not, and the image is unpacked.
    shell(
        store.dir.path(),
        &format!(
            "skopeo copy -q --insecure-policy --src-tls-verify=false --dest-tls-verify=false {} {}",
            registry.skopeo("team/web:1"),
            registry.skopeo("single/web:1")
        ),
    );
    let pulled = store.json(&["pull", &registry.image("single/web:1"), "single"]);
    assert_eq!(pulled["came"], "tars");
    assert_same(&files(&store, "copied"), &files(&store, "single"));
}

#[test]
fn each_format_has_its_form_and_a_disk_goes_as_blocks_alone() {
    let (registry, store) = (Registry::new(), with_images());
    let pushed = store.json(&["push", "web", &registry.image("oci:1"), "--format", "oci"]);
    let manifest = registry.document(pushed["digest"].as_str().unwrap());
    assert!(
        manifest["annotations"].is_null() && manifest["layers"].is_array(),
        "{manifest}"
    );
    let pulled = store.json(&["pull", &registry.image("oci:1"), "tars"]);
    assert_eq!(pulled["came"], "tars");

    fs::write(store.path("disk"), vec![3; 1 << 20]).unwrap();
    store.ok(&["import", "disk", &store.arg("disk"), "--format", "raw"]);
    let said = store.fails(&["push", "disk", &registry.image("disk:1")]);
    assert!(said.contains("--format blocks"), "{said}");
    let pushed = store.json(&[
        "push",
        "disk",
        &registry.image("disk:1"),
        "--format",
        "blocks",
    ]);
    let manifest = registry.document(pushed["digest"].as_str().unwrap());
    assert_eq!(manifest["artifactType"], "application/vnd.vellum.image.v1");
    let other = crate::registry_support::store();
    other.ok(&["pull", &registry.image("disk:1"), "disk"]);
    assert_eq!(store.content("disk"), other.content("disk"));
    let said = store.fails(&[
        "push",
        "web",
        &registry.image(&format!("x@sha256:{}", "0".repeat(64))),
    ]);
    assert!(said.contains("push it to a tag"), "{said}");
}

#[test]
fn a_container_and_a_snapshot_are_pushed_as_they_are() {
    let (registry, store) = (Registry::new(), with_images());
    store.ok(&["create", "web", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("one"), "1").unwrap();
    store.ok(&["snapshot", "c", "first"]);
    fs::write(dir.join("two"), "2").unwrap();
    store.ok(&["push", "c", &registry.image("c:now")]);
    store.ok(&["push", "c@first", &registry.image("c:first")]);
    store.ok(&["umount", "c"]);
    let other = crate::registry_support::store();
    for (tag, has_two) in [("now", true), ("first", false)] {
        other.ok(&["pull", &registry.image(&format!("c:{tag}")), tag]);
        let files = files(&other, tag);
        let names: Vec<_> = files
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        let has = |name: &str| names.iter().any(|path| path.ends_with(name));
        assert!(has("one"), "{names:?}");
        assert_eq!(has("two"), has_two, "{names:?}");
    }
}

#[test]
fn an_image_of_a_digest_has_a_name_of_its_own_and_runs() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let pushed = from.json(&["push", "web", &registry.image("web:1")]);
    let digest = pushed["digest"].as_str().unwrap();
    let reference = registry.image(&format!("web@{digest}"));
    let said = to.ok(&[
        "run",
        "--rm",
        &reference,
        "--",
        "/bin/sh",
        "-c",
        "cat /etc/web",
    ]);
    assert_eq!(said, "web\n");
    let digits = digest.split(':').next_back().unwrap();
    let name = registry.image(&format!("web:sha256-{}", &digits[..12]));
    assert_eq!(digests(&to, &name), digests(&from, "web"));
    let said = to.fails(&["pull", &reference]);
    assert!(said.contains(&name), "{said}");
    clean(&to);
}

#[test]
fn layers_with_the_same_data_are_fetched_once_and_all_made() {
    let (registry, from, to) = (Registry::new(), store(), store());
    fs::write(from.path("disk"), vec![3; 1 << 20]).unwrap();
    from.ok(&["import", "disk", &from.arg("disk"), "--format", "raw"]);
    from.ok(&["create", "disk", "--name", "c"]);
    for (snapshot, byte) in [("one", 1), ("two", 2), ("three", 1)] {
        let (server, socket) = from.serve("c");
        let write = format!("write -P {byte} 0 4096");
        let place = format!("nbd+unix:///c?socket={}", socket.display());
        run(
            "qemu-io",
            &["-f", "raw", "-c", &write, "-c", "flush", &place],
        );
        server.end();
        from.ok(&["snapshot", "c", snapshot]);
    }
    let name = registry.image("disk:1");
    from.ok(&["push", "c@three", &name, "--format", "blocks"]);
    to.ok(&["pull", &name, "disk"]);
    assert_eq!(digests(&to, "disk").len(), 4);
    let mut wanted = vec![3; 1 << 20];
    wanted[..4096].fill(1);
    assert!(to.content("disk") == wanted);
}
