//! `vellum changed`, `backup` and `restore`: what is restored is what was backed up, byte for byte, whatever
//! the container went through; what was interrupted goes on; what does not fit is refused by name.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use serde_json::Value;
use uuid::Uuid;
use vellum_backup::{Header, Reader, Writer};
use vellum_base::block::{Block, Blocks, Span};
use vellum_base::crash_point;

use crate::common::{TestStore, VELLUM, run, shell};

const BLOCK: usize = 4096;

/// A container `c` of a small image.
fn container() -> TestStore {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    store
}

/// Changes files of a container in its directory: new data, rewritten blocks, and blocks that become zero.
fn change(dir: &Path, step: u8) {
    let noise = |len: usize| -> Vec<u8> {
        // Nothing that zstd could make small: pieces are to fill several chunks.
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(step) + 1);
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    };
    fs::write(dir.join(format!("step-{step}")), noise(1_500_000)).unwrap();
    let file = fs::File::options()
        .write(true)
        .open(dir.join("file"))
        .unwrap();
    file.write_all_at(&noise(5000), u64::from(step) * 9000)
        .unwrap();
    file.sync_all().unwrap();
    if step > 0 {
        let before = format!("step-{}", step - 1);
        shell(
            dir,
            &format!("fallocate -p -o 100000 -l 600000 {before}; sync -f ."),
        );
    }
}

/// Blocks of the first content that are others in the second; what one does not have is zero.
fn differing(older: &[u8], newer: &[u8]) -> Vec<usize> {
    let zeros = [0; BLOCK];
    let block = |bytes: &'_ [u8], number: usize| -> Vec<u8> {
        let block = bytes.chunks(BLOCK).nth(number);
        block.unwrap_or(&zeros).to_vec()
    };
    let numbers = 0..newer.len() / BLOCK;
    numbers
        .filter(|number| block(older, *number) != block(newer, *number))
        .collect()
}

/// Checks a list of changed ranges against both contents, and returns how many blocks it has.
fn check_changed(changed: &Value, older: &[u8], newer: &[u8]) -> usize {
    let mut listed = std::collections::BTreeSet::new();
    let mut at = 0;
    for range in changed["ranges"].as_array().unwrap() {
        let (offset, length) = (&range["offset"], &range["length"]);
        let offset = offset.as_u64().unwrap() as usize;
        let end = offset + length.as_u64().unwrap() as usize;
        assert!(
            at <= offset && offset < end && end <= newer.len(),
            "{range}"
        );
        at = end;
        if range["kind"] == "zero" {
            assert!(newer[offset..end].iter().all(|byte| *byte == 0), "{range}");
        }
        listed.extend(offset / BLOCK..end.div_ceil(BLOCK));
    }
    for block in differing(older, newer) {
        assert!(listed.contains(&block), "block {block} differs");
    }
    assert_eq!(
        changed["changed_bytes"].as_u64().unwrap() as usize,
        listed.len() * BLOCK
    );
    listed.len()
}

/// The bytes of a container or snapshot.
fn same(store: &TestStore, name: &str, expected: &[u8]) {
    assert!(store.content(name) == expected, "{name} is another");
}

/// The ids of a container's snapshots.
fn ids(store: &TestStore, name: &str) -> Vec<Value> {
    let listed = store.json(&["snapshots", name]);
    let listed = listed["snapshots"].as_array().unwrap().iter();
    listed.map(|kept| kept["id"].clone()).collect()
}

