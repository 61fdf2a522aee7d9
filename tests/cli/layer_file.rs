//! `vellum export --format layer` and its import: the layers are the same in the other store, byte for byte;
//! what it has is not stored twice; what is not whole, or not what it says, leaves nothing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use vellum_backup::{LayerEntry, LayerPart, LayerReader, LayerWriter};
use vellum_base::block::{BlockState, Run};
use vellum_base::crash_point;

use crate::common::{TestStore, VELLUM, run, shell};
use crate::image_support::{assert_same, snapshot};

/// Images `base`, `mid` on it and `top` on that, and the container `c`, which nothing was written to since.
fn prepared() -> TestStore {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("mid"), vec![5; 300_000]).unwrap();
    store.ok(&["commit", "c", "mid"]);
    fs::write(dir.join("top"), "top\n").unwrap();
    shell(&dir, "rm file mid; sync -f .; fstrim .");
    store.ok(&["umount", "c"]);
    store.ok(&["commit", "c", "top"]);
    store
}

fn uuids(store: &TestStore, image: &str) -> Vec<String> {
    let record = fs::read(store.root.join(format!("images/{image}.json"))).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let layers = record["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer.as_str().unwrap().to_owned())
        .collect()
}

/// The image has the same layers in both stores: headers, maps, checksums, digests.
#[track_caller]
fn same_layers(one: &TestStore, other: &TestStore, image: &str, there: &str) {
    let layers = uuids(one, image);
    assert_eq!(layers, uuids(other, there));
    for layer in layers {
        for file in ["layer", "seal"] {
            let of = |store: &TestStore| store.root.join(format!("layers/{layer}/{file}"));
            run("cmp", &[of(one), of(other)]);
        }
    }
}

/// Nothing half made, nothing that no record names, nothing damaged.
#[track_caller]
fn clean(store: &TestStore) {
    let pruned = store.json(&["prune"]);
    assert_eq!(pruned["layers"], serde_json::json!([]), "{pruned}");
    assert_eq!(pruned["leftovers"], serde_json::json!([]), "{pruned}");
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

fn export(store: &TestStore, name: &str) -> String {
    let file = store.arg(&format!("{name}.vl"));
    store.ok(&["export", name, &file, "--format", "layer"]);
    file
}

fn files(store: &TestStore, image: &str) -> crate::image_support::Snapshot {
    store.look(image, snapshot)
}

#[test]
fn an_image_has_the_same_layers_in_another_store_by_file_and_by_pipe() {
    let (store, other, piped) = (prepared(), TestStore::new(), TestStore::new());
    let file = export(&store, "top");
    let size = fs::metadata(&file).unwrap().len();
    assert!(size < 500_000, "{size} bytes are not compressed");
    let report = other.json(&["import", "top", &file]);
    assert_eq!(report["layers"].as_array().unwrap().len(), 4);

    let mut from = store
        .command()
        .args(["export", "top", "-", "--format", "layer"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut to: Command = piped.command();
    let to = to
        .args(["import", "again", "-"])
        .stdin(from.stdout.take().unwrap())
        .output()
        .unwrap();
    assert!(
        to.status.success() && from.wait().unwrap().success(),
        "{to:?}"
    );

    let expected = store.content("top");
    for (there, name) in [(&other, "top"), (&piped, "again")] {
        same_layers(&store, there, "top", name);
        assert!(there.content(name) == expected);
        assert_same(&files(&store, "top"), &files(there, name));
        let steps = |store: &TestStore, name| store.json(&["history", name]);
        assert_eq!(steps(&store, "top"), steps(there, name));
        clean(there);
    }
    // The same again is another name for the same layers.
    let before = other.layers();
    let report = other.json(&["import", "second", &file, "--format", "layer"]);
    let existed = report["layers"].as_array().unwrap().iter();
    assert!(
        existed.clone().all(|layer| layer["existed"] == true),
        "{report}"
    );
    assert_eq!(other.layers(), before);
    let said = other.fails(&["import", "top", &file]);
    assert!(said.contains("there is an image top already"), "{said}");
    for option in [["--size", "1G"], ["--from", "top"], ["--select", "x"]] {
        let said = other.fails(&[&["import", "x", &file][..], &option].concat());
        assert!(said.contains(option[0]), "{said}");
    }
}

#[test]
fn only_layers_that_the_other_store_lacks_are_stored_and_those_left_out_must_be_there() {
    let (store, other) = (prepared(), TestStore::new());
    let (base, top) = (export(&store, "base"), store.arg("only.vl"));
    store.ok(&[
        "export",
        "top",
        &top,
        "--format",
        "layer",
        "--without",
        "base",
    ]);
    let said = other.fails(&["import", "top", &top]);
    let missing = &uuids(&store, "top")[0];
    assert!(
        said.contains(missing) && said.contains("image base"),
        "{said}"
    );
    assert!(other.layers().is_empty());
    other.ok(&["import", "base", &base]);
    assert_eq!(other.layers().len(), 2);
    let report = other.json(&["import", "top", &top]);
    let layers = report["layers"].as_array().unwrap().iter();
    let existed: Vec<&Value> = layers.map(|layer| &layer["existed"]).collect();
    assert_eq!(existed, [true, true, false, false]);
    assert_eq!(other.layers().len(), 4);
    same_layers(&store, &other, "top", "top");
    // A whole file of what is there already stores nothing.
    other.ok(&["import", "mid", &export(&store, "mid")]);
    assert_eq!(other.layers().len(), 4);
    assert!(other.content("mid") == store.content("mid"));
    other.ok(&["rmi", "top"]);
    clean(&other);
    assert_eq!(other.layers().len(), 3);
    let said = store.fails(&[
        "export",
        "mid",
        &store.arg("x"),
        "--format",
        "raw",
        "--without",
        "base",
    ]);
    assert!(said.contains("--without is for"), "{said}");
}

#[test]
fn containers_are_sealed_for_it_and_joined_layers_keep_their_places() {
    let (store, other) = (prepared(), TestStore::new());
    // Nothing was written since, so there is nothing to seal.
    let before = store.layers();
    let file = export(&store, "c");
    assert_eq!(store.layers(), before);
    other.ok(&["import", "c", &file]);
    assert_eq!(uuids(&other, "c"), uuids(&store, "top"));

    let dir = store.mount("c");
    for step in 0..3 {
        fs::write(dir.join(format!("step-{step}")), vec![step; 50_000]).unwrap();
        store.ok(&["snapshot", "c", &format!("s{step}")]);
    }
    fs::write(dir.join("last"), "last\n").unwrap();
    store.ok(&["merge", "c", "--keep", "s1"]);
    let joined = export(&store, "c@s1");
    let now = store.arg("now.vl");
    store.ok(&["export", "c", &now, "--format", "layer"]);
    store.ok(&["umount", "c"]);
    other.ok(&["import", "s1", &joined]);
    other.ok(&["import", "now", &now]);
    assert!(other.content("s1") == store.content("c@s1"));
    assert_eq!(files(&other, "now").len(), files(&other, "s1").len() + 2);
    let places = |store: &TestStore| {
        let layers = uuids(&other, "now").into_iter();
        let header = |layer| fs::read(store.root.join(format!("layers/{layer}/layer"))).unwrap();
        layers.map(header).collect::<Vec<_>>()
    };
    let headers = places(&other);
    assert!(headers == places(&store));
    // The feature "stands for".
    assert!(headers.iter().any(|header| header[16] == 1));
    // And on from there, where no container says what lies below what.
    let third = TestStore::new();
    let on = export(&other, "now");
    third.ok(&["import", "now", &on]);
    same_layers(&other, &third, "now", "now");
    for there in [&other, &third] {
        clean(there);
    }
}

#[test]
fn what_is_cut_off_or_changed_anywhere_leaves_nothing() {
    let (store, other) = (prepared(), TestStore::new());
    let file = export(&store, "top");
    let bytes = fs::read(&file).unwrap();
    let bad = store.arg("bad.vl");
    let step = bytes.len() / 12;
    for at in (0..bytes.len()).step_by(step).chain([bytes.len() - 1]) {
        let mut changed = bytes.clone();
        changed[at] ^= 4;
        for content in [&changed[..], &bytes[..at]] {
            fs::write(&bad, content).unwrap();
            other.fails(&["import", "top", &bad]);
        }
    }
    assert!(other.layers().is_empty());
    assert_eq!(other.names("images"), [""; 0]);
    clean(&other);
}

type Layers = Vec<(LayerEntry, Vec<(Run<BlockState>, Vec<u8>)>)>;

/// Writes a layer file anew with what somebody else would like it to say, and imports it.
fn forged(
    store: &TestStore,
    file: &str,
    change: impl FnOnce(&mut Value, &mut Layers),
) -> std::process::Output {
    let mut reader = LayerReader::new(fs::File::open(file).unwrap()).unwrap();
    let mut description = serde_json::from_slice(reader.description()).unwrap();
    let mut layers = Layers::new();
    while let Some(part) = reader.next_part().unwrap() {
        match part {
            LayerPart::Layer(entry) => layers.push((*entry, Vec::new())),
            LayerPart::Chunk(chunk) => {
                let pieces = chunk.pieces().map(|(run, bytes)| (run, bytes.to_vec()));
                layers.last_mut().unwrap().1.extend(pieces);
            }
        }
    }
    change(&mut description, &mut layers);
    let forged = store.arg("forged.vl");
    let out = fs::File::create(&forged).unwrap();
    let description = serde_json::to_vec(&description).unwrap();
    let mut writer = LayerWriter::new(out, layers.len(), &description).unwrap();
    for (entry, runs) in layers {
        writer.layer(&entry).unwrap();
        for (run, bytes) in runs {
            match run.value {
                BlockState::Data => writer.data(run.start(), &bytes).unwrap(),
                _ => writer.zero(run.span).unwrap(),
            }
        }
    }
    writer.finish().unwrap();
    store.output(&["import", "forged", &forged])
}

#[test]
fn a_file_that_is_whole_and_lies_is_refused() {
    let (store, other) = (prepared(), TestStore::new());
    let file = export(&store, "top");
    let said = |output: std::process::Output| {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let change_data = |layers: &mut Layers| {
        let (_, runs) = &mut layers[1];
        let data = runs.iter_mut().find(|(_, bytes)| !bytes.is_empty());
        data.unwrap().1[9] ^= 1;
    };
    let text = said(forged(&other, &file, |_, layers| change_data(layers)));
    assert!(text.contains("do not match its digest"), "{text}");
    let text = said(forged(&other, &file, |_, layers| layers.swap(1, 2)));
    assert!(text.contains("does not fit on the one before"), "{text}");
    let text = said(forged(&other, &file, |_, layers| drop(layers.remove(0))));
    assert!(text.contains("does not fit on the one before"), "{text}");
    let text = said(forged(&other, &file, |image, _| {
        image["fs"]["kind"] = "overlay".into();
    }));
    assert!(text.contains("overlay"), "{text}");
    let text = said(forged(&other, &file, |image, _| {
        image["virtual_size"] = 5.into();
    }));
    assert!(text.contains("virtual size of 5 bytes"), "{text}");
    let text = said(forged(&other, &file, |image, _| {
        image["config"] = 5.into();
    }));
    assert!(text.contains("makes no sense"), "{text}");
    assert!(other.layers().is_empty());
    // What is there by this name is never taken for what the file says.
    other.ok(&["import", "top", &file]);
    let text = said(forged(&other, &file, |_, layers| {
        layers[1].0.digest[0] ^= 1;
    }));
    assert!(
        text.contains("its content is not that of the file"),
        "{text}"
    );
    let text = said(forged(&other, &file, |_, layers| {
        layers[1].0.header[80] ^= 1
    }));
    assert!(text.contains("CRC"), "{text}");
    clean(&other);
    let said = other.fails(&["import", "x", &file, "--format", "tar"]);
    assert!(said.contains("does not begin as a tar"), "{said}");
    let said = other.fails(&["import", "x", &other.arg("forged.vl"), "--format", "qcow2"]);
    assert!(!said.is_empty());
}

#[test]
fn no_import_takes_a_layer_of_a_file_for_one_of_its_own() {
    let (store, other) = (prepared(), TestStore::new());
    let file = export(&store, "base");
    let output = forged(&other, &file, |_, layers| {
        let mut known: Value = serde_json::from_slice(&layers[1].0.info).unwrap();
        known["template"] = "ext4-v2-67108864".into();
        known["chain_key"] = "ext4-v2-67108864/sha256:0".into();
        layers[1].0.info = serde_json::to_vec(&known).unwrap();
    });
    assert!(output.status.success(), "{output:?}");
    let keys: Vec<bool> = uuids(&other, "forged")
        .iter()
        .map(|layer| {
            let info = other.root.join(format!("layers/{layer}/info.json"));
            fs::read_to_string(info).unwrap().contains("chain_key")
        })
        .collect();
    // The empty file system is known as what it is.
    assert_eq!(keys, [true, false]);
}

#[test]
fn an_import_that_is_killed_anywhere_leaves_nothing_half_made() {
    let store = prepared();
    let file = export(&store, "top");
    for place in crash_point::LAYER_FILES {
        let other = TestStore::new();
        let arguments = ["import", "top", &file];
        // In the second layer.
        let time = if place.contains("record") { 1 } else { 2 };
        other.killed(&format!("{place}:{time}"), &arguments);
        let is_done = place.contains("record");
        assert_eq!(other.names("images").len(), usize::from(is_done), "{place}");
        if !is_done {
            let published = other.layers().len();
            assert_eq!(published, if place.contains("published") { 2 } else { 0 });
            // What the first attempt left is in nobody's way.
            let report = other.json(&arguments);
            let layers = report["layers"].as_array().unwrap().iter();
            let existed = layers.filter(|layer| layer["existed"] == true).count();
            assert_eq!(existed, published, "{place}");
        }
        same_layers(&store, &other, "top", "top");
        other.ok(&["prune"]);
        clean(&other);
        assert!(
            !Path::new(&other.root.join("staging"))
                .read_dir()
                .unwrap()
                .any(|_| true)
        );
    }
}

#[test]
fn images_go_out_of_a_store_that_cannot_be_written_and_containers_that_were_written_do_not() {
    let (store, other) = (prepared(), TestStore::new());
    fs::write(store.mount("c").join("more"), "more\n").unwrap();
    store.ok(&["umount", "c"]);
    let root = store.path("read-only");
    fs::create_dir(&root).unwrap();
    let root = root.to_str().unwrap();
    run(
        "mount",
        &["-o", "bind,ro", store.root.to_str().unwrap(), root],
    );
    let file = store.arg("saved.vl");
    let export = |name: &str, file: &str| {
        let mut command = Command::new(VELLUM);
        command
            .args(["--root", root, "export", name, file, "--format", "layer"])
            .output()
            .unwrap()
    };
    let image = export("top", &file);
    let container = export("c", &store.arg("none.vl"));
    run("umount", &[root]);
    assert!(image.status.success(), "{image:?}");
    let said = String::from_utf8(container.stderr).unwrap();
    assert!(said.contains("cannot be changed to seal it"), "{said}");
    assert!(!store.path("none.vl").exists());
    other.ok(&["import", "top", &file]);
    same_layers(&store, &other, "top", "top");
}
