//! Two trees compared, and the layer that leads from one to the other.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::image_support::{assert_same, make_rich_tree, need_root, shell, snapshot};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};
use vellum_base::ErrorKind;
use vellum_image::{
    ApplyOptions, Change, ChangeKind, Foreign, LayerTarOptions, apply_layer, copy_tree, diff_trees,
    diff_trees_but, write_layer_tar,
};

/// Two copies of a tree, the upper one changed by `script`.
fn pair(script: &str) -> (TempDir, PathBuf, PathBuf) {
    need_root();
    let work = tempdir().unwrap();
    let (lower, upper) = (work.path().join("lower"), work.path().join("upper"));
    fs::create_dir(&lower).unwrap();
    fs::create_dir(&upper).unwrap();
    make_rich_tree(&lower);
    copy_tree(&lower, &upper, None).unwrap();
    shell(&upper, script);
    (work, lower, upper)
}

fn listed(lower: &Path, upper: &Path) -> String {
    diff_trees(lower, upper)
        .unwrap()
        .iter()
        .map(|change| format!("{change}\n"))
        .collect()
}

/// The changes that `script` makes, one a line.
fn changes_of(script: &str) -> String {
    let (_work, lower, upper) = pair(script);
    listed(&lower, &upper)
}

#[test]
fn equal_trees_have_no_changes() {
    assert_eq!(changes_of("true"), "");
}

#[test]
fn added_changed_and_deleted_paths_are_listed_as_docker_diff_lists_them() {
    let script = r#"
        echo new > etc/new; rm etc/hardlink; rm -r deep
        mkdir -p opt/a; echo x > opt/a/b
    "#;
    assert_eq!(
        changes_of(script),
        "D /deep\nC /etc\nD /etc/hardlink\nA /etc/new\nA /opt\nA /opt/a\nA /opt/a/b\n"
    );
}

#[test]
fn each_attribute_alone_is_a_change() {
    for (script, path) in [
        ("chmod u-s usr/bin/su", "usr/bin/su"),
        ("chown 77:0 etc/hostname", "etc/hostname"),
        ("chgrp 77 pipe", "pipe"),
        (
            "touch -d '2020-01-01 00:00:00.000000007' usr/bin/odd",
            "usr/bin/odd",
        ),
        ("setfattr -n user.plain -v other etc/empty", "etc/empty"),
        ("setfattr -x user.plain etc/empty", "etc/empty"),
        ("chown -h 1:1 usr/dangling", "usr/dangling"),
        ("touch -h -d 2020-01-01 usr/dangling", "usr/dangling"),
        ("chmod 0777 sticky", "sticky"),
        ("setfacl -k usr", "usr"),
        ("touch -d 2020-01-01 var/empty", "var/empty"),
    ] {
        let changes = changes_of(script);
        let own = format!("C /{path}\n");
        assert!(changes.contains(&own), "{script}: {changes}");
        for line in changes.lines() {
            // Other names of the same file, and the directories above, change with it.
            let above = Path::new("/").join(path).starts_with(&line[2..]);
            let twin = ["/etc/hardlink", "/usr/second", "/etc", "/usr"].contains(&&line[2..]);
            assert!(
                line.starts_with('C') && (above || twin),
                "{script}: {changes}"
            );
        }
    }
}

#[test]
fn content_changed_under_the_same_size_and_time_is_found() {
    let script = r#"
        touch -r etc/hostname ../stamp; echo HELLO > etc/hostname; touch -r ../stamp etc/hostname
        "#;
    let changes = changes_of(script);
    // It has two more names.
    assert_eq!(
        changes,
        "C /etc\nC /etc/hardlink\nC /etc/hostname\nC /usr\nC /usr/second\n"
    );
}

#[test]
fn a_changed_type_is_one_change_and_a_new_directory_lists_its_content() {
    let changes = changes_of("rm -r deep; echo x > deep; rm pipe; mkdir pipe; echo y > pipe/in");
    assert_eq!(changes, "C /deep\nC /pipe\nA /pipe/in\n");
}

