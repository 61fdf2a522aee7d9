//! Containers that are restored from backups, moment by moment: docs/backup.md, "What a crash leaves".

use uuid::Uuid;

use super::containers::now;
use super::{
    Confinement, ContainerRecord, ContainerSnapshot, Store, StoreGuard, VolumeMount, check_name,
};
use vellum_base::error::{Error, Result};
use vellum_fs::ext4::Atime;
use vellum_image::ImageConfig;

/// How a container is run, as far as it is told of it elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct RunAs {
    /// The name of the image that it was made from.
    pub image: String,
    /// And its id.
    pub image_id: Uuid,
    /// Command, environment, history.
    pub config: ImageConfig,
    /// Access times of its files.
    pub atime: Option<Atime>,
    /// What it may do and use.
    pub confinement: Confinement,
}

/// A moment of a container that was restored: its published layers are named by no record yet.
#[derive(Debug, Clone)]
pub struct Restored {
    /// The moment, with the id that it has everywhere. Its layers are those on the moment before.
    pub snapshot: ContainerSnapshot,
    /// The empty layer that the container goes on in.
    pub top: Uuid,
    /// How it is run.
    pub run_as: RunAs,
}

impl Store {
    /// Makes a container with its first moment. The record decides.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::AlreadyExists`] for the name, [`vellum_base::ErrorKind::InvalidInput`] for what cannot be one.
    pub fn create_restored(
        &self,
        name: &str,
        restored: Restored,
        volumes: Vec<VolumeMount>,
        _pin: &StoreGuard,
    ) -> Result<ContainerRecord> {
        let Restored {
            snapshot,
            top,
            run_as,
        } = restored;
        check_name("snapshot", &snapshot.name)?;
        let _lock = self.lock()?;
        self.check_new_container(name)?;
        self.allow_snapshots()?;
        let record = ContainerRecord {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            image: run_as.image,
            image_id: run_as.image_id,
            layers: snapshot.layers.clone(),
            top,
            next: None,
            next_snapshot: None,
            at: Some(snapshot.id),
            disk: snapshot.disk.clone(),
            config: run_as.config,
            volumes,
            scaffold: snapshot.scaffold.clone(),
            atime: run_as.atime,
            confinement: run_as.confinement,
            last_run: None,
            created: now(),
            snapshots: vec![snapshot],
        };
        self.write_json(&self.record_path("containers", name), &record)?;
        Ok(record)
    }

    /// Puts a moment on the one that a container goes on from, which nobody has open: one replacement of its
    /// record, which decides. A snapshot of that name gets company of another one.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::NotFound`] without the container; [`vellum_base::ErrorKind::InvalidInput`] for the name of the moment.
    pub fn add_restored(
        &self,
        name: &str,
        restored: Restored,
        _pin: &StoreGuard,
    ) -> Result<ContainerRecord> {
        let Restored {
            mut snapshot,
            top,
            run_as,
        } = restored;
        check_name("snapshot", &snapshot.name)?;
        let _lock = self.lock()?;
        let mut record = self.container(name)?;
        if record.at != snapshot.parent || record.next.is_some() {
            return Err(Error::internal(format!(
                "the container {name} went on while a backup was applied to it"
            )));
        }
        snapshot.name = record.free_snapshot_name(&snapshot.name);
        record.layers.extend(&snapshot.layers);
        record.top = top;
        record.at = Some(snapshot.id);
        record.disk = snapshot.disk.clone();
        record.scaffold = snapshot.scaffold.clone();
        record.snapshots.push(snapshot);
        record.image = run_as.image;
        record.image_id = run_as.image_id;
        record.config = run_as.config;
        record.atime = run_as.atime;
        record.confinement = run_as.confinement;
        self.write_json(&self.record_path("containers", name), &record)?;
        Ok(record)
    }
}
