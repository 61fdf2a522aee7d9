//! What single calls of the snapshots API mean, over the real socket: devices, usage, remote
//! snapshots, and what the other commands see of the same root.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::snapshotter_support::client::{
    ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED,
};
use crate::snapshotter_support::mounted::Mounted;
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::{SIZE, room, wait_for};
use nix::mount::MsFlags;
use serde_json::Value;
use vellum_fs::mountinfo::MountInfo;

const REF: &str = "containerd.io/snapshot.ref";
const MOUNTS: &str = "containerd.io/snapshot/vellum.mounts";

fn layers(rig: &Rig) -> usize {
    fs::read_dir(rig.root().join("layers")).unwrap().count()
}

#[test]
fn a_layer_with_the_same_reference_on_the_same_parent_is_there_at_once_and_shares_its_blocks() {
    let rig = Rig::new("");
    let one = [(REF, "sha256:one")];
    let unpack = |key: &str, parent: &str, name: &str, reference: &str, text: &str| {
        let labels = [(REF, reference)];
        let mount = rig.client.prepare(key, parent, &labels).unwrap();
        fs::write(Path::new(&mount.source).join("file"), text).unwrap();
        rig.client.commit(name, key, &labels).unwrap();
    };
    // While it is only being unpacked, it is nothing that others could use.
    rig.client.prepare("a/1/extract one", "", &one).unwrap();
    rig.client.prepare("b/1/extract one", "", &one).unwrap();
    rig.client.remove("b/1/extract one").unwrap();
    rig.client.remove("a/1/extract one").unwrap();
    unpack("a/2/extract one", "", "a/3/one", "sha256:one", "one");
    unpack("a/4/extract two", "a/3/one", "a/5/two", "sha256:two", "two");
    rig.assert_whole("unpacked");
    let before = layers(&rig);

    // What containerd does for another namespace, with the filter that it then looks with.
    let found = |reference: &str, parent: &str| -> Vec<String> {
        let filter = format!("labels.\"{REF}\"==\"{reference}\",parent==\"{parent}\"");
        let infos = rig.client.list(&[&filter]).unwrap();
        infos.into_iter().map(|info| info.name).collect()
    };
    let answer = rig.client.prepare("b/6/extract one", "", &one).unwrap_err();
    assert_eq!(answer.code(), Some(ALREADY_EXISTS));
    assert_eq!(
        rig.client.stat("b/6/extract one").unwrap_err().code(),
        Some(NOT_FOUND),
        "the key itself is not taken"
    );
    let mut names = found("sha256:one", "");
    names.retain(|name| name != "a/3/one");
    let [mine] = &names[..] else {
        panic!("{names:?}");
    };
    let info = rig.client.stat(mine).unwrap();
    assert_eq!(info.kind, 3, "committed");
    assert_eq!(info.labels[REF], "sha256:one");
    let usage = |name: &str| rig.client.usage(name).unwrap();
    assert_eq!(usage(mine), usage("a/3/one"));
    // The second layer of the chain lies on ours.
    let two = [(REF, "sha256:two")];
    let answer = rig
        .client
        .prepare("b/7/extract two", mine, &two)
        .unwrap_err();
    assert_eq!(answer.code(), Some(ALREADY_EXISTS));
    let names = found("sha256:two", mine);
    assert_eq!(names.len(), 1, "{names:?}");
    let second = names[0].clone();
    assert_eq!(layers(&rig), before, "nothing was copied");

    // Another parent, or another reference, is another layer.
    for (key, parent, reference) in [("c", "", "sha256:two"), ("d", "", "sha256:three")] {
        rig.client
            .prepare(key, parent, &[(REF, reference)])
            .unwrap();
        rig.client.remove(key).unwrap();
    }
    // The first owner goes; what was shared stays.
    rig.client.remove("a/5/two").unwrap();
    rig.client.remove("a/3/one").unwrap();
    rig.assert_whole("the first is gone");
    assert_eq!(rig.content(&second, "file").as_deref(), Some("two"));
    assert_eq!(rig.content(mine, "file").as_deref(), Some("one"));
    rig.client.remove(&second).unwrap();
    rig.client.remove(mine).unwrap();
    rig.assert_whole("all are gone");
    assert_eq!(layers(&rig), 1, "the template");
}