/// Removes a tree that is deeper than std removes with the descriptors of a test.
struct Deep(TempDir);

impl Drop for Deep {
    fn drop(&mut self) {
        let _ = std::process::Command::new("rm")
            .arg("-rf")
            .arg(self.0.path())
            .status();
    }
}

#[test]
fn trees_as_deep_as_paths_reach_are_compared_with_few_descriptors() {
    const DEPTH: usize = 1100;
    let (work, lower, upper) = pair("true");
    let _work = Deep(work);
    dig(&upper, DEPTH);
    let kind = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (soft, hard) = nix::sys::resource::getrlimit(kind).unwrap();
    let limit = |files| nix::sys::resource::setrlimit(kind, files, hard).unwrap();
    let few = soft.min(600);
    limit(few);
    let new = listed(&lower, &upper);
    limit(soft);
    assert_eq!(new.lines().count(), DEPTH + 1);
    assert!(new.lines().all(|line| line.starts_with("A /d")));
    // Deep in both, and different at the bottom alone.
    dig(&lower, DEPTH);
    for tree in [&lower, &upper] {
        shell(tree, "find d -exec touch -hd @7 {} +");
    }
    shell(&upper, "find d -name f -exec chmod 600 {} +");
    limit(few);
    let changed = listed(&lower, &upper);
    limit(soft);
    assert_eq!(changed.lines().count(), DEPTH + 1);
    assert!(changed.lines().all(|line| line.starts_with("C /d")));
}

