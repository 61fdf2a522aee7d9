//! The diff service over the real socket, with a content store that fails on demand.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::snapshotter_support::client::{
    DATA_LOSS, Failure, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE, UNIMPLEMENTED,
};
use crate::snapshotter_support::content::{Blob, FakeContainerd, Fault, digest};
use crate::snapshotter_support::rig::Rig;
use vellum_snapshotter::proto::services::diff::v1::DiffRequest;
use vellum_snapshotter::proto::types::{Descriptor, Mount};

pub const NAMESPACE: &[(&str, &str)] = &[("containerd-namespace", "here")];
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

pub fn request(left: &[&Mount], right: &[&Mount]) -> DiffRequest {
    DiffRequest {
        left: left.iter().map(|mount| (*mount).clone()).collect(),
        right: right.iter().map(|mount| (*mount).clone()).collect(),
        media_type: TAR.into(),
        ..DiffRequest::default()
    }
}

fn setup() -> (FakeContainerd, Rig) {
    let containerd = FakeContainerd::start();
    let rig = Rig::new(&containerd.config());
    (containerd, rig)
}

fn blob(containerd: &FakeContainerd, descriptor: &Descriptor) -> Blob {
    let blob = containerd.blob("here", &descriptor.digest).unwrap();
    assert_eq!(digest(&blob.bytes), descriptor.digest);
    assert_eq!(blob.bytes.len() as i64, descriptor.size);
    blob
}

fn unpacked(bytes: &[u8], media_type: &str) -> Vec<u8> {
    let mut out = Vec::new();
    match media_type.rsplit('+').next().unwrap() {
        "gzip" => flate2::read::GzDecoder::new(bytes)
            .read_to_end(&mut out)
            .map(drop)
            .unwrap(),
        "zstd" => out = zstd::decode_all(bytes).unwrap(),
        _ => out.extend(bytes),
    }
    out
}

/// What each entry of a layer says, by its name, without times.
pub fn entries(tar: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(tar);
    let mut found = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let header = entry.header().clone();
        let mut text = format!(
            "{:?} {:o} {}:{}",
            header.entry_type(),
            header.mode().unwrap(),
            header.uid().unwrap(),
            header.gid().unwrap()
        );
        if let Some(link) = entry.link_name_bytes() {
            text += &format!(" to {}", String::from_utf8_lossy(&link));
        }
        if matches!(
            header.entry_type(),
            tar::EntryType::Char | tar::EntryType::Block
        ) {
            let (major, minor) = (
                header.device_major().unwrap(),
                header.device_minor().unwrap(),
            );
            text += &format!(" device {major:?}:{minor:?}");
        }
        let pax: Vec<(String, Vec<u8>)> = entry
            .pax_extensions()
            .unwrap()
            .into_iter()
            .flatten()
            .map(|field| field.unwrap())
            .map(|field| {
                (
                    field.key().unwrap().to_owned(),
                    field.value_bytes().to_vec(),
                )
            })
            .collect();
        for (key, value) in pax {
            if key.starts_with("SCHILY.xattr.") {
                text += &format!(" {key}={value:x?}");
            }
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        if header.entry_type() == tar::EntryType::Regular {
            text += &format!(" {} bytes {}", bytes.len(), digest(&bytes));
        }
        assert!(found.insert(name.clone(), text).is_none(), "{name} twice");
    }
    found
}

