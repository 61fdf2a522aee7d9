//! Layers applied to trees: attributes, whiteouts, and archives that mean harm.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::image_support::{
    Snapshot, Tar, assert_same, make_rich_tree, need_root, run, shell, snapshot,
};
use tar_core::{EntryBuilder, EntryType};
use tempfile::{TempDir, tempdir};
use vellum_base::ErrorKind;
use vellum_image::{
    ApplyOptions, Compression, Foreign, ImageConfig, OciWriter, apply_layer, copy_tree,
    write_rootfs_tar,
};

fn apply(archive: &[u8], target: &Path) {
    apply_layer(archive, target, &ApplyOptions::layer()).unwrap();
}

/// Applies `archive` to a tree next to a file that must stay as it is; returns the error.
fn refuse(archive: &[u8]) -> (ErrorKind, String) {
    need_root();
    let outer = tempdir().unwrap();
    let outside = outer.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "precious").unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    let before = snapshot(&outside);
    let error = apply_layer(archive, &root, &ApplyOptions::layer()).unwrap_err();
    assert_same(&before, &snapshot(&outside));
    let mut names: Vec<_> = fs::read_dir(outer.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["outside", "root"]);
    (error.kind(), error.to_string())
}

// What survives.

fn tar_of(tree: &Path, options: &[&str]) -> Vec<u8> {
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut arguments = vec![
        "-C",
        tree.to_str().unwrap(),
        "-f",
        out.path().to_str().unwrap(),
    ];
    arguments.extend(options);
    arguments.extend(["-c", "."]);
    run("tar", &arguments);
    fs::read(out.path()).unwrap()
}

fn assert_holes_survived(root: &Path) {
    let sparse = fs::File::open(root.join("sparse")).unwrap();
    let meta = sparse.metadata().unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    for (at, text) in [(0, "start"), (500 << 20, "middle"), ((1 << 30) - 4, "end")] {
        let mut data = vec![0; text.len()];
        sparse.read_exact_at(&mut data, at).unwrap();
        assert_eq!(data, text.as_bytes());
    }
    let hole = fs::metadata(root.join("all-hole")).unwrap();
    assert_eq!((hole.len(), hole.blocks()), (3 << 20, 0));
}

#[test]
fn every_attribute_survives_a_pax_tar_with_each_form_of_sparse_map() {
    let source = tempdir().unwrap();
    make_rich_tree(source.path());
    let expected = snapshot(source.path());
    for version in ["0.0", "0.1", "1.0"] {
        let sparse = format!("--sparse-version={version}");
        let archive = tar_of(
            source.path(),
            &[
                "--format=posix",
                "--xattrs",
                "--xattrs-include=*",
                "-S",
                &sparse,
            ],
        );
        let target = tempdir().unwrap();
        let stats = apply_layer(&archive[..], target.path(), &ApplyOptions::rootfs()).unwrap();
        assert_same(&expected, &snapshot(target.path()));
        assert_holes_survived(target.path());
        assert!(stats.end_marker);
        assert_eq!((stats.skipped_xattrs, stats.specials), (0, 3));
    }
}

#[test]
fn a_gnu_tar_gives_what_tar_itself_gives() {
    let source = tempdir().unwrap();
    make_rich_tree(source.path());
    // This format has no fractions of seconds and no xattrs.
    let archive = tar_of(source.path(), &["--format=gnu", "-S"]);
    let (ours, theirs) = (tempdir().unwrap(), tempdir().unwrap());
    apply_layer(&archive[..], ours.path(), &ApplyOptions::rootfs()).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &archive).unwrap();
    let arguments = [
        "--numeric-owner",
        "-xpf",
        file.path().to_str().unwrap(),
        "-C",
        theirs.path().to_str().unwrap(),
    ];
    run("tar", &arguments);
    assert_same(&snapshot(theirs.path()), &snapshot(ours.path()));
    assert_holes_survived(ours.path());
}

#[test]
fn a_copied_tree_is_the_same_tree() {
    let source = tempdir().unwrap();
    make_rich_tree(source.path());
    let _socket = std::os::unix::net::UnixListener::bind(source.path().join("etc/socket")).unwrap();
    let target = tempdir().unwrap();
    let mut seen = 0;
    let progress: vellum_image::Progress<'_> = Box::new(|bytes| seen += bytes);
    let stats = copy_tree(source.path(), target.path(), Some(progress)).unwrap();
    assert_same(&snapshot(source.path()), &snapshot(target.path()));
    assert_holes_survived(target.path());
    assert_eq!(stats.hard_links, 3);
    assert!(seen >= stats.written && seen < 1 << 20, "{seen}");
}