/// Makes directories in each other, and a file `f` at the bottom.
fn dig(root: &Path, depth: usize) {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::{Mode, mkdirat};
    let mut at: std::os::fd::OwnedFd = fs::File::open(root).unwrap().into();
    for _ in 0..depth {
        mkdirat(&at, "d", Mode::from_bits_truncate(0o755)).unwrap();
        at = openat(&at, "d", OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    }
    openat(
        &at,
        "f",
        OFlag::O_CREAT | OFlag::O_RDWR,
        Mode::from_bits_truncate(0o644),
    )
    .unwrap();
}

#[test]
fn what_others_made_in_the_upper_tree_is_no_change() {
    let (_work, lower, upper) = pair("mkdir proc dev run; : > top-secret");
    let time = |path: &str| {
        use std::os::unix::fs::MetadataExt;
        let meta = fs::metadata(upper.join(path)).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    shell(&lower, "mkdir -p sub/etc; touch -hd @5 sub/etc sub");
    shell(
        &upper,
        "mkdir -p sub/etc; : > sub/etc/hosts; touch -hd @5 sub",
    );
    let mut foreign = Foreign::default();
    for (path, directory) in [("/proc", true), ("/dev", true), ("/sub/etc/hosts", false)] {
        foreign.points.insert(path.into(), directory);
    }
    foreign.times.insert("/sub/etc".into(), time("sub/etc"));
    let listed = |foreign: &Foreign| -> Vec<String> {
        let changes = diff_trees_but(&lower, &upper, foreign).unwrap();
        changes.iter().map(Change::to_string).collect()
    };
    assert_eq!(listed(&foreign), ["A /run", "A /top-secret"]);
    // Once somebody used it, it is theirs.
    shell(&upper, "echo x > sub/etc/hosts; : > dev/null");
    assert_eq!(
        listed(&foreign),
        [
            "A /dev",
            "A /dev/null",
            "A /run",
            "C /sub",
            "C /sub/etc",
            "A /sub/etc/hosts",
            "A /top-secret"
        ]
    );
}

#[test]
fn the_root_is_listed_for_its_mode_and_not_for_its_time() {
    assert_eq!(changes_of("touch ."), "");
    assert_eq!(changes_of("chmod 711 ."), "C /\n");
}

#[test]
fn a_file_in_place_changes_with_the_directories_above_it() {
    let changes = changes_of("echo more >> usr/bin/odd");
    assert_eq!(changes, "C /usr\nC /usr/bin\nC /usr/bin/odd\n");
}

/// Applies the layer between the two trees to a copy of the lower and compares.
fn assert_layer_leads(lower: &Path, upper: &Path) -> Vec<u8> {
    let changes = diff_trees(lower, upper).unwrap();
    let mut layer = Vec::new();
    write_layer_tar(
        upper,
        &changes,
        &mut layer,
        LayerTarOptions::default(),
        None,
    )
    .unwrap();
    let mut again = Vec::new();
    write_layer_tar(
        upper,
        &changes,
        &mut again,
        LayerTarOptions::default(),
        None,
    )
    .unwrap();
    assert!(layer == again, "the same changes gave different bytes");
    let copy = tempdir().unwrap();
    copy_tree(lower, copy.path(), None).unwrap();
    apply_layer(&layer[..], copy.path(), &ApplyOptions::layer()).unwrap();
    let (mut expected, mut actual) = (snapshot(upper), snapshot(copy.path()));
    // The time of the root itself is not part of a layer.
    for tree in [&mut expected, &mut actual] {
        let root = tree.get_mut(Path::new("")).unwrap();
        *root = root.split(" time ").next().unwrap().to_owned();
    }
    assert_same(&expected, &actual);
    layer
}

#[test]
fn the_layer_of_many_changes_leads_to_the_same_tree() {
    let (_work, lower, upper) = pair(
        r#"
        rm -r deep; echo 'now a file' > deep
        rm usr/absolute; mkdir usr/absolute; echo in > usr/absolute/in
        rm usr/relative; ln -s elsewhere usr/relative
        rm -r sticky; mkdir sticky; echo x > sticky/x
        rm pipe; mknod pipe c 7 7
        chmod 700 etc; setfattr -x user.on.dir etc; setfacl -k usr
        echo tail >> sparse
        ln etc/empty usr/new-name
        /sbin/setcap -r usr/bin/ping
        "#,
    );
    let layer = assert_layer_leads(&lower, &upper);
    assert!(layer.len() < 1 << 20, "holes were written: {}", layer.len());
}

#[test]
fn a_layer_keeps_names_together_of_which_one_alone_is_new() {
    let (_work, lower, upper) = pair("ln usr/bin/odd usr/bin/even; touch -d 2001-02-03 usr/bin");
    let changes = diff_trees(&lower, &upper).unwrap();
    assert!(!changes.iter().any(|change| change.path.ends_with("odd")));
    assert_layer_leads(&lower, &upper);
}

#[test]
fn names_that_mean_deletions_cannot_be_in_a_layer() {
    let (_work, lower, upper) = pair("echo x > etc/.wh.x");
    let changes = diff_trees(&lower, &upper).unwrap();
    let error = write_layer_tar(
        &upper,
        &changes,
        std::io::sink(),
        LayerTarOptions::default(),
        None,
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains(".wh.x"), "{error}");
}

#[test]
fn a_path_that_vanished_is_named() {
    let (_work, _lower, upper) = pair("true");
    let change = Change {
        kind: ChangeKind::Added,
        path: "/gone/file".into(),
    };
    let error = write_layer_tar(
        &upper,
        &[change],
        std::io::sink(),
        LayerTarOptions::default(),
        None,
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("gone"), "{error}");
}

#[test]
fn holes_are_zeros_for_those_who_cannot_read_them_unless_there_are_too_many() {
    let (_work, lower, upper) =
        pair("echo data > few; truncate -s 3M few; echo data > many; truncate -s 300M many");
    let changes = diff_trees(&lower, &upper).unwrap();
    let length = |dense| {
        let mut layer = Vec::new();
        let options = LayerTarOptions {
            dense,
            ..LayerTarOptions::default()
        };
        write_layer_tar(&upper, &changes, &mut layer, options, None).unwrap();
        layer.len()
    };
    assert!(length(false) < 1 << 20);
    let dense = length(true);
    assert!((3 << 20..4 << 20).contains(&dense), "{dense}");
}

#[test]
fn of_a_tree_that_changes_what_is_gone_again_is_a_deletion_if_it_was_there_before() {
    let (_work, lower, upper) = pair(
        "mkdir new; echo x > new/file; echo more >> usr/bin/odd; mkdir -p etc/below; echo x > etc/below/x",
    );
    let changes = diff_trees(&lower, &upper).unwrap();
    shell(&upper, "rm -r new; rm usr/bin/odd; rm -r etc");
    let mut layer = Vec::new();
    let options = LayerTarOptions {
        changing: true,
        newest: Some(1_000_000_000),
        ..LayerTarOptions::default()
    };
    write_layer_tar(&upper, &changes, &mut layer, options, None).unwrap();
    let mut archive = tar::Archive::new(&layer[..]);
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            assert!(entry.header().mtime().unwrap() <= 1_000_000_000);
            entry.path().unwrap().display().to_string()
        })
        .collect();
    assert_eq!(names, [".wh.etc", "usr/", "usr/bin/", "usr/bin/.wh.odd"]);
}

