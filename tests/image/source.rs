//! Sources of every shape, made by the tools that people have.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image_support::{Snapshot, Tar, assert_same, need_root, run, shell, snapshot};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::{TempDir, tempdir};
use vellum_base::ErrorKind;
use vellum_image::{
    ApplyOptions, Compression, Format, Holds, Image, ImageConfig, OciWriter, Platform, Source,
    SourceOptions, apply_layer, chain_ids,
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
        let progress: vellum_image::Progress<'static> = Box::new(move |bytes| {
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
        "mkdir root bundle bundle/rootfs dir web
         echo '{\"ociVersion\":\"1.0.2\"}' > bundle/config.json
         touch dir/manifest.json; echo 'Directory Transport Version: 1.1' > dir/version
         echo '{\"name\":\"App\"}' > web/manifest.json; echo 1.2 > web/version
         mkdir web/rootfs; echo '{}' > web/config.json",
    );
    let options = SourceOptions::new(work.path());
    let root = work.path().join("root");
    for root in [root, work.path().join("web")] {
        assert!(matches!(
            Source::open(&root, &options).unwrap(),
            Source::Directory(path) if path == root
        ));
    }
    let (kind, message) = error_of(&work.path().join("bundle"), &options);
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(message.contains("rootfs"), "{message}");
    let (kind, message) = error_of(&work.path().join("dir"), &options);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(message.contains("skopeo copy"), "{message}");
}

