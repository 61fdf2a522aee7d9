//! What `vellum diff` lists: by the blocks that changed, and the same by a walk of both trees.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{TestStore, run, shell};

/// The list, and what was said on standard error of how it was found.
fn diff(store: &TestStore, name: &str) -> (String, String) {
    let output = store.output(&["-vv", "diff", "--content", name]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    (String::from_utf8(output.stdout).unwrap(), said)
}

/// The list as it is found by blocks; a walk finds the same.
fn by_blocks(store: &TestStore, name: &str) -> String {
    let (list, said) = diff(store, name);
    assert!(!said.contains("walked"), "{said}");
    assert_eq!(list, store.ok(&["diff", "--walk", "--content", name]));
    list
}

fn image(store: &TestStore) {
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    shell(
        &root,
        "mkdir -p etc/deep/er many; seq 20000 > etc/deep/er/numbers; echo base > etc/hostname
        for i in $(seq 400); do echo $i > many/$i; done; ln etc/hostname many/linked",
    );
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "64M"]);
}

fn change(dir: &Path) {
    let numbers = fs::File::options()
        .write(true)
        .open(dir.join("etc/deep/er/numbers"))
        .unwrap();
    numbers.write_all_at(b"12", 4095).unwrap();
    numbers.write_all_at(b"changed", 70_000).unwrap();
    shell(
        dir,
        "echo other > etc/hostname; rm many/7; echo new > many/new; mv many/8 eight; chmod 600 many/9",
    );
}

const CHANGES: &str = "A /eight
    size 0 2
    0+2
C /etc
C /etc/deep
C /etc/deep/er
C /etc/deep/er/numbers
    0+8192
    69632+4096
C /etc/hostname
    size 5 6
    0+6
C /many
D /many/7
D /many/8
C /many/9
C /many/linked
    size 5 6
    0+6
A /many/new
    size 0 4
    0+4
";

