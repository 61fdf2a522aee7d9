//! Further names of images, other names of containers.

use std::fs;

use crate::common::TestStore;

#[test]
fn an_image_has_two_names_and_each_is_removed_by_itself() {
    let store = TestStore::new();
    store.small_image("base");
    assert_eq!(store.ok(&["tag", "base", "hub/base:1"]), "hub/base:1\n");
    assert_eq!(store.ok(&["tag", "base", "hub/base:1"]), "hub/base:1\n");
    assert_eq!(store.names("images"), ["base", "hub/base:1"]);
    let both = store.json(&["inspect", "base", "hub/base:1"]);
    let (one, two) = (&both[0]["image"], &both[1]["image"]);
    assert_eq!((&one["id"], &one["layers"]), (&two["id"], &two["layers"]));

    store.ok(&["create", "base", "--name", "c"]);
    store.ok(&["rmi", "base"]);
    assert_eq!(store.names("images"), ["hub/base:1"]);
    let dir = store.mount("c");
    fs::write(dir.join("new"), "new\n").unwrap();
    assert_eq!(store.ok(&["diff", "c"]), "A /new\n", "against its image");
    store.ok(&["umount", "c"]);
    let error = store.fails(&["rmi", "hub/base:1"]);
    assert!(error.contains("in use by container c"), "{error}");
    store.ok(&["tag", "hub/base:1", "base"]);
    store.ok(&["rmi", "hub/base:1"]);
    store.ok(&["check", "--scrub"]);
    store.ok(&["rm", "c"]);
    // Both at once are its last names.
    store.ok(&["tag", "base", "other"]);
    store.ok(&["rmi", "base", "other"]);
    store.ok(&["prune"]);
    assert_eq!(store.layers(), Vec::<String>::new());
    store.assert_nothing_runs();
}

#[test]
fn the_last_of_several_names_that_are_removed_at_once_stays_while_a_container_needs_the_image() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["tag", "base", "other"]);
    store.ok(&["create", "other", "--name", "c"]);
    let error = store.fails(&["rmi", "base", "other"]);
    assert!(error.contains("in use by container c"), "{error}");
    assert_eq!(store.names("images"), ["other"]);
}

#[test]
fn a_name_that_is_anothers_is_not_taken_over() {
    let store = TestStore::new();
    store.small_image("base");
    store.small_image("other");
    for (command, says) in [
        (&["tag", "base", "other"][..], "vellum rmi other"),
        (&["tag", "base", "../x"], "cannot be the name"),
        (&["tag", "none", "new"], "there is no image none"),
    ] {
        let error = store.fails(command);
        assert!(error.contains(says), "{command:?}: {error}");
    }
    assert_eq!(store.names("images"), ["base", "other"]);
    let both = store.json(&["inspect", "base", "other"]);
    assert_ne!(both[0]["image"]["id"], both[1]["image"]["id"]);
}

#[test]
fn a_container_is_renamed_with_all_that_is_its_own() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "old"]);
    store.ok(&["create", "base", "--name", "taken"]);
    let dir = store.mount("old");
    fs::write(dir.join("file"), "its own\n").unwrap();
    store.ok(&["umount", "old"]);
    let id = store.json(&["inspect", "old"])[0]["container"]["id"].clone();
    assert_eq!(store.ok(&["rename", "old", "new"]), "new\n");
    assert_eq!(store.names("ps"), ["new", "taken"]);
    assert_eq!(
        store.json(&["inspect", "new"])[0]["container"]["id"],
        id,
        "it is the same one"
    );
    for (command, says) in [
        (&["mount", "old"][..], "there is no container old"),
        (&["rename", "old", "x"], "there is no container old"),
        (&["rename", "new", "taken"], "vellum rm taken"),
        (
            &["rename", "new", "new"],
            "there is a container new already",
        ),
        (&["rename", "new", "a/b"], "cannot be the name"),
    ] {
        let error = store.fails(command);
        assert!(error.contains(says), "{command:?}: {error}");
    }
    // The old name is free.
    store.ok(&["create", "base", "--name", "old"]);
    assert_eq!(store.ok(&["diff", "old"]), "");
    assert_eq!(store.ok(&["diff", "new"]), "C /file\n");
    store.ok(&["commit", "new", "image"]);
    store.ok(&["check", "--scrub"]);
    store.ok(&["rm", "old", "new", "taken"]);
    store.ok(&["rmi", "image", "base"]);
    store.ok(&["prune"]);
    assert_eq!(store.layers(), Vec::<String>::new());
}

/// As after a rename of which the last step is missing, and as people do who know that records are files.
#[test]
fn the_name_of_its_records_file_is_a_containers_name_whatever_the_record_says() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "old"]);
    let record = |name: &str| store.root.join(format!("containers/{name}.json"));
    let text = fs::read_to_string(record("old")).unwrap();
    let half = text.replace("\"name\": \"old\"", "\"name\": \"new\"");
    assert_ne!(half, text);
    fs::write(record("old"), half).unwrap();
    assert_eq!(store.names("ps"), ["old"]);
    let dir = store.mount("old");
    fs::write(dir.join("new"), "").unwrap();
    assert_eq!(store.ok(&["diff", "old"]), "A /new\n");
    store.ok(&["umount", "old"]);
    store.ok(&["check"]);
    fs::rename(record("old"), record("third")).unwrap();
    assert_eq!(store.names("ps"), ["third"]);
    store.mount("third");
    store.ok(&["umount", "third"]);
    store.ok(&["rename", "third", "old"]);
    assert_eq!(store.names("ps"), ["old"]);
    store.ok(&["rm", "old"]);
    store.assert_nothing_runs();
}

#[test]
fn who_reads_a_disk_over_nbd_does_not_notice_that_its_container_is_renamed() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "old"]);
    let (server, socket) = store.serve("old");
    store.ok(&["rename", "old", "new"]);
    let uri = format!("nbd+unix:///old?socket={}", socket.display());
    crate::common::run("nbdinfo", &[uri.as_str()]);
    let row = store.json(&["ps"])[0].clone();
    assert_eq!(row["name"], "new");
    assert_eq!(row["serving"]["by"], "nbd");
    let error = store.fails(&["mount", "new"]);
    assert!(error.contains("served over NBD by process"), "{error}");
    server.end();
    store.mount("new");
    store.ok(&["umount", "new"]);
}