#[test]
fn a_tree_is_not_copied_into_itself() {
    let source = tempdir().unwrap();
    fs::create_dir(source.path().join("in")).unwrap();
    let error = copy_tree(source.path(), &source.path().join("in"), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_written_rootfs_tar_is_the_same_tree_for_us_and_for_tar() {
    let source = tempdir().unwrap();
    make_rich_tree(source.path());
    fs::create_dir(source.path().join("lost+found")).unwrap();
    let mut archive = Vec::new();
    write_rootfs_tar(source.path(), &Foreign::default(), &mut archive, None).unwrap();
    assert!(
        archive.len() < 4 << 20,
        "holes were written: {}",
        archive.len()
    );
    let mut again = Vec::new();
    write_rootfs_tar(source.path(), &Foreign::default(), &mut again, None).unwrap();
    assert!(archive == again, "the same tree gave different bytes");

    fs::remove_dir(source.path().join("lost+found")).unwrap();
    run(
        "touch",
        &[
            "-d",
            "2002-02-03 04:05:06.7",
            source.path().to_str().unwrap(),
        ],
    );
    let mut archive = Vec::new();
    write_rootfs_tar(source.path(), &Foreign::default(), &mut archive, None).unwrap();
    let expected = snapshot(source.path());
    let ours = tempdir().unwrap();
    apply_layer(&archive[..], ours.path(), &ApplyOptions::rootfs()).unwrap();
    assert_same(&expected, &snapshot(ours.path()));
    assert_holes_survived(ours.path());

    let (theirs, file) = (tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    fs::write(file.path(), &archive).unwrap();
    let arguments = [
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "-xpf",
        file.path().to_str().unwrap(),
        "-C",
        theirs.path().to_str().unwrap(),
    ];
    run("tar", &arguments);
    assert_same(&expected, &snapshot(theirs.path()));
}

#[test]
fn what_others_made_in_a_tree_is_left_out_of_its_tar_while_it_is_as_it_was_made() {
    need_root();
    let root = tempdir().unwrap();
    shell(
        root.path(),
        "mkdir -p etc proc dev/pts used; : > etc/hosts; : > etc/resolv.conf; echo own > etc/own
         echo content > etc/resolv.conf; : > used/file
         touch -d '2001-02-03 04:05:06.5' etc; touch -d '2002-02-03 04:05:06.5' used .",
    );
    let points = [
        ("/proc", true),
        ("/dev", true),
        ("/dev/pts", true),
        ("/used", true),
        ("/etc/hosts", false),
        ("/etc/resolv.conf", false),
        ("/gone", true),
    ];
    let time = |path: &str| {
        let meta = fs::metadata(root.path().join(path)).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    let foreign = Foreign {
        points: points.map(|(path, dir)| (path.into(), dir)).into(),
        times: [("/etc".into(), time("etc")), ("/used".into(), (1, 1))].into(),
        before: [("/etc".into(), (1000, 7)), ("/used".into(), (1000, 7))].into(),
    };
    let mut archive = Vec::new();
    write_rootfs_tar(root.path(), &foreign, &mut archive, None).unwrap();
    let ours = tempdir().unwrap();
    apply_layer(&archive[..], ours.path(), &ApplyOptions::rootfs()).unwrap();
    let found = snapshot(ours.path());
    let names: Vec<&str> = found.keys().map(|path| path.to_str().unwrap()).collect();
    // What was put to use is the tree's own, and what it lies in.
    assert_eq!(
        names,
        ["", "etc", "etc/own", "etc/resolv.conf", "used", "used/file"]
    );
    let line = |path: &str| &found[Path::new(path)];
    assert!(
        line("etc").ends_with("time 1000.000000007"),
        "{}",
        line("etc")
    );
    // Somebody was at it since.
    assert_eq!(line("used"), &snapshot(root.path())[Path::new("used")]);
}

#[test]
fn directories_that_a_layer_touches_but_does_not_list_keep_their_times() {
    need_root();
    let root = tempdir().unwrap();
    apply(
        &Tar::new().dir("a").dir("a/b").file("a/b/old", "x").end(),
        root.path(),
    );
    apply(
        &Tar::new()
            .file("a/b/new", "x")
            .file("a/b/.wh.old", "")
            .end(),
        root.path(),
    );
    for path in ["a", "a/b"] {
        let meta = fs::metadata(root.path().join(path)).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000, 0), "{path}");
    }
}

#[test]
fn missing_parents_are_made_also_through_a_dangling_link() {
    need_root();
    let root = tempdir().unwrap();
    let archive = Tar::new()
        .symlink("run", "/var/run/../lock")
        .file("run/x/file", "here")
        .file("opt/a/b/c", "deep")
        .end();
    // The kernel cannot resolve ".." below a directory that is missing, so it is made first.
    fs::create_dir_all(root.path().join("var/run")).unwrap();
    apply(&archive, root.path());
    assert_eq!(
        fs::read_to_string(root.path().join("var/lock/x/file")).unwrap(),
        "here"
    );
    let made = fs::metadata(root.path().join("opt/a")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o755);
}

#[test]
fn attributes_that_a_merged_directory_had_and_the_layer_does_not_list_are_gone() {
    let root = tempdir().unwrap();
    need_root();
    shell(
        root.path(),
        "mkdir d; setfattr -n user.old -v x d; setfacl -m u:1234:rwx d; chmod 2777 d",
    );
    let mut entry = Tar::entry(EntryType::Directory, "d/", 0o750);
    entry.add_pax("SCHILY.xattr.user.new", "y");
    apply(&Tar::new().raw(entry, b"").end(), root.path());
    let names: Vec<_> = xattr::list(root.path().join("d")).unwrap().collect();
    assert_eq!(names, ["user.new"]);
    let mode = fs::metadata(root.path().join("d")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o750);
}

#[test]
fn a_replaced_file_leaves_the_other_names_of_the_old_one_alone() {
    need_root();
    let root = tempdir().unwrap();
    apply(
        &Tar::new().file("a", "old").hard_link("b", "a").end(),
        root.path(),
    );
    apply(&Tar::new().file("a", "new").end(), root.path());
    assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "new");
    assert_eq!(fs::read_to_string(root.path().join("b")).unwrap(), "old");
}

#[test]
fn a_hard_link_to_a_lower_layer_and_to_itself_works() {
    need_root();
    let root = tempdir().unwrap();
    apply(&Tar::new().file("a", "old").end(), root.path());
    apply(
        &Tar::new().hard_link("b", "a").hard_link("a", "/a").end(),
        root.path(),
    );
    let inode = |name: &str| fs::metadata(root.path().join(name)).unwrap().ino();
    assert_eq!(inode("a"), inode("b"));
}

#[test]
fn libarchive_xattrs_and_user_xattrs_on_links_are_handled() {
    need_root();
    let root = tempdir().unwrap();
    let mut file = Tar::entry(EntryType::Regular, "f", 0o644);
    file.add_pax("LIBARCHIVE.xattr.user.a%20b", "AQAK");
    let mut link = Tar::entry(EntryType::Symlink, "l", 0o777);
    link.link_name("f");
    link.add_pax("SCHILY.xattr.user.x", "1");
    let archive = Tar::new().raw(file, b"").raw(link, b"").end();
    let stats = apply_layer(&archive[..], root.path(), &ApplyOptions::layer()).unwrap();
    assert_eq!(stats.skipped_xattrs, 1);
    let value = xattr::get(root.path().join("f"), "user.a b").unwrap();
    assert_eq!(value.unwrap(), [1, 0, 10]);
}

/// An extended header with these records, lengths and all.
fn pax(tar: Tar, records: &[(&str, &str)]) -> Tar {
    let mut data = String::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while length.to_string().len() + rest.len() != length {
            length += 1;
        }
        data.push_str(&format!("{length}{rest}"));
    }
    let mut header = Tar::entry(EntryType::XHeader, "pax", 0o644);
    header.size(data.len() as u64).unwrap();
    tar.raw(header, data.as_bytes())
}

