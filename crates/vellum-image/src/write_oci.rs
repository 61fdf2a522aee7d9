//! Writes an OCI image, as a layout directory or as an archive of one.
//!
//! See the OCI image specification 1.1: image-layout.md, manifest.md.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::compress::Compression;
use super::config::ImageConfig;
use super::content::Content;
use super::layer::hex;
use super::node::{Kind, Node};
use super::oci::{canonical_name, tag_of};
use super::read_failure;
use super::slice::Slice;
use super::write::{TarWriter, plain_file};
use super::write_blob::{LayerBlob, write_blob};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// Collects the layers of an image and writes it out.
#[derive(Debug)]
pub struct OciWriter {
    spool: TempDir,
    compression: Compression,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    /// Blobs by digits of their digest: size in bytes.
    blobs: BTreeMap<String, u64>,
    /// What the manifest says besides.
    annotations: BTreeMap<String, String>,
}

impl OciWriter {
    /// Starts an image whose layers are compressed with `compression`.
    ///
    /// Blobs are collected in a temporary directory inside `spool`, which needs room for them;
    /// it is removed with the writer.
    ///
    /// # Errors
    ///
    /// When that directory cannot be made.
    pub fn new(spool: &Path, compression: Compression) -> Result<OciWriter> {
        let spool = tempfile::tempdir_in(spool)
            .context(|| format!("making a temporary directory in {spool:?}"))?;
        Ok(OciWriter {
            spool,
            compression,
            layers: Vec::new(),
            diff_ids: Vec::new(),
            blobs: BTreeMap::new(),
            annotations: BTreeMap::new(),
        })
    }

