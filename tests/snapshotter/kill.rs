//! The snapshotter killed at every step of every call that changes something: nothing half-made
//! stays, nothing committed is lost, and the call succeeds when it is made again.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::diff;
use crate::snapshotter_support::client::{ALREADY_EXISTS, Client, NOT_FOUND};
use crate::snapshotter_support::content::FakeContainerd;
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::{room, wait_for};
use vellum_base::crash_point::ALL;

const PREPARE: [&str; 9] = [
    "prepare: key taken",
    "prepare: layer made",
    "prepare: layer published",
    "prepare: record in place",
    "mount: directory made",
    "mount: device attached",
    "mount: mounted",
    "mount: grown",
    "prepare: done",
];
/// Of an Update that makes a snapshot larger.
const GROW: [&str; 4] = [
    "update: record in place",
    "grow: layer grown",
    "grow: device grown",
    "mount: grown",
];
const REMOTE: &str = "remote: record in place";
const COMMIT: [&str; 9] = [
    "commit: mounted",
    "commit: unmounted",
    "commit: sealed",
    "commit: record in place",
    "commit: done",
    "retire: unmounted",
    "retire: device detached",
    "retire: released",
    "retire: checksums made",
];
const COMMIT_UNDER_USERS: [&str; 7] = [
    "commit: next layer published",
    "commit: next layer recorded",
    "commit: synced",
    "commit: frozen",
    "commit: sealed under users",
    "commit: thawed",
    "commit: hidden",
];
const REMOVE: [&str; 9] = [
    "remove: begun",
    "remove: record gone",
    "remove: hidden",
    "remove: done",
    "retire: unmounted",
    "retire: device detached",
    "retire: released",
    "retire: layer in the trash",
    "retire: layer discarded",
];
/// Of a Diff.
const DIFF: [&str; 3] = ["diff: begun", "diff: written", "diff: committed"];
/// Between writing a record beside its place and the rename, for each record that a call writes.
const ASIDE: &str = "storage: file written aside";

#[test]
fn every_place_to_die_at_is_in_one_of_the_tests_below() {
    let tested: Vec<&str> = [
        &PREPARE[..],
        &COMMIT,
        &COMMIT_UNDER_USERS,
        &REMOVE,
        &GROW,
        &DIFF,
    ]
    .concat()
    .into_iter()
    .chain([REMOTE, ASIDE])
    .collect();
    for place in ALL {
        assert!(tested.contains(&place), "{place:?} is not tested");
    }
}

#[test]
fn a_layer_is_stored_whole_or_not_at_all_wherever_a_diff_is_killed() {
    let containerd = FakeContainerd::start();
    let mut rig = Rig::new(&containerd.config());
    rig.committed("base", "", "file", "base");
    let left = rig.client.view("left", "base", &[]).unwrap();
    let right = rig.client.prepare("web", "base", &[]).unwrap();
    fs::write(Path::new(&right.source).join("own"), "x").unwrap();
    let wanted = diff::request(&[&left], &[&right]);
    for place in DIFF {
        containerd.state().blobs.clear();
        let died = rig.dies_at(place, |client| {
            client.diff(diff::NAMESPACE, &wanted).is_ok()
        });
        assert!(died, "it does not come by {place:?}");
        let stored = containerd.state().blobs.len();
        assert_eq!(stored, usize::from(place == "diff: committed"), "{place}");
        let found = rig.client.diff(diff::NAMESPACE, &wanted).unwrap();
        let blob = containerd.blob("here", &found.digest).unwrap();
        assert_eq!(diff::entries(&blob.bytes).len(), 1, "{place}");
        rig.assert_whole(place);
    }
}

fn file_of(source: &str, name: &str) -> String {
    fs::read_to_string(Path::new(source).join(name)).unwrap()
}