/// Gives the last header of a tar, which has no content, the owner `uid` as a base-256 number.
fn with_owner(mut tar: Tar, uid: i64) -> Tar {
    let at = tar.0.len() - 512;
    let header = &mut tar.0[at..];
    header[108..116].copy_from_slice(&uid.to_be_bytes());
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar
}

#[test]
fn odd_headers_are_read_as_umoci_reads_them() {
    let mut tar = Tar::new();
    tar = with_owner(tar.file("negative", ""), -2);
    tar = with_owner(tar.file("minus-one", ""), -1);
    tar = pax(tar, &[("uid", "-2"), ("gid", "-7")]).file("negative-record", "");
    // Of two headers the later one counts, and nothing of the earlier.
    tar = pax(tar, &[("path", "first"), ("uid", "7")]);
    tar = pax(tar, &[("path", "second"), ("gid", "8")]).file("name", "two");
    tar = pax(
        tar,
        &[
            ("path", ""),
            ("mtime", ""),
            ("uid", ""),
            ("size", ""),
            ("linkpath", ""),
        ],
    )
    .file("empty-records", "content");
    let root = assert_as_umoci(&[tar.end()]);
    let owner = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        let meta = fs::metadata(root.path().join(name)).unwrap();
        (meta.uid(), meta.gid())
    };
    assert_eq!(owner("negative"), (u32::MAX - 1, 0));
    assert_eq!(owner("minus-one"), (0, 0));
    assert_eq!(owner("negative-record"), (u32::MAX - 1, u32::MAX - 6));
    assert_eq!(owner("second"), (0, 8));
    assert_eq!(
        fs::read(root.path().join("empty-records")).unwrap(),
        b"content"
    );
}

