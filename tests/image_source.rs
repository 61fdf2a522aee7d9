//! Sources of every shape, made by the tools that people have.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod image_support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use image_support::{Snapshot, Tar, assert_same, need_root, run, shell, snapshot};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::{TempDir, tempdir};
use vellum::ErrorKind;
use vellum::image::{
    ApplyOptions, Compression, Image, ImageConfig, OciWriter, Source, SourceOptions, apply_layer,
    chain_ids,
};

/// An image of three layers with a config, made with umoci; and the tree it should unpack to.
struct Fixture {
    work: TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        need_root();
        let work = tempdir().unwrap();
        shell(
            work.path(),
            r#"
            umoci init --layout layout
            umoci new --image layout:app
            umoci unpack --image layout:app bundle
            mkdir -p bundle/rootfs/etc bundle/rootfs/usr/bin
            echo one > bundle/rootfs/etc/one; echo two > bundle/rootfs/etc/two
            cp /bin/true bundle/rootfs/usr/bin/tool; chmod 4755 bundle/rootfs/usr/bin/tool
            ln -s usr/bin bundle/rootfs/bin
            umoci repack --image layout:app bundle; rm -rf bundle
            umoci unpack --image layout:app bundle
            rm bundle/rootfs/etc/one; ln bundle/rootfs/etc/two bundle/rootfs/etc/three
            umoci repack --image layout:app bundle; rm -rf bundle
            umoci unpack --image layout:app bundle
            rm -r bundle/rootfs/etc; mkdir bundle/rootfs/etc; echo new > bundle/rootfs/etc/new
            chown 1000:1000 bundle/rootfs/etc/new
            umoci repack --image layout:app bundle; rm -rf bundle
            umoci config --image layout:app --config.env A=b --config.cmd run \
                --config.entrypoint /bin/tool --config.workingdir /etc --config.user 1000 \
                --config.label key=value --config.exposedports 80/tcp \
                --config.stopsignal SIGINT
            umoci unpack --image layout:app expected
            umoci gc --layout layout
            "#,
        );
        Fixture { work }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn options(&self) -> SourceOptions {
        SourceOptions::new(self.work.path())
    }

    fn expected(&self) -> Snapshot {
        without_root(snapshot(&self.path("expected/rootfs")))
    }
}

fn without_root(mut snapshot: Snapshot) -> Snapshot {
    snapshot.remove(Path::new(""));
    snapshot
}

fn open_image(path: &Path, options: &SourceOptions) -> Image {
    match Source::open(path, options).unwrap() {
        Source::Image(image) => *image,
        other => panic!("{path:?} is {other:?}"),
    }
}

fn unpack(image: &Image) -> Snapshot {
    let root = tempdir().unwrap();
    for index in 0..image.layers().len() {
        let layer = image.open_layer(index, None).unwrap();
        apply_layer(layer, root.path(), &ApplyOptions::layer()).unwrap();
    }
    without_root(snapshot(root.path()))
}

