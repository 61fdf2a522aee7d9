//! OCI image layouts: from index to manifest to layers.
//!
//! See the OCI image specification 1.1: image-layout.md, image-index.md, manifest.md. What is read
//! is what Go programs read: they write `null` for whatever is empty and take it back so.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::blobs::{Blobs, blob_name};
use super::config::{ImageConfig, list, or_default, texts_by_name};
use super::layer::LayerRef;
use super::platform::Platform;
use super::source::{Image, SourceOptions};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// How deep indexes nest.
const MAX_INDEXES: usize = 8;

/// The most entries of indexes that are looked at, one within the other.
const MAX_ENTRIES: usize = 10_000;

/// A reference to a blob.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default, deserialize_with = "or_default")]
    media_type: String,
    #[serde(default, deserialize_with = "or_default")]
    artifact_type: String,
    #[serde(default, deserialize_with = "or_default")]
    digest: String,
    #[serde(default, deserialize_with = "or_default")]
    size: u64,
    #[serde(default, deserialize_with = "texts_by_name")]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default, deserialize_with = "list")]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default, deserialize_with = "or_default")]
    artifact_type: String,
    #[serde(default, deserialize_with = "or_default")]
    config: Descriptor,
    #[serde(default, deserialize_with = "list")]
    layers: Vec<Descriptor>,
}

impl Manifest {
    /// What it is where it is no container image: signatures, charts and the like have the form of
    /// an image, with other types of configuration or layers.
    fn artifact(&self) -> Option<&str> {
        let named = || match self.artifact_type.as_str() {
            "" => &self.config.media_type,
            named => named,
        };
        match self.config.media_type.as_str() {
            // Not named: an image until its configuration says otherwise.
            ""
            | "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json" => {}
            _ => return Some(named()),
        }
        let foreign = |layer: &&Descriptor| !layer.media_type.contains("image");
        self.layers
            .iter()
            .find(foreign)
            .map(|layer| layer.media_type.as_str())
    }
}

/// A manifest that could be the image, and how the index leads to it.
struct Candidate {
    descriptor: Descriptor,
    /// Every name on the way from the index to it.
    names: Vec<String>,
    /// Every digest on the way, its own the last.
    digests: Vec<String>,
    /// The digest of what the innermost of the names stands for: manifests of one image for
    /// several platforms have it in common.
    image: String,
}

/// Finds the image that `options` ask for in an OCI layout.
pub(super) fn load(blobs: Blobs, options: &SourceOptions) -> Result<Image> {
    let layout = blobs.read("oci-layout")?;
    let layout: serde_json::Value = json(&layout, "oci-layout")?;
    match layout.get("imageLayoutVersion").and_then(|v| v.as_str()) {
        Some(version) if version.starts_with("1.") => {}
        version => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the OCI layout is of version {version:?}; this program reads 1.x"),
            ));
        }
    }
    let index: Index = json(&blobs.read("index.json")?, "index.json")?;
    let mut walk = Walk {
        blobs: &blobs,
        looked_at: 0,
        found: Vec::new(),
        missing: None,
    };
    for descriptor in &index.manifests {
        walk.collect(descriptor, None, 0)?;
    }
    let (found, missing) = (walk.found, walk.missing);
    if let (true, Some(missing)) = (found.is_empty(), missing) {
        return Err(missing);
    }
    let asked = asked_for(found, options.image.as_deref())?;
    let images = images_among(&blobs, asked)?;
    if options.image.is_none() {
        check_single(&images)?;
    }
    let wanted = options.platform.clone().unwrap_or_else(Platform::host);
    let chosen = choose(&blobs, images, &wanted, options.platform.is_some())?;
    let digest = &chosen.descriptor.digest;
    let manifest: Manifest = json(&blobs.read_blob(digest)?, digest)?;
    if let Some(kind) = manifest.artifact() {
        return Err(artifact_error(digest, kind));
    }
    let config = ImageConfig::from_json(&blobs.read_blob(&manifest.config.digest)?)?;
    let (layers, files) = layers(&manifest, &config)?;
    Ok(Image::new(blobs, chosen.names, config, layers, files))
}