#[test]
fn in_device_mode_mounts_returns_the_device_and_what_is_written_there_is_committed() {
    let rig = Rig::new("mounts = 'device'\n");
    let mount = rig.client.prepare("key", "", &[(SIZE, "96M")]).unwrap();
    assert_eq!(mount.r#type, "ext4");
    assert!(mount.source.starts_with("/dev/loop"), "{mount:?}");
    for option in ["rw", "noatime"] {
        assert!(mount.options.contains(&option.to_owned()), "{mount:?}");
    }
    let mounted = Mounted::new(&rig, "key", &mount);
    fs::write(mounted.0.join("file"), "text").unwrap();
    let room = room(&mounted.0);
    assert!(room > 70 << 20, "{room}");
    assert_eq!(rig.client.mounts("key").unwrap(), mount);
    // Nothing is mounted below the store.
    let below = |rig: &Rig| {
        let mounts = rig.area.mounts().into_iter();
        mounts
            .filter(|m| m.starts_with(rig.root().join("mnt")))
            .count()
    };
    assert_eq!(below(&rig), 0);
    drop(mounted);

    // A virtual machine would hold the device open, and data back that is not on it yet.
    let machine = fs::File::open(&mount.source).unwrap();
    let refused = rig.client.commit("image", "key", &[]).unwrap_err();
    assert_eq!(refused.code(), Some(FAILED_PRECONDITION));
    assert!(format!("{refused:?}").contains(&std::process::id().to_string()));
    drop(machine);
    rig.client.commit("image", "key", &[]).unwrap();
    assert!(rig.client.usage("image").unwrap().size > 0);

    let view = rig.client.view("view", "image", &[]).unwrap();
    assert!(view.source.starts_with("/dev/loop") && view.options.contains(&"ro".to_owned()));
    let mounted = Mounted::new(&rig, "view", &view);
    assert_eq!(mounted.read("file"), "text");
    assert!(fs::write(mounted.0.join("new"), "x").is_err());
    drop(mounted);

    // Committed under a mount that others made: frozen for a moment, and whole.
    let mount = rig.client.prepare("second", "image", &[]).unwrap();
    let mounted = Mounted::new(&rig, "second", &mount);
    fs::write(mounted.0.join("more"), "more").unwrap();
    rig.client.commit("larger", "second", &[]).unwrap();
    fs::write(mounted.0.join("late"), "late").unwrap();
    drop(mounted);
    // By label, also the other way.
    let bind = rig
        .client
        .view("bind", "larger", &[(MOUNTS, "bind")])
        .unwrap();
    assert_eq!(bind.r#type, "bind");
    let dir = Path::new(&bind.source);
    assert_eq!(fs::read_to_string(dir.join("more")).unwrap(), "more");
    assert!(!dir.join("late").exists());
    let wrong = rig
        .client
        .view("w", "larger", &[(MOUNTS, "copy")])
        .unwrap_err();
    assert_eq!(wrong.code(), Some(INVALID_ARGUMENT));
    for key in ["bind", "view", "larger", "image"] {
        rig.client.remove(key).unwrap();
    }
    rig.assert_whole("all are gone");
}

#[test]
fn a_device_is_back_after_a_reboot_with_what_was_synced() {
    let rig = Rig::new("");
    let device = [(MOUNTS, "device")];
    let mount = rig.client.prepare("key", "", &device).unwrap();
    let mounted = Mounted::new(&rig, "before", &mount);
    let file = fs::File::create(mounted.0.join("file")).unwrap();
    (&file).write_all(b"synced").unwrap();
    file.sync_all().unwrap();
    drop(file);
    rig.area.end_devices();
    drop(mounted);
    let mount = rig.client.mounts("key").unwrap();
    let mounted = Mounted::new(&rig, "after", &mount);
    assert_eq!(mounted.read("file"), "synced");
    drop(mounted);
    // Committed without anybody having mounted it since: its journal is replayed first.
    rig.client.commit("image", "key", &[]).unwrap();
    assert_eq!(rig.content("image", "file").as_deref(), Some("synced"));
}

#[test]
fn usage_counts_the_blocks_and_inodes_that_a_snapshot_added() {
    let rig = Rig::new("");
    let mount = rig.client.prepare("one", "", &[]).unwrap();
    assert_eq!(rig.client.usage("one").unwrap().inodes, 0);
    let dir = Path::new(&mount.source);
    for number in 0..10 {
        fs::write(dir.join(format!("file {number}")), vec![1; 100_000]).unwrap();
    }
    fs::hard_link(dir.join("file 0"), dir.join("link")).unwrap();
    fs::create_dir(dir.join("directory")).unwrap();
    assert_eq!(rig.client.usage("one").unwrap().inodes, 11);
    rig.client.commit("image", "one", &[]).unwrap();
    let usage = rig.client.usage("image").unwrap();
    assert_eq!(usage.inodes, 11);
    assert!((1_000_000..1_500_000).contains(&usage.size), "{usage:?}");

    let mount = rig.client.prepare("two", "image", &[]).unwrap();
    assert_eq!(rig.client.usage("two").unwrap().inodes, 0);
    fs::write(Path::new(&mount.source).join("new"), "x").unwrap();
    assert_eq!(rig.client.usage("two").unwrap().inodes, 1);
    for number in 0..5 {
        fs::remove_file(Path::new(&mount.source).join(format!("file {number}"))).unwrap();
    }
    // Fewer than before are none of its own.
    assert_eq!(rig.client.usage("two").unwrap().inodes, 0);
    rig.client.view("view", "image", &[]).unwrap();
    let usage = rig.client.usage("view").unwrap();
    assert_eq!((usage.size, usage.inodes), (0, 0));
}

#[test]
fn usage_counts_what_was_written_and_has_not_reached_the_device_yet() {
    let rig = Rig::new("");
    let mount = rig.client.prepare("one", "", &[]).unwrap();
    let before = rig.client.usage("one").unwrap().size;
    fs::write(Path::new(&mount.source).join("file"), vec![1; 20 << 20]).unwrap();
    let now = rig.client.usage("one").unwrap().size;
    assert!(now >= before + (19 << 20), "{before}, then {now}");
    // Not twice.
    common_sync(&mount.source);
    let synced = rig.client.usage("one").unwrap().size;
    assert!(
        (19 << 20..30 << 20).contains(&(synced - before)),
        "{synced}"
    );
}

/// Has the kernel write what it holds of the file system at `dir`.
fn common_sync(dir: &str) {
    let synced = std::process::Command::new("sync")
        .args(["-f", dir])
        .status();
    assert!(synced.unwrap().success());
}

#[test]
fn a_snapshot_whose_file_system_gave_up_is_mounted_anew_by_the_next_mounts() {
    let rig = Rig::new("");
    let mount = rig.client.prepare("one", "", &[]).unwrap();
    let dir = Path::new(&mount.source);
    fs::write(dir.join("file"), "mine").unwrap();
    common_sync(&mount.source);
    let there = MountInfo::at(dir).unwrap().unwrap();
    let name = there.source.file_name().unwrap().to_str().unwrap();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test").unwrap();
    assert!(fs::write(dir.join("refused"), "x").is_err());
    // Somebody uses it: nothing can be done, and it is left as it is.
    let user = fs::File::open(dir.join("file")).unwrap();
    rig.client.mounts("one").unwrap();
    assert!(fs::write(dir.join("refused"), "x").is_err());
    drop(user);
    let again = rig.client.mounts("one").unwrap();
    assert_eq!(again.source, mount.source);
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "mine");
    fs::write(dir.join("again"), "x").unwrap();
}

#[test]
fn a_view_shows_what_was_written_last_before_the_commit_however_busy_it_was() {
    let rig = Rig::new("");
    for round in 0..4 {
        let key = format!("key {round}");
        let source = PathBuf::from(rig.client.prepare(&key, "", &[]).unwrap().source);
        // Somebody else has it mounted, and writes all the time.
        let user = rig.area.path().join(format!("user {round}"));
        fs::create_dir(&user).unwrap();
        let none = None::<&str>;
        nix::mount::mount(Some(&source), &user, none, MsFlags::MS_BIND, none).unwrap();
        fs::write(source.join("before"), vec![round; 3_000_000]).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let name = format!("image {round}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let file = user.join(format!("busy {}", number % 50));
                    fs::write(file, number.to_string().repeat(1000)).unwrap();
                    number += 1;
                }
            });
            let done = rig.client.commit(&name, &key, &[]);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            done.unwrap();
        });
        nix::mount::umount(&user).unwrap();
        let view = format!("view {round}");
        let source = PathBuf::from(rig.client.view(&view, &name, &[]).unwrap().source);
        assert_eq!(
            fs::read(source.join("before")).unwrap(),
            vec![round; 3_000_000]
        );
        let line = format!(" {} ", source.display());
        let mounts =
            String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        let mounted = mounts.lines().find(|l| l.contains(&line)).unwrap();
        // Its journal was empty: nothing was replayed, and nothing had to be left out.
        assert!(!mounted.contains("noload"), "{mounted}");
    }
    rig.assert_checks();
}

