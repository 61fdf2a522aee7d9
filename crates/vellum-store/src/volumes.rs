//! Named volumes: plain directories that outlive containers.

use std::path::PathBuf;

use super::names::check_name;
use super::{Store, StoreGuard};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::LockMode;

/// Where a named volume lies, and where it is filled.
///
/// What fills it is copied to `fresh`, which is renamed to `full` once it is whole, and only then
/// becomes the volume, or moves into it. So a crash leaves no half of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlace {
    /// The volume.
    pub dir: PathBuf,
    /// Being copied; worthless when nobody works on it.
    pub fresh: PathBuf,
    /// Copied, and not in the volume yet.
    pub full: PathBuf,
    lock: PathBuf,
}

/// Ends the name of what is being copied.
const FRESH: &str = ".new";

impl Store {
    /// The place of a named volume, which need not be there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a bad name.
    pub fn volume_place(&self, name: &str) -> Result<VolumePlace> {
        check_name("volume", name)?;
        let volumes = self.root.join("volumes");
        // No volume's name begins with a dot.
        let beside = |suffix: &str| volumes.join(format!(".{name}{suffix}"));
        Ok(VolumePlace {
            dir: volumes.join(name),
            fresh: beside(FRESH),
            full: beside(".full"),
            lock: beside(".lock"),
        })
    }

    /// Waits until nobody else fills the volume. The lock lies beside it: a container can lock
    /// whatever is in the volume, and the volume itself, and would keep all others out.
    ///
    /// # Errors
    /// Where the lock file cannot be opened.
    pub fn lock_volume(&self, place: &VolumePlace) -> Result<StoreGuard> {
        let doing = || format!("cannot lock {}", place.lock.display());
        let held = self
            .storage
            .lock(&place.lock, LockMode::Exclusive, true)
            .context(doing)?
            .ok_or_else(|| Error::new(ErrorKind::Io, doing()))?;
        Ok(StoreGuard { _held: held })
    }

    /// What was copied whole, and is durable, becomes the volume, where there is none.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn publish_volume(&self, place: &VolumePlace) -> Result<()> {
        self.storage
            .rename(&place.full, &place.dir)
            .and_then(|()| self.storage.sync_dir(&self.root.join("volumes")))
            .context(|| format!("cannot make the volume {}", place.dir.display()))
    }

    /// Half-filled volumes that nobody fills any more.
    pub(super) fn unfinished_volumes(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in self.volume_entries()? {
            let name = entry
                .strip_prefix('.')
                .and_then(|name| name.strip_suffix(FRESH));
            let Some(place) = name.and_then(|name| self.volume_place(name).ok()) else {
                continue;
            };
            let free = self.storage.lock(&place.lock, LockMode::Exclusive, false);
            if free
                .context(|| format!("cannot lock {}", place.lock.display()))?
                .is_some()
            {
                found.push(place.fresh);
            }
        }
        Ok(found)
    }

    /// Names of the directories in `volumes`.
    fn volume_entries(&self) -> Result<Vec<String>> {
        let dir = self.root.join("volumes");
        let entries = self
            .storage
            .list(&dir)
            .context(|| format!("cannot list {}", dir.display()))?;
        let directories = entries.into_iter().filter(|entry| entry.is_dir);
        Ok(directories.map(|entry| entry.name).collect())
    }

    /// All named volumes.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn volumes(&self) -> Result<Vec<String>> {
        let mut names = self.volume_entries()?;
        names.retain(|name| !name.starts_with('.'));
        Ok(names)
    }

    /// Removes a named volume with all that is in it. `in_use` says which containers have it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] names the containers.
    pub fn remove_volume(&self, name: &str, in_use: &[String]) -> Result<()> {
        let place = self.volume_place(name)?;
        let dir = &place.dir;
        let there = self
            .storage
            .exists(dir)
            .context(|| format!("cannot stat {}", dir.display()))?;
        if !there {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no volume {name}: `vellum volume ls` lists them"),
            ));
        }
        if !in_use.is_empty() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the volume {name} is in use by container {}",
                    in_use.join(", ")
                ),
            ));
        }
        let _lock = self.lock_volume(&place)?;
        for unfinished in [&place.fresh, &place.full] {
            match self.storage.remove_tree(unfinished) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    let doing = format!("cannot remove {}", unfinished.display());
                    return Err(Error::io(doing, error));
                }
                _ => {}
            }
        }
        // Renamed first, so that it is gone at once or not at all.
        let trash = self
            .root
            .join("trash")
            .join(uuid::Uuid::new_v4().to_string());
        let remove = || {
            self.storage.rename(dir, &trash)?;
            self.storage.sync_dir(&self.root.join("volumes"))?;
            self.storage.remove_tree(&trash)
        };
        remove().context(|| format!("cannot remove the volume {name}"))
    }
}