#[test]
fn sockets_are_listed_but_not_written() {
    let (_work, lower, upper) = pair("true");
    let _socket = std::os::unix::net::UnixListener::bind(upper.join("etc/sock")).unwrap();
    let changes = diff_trees(&lower, &upper).unwrap();
    assert!(
        changes
            .iter()
            .any(|change| change.to_string() == "A /etc/sock")
    );
    let mut layer = Vec::new();
    write_layer_tar(
        &upper,
        &changes,
        &mut layer,
        LayerTarOptions::default(),
        None,
    )
    .unwrap();
    assert!(!String::from_utf8_lossy(&layer).contains("sock"));
}

#[test]
fn trees_that_cannot_be_opened_are_named() {
    let error = diff_trees(Path::new("/nonexistent-tree"), Path::new("/tmp")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("nonexistent-tree"), "{error}");
}

// Random trees.

/// One step in the making of a tree. Names come from a small set, so that steps meet.
#[derive(Debug, Clone)]
pub(super) enum Step {
    File(u8, u16, u8),
    Directory(u8),
    Symlink(u8, u8),
    HardLink(u8, u8),
    Device(u8, u8),
    Fifo(u8),
    Remove(u8),
    Attributes(u8, u16, u32),
    Time(u8, i32, u32),
    Xattr(u8, Vec<u8>),
    Hole(u8, u8),
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let name = any::<u8>();
    prop_oneof![
        4 => (name, 0u16..5000, any::<u8>()).prop_map(|(n, l, b)| Step::File(n, l, b)),
        4 => name.prop_map(Step::Directory),
        1 => (name, any::<u8>()).prop_map(|(n, t)| Step::Symlink(n, t)),
        2 => (name, any::<u8>()).prop_map(|(n, t)| Step::HardLink(n, t)),
        1 => (name, any::<u8>()).prop_map(|(n, t)| Step::Device(n, t)),
        1 => name.prop_map(Step::Fifo),
        2 => name.prop_map(Step::Remove),
        2 => (name, 0u16..0o10000, any::<u32>()).prop_map(|(n, m, o)| Step::Attributes(n, m, o)),
        2 => (name, any::<i32>(), 0u32..1_000_000_000).prop_map(|(n, s, f)| Step::Time(n, s, f)),
        1 => (name, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(n, v)| Step::Xattr(n, v)),
        1 => (name, any::<u8>()).prop_map(|(n, k)| Step::Hole(n, k)),
    ]
}

/// Spreads a byte over paths up to three levels deep.
pub(super) fn place(root: &Path, name: u8) -> PathBuf {
    let letters = ["a", "b", "c.d", "é"];
    let mut path = root.to_owned();
    for level in 0..=(name >> 6).min(2) {
        path.push(letters[usize::from(name >> (level * 2)) & 3]);
    }
    path
}