#[test]
fn a_full_backup_and_deltas_of_a_container_in_use_restore_each_moment_byte_for_byte() {
    let (store, other) = (container(), TestStore::new());
    let dir = store.mount("c");
    let mut contents = Vec::new();
    let mut files = Vec::new();
    for step in 0..4u8 {
        change(&dir, step);
        let (snapshot, file) = (format!("s{step}"), store.arg(&format!("{step}.vb")));
        let before = format!("s{}", step.max(1) - 1);
        if step > 0 {
            // The running server is asked, and the list has what no flush has made durable.
            let changed = store.json(&["changed", "c", "--since", &before]);
            assert!(changed["changed_bytes"].as_u64().unwrap() >= 1_500_000);
        }
        let mut arguments = vec!["backup", "c", "--snapshot", &snapshot, "-o", &file];
        if step > 0 {
            arguments.extend(["--since", &before]);
        }
        let report = store.json(&arguments);
        assert_eq!(report["taken"], true, "{report}");
        contents.push(store.content(&format!("c@{snapshot}")));
        if step > 0 {
            let later = format!("c@{snapshot}");
            let changed = store.json(&["changed", &later, "--since", &before]);
            let [.., older, newer] = contents.as_slice() else {
                panic!()
            };
            let listed = check_changed(&changed, older, newer);
            let report = |field: &str| report[field].as_u64().unwrap() as usize;
            assert_eq!(report("data_bytes") + report("zero_bytes"), listed * BLOCK);
            assert!(listed < 1500, "{listed} blocks: a delta is what changed");
            assert!(report("zero_bytes") > 0, "punched holes are zeros");
        }
        files.push(file);
    }
    store.ok(&["umount", "c"]);
    let check: Vec<&str> = ["restore", "--check"]
        .into_iter()
        .chain(files.iter().map(String::as_str))
        .collect();
    let said = store.ok(&check);
    assert!(said.contains("c@s0") && said.contains("since s2"), "{said}");
    // The last delta comes later, on top of what is there.
    other.ok(&["restore", "d", &files[0], &files[1], &files[2]]);
    other.ok(&["restore", "d", &files[3]]);
    for (step, content) in contents.iter().enumerate() {
        same(&other, &format!("d@s{step}"), content);
    }
    same(&other, "d", &contents[3]);
    // The ids went along, so the chain goes on at the destination and back.
    assert_eq!(ids(&store, "c"), ids(&other, "d"));
    let dir = other.mount("d");
    assert_eq!(fs::read(dir.join("step-3")).unwrap().len(), 1_500_000);
    change(&dir, 4);
    other.ok(&["umount", "d"]);
    let back = store.arg("back.vb");
    other.ok(&[
        "backup",
        "d",
        "--since",
        "s3",
        "--snapshot",
        "s4",
        "-o",
        &back,
    ]);
    store.ok(&["rollback", "c", "s3", "--discard"]);
    store.ok(&["restore", "c", &back]);
    same(&store, "c@s4", &other.content("d@s4"));
    for store in [&store, &other] {
        store.ok(&["prune"]);
        store.ok(&["check", "--scrub"]);
        store.assert_nothing_runs();
    }
}

#[test]
fn deltas_go_across_joined_layers_and_branches() {
    let (store, other) = (container(), TestStore::new());
    let dir = store.mount("c");
    for step in 0..4u8 {
        change(&dir, step);
        store.ok(&["snapshot", "c", &format!("s{step}")]);
    }
    store.ok(&["umount", "c"]);
    let [s0, s3] = ["c@s0", "c@s3"].map(|name| store.content(name));
    let file = |name: &str| store.arg(name);
    store.ok(&["backup", "c@s0", "-o", &file("s0.vb")]);
    store.ok(&["merge", "c", "--keep", "s0,s3"]);
    // Another branch, since a snapshot of the first.
    store.ok(&["rollback", "c", "s0", "--discard"]);
    change(&store.mount("c"), 1);
    store.ok(&["umount", "c"]);
    let changed = store.json(&["changed", "c", "--since", "s3"]);
    let now = store.content("c");
    check_changed(&changed, &s3, &now);
    let (server, _) = store.serve("c");
    assert_eq!(
        store.json(&["changed", "c", "--since", "s3"]),
        changed,
        "as its NBD server says"
    );
    server.end();
    store.ok(&["backup", "c@s3", "--since", "s0", "-o", &file("s3.vb")]);
    store.ok(&[
        "backup",
        "c",
        "--since",
        "s3",
        "--snapshot",
        "branch",
        "-o",
        &file("branch.vb"),
    ]);
    other.ok(&[
        "restore",
        "d",
        &file("s0.vb"),
        &file("s3.vb"),
        &file("branch.vb"),
    ]);
    // Not as it was before: a snapshot of a container that is not mounted drops dead blocks of ext4's journal.
    let branch = store.content("c@branch");
    for (name, content) in [("d@s0", &s0), ("d@s3", &s3), ("d@branch", &branch)] {
        same(&other, name, content);
    }
    other.ok(&["check", "--scrub"]);
}

