//! Finds out what a source is. docs/images.md has the order; what is found first counts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use super::blobs::Blobs;
use super::docker_legacy;
use super::members::Members;
use super::node::Kind;
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// How much of a source is looked at before it is read, in bytes.
pub(super) const HEAD: u64 = 1 << 20;

/// A tar without a member is at most this long, in bytes: one record of tar's usual size.
const EMPTY_TAR: u64 = 10 * 1024;

/// What lies in the root of a Linux system and never at the top of an image archive.
const ROOT_NAMES: [&str; 20] = [
    "bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "media", "mnt", "opt",
    "proc", "root", "run", "sbin", "srv", "sys", "usr", "var",
];

/// What an archive of several files is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Archived {
    /// An OCI layout.
    Oci,
    /// What `docker save` writes since version 1.10: a `manifest.json`.
    Docker,
    /// What it wrote before: a directory for each layer.
    LegacyDocker,
    /// Files, for their own sake.
    Files,
}

/// The first bytes of a file.
pub(super) fn head(file: &File) -> Result<Vec<u8>> {
    let mut head = vec![0; HEAD as usize];
    let mut filled = 0;
    loop {
        let (_, into) = head.split_at_mut(filled);
        let count = file
            .read_at(into, filled as u64)
            .context(|| "reading its first bytes")?;
        if count == 0 {
            head.truncate(filled);
            return Ok(head);
        }
        filled += count;
    }
}

/// Whether a source of `size` bytes that begins with `head` is a tar: it begins with a header, or
/// is nothing but the end marker.
pub(super) fn is_tar(head: &[u8], size: u64) -> bool {
    let Some(header) = head.first_chunk::<512>() else {
        return false;
    };
    if header.iter().any(|byte| *byte != 0) {
        let header = tar_core::Header::from_bytes(header);
        return header.verify_checksum().is_ok();
    }
    (1024..=EMPTY_TAR).contains(&size)
        && size.is_multiple_of(512)
        && head.iter().all(|byte| *byte == 0)
}

/// Whether the first members of a tar are those of a root file system.
pub(super) fn is_root(head: &[u8]) -> bool {
    let mut members = Members::new(head);
    // The head ends in the middle of a member, which is no concern here.
    while let Ok(Some(member)) = members.next() {
        let path = member.node.path;
        let mut components = path.split(|byte| *byte == b'/');
        let first = components.next().unwrap_or_default();
        let is_place = components.next().is_some()
            || matches!(member.node.kind, Kind::Directory | Kind::Symlink(_));
        if is_place && ROOT_NAMES.iter().any(|name| name.as_bytes() == first) {
            return true;
        }
    }
    false
}

/// What a tar is, by the names and the descriptions in it.
///
/// # Errors
/// `Unsupported` for what would be an image, were it whole, and for a virtual appliance; with what
/// to do.
pub(super) fn archive(blobs: &Blobs) -> Result<Archived> {
    if blobs.has("etc/passwd") {
        return Ok(Archived::Files);
    }
    if blobs.has("oci-layout") {
        if blobs.has("index.json") {
            return Ok(Archived::Oci);
        }
        return Err(not_whole(
            "it has an oci-layout, but no index.json beside it: a part of an OCI layout",
        ));
    }
    if blobs.has("manifest.json") {
        match describes(&blobs.read("manifest.json")?) {
            Describes::Images => return Ok(Archived::Docker),
            Describes::OneImage => {
                return Err(not_whole(
                    "its manifest.json describes an image, but not in a list as Docker writes it",
                ));
            }
            Describes::SomethingElse => {}
        }
    }
    if docker_legacy::is_one(blobs) {
        return Ok(Archived::LegacyDocker);
    }
    let names = blobs.top_names();
    let any = |end: &[u8]| names.iter().any(|name| name.ends_with(end));
    if any(b".ovf") && any(b".vmdk") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is a virtual appliance (OVA): take its disk out with tar -xf, and make it raw with \
             qemu-img convert -O raw DISK.vmdk NEW.raw (or give --format tar for its files)",
        ));
    }
    Ok(Archived::Files)
}

fn not_whole(what: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{what}. If its files are what you want, give --format tar"),
    )
}

/// What a `manifest.json` is about.
enum Describes {
    Images,
    OneImage,
    /// A web application has a file of this name, and so do others.
    SomethingElse,
}

fn describes(manifest: &[u8]) -> Describes {
    let is_image = |value: &Value| {
        value.get("Config").is_some_and(Value::is_string) && value.get("Layers").is_some()
    };
    match serde_json::from_slice(manifest) {
        Ok(Value::Array(images)) if images.iter().all(is_image) => Describes::Images,
        Ok(one) if is_image(&one) => Describes::OneImage,
        _ => Describes::SomethingElse,
    }
}

/// What a directory is.
///
/// # Errors
/// For what is recognised but has to be given in another way, with that.
pub(super) fn directory(path: &Path) -> Result<Archived> {
    let has = |name: &str| path.join(name).exists();
    let read = |name: &str| std::fs::read(path.join(name)).unwrap_or_default();
    if has("oci-layout") && has("index.json") {
        return Ok(Archived::Oci);
    }
    if has("etc") || has("usr") || has("bin") {
        return Ok(Archived::Files);
    }
    let is_bundle = || {
        let config: Option<Value> = serde_json::from_slice(&read("config.json")).ok();
        config.is_some_and(|config| config.get("ociVersion").is_some())
    };
    if has("rootfs") && is_bundle() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "it is a bundle of an OCI runtime: import the rootfs directory inside it (or give \
             --format dir for all of it)",
        ));
    }
    if read("version").starts_with(b"Directory Transport Version") && has("manifest.json") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is skopeo's dir: format: convert it with skopeo copy dir:PATH oci:NEW:latest (or \
             give --format dir for its files)",
        ));
    }
    match describes(&read("manifest.json")) {
        Describes::Images => Ok(Archived::Docker),
        _ => Ok(Archived::Files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_an_empty_tar_up_to_one_record_and_a_disk_beyond() {
        for (size, tar) in [
            (512, false),
            (1024, true),
            (10240, true),
            (10752, false),
            (2000, false),
        ] {
            let zeros = vec![0; size];
            assert_eq!(is_tar(&zeros, size as u64), tar, "{size}");
        }
    }

    #[test]
    fn a_manifest_is_an_archives_only_where_it_lists_images() {
        let describes = |text: &str| match describes(text.as_bytes()) {
            Describes::Images => "images",
            Describes::OneImage => "one",
            Describes::SomethingElse => "else",
        };
        for (text, what) in [
            (
                r#"[{"Config":"c.json","RepoTags":null,"Layers":null}]"#,
                "images",
            ),
            ("[]", "images"),
            (r#"{"Config":"c.json","Layers":[]}"#, "one"),
            (r#"{"name":"App","icons":[],"start_url":"."}"#, "else"),
            (r#"[{"file":"a"}]"#, "else"),
            ("no json", "else"),
            ("", "else"),
        ] {
            assert_eq!(describes(text), what, "{text}");
        }
    }
}
