//! Snapshots, forks and rollbacks of containers that are in use: what was made durable before is in them,
//! nobody sees an error, and a kill anywhere leaves them taken or not taken.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::{TestStore, run, wait_until};
use serde_json::Value;
use vellum_base::crash_point;

/// A container `c` of a small image, mounted.
fn mounted() -> (TestStore, PathBuf) {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    (store, dir)
}

/// A program that appends numbers to a file, each durable before it is counted.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn start(dir: &Path) -> Self {
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (told, count) = (stop.clone(), written.clone());
        let mut file = fs::File::create(dir.join("numbers")).unwrap();
        let thread = std::thread::spawn(move || {
            for number in 0u64.. {
                if told.load(Ordering::SeqCst) {
                    return;
                }
                file.write_all(&number.to_le_bytes()).unwrap();
                file.sync_all().unwrap();
                count.store(number + 1, Ordering::SeqCst);
            }
        });
        Writer {
            stop,
            written,
            thread: Some(thread),
        }
    }

    /// How many numbers are durable.
    fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    fn wait_for_more(&self) {
        let now = self.written();
        wait_until("the writer goes on", || self.written() > now + 5);
    }

    /// Ends it; it has seen no error.
    fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// How many numbers a container holds: all from 0 on, none torn.
fn numbers(dir: &Path) -> u64 {
    let bytes = fs::read(dir.join("numbers")).unwrap();
    let whole = bytes.chunks_exact(8);
    let mut count = 0;
    for chunk in whole {
        assert_eq!(u64::from_le_bytes(chunk.try_into().unwrap()), count);
        count += 1;
    }
    count
}