fn artifact_error(digest: &str, kind: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{digest} is an artifact of type {kind:?} and not a container image"),
    )
}

/// Pairs the manifest's layers with the configuration's diff_ids.
fn layers(manifest: &Manifest, config: &ImageConfig) -> Result<(Vec<LayerRef>, Vec<String>)> {
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the image has {} layers but {} diff_ids",
                manifest.layers.len(),
                diff_ids.len()
            ),
        ));
    }
    let mut layers = Vec::new();
    let mut files = Vec::new();
    for (descriptor, diff_id) in manifest.layers.iter().zip(diff_ids) {
        let media_type = descriptor.media_type.clone();
        let digest = descriptor.digest.clone();
        if !is_tar_layer(&media_type) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("layer {digest} is of type {media_type:?}, which is not a tar layer"),
            ));
        }
        files.push(blob_name(&digest)?);
        layers.push(LayerRef {
            diff_id: diff_id.clone(),
            digest: Some(digest),
            media_type,
            size: descriptor.size,
        });
    }
    Ok((layers, files))
}

fn is_tar_layer(media_type: &str) -> bool {
    let base = media_type
        .trim_end_matches("+gzip")
        .trim_end_matches("+zstd")
        .trim_end_matches(".gzip")
        .trim_end_matches(".zstd");
    matches!(
        base,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
    )
}

fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_manifest(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
    )
}

/// The names that an entry of an index has: containerd's full one, then the OCI reference.
fn names_of(descriptor: &Descriptor) -> impl Iterator<Item = &String> {
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .into_iter()
    .filter_map(|key| descriptor.annotations.get(key))
}

/// The full name of an image as containerd and Docker have it: `docker.io/library/NAME:latest`
/// for a bare `NAME`.
pub(super) fn canonical_name(name: &str) -> String {
    let (first, rest) = name.split_once('/').unwrap_or(("", name));
    let registry = first == "localhost" || first.contains(['.', ':']);
    let full = match (registry, first) {
        (true, _) => name.to_owned(),
        (false, "") => format!("docker.io/library/{rest}"),
        (false, _) => format!("docker.io/{name}"),
    };
    if tag_of(&full).is_some() || full.contains('@') {
        full
    } else {
        format!("{full}:latest")
    }
}

/// The tag in the name of an image.
pub fn tag_of(name: &str) -> Option<&str> {
    let (_, tag) = name.rsplit_once(':')?;
    (!tag.contains('/')).then_some(tag)
}

/// Follows an index to all manifests that could be images.
struct Walk<'a> {
    blobs: &'a Blobs,
    looked_at: usize,
    found: Vec<Candidate>,
    /// Why the first index that is not there cannot be read.
    missing: Option<Error>,
}

impl Walk<'_> {
    /// Adds every manifest that `descriptor`, an entry of `above`, leads to.
    fn collect(
        &mut self,
        descriptor: &Descriptor,
        above: Option<&Candidate>,
        depth: usize,
    ) -> Result<()> {
        // Not the manifests found: a few indexes, each many times in the next, lead to none for
        // ever.
        self.looked_at += 1;
        if self.looked_at > MAX_ENTRIES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the index leads to more than {MAX_ENTRIES} manifests and indexes"),
            ));
        }
        let here = candidate(descriptor, above);
        let mut kind = descriptor.media_type.clone();
        if kind.is_empty() {
            kind = self.sniff(&descriptor.digest)?;
        }
        if is_index(&kind) {
            return self.enter(&here, depth);
        }
        // Attestations sit beside images under this platform, or say what they are.
        let platform = descriptor.platform.as_ref();
        let unknown = platform.is_some_and(|platform| platform.os == "unknown")
            || descriptor
                .annotations
                .contains_key("vnd.docker.reference.type");
        if is_manifest(&kind) && !unknown {
            self.found.push(here);
        }
        Ok(())
    }

    fn enter(&mut self, here: &Candidate, depth: usize) -> Result<()> {
        if depth >= MAX_INDEXES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("indexes nest more than {MAX_INDEXES} deep"),
            ));
        }
        let digest = &here.descriptor.digest;
        let index: Index = match self.blobs.read_blob(digest) {
            Ok(data) => json(&data, digest)?,
            // Programs that save one platform of an image leave the rest out.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.missing.get_or_insert(error);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for inner in &index.manifests {
            self.collect(inner, Some(here), depth + 1)?;
        }
        Ok(())
    }

    /// The type of a document whose entry does not say.
    fn sniff(&self, digest: &str) -> Result<String> {
        let document: serde_json::Value = json(&self.blobs.read_blob(digest)?, digest)?;
        Ok(match document.get("manifests") {
            Some(_) => "application/vnd.oci.image.index.v1+json".into(),
            None => "application/vnd.oci.image.manifest.v1+json".into(),
        })
    }
}

