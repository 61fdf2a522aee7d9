//! The metadata of a file system comes first, also without a trace: docs/lazy.md, "The hot pack".

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{TestStore, run, wait_until};
use crate::hot::{noted, pack_of};
use crate::lazy::end_fetchers;
use crate::registry_support::{Registry, clean, store, with_images};

/// A store with an image `tree` of two layers: many directories, and files between them.
fn with_a_tree() -> TestStore {
    let store = store();
    let root = store.path("root");
    for name in 0..60_u8 {
        let dir = root.join(format!("dir{name}/below"));
        fs::create_dir_all(&dir).unwrap();
        // What zstd does not make small.
        let noise: Vec<u8> = (0..200_000_u32)
            .map(|n| (n.wrapping_mul(2_654_435_761 + u32::from(name)) >> 11) as u8)
            .collect();
        fs::write(dir.join("file"), noise).unwrap();
        symlink("x".repeat(300), dir.join("long")).unwrap();
    }
    for name in 0..500 {
        fs::write(root.join(format!("dir0/a-rather-long-name-{name}")), "").unwrap();
    }
    let root = root.display().to_string();
    store.ok(&["import", "base", &root, "--size", "256M"]);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    fs::create_dir(dir.join("dir7/new")).unwrap();
    fs::write(dir.join("dir7/new/file"), "new\n").unwrap();
    store.ok(&["umount", "c"]);
    store.ok(&["commit", "c", "tree"]);
    store.ok(&["rm", "c"]);
    store
}

/// All names below a directory with what stat(2) says of them.
fn listed(dir: &Path) -> String {
    let script = "cd \"$1\" && ls -lR --time-style=full-iso . && getfattr -dRPhm - . 2>&1";
    let dir = dir.display().to_string();
    run("sh", &["-euc", script, "sh", &dir])
}

#[test]
fn once_its_metadata_is_here_a_tree_is_listed_and_written_without_a_registry_and_never_ends_read_only()
 {
    let (mut registry, from, mut to) = (Registry::new(), with_a_tree(), store());
    to.env.push(("VELLUM_STALL", "fail"));
    from.ok(&["push", "tree", &registry.image("tree:1")]);
    let expected = from.look("tree", listed);
    to.ok(&["pull", "--lazy", &registry.image("tree:1"), "tree"]);
    wait_until("the pack has come", || noted(&to) == 0);
    registry.stop();
    to.ok(&["create", "tree", "--name", "c"]);
    let began = Instant::now();
    let dir = to.mount("c");
    assert_eq!(listed(&dir), expected);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    // The kernel looks in bitmaps for room, which are here too.
    fs::write(dir.join("dir3/written"), vec![7; 1 << 20]).unwrap();
    fs::File::open(dir.join("dir3/written"))
        .unwrap()
        .sync_all()
        .unwrap();
    let absent = (0..60).filter(|name| {
        let read = fs::read(dir.join(format!("dir{name}/below/file")));
        read.is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
    });
    assert!(absent.count() > 40, "most contents are not here");
    fs::write(dir.join("dir4/written"), "still\n").unwrap();
    let device = run("findmnt", &["-no", "SOURCE", &dir.display().to_string()]);
    let device = device.trim_end().trim_start_matches("/dev/");
    let errors = fs::read_to_string(format!("/sys/fs/ext4/{device}/errors_count")).unwrap();
    assert_eq!(errors.trim_end(), "0");
    let options = run("findmnt", &["-no", "OPTIONS", &dir.display().to_string()]);
    assert!(options.starts_with("rw"), "{options}");
    to.ok(&["umount", "c"]);
    registry.start_again();
    end_fetchers(&to);
    to.ok(&["complete", "tree"]);
    assert_eq!(to.look("tree", listed), expected);
    end_fetchers(&to);
    to.ok(&["rm", "c"]);
    clean(&to);
}

#[test]
fn a_push_has_a_pack_of_metadata_that_is_the_same_each_time_unless_it_is_to_have_none() {
    let (registry, from) = (Registry::new(), with_images());
    let push = |image: &str, options: &[&str]| {
        let image = registry.image(image);
        let words = [&["push", "web", &image, "--format", "blocks"], options].concat();
        let report = from.json(&words);
        (
            report["digest"].as_str().unwrap().to_owned(),
            report["sent"].as_u64().unwrap(),
        )
    };
    let (first, _) = push("web:1", &[]);
    let pack = pack_of(&registry, &first).expect("a pack");
    assert_eq!(push("web:2", &[]), (first.clone(), 0));
    let (without, _) = push("web:3", &["--no-hot"]);
    assert_eq!(pack_of(&registry, &without), None);
    // What a trace touched lies before it, and nothing twice.
    let (traced, _) = push("web:4", &["--trace", "sh -c :"]);
    let traced = pack_of(&registry, &traced).expect("a pack");
    let frames = |pack: &str| {
        let bytes = fs::read(registry.blob_file(pack)).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let entries = (0..word(36) as usize).map(|entry| 128 + 16 * entry);
        entries
            .map(|at| (word(at), word(at + 4)))
            .collect::<Vec<_>>()
    };
    let (of_metadata, of_both) = (frames(&pack), frames(&traced));
    let all: std::collections::HashSet<_> = of_both.iter().collect();
    assert_eq!(all.len(), of_both.len());
    assert!(of_metadata.iter().all(|frame| all.contains(frame)));
    let said = from.output(&[
        "push",
        "web",
        &registry.image("web:5"),
        "--no-hot",
        "--trace",
        "sh",
    ]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
}

#[test]
fn a_disk_without_a_file_system_has_no_pack() {
    let (registry, from) = (Registry::new(), store());
    let disk = from.path("disk.raw");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    from.ok(&[
        "import",
        "disk",
        &disk.display().to_string(),
        "--format",
        "raw",
    ]);
    let image = registry.image("disk:1");
    let report = from.json(&["push", "disk", &image, "--format", "blocks"]);
    let digest = report["digest"].as_str().unwrap();
    assert_eq!(pack_of(&registry, digest), None);
}
