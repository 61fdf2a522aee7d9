//! Named volumes: plain directories that outlive containers.

use std::path::PathBuf;

use super::Store;
use super::names::check_name;
use crate::error::{Error, ErrorKind, Result, ResultExt};

impl Store {
    /// The directory of a named volume, made where it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a bad name.
    pub fn volume_dir(&self, name: &str) -> Result<PathBuf> {
        check_name("volume", name)?;
        let dir = self.root.join("volumes").join(name);
        match self.storage.create_dir(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::io(
                format!("cannot make the volume {}", dir.display()),
                error,
            )),
            Err(_) => Ok(dir),
            Ok(()) => {
                self.storage
                    .sync_dir(&self.root.join("volumes"))
                    .context(|| format!("cannot sync {}", self.root.display()))?;
                Ok(dir)
            }
        }
    }

    /// All named volumes.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn volumes(&self) -> Result<Vec<String>> {
        let dir = self.root.join("volumes");
        let entries = self
            .storage
            .list(&dir)
            .context(|| format!("cannot list {}", dir.display()))?;
        Ok(entries
            .into_iter()
            .filter(|entry| entry.is_dir)
            .map(|entry| entry.name)
            .collect())
    }

    /// Removes a named volume with all that is in it. `in_use` says which containers have it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] names the containers.
    pub fn remove_volume(&self, name: &str, in_use: &[String]) -> Result<()> {
        check_name("volume", name)?;
        let dir = self.root.join("volumes").join(name);
        let there = self
            .storage
            .exists(&dir)
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
        // Renamed first, so that it is gone at once or not at all.
        let trash = self
            .root
            .join("trash")
            .join(uuid::Uuid::new_v4().to_string());
        let remove = || {
            self.storage.rename(&dir, &trash)?;
            self.storage.sync_dir(&self.root.join("volumes"))?;
            self.storage.remove_tree(&trash)
        };
        remove().context(|| format!("cannot remove the volume {name}"))
    }
}