/// A committed snapshot with some files, its view, and an active one on it, changed.
fn changed(rig: &Rig) -> (Mount, Mount) {
    let mount = rig.client.prepare("base being made", "", &[]).unwrap();
    let dir = Path::new(&mount.source);
    for name in ["gone/below", "dir/kept", "other/file"] {
        fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        fs::write(dir.join(name), name).unwrap();
    }
    for name in ["changed", "removed", "same", "becomes", "linked", "moded"] {
        fs::write(dir.join(name), name).unwrap();
    }
    fs::hard_link(dir.join("linked"), dir.join("other/link")).unwrap();
    rig.client.commit("base", "base being made", &[]).unwrap();
    let left = rig.client.view("view of base", "base", &[]).unwrap();
    let right = rig.client.prepare("web", "base", &[]).unwrap();
    let dir = Path::new(&right.source);
    fs::write(dir.join("changed"), "another").unwrap();
    fs::remove_file(dir.join("removed")).unwrap();
    fs::remove_dir_all(dir.join("gone")).unwrap();
    fs::remove_file(dir.join("becomes")).unwrap();
    fs::create_dir(dir.join("becomes")).unwrap();
    symlink("kept", dir.join("dir/symlink")).unwrap();
    fs::write(dir.join("linked"), "longer than it was").unwrap();
    fs::set_permissions(dir.join("moded"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(dir.join("moded"), Some(7), Some(8)).unwrap();
    fs::set_permissions(dir.join("moded"), fs::Permissions::from_mode(0o4711)).unwrap();
    let large = fs::File::create(dir.join("sparse")).unwrap();
    large.set_len(3 << 20).unwrap();
    (left, right)
}

const CHANGED: [&str; 11] = [
    ".wh.gone",
    ".wh.removed",
    "becomes/",
    "changed",
    "dir/",
    "dir/symlink",
    "linked",
    "moded",
    "other/",
    "other/link",
    "sparse",
];

fn names(entries: &BTreeMap<String, String>) -> Vec<&str> {
    entries.keys().map(String::as_str).collect()
}

#[test]
fn a_layer_has_what_a_running_snapshot_changed_and_the_same_once_it_is_committed() {
    let (containerd, rig) = setup();
    let (left, right) = changed(&rig);
    let mut seen = Vec::new();
    for (suffix, request) in [
        ("", request(&[&left], &[&right])),
        ("+zstd", request(&[&left], &[&right])),
        (
            "+gzip",
            DiffRequest {
                media_type: String::new(),
                ..request(&[&left], &[&right])
            },
        ),
    ] {
        let mut request = request;
        request.media_type = match suffix {
            "+zstd" => format!("{TAR}+zstd"),
            _ => request.media_type,
        };
        request.labels = HashMap::from([("mine".to_owned(), "yes".to_owned())]);
        let found = rig.client.diff(NAMESPACE, &request).unwrap();
        assert_eq!(found.media_type, format!("{TAR}{suffix}"));
        let blob = blob(&containerd, &found);
        let tar = unpacked(&blob.bytes, &found.media_type);
        assert_eq!(blob.labels["mine"], "yes");
        let diff_id = (!suffix.is_empty()).then(|| digest(&tar));
        assert_eq!(blob.labels.get(UNCOMPRESSED), diff_id.as_ref());
        // Its client says no lease: one of ours keeps it for a while.
        let state = containerd.state();
        let expires = &state.leases[&blob.leases[0]]["containerd.io/gc.expire"];
        assert!(expires.ends_with('Z') && expires.contains('T'), "{expires}");
        assert!(state.ingests.is_empty(), "{:?}", state.ingests.keys());
        seen.push(entries(&tar));
    }
    let entries_now = &seen[0];
    assert_eq!(names(entries_now), CHANGED);
    assert!(
        entries_now["moded"].starts_with("Regular 4711 7:8"),
        "{}",
        entries_now["moded"]
    );
    assert!(
        entries_now["other/link"].starts_with("Link"),
        "{}",
        entries_now["other/link"]
    );
    assert!(
        entries_now["sparse"].contains(" 3145728 bytes "),
        "{}",
        entries_now["sparse"]
    );
    assert!(seen.iter().all(|other| other == entries_now));

    rig.client.commit("image", "web", &[]).unwrap();
    let right = rig.client.view("view of image", "image", &[]).unwrap();
    let lease = [NAMESPACE[0], ("containerd-lease", "theirs")];
    let leases = containerd.state().leases.len();
    let found = rig
        .client
        .diff(&lease, &request(&[&left], &[&right]))
        .unwrap();
    let again = blob(&containerd, &found);
    assert_eq!(&entries(&again.bytes), entries_now);
    assert!(
        again.leases.contains(&"theirs".to_owned()),
        "{:?}",
        again.leases
    );
    assert_eq!(
        containerd.state().leases.len(),
        leases,
        "no lease of ours beside it"
    );
    for key in ["view of image", "view of base", "image", "base"] {
        rig.client.remove(key).unwrap();
    }
    rig.assert_whole("compared");
}

#[test]
fn against_nothing_a_layer_has_all_files_and_what_ext4_keeps_is_none_of_them() {
    let (containerd, rig) = setup();
    rig.committed("base", "", "file", "text");
    let right = rig.client.view("v", "base", &[]).unwrap();
    let empty = rig.client.view("empty", "", &[]).unwrap();
    for left in [&[][..], &[&empty]] {
        let mut request = request(left, &[&right]);
        request.source_date_epoch = Some(prost_types::Timestamp {
            seconds: 1_000_000,
            nanos: 0,
        });
        let found = rig.client.diff(NAMESPACE, &request).unwrap();
        let bytes = blob(&containerd, &found).bytes;
        assert_eq!(names(&entries(&bytes)), ["file"]);
        let mut archive = tar::Archive::new(&bytes[..]);
        let times = archive.entries().unwrap();
        assert!(
            times
                .into_iter()
                .all(|entry| entry.unwrap().header().mtime().unwrap() == 1_000_000)
        );
    }
    // Two views of one state do not differ.
    let found = rig
        .client
        .diff(NAMESPACE, &request(&[&right], &[&right]))
        .unwrap();
    assert_eq!(names(&entries(&blob(&containerd, &found).bytes)), [""; 0]);
}

#[test]
fn what_is_not_of_this_store_or_not_on_each_other_is_left_to_the_next_differ() {
    let (containerd, rig) = setup();
    let (left, right) = changed(&rig);
    rig.committed("stranger", "", "file", "text");
    let stranger = rig.client.view("stranger seen", "stranger", &[]).unwrap();
    let with = |change: &dyn Fn(&mut Mount)| {
        let mut mount = right.clone();
        change(&mut mount);
        mount
    };
    let elsewhere = with(&|mount| mount.source = "/tmp".into());
    let below = with(&|mount| mount.source += "/dir");
    let overlay = with(&|mount| mount.r#type = "overlay".into());
    let shifted = with(&|mount| mount.options.push("uidmap=0:1000:65536".into()));
    let inside = with(&|mount| mount.target = "dir".into());
    for (what, request) in [
        ("another directory", request(&[&left], &[&elsewhere])),
        ("a directory in a snapshot", request(&[&left], &[&below])),
        (
            "an older one from elsewhere",
            request(&[&elsewhere], &[&right]),
        ),
        ("an overlay", request(&[&left], &[&overlay])),
        ("other owners", request(&[&left], &[&shifted])),
        ("another's directory", request(&[&left], &[&inside])),
        ("two mounts", request(&[&left], &[&right, &right])),
        ("nothing", request(&[&left], &[])),
        ("another's child", request(&[&stranger], &[&right])),
        (
            "an older one that is written",
            request(&[&right], &[&right]),
        ),
        ("the wrong way round", request(&[&right], &[&left])),
        (
            "another media type",
            DiffRequest {
                media_type: "application/vnd.docker.image.rootfs.diff.tar.gzip".into(),
                ..request(&[&left], &[&right])
            },
        ),
    ] {
        let failure = rig.client.diff(NAMESPACE, &request).unwrap_err();
        assert_eq!(failure.code(), Some(UNIMPLEMENTED), "{what}: {failure:?}");
    }
    assert_eq!(rig.client.apply().unwrap_err().code(), Some(UNIMPLEMENTED));
    assert!(containerd.state().leases.is_empty(), "none came that far");
    // Found out in the middle of writing: nothing of it is left in the next one's way.
    fs::write(Path::new(&right.source).join(".wh.name"), "x").unwrap();
    for reference in ["", "theirs"] {
        let mut request = request(&[&left], &[&right]);
        request.r#ref = reference.into();
        let failure = rig.client.diff(NAMESPACE, &request).unwrap_err();
        assert_eq!(failure.code(), Some(UNIMPLEMENTED), "{failure:?}");
        let state = containerd.state();
        assert!(
            state.locked.is_empty() && state.blobs.is_empty(),
            "{state:?}"
        );
        assert!(state.leases.is_empty(), "{state:?}");
        assert!(
            state.ingests.keys().all(|(_, name)| name == "theirs"),
            "{state:?}"
        );
    }
}

#[test]
fn without_a_namespace_nothing_is_stored() {
    let (containerd, rig) = setup();
    let (left, right) = changed(&rig);
    for fields in [&[][..], &[("containerd-namespace", "")]] {
        let failure = rig
            .client
            .diff(fields, &request(&[&left], &[&right]))
            .unwrap_err();
        assert_eq!(failure.code(), Some(INVALID_ARGUMENT), "{failure:?}");
        assert!(
            format!("{failure:?}").contains("containerd-namespace"),
            "{failure:?}"
        );
    }
    assert!(containerd.state().blobs.is_empty());
    // containerd's keys begin with it.
    let right = rig.client.prepare("space/12/web", "base", &[]).unwrap();
    let wanted = request(&[&left], &[&right]);
    let found = rig.client.diff(&[], &wanted).unwrap();
    assert!(containerd.blob("space", &found.digest).is_some());
    let found = rig.client.diff(NAMESPACE, &wanted).unwrap();
    assert!(containerd.blob("here", &found.digest).is_some());
}

fn failed(rig: &Rig, request: &DiffRequest) -> (Option<i32>, String) {
    match rig.client.diff(NAMESPACE, request) {
        Err(Failure::Status(code, text)) => (Some(code), text),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_content_store_that_fails_in_the_middle_leaves_no_layer_and_the_next_try_succeeds() {
    let (containerd, rig) = setup();
    let (left, right) = changed(&rig);
    let random: Vec<u8> = (0..3u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect();
    fs::write(Path::new(&right.source).join("large"), random).unwrap();
    for (fault, code) in [
        (Fault::Refuses(0), RESOURCE_EXHAUSTED),
        (Fault::Refuses(1 << 20), RESOURCE_EXHAUSTED),
        (Fault::Refuses(5 << 20), RESOURCE_EXHAUSTED),
        (Fault::Ends(0), UNAVAILABLE),
        (Fault::Ends(2 << 20), UNAVAILABLE),
        (Fault::Garbles, DATA_LOSS),
    ] {
        containerd.state().fault = Some(fault);
        let (found, text) = failed(&rig, &request(&[&left], &[&right]));
        assert_eq!(found, Some(code), "{fault:?}: {text}");
        let state = containerd.state();
        assert!(state.blobs.is_empty(), "{fault:?}");
        assert!(
            state.ingests.is_empty() && state.leases.is_empty(),
            "{fault:?}: {state:?}"
        );
    }
    containerd.state().fault = None;
    // A reference that somebody writes just now is theirs.
    containerd.state().locked.push("mine".into());
    let mut named = request(&[&left], &[&right]);
    named.r#ref = "mine".into();
    let (code, text) = failed(&rig, &named);
    assert!(
        code == Some(UNAVAILABLE) && text.contains("locked"),
        "{text}"
    );
    containerd.state().locked.clear();
    // One that an earlier try left begins anew.
    let key = ("here".to_owned(), "mine".to_owned());
    containerd.state().ingests.insert(key, vec![7; 100]);
    let found = rig.client.diff(NAMESPACE, &named).unwrap();
    let stored = blob(&containerd, &found);
    assert!(entries(&stored.bytes).contains_key("large"));
    // A layer that is there already is as good, and is kept by a lease of ours too.
    assert_eq!(rig.client.diff(NAMESPACE, &named).unwrap(), found);
    assert_eq!(
        blob(&containerd, &found).leases.len(),
        stored.leases.len() + 1
    );
    // And learns what is in it.
    let zipped = DiffRequest {
        media_type: String::new(),
        ..request(&[&left], &[&right])
    };
    let found = rig.client.diff(NAMESPACE, &zipped).unwrap();
    let key = ("here".to_owned(), found.digest.clone());
    containerd
        .state()
        .blobs
        .get_mut(&key)
        .unwrap()
        .labels
        .clear();
    rig.client.diff(NAMESPACE, &zipped).unwrap();
    assert!(blob(&containerd, &found).labels.contains_key(UNCOMPRESSED));
    // Nobody at the socket.
    drop(containerd);
    let (code, text) = failed(&rig, &request(&[&left], &[&right]));
    assert!(
        code == Some(UNAVAILABLE) && text.contains("[diff]"),
        "{code:?}: {text}"
    );
}

#[test]
fn in_device_mode_what_is_sealed_or_mounted_here_is_compared() {
    let containerd = FakeContainerd::start();
    let rig = Rig::new(&format!("mounts = 'device'\n{}", containerd.config()));
    rig.client.prepare("base being made", "", &[]).unwrap();
    rig.client.commit("base", "base being made", &[]).unwrap();
    let left = rig.client.view("left", "base", &[]).unwrap();
    let right = rig.client.prepare("web", "base", &[]).unwrap();
    assert_eq!(right.r#type, "ext4");
    let wanted = request(&[&left], &[&right]);
    let failure = rig.client.diff(NAMESPACE, &wanted).unwrap_err();
    assert_eq!(
        failure.code(),
        Some(UNIMPLEMENTED),
        "nobody has it mounted: {failure:?}"
    );
    let dir = rig.area.path().join("mounted");
    fs::create_dir(&dir).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(
        Some(&*right.source),
        &dir,
        Some("ext4"),
        flags,
        None::<&str>,
    )
    .unwrap();
    fs::write(dir.join("file"), "text").unwrap();
    let found = rig.client.diff(NAMESPACE, &wanted).unwrap();
    assert_eq!(names(&entries(&blob(&containerd, &found).bytes)), ["file"]);
    nix::mount::umount(&dir).unwrap();
    rig.client.commit("image", "web", &[]).unwrap();
    let right = rig.client.view("right", "image", &[]).unwrap();
    let again = rig
        .client
        .diff(NAMESPACE, &request(&[&left], &[&right]))
        .unwrap();
    assert_eq!(again, found);
    rig.assert_whole("compared");
}

#[test]
fn programs_that_write_and_remove_files_meanwhile_do_not_make_it_fail() {
    let (containerd, rig) = setup();
    let (left, right) = changed(&rig);
    let dir = Path::new(&right.source);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                let busy = dir.join(format!("busy {}", round % 7));
                fs::create_dir(&busy).unwrap();
                fs::write(busy.join("file"), vec![1; 70_000 * (round % 3)]).unwrap();
                fs::write(dir.join("changed"), vec![2; round % 9_000]).unwrap();
                let _ = fs::remove_file(dir.join("same"));
                fs::remove_dir_all(&busy).unwrap();
                fs::write(dir.join("same"), "same").unwrap();
            }
        });
        let compare = || {
            for _ in 0..8 {
                let found = rig.client.diff(NAMESPACE, &request(&[&left], &[&right]));
                let found = found.map_err(|failure| format!("{failure:?}"))?;
                let found = entries(&blob(&containerd, &found).bytes);
                if !found.contains_key("moded") {
                    return Err(format!("{found:?}"));
                }
            }
            Ok(())
        };
        let compared = compare();
        ended.store(true, Ordering::Relaxed);
        compared.unwrap();
    });
    // Its snapshot may be removed right after.
    rig.client.remove("web").unwrap();
    assert!(fs::metadata(dir).map_or(true, |there| there.ino() != 2));
}