#[test]
fn a_container_is_compared_by_its_blocks_mounted_or_not_and_after_commits() {
    let store = TestStore::new();
    image(&store);
    store.ok(&["create", "base", "--name", "c"]);
    assert_eq!(by_blocks(&store, "c"), "");
    let dir = store.mount("c");
    assert_eq!(by_blocks(&store, "c"), "");
    change(&dir);
    assert_eq!(by_blocks(&store, "c"), CHANGES);
    // What was written to a file in place comes from the disk, where it was read before.
    let numbers = fs::File::options()
        .write(true)
        .open(dir.join("etc/deep/er/numbers"));
    numbers.unwrap().write_all_at(b"again", 0x4000).unwrap();
    let with_more = CHANGES.replace("    0+8192\n", "    0+8192\n    16384+4096\n");
    assert_eq!(by_blocks(&store, "c"), with_more);
    store.ok(&["commit", "c", "snap"]);
    assert_eq!(
        by_blocks(&store, "c"),
        with_more,
        "since the image, not since the commit"
    );
    fs::write(dir.join("after"), "x").unwrap();
    let with_after = format!("A /after\n    size 0 1\n    0+1\n{with_more}");
    assert_eq!(by_blocks(&store, "c"), with_after);
    store.ok(&["umount", "c"]);
    assert_eq!(by_blocks(&store, "c"), with_after);
    store.ok(&["create", "snap", "--name", "d"]);
    assert_eq!(by_blocks(&store, "d"), "");
    store.ok(&["prewarm", "d", "/etc", "/many"]);
    assert_eq!(
        by_blocks(&store, "d"),
        "",
        "copies of blocks are no changes"
    );
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_a_crash_left_is_compared_by_its_blocks_once_its_journal_is_replayed() {
    let store = TestStore::new();
    image(&store);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    change(&dir);
    run("sync", &["-f", dir.to_str().unwrap()]);
    assert!(store.kill_all());
    store.ok(&["umount", "c"]);
    assert_eq!(by_blocks(&store, "c"), CHANGES);
    assert_eq!(by_blocks(&store, "c"), CHANGES, "looking changes nothing");
    assert_eq!(fs::read_dir(store.root.join("staging")).unwrap().count(), 0);
    store.assert_nothing_runs();
}

#[test]
fn writers_of_a_mounted_container_go_on_and_what_they_wrote_before_is_listed() {
    let store = TestStore::new();
    image(&store);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (dir, stop) = (dir.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut written = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let path = dir.join(format!("many/w{}", written % 100));
                let mut file = fs::File::create(&path).unwrap();
                file.write_all(&written.to_le_bytes().repeat(900)).unwrap();
                if written.is_multiple_of(3) {
                    fs::remove_file(path).unwrap();
                }
                written += 1;
            }
            written
        })
    };
    for round in 0..5 {
        let marker = format!("marker{round}");
        fs::write(dir.join(&marker), "x").unwrap();
        let (list, said) = diff(&store, "c");
        assert!(!said.contains("walked"), "{said}");
        assert!(list.contains(&format!("A /{marker}\n")), "{list}");
        assert!(!list.contains("D /"), "{list}");
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() > 0);
    by_blocks(&store, "c");
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn what_blocks_do_not_tell_is_found_by_a_walk_which_says_why() {
    let store = TestStore::new();
    let (root, raw) = (store.path("root"), store.path("old.raw"));
    fs::create_dir(&root).unwrap();
    shell(&root, "mkdir d; seq 9999 > d/f; echo x > g");
    let raw = raw.to_str().unwrap();
    run(
        "mke2fs",
        &["-q", "-t", "ext3", "-d", root.to_str().unwrap(), raw, "32M"],
    );
    store.ok(&["import", "old", raw]);
    store.ok(&["create", "old", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("d/f"), "y").unwrap();
    for _ in 0..2 {
        let (list, said) = diff(&store, "c");
        assert_eq!(list, "C /d\nC /d/f\n    size 48888 1\n    0+1\n");
        assert!(said.contains("both trees are mounted and walked"), "{said}");
        assert!(said.contains("no extents"), "{said}");
        store.ok(&["umount", "c"]);
    }
}

#[test]
fn snapshots_are_compared_with_each_other_and_with_what_came_later() {
    let store = TestStore::new();
    image(&store);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    // By blocks, though the ext4 of the first was not unmounted in order.
    let compared = |arguments: &[&str]| {
        let arguments = |more: &[&'static str]| [&["-vv", "diff"], more, arguments].concat();
        let output = store.output(&arguments(&[]));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success() && !said.contains("walked"),
            "{said}"
        );
        let list = String::from_utf8(output.stdout).unwrap();
        assert_eq!(list, store.ok(&arguments(&["--walk"])));
        list
    };
    change(&dir);
    store.ok(&["snapshot", "c", "one"]);
    assert_eq!(compared(&["c", "--from", "one"]), "");
    fs::write(dir.join("later"), "x").unwrap();
    assert_eq!(compared(&["c", "--from", "one"]), "A /later\n");
    store.ok(&["snapshot", "c", "two", "--freeze"]);
    shell(&dir, "rm later; echo other > etc/hostname");
    let both = "C /etc\nC /etc/hostname\nD /later\nC /many\nC /many/linked\n";
    assert_eq!(compared(&["c", "--from", "two"]), both);
    assert_eq!(compared(&["c@two", "--from", "one"]), "A /later\n");
    assert_eq!(compared(&["c@one", "--from", "two"]), "D /later\n");
    let paths: Vec<_> = CHANGES
        .lines()
        .filter(|line| !line.starts_with(' '))
        .collect();
    assert_eq!(compared(&["c@one"]).lines().collect::<Vec<_>>(), paths);
    store.ok(&["umount", "c"]);
    store.ok(&["rollback", "c", "one"]);
    // Now neither lies on the other: what both have in common is below.
    assert_eq!(compared(&["c", "--from", "two"]), "D /later\n");
    assert_eq!(compared(&["c", "--from", "one"]), "");
    store.mount("c");
    assert_eq!(compared(&["c", "--from", "two"]), "D /later\n");
    store.ok(&["umount", "c"]);
    let error = store.fails(&["diff", "c", "--from", "three"]);
    assert!(error.contains("vellum snapshots c"), "{error}");
    store.assert_nothing_runs();
}

#[test]
fn contents_are_told_to_programs_in_numbers() {
    let store = TestStore::new();
    image(&store);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    shell(
        &dir,
        "chmod 600 many/1; echo longer > etc/hostname; ln -s x link",
    );
    let list = store.json(&["diff", "c", "--content"]);
    let of = |path: &str| {
        let mut list = list.as_array().unwrap().iter();
        list.find(|line| line["path"] == path).unwrap()["content"].clone()
    };
    let numbers = |before: u64, size: u64, ranges: &[[u64; 2]]| {
        let bytes: u64 = ranges.iter().map(|[_, len]| len).sum();
        serde_json::json!({ "size_before": before, "size": size, "bytes": bytes, "ranges": ranges })
    };
    assert_eq!(of("/etc/hostname"), numbers(5, 7, &[[0, 7]]));
    assert_eq!(of("/many/1"), numbers(2, 2, &[]));
    assert_eq!(of("/link"), serde_json::Value::Null);
    assert!(store.json(&["diff", "c"])[0].get("content").is_none());
}