/// A first sector with one partition of a megabyte.
fn mbr(kind: u8) -> Vec<u8> {
    let mut sector = vec![0; 512];
    let entry = [0, 0, 2, 0, kind, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0];
    sector[446..462].copy_from_slice(&entry);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The beginning of a disk of 5 MiB with an empty GPT (UEFI specification, 5.3).
fn gpt() -> Vec<u8> {
    let last = (5 << 20) / 512 - 1_u64;
    let entries = vec![0; 128 * 128];
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    for (at, value) in [(24, 1), (32, last), (40, 34), (48, last - 33), (72, 2)] {
        header[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    header[56..72].fill(9);
    for (at, value) in [(80, 128), (84, 128), (88, crc32fast::hash(&entries))] {
        header[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    let sum = crc32fast::hash(&header[..92]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    [mbr(0xee), header, entries].concat()
}

#[test]
fn disk_images_are_told_by_what_they_show() {
    need_root();
    let work = tempdir().unwrap();
    shell(
        work.path(),
        "truncate -s 2M ext2 ext3 ext4 blank swap; truncate -s 512 tiny
         for kind in ext2 ext3 ext4; do mke2fs -q -t $kind $kind; done
         mkswap -q swap 2>/dev/null || mkswap swap >/dev/null 2>&1
",
    );
    for (name, table) in [("gpt", gpt()), ("dos", mbr(0x83))] {
        let file = fs::File::create(work.path().join(name)).unwrap();
        file.set_len(5 << 20).unwrap();
        file.write_all_at(&table, 0).unwrap();
    }
    let options = SourceOptions::new(work.path());
    let file_system = |name: &str| Holds::FileSystem(name.into());
    for (name, holds) in [
        ("ext2", file_system("ext2")),
        ("ext3", file_system("ext3")),
        ("ext4", file_system("ext4")),
        ("gpt", Holds::Partitions("gpt".into())),
        ("dos", Holds::Partitions("dos".into())),
        ("swap", Holds::Other("swap".into())),
        ("blank", Holds::Blank),
        ("tiny", Holds::Blank),
    ] {
        let path = work.path().join(name);
        let Source::Disk(raw) = Source::open(&path, &options).unwrap() else {
            panic!("{path:?} is not raw");
        };
        assert_eq!(raw.holds, Some(holds), "{path:?}");
        assert_eq!(raw.size, fs::metadata(&path).unwrap().len());
    }
}

#[test]
fn a_file_that_shows_no_disk_is_one_only_where_the_user_says_so() {
    let work = tempdir().unwrap();
    shell(
        work.path(),
        "mkdir tree; echo x > tree/x; tar -cf good tree
         cp good damaged; printf ZZZ | dd of=damaged bs=1 seek=2 conv=notrunc 2>/dev/null
         tail -c +1025 good > headless
         { echo '<html>404</html>'; head -c 1007 /dev/zero | tr '\\0' ' '; } > page
         (find tree | cpio -o -H newc 2>/dev/null) > archive.cpio
         head -c 65536 /dev/urandom > noise; printf '\\001' | dd of=noise bs=1 seek=510 conv=notrunc 2>/dev/null",
    );
    let mut options = SourceOptions::new(work.path());
    for (name, kind, text) in [
        ("damaged", ErrorKind::Corrupt, "damaged"),
        ("headless", ErrorKind::Unsupported, "--format raw"),
        ("page", ErrorKind::Unsupported, "--format raw"),
        ("archive.cpio", ErrorKind::Unsupported, "--format raw"),
        ("noise", ErrorKind::Unsupported, "--format raw"),
    ] {
        let path = work.path().join(name);
        assert_eq!(fs::metadata(&path).unwrap().len() % 512, 0, "{name}");
        let (actual, message) = error_of(&path, &options);
        assert_eq!(actual, kind, "{message}");
        assert!(message.contains(text), "{message}");
    }
    options.format = Some(Format::Raw);
    for name in ["damaged", "page", "noise", "good"] {
        let opened = Source::open(&work.path().join(name), &options).unwrap();
        assert!(
            matches!(opened, Source::Disk(raw) if raw.holds.is_none()),
            "{name}"
        );
    }
    fs::write(work.path().join("odd"), [7; 600]).unwrap();
    let (_, message) = error_of(&work.path().join("odd"), &options);
    assert!(message.contains("truncate -s %512"), "{message}");
}

#[test]
fn disk_images_of_other_formats_are_refused_by_name_with_the_command_that_helps() {
    let work = tempdir().unwrap();
    shell(
        work.path(),
        "truncate -s 1M disk; mke2fs -q disk
         for f in qcow vmdk vpc vhdx vdi qed parallels; do
             qemu-img convert -O $f disk disk.$f
         done
         qemu-img convert -O vpc -o subformat=fixed,force_size=on disk fixed.vpc
         truncate -s 64K cowd; printf COWD | dd of=cowd conv=notrunc 2>/dev/null
         cp disk.vmdk x.vmdk; echo '<Envelope/>' > x.ovf; tar -cf x.ova x.ovf x.vmdk",
    );
    let options = SourceOptions::new(work.path());
    for (name, format) in [
        ("disk.qcow", "qcow"),
        ("disk.vmdk", "vmdk"),
        ("disk.vpc", "vpc"),
        ("fixed.vpc", "vpc"),
        ("disk.vhdx", "vhdx"),
        ("disk.vdi", "vdi"),
        ("disk.qed", "qed"),
        ("disk.parallels", "parallels"),
        ("cowd", "vmdk"),
    ] {
        let (kind, message) = error_of(&work.path().join(name), &options);
        assert_eq!(kind, ErrorKind::Unsupported, "{name}: {message}");
        let command = format!("qemu-img convert -f {format} -O raw");
        assert!(message.contains(&command), "{name}: {message}");
    }
    let (_, message) = error_of(&work.path().join("x.ova"), &options);
    assert!(
        message.contains("OVA") && message.contains("tar -xf"),
        "{message}"
    );
}

/// A tar of a Docker archive: its configuration as `c.json`, and whatever else.
struct DockerTar {
    layers: Vec<(String, Vec<u8>)>,
}

impl DockerTar {
    /// With a layer for each name, which holds the file that is named like its index.
    fn new(names: &[&str]) -> Self {
        let layer = |(index, name): (usize, &&str)| {
            let tar = Tar::new().file(&format!("f{index}"), "x").end();
            ((*name).to_owned(), tar)
        };
        DockerTar {
            layers: names.iter().enumerate().map(layer).collect(),
        }
    }

    fn config(&self) -> String {
        let ids: Vec<String> = self.layers.iter().map(|(_, tar)| digest_of(tar)).collect();
        json!({"architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": ids}})
        .to_string()
    }

    fn manifest(&self) -> String {
        let names: Vec<&String> = self.layers.iter().map(|(name, _)| name).collect();
        json!([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": names}]).to_string()
    }

    fn with_layers(&self, mut tar: Tar) -> Tar {
        for (name, layer) in &self.layers {
            tar = tar.bytes(name, layer);
        }
        tar
    }
}

fn digest_of(data: &[u8]) -> String {
    let sum = Sha256::digest(data);
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// What a source is found to be: as a file, compressed, and from a pipe.
fn every_way(work: &Path, name: &str, data: &[u8], options: &SourceOptions) -> Vec<&'static str> {
    fs::write(work.join(name), data).unwrap();
    shell(work, &format!("gzip -kf {name}; rm -f pipe; mkfifo pipe"));
    let what = |path: &Path| match Source::open(path, options) {
        Ok(Source::Image(_)) => "image",
        Ok(Source::Tar(_)) => "tar",
        Ok(Source::Disk(_)) => "raw",
        Ok(Source::Directory(_)) => "directory",
        Ok(Source::Layers(_)) => "layers",
        Err(_) => "error",
    };
    let (file, packed) = (
        what(&work.join(name)),
        what(&work.join(format!("{name}.gz"))),
    );
    let (pipe, data) = (work.join("pipe"), data.to_vec());
    let feeder = std::thread::spawn(move || {
        let mut pipe = fs::OpenOptions::new().write(true).open(pipe).unwrap();
        // The reader may have seen enough before the end.
        let _ = pipe.write_all(&data);
    });
    let piped = what(&work.join("pipe"));
    feeder.join().unwrap();
    vec![file, packed, piped]
}

#[test]
fn what_a_tar_is_does_not_depend_on_names_alone_nor_on_how_it_comes() {
    let work = tempdir().unwrap();
    let options = SourceOptions::new(work.path());
    let web = r#"{"name":"App","icons":[],"start_url":"."}"#;
    let docker = DockerTar::new(&["layers/a.tar", "layers/b.tar"]);
    let (config, manifest) = (docker.config(), docker.manifest());
    let image = || Tar::new().file("c.json", &config);
    for (name, tar, what) in [
        (
            "web",
            Tar::new().file("index.html", "").file("manifest.json", web),
            "tar",
        ),
        (
            "version",
            Tar::new().file("manifest.json", web).file("version", "1"),
            "tar",
        ),
        (
            "list",
            Tar::new().file("manifest.json", r#"[{"file":"a"}]"#),
            "tar",
        ),
        ("flat", Tar::new().file("a", "b"), "tar"),
        ("root", Tar::new().dir("etc").file("etc/passwd", ""), "tar"),
        (
            "root-with-archive-names",
            Tar::new()
                .dir("usr")
                .file("c.json", &config)
                .file("manifest.json", &manifest),
            "tar",
        ),
        (
            "layers-last",
            docker.with_layers(image().file("manifest.json", &manifest)),
            "image",
        ),
        (
            "layers-first",
            docker
                .with_layers(Tar::new())
                .file("c.json", &config)
                .file("manifest.json", &manifest),
            "image",
        ),
        (
            "dots",
            docker.with_layers(
                Tar::new()
                    .file("./c.json", &config)
                    .file("./manifest.json", &manifest),
            ),
            "image",
        ),
        (
            "no-list",
            docker.with_layers(image().file("manifest.json", r#"{"Config":"c.json","Layers":[]}"#)),
            "error",
        ),
        (
            "part-of-a-layout",
            Tar::new().file("oci-layout", "{}").dir("blobs"),
            "error",
        ),
    ] {
        let found = every_way(work.path(), name, &tar.end(), &options);
        assert_eq!(found, [what; 3], "{name}");
    }
}

#[test]
fn a_format_that_is_given_counts_and_one_that_is_not_there_is_refused() {
    let work = tempdir().unwrap();
    let docker = DockerTar::new(&["a.tar"]);
    let tar = docker
        .with_layers(Tar::new().file("c.json", &docker.config()))
        .file("manifest.json", &docker.manifest())
        .end();
    let mut options = SourceOptions::new(work.path());
    for (format, what) in [
        (Format::Tar, ["tar"; 3]),
        (Format::Docker, ["image"; 3]),
        (Format::Oci, ["error"; 3]),
        (Format::Directory, ["error"; 3]),
        // A stream cannot be one; a compressed file is taken as it is.
        (Format::Raw, ["raw", "error", "error"]),
    ] {
        options.format = Some(format);
        assert_eq!(
            every_way(work.path(), "x", &tar, &options),
            what,
            "{format}"
        );
    }
    // The same as a directory.
    shell(
        work.path(),
        "mkdir tree; tar -C tree -xf x; mkdir flat; touch flat/file",
    );
    for (format, tree, flat) in [
        (None, "image", "directory"),
        (Some(Format::Directory), "directory", "directory"),
        (Some(Format::Docker), "image", "error"),
        (Some(Format::Tar), "error", "error"),
        (Some(Format::Raw), "error", "error"),
    ] {
        options.format = format;
        for (name, what) in [("tree", tree), ("flat", flat)] {
            let found = match Source::open(&work.path().join(name), &options) {
                Ok(Source::Image(_)) => "image",
                Ok(Source::Directory(_)) => "directory",
                Ok(other) => panic!("{other:?}"),
                Err(_) => "error",
            };
            assert_eq!(found, what, "{name} as {format:?}");
        }
    }
}

#[test]
fn an_archive_of_docker_before_1_10_is_its_layers_from_the_lowest_on() {
    let work = tempdir().unwrap();
    let (low, high) = ("a".repeat(64), "b".repeat(64));
    let layers = DockerTar::new(&[&format!("{high}/layer.tar"), &format!("{low}/layer.tar")]);
    let json = |id: &str, parent: Option<&str>, cmd: &str| {
        json!({"id": id, "parent": parent, "architecture": "amd64", "os": "linux",
            "created": "2014-01-01T00:00:00Z", "container_config": {"Cmd": ["/bin/sh", "-c", cmd]},
            "config": {"Cmd": ["run"], "Env": null}})
        .to_string()
    };
    let build = |names: Option<&str>, parent: &str| {
        let mut tar = Tar::new();
        for (id, below, cmd) in [(&high, Some(parent), "second"), (&low, None, "first")] {
            tar = tar
                .dir(id)
                .file(&format!("{id}/VERSION"), "1.0")
                .file(&format!("{id}/json"), &json(id, below, cmd));
        }
        tar = layers.with_layers(tar);
        if let Some(names) = names {
            tar = tar.file("repositories", names);
        }
        tar.end()
    };
    let named = json!({"app": {"1.0": high, "old": high}}).to_string();
    let options = SourceOptions::new(work.path());
    for (name, tar) in [
        ("named", build(Some(&named), &low)),
        ("id", build(None, &low)),
    ] {
        assert_eq!(
            every_way(work.path(), name, &tar, &options),
            ["image"; 3],
            "{name}"
        );
        let image = open_image(&work.path().join(name), &options);
        let expected: Vec<String> = layers
            .layers
            .iter()
            .rev()
            .map(|(_, tar)| digest_of(tar))
            .collect();
        assert_eq!(image.diff_ids(), expected);
        assert_eq!(image.config().config.cmd, ["run"]);
        let steps = image.config().history_steps(2);
        assert_eq!(
            steps[0].entry.created_by.as_deref(),
            Some("/bin/sh -c first")
        );
        assert_eq!(steps[1].layer, Some(1));
        need_root();
        let tree = unpack(&image);
        assert!(tree.contains_key(Path::new("f0")) && tree.contains_key(Path::new("f1")));
    }
    let mut wanted = SourceOptions::new(work.path());
    wanted.image = Some("docker.io/library/app:old".into());
    assert_eq!(
        open_image(&work.path().join("named"), &wanted)
            .names()
            .len(),
        2
    );
    for (parent, text) in [
        ("c".repeat(64), "lacks the layer"),
        (high.clone(), "circle"),
    ] {
        let path = work.path().join("bad");
        fs::write(&path, build(Some(&named), &parent)).unwrap();
        let (_, message) = error_of(&path, &wanted);
        assert!(message.contains(text), "{message}");
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

    fn open(&self, image: Option<&str>, platform: Option<&str>) -> vellum_base::Result<String> {
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

#[test]
fn artifacts_beside_an_image_are_passed_over() {
    let config = |layout: &Layout, kind: &str, body: &[u8]| {
        let config = layout.blob(kind, body);
        let layer = layout.blob("text/plain", b"data");
        json!({"schemaVersion": 2, "config": config, "layers": [layer]})
    };
    for (kind, body) in [
        ("application/vnd.oci.empty.v1+json", &b"{}"[..]),
        ("application/vnd.oci.empty.v1+json", b"[]"),
        (
            "application/vnd.cncf.helm.config.v1+json",
            b"{\"name\":\"chart\"}",
        ),
        ("text/plain", b"not json"),
        // A signature of cosign's: the configuration of an image, and layers that are none.
        ("application/vnd.oci.image.config.v1+json", b"{}"),
    ] {
        let layout = Layout::new();
        let artifact = layout.json(MANIFEST, &config(&layout, kind, body));
        let plain = layout.image("s390x", "z");
        for image in [plain.clone(), named(plain, "latest")] {
            layout.finish(&[
                image,
                artifact.clone(),
                named(artifact.clone(), "sha256-1.sig"),
            ]);
            assert_eq!(layout.open(None, None).unwrap(), "s390x", "{kind}");
        }
        // One whose blobs were not copied.
        let digest = artifact["digest"].as_str().unwrap().replace(':', "/");
        fs::remove_file(layout.path().join("blobs").join(digest)).unwrap();
        assert_eq!(layout.open(None, None).unwrap(), "s390x", "{kind}");
    }
    let layout = Layout::new();
    let artifacts = ["1", "2"].map(|body| {
        let kind = "application/vnd.cncf.helm.config.v1+json";
        layout.json(MANIFEST, &config(&layout, kind, body.as_bytes()))
    });
    layout.finish(&artifacts);
    let error = layout.open(None, None).unwrap_err();
    assert!(error.to_string().contains("helm"), "{error}");
}

#[test]
fn images_are_found_by_their_names_in_full_by_digests_and_in_nested_indexes() {
    let layout = Layout::new();
    let inner = layout.index(&[
        named(layout.image("amd64", "a"), "first"),
        named(layout.image("s390x", "z"), "docker.io/library/second:1"),
    ]);
    let nested = layout.json(INDEX, &inner);
    let third = named(layout.image("riscv64", "r"), "third:latest");
    layout.finish(&[nested.clone(), third.clone()]);
    let digest = third["digest"].as_str().unwrap();
    for (name, architecture) in [
        ("first", "amd64"),
        ("second:1", "s390x"),
        ("docker.io/library/second:1", "s390x"),
        ("third", "riscv64"),
        ("docker.io/library/third", "riscv64"),
        (digest, "riscv64"),
        (&format!("third@{digest}"), "riscv64"),
    ] {
        assert_eq!(
            layout.open(Some(name), None).unwrap(),
            architecture,
            "{name}"
        );
    }
    layout.finish(&[nested]);
    let error = layout.open(None, None).unwrap_err().to_string();
    assert!(
        error.contains("first") && error.contains("second:1"),
        "{error}"
    );
}

#[test]
fn of_the_variants_of_a_processor_the_best_that_the_cpu_has_is_taken() {
    let layout = Layout::new();
    let host = Platform::host();
    let for_variant = |variant: Option<&str>, mark: &str| {
        let platform = json!({"os": "linux", "architecture": "amd64", "variant": variant});
        with(layout.image(mark, mark), "platform", platform)
    };
    layout.finish(&[
        for_variant(Some("v4"), "four"),
        for_variant(None, "plain"),
        for_variant(Some("v3"), "three"),
    ]);
    for (platform, taken) in [
        ("linux/amd64", "plain"),
        ("linux/amd64/v2", "plain"),
        ("linux/amd64/v3", "three"),
        ("linux/amd64/v4", "four"),
    ] {
        assert_eq!(
            layout.open(None, Some(platform)).unwrap(),
            taken,
            "{platform}"
        );
    }
    if host.architecture == "amd64" {
        let here = layout.open(None, None).unwrap();
        assert_eq!(here, layout.open(None, Some(&host.to_string())).unwrap());
    }
}

#[test]
fn what_go_writes_for_nothing_is_read_as_skopeo_reads_it() {
    // Where in the documents something is replaced, by what.
    type Change = fn(&mut Value, &mut Value, &mut Value);
    let changes: [(&str, Change); 9] = [
        ("layers", |_, manifest, config| {
            manifest["layers"] = Value::Null;
            config["rootfs"]["diff_ids"] = Value::Null;
        }),
        ("annotations", |index, manifest, _| {
            index["annotations"] = Value::Null;
            manifest["annotations"] = Value::Null;
            manifest["layers"][0]["annotations"] = Value::Null;
            manifest["layers"][0]["urls"] = Value::Null;
        }),
        ("descriptor", |index, _, _| {
            index["manifests"][0]["platform"] = Value::Null;
            index["manifests"][0]["annotations"] = Value::Null;
        }),
        ("platform", |index, _, _| {
            index["manifests"][0]["platform"] = json!({"architecture": "amd64", "os": "linux",
                "variant": "", "os.version": "", "os.features": null, "features": null});
        }),
        ("versions", |index, manifest, _| {
            for document in [index, manifest] {
                let document = document.as_object_mut().unwrap();
                document.remove("schemaVersion");
                document.remove("mediaType");
            }
        }),
        ("labels", |_, _, config| {
            config["config"] = json!({"Labels": {"a": null, "b": "c"}, "Env": null, "Cmd": null,
                "Volumes": {"/data": null}, "ExposedPorts": {"80/tcp": null}});
        }),
        ("config", |_, _, config| {
            config["config"] = Value::Null;
            config["history"] = Value::Null;
            config["created"] = Value::Null;
        }),
        ("history", |_, _, config| {
            config["history"] = json!([{"created": null, "created_by": null, "empty_layer": null}]);
        }),
        ("subject", |_, manifest, _| {
            manifest["subject"] = Value::Null;
            manifest["artifactType"] = json!("");
        }),
    ];
    for (name, change) in changes {
        let layout = Layout::new();
        let layer = Tar::new().file("x", "").end();
        let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", &layer);
        let mut config = json!({"architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}});
        let mut manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [layer]});
        let placeholder = json!({"mediaType": MANIFEST, "digest": "", "size": 0});
        let mut index = layout.index(&[placeholder]);
        change(&mut index, &mut manifest, &mut config);
        manifest["config"] = layout.json("application/vnd.oci.image.config.v1+json", &config);
        let written = layout.json(MANIFEST, &manifest);
        index["manifests"][0]["digest"] = written["digest"].clone();
        index["manifests"][0]["size"] = written["size"].clone();
        fs::write(layout.path().join("index.json"), index.to_string()).unwrap();
        run(
            "skopeo",
            &["inspect", &format!("oci:{}", layout.path().display())],
        );
        assert_eq!(layout.open(None, None).unwrap(), "amd64", "{name}");
    }
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
