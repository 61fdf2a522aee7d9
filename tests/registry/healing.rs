//! What the disk loses of a layer that is in a registry is fetched again: docs/lazy.md, "Healing".

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::TestStore;
use crate::lazy::{end_fetchers, files};
use crate::registry_support::{Registry, clean, digests, pushed, with_images};

const BLOCK: usize = 4096;

/// A registry that has `web:1`, the store that pushed it, and one that pulled all of it.
fn pulled() -> (Registry, TestStore, TestStore) {
    let (registry, from, to) = pushed();
    to.ok(&["pull", &registry.image("web:1"), "web"]);
    (registry, from, to)
}

/// Directories of the layers that were pulled; the empty file system at the bottom is made here.
fn pulled_layers(store: &TestStore) -> Vec<PathBuf> {
    let dirs = store.layers().into_iter();
    let dirs = dirs.map(|layer| store.root.join("layers").join(layer));
    dirs.filter(|dir| dir.join("remote").exists()).collect()
}

/// Changes a byte of every `step`th block that holds something, and has the next reads come from the disk. Returns how many
/// blocks that were.
fn damage(store: &TestStore, step: usize) -> usize {
    damage_in(pulled_layers(store), step)
}

/// As [`damage`], of layers in these directories.
pub fn damage_in(dirs: Vec<PathBuf>, step: usize) -> usize {
    let mut count = 0;
    for dir in dirs {
        let path = dir.join("data");
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        let blocks = bytes.chunks(BLOCK).enumerate();
        let held = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        for (index, block) in held.step_by(step) {
            file.write_all_at(&[block[9] ^ 1], (index * BLOCK + 9) as u64)
                .unwrap();
            count += 1;
        }
        file.sync_all().unwrap();
    }
    assert!(count > 0, "nothing was damaged");
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    count
}