fn snapshots(store: &TestStore, name: &str) -> Vec<String> {
    let listed = store.json(&["snapshots", name]);
    let listed = listed["snapshots"].as_array().unwrap().clone();
    listed
        .iter()
        .map(|kept| kept["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_snapshot_under_a_writer_holds_all_that_was_durable_before_and_the_writer_sees_no_error() {
    let (store, dir) = mounted();
    let writer = Writer::start(&dir);
    for (name, options) in [("crash", &[][..]), ("clean", &["--freeze"])] {
        writer.wait_for_more();
        let before = writer.written();
        let mut arguments = vec!["snapshot", "c", name];
        arguments.extend(options);
        let report = store.json(&arguments);
        assert!(report["waited_seconds"].as_f64().unwrap() < 2.0, "{report}");
        writer.wait_for_more();
        store.ok(&["fork", "c", name, "--from", name]);
        let fork = store.mount(name);
        let found = numbers(&fork);
        assert!(found >= before, "{found} of {before} numbers are in {name}");
        store.ok(&["umount", name]);
    }
    writer.end();
    assert_eq!(snapshots(&store, "c"), ["crash", "clean"]);
    store.ok(&["umount", "c"]);
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_frozen_snapshot_needs_no_recovery_and_both_kinds_are_served_over_nbd() {
    let (store, dir) = mounted();
    fs::write(dir.join("file"), "frozen").unwrap();
    store.ok(&["snapshot", "c", "clean", "--freeze"]);
    fs::write(dir.join("file"), "crash").unwrap();
    store.ok(&["snapshot", "c", "crash", "-m", "as it runs"]);
    fs::write(dir.join("file"), "later").unwrap();
    let listed = store.json(&["snapshots", "c"]);
    let states: Vec<&Value> = listed["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kept| &kept["consistency"])
        .collect();
    assert_eq!(states, ["clean", "crash"]);
    for (name, recovers) in [("c@clean", false), ("c@crash", true)] {
        let (server, socket) = store.serve(name);
        let raw = store.arg("raw");
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        run("nbdcopy", &[uri.as_str(), &raw]);
        server.end();
        let features = run("dumpe2fs", &["-h", &raw]);
        assert_eq!(
            features.contains("needs_recovery"),
            recovers,
            "{name}: {features}"
        );
        if !recovers {
            run("e2fsck", &["-fn", &raw]);
        }
    }
    let tree = store.ok(&["snapshots", "c"]);
    assert!(tree.contains("as it runs"), "{tree}");
    store.ok(&["umount", "c"]);
}

#[test]
fn a_container_goes_back_and_forth_between_its_snapshots() {
    let (store, dir) = mounted();
    fs::write(dir.join("file"), "one").unwrap();
    store.ok(&["snapshot", "c", "one"]);
    fs::write(dir.join("file"), "two").unwrap();
    store.ok(&["snapshot", "c", "two"]);
    fs::write(dir.join("file"), "three").unwrap();
    let refused = store.fails(&["rollback", "c", "one"]);
    assert!(refused.contains("vellum umount c"), "{refused}");
    let said = store.ok(&["rollback", "--force", "c", "one"]);
    assert!(
        said.contains("c is c@one again; what it was is c@before-rollback-"),
        "{said}"
    );
    let kept = said.trim().rsplit('@').next().unwrap().to_owned();
    let content = |expected: &str| {
        let dir = store.mount("c");
        assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), expected);
        store.ok(&["umount", "c"]);
    };
    content("one");
    store.ok(&["rollback", "c", "two", "--discard"]);
    content("two");
    store.ok(&["rollback", "c", &kept, "--discard"]);
    content("three");
    assert_eq!(snapshots(&store, "c"), ["one", "two", &kept]);
    let missing = store.fails(&["rollback", "c", "nine"]);
    assert!(missing.contains("vellum snapshots c"), "{missing}");
    store.ok(&["check", "--scrub"]);
}

#[test]
fn layers_go_with_the_last_snapshot_fork_or_container_that_needs_them() {
    let (store, dir) = mounted();
    let before = store.layers().len();
    fs::write(dir.join("file"), "one").unwrap();
    store.ok(&["snapshot", "c", "one"]);
    store.ok(&["snapshot", "c", "two"]);
    store.ok(&["umount", "c"]);
    assert_eq!(store.layers().len(), before + 2);
    let refused = store.fails(&["rm", "c"]);
    assert!(
        refused.contains("has 2 snapshots") && refused.contains("--snapshots"),
        "{refused}"
    );
    store.ok(&["rollback", "c", "one", "--discard"]);
    assert_eq!(store.layers().len(), before + 2, "two is still there");
    store.ok(&["rm", "c@two"]);
    assert_eq!(store.layers().len(), before + 1, "nothing needs its layer");
    store.ok(&["fork", "c", "d", "--from", "one"]);
    store.ok(&["rm", "c@one"]);
    store.ok(&["rm", "c"]);
    let dir = store.mount("d");
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "one");
    store.ok(&["umount", "d"]);
    store.ok(&["rm", "d"]);
    store.ok(&["check"]);
    assert_eq!(
        store.layers().len(),
        before - 1,
        "only the image's are left"
    );
}

#[test]
fn forks_of_one_moment_are_equal_and_know_nothing_of_each_other() {
    let (store, dir) = mounted();
    let writer = Writer::start(&dir);
    writer.wait_for_more();
    let before = writer.written();
    store.ok(&["fork", "c", "f", "--count", "3"]);
    writer.wait_for_more();
    let mut found = Vec::new();
    for number in 1..=3 {
        let dir = store.mount(&format!("f-{number}"));
        found.push(numbers(&dir));
        fs::write(dir.join("numbers"), []).unwrap();
    }
    writer.end();
    assert!(
        found
            .iter()
            .all(|count| *count == found[0] && *count >= before),
        "{found:?}"
    );
    assert!(numbers(&dir) > found[0]);
    assert_eq!(
        store.json(&["snapshots", "c"])["snapshots"],
        Value::Array(Vec::new())
    );
    let refused = store.fails(&["fork", "c", "f-2"]);
    assert!(
        refused.contains("there is a container f-2 already"),
        "{refused}"
    );
}

#[test]
fn volumes_that_a_container_writes_are_forked_only_when_somebody_says_how() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let record = store.root.join("containers/c.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    value["volumes"] = serde_json::json!([{ "source": "data", "destination": "/var/data" }]);
    fs::write(&record, serde_json::to_vec(&value).unwrap()).unwrap();
    let refused = store.fails(&["fork", "c", "d"]);
    assert!(
        refused.contains("the volume data at /var/data"),
        "{refused}"
    );
    assert!(refused.contains("--no-volumes"), "{refused}");
    let volumes = |name: &str, option: &str| {
        let report = store.json(&["fork", "c", name, option]);
        report["containers"][0]["volumes"].as_array().unwrap().len()
    };
    assert_eq!(volumes("d", "--no-volumes"), 0);
    assert_eq!(volumes("e", "--share-volumes"), 1);
}

#[test]
fn a_store_with_snapshots_says_so_to_programs_that_do_not_know_them() {
    let (store, _dir) = mounted();
    let format = || {
        let marker = fs::read(store.root.join("vellum.json")).unwrap();
        serde_json::from_slice::<Value>(&marker).unwrap()["format"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(format(), 1);
    store.ok(&["fork", "c", "d"]);
    assert_eq!(format(), 1, "forks are containers like others");
    store.ok(&["snapshot", "c"]);
    assert_eq!(format(), 2);
    store.ok(&["umount", "c"]);
}

#[test]
fn layers_are_joined_under_a_writer_and_every_kept_moment_stays_as_it_was() {
    let (store, dir) = mounted();
    let writer = Writer::start(&dir);
    for number in 1..=6u8 {
        fs::write(dir.join("file"), vec![number; 300_000]).unwrap();
        fs::write(dir.join(format!("of-{number}")), vec![number; 100_000]).unwrap();
        if number > 1 {
            fs::remove_file(dir.join(format!("of-{}", number - 1))).unwrap();
        }
        writer.wait_for_more();
        store.ok(&["snapshot", "c", &format!("s{number}")]);
    }
    store.ok(&["fork", "c", "fork", "--from", "s5"]);
    let before: Vec<_> = ["c@s2", "c@s5"].map(|name| store.content(name)).into();
    let layers = store.layers().len();
    let told = store.ok(&["merge", "c", "--keep", "s2,s5"]);
    assert!(told.contains("layers are"), "{told}");
    writer.wait_for_more();
    assert_eq!(snapshots(&store, "c"), ["s2", "s5"]);
    assert_sizes_are_those_of_their_layers(&store);
    // s1 with s2, s3 to s5; s6 and what came since stay what they are, or become one.
    assert!(
        store.layers().len() <= layers - 3,
        "{} of {layers}",
        store.layers().len()
    );
    for (name, before) in ["c@s2", "c@s5"].iter().zip(&before) {
        assert!(store.content(name) == *before, "{name} changed");
    }
    let fork = store.mount("fork");
    assert_eq!(fs::read(fork.join("file")).unwrap(), vec![5; 300_000]);
    store.ok(&["umount", "fork"]);
    // The server has closed what was removed.
    for (pid, _) in store.processes() {
        let open = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let deleted = open.filter_map(|fd| fs::read_link(fd.path()).ok());
        let deleted: Vec<_> = deleted
            .filter(|path| path.to_string_lossy().contains("/trash/"))
            .collect();
        assert_eq!(deleted, Vec::<PathBuf>::new());
    }
    let numbers_before = writer.written();
    writer.end();
    store.ok(&["umount", "c"]);
    let dir = store.mount("c");
    assert!(numbers(&dir) >= numbers_before);
    assert_eq!(fs::read(dir.join("file")).unwrap(), vec![6; 300_000]);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    assert!(store.ok(&["merge", "c"]).contains("no layers to join"));
    // What was joined is joined again, below what was made on it since.
    store.ok(&["fork", "c", "late", "--from", "s5"]);
    store.ok(&["merge", "c", "--keep", "s5"]);
    assert!(store.content("c@s5") == before[1], "c@s5 changed");
    for name in ["fork", "late"] {
        let dir = store.mount(name);
        assert_eq!(fs::read(dir.join("file")).unwrap(), vec![5; 300_000]);
        store.ok(&["umount", name]);
    }
    store.ok(&["check", "--scrub"]);
    for name in ["c", "fork", "late"] {
        store.ok(&["rm", "--snapshots", name]);
    }
    store.ok(&["check"]);
}

#[test]
fn an_image_of_many_layers_becomes_one_of_one_layer_with_the_same_content() {
    let (store, dir) = mounted();
    fs::write(dir.join("more"), "more").unwrap();
    store.ok(&["commit", "c", "two"]);
    fs::remove_file(dir.join("more")).unwrap();
    store.ok(&["commit", "c", "three"]);
    store.ok(&["umount", "c"]);
    store.ok(&["flatten", "three", "flat"]);
    assert!(store.content("flat") == store.content("three"));
    let history = store.json(&["history", "flat"]);
    let steps = history.as_array().unwrap();
    let with_layer = steps.iter().filter(|step| !step["layer"].is_null());
    assert_eq!(with_layer.count(), 1, "{history}");
    store.ok(&["rm", "c"]);
    store.ok(&["rmi", "three", "two", "base"]);
    store.ok(&["create", "flat", "--name", "d"]);
    let dir = store.mount("d");
    assert!(!dir.join("more").exists());
    store.ok(&["umount", "d"]);
    store.ok(&["check", "--scrub"]);
}

/// Kills a command at one of its steps. Then it is done or not done, and can be done again.
fn kill_at(place: &str, arguments: &[&str]) {
    let (store, dir) = mounted();
    fs::write(dir.join("file"), "kept").unwrap();
    store.ok(&["snapshot", "c", "first"]);
    fs::write(dir.join("file"), "now").unwrap();
    let writer = Writer::start(&dir);
    writer.wait_for_more();
    let needs_stop = arguments[0] == "rollback";
    let mut running = Some(writer);
    if needs_stop {
        running.take().unwrap().end();
        store.ok(&["umount", "c"]);
    }
    let killed = store
        .command()
        .args(arguments)
        .env(crash_point::VARIABLE, place)
        .output()
        .unwrap();
    assert!(
        !killed.status.success(),
        "{place} was not reached: {killed:?}"
    );
    assert_eq!(killed.status.code(), None, "{place}: {killed:?}");
    if let Some(writer) = running {
        writer.wait_for_more();
        writer.end();
        store.ok(&["umount", "c"]);
    }
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
    // Also of one whose command was killed it is known what it holds.
    let listed = store.json(&["snapshots", "c"]);
    let mut listed = listed["snapshots"].as_array().unwrap().iter();
    assert!(
        listed.all(|kept| kept["bytes"].as_u64().unwrap() > 0),
        "{place}"
    );
    let there = snapshots(&store, "c");
    assert_eq!(there[0], "first", "{place}");
    // What was done counts; what was not is done now.
    match arguments {
        ["snapshot", ..] if there.contains(&"again".to_owned()) => {}
        ["fork", ..] if store.names("ps").contains(&"fork".to_owned()) => {}
        _ => drop(store.ok(arguments)),
    }
    let dir = store.mount("c");
    let content = fs::read_to_string(dir.join("file")).unwrap();
    assert_eq!(content, if needs_stop { "kept" } else { "now" }, "{place}");
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn a_snapshot_that_is_killed_anywhere_is_taken_or_not_taken() {
    for place in [
        "commit: synced",
        "commit: sealed under users",
        "storage: file written aside",
    ] {
        kill_at(place, &["snapshot", "c", "again"]);
    }
    let freezing = [
        "commit: synced",
        "commit: frozen",
        "commit: sealed under users",
        "commit: thawed",
    ];
    for place in freezing {
        kill_at(place, &["snapshot", "c", "again", "--freeze"]);
    }
}

#[test]
fn a_fork_that_is_killed_anywhere_is_there_or_not_there() {
    let [forked, ..] = crash_point::SNAPSHOTS;
    for place in [
        "commit: sealed under users",
        forked,
        "storage: file written aside",
    ] {
        kill_at(place, &["fork", "c", "fork"]);
    }
}

#[test]
fn a_rollback_that_is_killed_anywhere_went_back_or_did_not() {
    let of_rollback = crash_point::SNAPSHOTS
        .iter()
        .filter(|place| place.starts_with("rollback: "));
    for place in of_rollback {
        kill_at(place, &["rollback", "c", "first"]);
    }
}

/// Of each snapshot of `c` above another.
fn assert_sizes_are_those_of_their_layers(store: &TestStore) {
    let record = store.json(&["inspect", "c"]);
    let all = record[0]["container"]["snapshots"].as_array().unwrap();
    let above: Vec<_> = all
        .iter()
        .filter(|kept| !kept["parent"].is_null())
        .collect();
    assert!(!above.is_empty());
    for kept in above {
        let layers = kept["layers"].as_array().unwrap();
        let info = |layer: &serde_json::Value| {
            let path = store.root.join("layers").join(layer.as_str().unwrap());
            let info = fs::read(path.join("info.json")).unwrap();
            let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
            info["bytes"].as_u64().unwrap()
        };
        let bytes: u64 = layers.iter().map(info).sum();
        assert_eq!(kept["bytes"].as_u64(), Some(bytes), "{kept}");
    }
}

#[test]
fn a_merge_that_is_killed_anywhere_joined_or_did_not() {
    let of_merge = crash_point::SNAPSHOTS
        .iter()
        .filter(|place| place.starts_with("merge: "));
    for place in of_merge {
        let (store, dir) = mounted();
        for number in 1..=3u8 {
            fs::write(dir.join("file"), vec![number; 100_000]).unwrap();
            store.ok(&["snapshot", "c", &format!("s{number}")]);
        }
        let before = store.content("c@s3");
        let killed = store
            .command()
            .args(["merge", "c", "--keep", "s3"])
            .env(crash_point::VARIABLE, place)
            .output()
            .unwrap();
        assert_eq!(killed.status.code(), None, "{place}: {killed:?}");
        // The server goes on, with whatever it has open.
        fs::write(dir.join("later"), "later").unwrap();
        store.ok(&["prune"]);
        assert!(store.content("c@s3") == before, "{place}");
        store.ok(&["merge", "c"]);
        assert!(store.content("c@s3") == before, "{place}");
        store.ok(&["umount", "c"]);
        let dir = store.mount("c");
        assert_eq!(fs::read_to_string(dir.join("later")).unwrap(), "later");
        assert_eq!(fs::read(dir.join("file")).unwrap(), vec![3; 100_000]);
        store.ok(&["umount", "c"]);
        store.ok(&["check", "--scrub"]);
    }
}
