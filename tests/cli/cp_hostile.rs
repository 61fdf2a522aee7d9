//! `vellum cp` where the container's programs work against it, and where there is no room.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::common::{TestStore, run};

/// A program of the container makes a directory a link to one of the host's, and back, all the time.
#[test]
fn a_directory_that_becomes_a_link_out_of_the_container_at_any_moment_leads_nobody_out() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let outside = store.path("outside");
    for (place, text) in [(&outside, "outside"), (&dir.join("swap"), "inside")] {
        fs::create_dir(place).unwrap();
        fs::write(place.join("secret"), text).unwrap();
    }
    symlink(&outside, dir.join("other")).unwrap();
    fs::write(store.path("new"), "new").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swaps = std::thread::spawn({
        let (stop, dir) = (stop.clone(), dir.clone());
        move || {
            let mut swaps = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let (one, two) = (dir.join("swap"), dir.join("other"));
                let exchange = RenameFlags::RENAME_EXCHANGE;
                renameat2(AT_FDCWD, &one, AT_FDCWD, &two, exchange).unwrap();
                swaps += 1;
            }
            swaps
        }
    });
    let (mut in_times, mut out_times) = (0, 0);
    for round in 0..40 {
        let out = store.path(&format!("out{round}"));
        fs::create_dir(&out).unwrap();
        let goes_in = store.output(&["cp", &store.arg("new"), "c:/swap/new"]);
        let comes_out = store.output(&["cp", "c:/swap/secret", out.to_str().unwrap()]);
        in_times += u32::from(goes_in.status.success());
        out_times += u32::from(comes_out.status.success());
        if let Ok(text) = fs::read_to_string(out.join("secret")) {
            assert_eq!(text, "inside");
        }
        // All of it: what was a link is one, or a directory with what is in it.
        let all = store.output(&["cp", "c:/.", &format!("{}/all", out.display())]);
        assert!(all.status.success(), "{all:?}");
        for name in ["swap", "other"] {
            let copy = out.join("all").join(name);
            let meta = copy.symlink_metadata().unwrap();
            assert!(meta.is_dir() || meta.is_symlink());
            if meta.is_dir()
                && let Ok(text) = fs::read_to_string(copy.join("secret"))
            {
                assert_eq!(text, "inside");
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert!(swaps.join().unwrap() > 100);
    assert!(in_times > 0 && out_times > 0, "{in_times}, {out_times}");
    let names: Vec<_> = fs::read_dir(&outside).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    store.ok(&["umount", "c"]);
}

#[test]
fn a_link_that_an_earlier_copy_left_on_the_host_is_not_followed_by_the_next_one() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let (outside, out) = (store.path("outside"), store.arg("out"));
    fs::create_dir(&outside).unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    symlink(&outside, dir.join("d/way")).unwrap();
    store.ok(&["cp", "c:/d/.", &out]);
    // By now the container has a directory there, and a file in place of a link to one.
    fs::remove_file(dir.join("d/way")).unwrap();
    fs::create_dir(dir.join("d/way")).unwrap();
    fs::write(dir.join("d/way/evil"), "evil").unwrap();
    let error = store.fails(&["cp", "c:/d/.", &out]);
    assert!(error.contains("no directory is there"), "{error}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    store.ok(&["umount", "c"]);
}

#[test]
fn a_container_that_is_full_says_so_and_takes_the_copy_once_it_is_larger() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    fs::write(store.path("large"), vec![3; 100 << 20]).unwrap();
    let large = store.arg("large");
    for mounted in [false, true] {
        if mounted {
            store.mount("c");
        }
        let error = store.fails(&["cp", &large, "c:/large"]);
        assert!(error.contains("No space left"), "{error}");
        assert!(error.contains("vellum resize c SIZE"), "{error}");
    }
    // What was copied until then stays, and can be seen and removed.
    let dir = store.json(&["ps"])[0]["mounted"]["dir"].clone();
    let part = std::path::Path::new(dir.as_str().unwrap()).join("large");
    assert!(part.metadata().unwrap().len() < 100 << 20);
    store.ok(&["umount", "c"]);
    store.ok(&["resize", "c", "256M"]);
    store.ok(&["cp", &large, "c:/large"]);
    store.ok(&["cp", "c:/large", &store.arg("back")]);
    run("cmp", &[&large, &store.arg("back")]);
    store.assert_nothing_runs();
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_container_whose_file_system_is_mounted_read_only_is_read_and_takes_nothing() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    run("mount", &["-o", "remount,ro", dir.to_str().unwrap()]);
    store.ok(&["cp", "c:/file", &store.arg("copy")]);
    assert_eq!(
        File::open(store.path("copy"))
            .unwrap()
            .metadata()
            .unwrap()
            .len(),
        100_000
    );
    let error = store.fails(&["cp", &store.arg("copy"), "c:/copy"]);
    assert!(error.contains("Read-only file system"), "{error}");
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}
