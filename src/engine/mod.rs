//! What users do with a store: import, mount, run, commit, compare, serve. Commands and the
//! snapshotter call these; nothing here prints.

pub mod bench;
pub mod check;
pub mod commit;
pub mod device;
pub mod diff;
pub mod doctor;
pub mod durability;
pub(crate) mod grow;
pub mod import;
pub mod known;
pub mod lost;
pub mod map;
pub mod mount;
pub(crate) mod mount_point;
pub mod prewarm;
pub mod raw;
pub mod run;
pub mod serve;
pub mod stats;
pub mod status;
pub(crate) mod template;
pub mod upgrade;

use std::path::PathBuf;

use uuid::Uuid;

use crate::error::{Result, ResultExt};
use crate::storage::{Held, LockMode};
use crate::store::{ContainerRecord, Store};

/// A path in JSON, whose strings are text: what is not is replaced.
pub(crate) fn path_as_text<S: serde::Serializer>(
    path: &std::path::Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// The file whose lock keeps other processes from a container.
pub(crate) fn container_lock(store: &Store, id: Uuid) -> PathBuf {
    store.root().join("run").join(format!("{id}.lock"))
}

/// Keeps other processes from mounting, unmounting or committing the same container.
pub(crate) fn lock_container(store: &Store, container: &ContainerRecord) -> Result<Box<dyn Held>> {
    let path = container_lock(store, container.id);
    let held = store
        .storage()
        .lock(&path, LockMode::Exclusive, true)
        .context(|| format!("cannot lock {}", path.display()))?;
    let held = held.ok_or_else(|| {
        crate::Error::new(
            crate::ErrorKind::InUse,
            format!("the container {} is busy", container.name),
        )
    })?;
    // While we waited it may have been removed, and its name given to another.
    if store.container(&container.name)?.id != container.id {
        return Err(crate::Error::new(
            crate::ErrorKind::NotFound,
            format!(
                "the container {} was removed, and another made of that name: try again",
                container.name
            ),
        ));
    }
    Ok(held)
}
