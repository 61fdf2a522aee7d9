//! OCI image layouts: from index to manifest to layers.
//!
//! See the OCI image specification 1.1: image-layout.md, image-index.md, manifest.md.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::de::DeserializeOwned;

use super::blobs::{Blobs, blob_name};
use super::config::ImageConfig;
use super::layer::LayerRef;
use super::source::{Image, SourceOptions};
use crate::error::ResultExt;
use crate::{Error, ErrorKind, Result};

/// How deep indexes nest.
const MAX_INDEXES: usize = 8;

/// The most entries of indexes that are looked at, one within the other.
const MAX_ENTRIES: usize = 10_000;

/// What kind of machine an image is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Platform {
    /// Operating system in Go's spelling: `linux`.
    pub os: String,
    /// Processor in Go's spelling: `amd64`.
    pub architecture: String,
    /// Its variant: `v8`.
    pub variant: Option<String>,
}

impl Platform {
    /// The machine this runs on.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(String::from),
        }
    }

    /// How well an image for `image` runs here: higher is better, `None` not at all.
    fn rank(&self, image: &Platform) -> Option<u32> {
        if self.os != image.os || self.architecture != image.architecture {
            return None;
        }
        let number = |variant: &Option<String>| -> Option<u32> {
            variant.as_ref()?.strip_prefix('v')?.parse().ok()
        };
        match (number(&self.variant), number(&image.variant)) {
            (Some(own), Some(other)) if other > own => None,
            (_, Some(other)) => Some(other + 1),
            (_, None) => Some(1),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Reads `OS/ARCHITECTURE[/VARIANT]`.
    fn from_str(text: &str) -> Result<Platform> {
        let mut parts = text.split('/').map(String::from);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if !os.is_empty() && !architecture.is_empty() =>
            {
                Ok(Platform {
                    os,
                    architecture,
                    variant,
                })
            }
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is not a platform such as linux/amd64 or linux/arm64/v8"),
            )),
        }
    }
}

/// A manifest that could be the image.
struct Candidate {
    descriptor: Descriptor,
    platform: Option<Platform>,
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
    let index: ImageIndex = json(&blobs.read("index.json")?, "index.json")?;
    let named = select_name(&index, options.image.as_deref())?;
    let mut candidates = Vec::new();
    let mut looked_at = 0;
    for descriptor in &named {
        collect(&blobs, descriptor, 0, &mut looked_at, &mut candidates)?;
    }
    let wanted = options.platform.clone().unwrap_or_else(Platform::host);
    let chosen = choose(&blobs, candidates, &wanted, options.platform.is_some())?;
    let mut names = Vec::new();
    for descriptor in &named {
        if let Some(name) = name_of(descriptor)
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    let digest = chosen.descriptor.digest().to_string();
    let manifest: ImageManifest = json(&blobs.read_blob(&digest)?, &digest)?;
    let config_digest = manifest.config().digest().to_string();
    let config_type = manifest.config().media_type().to_string();
    if !matches!(
        config_type.as_str(),
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
    ) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{digest} is an artifact of type {config_type:?} and not a container image"),
        ));
    }
    let config = ImageConfig::from_json(&blobs.read_blob(&config_digest)?)?;
    let (layers, files) = layers(&manifest, &config)?;
    Ok(Image::new(blobs, names, config, layers, files))
}

/// Pairs the manifest's layers with the configuration's diff_ids.
fn layers(manifest: &ImageManifest, config: &ImageConfig) -> Result<(Vec<LayerRef>, Vec<String>)> {
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers().len() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the image has {} layers but {} diff_ids",
                manifest.layers().len(),
                diff_ids.len()
            ),
        ));
    }
    let mut layers = Vec::new();
    let mut files = Vec::new();
    for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
        let media_type = descriptor.media_type().to_string();
        let digest = descriptor.digest().to_string();
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
            size: descriptor.size(),
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

fn is_index(descriptor: &Descriptor) -> bool {
    matches!(
        descriptor.media_type().to_string().as_str(),
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_manifest(descriptor: &Descriptor) -> bool {
    matches!(
        descriptor.media_type().to_string().as_str(),
        "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
    )
}

fn annotation(descriptor: &Descriptor, key: &str) -> Option<String> {
    descriptor.annotations().as_ref()?.get(key).cloned()
}

/// The name of an image in an index: containerd's full one, else the OCI reference.
fn name_of(descriptor: &Descriptor) -> Option<String> {
    annotation(descriptor, "io.containerd.image.name")
        .or_else(|| annotation(descriptor, "org.opencontainers.image.ref.name"))
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
pub(super) fn tag_of(name: &str) -> Option<&str> {
    let (_, tag) = name.rsplit_once(':')?;
    (!tag.contains('/')).then_some(tag)
}

/// The entries of the index that carry the name asked for, or the only name there is.
fn select_name(index: &ImageIndex, wanted: Option<&str>) -> Result<Vec<Descriptor>> {
    let all = index.manifests();
    if all.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            "the OCI layout has no image in it",
        ));
    }
    let names: BTreeSet<String> = all.iter().filter_map(name_of).collect();
    let listed = || {
        let list: Vec<&str> = names.iter().map(String::as_str).collect();
        if list.is_empty() {
            "none of them has a name".to_owned()
        } else {
            format!("it has {}", list.join(", "))
        }
    };
    if let Some(wanted) = wanted {
        let matching: Vec<Descriptor> = all
            .iter()
            .filter(|descriptor| {
                let short = annotation(descriptor, "org.opencontainers.image.ref.name");
                name_of(descriptor).as_deref() == Some(wanted)
                    || short.as_deref() == Some(wanted)
                    || name_of(descriptor) == Some(canonical_name(wanted))
                    || descriptor.digest().to_string() == wanted
            })
            .cloned()
            .collect();
        if matching.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the OCI layout has no image {wanted:?}: {}", listed()),
            ));
        }
        return Ok(matching);
    }
    let unnamed = all.iter().any(|descriptor| name_of(descriptor).is_none());
    let digests: BTreeSet<String> = all.iter().map(|d| d.digest().to_string()).collect();
    if digests.len() > 1 && (names.len() > 1 || (names.len() == 1 && unnamed)) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the OCI layout has several images, say which one: {}",
                listed()
            ),
        ));
    }
    Ok(all.clone())
}

