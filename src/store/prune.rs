//! Collecting what nothing refers to: orphans of crashes, and the layers of removed things.

use std::collections::HashSet;

use serde::Serialize;
use uuid::Uuid;

use super::Store;
use super::records::{ContainerRecord, ImageRecord, TemplateRecord};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// What [`Store::prune`] removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Layers that no image, container or template uses.
    pub layers: Vec<Uuid>,
    /// Directories in `staging` that nobody works on any more, and in `trash`.
    pub leftovers: Vec<String>,
    /// Running state of containers that are gone.
    pub run_dirs: Vec<String>,
    /// Bytes of the layers' data.
    pub bytes: u64,
}

impl Store {
    /// Removes layers that no record names. While another process has layers that it is about to
    /// name, they are left for the next time.
    pub(super) fn collect_layers(&self) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        let Some(_gc) = self.try_collection_lock()? else {
            return Ok(report);
        };
        let _lock = self.lock()?;
        let Some(used) = self.used_layers()? else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "a record is damaged, so no layer is removed: see `vellum check`",
            ));
        };
        for layer in self.layers()? {
            if used.contains(&layer) || self.is_leased(&self.layer_dir(layer)) {
                continue;
            }
            report.bytes += self.layer_info(layer).map_or(0, |info| info.bytes);
            self.discard_layer(layer)?;
            report.layers.push(layer);
        }
        Ok(report)
    }

    /// All layers that records name; `None` where a record cannot be read, since it may name any.
    fn used_layers(&self) -> Result<Option<HashSet<Uuid>>> {
        let mut used = HashSet::new();
        let mut damaged = false;
        let mut note = |error: Error| {
            damaged = true;
            Store::warn_damaged(error);
        };
        for image in self.read_records::<ImageRecord>("images", &mut note)? {
            used.extend(image.layers);
        }
        for container in self.read_records::<ContainerRecord>("containers", &mut note)? {
            used.extend(container.layers);
            used.insert(container.top);
            used.extend(container.next);
        }
        for snapshot in self.snapshots(&mut note)? {
            used.extend(snapshot.layers);
            used.insert(snapshot.base);
        }
        for template in self.read_records::<TemplateRecord>("templates", &mut note)? {
            used.insert(template.layer);
        }
        Ok((!damaged).then_some(used))
    }

    /// Removes everything that crashes left: orphaned layers, half-made and half-removed ones,
    /// running state of containers that are gone, templates that no image begins with.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where a record is damaged: it may name any layer, so none is removed.
    pub fn prune(&self) -> Result<PruneReport> {
        self.drop_unused_templates()?;
        let mut report = self.collect_layers()?;
        let _lock = self.lock()?;
        for directory in ["staging", "trash"] {
            let dir = self.root.join(directory);
            let entries = self
                .storage
                .list(&dir)
                .context(|| format!("cannot list {}", dir.display()))?;
            for entry in entries {
                let path = dir.join(&entry.name);
                if directory == "staging" && self.is_leased(&path) {
                    continue;
                }
                self.storage
                    .remove_tree(&path)
                    .context(|| format!("cannot remove {}", path.display()))?;
                report.leftovers.push(format!("{directory}/{}", entry.name));
            }
        }
        Ok(report)
    }

    /// Directories under `run` whose container is gone. Something may still be mounted there.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn orphaned_run_dirs(&self) -> Result<Vec<std::path::PathBuf>> {
        let mut known: HashSet<String> = self
            .containers()?
            .into_iter()
            .map(|container| container.id.to_string())
            .collect();
        let snapshots = self.snapshots(Store::warn_damaged)?;
        known.extend(snapshots.iter().map(|snapshot| snapshot.id.to_string()));
        let dir = self.root.join("run");
        let entries = self
            .storage
            .list(&dir)
            .context(|| format!("cannot list {}", dir.display()))?;
        Ok(entries
            .into_iter()
            .filter(|entry| entry.is_dir && Uuid::parse_str(&entry.name).is_ok())
            .filter(|entry| !known.contains(&entry.name))
            .map(|entry| dir.join(entry.name))
            .collect())
    }

    fn drop_unused_templates(&self) -> Result<()> {
        let Some(_gc) = self.try_collection_lock()? else {
            return Ok(());
        };
        let _lock = self.lock()?;
        let mut used: HashSet<Uuid> = self
            .images()?
            .into_iter()
            .flat_map(|image| image.layers)
            .collect();
        let snapshots = self.snapshots(Store::warn_damaged)?;
        used.extend(snapshots.iter().map(|snapshot| snapshot.base));
        for template in self.read_records::<TemplateRecord>("templates", Store::warn_damaged)? {
            if !used.contains(&template.layer) {
                self.remove_json(&self.record_path("templates", &template.key))?;
            }
        }
        Ok(())
    }
}