/// A backup by hand of a device of so many blocks: data in the block of this number, and behind it zeros.
fn by_hand(file: &str, like: &str, blocks: u64, states: (u128, Option<u128>), data: u64) {
    let like = fs::read(like).unwrap();
    let reader = Reader::new(&like[..]).unwrap();
    let header = Header {
        state: Uuid::from_u128(states.0),
        base: states.1.map(Uuid::from_u128),
        virtual_size: blocks * BLOCK as u64,
        device_size: blocks * BLOCK as u64 - 512,
        ..reader.header().clone()
    };
    let mut writer = Writer::new(Vec::new(), &header, reader.description()).unwrap();
    writer
        .data(Block::new(data), &[states.0 as u8; BLOCK])
        .unwrap();
    let rest = Span::between(Block::new(data + 1), Block::FIRST + Blocks::new(blocks));
    if !rest.is_empty() {
        writer.zero(rest).unwrap();
    }
    fs::write(file, writer.finish().unwrap().1).unwrap();
}

#[test]
fn a_disk_that_grew_or_shrank_between_backups_has_the_size_of_each() {
    let store = container();
    store.ok(&["backup", "c", "-o", &store.arg("like.vb")]);
    let files: Vec<String> = (0..4).map(|n| store.arg(&format!("{n}.vb"))).collect();
    let like = store.arg("like.vb");
    by_hand(&files[0], &like, 100, (1, None), 90);
    by_hand(&files[1], &like, 200, (2, Some(1)), 150);
    by_hand(&files[2], &like, 50, (3, Some(2)), 10);
    by_hand(&files[3], &like, 160, (4, Some(3)), 159);
    store.ok(&["restore", "d", &files[0], &files[1], &files[2], &files[3]]);
    let names: Vec<String> = {
        let listed = store.json(&["snapshots", "d"]);
        let listed = listed["snapshots"].as_array().unwrap().iter();
        listed
            .map(|kept| format!("d@{}", kept["name"].as_str().unwrap()))
            .collect()
    };
    let content = |blocks: usize, data: &[(usize, u8)]| {
        let mut bytes = vec![0; blocks * BLOCK - 512];
        for (block, value) in data {
            let end = ((block + 1) * BLOCK).min(bytes.len());
            bytes[block * BLOCK..end].fill(*value);
        }
        bytes
    };
    // A name that is there gets a number.
    assert!(
        names[1].ends_with("-2") && names[3].ends_with("-4"),
        "{names:?}"
    );
    same(&store, &names[0], &content(100, &[(90, 1)]));
    same(&store, &names[1], &content(200, &[(90, 1), (150, 2)]));
    same(&store, &names[2], &content(50, &[(10, 3)]));
    same(&store, &names[3], &content(160, &[(10, 3), (159, 4)]));
    same(&store, "d", &content(160, &[(10, 3), (159, 4)]));
    store.ok(&["check", "--scrub"]);
}

/// In how many pieces what changed in `c` since its snapshot `base` is read.
fn pieces(store: &TestStore) -> u64 {
    let changed = store.json(&["changed", "c", "--since", "base"]);
    let ranges = changed["ranges"].as_array().unwrap().iter();
    let data = ranges.filter(|range| range["kind"] == "data");
    let lengths = data.map(|range| range["length"].as_u64().unwrap());
    lengths.map(|length| length.div_ceil(1 << 20)).sum()
}

/// In how many extents a backup is read.
fn extents(file: &str) -> usize {
    let mut reader = Reader::new(fs::File::open(file).unwrap()).unwrap();
    let mut count = 0;
    while let Some(chunk) = reader.chunk().unwrap() {
        count += chunk.pieces().count();
    }
    count
}