#[test]
fn the_device_of_a_removed_snapshot_ends_while_those_that_came_later_live() {
    let rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    for key in ["first", "second", "third"] {
        rig.client.prepare(key, "base", &[]).unwrap();
    }
    for (key, left) in [("first", 2), ("second", 1)] {
        rig.client.remove(key).unwrap();
        let what = format!("the device of the {key} is gone");
        wait_for(&what, Duration::from_secs(30), || {
            rig.client.cleanup().unwrap();
            rig.area.workers().len() == left
        });
    }
}

#[test]
fn a_store_that_refuses_what_is_new_says_so_with_a_code_and_goes_on_with_what_is_there() {
    let rig = Rig::new("");
    let mount = rig.client.prepare("there", "", &[]).unwrap();
    rig.vellum(&["space", "--warn", "99.9%", "--refuse", "99.8%"]);
    let error = rig.client.prepare("late", "", &[]).unwrap_err();
    assert_eq!(error.code(), Some(RESOURCE_EXHAUSTED), "{error:?}");
    assert!(format!("{error:?}").contains("nearly full"), "{error:?}");
    fs::write(Path::new(&mount.source).join("file"), "there").unwrap();
    rig.client.commit("done", "there", &[]).unwrap();
    rig.client.view("look", "done", &[]).unwrap();
    rig.vellum(&["space", "--refuse", "off"]);
    rig.client.prepare("late", "done", &[]).unwrap();
}

