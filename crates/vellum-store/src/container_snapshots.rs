//! Snapshots of containers: moments that are kept. They are part of the container's record, so that
//! one replacement of it changes both. docs/snapshots.md.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::names::check_name;
use super::prune::PruneReport;
use super::records::{ContainerRecord, DiskInfo, Scaffold};
use super::{PlacedLayer, Store, StoreGuard, now};
use vellum_base::error::{Error, ErrorKind, Result};

/// In what state a snapshot's file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// It was frozen or unmounted: it can be mounted read-only as it is.
    Clean,
    /// As a power cut would have left it: its first mount replays ext4's journal.
    Crash,
}

/// A moment of a container, kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSnapshot {
    /// The name that users give, unique in the container.
    pub name: String,
    /// Never used again.
    pub id: Uuid,
    /// The snapshot that it was taken above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
    /// The sealed layers above those of its parent, from the bottom up; without a parent all.
    pub layers: Vec<Uuid>,
    /// As the container's at that moment.
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// In what state what can be mounted of it is.
    pub consistency: Consistency,
    /// Bytes of data blocks that the container wrote since the snapshot before.
    #[serde(default)]
    pub bytes: u64,
    /// What running the container had made in its file system.
    #[serde(default, skip_serializing_if = "Scaffold::is_empty")]
    pub scaffold: Scaffold,
    /// RFC 3339.
    pub created: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

impl ContainerRecord {
    /// The snapshot of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with what to do.
    pub fn snapshot(&self, name: &str) -> Result<&ContainerSnapshot> {
        let mut snapshots = self.snapshots.iter();
        snapshots.find(|there| there.name == name).ok_or_else(|| {
            let container = &self.name;
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "the container {container} has no snapshot {name}: `vellum snapshots {container}` \
                     lists them"
                ),
            )
        })
    }

    /// Its snapshot with this id.
    pub fn snapshot_by_id(&self, id: Uuid) -> Option<&ContainerSnapshot> {
        self.snapshots.iter().find(|kept| kept.id == id)
    }

    /// The sealed layers of a snapshot, from the bottom up.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the record names a parent that is not there, or a circle.
    pub fn snapshot_layers(&self, id: Uuid) -> Result<Vec<Uuid>> {
        let damaged = |what: &str| {
            let text = format!(
                "the record of the container {}: the snapshot {id} {what}: see `vellum check`",
                self.name
            );
            Error::new(ErrorKind::Corrupt, text)
        };
        let mut line = Vec::new();
        let mut seen = HashSet::new();
        let mut at = Some(id);
        while let Some(id) = at {
            let snapshot = self.snapshot_by_id(id);
            let snapshot = snapshot.ok_or_else(|| damaged("or one below it is not there"))?;
            if !seen.insert(id) {
                return Err(damaged("is its own ancestor"));
            }
            line.push(&snapshot.layers);
            at = snapshot.parent;
        }
        let layers: Vec<Uuid> = line.into_iter().rev().flatten().copied().collect();
        match layers.is_empty() {
            true => Err(damaged("names no layer")),
            false => Ok(layers),
        }
    }

    /// The layers that the container has above those of the snapshot it goes on from; all of them
    /// where there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where they do not begin with that snapshot's.
    pub fn layers_since_snapshot(&self) -> Result<&[Uuid]> {
        let Some(at) = self.at else {
            return Ok(&self.layers);
        };
        let below = self.snapshot_layers(at)?;
        self.layers.strip_prefix(below.as_slice()).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the record of the container {}: its layers do not begin with those of the snapshot \
                     that it goes on from: see `vellum check`",
                    self.name
                ),
            )
        })
    }

    /// The sealed layers of the container and of each of its snapshots, each from the bottom up.
    ///
    /// # Errors
    /// As [`ContainerRecord::snapshot_layers`].
    pub fn chains(&self) -> Result<Vec<Vec<Uuid>>> {
        let kept = self
            .snapshots
            .iter()
            .map(|kept| self.snapshot_layers(kept.id));
        std::iter::once(Ok(self.layers.clone()))
            .chain(kept)
            .collect()
    }

    /// Puts one layer, which `holds` so many bytes of data, in the place of several on each other that `held` so many
    /// together, wherever they stand together. True where they did.
    fn join(&mut self, group: &[Uuid], into: Uuid, held: u64, holds: u64) -> bool {
        let replace = |layers: &mut Vec<Uuid>| {
            let place = layers.windows(group.len()).position(|there| there == group);
            if let Some(place) = place {
                layers.splice(place..place + group.len(), [into]);
            }
            place.is_some()
        };
        let mut joined = replace(&mut self.layers);
        for kept in &mut self.snapshots {
            if replace(&mut kept.layers) {
                joined = true;
                // What was not counted yet is counted when somebody looks.
                kept.bytes = kept
                    .bytes
                    .checked_sub(held)
                    .map_or(0, |others| others + holds);
            }
        }
        joined
    }

    /// Every layer that the record names.
    pub fn named_layers(&self) -> impl Iterator<Item = &Uuid> {
        let own = std::iter::once(&self.top).chain(&self.next);
        let kept = self.snapshots.iter().flat_map(|kept| &kept.layers);
        self.layers.iter().chain(own).chain(kept)
    }

    /// A snapshot of what the container is now, to be [settled](Store::settle): without layers.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for the name, [`ErrorKind::AlreadyExists`] where there is one.
    pub fn new_snapshot(&self, name: &str, consistency: Consistency) -> Result<ContainerSnapshot> {
        check_name("snapshot", name)?;
        if self.snapshots.iter().any(|there| there.name == name) {
            let container = &self.name;
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!(
                    "the container {container} has a snapshot {name} already: remove it with `vellum rm \
                     {container}@{name}` or take another name"
                ),
            ));
        }
        Ok(ContainerSnapshot {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            parent: self.at,
            layers: Vec::new(),
            disk: self.disk.clone(),
            consistency,
            bytes: 0,
            scaffold: self.scaffold.clone(),
            created: now(),
            comment: None,
        })
    }

    /// A name that no snapshot has: this, or with a number behind it.
    pub fn free_snapshot_name(&self, wish: &str) -> String {
        let taken = |name: &str| self.snapshots.iter().any(|there| there.name == name);
        let numbered = (2u64..).map(|number| format!("{wish}-{number}"));
        std::iter::once(wish.to_owned())
            .chain(numbered)
            .find(|name| !taken(name))
            .unwrap_or_else(|| wish.to_owned())
    }

    /// Makes the snapshot that the sealing of a layer decided part of the record, whose layers are up to
    /// date.
    pub(super) fn keep_snapshot(&mut self, mut snapshot: ContainerSnapshot) -> Result<()> {
        snapshot.layers = self.layers_since_snapshot()?.to_vec();
        snapshot.parent = self.at;
        self.at = Some(snapshot.id);
        self.snapshots.push(snapshot);
        Ok(())
    }

    /// Takes a snapshot out of the record: those above it lie on the one below it, with its layers.
    fn forget_snapshot(&mut self, id: Uuid) {
        let Some(place) = self.snapshots.iter().position(|there| there.id == id) else {
            return;
        };
        let gone = self.snapshots.remove(place);
        for above in &mut self.snapshots {
            if above.parent == Some(id) {
                above.parent = gone.parent;
                above.layers.splice(0..0, gone.layers.iter().copied());
                above.bytes += gone.bytes;
            }
        }
        if self.at == Some(id) {
            self.at = gone.parent;
        }
    }
}

