//! What images and containers take on the store's disk, and how much of that they share.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use uuid::Uuid;

use super::known::Known;
use super::status::status;
use vellum_base::error::{Result, ResultExt};
use vellum_store::{SnapshotKind, Store};

/// What a store holds.
#[derive(Debug, Clone, Serialize)]
pub struct Usage {
    /// Images, containers and what containerd has, in this order.
    pub parts: Vec<PartUsage>,
    /// Named volumes that lie in the store.
    pub volumes: Vec<VolumeUsage>,
    /// Bytes of data in all layers, each counted once.
    pub layer_bytes: u64,
    /// Bytes that all those volumes take.
    pub volume_bytes: u64,
}

/// What one image or container takes.
#[derive(Debug, Clone, Serialize)]
pub struct PartUsage {
    /// `image`, `container` or `snapshot` (of containerd's).
    pub kind: &'static str,
    /// Its name; of an image with several, all of them.
    pub name: String,
    /// Bytes of data in all its layers.
    pub total: u64,
    /// In layers that another image or container has too.
    pub shared: u64,
    /// In layers that nothing else has: what its removal gives back.
    pub unique: u64,
}

/// What a named volume takes.
#[derive(Debug, Clone, Serialize)]
pub struct VolumeUsage {
    /// Its name.
    pub name: String,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// One that has layers.
struct Part {
    kind: &'static str,
    name: String,
    layers: HashSet<Uuid>,
}

/// Looks what each image and container takes.
///
/// # Errors
/// Where the store's records, or a volume, cannot be read.
pub fn usage(store: &Store) -> Result<Usage> {
    let mut parts: Vec<Part> = images(store)?;
    let snapshots = store.snapshots(Store::warn_damaged)?;
    let known = Known::new(store, &snapshots);
    // Of layers that are written the record does not say.
    let mut written: HashMap<Uuid, u64> = HashMap::new();
    for container in store.containers()? {
        let top = store.resolve(&container)?.top;
        let mut layers: HashSet<Uuid> = container.named_layers().copied().collect();
        layers.insert(top);
        let name = container.name.clone();
        written.insert(top, status(&known, container, true)?.size.unwrap_or(0));
        parts.push(Part {
            kind: "container",
            name,
            layers,
        });
    }
    for record in &snapshots {
        let size = super::status::snapshot_status(&known, record, true)?.size;
        if let (SnapshotKind::Active, Some(size)) = (record.kind, size) {
            written.insert(record.top(), size);
        }
        parts.push(Part {
            kind: "snapshot",
            name: record.key.clone(),
            layers: store.ancestry(Some(record.top()))?.into_iter().collect(),
        });
    }
    let bytes = |layer: &Uuid| match written.get(layer) {
        Some(bytes) => *bytes,
        None => known.bytes_of(&[*layer]),
    };
    let mut owners: HashMap<Uuid, usize> = HashMap::new();
    for layer in parts.iter().flat_map(|part| &part.layers) {
        *owners.entry(*layer).or_insert(0) += 1;
    }
    let volumes = volumes(store)?;
    Ok(Usage {
        layer_bytes: owners.keys().map(bytes).sum(),
        volume_bytes: volumes.iter().map(|volume| volume.bytes).sum(),
        volumes,
        parts: parts
            .into_iter()
            .map(|part| {
                let total: u64 = part.layers.iter().map(bytes).sum();
                let alone = |layer: &&Uuid| owners.get(layer) == Some(&1);
                let unique: u64 = part.layers.iter().filter(alone).map(bytes).sum();
                PartUsage {
                    kind: part.kind,
                    name: part.name,
                    total,
                    shared: total - unique,
                    unique,
                }
            })
            .collect(),
    })
}

/// Each once, however many names it has.
fn images(store: &Store) -> Result<Vec<Part>> {
    let mut by_id: BTreeMap<Uuid, Part> = BTreeMap::new();
    for image in store.images()? {
        match by_id.get_mut(&image.id) {
            Some(part) => part.name = format!("{}, {}", part.name, image.name),
            None => {
                let part = Part {
                    kind: "image",
                    name: image.name,
                    layers: image.layers.into_iter().collect(),
                };
                by_id.insert(image.id, part);
            }
        }
    }
    let mut parts: Vec<Part> = by_id.into_values().collect();
    parts.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(parts)
}

fn volumes(store: &Store) -> Result<Vec<VolumeUsage>> {
    let mut found = Vec::new();
    for name in store.volumes()? {
        let place = store.volume_place(&name)?;
        if !place.elsewhere {
            let bytes = on_disk(&place.dir);
            let bytes = bytes.context(|| format!("cannot look through the volume {name}"))?;
            found.push(VolumeUsage { name, bytes });
        }
    }
    Ok(found)
}

/// Bytes that a directory takes with all below. A file with several names there counts once.
fn on_disk(dir: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut seen = HashSet::new();
    let mut bytes = 0;
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = match path.symlink_metadata() {
            // Removed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if seen.insert((meta.dev(), meta.ino())) {
            bytes += meta.blocks() * 512;
        }
        if meta.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
    }
    Ok(bytes)
}
