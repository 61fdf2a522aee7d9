//! `vellum check`: what it finds, repairs and puts in quarantine.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::SystemTime;

use crate::common::{TestStore, shell};
use serde_json::Value;
use uuid::Uuid;
use vellum_store::{SnapshotKind, SnapshotRecord, Store};

/// Two images of which one has a layer of its own, and a container on each.
fn two_images() -> (TestStore, PathBuf) {
    let store = TestStore::new();
    store.small_image("base");
    let more = store.path("more");
    fs::create_dir(&more).unwrap();
    fs::write(more.join("app"), vec![9; 50_000]).unwrap();
    let report = store.json(&["import", "app", &store.arg("more"), "--from", "base"]);
    let layer = report["layers"][0]["layer"].as_str().unwrap();
    let dir = store.root.join("layers").join(layer);
    store.ok(&["create", "base", "--name", "on-base"]);
    store.ok(&["create", "app", "--name", "on-app"]);
    (store, dir)
}

/// Runs a check that finds something; returns its findings.
fn findings(store: &TestStore, arguments: &[&str], status: i32) -> Vec<Value> {
    let mut all = vec!["--json", "check"];
    all.extend(arguments);
    let output = store.output(&all);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(status),
        "{all:?}: {text}{errors}"
    );
    let report: Value = serde_json::from_str(&text).unwrap();
    report["findings"].as_array().unwrap().clone()
}

/// What has errors.
fn errors(findings: &[Value]) -> Vec<&str> {
    findings
        .iter()
        .filter(|finding| finding["severity"] == "error")
        .map(|finding| finding["what"].as_str().unwrap())
        .collect()
}

fn has(findings: &[Value], what: &str, problem: &str) -> bool {
    findings.iter().any(|finding| {
        finding["what"].as_str().unwrap().starts_with(what)
            && finding["problem"].as_str().unwrap().contains(problem)
    })
}

/// Changes a byte of a block that the image's files made: not one that a mount needs.
fn damage_data(dir: &std::path::Path, is_it: impl Fn(&[u8]) -> bool) {
    let path = dir.join("data");
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut at = 0;
    let mut block = [0; 4096];
    loop {
        file.read_exact_at(&mut block, at).unwrap();
        if is_it(&block) {
            break;
        }
        at += 4096;
    }
    block[77] ^= 0x10;
    file.write_all_at(&block, at).unwrap();
}

