//! Docker archives from before Docker 1.10: a directory for each layer, with what it is in `json`
//! and its files in `layer.tar`, and names in `repositories`.
//!
//! See "Image Specification v1.0.0" of the moby project (image/spec/v1.md).

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use serde::Deserialize;
use serde_json::Value;

use super::blobs::Blobs;
use super::compress::{Decoder, buffered};
use super::config::{HistoryEntry, ImageConfig, RootFs, RunConfig, list, or_default};
use super::layer::{Hasher, LayerRef};
use super::oci::{canonical_name, json};
use super::read_failure;
use super::source::{Image, SourceOptions};
use vellum_base::{Error, ErrorKind, Result};

/// The most layers of one image.
const MAX_LAYERS: usize = 10_000;

/// Names, then tags, then the topmost layer.
type Repositories = BTreeMap<String, BTreeMap<String, String>>;

/// A layer's `json`.
#[derive(Debug, Deserialize)]
struct Layer {
    id: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    author: Option<String>,
    #[serde(default)]
    comment: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    config: RunConfig,
    #[serde(default, deserialize_with = "or_default")]
    container_config: Made,
}

/// Of the container that a layer was made from, the command.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Made {
    #[serde(default, deserialize_with = "list")]
    cmd: Vec<String>,
}

/// Whether it is one: layers in directories of their own, and their names or ids that say so.
pub(super) fn is_one(blobs: &Blobs) -> bool {
    let ids = ids(blobs);
    let is_id = |id: &String| id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let named = || {
        let names = blobs.read("repositories").ok();
        let names = names.and_then(|names| serde_json::from_slice::<Value>(&names).ok());
        names.is_some_and(|names| names.is_object())
    };
    !ids.is_empty() && (ids.iter().all(is_id) || named())
}

/// The directories of layers.
fn ids(blobs: &Blobs) -> BTreeSet<String> {
    let names = blobs.names_below("json");
    let whole = |id: &String| blobs.has(&format!("{id}/layer.tar"));
    names.into_iter().filter(whole).collect()
}

/// Finds the image that `options` ask for.
pub(super) fn load(blobs: Blobs, options: &SourceOptions) -> Result<Image> {
    let ids = ids(&blobs);
    if ids.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            "it is no Docker archive: it has neither a manifest.json nor layers as Docker wrote \
             them before version 1.10",
        ));
    }
    let repositories: Repositories = match blobs.has("repositories") {
        true => json(&blobs.read("repositories")?, "repositories")?,
        false => Repositories::new(),
    };
    let mut layers = BTreeMap::new();
    for id in &ids {
        let layer: Layer = json(&blobs.read(&format!("{id}/json"))?, &format!("{id}/json"))?;
        if layer.id != *id {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{id}/json describes another layer, {:?}", layer.id),
            ));
        }
        layers.insert(id.clone(), layer);
    }
    let (top, names) = select(&layers, &repositories, options.image.as_deref())?;
    let chain = chain(&layers, &top)?;
    let config = config(&blobs, &chain)?;
    let mut refs = Vec::new();
    let mut files = Vec::new();
    for (layer, diff_id) in chain.iter().zip(&config.rootfs.diff_ids) {
        let file = format!("{}/layer.tar", layer.id);
        let (_, size) = blobs.open(&file)?;
        refs.push(LayerRef {
            diff_id: diff_id.clone(),
            digest: None,
            media_type: "application/vnd.docker.image.rootfs.diff.tar".into(),
            size,
        });
        files.push(file);
    }
    Ok(Image::new(blobs, names, config, refs, files))
}

/// The topmost layer of the image asked for, and its names.
fn select(
    layers: &BTreeMap<String, Layer>,
    repositories: &Repositories,
    wanted: Option<&str>,
) -> Result<(String, Vec<String>)> {
    // An image without a name is whatever no other layer lies on.
    let mut images: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (repository, tags) in repositories {
        for (tag, id) in tags {
            let names = images.entry(id).or_default();
            names.push(format!("{repository}:{tag}"));
        }
    }
    let parents: BTreeSet<&str> = layers
        .values()
        .filter_map(|layer| layer.parent.as_deref())
        .collect();
    for id in layers.keys().filter(|id| !parents.contains(id.as_str())) {
        images.entry(id).or_default();
    }
    let list = || {
        let list: Vec<String> = images
            .iter()
            .map(|(id, names)| match names.as_slice() {
                [] => (*id).to_owned(),
                names => names.join(", "),
            })
            .collect();
        list.join(", ")
    };
    let found = match wanted {
        None if images.len() > 1 => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the archive has several images, say which one (--select): {}",
                    list()
                ),
            ));
        }
        None => images.first_key_value(),
        Some(wanted) => {
            let full = canonical_name(wanted);
            let mut all = images.iter();
            all.find(|(id, names)| {
                **id == wanted || names.iter().any(|name| canonical_name(name) == full)
            })
        }
    };
    let (id, names) = found.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "the archive has no image {:?}: it has {}",
                wanted.unwrap_or_default(),
                list()
            ),
        )
    })?;
    Ok(((*id).to_owned(), names.clone()))
}

/// The layers of an image, the lowest first.
fn chain<'a>(layers: &'a BTreeMap<String, Layer>, top: &str) -> Result<Vec<&'a Layer>> {
    let mut chain = Vec::new();
    let mut next = Some(top);
    while let Some(id) = next.filter(|id| !id.is_empty()) {
        let layer = layers.get(id).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the archive lacks the layer {id:?}"),
            )
        })?;
        chain.push(layer);
        if chain.len() > layers.len().min(MAX_LAYERS) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the layers of the archive lie on each other in a circle",
            ));
        }
        next = layer.parent.as_deref();
    }
    chain.reverse();
    Ok(chain)
}

/// The configuration in today's form: as `docker load` converts it.
fn config(blobs: &Blobs, chain: &[&Layer]) -> Result<ImageConfig> {
    let host = ImageConfig::for_host();
    let mut config = ImageConfig {
        architecture: host.architecture,
        os: host.os,
        rootfs: RootFs::default(),
        ..ImageConfig::default()
    };
    for layer in chain {
        let by = layer.container_config.cmd.join(" ");
        config.history.push(HistoryEntry {
            created: layer.created.clone(),
            created_by: (!by.is_empty()).then_some(by),
            author: layer.author.clone(),
            comment: layer.comment.clone(),
            ..HistoryEntry::default()
        });
        config.rootfs.diff_ids.push(diff_id(blobs, &layer.id)?);
    }
    if let Some(top) = chain.last() {
        config.created.clone_from(&top.created);
        config.author.clone_from(&top.author);
        config.config = top.config.clone();
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        config.architecture = given(&top.architecture).unwrap_or(config.architecture);
        config.os = given(&top.os).unwrap_or(config.os);
    }
    Ok(config)
}

/// The digest of a layer's uncompressed tar, which these archives do not say.
fn diff_id(blobs: &Blobs, id: &str) -> Result<String> {
    let (blob, _) = blobs.open(&format!("{id}/layer.tar"))?;
    let mut decoder = Decoder::new(buffered(blob))?;
    let mut hasher = Hasher::sha256();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let count = decoder
            .read(&mut buffer)
            .map_err(|error| read_failure(&format!("reading the layer {id}"), error))?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(buffer.split_at(count).0);
    }
}