/// The places, then as many of the numbered ones as the call comes by.
fn each_place(rig: &mut Rig, places: &[&str], mut test: impl FnMut(&mut Rig, usize, &str) -> bool) {
    for (number, place) in places.iter().enumerate() {
        assert!(test(rig, number, place), "it does not come by {place:?}");
    }
    let mut numbered = 0;
    while test(rig, 100 + numbered, &format!("{ASIDE}:{}", numbered + 1)) {
        numbered += 1;
        assert!(numbered < 20, "one call writes that many records?");
    }
    assert!(numbered > 0, "it writes no record?");
}

#[test]
fn prepare_is_whole_or_gone_wherever_it_is_killed() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    rig.assert_whole("at first");
    let size = [("containerd.io/snapshot/vellum.size", "96M")];
    each_place(&mut rig, &PREPARE, |rig, number, place| {
        let key = format!("default/{number}/a key {number}");
        let died = rig.dies_at(place, |client| client.prepare(&key, "base", &size).is_ok());
        let again = rig.client.prepare(&key, "base", &size);
        if let Err(failure) = &again {
            assert_eq!(failure.code(), Some(ALREADY_EXISTS), "{place}: {failure:?}");
        }
        // It is there wholly, however that came about.
        let source = rig.client.mounts(&key).unwrap().source;
        assert_eq!(file_of(&source, "file"), "base", "{place}");
        let room = room(&source);
        assert!(room > 70 << 20, "{place}: {room}");
        fs::write(Path::new(&source).join("own"), "x").unwrap();
        rig.client.remove(&key).unwrap();
        rig.assert_whole(place);
        died
    });
    rig.assert_checks();
}

#[test]
fn a_growth_that_is_killed_at_any_step_is_finished_by_mounts_by_update_or_after_a_reboot() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let size = "containerd.io/snapshot/vellum.size";
    for (number, place) in GROW.into_iter().enumerate() {
        for finished_by in ["mounts", "update", "reboot", "commit"] {
            let key = format!("key {number} {finished_by}");
            let source = rig.client.prepare(&key, "base", &[]).unwrap().source;
            fs::write(Path::new(&source).join("own"), "own").unwrap();
            fs::File::open(Path::new(&source).join("own"))
                .unwrap()
                .sync_all()
                .unwrap();
            let died = rig.dies_at(place, |client| client.update(&key, &[(size, "192M")]));
            assert!(died, "it does not come by {place:?}");
            match finished_by {
                "update" => drop(rig.client.update(&key, &[(size, "192M")]).unwrap()),
                "reboot" => rig.area.end_devices(),
                "commit" => {
                    let name = format!("name {number}");
                    rig.client.commit(&name, &key, &[]).unwrap();
                    rig.client.prepare(&key, &name, &[]).unwrap();
                }
                _ => {}
            }
            let source = rig.client.mounts(&key).unwrap().source;
            let room = room(&source);
            assert!(room > 160 << 20, "{place}, {finished_by}: {room}");
            assert_eq!(file_of(&source, "own"), "own", "{place}, {finished_by}");
            fs::write(Path::new(&source).join("new"), vec![1; 4 << 20]).unwrap();
            rig.client.remove(&key).unwrap();
        }
        rig.assert_whole(place);
    }
    rig.assert_checks();
}

#[test]
fn a_killed_view_is_whole_or_gone_and_mounts_after_a_reboot_may_be_killed_too() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    rig.client.prepare("active", "base", &[]).unwrap();
    for place in [
        "mount: directory made",
        "mount: device attached",
        "mount: mounted",
    ] {
        let key = format!("view at {place}");
        assert!(rig.dies_at(place, |client| client.view(&key, "base", &[]).is_ok()));
        if let Err(failure) = rig.client.view(&key, "base", &[]) {
            assert_eq!(failure.code(), Some(ALREADY_EXISTS), "{place}");
        }
        let source = rig.client.mounts(&key).unwrap().source;
        assert_eq!(file_of(&source, "file"), "base");
        rig.client.remove(&key).unwrap();

        let source = rig.client.mounts("active").unwrap().source;
        let own = Path::new(&source).join("own");
        fs::write(&own, place).unwrap();
        fs::File::open(&own).unwrap().sync_all().unwrap();
        rig.area.end_devices();
        assert!(rig.dies_at(place, |client| client.mounts("active").is_ok()));
        let source = rig.client.mounts("active").unwrap().source;
        assert_eq!(file_of(&source, "own"), place);
        rig.assert_whole(place);
    }
    rig.assert_checks();
}

