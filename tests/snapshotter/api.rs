//! What single calls of the snapshots API mean, over the real socket: sizes, devices, usage,
//! remote snapshots, metrics, and what the other commands see of the same root.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::ports::free_port;
use crate::snapshotter_support::client::{
    ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED,
};
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::{room, wait_for};
use nix::mount::{MntFlags, MsFlags};
use serde_json::Value;
use vellum_fs::mountinfo::MountInfo;
use vellum_snapshotter::proto::types::Mount;

const REF: &str = "containerd.io/snapshot.ref";
const SIZE: &str = "containerd.io/snapshot/vellum.size";
const MOUNTS: &str = "containerd.io/snapshot/vellum.mounts";

/// Something mounted as mount(8) does it with a Mount that was returned.
struct Mounted(PathBuf);

impl Mounted {
    fn new(rig: &Rig, name: &str, mount: &Mount) -> Mounted {
        let dir = rig.area.path().join(name);
        fs::create_dir(&dir).unwrap();
        let options = mount.options.join(",");
        let output = Command::new("mount")
            .args(["-t", &mount.r#type, "-o", &options, &mount.source])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{mount:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Mounted(dir)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if nix::mount::umount(&self.0).is_err() {
            let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

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
fn a_larger_size_grows_the_file_system() {
    let rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let same = rig.client.prepare("same", "base", &[]).unwrap().source;
    for (key, label) in [
        ("ours", SIZE),
        ("theirs", "containerd.io/snapshot/max-size"),
    ] {
        let larger = [(label, "201326592")];
        let source = rig.client.prepare(key, "base", &larger).unwrap().source;
        let (large, small) = (room(&source), room(&same));
        assert!(large > 170 << 20 && small < 64 << 20, "{large} {small}");
        // The new room can be used, and what was there is.
        if key == "ours" {
            fs::write(Path::new(&source).join("big"), vec![1; 70 << 20]).unwrap();
        }
        assert_eq!(
            fs::read_to_string(Path::new(&source).join("file")).unwrap(),
            "base"
        );
    }
    let smaller = rig
        .client
        .prepare("small", "base", &[(SIZE, "32M")])
        .unwrap_err();
    assert_eq!(smaller.code(), Some(INVALID_ARGUMENT));
}

#[test]
fn an_update_makes_a_snapshot_larger_where_it_is_and_refuses_to_make_it_smaller() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let source = rig.client.prepare("key", "base", &[]).unwrap().source;
    fs::write(Path::new(&source).join("own"), "own").unwrap();
    assert!(room(&source) < 64 << 20);
    for (label, size) in [(SIZE, "192M"), ("containerd.io/snapshot/max-size", "1G")] {
        let info = rig
            .client
            .update("key", &[(label, size), ("a", "b")])
            .unwrap();
        assert_eq!(info.labels[label], size);
        assert_eq!(rig.client.mounts("key").unwrap().source, source);
    }
    assert!(room(&source) > 950 << 20, "{}", room(&source));
    fs::write(Path::new(&source).join("big"), vec![1; 100 << 20]).unwrap();
    assert_eq!(
        fs::read_to_string(Path::new(&source).join("own")).unwrap(),
        "own"
    );
    // The same again is no change; less is refused, and says why.
    rig.client.update("key", &[(SIZE, "1G")]).unwrap();
    let smaller = rig.client.update("key", &[(SIZE, "192M")]).unwrap_err();
    assert_eq!(smaller.code(), Some(INVALID_ARGUMENT), "{smaller:?}");
    assert!(
        format!("{smaller:?}").contains("can only grow"),
        "{smaller:?}"
    );
    let huge = rig.client.update("key", &[(SIZE, "100T")]).unwrap_err();
    assert_eq!(huge.code(), Some(INVALID_ARGUMENT), "{huge:?}");
    assert_eq!(rig.client.stat("key").unwrap().labels[SIZE], "1G");
    rig.client.update("key", &[]).unwrap();
    // Its server knows, also the next one, and so does a reboot.
    fs::File::open(Path::new(&source).join("big"))
        .unwrap()
        .sync_all()
        .unwrap();
    rig.end(nix::sys::signal::Signal::SIGKILL);
    rig.area.end_devices();
    rig.start();
    let source = rig.client.mounts("key").unwrap().source;
    assert!(room(&source) > 950 << 20);
    // What it becomes is as large, and so is what is made of that.
    rig.client.commit("image", "key", &[]).unwrap();
    let view = rig.client.view("view", "image", &[]).unwrap().source;
    assert!(room(&view) > 950 << 20);
    assert_eq!(
        fs::metadata(Path::new(&view).join("big")).unwrap().len(),
        100 << 20
    );
    let child = rig.client.prepare("child", "image", &[]).unwrap().source;
    assert!(room(&child) > 950 << 20);
    let committed = rig.client.update("image", &[(SIZE, "64M")]);
    committed.expect("of a committed one it is a word like others");
    rig.assert_whole("grown");
    rig.assert_checks();
}

/// The loop device grows under those who write to it, whatever this host's root may do to a mounted
/// ext4: that is tested in a virtual machine.
#[test]
fn a_device_grows_under_a_program_that_writes_to_it_and_through_kills_of_its_server() {
    use std::os::unix::fs::FileExt;
    let rig = Rig::new("mounts = 'device'\n");
    let source = rig
        .client
        .prepare("key", "", &[(SIZE, "64M")])
        .unwrap()
        .source;
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&source)
        .unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let size = |source: &str| {
        let mut file = fs::File::open(source).unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let at = (16 << 20) + round % 512 * 65536;
                device.write_all_at(&[round as u8; 65536], at).unwrap();
                device.sync_data().unwrap();
                let mut back = [0; 65536];
                device.read_exact_at(&mut back, at).unwrap();
                assert!(back.iter().all(|byte| *byte == round as u8));
                round += 1;
            }
        });
        for (megabytes, kill) in [(128u64, false), (256, true), (1024, true)] {
            let label = format!("{megabytes}M");
            rig.client.update("key", &[(SIZE, &label)]).unwrap();
            assert_eq!(size(&source), megabytes << 20);
            let end = (megabytes << 20) - 4096;
            device.write_all_at(&[5; 4096], end).unwrap();
            device.sync_data().unwrap();
            if kill {
                let workers = rig.area.workers();
                assert!(!workers.is_empty());
                for pid in workers {
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                }
            }
            let mut back = [0; 4096];
            device.read_exact_at(&mut back, end).unwrap();
            assert_eq!(back, [5; 4096]);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // The program that has it open would have to grow the file system itself.
    drop(device);
    let mounted = Mounted::new(&rig, "mounted", &rig.client.mounts("key").unwrap());
    assert!(room(&mounted.0) > 950 << 20);
    drop(mounted);
    rig.client.remove("key").unwrap();
    rig.assert_whole("grown");
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

fn get(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Parsed as the OpenMetrics specification has it: types, suffixes, units, buckets, order.
fn strictly_parsed(response: &str) {
    let (_, text) = response.split_once("\r\n\r\n").unwrap();
    // The parser refuses units of histograms, which the specification has in its own examples.
    let is_histogram = |line: &str| {
        let name = line.split(' ').nth(2).unwrap_or_default();
        text.contains(&format!("# TYPE {name} histogram"))
    };
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with("# UNIT") || !is_histogram(line))
        .map(|line| format!("{line}\n"))
        .collect();
    let parsed = openmetrics_parser::openmetrics::parse_openmetrics(&text);
    let parsed = parsed.unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    for (name, family) in &parsed.families {
        assert!(name.starts_with("vellum_"), "{name}");
        assert!(!family.help.is_empty(), "{name} has no help");
    }
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
fn prometheus_gets_calls_snapshots_devices_and_space() {
    let address = format!("127.0.0.1:{}", free_port());
    let rig = Rig::new(&format!("[metrics]\naddress = '{address}'\n"));
    rig.committed("base", "", "file", &"base".repeat(100_000));
    let key = "ns/1/a \"quoted\" \\ key";
    let source = rig.client.prepare(key, "base", &[]).unwrap().source;
    let file = Path::new(&source).join("own");
    fs::write(&file, vec![1; 1 << 20]).unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    rig.client.view("v", "base", &[]).unwrap();
    rig.client.prepare(key, "base", &[]).unwrap_err();
    wait_for(
        "the committed one's device is gone",
        Duration::from_secs(30),
        || {
            rig.client.cleanup().unwrap();
            get(&address, "/metrics").contains("vellum_backlog 0")
        },
    );
    let text = get(&address, "/metrics");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.contains("application/openmetrics-text"), "{text}");
    for line in [
        "vellum_requests_total{method=\"prepare\",code=\"Ok\"} 2",
        "vellum_requests_total{method=\"prepare\",code=\"AlreadyExists\"} 1",
        "vellum_request_duration_seconds_count{method=\"commit\"} 1",
        "vellum_snapshots{kind=\"committed\"} 1",
        "vellum_snapshots{kind=\"active\"} 1",
        "vellum_snapshots{kind=\"view\"} 1",
        "vellum_devices{state=\"serving\"} 2",
        "vellum_devices{state=\"failed\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(number("vellum_snapshot_data_bytes{kind=\"committed\"}") > 400_000);
    assert!(number("vellum_store_free_bytes") < number("vellum_store_size_bytes"));
    assert!(text.trim_end().ends_with("# EOF"), "{text}");
    // The container, by its key; views and committed ones have no counters.
    let label = "{kind=\"snapshot\",key=\"ns/1/a \\\"quoted\\\" \\\\ key\"";
    let of = |metric: &str| number(&format!("vellum_container_{metric}{label}"));
    assert!(of("written_bytes_total") >= 1 << 20, "{text}");
    assert!(of("data_bytes") >= 1 << 20);
    // The only active one, and its server is asked once.
    let active = number("vellum_snapshot_data_bytes{kind=\"active\"}");
    assert_eq!(active, of("data_bytes"));
    assert_eq!(of("size_bytes"), 64 << 20);
    assert!(of("flush_duration_seconds_count") > 0);
    let first = text.lines().filter(|line| {
        line.starts_with("vellum_container_writes_total") && line.contains("touch=\"first\"")
    });
    let first: Vec<&str> = first.collect();
    assert!(first.len() == 1 && !first[0].ends_with(" 0"), "{first:?}");
    assert_eq!(number("vellum_containers_left_out"), 0);
    let keys = text
        .lines()
        .filter(|l| l.starts_with("vellum_container_size_bytes"));
    assert_eq!(keys.count(), 1);
    strictly_parsed(&text);
    // Counters only grow, and one that is removed has none any more.
    let written = of("written_bytes_total");
    fs::write(&file, vec![2; 2 << 20]).unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    let text = get(&address, "/metrics");
    let line = format!("vellum_container_written_bytes_total{label}");
    let line = text.lines().find(|l| l.starts_with(&line)).unwrap();
    let now: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(now >= written + (2 << 20), "{written} to {now}");
    rig.client.remove(key).unwrap();
    assert!(!get(&address, "/metrics").contains("vellum_container_"));
    assert!(get(&address, "/").starts_with("HTTP/1.1 404"));
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
