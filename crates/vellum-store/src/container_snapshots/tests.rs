#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

use super::*;
use vellum_image::ImageConfig;

fn layer(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// A container on the image layers 1 and 2, whose top is the layer 3.
fn container() -> ContainerRecord {
    ContainerRecord {
        name: "db".into(),
        id: layer(100),
        image: "postgres".into(),
        image_id: layer(101),
        layers: vec![layer(1), layer(2)],
        top: layer(3),
        next: None,
        next_snapshot: None,
        snapshots: Vec::new(),
        at: None,
        disk: DiskInfo {
            virtual_size: 1 << 20,
            device_size: None,
            fs: None,
            holds: None,
        },
        config: ImageConfig::default(),
        volumes: Vec::new(),
        scaffold: Scaffold::default(),
        atime: None,
        confinement: crate::Confinement::default(),
        last_run: None,
        created: String::new(),
    }
}

/// As settling a snapshot does: the top joins the layers, the next layer is the top.
fn take(record: &mut ContainerRecord, name: &str, next: u128) -> Uuid {
    let snapshot = record.new_snapshot(name, Consistency::Crash).unwrap();
    let id = snapshot.id;
    record.layers.push(record.top);
    record.top = layer(next);
    record.keep_snapshot(snapshot).unwrap();
    id
}

#[test]
fn a_snapshot_has_the_layers_of_those_below_and_its_own() {
    let mut record = container();
    let first = take(&mut record, "first", 4);
    let second = take(&mut record, "second", 5);
    assert_eq!(record.snapshot_layers(first).unwrap(), [1, 2, 3].map(layer));
    assert_eq!(
        record.snapshot_layers(second).unwrap(),
        [1, 2, 3, 4].map(layer)
    );
    assert_eq!(record.snapshot("second").unwrap().layers, [layer(4)]);
    assert_eq!(record.at, Some(second));
    assert!(record.layers_since_snapshot().unwrap().is_empty());
}

#[test]
fn layers_of_a_commit_between_two_snapshots_are_the_second_ones() {
    let mut record = container();
    take(&mut record, "first", 4);
    record.layers.push(record.top);
    record.top = layer(5);
    let second = take(&mut record, "second", 6);
    assert_eq!(
        record.snapshot("second").unwrap().layers,
        [layer(4), layer(5)]
    );
    assert_eq!(record.snapshot_layers(second).unwrap(), record.layers);
}

#[test]
fn what_lies_above_a_removed_snapshot_keeps_its_layers() {
    let mut record = container();
    let first = take(&mut record, "first", 4);
    let second = take(&mut record, "second", 5);
    let third = take(&mut record, "third", 6);
    let before = record.snapshot_layers(third).unwrap();
    record.forget_snapshot(second);
    assert_eq!(record.snapshot_layers(third).unwrap(), before);
    assert_eq!(record.snapshot("third").unwrap().parent, Some(first));
    record.forget_snapshot(first);
    assert_eq!(record.snapshot_layers(third).unwrap(), before);
    record.forget_snapshot(third);
    assert_eq!((record.at, record.snapshots.len()), (None, 0));
    assert_eq!(record.layers_since_snapshot().unwrap(), before);
}

#[test]
fn after_a_rollback_snapshots_are_a_tree() {
    let mut record = container();
    let first = take(&mut record, "first", 4);
    let second = take(&mut record, "second", 5);
    record.layers = record.snapshot_layers(first).unwrap();
    record.at = Some(first);
    record.top = layer(6);
    let other = take(&mut record, "other", 7);
    assert_eq!(record.snapshot("other").unwrap().parent, Some(first));
    assert_eq!(
        record.snapshot_layers(other).unwrap(),
        [1, 2, 3, 6].map(layer)
    );
    assert_eq!(
        record.snapshot_layers(second).unwrap(),
        [1, 2, 3, 4].map(layer)
    );
    let named: HashSet<Uuid> = record.named_layers().copied().collect();
    // The top that it went back from is not kept.
    assert_eq!(named, [1, 2, 3, 4, 6, 7].map(layer).into());
}

#[test]
fn records_that_lead_in_a_circle_or_nowhere_are_damaged() {
    let mut record = container();
    let first = take(&mut record, "first", 4);
    let second = take(&mut record, "second", 5);
    record.snapshots[0].parent = Some(second);
    let error = record.snapshot_layers(first).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    record.snapshots[0].parent = Some(layer(77));
    assert_eq!(
        record.snapshot_layers(second).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    record.snapshots[0].parent = None;
    record.snapshots[0].layers.clear();
    assert_eq!(
        record.snapshot_layers(first).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert_eq!(
        record.layers_since_snapshot().unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[test]
fn a_name_is_taken_once_and_a_free_one_is_found() {
    let mut record = container();
    take(&mut record, "now", 4);
    let error = record.new_snapshot("now", Consistency::Clean).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(record.free_snapshot_name("now"), "now-2");
    assert_eq!(record.free_snapshot_name("then"), "then");
    assert!(record.new_snapshot("a@b", Consistency::Clean).is_err());
}