fn candidate(descriptor: &Descriptor, above: Option<&Candidate>) -> Candidate {
    let mut names: Vec<String> = names_of(descriptor).cloned().collect();
    let named = !names.is_empty();
    let mut digests = Vec::new();
    let mut image = descriptor.digest.clone();
    if let Some(above) = above {
        digests.clone_from(&above.digests);
        if !named {
            image.clone_from(&above.image);
        }
        names.extend(above.names.iter().cloned());
    }
    digests.push(descriptor.digest.clone());
    Candidate {
        descriptor: descriptor.clone(),
        names,
        digests,
        image,
    }
}

/// The names of candidates, for a message.
fn listed(candidates: &[Candidate]) -> String {
    let names: BTreeSet<&str> = candidates
        .iter()
        .filter_map(|candidate| candidate.names.first())
        .map(String::as_str)
        .collect();
    if names.is_empty() {
        return "none of them has a name".to_owned();
    }
    let names: Vec<&str> = names.into_iter().collect();
    format!("it has {}", names.join(", "))
}

/// The candidates that carry the name or digest asked for, or lie in an index that does; all where
/// nothing is asked for. A name given in full, or as it is written, goes before a short one.
fn asked_for(found: Vec<Candidate>, wanted: Option<&str>) -> Result<Vec<Candidate>> {
    if found.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            "the OCI layout has no image in it",
        ));
    }
    let Some(wanted) = wanted else {
        return Ok(found);
    };
    // `NAME@DIGEST` is as good as the digest.
    let digest = wanted.rsplit_once('@').map_or(wanted, |(_, digest)| digest);
    let exactly = |candidate: &Candidate| {
        candidate.names.iter().any(|name| name == wanted)
            || candidate.digests.iter().any(|there| there == digest)
    };
    let full = canonical_name(wanted);
    let in_full = |candidate: &Candidate| {
        let mut names = candidate.names.iter();
        names.any(|name| canonical_name(name) == full)
    };
    let list = listed(&found);
    let (exact, others): (Vec<_>, Vec<_>) = found.into_iter().partition(exactly);
    let matching: Vec<Candidate> = match exact.is_empty() {
        true => others.into_iter().filter(in_full).collect(),
        false => exact,
    };
    if matching.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the OCI layout has no image {wanted:?}: {list}"),
        ));
    }
    Ok(matching)
}

/// Leaves out what is an artifact beside images, or not there at all. One that is alone stays: what
/// is wrong with it is said later.
fn images_among(blobs: &Blobs, candidates: Vec<Candidate>) -> Result<Vec<Candidate>> {
    if candidates.len() < 2 {
        return Ok(candidates);
    }
    let mut images = Vec::new();
    let mut artifact = None;
    let mut missing = None;
    for candidate in candidates {
        let digest = candidate.descriptor.digest.clone();
        let kind = match blobs.read_blob(&digest) {
            Ok(data) => {
                let manifest: Manifest = json(&data, &digest)?;
                let kind = manifest.artifact();
                kind.or((!candidate.descriptor.artifact_type.is_empty())
                    .then_some(candidate.descriptor.artifact_type.as_str()))
                    .map(str::to_owned)
            }
            // With a platform it counts all the same: asked for, it is an error that says so.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if candidate.descriptor.platform.is_none() {
                    missing.get_or_insert(error);
                    continue;
                }
                None
            }
            Err(error) => return Err(error),
        };
        match kind {
            Some(kind) => drop(artifact.get_or_insert((digest, kind))),
            None => images.push(candidate),
        }
    }
    match (images.is_empty(), artifact, missing) {
        (true, Some((digest, kind)), _) => Err(artifact_error(&digest, &kind)),
        (true, None, Some(missing)) => Err(missing),
        _ => Ok(images),
    }
}

