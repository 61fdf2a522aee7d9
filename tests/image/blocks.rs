//! Two states of an ext4 compared by the blocks that differ: the list is that of both trees mounted and
//! walked.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::diff::{Step, perform, place, step};
use crate::image_support::{need_root, run, shell};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};
use vellum_base::{Error, ErrorKind, Result};
use vellum_engine::diff::diff_devices;
use vellum_fs::ext4::{self, MakeOptions};
use vellum_fs::unmounted::Source;
use vellum_image::{Comparison, Difference, MountedTrees, compare_trees};

const SIZE: u64 = 64 << 20;

/// A mounted image file, until this is dropped.
struct Mount(TempDir);

impl Mount {
    fn new(image: &Path, options: &str) -> Mount {
        need_root();
        let dir = tempdir().unwrap();
        let options = format!("loop,{options}");
        run(
            "mount",
            &[
                "-o".as_ref(),
                options.as_ref(),
                image.as_os_str(),
                dir.path().as_os_str(),
            ],
        );
        Mount(dir)
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Whole in its file, even where another mount namespace still has the mount.
        let _ = std::process::Command::new("mount")
            .args(["-o", "remount,ro"])
            .arg(self.dir())
            .output();
        let done = std::process::Command::new("umount")
            .arg(self.dir())
            .status();
        if !done.is_ok_and(|status| status.success()) {
            let _ = std::process::Command::new("umount")
                .arg("-l")
                .arg(self.dir())
                .status();
        }
    }
}

/// The two states as files.
struct Pair {
    work: TempDir,
}

impl Pair {
    /// An image that `make` fills, and another state of it.
    fn new(older: impl FnOnce(&Path), newer: impl FnOnce(&Path)) -> Pair {
        Pair::of(&template, older, newer)
    }

    fn of(make: &dyn Fn(&Path), older: impl FnOnce(&Path), newer: impl FnOnce(&Path)) -> Pair {
        let pair = Pair {
            work: tempdir().unwrap(),
        };
        make(&pair.older());
        older(Mount::new(&pair.older(), "rw").dir());
        pair.copy();
        newer(Mount::new(&pair.newer(), "discard").dir());
        pair
    }

    /// Two moments of a file system that is mounted all the time: both have a journal to be replayed.
    fn of_one_life(older: impl FnOnce(&Path), newer: impl FnOnce(&Path)) -> Pair {
        let pair = Pair {
            work: tempdir().unwrap(),
        };
        let live = pair.work.path().join("live");
        template(&live);
        let mount = Mount::new(&live, "discard");
        for (change, copy) in [
            (Box::new(older) as Box<dyn FnOnce(&Path)>, pair.older()),
            (Box::new(newer), pair.newer()),
        ] {
            change(mount.dir());
            run("sync", &["-f".as_ref(), mount.dir().as_os_str()]);
            run(
                "cp",
                &[
                    "--sparse=always".as_ref(),
                    live.as_os_str(),
                    copy.as_os_str(),
                ],
            );
        }
        pair
    }

    /// The newer state is the older one again.
    fn copy(&self) {
        let (older, newer) = (self.older(), self.newer());
        run(
            "cp",
            &[
                "--sparse=always".as_ref(),
                older.as_os_str(),
                newer.as_os_str(),
            ],
        );
    }

    fn older(&self) -> PathBuf {
        self.work.path().join("older")
    }

    fn newer(&self) -> PathBuf {
        self.work.path().join("newer")
    }

    /// The changes by blocks; `more` are blocks that a layer has and that are the same all the same.
    fn by_blocks(&self, more: &[Range<u64>]) -> Result<Vec<Difference>> {
        let (older, newer) = (Image::open(&self.older()), Image::open(&self.newer()));
        let differing = differing(&older, &newer, more);
        diff_devices(&older, &newer, &differing, &with_contents())
    }

