//! An image in a registry, as containerd learns of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::registry_support::Registry;
use crate::snapshotter_support::client::{Client, Failure};
use vellum_snapshotter::proto::types::Mount;

pub const REF: &str = "containerd.io/snapshot.ref";
const PREFIX: &str = "containerd.io/snapshot/cri.";

/// What containerd knows of an image when it begins to unpack it.
pub struct Image {
    pub name: String,
    pub manifest: String,
    pub layers: Vec<String>,
    /// One for each layer.
    pub chain_ids: Vec<String>,
}

impl Image {
    /// The image behind what a push said that its tag names.
    pub fn new(registry: &Registry, name: &str, tagged: &str) -> Image {
        let mut manifest = tagged.to_owned();
        let mut document = registry.document(&manifest);
        if let Some(entries) = document["manifests"].as_array() {
            manifest = text(&entries[0]["digest"]);
            document = registry.document(&manifest);
        }
        let config = registry.document(&text(&document["config"]["digest"]));
        let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
        let mut chain_ids: Vec<String> = Vec::new();
        for diff_id in diff_ids {
            let id = match chain_ids.last() {
                None => text(diff_id),
                Some(below) => {
                    let digest = Sha256::digest(format!("{below} {}", text(diff_id)));
                    let digits: Vec<String> = digest.iter().map(|b| format!("{b:02x}")).collect();
                    format!("sha256:{}", digits.concat())
                }
            };
            chain_ids.push(id);
        }
        let layers = document["layers"].as_array().unwrap().iter();
        Image {
            name: registry.image(name),
            manifest,
            layers: layers.map(|layer| text(&layer["digest"])).collect(),
            chain_ids,
        }
    }

    /// Prepares a layer as containerd does before it unpacks it.
    pub fn prepare(
        &self,
        client: &Client,
        layer: usize,
        key: &str,
        parent: &str,
    ) -> Result<Mount, Failure> {
        let named = |name: &str| format!("{PREFIX}{name}");
        let labels = [
            (REF.to_owned(), self.chain_ids[layer].clone()),
            (named("image-ref"), self.name.clone()),
            (named("manifest-digest"), self.manifest.clone()),
            (named("layer-digest"), self.layers[layer].clone()),
            (named("image-layers"), self.layers[layer..].join(",")),
        ];
        let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (&**k, &**v)).collect();
        client.prepare(key, parent, &labels)
    }

    /// The committed snapshot that containerd finds for a layer.
    pub fn found(&self, client: &Client, layer: usize, parent: &str) -> Vec<String> {
        let target = &self.chain_ids[layer];
        let filter =
            format!("labels.\"{REF}\"==\"{target}\",parent==\"{parent}\",kind==\"committed\"");
        let infos = client.list(&[&filter]).unwrap();
        infos.into_iter().map(|info| info.name).collect()
    }
}

/// The directories of lazy layers.
pub fn lazy_layers(store: &Path) -> Vec<PathBuf> {
    let layers = fs::read_dir(store.join("layers")).unwrap().flatten();
    let dirs = layers.map(|layer| layer.path());
    dirs.filter(|dir| dir.join("have").exists() && !dir.join("seal").exists())
        .collect()
}

/// Bytes that lazy layers have on the disk, and those that they will have.
pub fn lazy_bytes(store: &Path) -> (u64, u64) {
    let (mut here, mut all) = (0, 0);
    for dir in lazy_layers(store) {
        for file in fs::read_dir(&dir).unwrap().flatten() {
            here += file.metadata().unwrap().blocks() * 512;
        }
        let info = fs::read(dir.join("info.json")).unwrap();
        let info: Value = serde_json::from_slice(&info).unwrap();
        all += info["bytes"].as_u64().unwrap();
    }
    (here, all)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}