/// After a commit that was killed: it is before or after, with its data, and can be made again.
fn finish_commit(rig: &Rig, place: &str, key: &str, name: &str) {
    let (active, committed) = (rig.client.stat(key), rig.client.stat(name));
    assert!(
        active.is_ok() != committed.is_ok(),
        "{place}: {active:?} {committed:?}"
    );
    let again = rig.client.commit(name, key, &[]);
    match committed {
        Ok(_) => assert_eq!(again.unwrap_err().code(), Some(NOT_FOUND), "{place}"),
        Err(_) => again.unwrap_or_else(|error| panic!("{place}: {error:?}\n{}", rig.log())),
    }
    assert_eq!(
        rig.content(name, "file").as_deref(),
        Some("base"),
        "{place}"
    );
    assert_eq!(rig.content(name, "own").as_deref(), Some("own"), "{place}");
}

#[test]
fn commit_is_done_or_not_begun_wherever_it_is_killed() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    rig.assert_whole("at first");
    each_place(&mut rig, &COMMIT, |rig, number, place| {
        let (key, name) = (format!("key {number}"), format!("name {number}"));
        let source = rig.client.prepare(&key, "base", &[]).unwrap().source;
        fs::write(Path::new(&source).join("own"), "own").unwrap();
        let died = rig.dies_at(place, |client| client.commit(&name, &key, &[]).is_ok());
        rig.assert_no_errors(place);
        finish_commit(rig, place, &key, &name);
        rig.assert_whole(place);
        rig.client.remove(&name).unwrap();
        rig.assert_whole(place);
        died
    });
    rig.assert_checks();
}

/// Somebody who has the snapshot mounted elsewhere.
struct User(std::path::PathBuf);

impl User {
    fn new(rig: &Rig, source: &str, number: usize) -> User {
        let dir = rig.area.path().join(format!("user {number}"));
        fs::create_dir(&dir).unwrap();
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(source), &dir, None::<&str>, flags, None::<&str>).unwrap();
        User(dir)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn commit_under_users_is_done_or_not_begun_and_they_go_on_wherever_it_is_killed() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    rig.assert_whole("at first");
    let places = [&COMMIT_UNDER_USERS[..], &["commit: record in place"]].concat();
    for (number, place) in places.into_iter().enumerate() {
        let (key, name) = (format!("key {number}"), format!("name {number}"));
        let source = rig.client.prepare(&key, "base", &[]).unwrap().source;
        fs::write(Path::new(&source).join("own"), "own").unwrap();
        let user = User::new(&rig, &source, number);
        let commit = |client: &Client| client.commit(&name, &key, &[]).is_ok();
        assert!(rig.dies_at(place, commit), "it does not come by {place:?}");
        // Also where it died with the file system frozen.
        let file = user.0.join("later");
        let writer = std::thread::spawn(move || {
            fs::write(&file, "later").unwrap();
            fs::File::open(&file).unwrap().sync_all().unwrap();
        });
        wait_for("the user writes on", Duration::from_secs(60), || {
            writer.is_finished()
        });
        writer.join().unwrap();
        finish_commit(&rig, place, &key, &name);
        assert_eq!(fs::read_to_string(user.0.join("own")).unwrap(), "own");
        assert_eq!(fs::read_to_string(user.0.join("later")).unwrap(), "later");
        drop(user);
        rig.assert_whole(place);
        rig.client.remove(&name).unwrap();
        rig.assert_whole(place);
    }
    rig.assert_checks();
}

