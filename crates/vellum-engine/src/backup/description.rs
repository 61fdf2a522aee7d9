//! What a backup says of itself beside its blocks: for people, and for the record of the container that is made
//! of it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_fs::ext4::Atime;
use vellum_image::ImageConfig;
use vellum_store::{
    Confinement, Consistency, ContainerRecord, ContainerSnapshot, FsInfo, RunAs, Scaffold,
    VolumeMount,
};

/// The description, as JSON in the backup. Fields may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Description {
    /// The version of the program that wrote it.
    pub vellum: String,
    /// The name of the container.
    pub container: String,
    /// The moment.
    pub snapshot: Moment,
    /// The name of the snapshot that it is a delta to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// How the container is run.
    pub run: Run,
}

/// What is known of the snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Moment {
    pub name: String,
    /// RFC 3339.
    pub created: String,
    pub consistency: Consistency,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    #[serde(default)]
    pub fs: Option<FsInfo>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<String>,
    #[serde(default)]
    pub scaffold: Scaffold,
}

/// How the container is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub image: String,
    pub image_id: Uuid,
    pub config: ImageConfig,
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub atime: Option<Atime>,
    #[serde(default)]
    pub confinement: Confinement,
}

impl Description {
    /// Of a snapshot of a container, and of its base.
    pub fn new(
        container: &ContainerRecord,
        snapshot: &ContainerSnapshot,
        since: Option<&ContainerSnapshot>,
    ) -> Self {
        Description {
            vellum: env!("CARGO_PKG_VERSION").into(),
            container: container.name.clone(),
            snapshot: Moment {
                name: snapshot.name.clone(),
                created: snapshot.created.clone(),
                consistency: snapshot.consistency,
                comment: snapshot.comment.clone(),
                fs: snapshot.disk.fs.clone(),
                holds: snapshot.disk.holds.clone(),
                scaffold: snapshot.scaffold.clone(),
            },
            since: since.map(|since| since.name.clone()),
            run: Run {
                image: container.image.clone(),
                image_id: container.image_id,
                config: container.config.clone(),
                volumes: container.volumes.clone(),
                atime: container.atime,
                confinement: container.confinement.clone(),
            },
        }
    }

    /// As the format has it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::internal(format!("a backup cannot be described: {error}")))
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| {
            Error::with_source(
                ErrorKind::Corrupt,
                "the description of the backup makes no sense",
                error,
            )
        })
    }

    /// The snapshot, as people name it.
    pub fn moment(&self) -> String {
        format!("{}@{}", self.container, self.snapshot.name)
    }

    /// How a container that is made of it is run.
    pub fn run_as(&self) -> RunAs {
        let run = &self.run;
        RunAs {
            image: run.image.clone(),
            image_id: run.image_id,
            config: run.config.clone(),
            atime: run.atime,
            confinement: run.confinement.clone(),
        }
    }
}
