//! Collecting what nothing refers to: orphans of crashes, and the layers of removed things.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::Store;
use super::quarantine::Records;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Entry;
use vellum_core::layer::{Header, SealedLayer};
use vellum_fs::run_dir::{RunDir, RunRoot};

/// Directories of records, and of salts; the last four are made when they are needed.
const RECORDS: [&str; 7] = [
    "images",
    "containers",
    "templates",
    "snapshots",
    "quarantine/images",
    "quarantine/containers",
    "salts",
];

/// What [`Store::prune`] removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Layers that no image, container or template uses.
    pub layers: Vec<Uuid>,
    /// Directories in `staging` that nobody works on any more, and in `trash`.
    pub leftovers: Vec<String>,
    /// Running state of containers that are gone.
    pub run_dirs: Vec<String>,
    /// Bytes that all of it took on the host.
    pub bytes: u64,
    /// Another process was making or removing layers, so not everything was looked at.
    pub busy: bool,
}

/// What [`Store::prune`] would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orphans {
    /// Layers that no record names.
    pub layers: Vec<Uuid>,
    /// Half-made and half-removed things.
    pub leftovers: Vec<PathBuf>,
    /// Running state of containers that are gone.
    pub run_dirs: Vec<RunDir>,
}

impl Records {
    /// Every layer that a record names, quarantine included.
    pub fn used_layers(&self) -> HashSet<Uuid> {
        let images = self.images.iter().flat_map(|image| image.layers.iter());
        let containers = self.containers.iter();
        let containers = containers.flat_map(|container| container.named_layers());
        let templates = self.templates.iter().map(|template| &template.layer);
        let quarantined = self.quarantined_layers.iter();
        let snapshots = self.snapshots.iter().flat_map(|snapshot| {
            snapshot
                .layers
                .iter()
                .chain(std::iter::once(&snapshot.base))
        });
        images
            .chain(containers)
            .chain(templates)
            .chain(quarantined)
            .chain(snapshots)
            .copied()
            .collect()
    }
}