/// Does what can be done; steps that cannot (a parent that is missing) do nothing.
pub(super) fn perform(root: &Path, step: &Step) {
    let real = |path: &Path| fs::symlink_metadata(path).ok();
    // A link on the way could lead out of the tree.
    let safe = |path: &Path| {
        path.ancestors()
            .skip(1)
            .take_while(|above| *above != root)
            .all(|above| real(above).is_some_and(|meta| meta.is_dir()))
    };
    match step {
        Step::File(name, length, byte) => {
            let path = place(root, *name);
            if safe(&path) && real(&path).is_none_or(|meta| meta.is_file()) {
                let _ = fs::write(path, vec![*byte; usize::from(*length)]);
            }
        }
        Step::Directory(name) => {
            let path = place(root, *name);
            if safe(&path) {
                let _ = fs::create_dir(path);
            }
        }
        Step::Symlink(name, target) => {
            let path = place(root, *name);
            if safe(&path) {
                let _ = symlink(format!("../{target}"), path);
            }
        }
        Step::HardLink(name, target) => {
            let (path, target) = (place(root, *name), place(root, *target));
            if safe(&path) && safe(&target) {
                let _ = fs::hard_link(target, path);
            }
        }
        Step::Device(name, minor) => {
            let path = place(root, *name);
            if safe(&path) {
                let device = makedev(1, u64::from(*minor));
                let _ = mknod(
                    &path,
                    SFlag::S_IFCHR,
                    Mode::from_bits_truncate(0o600),
                    device,
                );
            }
        }
        Step::Fifo(name) => {
            let path = place(root, *name);
            if safe(&path) {
                let _ = nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o640));
            }
        }
        Step::Remove(name) => {
            let path = place(root, *name);
            if safe(&path) {
                match real(&path) {
                    Some(meta) if meta.is_dir() => fs::remove_dir_all(path).unwrap(),
                    Some(_) => fs::remove_file(path).unwrap(),
                    None => {}
                }
            }
        }
        Step::Attributes(name, mode, owner) => {
            let path = place(root, *name);
            if safe(&path) && real(&path).is_some() {
                let owner = (*owner).min(u32::MAX - 1);
                std::os::unix::fs::lchown(&path, Some(owner), Some(owner / 2)).unwrap();
                if !real(&path).unwrap().is_symlink() {
                    use std::os::unix::fs::PermissionsExt;
                    let mode = fs::Permissions::from_mode(u32::from(*mode));
                    fs::set_permissions(&path, mode).unwrap();
                }
            }
        }
        Step::Time(name, seconds, nanoseconds) => {
            let path = place(root, *name);
            if safe(&path) && real(&path).is_some() {
                let time = TimeSpec::new(i64::from(*seconds), i64::from(*nanoseconds));
                let flag = UtimensatFlags::NoFollowSymlink;
                utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, flag).unwrap();
            }
        }
        Step::Xattr(name, value) => {
            let path = place(root, *name);
            let plain = real(&path).is_some_and(|meta| meta.is_file() || meta.is_dir());
            if safe(&path) && plain {
                xattr::set(&path, "user.random", value).unwrap();
            }
        }
        Step::Hole(name, kibibytes) => {
            let path = place(root, *name);
            if safe(&path) && real(&path).is_some_and(|meta| meta.is_file()) {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                let end = file.metadata().unwrap().size();
                file.set_len(end + u64::from(*kibibytes) * 1024).unwrap();
                use std::os::unix::fs::FileExt;
                file.write_all_at(b"end", end + u64::from(*kibibytes) * 1024)
                    .unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn the_layer_between_two_random_trees_leads_from_one_to_the_other(
        first in prop::collection::vec(step(), 0..60),
        second in prop::collection::vec(step(), 0..60),
    ) {
        need_root();
        let work = tempdir().unwrap();
        let (lower, upper) = (work.path().join("lower"), work.path().join("upper"));
        fs::create_dir(&lower).unwrap();
        fs::create_dir(&upper).unwrap();
        for step in &first {
            perform(&lower, step);
        }
        copy_tree(&lower, &upper, None).unwrap();
        assert_same(&snapshot(&lower), &snapshot(&upper));
        prop_assert_eq!(diff_trees(&lower, &upper).unwrap(), vec![]);
        for step in &second {
            perform(&upper, step);
        }
        assert_layer_leads(&lower, &upper);
        // And all of it as one layer on nothing.
        let nothing = work.path().join("nothing");
        fs::create_dir(&nothing).unwrap();
        assert_layer_leads(&nothing, &upper);
    }
}