#[test]
fn of_two_long_names_the_later_counts_as_gnu_tar_has_it() {
    let long = |tar: Tar, name: &str| {
        let data = format!("{name}\0");
        let mut header = EntryBuilder::new_gnu();
        header
            .path("././@LongLink")
            .entry_type(EntryType::GnuLongName);
        header.mode(0o644).unwrap();
        header.size(data.len() as u64).unwrap();
        tar.raw(header, data.as_bytes())
    };
    let (one, two) = ("1".repeat(120), "2".repeat(130));
    let archive = long(long(Tar::new(), &one), &two)
        .file("short", "x")
        .file("last", "y")
        .end();
    let (ours, theirs) = (tempdir().unwrap(), tempdir().unwrap());
    apply(&archive, ours.path());
    fs::write(theirs.path().join("tar"), &archive).unwrap();
    shell(theirs.path(), "tar -xf tar; rm tar");
    assert_eq!(names(ours.path()), names(theirs.path()));
    assert!(ours.path().join(two).exists());
}

#[test]
fn a_member_without_a_name_is_corrupt_and_does_not_become_the_root() {
    let mut tar = Tar::new().file("a", "");
    tar.0[0] = 0;
    tar = with_owner(tar, 0);
    let (kind, message) = refuse(&tar.end());
    assert_eq!(kind, ErrorKind::Corrupt, "{message}");
}

#[test]
fn acls_that_tar_keeps_without_xattrs_are_set() {
    need_root();
    let (work, root) = (tempdir().unwrap(), tempdir().unwrap());
    shell(
        work.path(),
        "mkdir -p tree/dir; touch tree/file tree/named
         setfacl -m u:1000:r,g:12:w tree/file; setfacl -m u:root:rwx tree/named
         setfacl -m u:0:x -d -m u:77:rx tree/dir",
    );
    let archive = tar_of(&work.path().join("tree"), &["--acls", "--no-xattrs"]);
    apply(&archive, root.path());
    let list = |directory: &Path| shell(directory, "getfacl -nR .");
    assert_eq!(list(root.path()), list(&work.path().join("tree")));
}

// Whiteouts.

