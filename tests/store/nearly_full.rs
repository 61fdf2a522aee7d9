//! A store whose disk is nearly full, and what its policy makes of that.

use std::fs;
use std::path::Path;

use crate::common::{TestStore, run};
use crate::small_disk::{SmallDisk, row, write_synced};

const MIB: u64 = 1 << 20;

/// Bytes that `df` calls available.
fn available(dir: &Path) -> u64 {
    let there = nix::sys::statvfs::statvfs(dir).unwrap();
    there.blocks_available() * there.fragment_size()
}

/// A store on a disk of its own, with an image.
fn store_on(disk: &SmallDisk) -> TestStore {
    let mut store = TestStore::under(&disk.mount_point);
    store.env.push(("VELLUM_FULL_WAIT", "0.5"));
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    store
}

/// Writes and syncs files of 1 MiB until one fails; how many were synced.
fn fill(dir: &Path) -> u8 {
    let name = |number: u8| dir.join(format!("fill-{number}"));
    let synced = |number: &u8| write_synced(&name(*number), &vec![*number; 1 << 20]).is_ok();
    (0..250).take_while(synced).count() as u8
}

fn assert_filled(dir: &Path, files: u8) {
    for number in 0..files {
        let found = fs::read(dir.join(format!("fill-{number}"))).unwrap();
        assert!(found == vec![number; 1 << 20], "{} {number}", dir.display());
    }
}