    /// Adds the next layer, above those before; `write` writes its uncompressed tar.
    ///
    /// Returns its diff_id.
    ///
    /// # Errors
    ///
    /// What `write` fails with, or `NoSpace` and `Io` of the spool.
    pub fn add_layer(
        &mut self,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<String> {
        let path = self.spool.path().join("layer");
        let failed = || format!("writing {path:?}");
        let file = File::create(&path).context(failed)?;
        let file = BufWriter::with_capacity(128 * 1024, file);
        let (file, blob) =
            write_blob(file, self.compression, write).map_err(|error| error.context(failed()))?;
        file.into_inner()
            .map_err(|error| Error::io(failed(), error.into_error()))?;
        let LayerBlob {
            digest,
            size,
            diff_id,
        } = blob;
        std::fs::rename(&path, self.spool.path().join(&digest)).context(failed)?;
        let diff_id = format!("sha256:{diff_id}");
        let media_type = self.compression.layer_media_type();
        self.layers.push(descriptor(&media_type, &digest, size));
        self.blobs.insert(digest, size);
        self.diff_ids.push(diff_id.clone());
        Ok(diff_id)
    }

    /// Has the manifest say something: an annotation.
    pub fn annotate(&mut self, name: &str, value: &str) {
        self.annotations.insert(name.to_owned(), value.to_owned());
    }

    /// Adds a JSON document. Returns its digest, and what describes it.
    fn add_json(&mut self, media_type: &str, data: &[u8]) -> Result<(String, Value)> {
        let digest = hex(&Sha256::digest(data));
        let path = self.spool.path().join(&digest);
        std::fs::write(&path, data).context(|| format!("writing {path:?}"))?;
        self.blobs.insert(digest.clone(), data.len() as u64);
        let described = descriptor(media_type, &digest, data.len() as u64);
        Ok((format!("sha256:{digest}"), described))
    }

    /// Makes the configuration and the manifest, and what stands beside the blobs.
    #[expect(clippy::indexing_slicing, reason = "a JSON object takes any key")]
    fn seal(&mut self, mut config: ImageConfig, name: Option<&str>) -> Result<Sealed> {
        config.rootfs.kind = "layers".into();
        config.rootfs.diff_ids = self.diff_ids.clone();
        let mut platform = json!({ "architecture": config.architecture, "os": config.os });
        if let Some(variant) = &config.variant {
            platform["variant"] = json!(variant);
        }
        let (config_digest, config) = self.add_json(
            "application/vnd.oci.image.config.v1+json",
            &config.to_json()?,
        )?;
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config,
            "layers": self.layers,
        });
        if !self.annotations.is_empty() {
            manifest["annotations"] = json!(self.annotations);
        }
        let (digest, mut manifest) =
            self.add_json(manifest_type, manifest.to_string().as_bytes())?;
        manifest["platform"] = platform;
        let name = name.map(archive_name);
        if let Some(name) = &name {
            manifest["annotations"] = json!({
                "io.containerd.image.name": name,
                "org.opencontainers.image.ref.name": tag_of(name).unwrap_or("latest"),
            });
        }
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        let layers: Vec<String> = self
            .layers
            .iter()
            .filter_map(|layer| layer["digest"].as_str())
            .map(blob_path)
            .collect();
        let docker = json!([{
            "Config": blob_path(&config_digest),
            "RepoTags": name.as_deref().map(|name| [familiar_name(name)]),
            "Layers": layers,
        }]);
        Ok(Sealed {
            digest,
            index: index.to_string().into_bytes(),
            docker: docker.to_string().into_bytes(),
        })
    }

    /// Writes the image as an OCI layout into `directory`, which must be missing or empty.
    ///
    /// `config` says how to run it and how it came to be; its diff_ids are filled in here. With
    /// `name` it can be found by that. Returns the manifest's digest.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` when there is something in `directory`; `NoSpace` and `Io`.
    pub fn write_layout(
        mut self,
        config: ImageConfig,
        name: Option<&str>,
        directory: &Path,
    ) -> Result<String> {
        let sealed = self.seal(config, name)?;
        let failed = |path: &Path| format!("writing {path:?}");
        let blobs = directory.join("blobs/sha256");
        let used = std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some());
        if used {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{directory:?} is not empty"),
            ));
        }
        std::fs::create_dir_all(&blobs).context(|| failed(&blobs))?;
        for name in self.blobs.keys() {
            let to = blobs.join(name);
            move_file(&self.spool.path().join(name), &to).context(|| failed(&to))?;
        }
        for (name, data) in [("index.json", &sealed.index[..]), ("oci-layout", LAYOUT)] {
            let path = directory.join(name);
            std::fs::write(&path, data).context(|| failed(&path))?;
        }
        Ok(sealed.digest)
    }

    /// Writes the image as an OCI archive, the tar of a layout, to `output`.
    ///
    /// As [`write_layout`](Self::write_layout) otherwise.
    ///
    /// # Errors
    ///
    /// `NoSpace` and `Io` of the spool or of `output`.
    pub fn write_archive(
        mut self,
        config: ImageConfig,
        name: Option<&str>,
        output: impl Write,
    ) -> Result<String> {
        let sealed = self.seal(config, name)?;
        self.write_tar(&sealed, None, output)?;
        Ok(sealed.digest)
    }

    /// Writes the image as a Docker archive to `output`, as `docker save` does since version 25: an OCI
    /// archive with a `manifest.json`, by which older readers find their way. They want layers that are
    /// not compressed.
    ///
    /// As [`write_layout`](Self::write_layout) otherwise.
    ///
    /// # Errors
    ///
    /// `NoSpace` and `Io` of the spool or of `output`.
    pub fn write_docker_archive(
        mut self,
        config: ImageConfig,
        name: Option<&str>,
        output: impl Write,
    ) -> Result<String> {
        let sealed = self.seal(config, name)?;
        self.write_tar(&sealed, Some(&sealed.docker), output)?;
        Ok(sealed.digest)
    }

    fn write_tar(&self, sealed: &Sealed, docker: Option<&[u8]>, output: impl Write) -> Result<()> {
        let blobs = self.blobs.iter().map(|(digits, size)| LayoutBlob {
            name: format!("blobs/sha256/{digits}"),
            path: self.spool.path().join(digits),
            size: *size,
        });
        let mut documents = vec![("index.json", &sealed.index[..])];
        documents.extend(docker.map(|docker| ("manifest.json", docker)));
        write_layout_tar(blobs, &documents, output)
    }
}