#[test]
fn the_other_commands_show_containerds_snapshots_and_leave_them_to_it() {
    let rig = Rig::new("");
    let labels = [("containerd.io/snapshot.ref", "sha256:one")];
    let key = "default/1/extract one";
    let source = rig.client.prepare(key, "", &labels).unwrap().source;
    fs::write(Path::new(&source).join("file"), vec![7; 1_000_000]).unwrap();
    rig.client
        .commit("default/2/sha256:one", key, &labels)
        .unwrap();
    let container = "default/3/web";
    let source = rig
        .client
        .prepare(container, "default/2/sha256:one", &[])
        .unwrap()
        .source;
    fs::write(Path::new(&source).join("own"), vec![7; 500_000]).unwrap();
    nix::unistd::syncfs(fs::File::open(&source).unwrap()).unwrap();
    let json = |arguments: &[&str]| -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        let output = rig.vellum(&all);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let text = |arguments: &[&str]| -> String {
        let output = rig.vellum(arguments);
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let rows = json(&["ps", "-s"]);
    let row = &rows.as_array().unwrap()[0];
    assert_eq!(row["name"], container);
    assert_eq!(row["image"], "default/2/sha256:one");
    assert!(
        row["status"].as_str().unwrap().starts_with("mounted at"),
        "{row}"
    );
    assert!(row["size"].as_u64().unwrap() >= 500_000, "{row}");
    assert!(row["total_size"].as_u64().unwrap() >= 1_500_000, "{row}");
    assert!(text(&["ps", "-s"]).contains(container));
    let rows = json(&["images"]);
    let row = &rows.as_array().unwrap()[0];
    assert_eq!(row["name"], "default/2/sha256:one");
    assert!(row["size"].as_u64().unwrap() >= 1_000_000, "{row}");
    assert!(text(&["images"]).contains("sha256:one"));
    let found = json(&["inspect", container]);
    assert_eq!(found[0]["type"], "snapshot");
    assert_eq!(found[0]["snapshot"]["kind"], "active");
    assert_eq!(found[0]["layers"].as_array().unwrap().len(), 3);
    assert!(
        found[0]["counters"]["chain"]["writes"].as_u64().unwrap() > 0,
        "{found}"
    );
    json(&["check"]);
    json(&["check", container]);
    for arguments in [
        &["rm", container][..],
        &["rm", "--force", container],
        &["rmi", "default/2/sha256:one"],
        &["commit", container, "image:1"],
        &["umount", container],
        &["exec", container, "--", "true"],
    ] {
        let output = rig.vellum(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_ne!(output.status.code(), Some(0), "{arguments:?}");
        assert!(error.contains("containerd"), "{arguments:?}: {error}");
    }
    // All of it is still there.
    assert_eq!(
        fs::read(Path::new(&source).join("own")).unwrap().len(),
        500_000
    );
    rig.client.stat("default/2/sha256:one").unwrap();
    rig.assert_whole("after the commands");
}