/// Applies `layers` and, packed as an image, has umoci unpack them; both must agree.
fn assert_as_umoci(layers: &[Vec<u8>]) -> TempDir {
    need_root();
    let work = tempdir().unwrap();
    let root = tempdir().unwrap();
    let mut image = OciWriter::new(work.path(), Compression::Gzip).unwrap();
    for layer in layers {
        apply(layer, root.path());
        image
            .add_layer(|out| {
                out.write_all(layer).unwrap();
                Ok(())
            })
            .unwrap();
    }
    let layout = work.path().join("layout");
    image
        .write_layout(ImageConfig::for_host(), Some("test:latest"), &layout)
        .unwrap();
    let bundle = work.path().join("bundle");
    let layout = format!("{}:latest", layout.display());
    run(
        "umoci",
        &["unpack", "--image", &layout, bundle.to_str().unwrap()],
    );
    let strip = |snapshot: Snapshot| -> Snapshot {
        // umoci makes the root itself, and a directory has the time of its last whiteout.
        let lines = snapshot
            .into_iter()
            .filter(|(path, _)| path != Path::new(""));
        lines
            .map(|(path, line)| match line.split_once(" time ") {
                Some((directory, _)) if line.starts_with("directory") => (path, directory.into()),
                _ => (path, line),
            })
            .collect()
    };
    assert_same(
        &strip(snapshot(&bundle.join("rootfs"))),
        &strip(snapshot(root.path())),
    );
    root
}

fn names(root: &Path) -> String {
    shell(
        root,
        "find . -mindepth 1 | LC_ALL=C sort | cut -c3- | tr '\\n' ' '",
    )
}

fn base() -> Vec<u8> {
    Tar::new()
        .dir("d")
        .file("d/one", "1")
        .file("d/two", "2")
        .dir("d/sub")
        .file("d/sub/three", "3")
        .dir("usr")
        .dir("usr/lib")
        .file("usr/lib/so", "so")
        .symlink("lib", "usr/lib")
        .end()
}

#[test]
fn a_whiteout_deletes_files_and_whole_directories() {
    let layer = Tar::new()
        .dir("d")
        .file("d/.wh.one", "")
        .file("d/.wh.sub", "")
        .file(".wh.lib", "")
        .end();
    let root = assert_as_umoci(&[base(), layer]);
    assert_eq!(names(root.path()), "d d/two usr usr/lib usr/lib/so ");
}

#[test]
fn a_whiteout_before_or_after_a_new_file_of_that_name_leaves_the_new_one() {
    for layer in [
        Tar::new()
            .dir("d")
            .file("d/.wh.one", "")
            .file("d/one", "new"),
        Tar::new()
            .dir("d")
            .file("d/one", "new")
            .file("d/.wh.one", ""),
    ] {
        let root = assert_as_umoci(&[base(), layer.end()]);
        let text = fs::read_to_string(root.path().join("d/one")).unwrap();
        assert_eq!(text, "new");
    }
}

#[test]
fn an_opaque_directory_hides_what_was_there_wherever_the_marker_comes() {
    let marker = "d/.wh..wh..opq";
    for layer in [
        Tar::new()
            .dir("d")
            .file(marker, "")
            .file("d/new", "n")
            .dir("d/sub")
            .file("d/sub/x", "x"),
        Tar::new()
            .dir("d")
            .file("d/new", "n")
            .dir("d/sub")
            .file("d/sub/x", "x")
            .file(marker, ""),
        Tar::new()
            .dir("d")
            .file("d/new", "n")
            .file(marker, "")
            .dir("d/sub")
            .file("d/sub/x", "x"),
    ] {
        let root = assert_as_umoci(&[base(), layer.end()]);
        assert_eq!(
            names(root.path()),
            "d d/new d/sub d/sub/x lib usr usr/lib usr/lib/so "
        );
    }
}

#[test]
fn an_opaque_marker_keeps_new_files_below_directories_that_are_not_listed() {
    need_root();
    let root = tempdir().unwrap();
    apply(&base(), root.path());
    let layer = Tar::new().file("d/sub/new", "n").file("d/.wh..wh..opq", "");
    apply(&layer.end(), root.path());
    assert_eq!(
        names(root.path()),
        "d d/sub d/sub/new lib usr usr/lib usr/lib/so "
    );
}

#[test]
fn a_whiteout_reaches_through_a_link_to_a_directory() {
    let root = assert_as_umoci(&[base(), Tar::new().file("lib/.wh.so", "").end()]);
    assert!(!root.path().join("usr/lib/so").exists());
}

#[test]
fn types_replace_each_other() {
    let layer = Tar::new()
        .file("d", "now a file")
        .dir("lib")
        .file("lib/own", "a directory instead of a link")
        .symlink("usr", "d")
        .end();
    let root = assert_as_umoci(&[base(), layer]);
    assert_eq!(names(root.path()), "d lib lib/own usr ");
    let last = Tar::new().dir("d").file("d/x", "x").dir("usr").end();
    let root = assert_as_umoci(&[base(), last]);
    assert!(root.path().join("usr/lib/so").exists());
}

