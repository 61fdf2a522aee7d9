//! The trash: what is nobody's any more, on its way out.
//!
//! Things come here by a rename, under the store's lock, and are unlinked after the lock was
//! released: a layer of gigabytes in scattered blocks takes the host's file system many seconds,
//! and nobody else has to wait for that. Several processes may empty the trash at once. What lies
//! here when a process dies, prune removes.

use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::Store;
use super::prune::PruneReport;
use vellum_base::crash_point;
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::OpenMode;

impl Store {
    fn trash_dir(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Moves a layer that no record names any more to the trash. `None` where it is gone already.
    pub(super) fn trash_layer(&self, layer: Uuid) -> Result<Option<PathBuf>> {
        let from = self.layer_dir(layer);
        let to = self.trash_dir().join(layer.to_string());
        match self.storage.rename(&from, &to) {
            Ok(()) => {
                crash_point::here("retire: layer in the trash");
                Ok(Some(to))
            }
            Err(error)
                if error.kind() == IoKind::NotFound
                    && !self.storage.exists(&from).unwrap_or(true) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).context(|| format!("cannot remove the layer {layer}")),
        }
    }

    /// Moves a directory of `staging` that nobody works on to the trash.
    pub(super) fn trash_staged(&self, path: &Path) -> Result<PathBuf> {
        // Never the name of something that is there: a layer may have been staged under its own.
        let to = self.trash_dir().join(Uuid::new_v4().to_string());
        self.storage
            .rename(path, &to)
            .context(|| format!("cannot remove {}", path.display()))?;
        Ok(to)
    }

    /// Removes what was put into the trash, and counts what that frees. No lock is wanted: it is
    /// nobody's, and whoever else removes it at the same time is welcome.
    pub(super) fn empty_trash(&self, paths: &[PathBuf], report: &mut PruneReport) -> Result<()> {
        for path in paths {
            let bytes = self.allocated(path);
            match self.remove_any(path) {
                Err(error) if error.kind() == IoKind::NotFound => {}
                other => other.context(|| format!("cannot remove {}", path.display()))?,
            }
            report.bytes += bytes;
        }
        Ok(())
    }

    /// Removes a file or a directory.
    pub(super) fn remove_any(&self, path: &Path) -> std::io::Result<()> {
        match self.storage.remove_tree(path) {
            Err(error) if error.kind() == IoKind::NotADirectory => self.storage.remove_file(path),
            other => other,
        }
    }

    /// Bytes that a layer takes on the host.
    pub fn layer_bytes_on_host(&self, layer: Uuid) -> u64 {
        self.allocated(&self.layer_dir(layer))
    }

    /// Bytes that a file or directory takes on the host; what vanishes meanwhile counts as nothing.
    fn allocated(&self, path: &Path) -> u64 {
        match self.storage.list(path) {
            Ok(entries) => entries
                .iter()
                .map(|entry| self.allocated(&path.join(&entry.name)))
                .sum(),
            Err(_) => self
                .storage
                .open(path, OpenMode::Read)
                .and_then(|file| file.allocated())
                .unwrap_or(0),
        }
    }

    /// Everything that lies in the trash.
    pub(super) fn trash(&self) -> Result<Vec<PathBuf>> {
        let dir = self.trash_dir();
        let entries = self
            .storage
            .list(&dir)
            .context(|| format!("cannot list {}", dir.display()))?;
        Ok(entries
            .into_iter()
            .map(|entry| dir.join(entry.name))
            .collect())
    }

    /// Moves a layer that no record names any more to the trash, where it is nobody's, and removes it
    /// there. So may another thread that empties the trash at the same time; one that is gone already
    /// is fine.
    ///
    /// # Errors
    /// Where the host fails; [`Store::prune`] removes it later.
    pub fn discard_layer(&self, layer: Uuid) -> Result<()> {
        let Some(path) = self.trash_layer(layer)? else {
            return Ok(());
        };
        match self.storage.remove_tree(&path) {
            Err(error) if error.kind() == IoKind::NotFound => Ok(()),
            other => other.context(|| format!("cannot remove the layer {layer}")),
        }
    }
}
