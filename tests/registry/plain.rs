//! Images that others pushed.

use std::fs;

use crate::common::{TestStore, shell};
use crate::image_support::{assert_same, snapshot};
use crate::registry_support::{Registry, clean, store, with_images};

/// Two tar layers that skopeo pushed, compressed so.
fn pushed_by_skopeo(store: &TestStore, registry: &Registry, compression: &str, name: &str) {
    if !store.path("layout").exists() {
        store.ok(&[
            "export",
            "web",
            &store.arg("layout"),
            "--format",
            "oci",
            "--compression",
            "none",
        ]);
    }
    shell(
        store.dir.path(),
        &format!(
            "skopeo copy -q --insecure-policy --dest-tls-verify=false --dest-compress-format {compression} \
             oci:layout:latest {}",
            registry.skopeo(name)
        ),
    );
}

fn files(store: &TestStore, image: &str) -> crate::image_support::Snapshot {
    store.look(image, snapshot)
}

#[test]
fn gzip_and_zstd_images_of_skopeo_are_pulled_with_the_same_files() {
    let (registry, from) = (Registry::new(), with_images());
    let expected = files(&from, "web");
    for compression in ["gzip", "zstd"] {
        let name = format!("plain/web:{compression}");
        pushed_by_skopeo(&from, &registry, compression, &name);
        let to = store();
        let pulled = to.json(&["pull", &registry.image(&name), "web"]);
        assert_eq!(pulled["came"], "tars", "{pulled}");
        assert_eq!(pulled["layers"].as_array().unwrap().len(), 2);
        assert_same(&files(&to, "web"), &expected);
        // By its digest it is the same image, and nothing of it is fetched or unpacked again.
        let digest = pulled["digest"].as_str().unwrap();
        fs::remove_file(registry.blob_file(&layer_digest(&registry, digest, 0))).unwrap();
        let pinned = format!("{}@{digest}", registry.image("plain/web"));
        let again = to.json(&["pull", &pinned, "pinned"]);
        assert_eq!(again["digest"], digest);
        let layers = again["layers"].as_array().unwrap();
        assert!(
            layers.iter().all(|layer| layer["existed"] == true),
            "{again}"
        );
        clean(&to);
    }
}

fn layer_digest(registry: &Registry, manifest: &str, layer: usize) -> String {
    let manifest = registry.document(manifest);
    manifest["layers"][layer]["digest"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn run_pulls_what_the_store_does_not_have_and_then_runs_it_without_a_registry() {
    let (mut registry, from, to) = (Registry::new(), with_images(), store());
    pushed_by_skopeo(&from, &registry, "gzip", "plain/web:1");
    let name = registry.image("plain/web:1");
    let said = to.output(&["run", "--rm", &registry.image("absent:1"), "--", "/bin/sh"]);
    assert_eq!(said.status.code(), Some(125));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("has no 1 in the repository absent"), "{said}");
    for gone in [false, true] {
        let said = to.ok(&["run", "--rm", &name, "--", "/bin/sh", "-c", "cat /etc/web"]);
        assert_eq!(said, "web\n", "{gone}");
        registry.stop();
    }
    to.ok(&["tag", &name, "web"]);
    assert_eq!(to.names("images").len(), 2);
}

#[test]
fn of_an_index_the_platform_is_taken_that_was_asked_for() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let name = registry.image("team/web:1");
    from.ok(&["push", "web", &name]);
    let said = to.fails(&["pull", &name, "--platform", "linux/riscv64"]);
    assert!(
        said.contains("no image for linux/riscv64") && said.contains("linux/amd64"),
        "{said}"
    );
    to.ok(&["pull", &name, "web", "--platform", "linux/amd64"]);
    let said = to.fails(&["pull", &name, "web"]);
    assert!(said.contains("there is an image web already"), "{said}");
    let said = to.fails(&["pull", &registry.image("team/web:2"), "two"]);
    assert!(
        said.contains("has no 2 in the repository team/web"),
        "{said}"
    );
    clean(&to);
}