/// Checks that there is one image to take, for whatever platforms.
fn check_single(candidates: &[Candidate]) -> Result<()> {
    let images: BTreeSet<&str> = candidates.iter().map(|c| c.image.as_str()).collect();
    let names: BTreeSet<_> = candidates.iter().map(|c| c.names.first()).collect();
    if images.len() > 1 && names.len() > 1 {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the OCI layout has several images, say which one (--select): {}",
                listed(candidates)
            ),
        ));
    }
    Ok(())
}

/// The candidate for the platform `wanted`.
///
/// A lone image whose index names no platform is taken whatever it is for, unless the caller
/// `insists`: storing an image for another machine is legitimate.
fn choose(
    blobs: &Blobs,
    mut candidates: Vec<Candidate>,
    wanted: &Platform,
    insists: bool,
) -> Result<Candidate> {
    if candidates.len() == 1
        && let Some(only) = candidates.pop_if(|only| only.descriptor.platform.is_none() && !insists)
    {
        return Ok(only);
    }
    let mut list = BTreeSet::new();
    let mut best = None;
    for candidate in candidates {
        let platform = match &candidate.descriptor.platform {
            Some(platform) => platform.clone(),
            None => platform_of(blobs, &candidate.descriptor)?,
        };
        list.insert(platform.to_string());
        let Some(rank) = wanted.rank(&platform) else {
            continue;
        };
        if best.as_ref().is_none_or(|(other, _)| rank > *other) {
            best = Some((rank, candidate));
        }
    }
    best.map(|(_, candidate)| candidate).ok_or_else(|| {
        let list: Vec<String> = list.into_iter().collect();
        Error::new(
            ErrorKind::NotFound,
            format!(
                "the index has no image for {wanted}: there is {}",
                list.join(", ")
            ),
        )
    })
}

/// The platform in the configuration of a manifest whose index does not say.
fn platform_of(blobs: &Blobs, descriptor: &Descriptor) -> Result<Platform> {
    let digest = &descriptor.digest;
    let manifest: Manifest = json(&blobs.read_blob(digest)?, digest)?;
    let config = ImageConfig::from_json(&blobs.read_blob(&manifest.config.digest)?)?;
    Ok(Platform {
        os: config.os,
        architecture: config.architecture,
        variant: config.variant,
    })
}

/// Parses a JSON document of the image.
pub(super) fn json<T: DeserializeOwned>(data: &[u8], name: &str) -> Result<T> {
    // By way of a value, in which the last of several equal keys counts, as Go reads it.
    serde_json::from_slice::<serde_json::Value>(data)
        .and_then(serde_json::from_value)
        .map_err(std::io::Error::from)
        .context(|| format!("{name} is not the JSON that the specification asks for"))
        .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_canonical_as_docker_does_it() {
        for (short, full) in [
            ("app", "docker.io/library/app:latest"),
            ("app:1", "docker.io/library/app:1"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("ghcr.io/a/b:c", "ghcr.io/a/b:c"),
        ] {
            assert_eq!(canonical_name(short), full);
        }
    }

    #[test]
    fn layer_types_with_any_known_compression_are_tars() {
        for good in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
        ] {
            assert!(is_tar_layer(good), "{good}");
        }
        for bad in [
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.erofs.layer.v1",
            "text/plain",
        ] {
            assert!(!is_tar_layer(bad), "{bad}");
        }
    }
}
