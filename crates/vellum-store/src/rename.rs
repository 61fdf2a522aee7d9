//! Names of containers: that of a container is the name of its record's file, and a rename of the file
//! gives it another.

use std::path::Path;

use uuid::Uuid;

use super::records::ContainerRecord;
use super::{RECORD_SUFFIX, Store};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

const DIRECTORY: &str = "containers";
/// How often a directory is read again since records came while it was read.
const LISTINGS: u32 = 10;

/// Which container: its id, which stays, and the name that it had when somebody asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRef {
    /// Never used again.
    pub id: Uuid,
    /// Where to look first.
    pub name: String,
}

impl From<&ContainerRecord> for ContainerRef {
    fn from(record: &ContainerRecord) -> Self {
        ContainerRef {
            id: record.id,
            name: record.name.clone(),
        }
    }
}

impl Store {
    /// Gives a container another name. Its id stays, and what is mounted or runs by that goes on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such a container, [`ErrorKind::AlreadyExists`] for a name that
    /// is taken, [`ErrorKind::InvalidInput`] for a bad one.
    pub fn rename_container(&self, name: &str, new: &str) -> Result<ContainerRecord> {
        // Whoever tells from the records which run directories are nobody's has the other side of it.
        let _pin = self.pin_layers()?;
        let _lock = self.lock()?;
        let mut record = self.container(name)?;
        self.check_new_container(new)?;
        new.clone_into(&mut record.name);
        let (from, to) = (
            self.record_path(DIRECTORY, name),
            self.record_path(DIRECTORY, new),
        );
        // Until its file has the new name, so little does what it says of itself count as it does
        // afterwards.
        self.write_json(&from, &record)?;
        let rename = || {
            self.storage.rename(&from, &to)?;
            self.storage.sync_dir(&self.root.join(DIRECTORY))
        };
        rename().context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
        Ok(record)
    }

    /// A container as it is by now, for whoever had to wait for its lock since it was read: as
    /// [`Store::settle`] would write it.
    ///
    /// # Errors
    /// As [`Store::find_container`] and [`Store::as_settled`].
    pub fn container_by_now(&self, container: &ContainerRecord) -> Result<ContainerRecord> {
        self.as_settled(self.find_container(&container.into())?)
    }

    /// A container by its id, under whatever name it has by now.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it was removed.
    pub fn find_container(&self, container: &ContainerRef) -> Result<ContainerRecord> {
        if let Some(record) = self.by_name(container)? {
            return Ok(record);
        }
        // Without the lock first: a server must not wait for a command that waits for it.
        if let Some(record) = self.by_id(container)? {
            return Ok(record);
        }
        // With the lock nobody renames it meanwhile; where nothing can be written, nobody does.
        let _lock = match self.is_read_only() {
            true => None,
            false => Some(self.lock()?),
        };
        self.find_locked(container)
    }

    /// As [`Store::find_container`], by whoever has the store's lock.
    pub(super) fn find_locked(&self, container: &ContainerRef) -> Result<ContainerRecord> {
        if let Some(record) = self.by_name(container)? {
            return Ok(record);
        }
        self.by_id(container)?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "the container {} was removed (its id was {}): `vellum ps` lists those that are \
                     there",
                    container.name, container.id
                ),
            )
        })
    }

    fn by_id(&self, container: &ContainerRef) -> Result<Option<ContainerRecord>> {
        let all = self.container_records(Store::warn_damaged)?;
        Ok(all.into_iter().find(|record| record.id == container.id))
    }

    fn by_name(&self, container: &ContainerRef) -> Result<Option<ContainerRecord>> {
        let record = self.named_container(&container.name)?;
        Ok(record.filter(|record| record.id == container.id))
    }

    /// The container whose record is the file of this name.
    pub(super) fn named_container(&self, name: &str) -> Result<Option<ContainerRecord>> {
        self.container_file(name, &self.record_path(DIRECTORY, name))
    }

    fn container_file(&self, name: &str, path: &Path) -> Result<Option<ContainerRecord>> {
        let record: Option<ContainerRecord> = self.read_json(path)?;
        Ok(record.map(|record| ContainerRecord {
            name: name.to_owned(),
            ..record
        }))
    }

    /// All containers' records, one each, also of those that are renamed at this moment: while records
    /// come, the directory is read again. One that cannot be read is passed to `damaged`.
    pub(super) fn container_records(
        &self,
        mut damaged: impl FnMut(Error),
    ) -> Result<Vec<ContainerRecord>> {
        let dir = self.root.join(DIRECTORY);
        let mut names = self.record_names(DIRECTORY)?;
        let mut listings = 1;
        loop {
            let mut records = Vec::new();
            let mut failures = Vec::new();
            for name in &names {
                let path = dir.join(format!("{name}{RECORD_SUFFIX}"));
                match self.container_file(name, &path) {
                    Ok(record) => records.extend(record),
                    Err(error) => failures.push(error),
                }
            }
            let after = self.record_names(DIRECTORY)?;
            let came = after.iter().any(|name| !names.contains(name));
            if !came || listings >= LISTINGS {
                failures.into_iter().for_each(&mut damaged);
                return Ok(records);
            }
            (names, listings) = (after, listings + 1);
        }
    }
}