#[test]
fn writers_stop_before_the_disk_is_full_keep_what_they_synced_and_go_on_once_there_is_room() {
    let disk = SmallDisk::new("320M");
    let store = store_on(&disk);
    let names = ["a", "b", "c"];
    for name in names {
        store.ok(&["create", "base", "--name", name]);
    }
    let ballast = disk.mount_point.join("ballast");
    run("fallocate", &["-l", "100M", ballast.to_str().unwrap()]);
    // Two are mounted before the policy is set, and follow it all the same.
    let early = [store.mount("a"), store.mount("b")];
    store.ok(&[
        "space", "--warn", "100M", "--refuse", "80M", "--stop", "64M",
    ]);
    let dirs = [early[0].clone(), early[1].clone(), store.mount("c")];
    let filled: Vec<u8> = std::thread::scope(|scope| {
        let fillers: Vec<_> = dirs.iter().map(|dir| scope.spawn(|| fill(dir))).collect();
        fillers.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let left = available(&disk.mount_point);
    println!("{filled:?} files of 1 MiB, {} MiB left", left >> 20);
    assert!(filled.iter().all(|files| *files > 2), "{filled:?}");
    // Large writes stop at 64 MiB; a file system's own small ones may take half of that.
    assert!((40 * MIB..66 * MIB).contains(&left), "{left}");
    for name in names {
        let status = row(&store, name)["status"].as_str().unwrap().to_owned();
        assert!(status.contains("host full since"), "{name}: {status}");
    }

    // What is small still goes on, flushed and deleted.
    write_synced(&dirs[2].join("small"), &[9; 4096]).unwrap();
    let error = store.fails(&["create", "base", "--name", "late"]);
    assert!(
        error.contains("refuse = 80M") && error.contains("vellum rm"),
        "{error}"
    );
    store.ok(&["umount", "a"]);
    let again = store.mount("a");
    assert_filled(&again, filled[0]);

    // Whoever stays mounted goes on by itself.
    fs::remove_file(&ballast).unwrap();
    for dir in &dirs[1..] {
        write_synced(&dir.join("after"), &vec![5; 4 << 20]).unwrap();
    }
    for (name, (dir, files)) in names.iter().zip(dirs.iter().zip(&filled)) {
        assert_filled(dir, *files);
        let status = row(&store, name)["status"].as_str().unwrap().to_owned();
        assert!(status.starts_with("mounted at"), "{name}: {status}");
        store.ok(&["umount", name]);
    }
    store.ok(&["create", "base", "--name", "late"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn what_is_new_is_refused_and_what_is_there_goes_on() {
    let disk = SmallDisk::new("128M");
    let store = store_on(&disk);
    store.ok(&["create", "base", "--name", "c"]);
    store.ok(&["space", "--warn", "99%", "--refuse", "98%"]);
    let root = store.arg("root");
    for command in [
        vec!["create", "base"],
        vec!["fork", "c", "d"],
        vec!["import", "again", &root],
        vec!["run", "--rm", "base", "--", "true"],
    ] {
        let refused = store.output(&command);
        assert!(!refused.status.success(), "{command:?}");
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        for part in ["nearly full", "vellum space --refuse"] {
            assert!(error.contains(part), "{command:?}: {error}");
        }
    }
    let dir = store.mount("c");
    write_synced(&dir.join("file"), &vec![1; 4 << 20]).unwrap();
    store.ok(&["snapshot", "c", "kept"]);
    store.ok(&["umount", "c"]);
    store.ok(&["rm", "c@kept"]);

    store.ok(&["space", "--refuse", "off"]);
    let warned = store.output(&["create", "base", "--name", "d"]);
    assert!(warned.status.success());
    let said = String::from_utf8_lossy(&warned.stderr).into_owned();
    assert!(said.contains("it warns below 99%"), "{said}");
}

#[test]
fn a_layer_file_that_does_not_fit_is_imported_no_further_than_writers_are_stopped() {
    let disk = SmallDisk::new("128M");
    let store = store_on(&disk);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    write_synced(&dir.join("file"), &vec![1; 8 << 20]).unwrap();
    store.ok(&["commit", "c", "large"]);
    store.ok(&["umount", "c"]);
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("large.layers");
    let file = file.to_str().unwrap();
    store.ok(&["export", "large", file, "--format", "layer"]);
    store.ok(&["rm", "c"]);
    store.ok(&["rmi", "large"]);
    store.ok(&["prune"]);
    let stop = available(&disk.mount_point) - 2 * MIB;
    store.ok(&[
        "space",
        "--warn",
        "off",
        "--stop",
        &format!("{}K", stop >> 10),
    ]);
    let error = store.fails(&["import", "large", file]);
    assert!(
        error.contains("the host's disk is full, or nearly so"),
        "{error}"
    );
    assert!(available(&disk.mount_point) > stop - MIB);
    store.ok(&["space", "--stop", "off"]);
    store.ok(&["import", "large", file]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn the_policy_is_shown_as_it_was_set_and_its_order_is_checked() {
    let store = TestStore::new();
    store.ok(&["volume", "create", "any"]);
    let shown = store.ok(&["space"]);
    for line in [
        "warn       below 5%",
        "refuse     off",
        "stop       off",
        "state ",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    store.ok(&["space", "--warn", "20%", "--stop", "1M"]);
    let space = store.json(&["space"]);
    assert_eq!(space["policy"]["warn"], "20%");
    assert_eq!(space["policy"]["stop"], "1M");
    assert_eq!(space["stop_bytes"], MIB);
    let error = store.fails(&["space", "--refuse", "30%"]);
    assert!(
        error.contains("refuse = 30% comes before warn = 20%"),
        "{error}"
    );
    assert_eq!(store.json(&["space"])["policy"]["refuse"], "off");
}

#[test]
fn a_damaged_policy_is_found_by_check_and_set_anew_as_the_message_says() {
    let store = TestStore::new();
    let anew = ["space", "--warn", "10%", "--refuse", "5%", "--stop", "off"];
    store.ok(&anew);
    fs::write(store.root.join("space.json"), "{").unwrap();
    let says = "vellum space --warn FREE --refuse FREE --stop FREE";
    for command in [&["space"][..], &["space", "--warn", "10%"]] {
        let error = store.fails(command);
        assert!(error.contains(says), "{command:?}: {error}");
    }
    let checked = store.output(&["check"]);
    let found = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(!checked.status.success() && found.contains(says), "{found}");
    store.ok(&anew);
    assert_eq!(store.json(&["space"])["policy"]["warn"], "10%");
    store.ok(&["check"]);
}
