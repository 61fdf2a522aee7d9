//! Named volumes: plain directories that outlive containers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::names::check_name;
use super::{Store, StoreGuard};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Entry, LockMode};

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
    /// The volume is a directory of the host that somebody named: never filled, and never removed.
    pub elsewhere: bool,
    lock: PathBuf,
}

/// Ends the name of what is being copied.
const FRESH: &str = ".new";
/// Ends the name of the record of a volume that lies elsewhere.
const RECORD: &str = ".json";
/// And of one that is being written.
const UNFINISHED: &str = ".tmp";

/// Where a named volume lies that is not in the store: `.NAME.json` beside the others.
#[derive(Debug, Serialize, Deserialize)]
struct Elsewhere {
    /// Absolute path on the host.
    path: PathBuf,
}

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
        let elsewhere = self.read_json::<Elsewhere>(&beside(RECORD))?;
        Ok(VolumePlace {
            elsewhere: elsewhere.is_some(),
            dir: elsewhere.map_or_else(|| volumes.join(name), |elsewhere| elsewhere.path),
            fresh: beside(FRESH),
            full: beside(".full"),
            lock: beside(".lock"),
        })
    }

    /// Makes an empty volume; at `elsewhere`, an absolute path to a directory of the host, where one is named. One
    /// that is there already and lies there is fine.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a bad name; [`ErrorKind::NotFound`] where there is no such directory;
    /// [`ErrorKind::AlreadyExists`] for a volume that lies elsewhere.
    pub fn create_volume(&self, name: &str, elsewhere: Option<&Path>) -> Result<VolumePlace> {
        let _lock = self.lock()?;
        if self.volumes()?.iter().any(|there| there == name) {
            let place = self.volume_place(name)?;
            if elsewhere.is_none_or(|path| place.elsewhere && place.dir == path) {
                return Ok(place);
            }
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!(
                    "there is a volume {name} already, at {}: take another name, or remove it (`vellum volume rm {name}`)",
                    place.dir.display()
                ),
            ));
        }
        let place = self.volume_place(name)?;
        let volumes = self.root.join("volumes");
        let Some(path) = elsewhere else {
            self.storage
                .create_dir(&place.dir)
                .and_then(|()| self.storage.sync_dir(&volumes))
                .context(|| format!("cannot make the volume {name}"))?;
            return Ok(place);
        };
        let path = path
            .canonicalize()
            .context(|| format!("the volume {name} cannot lie at {}", path.display()))?;
        if !path.is_dir() || path.to_str().is_none() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the volume {name} cannot lie at {}: it is no directory, or its path is not UTF-8",
                    path.display()
                ),
            ));
        }
        let record = volumes.join(format!(".{name}{RECORD}"));
        self.write_json(&record, &Elsewhere { path })?;
        self.volume_place(name)
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

    /// Half-filled volumes that nobody fills any more, and half-written records of others.
    pub(super) fn unfinished_volumes(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for Entry {
            name: entry,
            is_dir,
        } in self.volume_entries()?
        {
            if !is_dir && entry.starts_with('.') && entry.ends_with(UNFINISHED) {
                found.push(self.root.join("volumes").join(&entry));
            }
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

    /// What lies in `volumes`.
    fn volume_entries(&self) -> Result<Vec<Entry>> {
        let dir = self.root.join("volumes");
        let entries = self.storage.list(&dir);
        entries.context(|| format!("cannot list {}", dir.display()))
    }

    /// All named volumes.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn volumes(&self) -> Result<Vec<String>> {
        let of_entry = |entry: Entry| match (entry.is_dir, entry.name.strip_prefix('.')) {
            (true, None) => Some(entry.name),
            (false, Some(name)) => name.strip_suffix(RECORD).map(str::to_owned),
            _ => None,
        };
        let mut names: Vec<String> = self
            .volume_entries()?
            .into_iter()
            .filter_map(of_entry)
            .collect();
        names.sort();
        Ok(names)
    }

    /// Removes a named volume with all that is in it; of one that lies elsewhere the name alone. `in_use` says which containers have it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] names the containers.
    pub fn remove_volume(&self, name: &str, in_use: &[String]) -> Result<()> {
        let place = self.volume_place(name)?;
        let dir = &place.dir;
        if !self.volumes()?.iter().any(|there| there == name) {
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
        if place.elsewhere {
            let _lock = self.lock()?;
            let record = format!(".{name}{RECORD}");
            return self.remove_json(&self.root.join("volumes").join(record));
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