/// What a command says of which something is left that wants a person.
pub fn finds(store: &TestStore, arguments: &[&str]) -> String {
    let output = store.output(arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
}

#[test]
fn blocks_that_the_disk_changed_come_again_when_they_are_read_and_stay_right() {
    let (mut registry, from, to) = pulled();
    damage(&to, 3);
    finds(&to, &["check", "--scrub"]);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    from.ok(&["export", "web", &from.arg("web.raw"), "--format", "raw"]);
    assert!(fs::read(to.path("web.raw")).unwrap() == fs::read(from.path("web.raw")).unwrap());
    end_fetchers(&to);
    registry.stop();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    to.ok(&["export", "web", &to.arg("again.raw"), "--format", "raw"]);
    assert!(fs::read(to.path("again.raw")).unwrap() == fs::read(to.path("web.raw")).unwrap());
}

#[test]
fn check_repair_fetches_them_too_and_nothing_goes_into_quarantine() {
    let (_registry, from, to) = pulled();
    damage(&to, 5);
    let said = finds(&to, &["check", "--scrub"]);
    assert!(said.contains("--repair fetches them again"), "{said}");
    assert!(!said.contains("quarantine"), "{said}");
    let said = to.ok(&["check", "--scrub", "--repair"]);
    assert!(said.contains("fetched again: all of it is right"), "{said}");
    end_fetchers(&to);
    to.ok(&["check", "--scrub"]);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    clean(&to);
}

#[test]
fn without_the_registry_damage_is_the_error_that_it_was_and_it_heals_when_that_is_back() {
    let (mut registry, _from, mut to) = pulled();
    to.env.push(("VELLUM_STALL", "fail"));
    damage(&to, 1);
    registry.stop();
    let raw = to.arg("web.raw");
    let began = Instant::now();
    let said = to.fails(&["export", "web", &raw, "--format", "raw"]);
    assert!(said.contains("does not match its checksum"), "{said}");
    assert!(said.contains("no answer from"), "{said}");
    let said = finds(&to, &["check", "--scrub", "--repair"]);
    assert!(said.contains("no answer from"), "{said}");
    assert!(!said.contains("in quarantine"), "{said}");
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    end_fetchers(&to);
    registry.start_again();
    to.ok(&["export", "web", &raw, "--format", "raw"]);
    to.ok(&["check", "--scrub", "--repair"]);
    end_fetchers(&to);
    to.ok(&["check", "--scrub"]);
    clean(&to);
}

#[test]
fn wrong_bytes_of_a_registry_heal_nothing() {
    let (registry, _from, mut to) = pulled();
    to.env.push(("VELLUM_STALL", "fail"));
    damage(&to, 1);
    for (path, _) in registry.blobs() {
        let mut bytes = fs::read(&path).unwrap();
        bytes
            .iter_mut()
            .skip(40)
            .step_by(50)
            .for_each(|byte| *byte ^= 1);
        fs::write(&path, bytes).unwrap();
    }
    let said = to.fails(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    assert!(said.contains("does not match its SHA-256"), "{said}");
    let said = finds(&to, &["check", "--scrub"]);
    assert!(said.contains("do not match their checksums"), "{said}");
    end_fetchers(&to);
}

#[test]
fn layers_that_were_pushed_heal_too_also_by_check_and_by_where_they_were_pushed_last() {
    let (mut registry, from, other) = pushed();
    let raw = |store: &TestStore, name: &str| {
        store.ok(&["export", "web", &store.arg(name), "--format", "raw"]);
        fs::read(store.path(name)).unwrap()
    };
    let right = raw(&from, "before.raw");
    assert!(damage(&from, 3) > 10);
    finds(&from, &["check", "--scrub"]);
    assert!(raw(&from, "read.raw") == right);
    damage(&from, 4);
    let said = from.ok(&["check", "--scrub", "--repair"]);
    assert!(said.contains("fetched again: all of it is right"), "{said}");
    from.ok(&["check", "--scrub"]);
    // It moves to another one.
    end_fetchers(&from);
    let second = Registry::new();
    from.ok(&["push", "web", &second.image("moved:1")]);
    registry.stop();
    damage(&from, 5);
    assert!(raw(&from, "moved.raw") == right);
    // What lies below other blocks was not read.
    from.ok(&["check", "--scrub", "--repair"]);
    end_fetchers(&from);
    clean(&from);
    drop(other);
}

#[test]
fn a_push_of_the_image_alone_notes_nothing_and_damage_stays_an_error() {
    let (registry, from) = (Registry::new(), with_images());
    from.ok(&["push", "web", &registry.image("web:1"), "--format", "oci"]);
    assert!(pulled_layers(&from).is_empty());
}

/// Directories of lazy layers of which something is here.
fn lazy_layers(store: &TestStore) -> Vec<PathBuf> {
    let dirs = pulled_layers(store).into_iter();
    dirs.filter(|dir| dir.join("have").exists()).collect()
}

#[test]
fn blocks_of_a_layer_that_is_not_whole_are_checked_and_come_again_when_the_disk_changed_them() {
    let (registry, from, to) = pushed();
    to.ok(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    // Some of it comes, and is noted.
    assert_eq!(files(&to, "web"), files(&from, "web"));
    end_fetchers(&to);
    assert!(!lazy_layers(&to).is_empty(), "all of it came");
    assert!(damage(&to, 3) > 10);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    from.ok(&["export", "web", &from.arg("web.raw"), "--format", "raw"]);
    assert!(fs::read(to.path("web.raw")).unwrap() == fs::read(from.path("web.raw")).unwrap());
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn without_the_registry_damage_of_a_layer_that_is_not_whole_is_an_error_and_never_shown() {
    let (mut registry, _from, mut to) = pushed();
    to.ok(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    to.ok(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    // What came is noted, and it is not completed yet.
    std::thread::sleep(Duration::from_millis(100));
    end_fetchers(&to);
    to.env.push(("VELLUM_STALL", "fail"));
    registry.stop();
    damage(&to, 1);
    let said = to.fails(&["export", "web", &to.arg("again.raw"), "--format", "raw"]);
    let known = ["does not match its checksum", "no answer from"];
    assert!(known.iter().any(|one| said.contains(one)), "{said}");
    end_fetchers(&to);
    registry.start_again();
    to.ok(&["export", "web", &to.arg("again.raw"), "--format", "raw"]);
    assert!(fs::read(to.path("again.raw")).unwrap() == fs::read(to.path("web.raw")).unwrap());
    end_fetchers(&to);
}

#[test]
fn completion_fetches_damaged_windows_again_by_itself() {
    let (registry, from, to) = pushed();
    to.ok(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    end_fetchers(&to);
    damage(&to, 3);
    to.ok(&["complete", "web"]);
    assert!(lazy_layers(&to).is_empty());
    to.ok(&["check", "--scrub"]);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    end_fetchers(&to);
}
