//! Images: the tar of a layer on its way into a tree, and archives on their way to layers.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

use sha2::{Digest, Sha256};
use vellum_base::ErrorKind;
use vellum_image::{
    ApplyOptions, Compression, ImageConfig, Source, SourceOptions, apply_layer, chain_ids,
};

use crate::Seed;
use crate::input::{put_piece, take_piece, with_mode};

/// Bit of the first byte: checksums are made to fit.
const FIX: u8 = 1;
/// As much as is read of a stream, compressed or not.
const MOST: u64 = 4 << 20;

/// Gives every header of a tar its checksum.
fn fix_tar(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

pub(crate) fn judge(error: &vellum_base::Error) {
    let kinds = [
        ErrorKind::Corrupt,
        ErrorKind::Unsupported,
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        // A device node, which these targets have no right to make.
        ErrorKind::Permission,
        // A name or a size that this host's file system cannot have.
        ErrorKind::Io,
        ErrorKind::NoSpace,
        // blkid(8) was ended.
        ErrorKind::Command,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| {
        entry.unwrap().file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

/// Bit of the first byte: the tar of a whole root file system, in which `.wh.` means nothing.
const ROOTFS: u8 = 2;

/// A layer's tar over a tree with links that lead out of it: nothing outside is made, changed or
/// removed.
pub fn tar(input: &[u8]) {
    let Some((&mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & FIX != 0 {
        fix_tar(&mut bytes);
    }
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(root.join("etc/hosts"), "here").unwrap();
    fs::write(outside.join("kept"), "kept").unwrap();
    symlink("../outside", root.join("up")).unwrap();
    symlink(&outside, root.join("out")).unwrap();
    symlink("etc", root.join("in")).unwrap();
    let before = fs::metadata(outside.join("kept")).unwrap();

    let mut options = if mode & ROOTFS != 0 {
        ApplyOptions::rootfs()
    } else {
        ApplyOptions::layer()
    };
    options.devices = false;
    let _ = apply_layer(&bytes[..], &root, &options).inspect_err(judge);

    assert_eq!(names(dir.path()), ["outside", "root"]);
    assert_eq!(names(&outside), ["kept"]);
    assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept");
    let after = fs::metadata(outside.join("kept")).unwrap();
    assert_eq!(before.permissions(), after.permissions());
    {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(
            (before.nlink(), before.uid(), before.ctime_nsec()),
            (after.nlink(), after.uid(), after.ctime_nsec())
        );
    }
}

struct Builder(tar::Builder<Vec<u8>>);

impl Builder {
    fn new() -> Self {
        Builder(tar::Builder::new(Vec::new()))
    }

    fn entry(&mut self, kind: tar::EntryType, name: &str, link: &str, data: &[u8]) -> &mut Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(1000);
        header.set_gid(1000);
        header.set_mtime(1_000_000_000);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    fn done(&mut self) -> Vec<u8> {
        std::mem::replace(&mut self.0, tar::Builder::new(Vec::new()))
            .into_inner()
            .unwrap()
    }
}

use tar::EntryType as Type;

#[expect(clippy::too_many_lines, reason = "a list")]
pub fn tar_seeds() -> Vec<Seed> {
    let file = Type::Regular;
    let plain = Builder::new()
        .entry(Type::Directory, "./", "", b"")
        .entry(Type::Directory, "bin/", "", b"")
        .entry(file, "bin/tool", "", &[b'x'; 700])
        .entry(Type::Link, "bin/same", "bin/tool", b"")
        .entry(Type::Symlink, "bin/link", "../etc/hosts", b"")
        .entry(Type::Fifo, "fifo", "", b"")
        .entry(Type::Char, "dev/null", "", b"")
        .done();
    let whiteouts = Builder::new()
        .entry(file, "etc/.wh.hosts", "", b"")
        .entry(file, "etc/.wh..wh..opq", "", b"")
        .entry(file, "etc/new", "", b"new")
        .entry(file, ".wh.in", "", b"")
        .entry(file, ".wh..wh.plnk/1", "", b"")
        .done();
    let escapes = Builder::new()
        .entry(file, "up/made", "", b"made")
        .entry(file, "out/kept", "", b"changed")
        .entry(file, "../outside/kept", "", b"changed")
        .entry(file, "/outside/kept", "", b"changed")
        .entry(Type::Link, "stolen", "up/kept", b"")
        .entry(Type::Symlink, "link", "..", b"")
        .entry(file, "link/outside/kept", "", b"changed")
        .entry(file, "up/.wh.kept", "", b"")
        .entry(file, "out/.wh..wh..opq", "", b"")
        .done();
    let escape_one =
        |name: &str, kind: Type, link: &str| Builder::new().entry(kind, name, link, b"").done();
    let pax = Builder::new()
        .pax(&[
            ("path", b"a/long/name"),
            ("mtime", b"1234567890.123456789"),
            ("atime", b"-1.5"),
            ("SCHILY.xattr.user.a", b"\x01\x00\n"),
            ("LIBARCHIVE.xattr.user.b", b"AQAAAg=="),
            ("uid", b"70000"),
        ])
        .entry(file, "short", "", b"content")
        .done();
    let odd = Builder::new()
        .pax(&[("path", b"first"), ("uid", b"7")])
        .pax(&[("path", b"second"), ("uid", b"-2"), ("gid", b"-1")])
        .entry(file, "name", "", b"two")
        .pax(&[
            ("path", b""),
            ("size", b""),
            ("mtime", b""),
            ("linkpath", b""),
        ])
        .entry(Type::Link, "empty", "second", b"")
        .pax(&[
            (
                "SCHILY.acl.access",
                b"user::rw-,user:0:r--,group::r--,mask::r--,other::---",
            ),
            ("SCHILY.acl.default", b"user:nobody-here:rwx:5"),
        ])
        .entry(file, "acl", "", b"")
        .done();
    let sparse = Builder::new()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.realsize", b"100000"),
        ])
        .entry(file, "GNUSparseFile.0/sparse", "", &{
            let mut data = b"2\n4096\n512\n65536\n100\n".to_vec();
            data.resize(512, 0);
            data.extend([b's'; 612]);
            data
        })
        .done();
    let long = Builder::new()
        .entry(
            Type::GNULongName,
            "././@LongLink",
            "",
            &[b"n/".repeat(150), b"file\0".to_vec()].concat(),
        )
        .entry(file, "n", "", b"long")
        .entry(Type::GNULongLink, "././@LongLink", "", &[b'l'; 200])
        .entry(Type::Symlink, "far", "l", b"")
        .done();
    vec![
        ("plain".into(), with_mode(FIX, &plain)),
        ("plain-raw".into(), with_mode(0, &plain)),
        ("whiteouts".into(), with_mode(FIX, &whiteouts)),
        (
            "whiteouts-as-files".into(),
            with_mode(FIX | ROOTFS, &whiteouts),
        ),
        ("escapes".into(), with_mode(FIX, &escapes)),
        (
            "escape-by-whiteout".into(),
            with_mode(FIX, &escape_one("up/.wh.kept", file, "")),
        ),
        (
            "escape-by-opaque".into(),
            with_mode(FIX, &escape_one("out/.wh..wh..opq", file, "")),
        ),
        (
            "escape-by-hard-link".into(),
            with_mode(FIX, &escape_one("x", Type::Link, "up/kept")),
        ),
        (
            "escape-by-dots".into(),
            with_mode(FIX, &escape_one("../outside/x", file, "")),
        ),
        ("pax".into(), with_mode(FIX, &pax)),
        ("odd-headers".into(), with_mode(FIX, &odd)),
        ("sparse".into(), with_mode(FIX, &sparse)),
        ("long-names".into(), with_mode(FIX, &long)),
        ("cut".into(), with_mode(FIX, &plain[..1600])),
    ]
}

/// What the second hexadecimal digit of the first byte says.
const RAW: u8 = 0x00;
const OCI: u8 = 0x10;
const DOCKER: u8 = 0x20;
const OCI_DIRECTORY: u8 = 0x30;
/// Bits of the first byte: the archive is compressed with gzip, or zstd; its layer is, with gzip.
const GZIP: u8 = 2;
const ZSTD: u8 = 4;
const LAYER_GZIP: u8 = 8;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Whether what is compressed here is as large as it claims to be able to be: that fills disks, and
/// no more than that.
fn is_bomb(bytes: &[u8]) -> bool {
    let reader: Box<dyn Read> = match Compression::detect(bytes) {
        Ok(Compression::Gzip) => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        Ok(Compression::Zstd) => match zstd::Decoder::new(bytes) {
            Ok(decoder) => Box::new(decoder),
            Err(_) => return false,
        },
        _ => return false,
    };
    let mut sink = std::io::sink();
    std::io::copy(&mut reader.take(MOST + 1), &mut sink).is_ok_and(|len| len > MOST)
}

fn filled(text: &[u8], of: &[(&str, &[u8])]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(text) else {
        return text.to_vec();
    };
    let mut text = text.to_owned();
    for (name, bytes) in of {
        if text.contains('@') {
            text = text.replace(&format!("@{name}@"), &hex(bytes));
            text = text.replace(&format!("@{name}_SIZE@"), &bytes.len().to_string());
        }
    }
    text.into_bytes()
}

/// The files of an image, whose digests and sizes are put in the place of `@LAYER@`,
/// `@LAYER_SIZE@` and so on.
fn files(mode: u8, mut bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut next = || take_piece(&mut bytes).unwrap_or_default();
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", hex(bytes));
    let mut layer = next().to_vec();
    let config = filled(next(), &[("DIFF", &layer)]);
    if mode & LAYER_GZIP != 0 {
        layer = gzip(&layer);
    }
    let manifest = filled(next(), &[("CONFIG", &config), ("LAYER", &layer)]);
    let index = filled(next(), &[("MANIFEST", &manifest)]);
    let layout = next().to_vec();
    if mode & 0xf0 == DOCKER {
        return vec![
            ("manifest.json".into(), manifest),
            ("config.json".into(), config),
            ("one/layer.tar".into(), layer),
        ];
    }
    vec![
        ("oci-layout".into(), layout),
        ("index.json".into(), index),
        (blob(&manifest), manifest.clone()),
        (blob(&config), config.clone()),
        (blob(&layer), layer.clone()),
    ]
}

/// An archive, or the files of an image, as an import takes them: an image whose layers are read
/// to their end, a tar, or an error. Configurations are written again as they were read.
pub fn archive(input: &[u8]) {
    let Some((&mode, bytes)) = input.split_first() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    if matches!(mode & 0xf0, OCI | DOCKER | OCI_DIRECTORY) {
        let files = files(mode, bytes);
        if mode & 0xf0 == OCI_DIRECTORY {
            fs::create_dir_all(path.join("blobs/sha256")).unwrap();
            for (name, bytes) in files {
                fs::write(path.join(name), bytes).unwrap();
            }
        } else {
            let mut tar = Builder::new();
            for (name, bytes) in &files {
                tar.entry(Type::Regular, name, "", bytes);
            }
            let mut tar = tar.done();
            if mode & GZIP != 0 {
                tar = gzip(&tar);
            } else if mode & ZSTD != 0 {
                tar = zstd::encode_all(Cursor::new(tar), 1).unwrap();
            }
            fs::write(&path, tar).unwrap();
        }
    } else {
        let mut bytes = bytes.to_vec();
        if mode & FIX != 0 {
            fix_tar(&mut bytes);
        }
        if mode & GZIP != 0 {
            bytes = gzip(&bytes);
        } else if is_bomb(&bytes) {
            return;
        }
        fs::write(&path, bytes).unwrap();
    }
    let source = match Source::open(&path, &SourceOptions::new(dir.path())) {
        Ok(source) => source,
        Err(error) => return judge(&error),
    };
    let mut sink = std::io::sink();
    match source {
        Source::Image(image) => {
            let _ = chain_ids(image.diff_ids());
            let config = image.config();
            let again = ImageConfig::from_json(&config.to_json().unwrap()).unwrap();
            assert!(again == *config, "written again it says something else");
            let steps = config.history_steps(image.layers().len());
            assert!(steps.len() >= image.layers().len());
            for index in 0..image.layers().len().min(8) {
                match image.open_layer(index, None) {
                    Ok(layer) => drop(std::io::copy(&mut layer.take(MOST), &mut sink)),
                    Err(error) => judge(&error),
                }
            }
        }
        Source::Tar(tar) => match tar.into_reader(None) {
            Ok(reader) => drop(std::io::copy(&mut reader.take(MOST), &mut sink)),
            Err(error) => judge(&error),
        },
        _ => {}
    }
}

fn pack(mode: u8, pieces: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![mode];
    for piece in pieces {
        put_piece(&mut out, piece);
    }
    out
}

#[expect(clippy::too_many_lines, reason = "a list")]
pub fn archive_seeds() -> Vec<Seed> {
    let tar = Builder::new()
        .entry(Type::Directory, "bin/", "", b"")
        .entry(Type::Regular, "bin/tool", "", b"tool")
        .done();
    let tar = &tar[..2560];
    let config = br#"{"architecture":"amd64","os":"linux","config":{"Env":["A=b"],"Cmd":null},
"rootfs":{"type":"layers","diff_ids":["sha256:@DIFF@"]},"history":[{"created_by":"x"},{"empty_layer":true}]}"#;
    let manifest = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:@CONFIG@","size":@CONFIG_SIZE@},
"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:@LAYER@","size":@LAYER_SIZE@}]}"#;
    let index = br#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",
"digest":"sha256:@MANIFEST@","size":@MANIFEST_SIZE@,"platform":{"architecture":"amd64","os":"linux"},
"annotations":{"org.opencontainers.image.ref.name":"latest"}}]}"#;
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    let docker = br#"[{"Config":"config.json","RepoTags":["web:1"],"Layers":["one/layer.tar"]}]"#;
    let oci: [&[u8]; 5] = [tar, config, manifest, index, layout];
    let docker: [&[u8]; 3] = [tar, config, docker];
    let old = Builder::new()
        .entry(Type::Regular, "manifest.json", "", docker[2])
        .entry(Type::Regular, "config.json", "", b"{}")
        .entry(Type::Symlink, "one/layer.tar", "../two/layer.tar", b"")
        .entry(Type::Symlink, "two/layer.tar", "../one/layer.tar", b"")
        .done();
    let ids = ["a".repeat(64), "b".repeat(64)];
    let mut legacy = Builder::new();
    for (id, parent) in [
        (&ids[0], String::new()),
        (&ids[1], format!(r#""parent":"{}","#, ids[0])),
    ] {
        let json = format!(
            r#"{{"id":"{id}",{parent}"os":"linux","config":{{"Cmd":["run"]}},"container_config":{{"Cmd":["x"]}}}}"#
        );
        legacy.entry(Type::Regular, &format!("{id}/VERSION"), "", b"1.0");
        legacy.entry(Type::Regular, &format!("{id}/json"), "", json.as_bytes());
        legacy.entry(Type::Regular, &format!("{id}/layer.tar"), "", tar);
    }
    let names = format!(r#"{{"web":{{"1":"{}"}}}}"#, ids[1]);
    legacy.entry(Type::Regular, "repositories", "", names.as_bytes());
    let legacy = legacy.done();
    // Indexes each of which lists the next one twenty times, and the last of which is empty.
    let mut nested = vec![br#"{"schemaVersion":2,"manifests":[]}"#.to_vec()];
    for _ in 0..7 {
        let below = nested.last().unwrap();
        let entry = format!(
            r#"{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:{}","size":{}}}"#,
            hex(below),
            below.len()
        );
        let list = vec![entry; 20].join(",");
        nested.push(format!(r#"{{"schemaVersion":2,"manifests":[{list}]}}"#).into_bytes());
    }
    let top = nested.pop().unwrap();
    let mut indexes = Builder::new();
    indexes.entry(Type::Regular, "oci-layout", "", layout);
    indexes.entry(Type::Regular, "index.json", "", &top);
    for index in &nested {
        indexes.entry(
            Type::Regular,
            &format!("blobs/sha256/{}", hex(index)),
            "",
            index,
        );
    }
    let indexes = indexes.done();
    vec![
        ("indexes-in-indexes".into(), with_mode(RAW | FIX, &indexes)),
        ("oci".into(), pack(OCI, &oci)),
        ("oci-gzip".into(), pack(OCI | GZIP | LAYER_GZIP, &oci)),
        ("oci-zstd".into(), pack(OCI | ZSTD, &oci)),
        (
            "oci-directory".into(),
            pack(OCI_DIRECTORY | LAYER_GZIP, &oci),
        ),
        ("docker".into(), pack(DOCKER, &docker)),
        ("docker-gzip".into(), pack(DOCKER | GZIP, &docker)),
        ("docker-legacy".into(), with_mode(RAW | FIX, &legacy)),
        ("docker-link-loop".into(), with_mode(RAW | FIX, &old)),
        ("rootfs".into(), with_mode(RAW | FIX, tar)),
        ("rootfs-gzip".into(), with_mode(RAW, &gzip(tar))),
        (
            "rootfs-zstd".into(),
            with_mode(RAW, &zstd::encode_all(tar, 1).unwrap()),
        ),
        ("xz".into(), with_mode(RAW, b"\xfd7zXZ\0\0\0")),
    ]
}
