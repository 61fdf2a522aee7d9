//! The same layer of an image, imported anywhere, gives the same bytes.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::Command;
use std::time::Duration;

use tar_core::EntryType;

use crate::common::{SIZE, TestStore, VELLUM, run, shell};
use crate::image_support::{Tar, make_rich_tree, snapshot};

/// Bytes of the chunks that a registry would keep.
const CHUNK: usize = 128 << 10;

/// The digests of an image's layers, from the bottom up.
fn digests(store: &TestStore, image: &str) -> Vec<String> {
    let found = store.json(&["inspect", image]);
    let layers = found[0]["image"]["layers"].as_array().unwrap();
    let digest = |layer: &serde_json::Value| {
        let layer = layer.as_str().unwrap();
        let found = store.json(&["inspect", layer]);
        found[0]["layer"]["digest"].as_str().unwrap().to_owned()
    };
    layers.iter().map(digest).collect()
}

/// The disk of an image, which e2fsck finds whole.
fn whole_disk(store: &TestStore, image: &str) -> Vec<u8> {
    let disk = store.path("disk.raw");
    let shown = disk.display().to_string();
    store.ok(&["export", image, &shown, "--format", "raw", "--force"]);
    run("e2fsck", &["-fn", &shown]);
    fs::read(disk).unwrap()
}

/// An image of three layers: one of everything and a large directory; then files that are replaced, deleted,
/// linked and added, and attributes that are; then a directory whose older content is hidden. All have one
/// time: umoci keeps whole seconds alone.
fn layered(store: &TestStore) -> String {
    shell(
        store.dir.path(),
        "umoci init --layout layout
         umoci new --image layout:one
         umoci unpack --image layout:one bundle",
    );
    let root = store.path("bundle/rootfs");
    make_rich_tree(&root);
    shell(
        &root,
        "rm sparse
         setfattr -x user.e=quals%25 etc/empty
         setfattr -x user.binary etc/empty
         setfacl -b etc/hostname
         setfacl -k usr
         mkdir -p many few/inner; cd many
         seq -f 'a-name-that-is-rather-long-%g' 3000 | xargs touch
         for i in $(seq 200); do head -c $((i * 97)) /dev/urandom > file$i; done
         head -c 3000 /dev/zero | tr '\\0' b > ../value
         for i in 1 2 3; do setfattr -n user.big -v \"$(cat ../value)\" file$i; done
         for i in 4 5 6; do setfattr -n user.other -v \"c$(cat ../value)\" file$i; done
         for i in 2 4 6 8 10 12; do
             echo piece | dd of=pieces bs=4096 seek=$((i * 100)) conv=notrunc status=none
         done
         touch ../few/inner/old ../few/inner/older",
    );
    shell(
        store.dir.path(),
        "even() { find bundle/rootfs -depth -exec touch -h -d '2010-01-01' {} +; }
         even
         umoci repack --refresh-bundle --image layout:one bundle
         cd bundle/rootfs
         rm many/a-name-that-is-rather-long-1*
         rm many/file4 many/file1 etc/empty
         head -c 70000 /dev/urandom > many/file2
         ln many/file7 many/linked
         setfattr -n user.more -v x many/file5
         setfattr -n user.mark -v y many
         chmod 1777 usr
         mkdir new; echo new > new/file
         rm -r few/inner; ln -s elsewhere few/inner
         cd ../..
         even
         umoci repack --refresh-bundle --image layout:two bundle
         cd bundle/rootfs
         rm -r many; mkdir many; echo alone > many/alone
         cd ../..
         even
         umoci repack --image layout:three bundle",
    );
    store.arg("layout")
}

#[test]
fn the_layers_of_an_image_are_equal_wherever_and_whenever_it_is_imported() {
    let one = TestStore::new();
    let layout = layered(&one);
    let import = ["--select", "three", "--size", SIZE];
    let import_on = |store: &TestStore, cpu: &str| {
        let mut command = Command::new("taskset");
        command.args(["-c", cpu, VELLUM, "--root"]).arg(&store.root);
        command.args(["import", "image", &layout]).args(import);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    import_on(&one, "0");
    let expected = digests(&one, "image");
    assert_eq!(expected.len(), 4, "{expected:?}");
    whole_disk(&one, "image");

    // Another second, another directory, another CPU, other images before, and a disk that is busy.
    std::thread::sleep(Duration::from_millis(1100));
    let two = TestStore::new();
    let deeper = TestStore::under(two.dir.path());
    deeper.small_image("before");
    let busy = deeper.path("busy");
    let mut writer = Command::new("sh")
        .args(["-c", "while :; do head -c 64M /dev/zero > \"$0\"; done"])
        .arg(&busy)
        .spawn()
        .unwrap();
    let last = std::thread::available_parallelism().unwrap().get() - 1;
    let imported = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        import_on(&deeper, &last.to_string());
    }));
    writer.kill().unwrap();
    writer.wait().unwrap();
    imported.unwrap();
    assert_eq!(digests(&deeper, "image"), expected);
}

