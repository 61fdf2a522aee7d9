//! Docker archives: what `docker save` and `skopeo copy … docker-archive:` write.

use serde::Deserialize;

use super::blobs::Blobs;
use super::config::{ImageConfig, list};
use super::layer::LayerRef;
use super::oci::{canonical_name, json};
use super::platform::Platform;
use super::source::{Image, SourceOptions};
use vellum_base::{Error, ErrorKind, Result};

/// One image in `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default, deserialize_with = "list")]
    layers: Vec<String>,
}

impl Entry {
    fn names(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    fn shown(&self) -> String {
        match self.names() {
            [] => self.config.clone(),
            names => names.join(", "),
        }
    }
}

/// Finds the image that `options` ask for.
pub(super) fn load(blobs: Blobs, options: &SourceOptions) -> Result<Image> {
    let entries: Vec<Entry> = json(&blobs.read("manifest.json")?, "manifest.json")?;
    let entry = select(&entries, options.image.as_deref())?;
    let config = ImageConfig::from_json(&blobs.read(&entry.config)?)?;
    if let Some(wanted) = &options.platform
        && (wanted.os != config.os || wanted.architecture != config.architecture)
    {
        let there = Platform {
            os: config.os,
            architecture: config.architecture,
            variant: config.variant,
        };
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the archive has no image for {wanted}: there is {there}"),
        ));
    }
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != entry.layers.len() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the image has {} layers but {} diff_ids",
                entry.layers.len(),
                diff_ids.len()
            ),
        ));
    }
    let mut layers = Vec::new();
    for (file, diff_id) in entry.layers.iter().zip(diff_ids) {
        let (_, size) = blobs.open(file)?;
        layers.push(LayerRef {
            diff_id: diff_id.clone(),
            digest: None,
            media_type: "application/vnd.docker.image.rootfs.diff.tar".into(),
            size,
        });
    }
    let (names, files) = (entry.names().to_vec(), entry.layers.clone());
    Ok(Image::new(blobs, names, config, layers, files))
}

fn select<'a>(entries: &'a [Entry], wanted: Option<&str>) -> Result<&'a Entry> {
    let list = || {
        let list: Vec<String> = entries.iter().map(Entry::shown).collect();
        list.join(", ")
    };
    match (entries, wanted) {
        ([], _) => Err(Error::new(
            ErrorKind::NotFound,
            "the Docker archive has no image in it",
        )),
        ([only], None) => Ok(only),
        (_, None) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the archive has several images, say which one (--select): {}",
                list()
            ),
        )),
        (_, Some(wanted)) => {
            let canonical = canonical_name(wanted);
            let full = |name: &String| name == wanted || canonical_name(name) == canonical;
            let found = entries
                .iter()
                .find(|entry| entry.names().iter().any(full) || entry.config == wanted);
            found.ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("the archive has no image {wanted:?}: it has {}", list()),
                )
            })
        }
    }
}