#[test]
fn a_flipped_bit_is_found_by_scrub_and_never_stops_the_others() {
    let (store, dir) = two_images();
    store.ok(&["check", "--scrub"]);
    damage_data(&dir, |block| block.iter().all(|byte| *byte == 9));
    store.ok(&["check"]);
    store.ok(&["check", "base", "on-base", "--scrub"]);

    let found = findings(&store, &["--scrub"], 1);
    assert!(
        has(&found, "layer", "do not match their checksums"),
        "{found:#?}"
    );
    assert!(has(&found, "image app", "damaged"), "{found:#?}");
    assert!(has(&found, "container on-app", "damaged"), "{found:#?}");
    assert!(!has(&found, "image base", ""), "{found:#?}");

    findings(&store, &["--scrub", "--repair"], 1);
    assert_eq!(store.names("images"), ["base"]);
    let error = store.fails(&["create", "app"]);
    assert!(error.contains("in quarantine"), "{error}");
    // Its container can still be saved from.
    let mounted = store.mount("on-app");
    assert_eq!(fs::read(mounted.join("file")).unwrap().len(), 100_000);
    store.ok(&["umount", "on-app"]);
    store.ok(&["rm", "on-app"]);
    // What is in quarantine keeps its layers.
    store.ok(&["prune"]);
    assert!(dir.join("data").exists());

    // The image again, by the way that the message names.
    store.ok(&["import", "app", &store.arg("more"), "--from", "base"]);
    store.ok(&["create", "app", "--name", "again"]);
    let mounted = store.mount("again");
    assert_eq!(fs::read(mounted.join("app")).unwrap(), vec![9; 50_000]);
    store.ok(&["umount", "again"]);
    for entry in fs::read_dir(store.root.join("quarantine/images")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    store.ok(&["prune"]);
    assert!(!dir.exists());
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_flipped_bit_in_a_layer_that_only_a_snapshot_uses_is_an_error_of_the_snapshot_too() {
    let (store, dir) = two_images();
    let opened = Store::open_or_create(&store.root).unwrap();
    let image = opened.image("app").unwrap();
    let [.., base, layer] = image.layers[..] else {
        panic!("{:?}", image.layers);
    };
    let record = SnapshotRecord {
        key: "unpacked".into(),
        id: Uuid::new_v4(),
        kind: SnapshotKind::Committed,
        parent: None,
        base,
        layers: vec![layer],
        virtual_size: image.disk.virtual_size,
        bytes: 0,
        base_inodes: None,
        inodes: None,
        device: false,
        labels: BTreeMap::new(),
        created: SystemTime::now(),
        updated: SystemTime::now(),
    };
    opened.prepare_snapshots().unwrap();
    let pin = opened.pin_layers().unwrap();
    opened.put_snapshot(&record, None, &pin).unwrap();
    drop(pin);
    // As containerd owns the truth there, the image and its container go by the store itself.
    opened.remove_container("on-app").unwrap();
    opened.remove_image("app").unwrap();
    store.ok(&["check", "--scrub"]);

    damage_data(&dir, |block| block.iter().all(|byte| *byte == 9));
    let found = findings(&store, &["--scrub"], 1);
    assert_eq!(
        errors(&found),
        [&*format!("layer {layer}"), "snapshot unpacked"]
    );
}

#[test]
fn a_damaged_layer_of_a_containers_snapshot_is_an_error_of_that_and_the_container_goes_on() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let write = |tag: u8| {
        let dir = store.mount("c");
        fs::write(dir.join("file"), vec![tag; 50_000]).unwrap();
        store.ok(&["umount", "c"]);
    };
    write(1);
    store.ok(&["snapshot", "c", "one"]);
    write(2);
    let kept = store.json(&["snapshot", "c", "two"]);
    let layer = kept["snapshot"]["layers"][0].as_str().unwrap().to_owned();
    // Only the snapshot has its layer from now on.
    store.ok(&["rollback", "c", "one", "--discard"]);
    store.ok(&["check", "--scrub"]);
    damage_data(&store.root.join("layers").join(&layer), |block| {
        block.iter().all(|byte| *byte == 2)
    });
    let found = findings(&store, &["--scrub"], 1);
    assert_eq!(
        errors(&found),
        [&*format!("layer {layer}"), "snapshot c@two"]
    );
    store.ok(&["rm", "c@two"]);
    store.ok(&["check", "--scrub"]);
    write(3);
}

#[test]
fn a_damaged_layer_is_not_shared_by_the_next_import() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        "umoci init --layout layout
         umoci new --image layout:one
         umoci unpack --image layout:one bundle
         head -c 100000 /dev/zero | tr '\\0' '\\t' > bundle/rootfs/file
         umoci repack --image layout:one bundle",
    );
    let layout = store.arg("layout");
    let report = store.json(&["import", "one", &layout, "--size", "64M"]);
    let layer = report["layers"][0]["layer"].as_str().unwrap();
    let dir = store.root.join("layers").join(layer);
    damage_data(&dir, |block| block.iter().all(|byte| *byte == 9));
    findings(&store, &["--scrub", "--repair"], 0);
    let again = store.json(&["import", "one", &layout, "--size", "64M"]);
    assert_eq!(again["layers"][0]["existed"], false, "{again}");
    store.ok(&["check", "one", "--scrub"]);
}

