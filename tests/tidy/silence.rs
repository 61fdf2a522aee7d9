//! Bytes from outside become errors, our own arithmetic is asserted: nothing is defaulted away
//! (CONTRIBUTING.md). Where a default is the value that is meant, its file stands in this list, with the
//! number of such places: one more is looked at.

use std::collections::BTreeMap;
use std::path::Path;

use crate::tree;

/// Why a default is what is meant, and where: file and number of places.
type Meant = (&'static str, &'static [(&'static str, usize)]);

const MEANT: &[Meant] = &[
    (
        "what is absent in a document, a list or a request is empty",
        &[
            ("crates/vellum-engine/src/check/mod.rs", 1),
            ("crates/vellum-engine/src/import.rs", 1),
            ("crates/vellum-engine/src/mount.rs", 2),
            ("crates/vellum-engine/src/resize.rs", 1),
            ("crates/vellum-engine/src/run/executable.rs", 2),
            ("crates/vellum-engine/src/run/alone.rs", 1),
            ("crates/vellum-engine/src/run/runtime.rs", 1),
            ("crates/vellum-engine/src/run/seccomp.rs", 1),
            ("crates/vellum-engine/src/run/spec.rs", 1),
            ("crates/vellum-engine/src/run/user.rs", 2),
            ("crates/vellum-engine/src/run/volume.rs", 1),
            ("crates/vellum-export/src/nbd/exec.rs", 1),
            ("crates/vellum-export/src/nbd/protocol/mod.rs", 1),
            ("crates/vellum-fs/src/mountinfo.rs", 1),
            ("crates/vellum-image/src/acl.rs", 1),
            ("crates/vellum-image/src/config.rs", 5),
            ("crates/vellum-image/src/detect.rs", 2),
            ("crates/vellum-image/src/docker.rs", 1),
            ("crates/vellum-image/src/records.rs", 1),
            ("crates/vellum-image/src/transfer.rs", 2),
            ("crates/vellum-registry/src/auth.rs", 1),
            ("crates/vellum-registry/src/document.rs", 2),
            ("crates/vellum-snapshotter/src/diff_service.rs", 1),
            ("crates/vellum-snapshotter/src/filter.rs", 3),
            ("crates/vellum-snapshotter/src/operations.rs", 1),
            ("crates/vellum-snapshotter/src/retire.rs", 1),
            ("crates/vellum-snapshotter/src/service.rs", 3),
            ("crates/vellum-store/src/blob_places.rs", 1),
            ("crates/vellum-store/src/containers.rs", 1),
            ("crates/vellum-store/src/lazy_cache.rs", 1),
            ("crates/vellum-store/src/space_policy.rs", 1),
            ("src/cli/map.rs", 1),
        ],
    ),
    (
        "what /proc, /sys or a host's file does not say is unknown, and then nothing depends on it",
        &[
            ("crates/vellum-base/src/storage/evidence.rs", 2),
            ("crates/vellum-engine/src/doctor/mod.rs", 1),
            ("crates/vellum-export/src/fuse/ring/host.rs", 1),
            ("crates/vellum-export/src/block_node.rs", 2),
            ("crates/vellum-export/src/loop_device.rs", 1),
            ("crates/vellum-export/src/ublk/disk.rs", 1),
        ],
    ),
    (
        "words for people, who are shown that there are none",
        &[
            ("crates/vellum-engine/src/lost.rs", 1),
            ("crates/vellum-engine/src/run/scaffold.rs", 1),
            ("crates/vellum-engine/src/status.rs", 3),
            ("crates/vellum-export/src/device/attach.rs", 1),
            ("crates/vellum-image/src/docker_legacy.rs", 1),
            ("crates/vellum-store/src/quarantine.rs", 1),
            ("src/cli/history.rs", 2),
        ],
    ),
    (
        "counters and times that have nothing to show yet",
        &[
            ("crates/vellum-engine/src/device/mod.rs", 2),
            ("crates/vellum-engine/src/stats.rs", 1),
            ("crates/vellum-export/src/device/watch.rs", 1),
            ("crates/vellum-export/src/device/worker/commands.rs", 1),
            ("src/cli/stats.rs", 2),
        ],
    ),
];

/// Calls that turn a missing value into an empty one or a zero. The second list is for the crates whose
/// arithmetic decides what a client reads.
const SILENT: [&str; 1] = ["unwrap_or_default()"];
const SILENT_IN_THE_CORE: [&str; 2] = ["unwrap_or(0)", "unwrap_or(&[])"];
const CORE: [&str; 3] = [
    "crates/vellum-base",
    "crates/vellum-core",
    "crates/vellum-export",
];

/// Such calls in a file, before its tests.
fn silent_places(path: &Path) -> usize {
    let core = CORE.iter().any(|dir| path.starts_with(dir));
    let silent = SILENT.iter();
    let silent = silent.chain(
        SILENT_IN_THE_CORE
            .iter()
            .take(if core { usize::MAX } else { 0 }),
    );
    let calls: Vec<_> = silent.collect();
    let text = tree::read(path);
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    lines
        .map(|line| {
            calls
                .iter()
                .map(|call| line.matches(**call).count())
                .sum::<usize>()
        })
        .sum()
}

#[test]
fn a_default_in_place_of_a_value_is_meant_or_not_there() {
    let sources = ["src", "crates"]
        .into_iter()
        .flat_map(|dir| tree::files(dir, ".rs"));
    let sources = sources.filter(|path| {
        let text = path.to_str().unwrap();
        !text.contains("/tests/") && !text.ends_with("/tests.rs")
    });
    let found: BTreeMap<String, usize> = sources
        .map(|path| (path.to_str().unwrap().to_owned(), silent_places(&path)))
        .filter(|(_, places)| *places > 0)
        .collect();
    let meant: BTreeMap<String, usize> = MEANT
        .iter()
        .flat_map(|(_, files)| *files)
        .map(|(path, places)| ((*path).to_owned(), *places))
        .collect();
    let differ: Vec<_> = found
        .iter()
        .filter(|(path, places)| meant.get(*path) != Some(places))
        .chain(meant.iter().filter(|(path, _)| !found.contains_key(*path)))
        .collect();
    assert!(
        differ.is_empty(),
        "assert what cannot be missing, or say in tests/tidy/silence.rs why the default is meant: \
         {differ:#?}"
    );
}