#[test]
fn what_is_laid_out_has_the_files_that_were_imported() {
    let store = TestStore::new();
    let layout = layered(&store);
    store.ok(&[
        "import", "image", &layout, "--select", "three", "--size", SIZE,
    ]);
    let mut found = store.look("image", snapshot);
    let mut expected = snapshot(&store.path("bundle/rootfs"));
    // umoci gives the root a time of its own.
    for files in [&mut found, &mut expected] {
        files.remove(std::path::Path::new(""));
    }
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    assert_eq!(found, expected);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn directories_that_no_layer_lists_have_no_time_of_the_import() {
    let tar = Tar::new().file("a/b/c/file", "content").end();
    let mut found = Vec::new();
    for _ in 0..2 {
        let store = TestStore::new();
        fs::write(store.path("x.tar"), &tar).unwrap();
        let source = store.arg("x.tar");
        store.ok(&["import", "x", &source, "--format", "tar", "--size", SIZE]);
        found.push(digests(&store, "x"));
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert_eq!(found[0], found[1]);
}

#[test]
fn attributes_whose_values_need_inodes_of_their_own_are_the_same_everywhere() {
    let mut tar = Tar::new();
    for (name, value) in [("one", "a"), ("two", "a"), ("three", "b")] {
        let mut entry = Tar::entry(EntryType::Regular, name, 0o644);
        entry.add_pax("SCHILY.xattr.user.large", value.repeat(9000));
        entry.add_pax("SCHILY.xattr.user.small", value);
        tar = tar.raw(entry, b"");
    }
    let tar = tar.end();
    let mut found = Vec::new();
    for _ in 0..2 {
        let store = TestStore::new();
        fs::write(store.path("x.tar"), &tar).unwrap();
        let source = store.arg("x.tar");
        store.ok(&["import", "x", &source, "--format", "tar", "--size", SIZE]);
        whole_disk(&store, "x");
        found.push(digests(&store, "x"));
        store.ok(&["create", "x", "--name", "look"]);
        let dir = store.mount("look");
        for (name, value) in [("one", "a"), ("two", "a"), ("three", "b")] {
            let large = xattr::get(dir.join(name), "user.large").unwrap();
            assert_eq!(large, Some(value.repeat(9000).into_bytes()), "{name}");
            // The kernel counts who shares a value.
            fs::remove_file(dir.join(name)).unwrap();
        }
        store.ok(&["umount", "look"]);
        store.ok(&["commit", "look", "emptied"]);
        whole_disk(&store, "emptied");
    }
    assert_eq!(found[0], found[1]);
}

#[test]
fn a_file_that_changes_or_grows_leaves_nearly_all_chunks_as_they_are() {
    let store = TestStore::new();
    let tar = |name: &str, middle: &[u8]| {
        let mut tar = Tar::new().dir("etc");
        for directory in 0..40u32 {
            tar = tar.dir(&format!("etc/{directory}"));
            for file in 0..30u32 {
                let path = format!("etc/{directory}/{file:02}");
                let bytes: Vec<u8> = (0..40_000u32)
                    .map(|at| (at.wrapping_mul(2_654_435_761) >> 13 ^ directory << 3 ^ file) as u8)
                    .collect();
                let changed = (directory, file) == (20, 15);
                tar = tar.bytes(&path, if changed { middle } else { &bytes });
            }
        }
        fs::write(store.path(name), tar.end()).unwrap();
        store.ok(&["import", name, &store.arg(name), "--size", SIZE]);
        whole_disk(&store, name)
    };
    let before = tar("before", &[1; 40_000]);
    let chunks: HashSet<&[u8]> = before.chunks(CHUNK).collect();
    for (name, middle, most) in [
        ("changed", vec![2; 40_000], 1),
        // The chunks of its directory, and what says where everything lies.
        ("grown", vec![1; 50_000], 24),
    ] {
        let after = tar(name, &middle);
        let others = after.chunks(CHUNK).filter(|chunk| !chunks.contains(chunk));
        let others = others.count();
        assert!((1..=most).contains(&others), "{name}: {others} chunks");
    }
}

#[test]
fn bitmaps_are_written_where_as_much_was_freed_as_taken() {
    let store = TestStore::new();
    let import = |name: &str, below: &[&str], tar: Tar| {
        fs::write(store.path(name), tar.end()).unwrap();
        let source = store.arg(name);
        let mut args = vec!["import", name, &source, "--format", "tar"];
        args.extend(below);
        store.ok(&args);
        whole_disk(&store, name);
    };
    let three = ["a", "b", "c"].iter();
    let three = three.fold(Tar::new(), |tar, name| tar.file(name, name));
    import("three", &["--size", SIZE], three);
    import("two", &["--from", "three"], Tar::new().file(".wh.a", ""));
    // It gets what was of the first: lower numbers than it had.
    import("other", &["--from", "two"], Tar::new().file("c", "other"));
}

/// Contents are kept beside the file system while it is filled. One of another form is not laid out, so they go into
/// it after all.
#[test]
fn a_file_system_that_cannot_be_laid_out_gets_the_contents_of_all_its_files() {
    let store = TestStore::new();
    shell(
        store.dir.path(),
        r#"mkdir tree old new; echo base > tree/base
        truncate -s 64M disk.raw; mke2fs -q -t ext4 -O ^metadata_csum,^64bit -d tree disk.raw
        head -c 300000 /dev/urandom > old/replaced; ln old/replaced old/linked
        cp old/replaced kept; echo new > new/replaced
        truncate -s 20M new/sparse; echo in the middle | dd of=new/sparse bs=1M seek=9 conv=notrunc status=none
        mkdir -p old/gone new/gone; echo x > old/gone/x; : > new/empty
        echo able > old/able; setcap cap_net_raw+ep old/able; echo held > old/number; mkfifo new/number
        touch -d '2001-02-03 04:05:06' old/replaced new/sparse
        tar --xattrs --xattrs-include='*' -C old -cf more.tar replaced linked gone able number
        tar -C new -S -rf more.tar number replaced sparse empty"#,
    );
    store.ok(&["import", "disk", &store.arg("disk.raw")]);
    let output = store.output(&["import", "app", &store.arg("more.tar"), "--from", "disk"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("stays as the kernel wrote it"), "{said}");
    store.ok(&["create", "app", "--name", "c"]);
    let dir = store.mount("c");
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    let kept = fs::read(store.path("kept")).unwrap();
    assert!(read("linked") == kept, "the name that is left");
    assert_eq!(read("replaced"), b"new\n");
    assert_eq!(read("base"), b"base\n");
    assert_eq!(read("gone/x"), b"x\n");
    assert_eq!(read("empty"), b"");
    assert_eq!(read("able"), b"able\n");
    let able = xattr::get(dir.join("able"), "security.capability").unwrap();
    assert!(able.is_some(), "writing takes it away");
    let number = fs::symlink_metadata(dir.join("number")).unwrap();
    assert!(number.file_type().is_fifo(), "{number:?}");
    let sparse = read("sparse");
    assert!(sparse == fs::read(store.path("new/sparse")).unwrap());
    for name in ["linked", "sparse"] {
        let times = fs::metadata(dir.join(name)).unwrap();
        assert_eq!(times.mtime(), 981_173_106, "{name}");
    }
    let blocks = fs::metadata(dir.join("sparse")).unwrap().blocks();
    assert!(blocks < 1000, "its holes are holes: {blocks}");
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

/// Numbers of inodes are used again at once, also for files of another kind.
#[test]
fn a_link_in_the_place_of_a_file_has_nothing_of_its_content() {
    let store = TestStore::new();
    let target = format!("/{}", "long/".repeat(30));
    let link = format!("ln -s {target} new/a; ln -s short new/b");
    shell(
        store.dir.path(),
        &format!(
            "mkdir old new; echo content > old/a; echo more > old/b; {link}
             tar -C old -cf x.tar a b; tar -C new -rf x.tar a b"
        ),
    );
    store.ok(&["import", "x", &store.arg("x.tar"), "--size", SIZE]);
    store.look("x", |dir| {
        let read = |name: &str| fs::read_link(dir.join(name)).unwrap();
        assert_eq!(read("a").to_str(), Some(&target[..]));
        assert_eq!(read("b").to_str(), Some("short"));
    });
}