#[test]
fn each_damaged_or_missing_file_is_named_with_its_layer() {
    for file in ["layer", "seal", "data"] {
        for cut in [true, false] {
            let (store, dir) = two_images();
            let path = dir.join(file);
            if cut {
                let len = path.metadata().unwrap().size();
                let handle = fs::OpenOptions::new().write(true).open(&path).unwrap();
                handle.set_len(len / 2).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
            let found = findings(&store, &[], 1);
            let shown = path.display().to_string();
            // Without a seal the map is looked for: the layer says that it has none.
            let named = found.iter().any(|finding| {
                finding["what"].as_str().unwrap().starts_with("layer")
                    && (finding["problem"].as_str().unwrap().contains(&shown) || file == "seal")
            });
            assert!(named, "{file} cut {cut}: {found:#?}");
            if file == "seal" && !cut {
                continue;
            }
            assert!(has(&found, "image app", "damaged"), "{found:#?}");
            findings(&store, &["--repair"], 0);
            assert_eq!(store.names("images"), ["base"]);
            assert_eq!(store.names("ps"), ["on-base"]);
            store.ok(&["check"]);
            store.mount("on-base");
            store.ok(&["umount", "on-base"]);
        }
    }
}

#[test]
fn leftovers_and_wrong_counts_are_repaired() {
    let (store, dir) = two_images();
    let orphan = "11111111-2222-3333-4444-555555555555";
    fs::create_dir(store.root.join("staging").join(orphan)).unwrap();
    fs::write(store.root.join("staging/spool"), "x").unwrap();
    fs::create_dir(store.root.join("trash").join(orphan)).unwrap();
    fs::create_dir(store.root.join("run").join(orphan)).unwrap();
    fs::write(store.root.join(format!("run/{orphan}.lock")), "").unwrap();
    let info = dir.join("info.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&info).unwrap()).unwrap();
    record["bytes"] = 1.into();
    fs::write(&info, record.to_string()).unwrap();

    // What prune removes by itself wants nobody's attention; a count that is another does.
    let found = findings(&store, &[], 1);
    assert_eq!(found.len(), 6, "{found:#?}");
    let is_count = |finding: &Value| finding["what"].as_str().unwrap().starts_with("layer");
    for finding in &found {
        let severity = if is_count(finding) { "warning" } else { "note" };
        assert_eq!(finding["severity"], severity, "{found:#?}");
    }
    assert!(has(&found, "layer", "says 1 bytes"), "{found:#?}");
    let found = findings(&store, &["--repair"], 0);
    assert!(
        found.iter().all(|finding| finding["repaired"].is_string()),
        "{found:#?}"
    );
    store.ok(&["check"]);

    fs::write(store.root.join("staging/spool"), "x").unwrap();
    let found = findings(&store, &[], 0);
    assert!(has(&found, "leftover", "cut off"), "{found:#?}");
    store.ok(&["prune"]);
    assert_eq!(findings(&store, &[], 0), Vec::<Value>::new());
}

#[test]
fn run_files_of_an_earlier_boot_want_nobodys_attention() {
    let (store, _) = two_images();
    let id = store.json(&["inspect", "on-app"])[0]["container"]["id"].clone();
    let run_dir = store.root.join("run").join(id.as_str().unwrap());
    fs::create_dir_all(&run_dir).unwrap();
    // As a power cut leaves them: the device's mount point, a state that no longer tells anything.
    fs::write(run_dir.join("dev"), "").unwrap();
    fs::write(run_dir.join("state.json"), "{}").unwrap();
    let found = findings(&store, &[], 0);
    assert!(
        has(&found, "container on-app", "earlier boot"),
        "{found:#?}"
    );
    assert_eq!(found[0]["severity"], "note");
    store.mount("on-app");
    assert_eq!(findings(&store, &[], 0), Vec::<Value>::new());
    store.ok(&["umount", "on-app"]);
}

#[test]
fn a_damaged_record_is_an_error_and_prune_then_removes_no_layer() {
    let (store, _) = two_images();
    let path = store.root.join("images/app.json");
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    let layers = store.layers();
    let found = findings(&store, &["--repair"], 1);
    assert!(has(&found, "record", "app.json"), "{found:#?}");
    store.fails(&["prune"]);
    assert_eq!(store.layers(), layers);
    assert_eq!(store.names("images"), ["base"]);
    store.mount("on-base");
    store.ok(&["umount", "on-base"]);
    fs::write(&path, good).unwrap();
    store.ok(&["check"]);
}

#[test]
fn a_store_in_use_is_checked_without_complaints() {
    let (store, _) = two_images();
    let dir = store.mount("on-app");
    fs::write(dir.join("new"), vec![1; 1 << 20]).unwrap();
    store.ok(&["commit", "on-app", "third"]);
    fs::write(dir.join("more"), vec![1; 1 << 20]).unwrap();
    assert_eq!(findings(&store, &["--scrub"], 0), Vec::<Value>::new());
    assert_eq!(findings(&store, &["--repair"], 0), Vec::<Value>::new());
    store.ok(&["umount", "on-app"]);
}
