//! Space that a container's files have no use for goes back to the host.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::device::GIVE_BACK;
use super::reach::{Access, Reached, reach};
use super::seal::sync_file_system;
use super::serving::serving;
use vellum_base::error::{ErrorKind, Result};
use vellum_export::device::control;
use vellum_fs::ext4;
use vellum_store::{ContainerRecord, Store};

/// How long a server may take to make what was trimmed durable.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(120);

/// What a trim did.
#[derive(Debug, Clone, Serialize)]
pub struct Trimmed {
    /// The container.
    pub name: String,
    /// Bytes of its file system that are free, and that its layer was told of. Those that it was told
    /// of since it was mounted do not count.
    pub free_bytes: u64,
    /// Bytes by which its layer takes less of the host's disk; what others wrote meanwhile counts
    /// against it.
    pub returned_bytes: u64,
    /// It was mounted for the purpose.
    pub mounted: bool,
}

/// Tells a container's layer about all that is free in its file system, mounted and in use or not.
///
/// # Errors
/// [`vellum_base::ErrorKind::Unsupported`] for a container without ext4; [`vellum_base::ErrorKind::InUse`] while it is served over
/// NBD: its clients trim then.
pub fn trim(store: &Store, name: &str) -> Result<Trimmed> {
    let container = store.container(name)?;
    reach(store, &container, Access::Change, |reached| {
        trim_mounted(store, &container, reached)
    })
}

/// The containers that can be trimmed at this moment: those with an ext4 that nobody serves over NBD.
///
/// # Errors
/// Where the store cannot be read.
pub fn trimmable(store: &Store) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for container in store.containers()? {
        if container.disk.fs.is_some() && serving(store, &container)?.is_none() {
            names.push(container.name);
        }
    }
    Ok(names)
}

fn trim_mounted(
    store: &Store,
    container: &ContainerRecord,
    reached: &Reached<'_>,
) -> Result<Trimmed> {
    // Whoever had the lock before may have sealed what was the top.
    let top = store.container_by_now(container)?.top;
    // What was deleted is free only once ext4's journal says so, and what was written has its blocks.
    sync_file_system(reached.dir)?;
    let before = store.layer_bytes_on_host(top);
    let free_bytes = ext4::trim(reached.dir)?;
    match control::call(reached.run_dir, GIVE_BACK, Value::Null, FLUSH_TIMEOUT) {
        // A server of an older version takes nothing ahead.
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        other => drop(other?),
    }
    control::call(reached.run_dir, "flush", Value::Null, FLUSH_TIMEOUT)?;
    let after = store.layer_bytes_on_host(top);
    Ok(Trimmed {
        name: container.name.clone(),
        free_bytes,
        // Others may have written more meanwhile.
        returned_bytes: before.saturating_sub(after),
        mounted: reached.temporary,
    })
}