#[test]
fn remove_is_done_or_not_begun_wherever_it_is_killed() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    for (number, place) in REMOVE.into_iter().enumerate() {
        let key = format!("key {number}");
        let source = rig.client.prepare(&key, "base", &[]).unwrap().source;
        fs::write(Path::new(&source).join("own"), "own").unwrap();
        assert!(
            rig.dies_at(place, |client| client.remove(&key).is_ok()),
            "it does not come by {place:?}"
        );
        match rig.client.stat(&key) {
            Ok(_) => {
                let source = rig.client.mounts(&key).unwrap().source;
                assert_eq!(file_of(&source, "own"), "own", "{place}");
                rig.client.remove(&key).unwrap();
            }
            Err(failure) => assert_eq!(failure.code(), Some(NOT_FOUND), "{place}"),
        }
        rig.assert_whole(place);
    }
    assert_eq!(rig.content("base", "file").as_deref(), Some("base"));
    rig.assert_checks();
}

#[test]
fn a_remote_snapshot_that_was_killed_is_found_or_made_again() {
    let mut rig = Rig::new("");
    let reference = [("containerd.io/snapshot.ref", "sha256:one")];
    let source = rig.client.prepare("first", "", &reference).unwrap().source;
    fs::write(Path::new(&source).join("file"), "base").unwrap();
    rig.client
        .commit("sha256:one", "first", &reference)
        .unwrap();
    rig.assert_whole("at first");
    let prepare = |client: &Client| client.prepare("second", "", &reference);
    assert!(rig.dies_at(REMOTE, |client| prepare(client).is_ok()));
    let again = prepare(&rig.client).unwrap_err();
    assert_eq!(again.code(), Some(ALREADY_EXISTS));
    let filter = "labels.\"containerd.io/snapshot.ref\"==\"sha256:one\",parent==\"\"";
    for info in rig.client.list(&[filter]).unwrap() {
        assert_eq!(rig.content(&info.name, "file").as_deref(), Some("base"));
        rig.client.remove(&info.name).unwrap();
    }
    rig.assert_whole("all removed");
    rig.assert_checks();
}

/// In a thread of a request, in one that it started, and in one that nobody waits for. Without that the
/// request would be answered, the rest would go on beside what it left half done, and what the thread in
/// the background had taken on would be done by nobody.
#[test]
fn a_panic_of_any_thread_ends_it_with_advice_and_the_next_one_has_all_that_was_there() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let other = rig.client.prepare("other", "base", &[]).unwrap().source;
    for (number, place) in [
        "mount: mounted",
        "prepare: layer published",
        "retire: released",
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key {number}");
        let before = rig.log().len();
        let mut outcome = Ok(());
        let died = rig.panics_at(place, |client| {
            let prepared = client.prepare(&key, "base", &[]).map(drop);
            outcome = prepared.and_then(|()| client.remove(&key));
        });
        assert!(died, "it does not end at {place:?}: {}", rig.log());
        let log = rig.log();
        let said = &log[before..];
        let panic = said.find("VELLUM_PANIC_AT").expect(said);
        let advice = said.find("Start it again").expect(said);
        assert!(panic < advice && said.contains("report"), "{said}");
        if !place.starts_with("retire") {
            let failure = outcome.unwrap_err();
            assert_eq!(failure.code(), None, "{place}: {failure:?}");
        }
        // What others have mounted is served by processes of its own.
        fs::write(Path::new(&other).join("own"), place).unwrap();
        assert_eq!(file_of(&other, "own"), place);
        match rig.client.prepare(&key, "base", &[]) {
            Ok(_) => {}
            Err(failure) => assert_eq!(failure.code(), Some(ALREADY_EXISTS), "{place}"),
        }
        let source = rig.client.mounts(&key).unwrap().source;
        assert_eq!(file_of(&source, "file"), "base", "{place}");
        rig.client.remove(&key).unwrap();
        rig.assert_whole(place);
    }
    rig.assert_checks();
}
