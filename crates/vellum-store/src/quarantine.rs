//! Quarantine: records of images and containers whose layers are damaged, out of everybody's way
//! until a person decides. Their layers stay.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::Store;
use super::names::encode;
use super::records::{ContainerRecord, ImageRecord, TemplateRecord};
use super::snapshots::SnapshotRecord;
use vellum_base::error::{Error, Result, ResultExt};

const QUARANTINE: &str = "quarantine";

/// A record in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Quarantined {
    /// `image` or `container`.
    pub what: String,
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: Uuid,
    /// Why it is there.
    pub reason: String,
    /// The record.
    pub path: PathBuf,
}

/// All records of a store, and those that cannot be read.
#[derive(Debug, Default)]
pub struct Records {
    /// Images, by name.
    pub images: Vec<ImageRecord>,
    /// Containers, by name.
    pub containers: Vec<ContainerRecord>,
    /// Empty file systems.
    pub templates: Vec<TemplateRecord>,
    /// containerd's snapshots.
    pub snapshots: Vec<SnapshotRecord>,
    /// What is wrong with each record that cannot be read; the message names the file.
    pub damaged: Vec<Error>,
    /// What is in quarantine.
    pub quarantined: Vec<Quarantined>,
    /// Layers that records in quarantine name.
    pub quarantined_layers: Vec<Uuid>,
}

impl Store {
    /// Reads every record.
    ///
    /// # Errors
    /// Where a directory cannot be read. Damaged records are in the answer.
    pub fn records(&self) -> Result<Records> {
        let mut damaged = Vec::new();
        let mut records = Records {
            images: self.read_records("images", |error| damaged.push(error))?,
            containers: self.container_records(|error| damaged.push(error))?,
            templates: self.read_records("templates", |error| damaged.push(error))?,
            snapshots: self.snapshots(|error| damaged.push(error))?,
            ..Records::default()
        };
        let mut layers = Vec::new();
        for (path, image) in self.quarantined_records::<ImageRecord>("images", &mut damaged)? {
            layers.extend(&image.layers);
            let entry = self.quarantined("image", image.name, image.id, path);
            records.quarantined.push(entry);
        }
        for (path, container) in
            self.quarantined_records::<ContainerRecord>("containers", &mut damaged)?
        {
            layers.extend(container.named_layers());
            // As for those in use, its file says which it is.
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let name = stem.and_then(|stem| stem.strip_suffix(&format!("-{}", container.id)));
            let name = name.map_or(container.name, str::to_owned);
            let entry = self.quarantined("container", name, container.id, path);
            records.quarantined.push(entry);
        }
        records.quarantined_layers = layers;
        records.damaged = damaged;
        records.images.sort_by(|a, b| a.name.cmp(&b.name));
        records.containers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    fn quarantined_records<T: DeserializeOwned>(
        &self,
        directory: &str,
        damaged: &mut Vec<Error>,
    ) -> Result<Vec<(PathBuf, T)>> {
        let dir = self.root.join(QUARANTINE).join(directory);
        let there = self
            .storage
            .exists(&dir)
            .context(|| format!("cannot stat {}", dir.display()))?;
        if !there {
            return Ok(Vec::new());
        }
        let entries = self
            .storage
            .list(&dir)
            .context(|| format!("cannot list {}", dir.display()))?;
        let mut found = Vec::new();
        for entry in entries.iter().filter(|entry| entry.name.ends_with(".json")) {
            let path = dir.join(&entry.name);
            match self.read_json(&path) {
                Ok(record) => found.extend(record.map(|record| (path, record))),
                Err(error) => damaged.push(error),
            }
        }
        Ok(found)
    }

    fn quarantined(&self, what: &str, name: String, id: Uuid, path: PathBuf) -> Quarantined {
        Quarantined {
            what: what.to_owned(),
            name,
            id,
            reason: self.quarantine_reason(&path),
            path,
        }
    }

    fn quarantine_reason(&self, path: &Path) -> String {
        self.storage
            .read_all(&path.with_extension("reason"), 1 << 20)
            .map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
            .unwrap_or_default()
    }

    /// Takes an image out of use. Returns where its record is now.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::NotFound`] where it is gone.
    pub fn quarantine_image(&self, name: &str, reason: &str) -> Result<PathBuf> {
        let _lock = self.lock()?;
        let id = self.image(name)?.id;
        self.move_to_quarantine("images", name, id, reason)
    }

    /// Takes a container out of use. Returns where its record is now.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::NotFound`] where it is gone.
    pub fn quarantine_container(&self, name: &str, reason: &str) -> Result<PathBuf> {
        let _lock = self.lock()?;
        let id = self.container(name)?.id;
        self.move_to_quarantine("containers", name, id, reason)
    }

    fn move_to_quarantine(
        &self,
        directory: &str,
        name: &str,
        id: Uuid,
        reason: &str,
    ) -> Result<PathBuf> {
        let parent = self.root.join(QUARANTINE);
        let dir = parent.join(directory);
        for dir in [&parent, &dir] {
            match self.storage.create_dir(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("cannot make {}", dir.display()), error));
                }
                _ => {}
            }
        }
        // With its id: another of that name may follow.
        let target = dir.join(format!("{}-{id}.json", encode(name)));
        let source = self.record_path(directory, name);
        let put = || {
            self.storage.sync_dir(&self.root)?;
            self.storage.sync_dir(&parent)?;
            let reason = format!("{reason}\n");
            self.storage
                .write_atomic(&target.with_extension("reason"), reason.as_bytes())?;
            self.storage.rename(&source, &target)?;
            self.storage.sync_dir(&dir)?;
            self.storage.sync_dir(source.parent().unwrap_or(&self.root))
        };
        put().context(|| format!("cannot move {} to quarantine", source.display()))?;
        Ok(target)
    }

    /// For a name that is not found: where it is, should it be in quarantine.
    pub(super) fn quarantine_hint(&self, directory: &str, name: &str) -> Option<String> {
        let dir = self.root.join(QUARANTINE).join(directory);
        let prefix = format!("{}-", encode(name));
        let entry = self.storage.list(&dir).ok()?.into_iter().find(|entry| {
            entry
                .name
                .strip_prefix(&prefix)
                .and_then(|rest| rest.strip_suffix(".json"))
                .is_some_and(|id| Uuid::parse_str(id).is_ok())
        })?;
        let path = dir.join(entry.name);
        let reason = self.quarantine_reason(&path);
        Some(format!(
            "it is in quarantine ({}): {reason}",
            path.display()
        ))
    }
}

/// The name of a store's directory that is made only when something goes there.
pub(super) fn is_quarantine(name: &str) -> bool {
    Path::new(name) == Path::new(QUARANTINE)
}
