//! What is damaged, cut off or not there.

use std::fs;

use crate::common::TestStore;
use crate::ports::free_port;
use crate::registry_support::{Registry, clean, store, with_images};

/// The digest of the largest blob of data in the artifact under a tag.
fn data_blob(registry: &Registry, store: &TestStore) -> String {
    let pushed = store.json(&[
        "push",
        "web",
        &registry.image("web:1"),
        "--format",
        "blocks",
    ]);
    let blobs = registry.data_blobs(pushed["digest"].as_str().unwrap());
    let len = |digest: &String| fs::metadata(registry.blob_file(digest)).unwrap().len();
    blobs.into_iter().max_by_key(len).unwrap()
}

#[track_caller]
fn nothing_came(store: &TestStore) {
    assert!(store.names("images").is_empty());
    // The empty file system that images begin with is made before anything is fetched.
    store.ok(&["prune"]);
    clean(store);
}

#[test]
fn a_flipped_byte_is_refused_by_the_name_of_its_blob() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let digest = data_blob(&registry, &from);
    let file = registry.blob_file(&digest);
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&file, &bad).unwrap();
    let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
    assert!(
        said.contains(&digest) && said.contains("its bytes have the digest sha256:"),
        "{said}"
    );
    nothing_came(&to);
    fs::write(&file, &good).unwrap();
    to.ok(&["pull", &registry.image("web:1"), "web"]);
}

#[test]
fn a_blob_that_is_cut_off_is_refused_by_its_name() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let digest = data_blob(&registry, &from);
    let file = registry.blob_file(&digest);
    let good = fs::read(&file).unwrap();
    fs::write(&file, &good[..good.len() / 3]).unwrap();
    let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
    assert!(said.contains(&digest) && said.contains("damaged"), "{said}");
    nothing_came(&to);
    let longer = [&good[..], b"more"].concat();
    fs::write(&file, longer).unwrap();
    let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
    assert!(
        said.contains(&digest) && said.contains("more than"),
        "{said}"
    );
    nothing_came(&to);
    fs::remove_file(&file).unwrap();
    let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
    assert!(said.contains(&digest) && said.contains("404"), "{said}");
}

#[test]
fn a_damaged_layer_of_a_plain_image_and_a_damaged_manifest_are_refused() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let pushed = from.json(&["push", "web", &registry.image("web:1"), "--format", "oci"]);
    let digest = pushed["digest"].as_str().unwrap();
    let layer = registry.document(digest)["layers"][1]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    let file = registry.blob_file(&layer);
    let mut bad = fs::read(&file).unwrap();
    bad[20] ^= 1;
    fs::write(&file, bad).unwrap();
    let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
    assert!(said.contains(&layer), "{said}");
    nothing_came(&to);
    let file = registry.blob_file(digest);
    let text = fs::read_to_string(&file).unwrap();
    fs::write(
        &file,
        text.replace("schemaVersion\":2", "schemaVersion\": 2"),
    )
    .unwrap();
    let said = to.fails(&[
        "pull",
        &format!("{}@{digest}", registry.image("web")),
        "web",
    ]);
    assert!(said.contains(digest), "{said}");
}

#[test]
fn an_artifact_whose_table_is_of_other_data_is_refused() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let pushed = from.json(&[
        "push",
        "web",
        &registry.image("web:1"),
        "--format",
        "blocks",
    ]);
    let mut manifest = registry.document(pushed["digest"].as_str().unwrap());
    // The data of two layers in each other's place: every blob has its digest, and no chunk its own.
    let layers = manifest["layers"].as_array_mut().unwrap();
    let data: Vec<usize> = (0..layers.len())
        .filter(|index| {
            layers[*index]["mediaType"]
                .as_str()
                .unwrap()
                .contains("data")
        })
        .collect();
    layers.swap(data[0], data[1]);
    let layout = from.path("forged");
    fs::create_dir_all(&layout).unwrap();
    fs::write(layout.join("manifest"), manifest.to_string()).unwrap();
    let put = format!(
        "curl -sf -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' --data-binary @manifest \
         http://{}/v2/web/manifests/forged",
        registry.host()
    );
    crate::common::shell(&layout, &put);
    let said = to.fails(&["pull", &registry.image("web:forged"), "web"]);
    assert!(said.contains("bytes of data"), "{said}");
    nothing_came(&to);
}

#[test]
fn a_registry_that_is_not_there_is_named_with_what_to_do() {
    let store = with_images();
    let host = format!("127.0.0.1:{}", free_port());
    for arguments in [
        ["pull", &format!("{host}/web:1"), "x"],
        ["push", "web", &format!("{host}/web:1")],
    ] {
        let said = store.fails(&arguments);
        assert!(said.contains(&host) && said.contains("refused"), "{said}");
        assert!(said.contains("look whether the name is right"), "{said}");
    }
    let said = store.fails(&["pull", "lower/UPPER", "x"]);
    assert!(said.contains("HOST[:PORT]/REPOSITORY"), "{said}");
    clean(&store);
}