#[test]
fn a_directory_deleted_and_made_again_in_one_layer_holds_the_new_alone() {
    for layer in [
        Tar::new().file(".wh.d", "").dir("d").file("d/new", "n"),
        Tar::new().dir("d").file("d/new", "n").file(".wh.d", ""),
    ] {
        let root = assert_as_umoci(&[base(), layer.end()]);
        assert_eq!(names(root.path()), "d d/new lib usr usr/lib usr/lib/so ");
    }
}

#[test]
fn whiteouts_of_nothing_and_aufs_bookkeeping_are_passed_over() {
    need_root();
    let root = tempdir().unwrap();
    apply(&base(), root.path());
    let before = names(root.path());
    let layer = Tar::new()
        .file(".wh.missing", "")
        .file("not/there/.wh.x", "")
        .file("not/there/.wh..wh..opq", "")
        .file(".wh..wh.aufs", "")
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", "")
        .end();
    apply(&layer, root.path());
    assert_eq!(names(root.path()), before);
}

#[test]
fn without_whiteouts_the_names_are_names() {
    need_root();
    let root = tempdir().unwrap();
    let archive = Tar::new().file("x", "1").file(".wh.x", "2").end();
    apply_layer(&archive[..], root.path(), &ApplyOptions::rootfs()).unwrap();
    assert_eq!(names(root.path()), ".wh.x x ");
}

// Archives that mean harm.

#[test]
fn parent_components_are_refused_everywhere() {
    for archive in [
        Tar::new().file("../outside/victim", "evil"),
        Tar::new().dir("a").file("a/../../outside/victim", "evil"),
        Tar::new().dir("../evil"),
        Tar::new().file("a", "").hard_link("b", "../outside/victim"),
        Tar::new().file("../outside/.wh.victim", ""),
        Tar::new().file("../outside/.wh..wh..opq", ""),
    ] {
        let (kind, message) = refuse(&archive.end());
        assert_eq!(kind, ErrorKind::InvalidInput, "{message}");
        assert!(message.contains("\"..\""), "{message}");
    }
}

#[test]
fn absolute_names_land_inside() {
    need_root();
    let root = tempdir().unwrap();
    let name = format!("/tmp/vellum-absolute-{}", std::process::id());
    apply(
        &Tar::new().file(&name, "in").hard_link("/l", &name).end(),
        root.path(),
    );
    assert!(!Path::new(&name).exists());
    let inside = root.path().join(name.trim_start_matches('/'));
    assert_eq!(fs::read_to_string(inside).unwrap(), "in");
    assert_eq!(fs::read_to_string(root.path().join("l")).unwrap(), "in");
}

#[test]
fn links_that_lead_out_are_followed_inside_only() {
    need_root();
    let outer = tempdir().unwrap();
    let outside = outer.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "precious").unwrap();
    let before = snapshot(&outside);
    let absolute = outside.to_str().unwrap();
    for target in [
        absolute,
        "../outside",
        "../../../../../../../outside",
        "/proc/self/root/tmp",
    ] {
        for (name, attack) in [
            (
                "write",
                Tar::new().symlink("l", target).file("l/victim", "evil"),
            ),
            ("new", Tar::new().symlink("l", target).file("l/new", "evil")),
            ("dir", Tar::new().symlink("l", target).dir("l/new")),
            ("chmod", Tar::new().symlink("l", target).dir("l/.")),
            (
                "whiteout",
                Tar::new().symlink("l", target).file("l/.wh.victim", ""),
            ),
            (
                "opaque",
                Tar::new().symlink("l", target).file("l/.wh..wh..opq", ""),
            ),
            (
                "link out",
                Tar::new().symlink("l", target).hard_link("h", "l/victim"),
            ),
            (
                "two steps",
                Tar::new()
                    .symlink("a", target)
                    .symlink("l", "a")
                    .file("l/new", "x"),
            ),
            (
                "file",
                Tar::new()
                    .symlink("l", &format!("{target}/victim"))
                    .file("l", "evil"),
            ),
            (
                "over",
                Tar::new()
                    .symlink("l", target)
                    .raw(Tar::entry(EntryType::Fifo, "l/victim", 0o600), b""),
            ),
        ] {
            let root = outer.path().join("root");
            fs::create_dir(&root).unwrap();
            // Whether it is refused or lands inside, nothing outside may change.
            let _ = apply_layer(&attack.end()[..], &root, &ApplyOptions::layer());
            assert_same(&before, &snapshot(&outside));
            assert_eq!(
                fs::metadata(outside.join("victim")).unwrap().nlink(),
                1,
                "{name} {target}"
            );
            fs::remove_dir_all(&root).unwrap();
        }
    }
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
}

