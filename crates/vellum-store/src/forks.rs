//! Forks: new containers on the layers of another, as it is or was at a snapshot.

use uuid::Uuid;

use super::records::{ContainerRecord, DiskInfo, LayerInfo, Scaffold, VolumeMount};
use super::{ContainerSnapshot, PlacedLayer, StagedLayer, Store, StoreGuard, now};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;

/// What forks are made of.
#[derive(Debug, Clone)]
pub struct Fork {
    /// How they are run.
    pub origin: ContainerRecord,
    /// The sealed layers that they lie on, from the bottom up.
    pub layers: Vec<Uuid>,
    /// As the container's.
    pub disk: DiskInfo,
    /// What running the origin had made in its file system.
    pub scaffold: Scaffold,
    /// What appears in them when they run.
    pub volumes: Vec<VolumeMount>,
}

impl Fork {
    /// Of a container whose layers are all sealed but an empty top.
    pub fn of_container(origin: ContainerRecord, volumes: Vec<VolumeMount>) -> Self {
        Fork {
            layers: origin.layers.clone(),
            disk: origin.disk.clone(),
            scaffold: origin.scaffold.clone(),
            volumes,
            origin,
        }
    }

    /// Of a snapshot of a container.
    ///
    /// # Errors
    /// As [`ContainerRecord::snapshot_layers`].
    pub fn of_snapshot(
        origin: ContainerRecord,
        snapshot: &ContainerSnapshot,
        volumes: Vec<VolumeMount>,
    ) -> Result<Self> {
        Ok(Fork {
            layers: origin.snapshot_layers(snapshot.id)?,
            disk: snapshot.disk.clone(),
            scaffold: snapshot.scaffold.clone(),
            volumes,
            origin,
        })
    }

    fn record(&self, name: &str, top: Uuid) -> ContainerRecord {
        ContainerRecord {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            layers: self.layers.clone(),
            top,
            next: None,
            next_snapshot: None,
            snapshots: Vec::new(),
            at: None,
            disk: self.disk.clone(),
            scaffold: self.scaffold.clone(),
            volumes: self.volumes.clone(),
            last_run: None,
            created: now(),
            ..self.origin.clone()
        }
    }
}

impl Store {
    /// Makes a container of each name. Copies nothing. Whoever calls keeps the layers from being
    /// collected.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for a name, before anything is made; where the host fails, some of
    /// them may be there.
    pub fn create_forks(
        &self,
        fork: &Fork,
        names: &[String],
        pin: &StoreGuard,
    ) -> Result<Vec<ContainerRecord>> {
        let below =
            fork.layers.last().copied().ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, "a container without a sealed layer")
            })?;
        self.check_new_containers(names)?;
        let stage = |_| {
            interrupt::check()?;
            self.stage_layer(Some(below), fork.disk.virtual_size)
        };
        let staged: Result<Vec<StagedLayer>> = names.iter().map(stage).collect();
        let place = |staged: StagedLayer| staged.place(&LayerInfo::writable(), pin);
        let placed: Result<Vec<PlacedLayer>> = staged?.into_iter().map(place).collect();
        let _lock = self.lock()?;
        self.check_new_containers(names)?;
        let mut records = Vec::new();
        for (name, top) in names.iter().zip(placed?) {
            let record = fork.record(name, top.uuid);
            let path = self.record_path("containers", name);
            self.write_json_naming(&path, &record, Some(&top))?;
            records.push(record);
        }
        Ok(records)
    }

    /// Makes sure that containers of these names can be made.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`], and [`ErrorKind::InvalidInput`] for what cannot be a name.
    pub fn check_new_containers(&self, names: &[String]) -> Result<()> {
        names
            .iter()
            .try_for_each(|name| self.check_new_container(name))
    }
}