impl Store {
    /// Removes snapshots of a container, all at once; their layers go where nothing else needs them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such a container or snapshot; [`ErrorKind::InUse`] while something
    /// reads one of them. None is removed then.
    pub fn remove_container_snapshots(
        &self,
        name: &str,
        snapshots: &[&str],
    ) -> Result<PruneReport> {
        {
            let _lock = self.lock()?;
            let mut record = self.container(name)?;
            for snapshot in snapshots {
                let id = record.snapshot(snapshot)?.id;
                let top = record.snapshot_layers(id)?.last().copied();
                if let Some(top) = top
                    && self.has_readers(top)
                {
                    return Err(Error::new(
                        ErrorKind::InUse,
                        format!(
                            "the snapshot {name}@{snapshot} is being read{}",
                            self.reader(top)
                        ),
                    ));
                }
                record.forget_snapshot(id);
            }
            self.write_json(&self.record_path("containers", name), &record)?;
        }
        self.collect_layers(Vec::new())
    }

    /// Makes a container what it was at a snapshot: one replacement of its record, which decides. `top` is
    /// a new layer on those of the snapshot. Nobody has the container open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such a container or snapshot.
    pub fn put_back(
        &self,
        name: &str,
        snapshot: &str,
        top: &PlacedLayer,
        _pin: &StoreGuard,
    ) -> Result<ContainerRecord> {
        let _lock = self.lock()?;
        let mut record = self.container(name)?;
        let kept = record.snapshot(snapshot)?.clone();
        record.layers = record.snapshot_layers(kept.id)?;
        record.top = top.uuid;
        record.next = None;
        record.next_snapshot = None;
        record.at = Some(kept.id);
        record.disk = kept.disk;
        record.scaffold = kept.scaffold;
        self.write_json_naming(&self.record_path("containers", name), &record, Some(top))?;
        Ok(record)
    }

    /// Puts the layer `into`, which says all that those of `group` say together, in their place in the records of
    /// containers that nobody else works on: one replacement for each. Layers that no record names any more
    /// are collected.
    ///
    /// # Errors
    /// Where a record cannot be read or written; the containers before it have the new layer then.
    pub fn join_in_records(
        &self,
        containers: &[String],
        group: &[Uuid],
        into: Uuid,
        pin: StoreGuard,
    ) -> Result<PruneReport> {
        {
            let _lock = self.lock()?;
            let bytes = |layer: &Uuid| Ok(self.layer_info(*layer)?.bytes);
            let held = group.iter().map(bytes).sum::<Result<u64>>()?;
            let holds = bytes(&into)?;
            for name in containers {
                let mut record = match self.container(name) {
                    // Removed before the caller had its lock.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    other => other?,
                };
                if record.join(group, into, held, holds) {
                    self.write_json(&self.record_path("containers", name), &record)?;
                }
            }
        }
        drop(pin);
        self.collect_layers(Vec::new())
    }

    /// Notes what the layers of a snapshot hold, once that was counted.
    ///
    /// # Errors
    /// Where the host fails. A snapshot that is gone is fine.
    pub fn count_snapshot(&self, name: &str, id: Uuid, bytes: u64) -> Result<()> {
        let _lock = self.lock()?;
        let mut record = self.container(name)?;
        if let Some(snapshot) = record.snapshots.iter_mut().find(|there| there.id == id) {
            snapshot.bytes = bytes;
            self.write_json(&self.record_path("containers", name), &record)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
