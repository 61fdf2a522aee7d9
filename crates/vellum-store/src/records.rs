//! What the store remembers of each thing: JSON files that a person can read.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::confinement::Confinement;
use super::container_snapshots::ContainerSnapshot;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_fs::ext4::Atime;
use vellum_image::ImageConfig;

/// The file system that a chain holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsInfo {
    /// `ext4`, or `ext2` or `ext3` of a disk image, which the kernel's ext4 mounts.
    pub kind: String,
    /// Why it cannot be made larger, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<String>,
}

/// What a chain is as a disk: part of the records of images and containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Virtual size in bytes: what the layers have, whole blocks.
    pub virtual_size: u64,
    /// Bytes that the device shows, where the disk image that it was made from ends within the last
    /// block. Older versions pass over it, and show the whole block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_size: Option<u64>,
    /// What the chain holds that can be mounted.
    #[serde(default)]
    pub fs: Option<FsInfo>,
    /// What a disk image was found to hold, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<String>,
}

impl DiskInfo {
    /// Bytes that the device of a chain shows whose layers have `whole`: those that were noted, unless the
    /// layers have grown since.
    pub fn shown_of(&self, whole: u64) -> u64 {
        match self.device_size {
            Some(shown) if whole == self.virtual_size => shown,
            _ => whole,
        }
    }

    /// Bytes that the device shows.
    pub fn shown(&self) -> u64 {
        self.device_size.unwrap_or(self.virtual_size)
    }
}

/// What is known of a layer besides its own header: `info.json` in its directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// How it came to be, for people.
    pub origin: String,
    /// The digest of the uncompressed tar that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Stands for the content of it and all below: layers with equal ones can be shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain_key: Option<String>,
    /// Bytes of its data blocks.
    #[serde(default)]
    pub bytes: u64,
    /// What `vellum check` found wrong with it: no new image is built on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

impl LayerInfo {
    /// Of a container's writable layer.
    pub fn writable() -> Self {
        LayerInfo {
            origin: "writable layer".into(),
            ..LayerInfo::default()
        }
    }
}

/// An empty file system that images of one size begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// The options and size that it was made with.
    pub key: String,
    /// Its only layer.
    pub layer: Uuid,
    /// What the layer holds.
    pub fs: FsInfo,
}

/// An image: sealed layers and how to run them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The name that users give.
    pub name: String,
    /// Stays when the name goes to another image.
    pub id: Uuid,
    /// From the bottom up; the first is a template or a raw image.
    pub layers: Vec<Uuid>,
    /// What its chain is as a disk.
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// How to run it, and its history.
    pub config: ImageConfig,
    /// RFC 3339.
    pub created: String,
}

impl ImageRecord {
    /// The layer that a container of the image lies on.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a record that names no layer.
    pub fn top(&self) -> Result<Uuid> {
        self.layers.last().copied().ok_or_else(|| {
            let text = format!(
                "the record of the image {} names no layer: see `vellum check`, or import the image \
                 again",
                self.name
            );
            Error::new(ErrorKind::Corrupt, text)
        })
    }
}

/// A volume or a directory that appears in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Name of a volume of the store, or an absolute path on the host.
    pub source: String,
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// No writes through this mount.
    #[serde(default)]
    pub read_only: bool,
}

/// Where something is mounted in a container that its image has no place for: made when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    /// Absolute path in the container.
    pub path: PathBuf,
    /// A directory, rather than a file.
    pub directory: bool,
}

/// A directory in which mount points were made, with its modification time before and after: seconds
/// and nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Absolute path in the container.
    pub path: PathBuf,
    /// Before the first of them.
    pub before: (i64, i64),
    /// After the last of them.
    pub after: (i64, i64),
}

/// What was made in a container to run it, and is no change of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaffold {
    /// In the order in which they are made.
    pub points: Vec<MountPoint>,
    /// Where.
    pub touched: Vec<Touched>,
}

impl Scaffold {
    pub(super) fn is_empty(&self) -> bool {
        *self == Scaffold::default()
    }
}

/// A run of a container's own command. What `exec` runs is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    /// RFC 3339.
    pub began: String,
    /// `None` while it runs, and where nobody saw it end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<RunEnd>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEnd {
    /// RFC 3339.
    pub at: String,
    /// The command's exit status, 128 + n after signal n.
    pub status: u8,
}

/// A container: the layers of its image and a writable one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// The name that users give.
    pub name: String,
    /// Never used again.
    pub id: Uuid,
    /// The image's name when the container was made.
    pub image: String,
    /// The image's id.
    pub image_id: Uuid,
    /// Sealed layers, from the bottom up.
    pub layers: Vec<Uuid>,
    /// The writable layer.
    pub top: Uuid,
    /// The layer that takes the top's place once the top is sealed: written before a commit, so
    /// that sealing is the one step that decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
    /// The snapshot that the top becomes once it is sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_snapshot: Option<ContainerSnapshot>,
    /// Moments that are kept, in the order in which they were taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<ContainerSnapshot>,
    /// The snapshot that the container goes on from: its layers are those that `layers` begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Uuid>,
    /// As the image's, unless it was made larger.
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// How to run it.
    pub config: ImageConfig,
    /// What appears in it when it runs.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// What was made in its file system for that, while it is there.
    #[serde(default, skip_serializing_if = "Scaffold::is_empty")]
    pub scaffold: Scaffold,
    /// Access times of its files, where it was made with other than the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub atime: Option<Atime>,
    /// What it may do and use when it runs.
    #[serde(default)]
    pub confinement: Confinement,
    /// The last time that its command was run; `None` of one that never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_run: Option<LastRun>,
    /// RFC 3339.
    pub created: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_whose_record_lost_its_layers_is_damaged_and_not_empty() {
        let id = Uuid::from_u128(7);
        let mut image = ImageRecord {
            name: "web".into(),
            id,
            layers: vec![Uuid::from_u128(1), id],
            disk: DiskInfo {
                virtual_size: 4096,
                device_size: None,
                fs: None,
                holds: None,
            },
            config: ImageConfig::default(),
            created: String::new(),
        };
        assert_eq!(image.top().unwrap(), id);
        image.layers.clear();
        let error = image.top().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("web"), "{error}");
    }
    /// As builds before [`DiskInfo`] wrote them, in that order: people read them.
    #[test]
    fn records_say_what_their_chain_is_where_they_always_did() {
        let id = "5eed0000-0000-4000-8000-000000000031";
        let disk =
            r#""virtual_size":1048576,"device_size":1048064,"fs":{"kind":"ext4"},"holds":"a disk""#;
        let image = format!(
            r#"{{"name":"web","id":"{id}","layers":["{id}"],{disk},"config":{{}},"created":"2026"}}"#
        );
        let read: ImageRecord = serde_json::from_str(&image).unwrap();
        assert_eq!(read.disk.device_size, Some(1_048_064));
        let written = serde_json::to_string(&read).unwrap();
        assert!(written.contains(disk), "{written}");
        let container = format!(
            r#"{{"name":"c","id":"{id}","image":"web","image_id":"{id}","layers":[],"top":"{id}",{disk},
                "config":{{}},"created":"2026"}}"#
        );
        let read: ContainerRecord = serde_json::from_str(&container).unwrap();
        let written = serde_json::to_string(&read).unwrap();
        assert!(written.contains(disk), "{written}");
        let without = image.replace(disk, "");
        serde_json::from_str::<ImageRecord>(&without.replace(",,", ",")).unwrap_err();
    }
}