impl Store {
    /// Moves layers that no record names to the trash, from where the caller removes them. While
    /// another process has layers that it is about to name, they are left for the next time, and the
    /// report says so.
    pub(super) fn trash_orphans(&self, report: &mut PruneReport) -> Result<Vec<PathBuf>> {
        let Some(_gc) = self.try_collection_lock()? else {
            report.busy = true;
            return Ok(Vec::new());
        };
        let _lock = self.lock()?;
        let Some(used) = self.used_layers()? else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "a record is damaged, so no layer is removed: see `vellum check`",
            ));
        };
        let mut trashed = Vec::new();
        for layer in self.layers()? {
            if used.contains(&layer) || self.is_leased(&self.layer_dir(layer)) {
                continue;
            }
            if let Some(path) = self.trash_layer(layer)? {
                trashed.push(path);
                report.layers.push(layer);
            }
        }
        Ok(trashed)
    }

    /// Removes layers that no record names, and `trashed`, which lies in the trash already.
    pub(super) fn collect_layers(&self, mut trashed: Vec<PathBuf>) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        let orphans = self.trash_orphans(&mut report);
        // What is in the trash goes away also where no more may be put there.
        let failure = orphans.map(|orphans| trashed.extend(orphans)).err();
        self.empty_trash(&trashed, &mut report)?;
        failure.map_or(Ok(report), Err)
    }

    /// True where some of these layers are still there although no record names them any more.
    pub(super) fn has_unnamed_layers(&self, layers: &[Uuid]) -> Result<bool> {
        // With a damaged record nobody can tell.
        let Some(used) = self.used_layers()? else {
            return Ok(false);
        };
        let mut unnamed = layers.iter().filter(|layer| !used.contains(layer));
        // One that cannot be looked at may be there: to look for it once more does no harm.
        Ok(unnamed.any(|layer| self.storage.exists(&self.layer_dir(*layer)).unwrap_or(true)))
    }

    /// All layers that records name; `None` where a record cannot be read, since it may name any.
    pub(super) fn used_layers(&self) -> Result<Option<HashSet<Uuid>>> {
        let records = self.records()?;
        let damaged = !records.damaged.is_empty();
        let used = records.used_layers();
        records.damaged.into_iter().for_each(Store::warn_damaged);
        Ok((!damaged).then_some(used))
    }

    /// Removes everything that crashes left: orphaned layers, half-made and half-removed ones,
    /// running state of containers that are gone, templates that no image begins with.
    ///
    /// While another process makes or removes layers, nothing is removed but what lies in the trash,
    /// and the report says so. What takes long, unlinking, happens after the locks were released.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where a record is damaged: it may name any layer, so none is removed.
    pub fn prune(&self) -> Result<PruneReport> {
        self.drop_unused_templates()?;
        let mut report = self.sweep()?;
        report.bytes += self.give_back_reserves()?;
        Ok(report)
    }

    /// As [`Store::prune`], but templates stay, used or not: for one who makes images all the time.
    ///
    /// # Errors
    /// As [`Store::prune`].
    pub fn sweep(&self) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        let trashed = self.trash_leftovers(&mut report);
        let orphans = match &trashed {
            Ok(_) => self.trash_orphans(&mut report),
            Err(_) => Ok(Vec::new()),
        };
        // What is in the trash goes away also where no more may be put there.
        self.empty_trash(&self.trash()?, &mut report)?;
        trashed.and(orphans).map(|_| report)
    }

    /// Removes half-made things, the large ones as far as the trash, and notes what lies there.
    fn trash_leftovers(&self, report: &mut PruneReport) -> Result<()> {
        let shown = |path: &Path| {
            let name = path.strip_prefix(&self.root).unwrap_or(path);
            name.display().to_string()
        };
        // Before layers join it, which are listed as what they are.
        report.leftovers = self.trash()?.iter().map(|path| shown(path)).collect();
        // Whoever stages a layer has pinned layers first, so with this lock nobody does.
        let Some(_gc) = self.try_collection_lock()? else {
            report.busy = true;
            return Ok(());
        };
        let _lock = self.lock()?;
        let (staging, trash) = (self.root.join("staging"), self.root.join("trash"));
        let mut leftovers = self.leftovers()?;
        leftovers.retain(|path| !path.starts_with(&trash));
        leftovers.extend(self.unfinished_layer_files()?);
        for path in leftovers {
            if path.starts_with(&staging) {
                self.trash_staged(&path)?;
            } else {
                match self.remove_any(&path) {
                    // Whoever it belonged to has removed it meanwhile.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    other => other.context(|| format!("cannot remove {}", path.display()))?,
                }
            }
            report.leftovers.push(shown(&path));
        }
        Ok(())
    }

    /// What [`Store::prune`] would remove, and nobody works on. `None` while another process makes
    /// or removes layers, since then nobody can tell.
    ///
    /// # Errors
    /// Where a directory cannot be read.
    pub fn orphans(&self) -> Result<Option<Orphans>> {
        let Some(_gc) = self.try_collection_lock()? else {
            return Ok(None);
        };
        let _lock = self.lock()?;
        let mut orphans = Orphans {
            leftovers: self.leftovers()?,
            run_dirs: self.orphaned_run_dirs()?,
            layers: Vec::new(),
        };
        if let Some(used) = self.used_layers()? {
            orphans.layers = self.layers()?;
            orphans
                .layers
                .retain(|layer| !used.contains(layer) && !self.is_leased(&self.layer_dir(*layer)));
        }
        Ok(Some(orphans))
    }

    /// What lies in `staging` and `trash`, unfinished files, and locks and sockets of containers that
    /// are gone.
    fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for directory in ["staging", "trash"] {
            let dir = self.root.join(directory);
            for entry in self.entries(&dir)? {
                let path = dir.join(entry.name);
                if directory == "trash" || !self.is_staged(&path)? {
                    found.push(path);
                }
            }
        }
        for directory in RECORDS {
            found.extend(self.unfinished_records(&self.root.join(directory))?);
        }
        found.extend(self.unfinished_volumes()?);
        let known = self.container_ids()?;
        let runs = self.runs();
        let beside = self.entries(runs.path())?.filter(|entry| {
            let id = RunRoot::id_beside(&entry.name);
            id.is_some_and(|id| !known.contains(id))
        });
        found.extend(beside.map(|entry| runs.path().join(entry.name)));
        Ok(found)
    }

    /// Files in a directory of records that were being written when something stopped, and reasons
    /// of a quarantine that did not come about. None where there is no such directory.
    fn unfinished_records(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let there = self
            .storage
            .exists(dir)
            .context(|| format!("cannot stat {}", dir.display()))?;
        if !there {
            return Ok(Vec::new());
        }
        let names: HashSet<String> = self.entries(dir)?.map(|entry| entry.name).collect();
        let unfinished = names.iter().filter(|name| {
            let stem = name.strip_suffix(".reason");
            name.ends_with(".tmp")
                || stem.is_some_and(|stem| !names.contains(&format!("{stem}.json")))
        });
        Ok(unfinished.map(|name| dir.join(name)).collect())
    }

    /// Files of layers that were being written when something stopped. Not of a layer that somebody
    /// writes, nor of one that is sealed and has no checksums yet: they may be in the making.
    fn unfinished_layer_files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for layer in self.layers()? {
            let dir = self.layer_dir(layer);
            let entries = match self.storage.list(&dir) {
                // Removed meanwhile, by one who need not wait for us.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.context(|| format!("cannot list {}", dir.display()))?,
            };
            let unfinished: Vec<PathBuf> = entries
                .into_iter()
                .filter(|entry| !entry.is_dir && entry.name.ends_with(".tmp"))
                .map(|entry| dir.join(entry.name))
                .collect();
            if unfinished.is_empty() || self.is_leased(&dir) {
                continue;
            }
            let settled = match Header::read(&*self.storage, &dir) {
                Ok(header) if header.sealed => SealedLayer::open(&*self.storage, &dir)
                    .is_ok_and(|sealed| sealed.is_checksummed()),
                // `check` explains what is wrong with it.
                other => other.is_ok(),
            };
            if settled {
                found.extend(unfinished);
            }
        }
        Ok(found)
    }

    /// True for a staged layer that somebody holds. Other things in `staging` are nobody's once
    /// nobody pins layers.
    fn is_staged(&self, path: &Path) -> Result<bool> {
        let lease = path.join(super::layers::LEASE_FILE);
        let exists = self
            .storage
            .exists(&lease)
            .context(|| format!("cannot look for {}", lease.display()))?;
        Ok(exists && self.is_leased(path))
    }

    fn entries(&self, dir: &Path) -> Result<impl Iterator<Item = Entry> + use<>> {
        self.list(dir).map(Vec::into_iter)
    }

    /// The ids of all containers. One whose record cannot be read may be any, so that is an error.
    fn container_ids(&self) -> Result<HashSet<String>> {
        let mut records = self.records()?;
        if let Some(error) = records.damaged.pop() {
            return Err(error.context("what a container left cannot be told from what it uses"));
        }
        let containers = records.containers.into_iter().map(|record| record.id);
        let quarantined = records.quarantined.into_iter().map(|record| record.id);
        let snapshots = records.snapshots.into_iter().map(|record| record.id);
        Ok(containers
            .chain(quarantined)
            .chain(snapshots)
            .map(|id| id.to_string())
            .collect())
    }

    /// Directories under `run` whose container is gone. Something may still be mounted there.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn orphaned_run_dirs(&self) -> Result<Vec<RunDir>> {
        // Directories first: what is made in between is then not taken for an orphan.
        let runs = self.runs();
        let entries = self.entries(runs.path())?;
        let known = self.container_ids()?;
        Ok(entries
            .filter(|entry| entry.is_dir && !known.contains(&entry.name))
            .filter_map(|entry| runs.named(&entry.name))
            .collect())
    }

    fn drop_unused_templates(&self) -> Result<()> {
        let Some(_gc) = self.try_collection_lock()? else {
            return Ok(());
        };
        let _lock = self.lock()?;
        let records = self.records()?;
        if !records.damaged.is_empty() {
            return Ok(());
        }
        let used: HashSet<Uuid> = records
            .images
            .into_iter()
            .flat_map(|image| image.layers)
            .chain(records.snapshots.into_iter().map(|snapshot| snapshot.base))
            .collect();
        for template in records.templates {
            if !used.contains(&template.layer) {
                self.remove_json(&self.record_path("templates", &template.key))?;
            }
        }
        Ok(())
    }
}
