//! What labels ask of a snapshot.

use std::collections::BTreeMap;

use super::config::MountMode;
use super::failure::{Result, invalid};

/// The layer that is to be unpacked, by its chain id: one that we have already need not be.
pub(super) const REF_LABEL: &str = "containerd.io/snapshot.ref";
/// The image that it is of, as who pulls it calls it (containerd's pkg/snapshotters/annotations.go).
pub(super) const IMAGE_LABEL: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of the image's manifest.
pub(super) const MANIFEST_LABEL: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The size of a container's device.
const SIZE_LABELS: [&str; 2] = [
    "containerd.io/snapshot/vellum.size",
    "containerd.io/snapshot/max-size",
];
/// `bind` or `device`: how the snapshot is handed out.
const MOUNTS_LABEL: &str = "containerd.io/snapshot/vellum.mounts";

/// The size of the file system that the labels want, in bytes.
pub(super) fn wanted_size(labels: &BTreeMap<String, String>) -> Result<Option<u64>> {
    for label in SIZE_LABELS {
        if let Some(text) = labels.get(label) {
            let size = vellum_base::size::parse_size(text);
            return match size {
                Ok(size) => Ok(Some(size)),
                Err(error) => Err(invalid(format!("label {label}: {error}"))),
            };
        }
    }
    Ok(None)
}

/// How the labels want the snapshot handed out.
pub(super) fn wanted_mode(labels: &BTreeMap<String, String>) -> Result<Option<MountMode>> {
    match labels.get(MOUNTS_LABEL).map(String::as_str) {
        None => Ok(None),
        Some("bind") => Ok(Some(MountMode::Bind)),
        Some("device") => Ok(Some(MountMode::Device)),
        Some(other) => Err(invalid(format!(
            "label {MOUNTS_LABEL}={other:?}: it is \"bind\" or \"device\""
        ))),
    }
}