/// Adds every manifest that `descriptor` leads to.
fn collect(
    blobs: &Blobs,
    descriptor: &Descriptor,
    depth: usize,
    looked_at: &mut usize,
    found: &mut Vec<Candidate>,
) -> Result<()> {
    // Not the manifests found: a few indexes, each many times in the next, lead to none for ever.
    *looked_at += 1;
    if *looked_at > MAX_ENTRIES {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("the index leads to more than {MAX_ENTRIES} manifests and indexes"),
        ));
    }
    if is_index(descriptor) {
        if depth >= MAX_INDEXES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("indexes nest more than {MAX_INDEXES} deep"),
            ));
        }
        let digest = descriptor.digest().to_string();
        let index: ImageIndex = json(&blobs.read_blob(&digest)?, &digest)?;
        for inner in index.manifests() {
            collect(blobs, inner, depth + 1, looked_at, found)?;
        }
        return Ok(());
    }
    let platform = descriptor.platform().as_ref().map(|platform| Platform {
        os: platform.os().to_string(),
        architecture: platform.architecture().to_string(),
        variant: platform.variant().clone(),
    });
    // Attestations sit beside images under this platform; signatures have other media types.
    let unknown = platform
        .as_ref()
        .is_some_and(|platform| platform.os == "unknown");
    if is_manifest(descriptor) && !unknown {
        found.push(Candidate {
            descriptor: descriptor.clone(),
            platform,
        });
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
        && let Some(only) = candidates.pop_if(|only| only.platform.is_none() && !insists)
    {
        return Ok(only);
    }
    for candidate in &mut candidates {
        if candidate.platform.is_none() {
            candidate.platform = Some(platform_of(blobs, &candidate.descriptor)?);
        }
    }
    let list: BTreeSet<String> = candidates
        .iter()
        .filter_map(|candidate| Some(candidate.platform.as_ref()?.to_string()))
        .collect();
    let mut best: Option<(u32, Candidate)> = None;
    for candidate in candidates {
        let rank = candidate
            .platform
            .as_ref()
            .and_then(|image| wanted.rank(image));
        if let Some(rank) = rank
            && best.as_ref().is_none_or(|(other, _)| rank > *other)
        {
            best = Some((rank, candidate));
        }
    }
    best.map(|(_, candidate)| candidate).ok_or_else(|| {
        let list: Vec<String> = list.into_iter().collect();
        let there = if list.is_empty() {
            "there is no container image".to_owned()
        } else {
            format!("there is {}", list.join(", "))
        };
        Error::new(
            ErrorKind::NotFound,
            format!("the index has no image for {wanted}: {there}"),
        )
    })
}

/// The platform in the configuration of a manifest whose index does not say.
fn platform_of(blobs: &Blobs, descriptor: &Descriptor) -> Result<Platform> {
    let digest = descriptor.digest().to_string();
    let manifest: ImageManifest = json(&blobs.read_blob(&digest)?, &digest)?;
    let config = blobs.read_blob(manifest.config().digest().as_ref())?;
    let config = ImageConfig::from_json(&config)?;
    Ok(Platform {
        os: config.os,
        architecture: config.architecture,
        variant: config.variant,
    })
}

/// Parses a JSON document of the image.
pub(super) fn json<T: DeserializeOwned>(data: &[u8], name: &str) -> Result<T> {
    serde_json::from_slice(data)
        .map_err(std::io::Error::from)
        .context(|| format!("{name} is not the JSON that the specification asks for"))
        .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn platforms_parse_and_print() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform(text).to_string(), text);
        }
        for text in ["", "linux", "linux/", "a/b/c/d"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

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
    fn the_highest_variant_that_runs_ranks_first() {
        let host = platform("linux/arm/v7");
        assert!(host.rank(&platform("linux/arm/v7")) > host.rank(&platform("linux/arm/v6")));
        assert!(host.rank(&platform("linux/arm/v6")) > host.rank(&platform("linux/arm")));
        assert_eq!(host.rank(&platform("linux/arm/v8")), None);
        assert_eq!(host.rank(&platform("linux/arm64")), None);
        assert_eq!(host.rank(&platform("windows/arm")), None);
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