    /// The changes, found in both ways.
    fn changes(&self, more: &[Range<u64>]) -> Vec<Difference> {
        let by_blocks = self.by_blocks(more).unwrap();
        for state in [self.older(), self.newer()] {
            // A mount that only reads has no loop device to replay a journal on.
            if needs_recovery(&state) {
                drop(Mount::new(&state, "rw"));
            }
        }
        let (older, newer) = (
            Mount::new(&self.older(), "ro"),
            Mount::new(&self.newer(), "ro"),
        );
        let trees = MountedTrees::new(older.dir(), newer.dir());
        let walked = compare_trees(&trees, &with_contents()).unwrap();
        assert_eq!(lines(&by_blocks), lines(&walked));
        for found in &walked {
            assert_content_leads(older.dir(), newer.dir(), found);
        }
        walked
    }
}

/// True for a file system whose journal has something to replay.
fn needs_recovery(image: &Path) -> bool {
    run("dumpe2fs", &["-h".as_ref(), image.as_os_str()]).contains("needs_recovery")
}

fn with_contents() -> Comparison {
    Comparison {
        contents: true,
        ..Comparison::default()
    }
}

/// As people see them.
fn lines(found: &[Difference]) -> String {
    let line = |found: &Difference| match &found.content {
        None => format!("{}\n", found.change),
        Some(content) => format!(
            "{} {}-{} {:?}\n",
            found.change, content.size_before, content.size, content.ranges
        ),
    };
    found.iter().map(line).collect()
}

/// The paths alone.
fn paths(found: &[Difference]) -> String {
    found
        .iter()
        .map(|found| format!("{}\n", found.change))
        .collect()
}

/// What is said of a file's content makes the new one out of the old one.
fn assert_content_leads(older: &Path, newer: &Path, found: &Difference) {
    let Some(content) = &found.content else {
        return;
    };
    let path = found.change.path.strip_prefix("/").unwrap();
    let new = fs::read(newer.join(path)).unwrap();
    assert_eq!(new.len() as u64, content.size);
    let before = fs::symlink_metadata(older.join(path)).ok();
    let before = before.filter(fs::Metadata::is_file);
    assert_eq!(
        before.as_ref().map_or(0, fs::Metadata::len),
        content.size_before
    );
    let mut file = before.map_or(Vec::new(), |_| fs::read(older.join(path)).unwrap());
    file.resize(new.len(), 0);
    let mut end = 0;
    for &(offset, len) in &content.ranges {
        assert!(offset.is_multiple_of(4096) && len > 0 && (offset == 0 || offset > end));
        end = offset + len;
        assert!(end.is_multiple_of(4096) || end == content.size);
        let range = offset as usize..end as usize;
        file[range.clone()].copy_from_slice(&new[range]);
    }
    assert!(file == new, "{path:?}");
}

/// An image file, some of whose bytes may be others than on disk.
struct Image {
    file: File,
    size: u64,
    patches: Vec<(u64, u8)>,
}

impl Image {
    fn open(path: &Path) -> Image {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Image {
            file,
            size,
            patches: Vec::new(),
        }
    }
}

impl Source for Image {
    fn bytes(&self) -> u64 {
        self.size
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|error: io::Error| Error::io("reading an image", error))?;
        for (at, value) in &self.patches {
            if let Some(byte) = at
                .checked_sub(offset)
                .and_then(|at| buf.get_mut(at as usize))
            {
                *byte ^= value;
            }
        }
        Ok(())
    }
}

fn differing(older: &Image, newer: &Image, more: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let (mut left, mut right) = (vec![0; 4096], vec![0; 4096]);
    for at in (0..newer.size).step_by(4096) {
        left.fill(0);
        if at < older.size {
            older.fill(&mut left, at).unwrap();
        }
        newer.fill(&mut right, at).unwrap();
        if left != right || more.iter().any(|range| range.contains(&at)) {
            found.push(at..at + 4096);
        }
    }
    found
}

/// As images are made.
fn template(path: &Path) {
    let id = uuid::Uuid::from_u128(7);
    ext4::make(path, SIZE, &MakeOptions::new(id)).unwrap();
}

/// With other features, as disk images have them.
fn made_by_mke2fs(options: &'static [&'static str]) -> impl Fn(&Path) {
    move |path| {
        let mut arguments: Vec<&str> = vec!["-q", "-F"];
        arguments.extend(options);
        let size = format!("{}k", SIZE / 1024);
        arguments.extend([path.to_str().unwrap(), &size]);
        run("mke2fs", &arguments);
    }
}