#[test]
fn a_whiteout_of_a_link_removes_the_link_and_not_what_it_points_to() {
    need_root();
    let outer = tempdir().unwrap();
    fs::create_dir_all(outer.path().join("outside/deep")).unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    symlink("../outside", root.join("l")).unwrap();
    fs::create_dir(root.join("d")).unwrap();
    symlink("../../outside", root.join("d/l")).unwrap();
    apply(&Tar::new().file(".wh.l", "").file(".wh.d", "").end(), &root);
    assert_eq!(names(&root), "");
    assert!(outer.path().join("outside/deep").exists());
}

#[test]
fn an_existing_link_is_replaced_and_not_written_through() {
    need_root();
    let outer = tempdir().unwrap();
    fs::write(outer.path().join("victim"), "precious").unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    symlink("../victim", root.join("l")).unwrap();
    apply(&Tar::new().file("l", "new").end(), &root);
    let victim = fs::read_to_string(outer.path().join("victim")).unwrap();
    assert_eq!(victim, "precious");
    assert!(fs::symlink_metadata(root.join("l")).unwrap().is_file());
}

#[test]
fn devices_are_refused_where_they_are_not_allowed() {
    need_root();
    let root = tempdir().unwrap();
    let mut options = ApplyOptions::layer();
    options.devices = false;
    let archive = Tar::new().device("dev/mem", 1, 1).end();
    let error = apply_layer(&archive[..], root.path(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.to_string().contains("dev/mem"), "{error}");
    assert!(!root.path().join("dev/mem").exists());
}

#[test]
fn nothing_replaces_the_root_and_whiteouts_need_a_name() {
    for archive in [
        Tar::new().symlink("./", "/tmp"),
        Tar::new().file(".", "x"),
        Tar::new().hard_link("x", "/"),
        Tar::new().file(".wh.", ""),
        Tar::new().file(".wh..", ""),
        Tar::new().file("a/.wh...", ""),
    ] {
        let (kind, message) = refuse(&archive.end());
        assert_eq!(kind, ErrorKind::InvalidInput, "{message}");
    }
}

#[test]
fn cut_off_archives_and_bad_checksums_are_corrupt_and_name_the_place() {
    let whole = Tar::new().file("a", &"x".repeat(2000)).file("b", "y").end();
    for length in [100, 700, 2000, 2600] {
        let (kind, message) = refuse(&whole[..length]);
        assert_eq!(kind, ErrorKind::Corrupt, "{message}");
        assert!(message.contains("cut off"), "{message}");
    }
    let mut bad = whole.clone();
    bad[0] ^= 1;
    let (kind, message) = refuse(&bad);
    assert_eq!(kind, ErrorKind::Corrupt, "{message}");
    assert!(message.contains("checksum"), "{message}");
}

#[test]
fn absurd_sizes_fail_without_taking_memory_or_space() {
    // A file of 2^60 bytes whose content is missing.
    let mut huge = Tar::entry(EntryType::Regular, "huge", 0o644);
    huge.add_pax("size", (1u64 << 60).to_string());
    assert_eq!(
        refuse(&Tar::new().raw(huge, b"abc").end()).0,
        ErrorKind::Corrupt
    );

    let mut sparse = Tar::entry(EntryType::Regular, "sparse", 0o644);
    sparse.add_pax("GNU.sparse.map", "0,0");
    sparse.add_pax("GNU.sparse.size", (1u64 << 62).to_string());
    let (kind, message) = refuse(&Tar::new().raw(sparse, b"").end());
    assert_eq!(kind, ErrorKind::NoSpace, "{message}");

    // A path of 3 MiB and an xattr of 70,000 bytes.
    let mut long = Tar::entry(EntryType::Regular, "x", 0o644);
    long.add_pax("path", "a/".repeat(3 << 19));
    assert_eq!(
        refuse(&Tar::new().raw(long, b"").end()).0,
        ErrorKind::InvalidInput
    );
    let mut value = Tar::entry(EntryType::Regular, "x", 0o644);
    value.add_pax("SCHILY.xattr.user.big", "v".repeat(70_000));
    let (kind, message) = refuse(&Tar::new().raw(value, b"").end());
    assert_eq!(kind, ErrorKind::InvalidInput, "{message}");
    assert!(message.contains("user.big"), "{message}");

    // More directories than a path can name.
    let mut deep = Tar::entry(EntryType::Directory, "d", 0o755);
    deep.add_pax("path", "d/".repeat(2100));
    let (kind, message) = refuse(&Tar::new().raw(deep, b"").end());
    assert_eq!(kind, ErrorKind::InvalidInput, "{message}");

    let mut owner = Tar::entry(EntryType::Regular, "x", 0o644);
    owner.add_pax("uid", "4294967295");
    assert_eq!(
        refuse(&Tar::new().raw(owner, b"").end()).0,
        ErrorKind::InvalidInput
    );
}

#[test]
fn sparse_maps_that_lie_are_corrupt() {
    for (map, size) in [
        ("100,200,50,10", "1000"),
        ("0,2000", "1000"),
        ("0,10", "1000"),
    ] {
        let mut sparse = Tar::entry(EntryType::Regular, "sparse", 0o644);
        sparse.add_pax("GNU.sparse.map", map);
        sparse.add_pax("GNU.sparse.size", size);
        let (kind, message) = refuse(&Tar::new().raw(sparse, b"").end());
        assert_eq!(kind, ErrorKind::Corrupt, "{message}");
    }
    let archive = Tar::new().raw(
        {
            let mut entry = Tar::entry(EntryType::Regular, "x", 0o644);
            entry.add_pax("GNU.sparse.major", "1");
            entry.add_pax("GNU.sparse.minor", "0");
            entry.add_pax("GNU.sparse.realsize", "10");
            entry.size(512).unwrap();
            entry
        },
        &[b'9'; 512],
    );
    // A number that never ends, as long as the reader cares to wait.
    let endless = (&archive.0[..]).chain(std::io::repeat(b'9'));
    let root = tempdir().unwrap();
    let error = apply_layer(endless, root.path(), &ApplyOptions::layer()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[test]
fn hard_links_to_what_is_missing_or_a_directory_say_so() {
    let (kind, message) = refuse(&Tar::new().hard_link("b", "nowhere").end());
    assert_eq!(kind, ErrorKind::NotFound, "{message}");
    assert!(message.contains("nowhere"), "{message}");
    let (kind, message) = refuse(&Tar::new().dir("d").hard_link("b", "d").end());
    assert_eq!(kind, ErrorKind::InvalidInput, "{message}");
}

#[test]
fn more_members_than_allowed_are_refused() {
    need_root();
    let root = tempdir().unwrap();
    let mut options = ApplyOptions::layer();
    options.max_members = 2;
    let archive = Tar::new().file("a", "").file("b", "").file("c", "").end();
    let error = apply_layer(&archive[..], root.path(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_mount_inside_the_tree_is_not_entered() {
    need_root();
    let root = tempdir().unwrap();
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let inner = root.path().join("proc");
    fs::create_dir(&inner).unwrap();
    let none: Option<&str> = None;
    nix::mount::mount(
        Some("tmpfs"),
        &inner,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        none,
    )
    .unwrap();
    let _mounted = Mounted(inner.clone());
    let archive = Tar::new().file("proc/x", "x").end();
    let error = apply_layer(&archive[..], root.path(), &ApplyOptions::layer()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(!inner.join("x").exists());
}

#[test]
fn modes_do_not_depend_on_the_umask() {
    need_root();
    let root = tempdir().unwrap();
    // nextest gives each test a process of its own, so that this disturbs nobody.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    apply(
        &Tar::new().dir("d").file("x/f", "").device("n", 1, 3).end(),
        root.path(),
    );
    nix::sys::stat::umask(old);
    let mode = |name: &str| {
        fs::metadata(root.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(
        [mode("d"), mode("x"), mode("x/f"), mode("n")],
        [0o755, 0o755, 0o644, 0o600]
    );
}
