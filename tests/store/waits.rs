//! How often an operation on the store waits for the disk: what may become durable side by side is
//! synced together.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;
use vellum_base::storage::{Moment, Observer, OpKind, SimStorage, Storage};
use vellum_core::layer::{LayerOptions, WritableLayer};
use vellum_store::{DiskInfo, Fork, ImageRecord, LayerInfo, NewContainer, SnapshotRecord, Store};

use crate::crash::snapshot_record;

const ROOT: &str = "/vellum-simulated-store";
const SIZE: u64 = 1 << 20;

type Changes = Arc<Mutex<Vec<(OpKind, PathBuf)>>>;

/// A store with an image, and all that is changed in it from now on.
fn store_with_image() -> (Store, Changes) {
    let disk = SimStorage::new();
    disk.create_dir(Path::new(ROOT)).unwrap();
    let store = Store::with_storage(Path::new(ROOT), Arc::new(disk.clone())).unwrap();
    let pin = store.pin_layers().unwrap();
    let staged = store.stage_layer(None, SIZE).unwrap();
    let storage = store.storage().clone();
    let layer = WritableLayer::open(storage, &staged.dir(), LayerOptions::default()).unwrap();
    layer.seal().unwrap();
    let layer = staged.publish(&LayerInfo::default(), &pin).unwrap();
    let image = ImageRecord {
        name: "image".into(),
        id: Uuid::new_v4(),
        layers: vec![layer],
        disk: DiskInfo {
            virtual_size: SIZE,
            device_size: None,
            fs: None,
            holds: None,
        },
        config: vellum_image::ImageConfig::default(),
        created: String::new(),
    };
    store.put_image(&image, &pin).unwrap();
    store.prepare_snapshots().unwrap();
    let changes = Changes::default();
    let seen = changes.clone();
    let observer: Observer = Arc::new(move |moment: &Moment<'_>| {
        seen.lock().push((moment.kind, moment.path.to_owned()));
    });
    disk.observe(Some(observer));
    (store, changes)
}

/// What was synced between two changes of other kinds, by the last parts of the names, with UUIDs as such.
fn waits(changes: &Changes) -> Vec<Vec<String>> {
    let changes = changes.lock();
    let shown = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        match name.split_once('.').map_or(name, |(stem, _)| stem) {
            stem if Uuid::parse_str(stem).is_ok() => name.replace(stem, "UUID"),
            _ => name.to_owned(),
        }
    };
    let groups = changes.chunk_by(|(one, _), (other, _)| one.is_sync() && other.is_sync());
    let mut waits = Vec::new();
    for group in groups.filter(|group| group.iter().all(|(kind, _)| kind.is_sync())) {
        let mut names: Vec<String> = group.iter().map(|(_, path)| shown(path)).collect();
        names.sort();
        waits.push(names);
    }
    waits
}

/// The waits for an empty layer that one record names.
fn of_one_layer(record: &str, directory: &str) -> Vec<Vec<String>> {
    let mut first = vec!["UUID", "data", "info.json", "layer", "layers", record];
    first.sort_unstable();
    let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
    vec![names(first), names(vec![directory])]
}

#[test]
fn a_container_is_durable_after_two_waits_for_the_disk() {
    let (store, changes) = store_with_image();
    let new = NewContainer {
        image: "image",
        name: Some("c"),
        ..NewContainer::default()
    };
    store.create_container(&new).unwrap();
    assert_eq!(waits(&changes), of_one_layer("c.json.tmp", "containers"));
}

#[test]
fn a_fork_and_the_layer_that_a_commit_goes_on_in_are_durable_after_two_waits() {
    let (store, changes) = store_with_image();
    let new = NewContainer {
        image: "image",
        name: Some("c"),
        ..NewContainer::default()
    };
    let origin = store.create_container(&new).unwrap();
    let pin = store.pin_layers().unwrap();
    changes.lock().clear();
    let fork = Fork::of_container(origin, Vec::new());
    store.create_forks(&fork, &["f".into()], &pin).unwrap();
    assert_eq!(waits(&changes), of_one_layer("f.json.tmp", "containers"));
    changes.lock().clear();
    store.prepare_commit("c", None, &pin).unwrap();
    let found = waits(&changes);
    let (_, last) = found.split_at(found.len() - 2);
    assert_eq!(last, of_one_layer("c.json.tmp", "containers"));
}

#[test]
fn a_snapshot_of_containerds_is_durable_after_two_waits_and_its_layer_is_there_before() {
    let (store, changes) = store_with_image();
    let base = store.image("image").unwrap().top().unwrap();
    let pin = store.pin_layers().unwrap();
    let staged = store.stage_layer(Some(base), SIZE).unwrap();
    let layer = staged.place(&LayerInfo::default(), &pin).unwrap();
    assert!(store.has_layer(layer.uuid).unwrap());
    assert_eq!(waits(&changes), Vec::<Vec<String>>::new());
    let record = SnapshotRecord {
        virtual_size: SIZE,
        ..snapshot_record("k", None, base, layer.uuid)
    };
    store.put_snapshot(&record, Some(&layer), &pin).unwrap();
    assert_eq!(waits(&changes), of_one_layer("UUID.json.tmp", "snapshots"));
}