/// A directory with more names than a block holds, so that it has a hash tree.
fn fill_directory(dir: &Path, names: usize) {
    let _ = fs::create_dir(dir);
    for number in 0..names {
        let name = format!("{number:04}-{}", "n".repeat(number % 90));
        fs::write(dir.join(name), number.to_le_bytes()).unwrap();
    }
}

/// Puts a file's modification time back.
fn keeping_time(path: &Path, change: impl FnOnce()) {
    let before = fs::metadata(path).unwrap();
    change();
    let time = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    utimensat(
        AT_FDCWD,
        path,
        &time(before.atime(), before.atime_nsec()),
        &time(before.mtime(), before.mtime_nsec()),
        UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

#[test]
fn a_file_in_place_is_found_in_a_directory_that_did_not_change() {
    let pair = Pair::new(
        |dir| {
            shell(
                dir,
                "mkdir -p a/b/c; for i in 1 2 3; do seq 9999 > a/b/c/$i; done; ln a/b/c/1 a/one",
            );
            fill_directory(&dir.join("many"), 900);
        },
        |dir| {
            let file = dir.join("a/b/c/1");
            keeping_time(&file, || {
                let file = File::options().write(true).open(&file).unwrap();
                file.write_all_at(b"in place", 8193).unwrap();
            });
            shell(
                dir,
                "chmod 600 many/0700-*; cat a/b/c/2 > /dev/null; ls many > /dev/null",
            );
        },
    );
    let found = pair.changes(&[]);
    let name = format!("/many/0700-{}", "n".repeat(700 % 90));
    assert_eq!(
        paths(&found),
        format!("C /a\nC /a/b\nC /a/b/c\nC /a/b/c/1\nC /a/one\nC /many\nC {name}\n")
    );
    let content = found
        .iter()
        .find_map(|found| found.content.clone())
        .unwrap();
    assert_eq!(content.ranges, [(8192, 4096)]);
}

#[test]
fn names_of_one_file_all_over_the_tree_are_all_found() {
    let pair = Pair::new(
        |dir| {
            for number in 0..300 {
                let dir = dir.join(format!("d{number}"));
                fs::create_dir(&dir).unwrap();
                fill_directory(&dir, 3);
            }
            shell(
                dir,
                "echo x > first; for i in 5 150 299; do ln first d$i/linked; done",
            );
        },
        |dir| drop(shell(dir, "echo y >> d5/linked")),
    );
    assert_eq!(
        paths(&pair.changes(&[])),
        "C /d150\nC /d150/linked\nC /d299\nC /d299/linked\nC /d5\nC /d5/linked\nC /first\n"
    );
}

#[test]
fn access_times_alone_are_no_change_and_nothing_is_none() {
    let fill = |dir: &Path| fill_directory(&dir.join("d"), 50);
    let pair = Pair::new(fill, |dir| {
        shell(dir, "find . -type f -exec touch -a -d 2030-01-01 {} +");
    });
    // The change times moved, so each file is looked at, and found to be the same.
    assert_eq!(paths(&pair.changes(&[])), "");
    let pair = Pair::new(fill, |_| {});
    assert_eq!(paths(&pair.changes(&[])), "");
}

#[test]
fn all_that_a_tree_can_go_through_is_told_as_the_walk_tells_it() {
    let older = |dir: &Path| {
        shell(
            dir,
            r#"
            mkdir -p gone/deep/er moved/in keep; seq 100 > gone/deep/er/f; seq 5000 > moved/in/f
            echo a > type; mkdir kind; echo b > kind/in; ln -s short link
            ln -s "$(printf 'long%.0s' $(seq 300))" longlink
            mknod node c 1 3; mknod big b 300 70000; mkfifo pipe
            truncate -s 1G sparse; echo data | dd of=sparse bs=1 seek=500M conv=notrunc status=none
            fallocate -l 300k reserved; echo x > keep/x; echo same > keep/same
            setfattr -n user.small -v 1 keep/x; setfattr -n user.dir -v 1 keep
            setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" keep/same
            setfattr -n user.huge -v "$(head -c 20000 /dev/zero | tr '\0' v)" type
            setfacl -m u:77:rw keep/x
            "#,
        );
        fill_directory(&dir.join("tree"), 1500);
    };
    let newer = |dir: &Path| {
        shell(
            dir,
            r#"
            rm -r gone; mv moved elsewhere; rm type; mkdir type; echo c > type/in
            rm -r kind; echo file > kind; ln -sfn other link; rm longlink
            ln -s "$(printf 'LONG%.0s' $(seq 300))" longlink
            rm node; mknod node c 1 5; rm big; mknod big b 300 70001; rm pipe; mknod pipe p
            echo more | dd of=sparse bs=1 seek=700M conv=notrunc status=none
            echo y | dd of=reserved bs=1 seek=100000 conv=notrunc status=none
            cp -p keep/x keep/y; mv keep/y keep/x; setfattr -n user.dir -v 2 keep
            setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' w)" keep/same
            setfattr -n user.new -v "$(head -c 30000 /dev/zero | tr '\0' v)" keep/same
            rm tree/00*; echo new > tree/another; mkdir tree/dir; chmod 700 .
            fallocate -p -o 16k -l 16k reserved; touch -d 1900-01-01 keep; touch -d 2400-01-01 kind
            "#,
        );
    };
    let found = Pair::new(older, newer).changes(&[]);
    assert!(paths(&found).contains("C /keep/same\n"));
    assert!(paths(&found).starts_with("C /\nC /big\nA /elsewhere\nA /elsewhere/in\n"));
    for options in [
        &["-t", "ext4"][..],
        &["-t", "ext4", "-b", "1024", "-O", "^64bit"],
        &[
            "-t",
            "ext4",
            "-b",
            "2048",
            "-I",
            "512",
            "-O",
            "^metadata_csum,^flex_bg,meta_bg,^resize_inode",
        ],
        &["-t", "ext4", "-O", "metadata_csum_seed,sparse_super2"],
        &["-t", "ext4", "-O", "^has_journal,uninit_bg,^metadata_csum"],
    ] {
        let make = made_by_mke2fs(options);
        // Without ea_inode, values have less room.
        let older = |dir: &Path| {
            let _ = fs::remove_dir(dir.join("lost+found"));
            shell(
                dir,
                r#"
                mkdir -p gone/deep moved/in keep; seq 100 > gone/deep/f; seq 50000 > moved/in/f
                ln -s "$(printf 'long%.0s' $(seq 100))" longlink; mknod big b 300 70000
                echo x > keep/x; setfattr -n user.small -v 1 keep/x; setfacl -m u:77:rw keep/x
                truncate -s 100M sparse; echo data | dd of=sparse bs=1 seek=50M conv=notrunc status=none
                "#,
            );
            fill_directory(&dir.join("tree"), 1500);
        };
        let newer = |dir: &Path| {
            shell(
                dir,
                r#"
                rm -r gone; mv moved elsewhere; echo y >> elsewhere/in/f; rm big; ln -sfn s longlink
                setfattr -n user.small -v 2 keep/x; rm tree/00*; echo z > tree/z; chmod 600 tree/0200*
                echo more | dd of=sparse bs=1 seek=70M conv=notrunc status=none
                "#,
            );
        };
        let found = Pair::of(&make, older, newer).changes(&[]);
        assert!(paths(&found).contains("C /keep/x\n"), "{options:?}");
    }
}

#[test]
fn inodes_of_the_old_size_have_no_fractions_of_seconds() {
    let make = made_by_mke2fs(&["-t", "ext4", "-I", "128"]);
    let pair = Pair::of(
        &make,
        |dir| {
            drop(shell(
                dir,
                "mkdir d; echo x > d/x; echo y > d/y; touch -d 1950-01-01 d/x",
            ))
        },
        |dir| {
            drop(shell(
                dir,
                "touch -d 1951-01-01 d/x; sleep 1; echo z >> d/y",
            ))
        },
    );
    assert_eq!(paths(&pair.changes(&[])), "C /d\nC /d/x\nC /d/y\n");
}

#[test]
fn a_directory_that_a_tool_changed_behind_the_kernel_is_found_by_its_blocks() {
    let pair = Pair::new(
        |dir| {
            shell(
                dir,
                "mkdir -p a/b c; echo x > a/b/x; echo y > a/b/y; echo z > c/z",
            );
            fill_directory(&dir.join("tree"), 1500);
        },
        |_| {},
    );
    let newer = pair.newer();
    for request in [
        "unlink /a/b/x",
        "ln /c/z /a/b/w",
        "unlink /tree/0007-nnnnnnn",
    ] {
        run(
            "debugfs",
            &[
                "-w".as_ref(),
                "-R".as_ref(),
                request.as_ref(),
                newer.as_os_str(),
            ],
        );
    }
    assert_eq!(
        paths(&pair.changes(&[])),
        "C /a\nC /a/b\nA /a/b/w\nD /a/b/x\nC /tree\nD /tree/0007-nnnnnnn\n"
    );
}

#[test]
fn a_file_system_that_grew_is_compared_all_the_same() {
    let pair = Pair::new(|dir| fill_directory(&dir.join("d"), 100), |_| {});
    let newer = pair.newer();
    File::options()
        .write(true)
        .open(&newer)
        .unwrap()
        .set_len(SIZE * 5)
        .unwrap();
    run("resize2fs", &["-f".as_ref(), newer.as_os_str()]);
    {
        let mount = Mount::new(&newer, "discard");
        shell(mount.dir(), "head -c 150M /dev/zero | tr '\\0' x > d/big");
        // So many that some lie in groups that are new.
        fill_directory(&mount.dir().join("d/new"), 6000);
    }
    let found = pair.changes(&[]);
    assert_eq!(found.len(), 6000 + 3);
}

#[test]
fn what_cannot_be_read_without_mounting_it_is_refused() {
    let refused = |pair: &Pair, part: &str| {
        let error = pair.by_blocks(&[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    for (options, part) in [
        (&["-t", "ext3"][..], "extents"),
        (&["-t", "ext4", "-O", "inline_data"], "features"),
        (&["-t", "ext4", "-O", "bigalloc"], "features"),
    ] {
        let make = made_by_mke2fs(options);
        let fill = |dir: &Path| drop(shell(dir, "seq 99999 > file"));
        refused(
            &Pair::of(&make, fill, |dir| drop(shell(dir, "echo x > file"))),
            part,
        );
    }
    let pair = Pair::new(|dir| fill_directory(&dir.join("d"), 3), |_| {});
    run(
        "tune2fs",
        &[
            "-E".as_ref(),
            "force_fsck".as_ref(),
            pair.newer().as_os_str(),
        ],
    );
    refused(&pair, "in order");
    pair.copy();
    ext4::make(
        &pair.newer(),
        SIZE,
        &MakeOptions::new(uuid::Uuid::from_u128(8)),
    )
    .unwrap();
    refused(&pair, "another file system");
    // Cutting a file came to no end: a mount goes on with it, and gives it another time.
    pair.copy();
    let requests = ["feature needs_recovery", "ssv last_orphan 12"];
    for request in requests {
        run(
            "debugfs",
            &[
                "-w".as_ref(),
                "-R".as_ref(),
                request.as_ref(),
                pair.newer().as_os_str(),
            ],
        );
    }
    refused(&pair, "to be cut");
}

#[test]
fn journals_are_replayed_in_memory_and_files_that_have_no_name_any_more_are_gone() {
    let mut open = None;
    let pair = Pair::of_one_life(
        |dir| {
            fill_directory(&dir.join("tree"), 1500);
            shell(
                dir,
                "mkdir -p a/b gone; echo x > a/b/x; seq 9999 > gone/f; seq 99999 > a/deleted",
            );
        },
        |dir| {
            open = Some(File::open(dir.join("a/deleted")).unwrap());
            // Directories that are gone have their blocks revoked, and others get them.
            shell(
                dir,
                "rm -r tree gone a/deleted; seq 20000 > new; echo y >> a/b/x",
            );
            fill_directory(&dir.join("other"), 1500);
        },
    );
    assert!(needs_recovery(&pair.older()) && needs_recovery(&pair.newer()));
    let found = paths(&pair.changes(&[]));
    assert!(found.starts_with("C /a\nC /a/b\nC /a/b/x\nD /a/deleted\nD /gone\nA /new\n"));
    assert!(found.ends_with("D /tree\n") && found.lines().count() == 1500 + 8);
    drop(open);
    // What was compared was also mounted, which replayed it for good.
    assert_eq!(paths(&pair.by_blocks(&[]).unwrap()), found);
}

/// A step more than [`Step`], for what block by block matters.
#[derive(Debug, Clone)]
enum More {
    Plain(Step),
    Rename(u8, u8, bool),
    Many(u8, u16),
    InPlace(u8, u8, bool),
    Replace(u8),
    LongLink(u8, u8),
    BigXattr(u8, u16),
    Punch(u8, u8),
    Cut(u8, u16),
}

fn more() -> impl Strategy<Value = More> {
    let name = any::<u8>();
    prop_oneof![
        12 => step().prop_map(More::Plain),
        3 => (name, name, any::<bool>()).prop_map(|(n, t, x)| More::Rename(n, t, x)),
        1 => (name, 0u16..700).prop_map(|(n, count)| More::Many(n, count)),
        2 => (name, any::<u8>(), any::<bool>()).prop_map(|(n, at, t)| More::InPlace(n, at, t)),
        1 => name.prop_map(More::Replace),
        1 => (name, 1u8..60).prop_map(|(n, len)| More::LongLink(n, len)),
        1 => (name, 0u16..20_000).prop_map(|(n, len)| More::BigXattr(n, len)),
        1 => (name, any::<u8>()).prop_map(|(n, at)| More::Punch(n, at)),
        1 => (name, 0u16..20_000).prop_map(|(n, len)| More::Cut(n, len)),
    ]
}

fn do_more(root: &Path, step: &More) {
    let is_file = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    // Links are not followed: one could lead out of the tree.
    let safe = |path: &Path| {
        let above = path.ancestors().skip(1).take_while(|above| *above != root);
        let mut above = above.map(fs::symlink_metadata);
        above.all(|meta| meta.is_ok_and(|meta| meta.is_dir()))
    };
    let at = |name: u8| Some(place(root, name)).filter(|path| safe(path));
    let file = |name: u8| at(name).filter(|path| is_file(path));
    let open = |path: &Path| File::options().write(true).open(path).unwrap();
    match step {
        More::Plain(step) => perform(root, step),
        More::Rename(from, to, exchange) => {
            if let (Some(from), Some(to)) = (at(*from), at(*to)) {
                let flags = match exchange {
                    true => RenameFlags::RENAME_EXCHANGE,
                    false => RenameFlags::empty(),
                };
                let _ = renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags);
            }
        }
        More::Many(name, count) => {
            if let Some(path) = at(*name)
                && fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir())
            {
                fill_directory(&path, usize::from(*count));
            }
        }
        More::InPlace(name, offset, keep) => {
            if let Some(path) = file(*name) {
                let write = || {
                    open(&path)
                        .write_all_at(b"in place", u64::from(*offset) * 99)
                        .unwrap()
                };
                match keep {
                    true => keeping_time(&path, write),
                    false => write(),
                }
            }
        }
        More::Replace(name) => {
            if let Some(path) = file(*name) {
                let new = root.join("replacing");
                run("cp", &["-p".as_ref(), path.as_os_str(), new.as_os_str()]);
                fs::rename(new, path).unwrap();
            }
        }
        More::LongLink(name, length) => {
            if let Some(path) = at(*name) {
                let _ = symlink("long/".repeat(usize::from(*length)), path);
            }
        }
        More::BigXattr(name, length) => {
            if let Some(path) = file(*name) {
                xattr::set(path, "user.big", &vec![7; usize::from(*length)]).unwrap();
            }
        }
        More::Punch(name, offset) => {
            if let Some(path) = file(*name) {
                use nix::fcntl::{FallocateFlags, fallocate};
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(open(&path), flags, i64::from(*offset) * 512, 4096).unwrap();
            }
        }
        More::Cut(name, length) => {
            if let Some(path) = file(*name) {
                open(&path).set_len(u64::from(*length)).unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_are_compared_as_the_walk_compares_them(
        first in prop::collection::vec(more(), 0..70),
        second in prop::collection::vec(more(), 0..25),
        same in prop::collection::vec((0..SIZE / 4096, 0u64..2000), 0..3),
        alive: bool,
    ) {
        let steps = |steps: &[More], dir: &Path| steps.iter().for_each(|step| do_more(dir, step));
        let (first, second) = (|dir: &Path| steps(&first, dir), |dir: &Path| steps(&second, dir));
        let pair = match alive {
            true => Pair::of_one_life(first, second),
            false => Pair::new(first, second),
        };
        pair.changes(&[]);
        // What was copied up ahead of its first write is in a layer, too.
        let same: Vec<_> = same.iter().map(|(at, len)| at * 4096..(at + len) * 4096).collect();
        pair.changes(&same);
    }
}

/// The bytes that say something in an image's descriptors, inodes and directories.
fn metadata_of(image: &Image) -> Vec<u64> {
    let mut block = vec![0; 4096];
    let mut found = Vec::new();
    for at in (0..image.size).step_by(4096) {
        image.fill(&mut block, at).unwrap();
        // The files of this test are all of one byte.
        if block.iter().any(|byte| *byte != block[0]) {
            let bytes = (at..).zip(&block).filter(|(_, byte)| **byte != 0);
            found.extend(bytes.map(|(at, _)| at));
        }
    }
    found
}

#[test]
fn damage_anywhere_is_an_error_or_no_damage_and_never_a_panic() {
    use proptest::test_runner::{Config, TestRunner};
    type Make<'a> = &'a dyn Fn(fn(&Path), fn(&Path)) -> Pair;
    let states: [Make<'_>; 3] = [
        &|older, newer| Pair::new(older, newer),
        &|older, newer| Pair::of_one_life(older, newer),
        &|older, newer| {
            let make = made_by_mke2fs(&["-t", "ext4", "-b", "4096", "-O", "^metadata_csum"]);
            Pair::of(&make, older, newer)
        },
    ];
    for (number, make) in states.iter().enumerate() {
        let pair = make(
            |dir| {
                shell(
                    dir,
                    r#"
                    mkdir -p a/b/c; ln -s "$(printf 'long%.0s' $(seq 300))" longlink; ln -s x short
                    for i in 1 2 3; do head -c 9000 /dev/zero | tr '\0' x > a/b/c/$i; done
                    for i in 1 2 3 4 5 6 7; do
                        echo x | dd of=a/holes bs=1 seek=${i}000000 conv=notrunc status=none
                    done
                    setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" a/b/c/1
                    "#,
                );
                fill_directory(&dir.join("tree"), 400);
            },
            |dir| {
                shell(
                    dir,
                    "echo y >> a/b/c/1; echo y >> a/holes; rm tree/00*; mv a/b/c a/d; rm short",
                );
            },
        );
        let older = Image::open(&pair.older());
        let plain = differing(&older, &Image::open(&pair.newer()), &[]);
        let whole = Some(0..SIZE).into_iter().collect::<Vec<_>>();
        let places = metadata_of(&Image::open(&pair.newer()));
        let place = (0..places.len(), 1u8..=255);
        let strategy = (prop::collection::vec(place, 1..40), any::<bool>());
        let mut runner = TestRunner::new(Config {
            cases: 200,
            ..Config::default()
        });
        let damaged = std::cell::Cell::new(0);
        let result = runner.run(&strategy, |(patches, all)| {
            let mut newer = Image::open(&pair.newer());
            let patch = |(place, value): (usize, u8)| (places[place], value);
            newer.patches = patches.into_iter().map(patch).collect();
            let differing = if all { &whole } else { &plain };
            let done = diff_devices(&older, &newer, differing, &with_contents());
            if let Err(error) = done {
                damaged.set(damaged.get() + 1);
                let kind = error.kind();
                prop_assert!(
                    matches!(kind, ErrorKind::Corrupt | ErrorKind::Unsupported),
                    "{:?}: {}",
                    kind,
                    error
                );
            }
            Ok(())
        });
        result.unwrap();
        assert!(damaged.get() > 30, "{number}: {}", damaged.get());
    }
}