fn error_of(path: &Path, options: &SourceOptions) -> (ErrorKind, String) {
    let error = Source::open(path, options).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn an_oci_layout_unpacks_to_what_umoci_unpacks() {
    let fixture = Fixture::new();
    let image = open_image(&fixture.path("layout"), &fixture.options());
    assert_eq!(image.names(), ["app"]);
    assert_same(&fixture.expected(), &unpack(&image));
    assert_eq!(image.layers().len(), 3);
    assert_eq!(image.diff_ids().len(), 3);
    let config = image.config();
    assert!(config.config.env.contains(&"A=b".to_owned()));
    assert_eq!(config.config.cmd, ["run"]);
    assert_eq!(config.config.entrypoint, ["/bin/tool"]);
    assert_eq!(config.config.working_dir, "/etc");
    assert_eq!(config.config.user, "1000");
    assert_eq!(config.config.labels["key"], "value");
    assert!(config.config.exposed_ports.contains_key("80/tcp"));
    assert_eq!(config.config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(
        (&config.os[..], config.architecture.is_empty()),
        ("linux", false)
    );
    let made: Vec<_> = config
        .history_steps(3)
        .into_iter()
        .filter_map(|step| step.layer)
        .collect();
    assert_eq!(made, [0, 1, 2]);
    // An image whose configuration alone changed still counts its steps.
    assert!(
        config
            .history_steps(3)
            .iter()
            .any(|step| step.layer.is_none())
    );
}

#[test]
fn every_form_of_the_same_image_gives_the_same_layers_and_tree() {
    let fixture = Fixture::new();
    let layout = format!("oci:{}:app", fixture.path("layout").display());
    let original = open_image(&fixture.path("layout"), &fixture.options());
    let copy = |to: &str| {
        let arguments = ["copy", "--insecure-policy", "-q", &layout, to];
        run("skopeo", &arguments);
    };
    let at = |name: &str| fixture.path(name).display().to_string();
    copy(&format!("oci-archive:{}:named", at("oci.tar")));
    copy(&format!("docker-archive:{}:app:1.0", at("docker.tar")));
    shell(
        fixture.work.path(),
        "gzip -k oci.tar; zstd -q oci.tar; gzip -k docker.tar; zstd -q docker.tar -o whatever.png
         mkdir loose; tar -C loose -xf docker.tar",
    );
    for name in [
        "oci.tar",
        "oci.tar.gz",
        "oci.tar.zst",
        "docker.tar",
        "docker.tar.gz",
        "whatever.png",
    ] {
        let image = open_image(&fixture.path(name), &fixture.options());
        assert_eq!(image.diff_ids(), original.diff_ids(), "{name}");
        assert_eq!(image.config().config, original.config().config, "{name}");
        assert_same(&fixture.expected(), &unpack(&image));
    }
    let docker = open_image(&fixture.path("docker.tar"), &fixture.options());
    assert_eq!(docker.names(), ["docker.io/library/app:1.0"]);
    assert_eq!(docker.layers()[0].digest, None);
}

#[test]
fn a_pipe_is_read_whole_and_told_by_its_content() {
    let fixture = Fixture::new();
    let layout = format!("oci:{}:app", fixture.path("layout").display());
    let archive = format!("oci-archive:{}:x", fixture.path("oci.tar").display());
    run(
        "skopeo",
        &["copy", "--insecure-policy", "-q", &layout, &archive],
    );
    shell(
        fixture.work.path(),
        "tar -C expected/rootfs --xattrs -cf rootfs.tar .; mkfifo pipe",
    );
    for (name, is_image) in [("oci.tar", true), ("rootfs.tar", false)] {
        let (from, pipe) = (fixture.path(name), fixture.path("pipe"));
        let to = pipe.clone();
        let feeder = std::thread::spawn(move || {
            let data = fs::read(from).unwrap();
            // The reader may be done before the padding at the end.
            let _ = fs::OpenOptions::new()
                .write(true)
                .open(to)
                .unwrap()
                .write_all(&data);
        });
        let tree = match Source::open(&pipe, &fixture.options()).unwrap() {
            Source::Image(image) => {
                assert!(is_image);
                unpack(&image)
            }
            Source::Tar(tar) => {
                assert!(!is_image);
                assert_eq!(tar.size(), None);
                let root = tempdir().unwrap();
                let tar = tar.into_reader(None).unwrap();
                apply_layer(tar, root.path(), &ApplyOptions::rootfs()).unwrap();
                without_root(snapshot(root.path()))
            }
            other => panic!("{name} is {other:?}"),
        };
        feeder.join().unwrap();
        assert_same(&fixture.expected(), &tree);
    }
}

#[test]
fn tars_are_told_by_magic_whatever_their_name_and_compression() {
    need_root();
    let work = tempdir().unwrap();
    shell(
        work.path(),
        r#"
        mkdir tree; echo data > tree/file; head -c 300000 /dev/urandom > tree/random
        tar -C tree -cf plain.jpg .
        gzip -c plain.jpg > packed.tar; zstd -q plain.jpg -o packed.exe
        head -c 51200 plain.jpg | gzip > members; tail -c +51201 plain.jpg | gzip >> members
        tar -C tree --format=v7 -cf old .
        "#,
    );
    let options = SourceOptions::new(work.path());
    for (name, compression) in [
        ("plain.jpg", Compression::None),
        ("packed.tar", Compression::Gzip),
        ("packed.exe", Compression::Zstd),
        ("members", Compression::Gzip),
        ("old", Compression::None),
    ] {
        let path = work.path().join(name);
        let Source::Tar(tar) = Source::open(&path, &options).unwrap() else {
            panic!("{name} is no tar");
        };
        assert_eq!(tar.compression(), compression, "{name}");
        let size = fs::metadata(&path).unwrap().len();
        assert_eq!(tar.size(), Some(size), "{name}");
        let seen = Arc::new(AtomicU64::new(0));
        let counter = seen.clone();
        let progress: vellum::image::Progress<'static> = Box::new(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        let root = tempdir().unwrap();
        let reader = tar.into_reader(Some(progress)).unwrap();
        apply_layer(reader, root.path(), &ApplyOptions::rootfs()).unwrap();
        assert_eq!(seen.load(Ordering::Relaxed), size, "{name}");
        let (one, two) = (work.path().join("tree/random"), root.path().join("random"));
        assert!(fs::read(one).unwrap() == fs::read(two).unwrap(), "{name}");
    }
}

#[test]
fn a_directory_is_a_root_filesystem_unless_it_says_otherwise() {
    let work = tempdir().unwrap();
    shell(
        work.path(),
        "mkdir root bundle bundle/rootfs dir; touch bundle/config.json dir/manifest.json dir/version",
    );
    let options = SourceOptions::new(work.path());
    let root = work.path().join("root");
    assert!(matches!(
        Source::open(&root, &options).unwrap(),
        Source::Directory(path) if path == root
    ));
    let (kind, message) = error_of(&work.path().join("bundle"), &options);
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(message.contains("rootfs"), "{message}");
    let (kind, message) = error_of(&work.path().join("dir"), &options);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(message.contains("skopeo copy"), "{message}");
}

#[test]
fn disk_images_are_told_by_their_superblock() {
    let work = tempdir().unwrap();
    let file = |name: &str, size: u64, parts: &[(u64, &[u8])]| {
        let path = work.path().join(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in parts {
            file.write_all_at(bytes, *at).unwrap();
        }
        path
    };
    let ext4 = work.path().join("ext4");
    run(
        "mke2fs",
        &["-q", "-t", "ext4", ext4.to_str().unwrap(), "2M"],
    );
    let options = SourceOptions::new(work.path());
    for (path, filesystem, partitioned) in [
        (ext4, Some("ext4"), false),
        (file("xfs", 1 << 20, &[(0, b"XFSB")]), Some("xfs"), false),
        (
            file("btrfs", 1 << 20, &[(0x10040, b"_BHRfS_M")]),
            Some("btrfs"),
            false,
        ),
        (
            file("gpt", 1 << 20, &[(510, &[0x55, 0xaa]), (512, b"EFI PART")]),
            None,
            true,
        ),
        (file("blank", 1 << 20, &[]), None, false),
        (file("noise", 1024, &[(0, &[7; 600])]), None, false),
    ] {
        let Source::Raw(raw) = Source::open(&path, &options).unwrap() else {
            panic!("{path:?} is not raw");
        };
        assert_eq!(raw.filesystem, filesystem, "{path:?}");
        assert_eq!(raw.partitioned, partitioned, "{path:?}");
        assert_eq!(raw.size, fs::metadata(&path).unwrap().len());
    }
}

#[test]
fn what_cannot_be_imported_is_named_with_what_helps() {
    let work = tempdir().unwrap();
    let write = |name: &str, data: &[u8]| {
        let path = work.path().join(name);
        fs::write(&path, data).unwrap();
        path
    };
    shell(
        work.path(),
        "head -c 4096 /dev/zero | gzip > zeros; printf x > x; printf 'hello' | gzip > text",
    );
    let mut qcow = vec![0; 65536];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    let options = SourceOptions::new(work.path());
    for (path, kind, text) in [
        (write("empty", b""), ErrorKind::InvalidInput, "empty"),
        (
            write("qcow2", &qcow),
            ErrorKind::Unsupported,
            "qemu-img convert -f qcow2",
        ),
        (
            write("xz", b"\xfd7zXZ\0\0\0"),
            ErrorKind::Unsupported,
            "xz -d",
        ),
        (
            write("text", b"hello world"),
            ErrorKind::Unsupported,
            "neither a tar",
        ),
        (work.path().join("missing"), ErrorKind::NotFound, "missing"),
        (PathBuf::from("/dev/null"), ErrorKind::InvalidInput, "empty"),
    ] {
        let (actual, message) = error_of(&path, &options);
        assert_eq!(actual, kind, "{message}");
        assert!(message.contains(text), "{message}");
        assert!(
            message.contains(path.file_name().unwrap().to_str().unwrap()),
            "{message}"
        );
    }
    let zeros = Source::open(&work.path().join("zeros"), &options).unwrap();
    assert!(matches!(zeros, Source::Tar(_)), "{zeros:?}");
    fs::write(work.path().join("z"), [0u8; 20480]).unwrap();
    shell(work.path(), "gzip z; printf hello | gzip > hello");
    for name in ["z.gz", "hello"] {
        let (kind, message) = error_of(&work.path().join(name), &options);
        assert_eq!(kind, ErrorKind::Unsupported);
        assert!(message.contains("does not hold a tar"), "{message}");
    }
}

// Several images and platforms.

struct Layout {
    directory: TempDir,
}

impl Layout {
    fn new() -> Layout {
        let directory = tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(
            directory.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Layout { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn blob(&self, media_type: &str, data: &[u8]) -> Value {
        let digest = Sha256::digest(data)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        fs::write(self.path().join("blobs/sha256").join(&digest), data).unwrap();
        json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len()})
    }

    fn json(&self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    /// An image for a machine, with one layer that holds the file `mark`.
    fn image(&self, architecture: &str, mark: &str) -> Value {
        let tar = Tar::new().file(mark, "").end();
        let layer = self.blob("application/vnd.oci.image.layer.v1.tar", &tar);
        let config = self.json(
            "application/vnd.oci.image.config.v1+json",
            &json!({"architecture": architecture, "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}),
        );
        self.json(
            MANIFEST,
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config,
                "layers": [layer]}),
        )
    }

    fn index(&self, manifests: &[Value]) -> Value {
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})
    }

    fn finish(&self, manifests: &[Value]) {
        let index = self.index(manifests).to_string();
        fs::write(self.path().join("index.json"), index).unwrap();
    }

    fn options(&self) -> SourceOptions {
        SourceOptions::new(self.path())
    }

    fn open(&self, image: Option<&str>, platform: Option<&str>) -> vellum::Result<String> {
        let mut options = self.options();
        options.image = image.map(String::from);
        options.platform = platform.map(|text| text.parse().unwrap());
        match Source::open(self.path(), &options)? {
            Source::Image(image) => Ok(image.config().architecture.clone()),
            other => panic!("{other:?}"),
        }
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
    descriptor[key] = value;
    descriptor
}

fn for_platform(descriptor: Value, architecture: &str) -> Value {
    let platform = json!({"os": "linux", "architecture": architecture});
    with(descriptor, "platform", platform)
}

fn named(descriptor: Value, name: &str) -> Value {
    let name = json!({"org.opencontainers.image.ref.name": name});
    with(descriptor, "annotations", name)
}

#[test]
fn an_index_gives_the_image_for_the_platform_asked_for() {
    let layout = Layout::new();
    let inner = layout.index(&[
        for_platform(layout.image("amd64", "a"), "amd64"),
        for_platform(layout.image("s390x", "z"), "s390x"),
        with(
            layout.image("unknown", "attestation"),
            "platform",
            json!({"os": "unknown", "architecture": "unknown"}),
        ),
    ]);
    let inner = layout.json(INDEX, &inner);
    let middle = layout.json(INDEX, &layout.index(&[inner]));
    layout.finish(&[middle]);
    for platform in ["linux/amd64", "linux/s390x"] {
        let architecture = layout.open(None, Some(platform)).unwrap();
        assert_eq!(format!("linux/{architecture}"), platform);
    }
    let error = layout.open(None, Some("linux/riscv64")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(text.contains("linux/amd64, linux/s390x"), "{text}");
    assert!(!text.contains("unknown"), "{text}");
}

#[test]
fn manifests_without_a_platform_are_told_by_their_configuration() {
    let layout = Layout::new();
    layout.finish(&[layout.image("amd64", "a"), layout.image("s390x", "z")]);
    assert_eq!(layout.open(None, Some("linux/s390x")).unwrap(), "s390x");
    // A lone image for another machine can be stored all the same.
    layout.finish(&[layout.image("s390x", "z")]);
    assert_eq!(layout.open(None, None).unwrap(), "s390x");
    assert!(layout.open(None, Some("linux/amd64")).is_err());
}

#[test]
fn one_of_several_images_is_chosen_by_name() {
    let layout = Layout::new();
    layout.finish(&[
        named(layout.image("amd64", "a"), "first"),
        named(layout.image("s390x", "z"), "second"),
    ]);
    assert_eq!(layout.open(Some("second"), None).unwrap(), "s390x");
    for name in [None, Some("third")] {
        let text = layout.open(name, None).unwrap_err().to_string();
        assert!(text.contains("first, second"), "{text}");
    }
}

#[test]
fn one_of_several_docker_images_is_chosen_by_name() {
    need_root();
    let config = |mark: &str| {
        json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": [mark]},
            "rootfs": {"type": "layers", "diff_ids": []}})
        .to_string()
    };
    let manifest = json!([
        {"Config": "a.json", "RepoTags": ["one:1", "one:latest"], "Layers": []},
        {"Config": "b.json", "RepoTags": ["two:latest"], "Layers": []},
    ]);
    let archive = Tar::new()
        .file("a.json", &config("one"))
        .file("b.json", &config("two"))
        .file("manifest.json", &manifest.to_string())
        .end();
    let work = tempdir().unwrap();
    let path = work.path().join("archive");
    fs::write(&path, archive).unwrap();
    let mut options = SourceOptions::new(work.path());
    let (kind, message) = error_of(&path, &options);
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(
        message.contains("one:1, one:latest, two:latest"),
        "{message}"
    );
    for (name, cmd) in [("two", "two"), ("one:1", "one")] {
        options.image = Some(name.into());
        assert_eq!(open_image(&path, &options).config().config.cmd, [cmd]);
    }
}

#[test]
fn an_index_that_names_itself_or_nests_without_end_is_an_error() {
    let layout = Layout::new();
    // A digest cannot be that of a document which contains it: what claims to be is damaged.
    let own = format!("sha256:{}", "a".repeat(64));
    let cyclic = json!({"mediaType": INDEX, "digest": own, "size": 1});
    let index = layout.index(std::slice::from_ref(&cyclic)).to_string();
    fs::write(
        layout.path().join("blobs/sha256").join("a".repeat(64)),
        &index,
    )
    .unwrap();
    layout.finish(&[cyclic]);
    assert_eq!(
        layout.open(None, None).unwrap_err().kind(),
        ErrorKind::Corrupt
    );

    let mut descriptor = layout.image("amd64", "a");
    for _ in 0..12 {
        descriptor = layout.json(INDEX, &layout.index(&[descriptor]));
    }
    layout.finish(&[descriptor]);
    let error = layout.open(None, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[test]
fn artifacts_and_foreign_layers_are_named() {
    let layout = Layout::new();
    let empty = layout.blob("application/vnd.cncf.helm.config.v1+json", b"{}");
    let chart = json!({"schemaVersion": 2, "config": empty, "layers": []});
    layout.finish(&[layout.json(MANIFEST, &chart)]);
    let error = layout.open(None, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("helm"), "{error}");
}

// Damage.

#[test]
fn a_changed_layer_is_found_out_before_its_end_is_reported() {
    let fixture = Fixture::new();
    let original = open_image(&fixture.path("layout"), &fixture.options());
    let digest = original.layers()[0].digest.clone().unwrap();
    let blob = fixture
        .path("layout/blobs/sha256")
        .join(digest.trim_start_matches("sha256:"));
    let good = fs::read(&blob).unwrap();
    // Another valid gzip of another tar: only the digest tells.
    let mut other = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    other
        .write_all(&Tar::new().file("evil", "x").end())
        .unwrap();
    let mut other = other.finish().unwrap();
    assert!(other.len() < good.len());
    other.resize(good.len(), 0);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bad in [other, flipped] {
        fs::write(&blob, &bad).unwrap();
        let image = open_image(&fixture.path("layout"), &fixture.options());
        let root = tempdir().unwrap();
        let layer = image.open_layer(0, None).unwrap();
        let error = apply_layer(layer, root.path(), &ApplyOptions::layer()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    fs::write(&blob, &good[..good.len() - 1]).unwrap();
    let image = open_image(&fixture.path("layout"), &fixture.options());
    let error = image.open_layer(0, None).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(
        error.to_string().contains("bytes where the manifest says"),
        "{error}"
    );
    fs::remove_file(&blob).unwrap();
    let error = image.open_layer(0, None).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(image.open_layer(9, None).is_err());
}

#[test]
fn a_changed_manifest_or_configuration_is_corrupt() {
    let fixture = Fixture::new();
    let index = fs::read(fixture.path("layout/index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    let path = fixture
        .path("layout/blobs/sha256")
        .join(digest.trim_start_matches("sha256:"));
    let mut manifest = fs::read(&path).unwrap();
    manifest.push(b' ');
    fs::write(&path, manifest).unwrap();
    let (kind, message) = error_of(&fixture.path("layout"), &fixture.options());
    assert_eq!(kind, ErrorKind::Corrupt);
    assert!(message.contains(digest), "{message}");
}

#[test]
fn cut_off_archives_of_images_are_corrupt() {
    let fixture = Fixture::new();
    let layout = format!("oci:{}:app", fixture.path("layout").display());
    let archive = fixture.path("docker.tar");
    let to = format!("docker-archive:{}:a:b", archive.display());
    run("skopeo", &["copy", "--insecure-policy", "-q", &layout, &to]);
    let whole = fs::read(&archive).unwrap();
    fs::write(&archive, &whole[..2000]).unwrap();
    let (kind, message) = error_of(&archive, &fixture.options());
    assert_eq!(kind, ErrorKind::Corrupt, "{message}");
    assert!(message.contains("cut off"), "{message}");
}

// The way back.

#[test]
fn what_is_written_reads_back_and_skopeo_and_umoci_take_it() {
    need_root();
    let work = tempdir().unwrap();
    let layers = [
        Tar::new()
            .dir("etc")
            .file("etc/a", "a")
            .file("etc/b", "b")
            .end(),
        Tar::new().dir("etc").file("etc/.wh.a", "").end(),
    ];
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let mut config = ImageConfig::for_host();
        config.config.cmd = vec!["/etc/b".into()];
        let build = || {
            let mut writer = OciWriter::new(work.path(), compression).unwrap();
            for layer in &layers {
                writer
                    .add_layer(|out| {
                        out.write_all(layer).unwrap();
                        Ok(())
                    })
                    .unwrap();
            }
            writer
        };
        let archive = work.path().join(format!("archive-{compression:?}"));
        let file = fs::File::create(&archive).unwrap();
        let digest = build()
            .write_archive(config.clone(), Some("app:1.2"), file)
            .unwrap();
        let layout = work.path().join(format!("layout-{compression:?}"));
        let same = build()
            .write_layout(config.clone(), Some("app:1.2"), &layout)
            .unwrap();
        assert_eq!(digest, same);
        let taken = build().write_layout(config.clone(), None, &layout);
        assert_eq!(taken.unwrap_err().kind(), ErrorKind::AlreadyExists);

        let mut options = SourceOptions::new(work.path());
        for name in [
            None,
            Some("app:1.2"),
            Some("1.2"),
            Some("docker.io/library/app:1.2"),
        ] {
            options.image = name.map(String::from);
            let image = open_image(&archive, &options);
            assert_eq!(image.config().config, config.config);
            assert_eq!(
                unpack(&image).keys().collect::<Vec<_>>(),
                [Path::new("etc"), Path::new("etc/b")]
            );
            let expected: Vec<String> = layers
                .iter()
                .map(|layer| {
                    let sum = Sha256::digest(layer);
                    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
                    format!("sha256:{hex}")
                })
                .collect();
            assert_eq!(image.diff_ids(), expected);
            assert_eq!(chain_ids(image.diff_ids()).len(), 2);
        }
        for source in [
            format!("oci-archive:{}", archive.display()),
            format!("oci:{}:1.2", layout.display()),
        ] {
            let inspected = run("skopeo", &["inspect", "--no-tags", &source]);
            let inspected: Value = serde_json::from_str(&inspected).unwrap();
            assert_eq!(inspected["Digest"], digest.as_str(), "{source}");
            assert_eq!(inspected["Layers"].as_array().unwrap().len(), 2);
        }
        if compression != Compression::Zstd {
            // Debian 12's umoci does not know zstd.
            let bundle = work.path().join(format!("bundle-{compression:?}"));
            let source = format!("{}:1.2", layout.display());
            run(
                "umoci",
                &["unpack", "--image", &source, bundle.to_str().unwrap()],
            );
            assert!(bundle.join("rootfs/etc/b").exists());
            assert!(!bundle.join("rootfs/etc/a").exists());
        }
    }
    // Nothing of the spool is left.
    let left = fs::read_dir(work.path())
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().starts_with(".tmp")
        })
        .count();
    assert_eq!(left, 0);
}

#[test]
fn a_layer_read_piece_by_piece_ends_only_after_the_check() {
    let fixture = Fixture::new();
    let image = open_image(&fixture.path("layout"), &fixture.options());
    let mut reader = image.open_layer(0, None).unwrap();
    let mut hasher = Sha256::new();
    let mut buffer = [0; 777];
    loop {
        let count = reader.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    let digest: String = hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(image.diff_ids()[0], format!("sha256:{digest}"));
    assert_eq!(reader.read(&mut buffer).unwrap(), 0);
}