#[test]
fn a_backup_that_is_killed_anywhere_goes_on_with_the_same_command() {
    let store = container();
    change(&store.mount("c"), 0);
    store.ok(&["umount", "c"]);
    store.ok(&["snapshot", "c", "base"]);
    change(&store.mount("c"), 1);
    let places = crash_point::BACKUPS
        .iter()
        .filter(|place| place.starts_with("backup: "));
    for (number, place) in places.enumerate() {
        let file = store.arg(&format!("{number}.vb"));
        let arguments = ["backup", "c", "--since", "base", "-o", &file];
        let many = format!("{place}:{}", pieces(&store) - 1);
        let is_within = *place == "backup: piece written";
        store.killed(if is_within { &many } else { place }, &arguments);
        assert!(!Path::new(&file).exists(), "{place}");
        let count = |store: &TestStore| {
            let listed = store.json(&["snapshots", "c"]);
            listed["snapshots"].as_array().unwrap().len()
        };
        let before = count(&store);
        if is_within {
            // As a power cut leaves it: what is behind the last whole piece is torn.
            let partial = fs::File::options()
                .append(true)
                .open(format!("{file}.partial"))
                .unwrap();
            partial
                .write_all_at(&[0; 5000], partial.metadata().unwrap().len())
                .unwrap();
        }
        let report = store.json(&arguments);
        let resumed = report["resumed_bytes"].as_u64().unwrap();
        let in_file = *place != "backup: snapshot taken";
        assert_eq!(resumed > 500_000, in_file, "{place}: {report}");
        assert_eq!(report["taken"], !in_file);
        assert_eq!(count(&store), before + usize::from(!in_file), "{place}");
        let name = format!("c@{}", report["snapshot"].as_str().unwrap());
        let full = store.arg(&format!("{number}.full"));
        store.ok(&["backup", "c@base", "-o", &full]);
        let restored = format!("r{number}");
        store.ok(&["restore", &restored, &full, &file]);
        let content = store.content(&name);
        same(&store, &restored, &content);
        assert!(!Path::new(&format!("{file}.partial")).exists());
    }
    store.ok(&["umount", "c"]);
}

#[test]
fn a_restore_that_is_killed_anywhere_goes_on_with_the_same_command() {
    let store = container();
    let dir = store.mount("c");
    let files = ["full.vb", "delta.vb"].map(|name| store.arg(name));
    change(&dir, 0);
    store.ok(&["backup", "c", "--snapshot", "one", "-o", &files[0]]);
    change(&dir, 1);
    store.ok(&[
        "backup",
        "c",
        "--since",
        "one",
        "--snapshot",
        "two",
        "-o",
        &files[1],
    ]);
    let contents = ["c@one", "c@two"].map(|name| store.content(name));
    let places = crash_point::BACKUPS
        .iter()
        .filter(|place| place.starts_with("restore: "));
    // Of the first backup, and of the second.
    let places = places.flat_map(|place| [(*place, 1), (place, 2)]);
    let other = TestStore::new();
    for (place, time) in places {
        let arguments = ["restore", "d", &files[0], &files[1]];
        let time = match place {
            "restore: piece written" => (time - 1) * extents(&files[0]) + 3,
            _ => time,
        };
        other.killed(&format!("{place}:{time}"), &arguments);
        other.ok(&["prune"]);
        other.ok(&["check", "--scrub"]);
        let done = other.names("ps");
        if !done.is_empty() {
            // It is what one of the backups says.
            let now = other.content("d");
            assert!(contents.contains(&now), "{place}:{time}");
        }
        other.ok(&arguments);
        same(&other, "d@one", &contents[0]);
        same(&other, "d", &contents[1]);
        other.ok(&["rm", "--snapshots", "d"]);
        other.ok(&["prune"]);
        assert_eq!(other.layers().len(), 0, "{place}:{time}");
    }
    store.ok(&["umount", "c"]);
}