/// A blob of an OCI layout that is written as a tar.
#[derive(Debug, Clone)]
pub struct LayoutBlob {
    /// What it is called there: [`blob_name`](super::blob_name).
    pub name: String,
    /// The file that is the blob.
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
}

/// Writes an OCI layout as a tar: its blobs, then the documents that stand beside them, `index.json` among them, and the
/// file that marks a layout last.
///
/// # Errors
///
/// `NoSpace` and `Io` of the blobs or of `output`.
pub fn write_layout_tar(
    blobs: impl IntoIterator<Item = LayoutBlob>,
    documents: &[(&str, &[u8])],
    output: impl Write,
) -> Result<()> {
    let mut tar = TarWriter::new(output);
    for directory in ["blobs", "blobs/sha256"] {
        let mut node = plain_file(directory.into(), 0, 0o755);
        node.kind = Kind::Directory;
        tar.append(&node, 0, &mut Bytes(&[]))?;
    }
    for blob in blobs {
        append_file(&mut tar, blob.name, &blob.path, blob.size)?;
    }
    for (name, data) in documents.iter().chain([&("oci-layout", LAYOUT)]) {
        let node = file((*name).into(), data.len() as u64);
        tar.append(&node, data.len() as u64, &mut Bytes(data))?;
    }
    tar.finish().map(drop)
}

/// What stands beside the blobs of an image.
struct Sealed {
    /// The manifest's.
    digest: String,
    /// `index.json`.
    index: Vec<u8>,
    /// Docker's `manifest.json`.
    docker: Vec<u8>,
}

/// Where a blob lies.
fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// Moves a file, by its name where that can be.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            std::fs::copy(from, to).map(drop)
        }
        other => other,
    }
}

/// A name in full, as others take it: in lower case but for its tag. A digest in it was another image's,
/// and what stands behind a container's `@` is as good as a tag.
pub fn archive_name(name: &str) -> String {
    let (name, behind) = name.split_once('@').unwrap_or((name, ""));
    let tag = tag_of(name).or((!behind.is_empty() && !behind.contains(':')).then_some(behind));
    let path = tag_of(name).and_then(|tag| name.strip_suffix(tag)?.strip_suffix(':'));
    let path = path.unwrap_or(name).to_lowercase().replace('+', "-");
    canonical_name(&match tag {
        Some(tag) => format!("{path}:{}", tag.replace('+', "-")),
        None => path,
    })
}

/// A full name as Docker shows it.
pub fn familiar_name(name: &str) -> &str {
    let hub = name.strip_prefix("docker.io/").unwrap_or(name);
    hub.strip_prefix("library/").unwrap_or(hub)
}

/// The file that marks an OCI layout.
pub const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

fn file(path: String, size: u64) -> Node {
    plain_file(path.into_bytes(), size, 0o644)
}

fn append_file<W: Write>(
    tar: &mut TarWriter<W>,
    name: String,
    path: &PathBuf,
    size: u64,
) -> Result<()> {
    let input = File::open(path).context(|| format!("opening {path:?}"))?;
    let mut input = Slice::new(input.into(), 0, size);
    tar.append(&file(name, size), size, &mut Stream(&mut input))
}

struct Bytes<'a>(&'a [u8]);

impl Content for Bytes<'_> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        Stream(&mut self.0).read(into)
    }
}

struct Stream<'a, R>(&'a mut R);

impl<R: io::Read> Content for Stream<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        self.0
            .read(into)
            .map_err(|error| read_failure("reading a blob", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_as_other_programs_take_them() {
        for (name, full, familiar) in [
            ("web", "docker.io/library/web:latest", "web:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("me/App:V1", "docker.io/me/app:V1", "me/app:V1"),
            (
                "web@before-upgrade",
                "docker.io/library/web:before-upgrade",
                "web:before-upgrade",
            ),
            ("ghcr.io/a/b:1+2", "ghcr.io/a/b:1-2", "ghcr.io/a/b:1-2"),
            ("a@sha256:00", "docker.io/library/a:latest", "a:latest"),
        ] {
            assert_eq!(archive_name(name), full);
            assert_eq!(familiar_name(full), familiar);
        }
    }
}