/// A full backup of `c@one`, and the deltas to `two` and `three`.
fn three(store: &TestStore) -> [String; 3] {
    let dir = store.mount("c");
    let files = ["one", "two", "three"].map(|name| store.arg(name));
    let mut since: Option<&str> = None;
    for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
        fs::write(dir.join("file"), name).unwrap();
        let mut arguments = vec!["backup", "c", "--snapshot", name, "-o", &files[number]];
        arguments.extend(since.iter().flat_map(|since| ["--since", *since]));
        store.ok(&arguments);
        since = Some(name);
    }
    store.ok(&["umount", "c"]);
    files
}

#[test]
fn a_backup_that_does_not_fit_is_refused_by_name_and_leaves_nothing() {
    let store = container();
    let [one, two, three] = three(&store);
    let snapshots = store.json(&["snapshots", "c"]);
    let id = |number: usize| {
        snapshots["snapshots"][number]["id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let other = TestStore::new();
    let layers = || other.layers().len();
    // A delta alone, one that is missing in between, and one of another container.
    let said = other.fails(&["restore", "d", &two]);
    assert!(
        said.contains(&id(0)) && said.contains("snapshot one of c") && said.contains("full backup"),
        "{said}"
    );
    let said = other.fails(&["restore", "d", &one, &three]);
    assert!(
        said.contains(&three) && said.contains(&id(1)) && said.contains("snapshot two of c"),
        "{said}"
    );
    assert_eq!(layers(), 0, "nothing was begun");
    other.ok(&["restore", "d", &one]);
    other.small_image("base");
    other.ok(&["create", "base", "--name", "foreign"]);
    let said = other.fails(&["restore", "foreign", &two]);
    assert!(
        said.contains(&id(0)) && said.contains("foreign does not have"),
        "{said}"
    );
    let said = other.fails(&["restore", "foreign", &one]);
    assert!(
        said.contains("full backup") && said.contains("foreign is there"),
        "{said}"
    );
    // A container that is in use, or was written since.
    let dir = other.mount("d");
    let said = other.fails(&["restore", "d", &two]);
    assert!(said.contains("vellum umount d"), "{said}");
    fs::write(dir.join("file"), "written").unwrap();
    other.ok(&["umount", "d"]);
    let before = layers();
    let said = other.fails(&["restore", "d", &two]);
    assert!(
        said.contains("written since d@one") && said.contains("vellum rollback d one"),
        "{said}"
    );
    assert_eq!(layers(), before);
    let (server, _) = other.serve("d");
    let said = other.fails(&["restore", "d", &two]);
    assert!(said.contains("served over NBD by process"), "{said}");
    // Nor is a moment of it taken, and the message says what to do.
    let out = other.arg("served.vb");
    for command in [&["backup", "d", "-o", &out][..], &["snapshot", "d"]] {
        let said = other.fails(command);
        let end = format!("end that server (`kill {}`)", server.0.id());
        assert!(said.contains(&end), "{command:?}: {said}");
    }
    server.end();
    other.ok(&["rollback", "d", "one"]);
    other.ok(&["restore", "d", &one, &two]);
    // It went on: what it once was is no ground for a delta.
    other.ok(&["snapshot", "d", "later"]);
    let said = other.fails(&["restore", "d", &three]);
    assert!(
        said.contains("does not go on from there") && said.contains("vellum rollback d two"),
        "{said}"
    );
    other.ok(&["rollback", "d", "two", "--discard"]);
    other.ok(&["restore", "d", &three]);
    same(&other, "d", &store.content("c@three"));
    other.ok(&["check", "--scrub"]);
}

#[test]
fn a_damaged_or_cut_backup_is_refused_before_anything_of_it_can_be_seen() {
    let store = container();
    let [one, two, _] = three(&store);
    let bytes = fs::read(&two).unwrap();
    let other = TestStore::new();
    other.ok(&["restore", "d", &one]);
    let (before, content) = (other.layers(), other.content("d"));
    let cut = bytes[..bytes.len() - 7].to_vec();
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    let foreign = b"no backup at all, but long enough to be taken for one".repeat(10);
    let bad = store.arg("bad");
    for (bytes, text) in [(cut, "cut off"), (damaged, "CRC"), (foreign, "wrong magic")] {
        fs::write(&bad, bytes).unwrap();
        for arguments in [&["restore", "d", &bad][..], &["restore", "--check", &bad]] {
            let said = other.fails(arguments);
            assert!(said.contains(text) && said.contains(&bad), "{said}");
        }
        other.ok(&["prune"]);
        assert_eq!(other.layers(), before);
    }
    same(&other, "d", &content);
    other.ok(&["restore", "d", &two]);
}

#[test]
fn a_backup_takes_no_file_s_place_and_goes_on_with_no_other_one() {
    let store = container();
    let out = store.arg("out.vb");
    let refused = |arguments: &[&str], texts: &[&str]| {
        let said = store.fails(arguments);
        assert!(texts.iter().all(|text| said.contains(text)), "{said}");
    };
    refused(&["backup", "nobody", "-o", &out], &["no container nobody"]);
    refused(
        &["backup", "base", "-o", &out],
        &["is an image", "vellum create base"],
    );
    refused(&["backup", "c@never", "-o", &out], &["no snapshot never"]);
    refused(
        &["backup", "c", "--since", "never", "-o", &out],
        &["no snapshot never"],
    );
    store.ok(&["snapshot", "c", "one"]);
    refused(
        &["backup", "c@one", "--since", "one", "-o", &out],
        &["since itself"],
    );
    refused(
        &["backup", "c@one", "--snapshot", "two", "-o", &out],
        &["--snapshot two"],
    );
    refused(
        &["backup", "c", "--snapshot", "one", "-o", &out],
        &["vellum backup c@one"],
    );
    refused(
        &["backup", "c", "-o", store.dir.path().to_str().unwrap()],
        &["is a directory: name a file in it"],
    );
    assert!(!Path::new(&format!("{out}.partial")).exists());
    fs::write(&out, "mine").unwrap();
    refused(&["backup", "c", "-o", &out], &["there is a file", &out]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    fs::remove_file(&out).unwrap();
    store.killed("backup: piece written:2", &["backup", "c@one", "-o", &out]);
    store.ok(&["snapshot", "c", "two"]);
    store.ok(&["create", "base", "--name", "e"]);
    for arguments in [
        &["backup", "c@two", "-o", &out][..],
        &["backup", "c@two", "--since", "one", "-o", &out],
        &["backup", "c", "--snapshot", "three", "-o", &out],
        &["backup", "e", "-o", &out],
    ] {
        refused(arguments, &["out.vb.partial", "all of c@one", "remove it"]);
    }
    fs::remove_file(format!("{out}.partial")).unwrap();
    store.ok(&["backup", "c@one", "-o", &out]);
    let listed = store.json(&["snapshots", "c"]);
    assert_eq!(
        listed["snapshots"].as_array().unwrap().len(),
        2,
        "none was taken for what was refused"
    );
}

#[test]
fn what_is_no_backup_that_was_begun_is_left_as_it_is_and_so_is_one_whose_header_is_damaged() {
    let store = container();
    let out = store.arg("out.vb");
    let partial = format!("{out}.partial");
    store.ok(&["snapshot", "c", "one"]);
    let backup = ["backup", "c@one", "-o", &out];
    store.killed("backup: piece written:2", &backup);
    let mut damaged = fs::read(&partial).unwrap();
    damaged[100] ^= 1;
    let long = "somebody's own file. ".repeat(40).into_bytes();
    for (content, why) in [
        (long, "wrong magic"),
        (b"my precious notes\n".to_vec(), "cut off"),
        (damaged, "does not match its CRC"),
    ] {
        fs::write(&partial, &content).unwrap();
        let said = store.fails(&backup);
        for text in ["out.vb.partial", "remove it, or give another name", why] {
            assert!(said.contains(text), "{said}");
        }
        assert!(fs::read(&partial).unwrap() == content, "{why}");
    }
    // The beginning of one that a kill left there holds nothing.
    fs::write(&partial, b"VELLUMBK\x01").unwrap();
    store.ok(&backup);
    store.ok(&["restore", "--check", &out]);
}

#[test]
fn a_snapshot_is_backed_up_from_a_store_that_cannot_be_written() {
    let store = container();
    store.ok(&["snapshot", "c", "one"]);
    let (root, saved) = (store.path("read-only"), store.arg("saved.vb"));
    fs::create_dir(&root).unwrap();
    let root = root.to_str().unwrap();
    run(
        "mount",
        &["-o", "bind,ro", store.root.to_str().unwrap(), root],
    );
    let output = |arguments: &[&str]| -> Output {
        let mut command = std::process::Command::new(VELLUM);
        command
            .args(["--root", root])
            .args(arguments)
            .output()
            .unwrap()
    };
    let of_snapshot = output(&["backup", "c@one", "-o", &saved]);
    let of_now = output(&["changed", "c", "--since", "one"]);
    let to_take = output(&["backup", "c", "-o", &store.arg("other.vb")]);
    run("umount", &[root]);
    assert!(of_snapshot.status.success(), "{of_snapshot:?}");
    assert!(of_now.status.success(), "{of_now:?}");
    assert!(!to_take.status.success(), "{to_take:?}");
    store.ok(&["restore", "d", &saved]);
    same(&store, "d", &store.content("c@one"));
}

#[test]
fn a_stream_goes_from_one_store_to_another_and_what_runs_is_the_same() {
    let (store, other) = (TestStore::new(), TestStore::new());
    store.small_image("base");
    let confined = ["--memory", "100m", "--cap-drop", "CAP_CHOWN"];
    store.ok(&[&["create", "base", "--name", "c"][..], &confined].concat());
    let record = store.root.join("containers/c.json");
    let with_volume = r#""volumes": [{"source": "data", "destination": "/data"}]"#;
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace(r#""volumes": []"#, with_volume)).unwrap();
    fs::write(store.mount("c").join("file"), "sent").unwrap();
    let send = |more: &str, name: &str, options: &str| {
        let (from, to) = (store.root.display(), other.root.display());
        shell(
            store.dir.path(),
            &format!(
                "{{ VELLUM_ROOT='{from}' {VELLUM} -q backup {more} -o - || echo failed > failed; }} \
                | VELLUM_ROOT='{to}' {VELLUM} --json restore {options} {name} -; ! [ -e failed ]"
            ),
        )
    };
    let report: Value = serde_json::from_str(&send("c --snapshot one", "d", "")).unwrap();
    assert_eq!(report["left_out"][0]["source"], "data", "{report}");
    let said = send("c --since one --snapshot two", "d", "");
    assert!(said.contains("two"), "{said}");
    same(&other, "d@two", &store.content("c@two"));
    send("c@one", "with-volumes", "--volumes");
    let record = |store: &TestStore, name: &str| store.json(&["inspect", name]);
    let (origin, without, with) = (
        record(&store, "c"),
        record(&other, "d"),
        record(&other, "with-volumes"),
    );
    for field in ["config", "confinement", "image", "image_id"] {
        let of = |value: &Value| find(value, field).cloned();
        assert!(of(&origin).is_some(), "{field}: {origin}");
        assert_eq!(of(&origin), of(&without), "{field}");
        assert_eq!(of(&origin), of(&with), "{field}");
    }
    let volumes = |value: &Value| find(value, "volumes").unwrap().as_array().unwrap().len();
    assert_eq!(
        (volumes(&origin), volumes(&without), volumes(&with)),
        (1, 0, 1)
    );
    store.ok(&["umount", "c"]);
    // A reader that is gone ends the sender, with its reason.
    let broken = shell(
        store.dir.path(),
        &format!(
            "{{ VELLUM_ROOT='{}' {VELLUM} -q backup c@one -o - 2>&1 >&3 | cat >said; }} 3>&1 | head -c 100 >/dev/null; cat said",
            store.root.display()
        ),
    );
    assert!(
        broken.is_empty() || broken.contains("Broken pipe"),
        "{broken}"
    );
}

/// The first field of that name, wherever it is.
fn find<'a>(value: &'a Value, field: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields
            .get(field)
            .or_else(|| fields.values().find_map(|value| find(value, field))),
        Value::Array(values) => values.iter().find_map(|value| find(value, field)),
        _ => None,
    }
}
