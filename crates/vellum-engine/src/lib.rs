//! What users do with a store: import, mount, run, commit, compare, serve. Commands and the
//! snapshotter call these; nothing here prints.

pub mod backup;
mod canonical;
pub mod changed;
pub mod check;
pub mod commit;
pub mod complete;
mod contexts;
pub mod cp;
pub mod device;
pub mod diff;
pub mod doctor;
pub mod export;
pub mod grow;
pub mod import;
pub mod known;
mod layer_file;
pub mod lazy;
pub mod lost;
pub mod map;
pub mod merge;
pub mod mount;
pub mod mount_point;
pub mod prewarm;
pub mod progress;
pub mod raw;
mod reach;
pub mod registry;
pub mod rename;
pub mod resize;
pub mod retention;
pub mod run;
pub mod seal;
pub mod serve;
pub mod serving;
pub mod snapshot;
mod sockets;
pub mod space;
mod staged;
pub mod stats;
pub mod status;
pub mod teardown;
pub mod template;
pub mod temporary;
pub mod trace;
pub mod trim;
pub mod upgrade;
pub mod usage;
pub mod watch;
pub mod wire;

use std::time::{Duration, Instant};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::storage::{Held, LockMode, by};
use vellum_store::{ContainerRecord, Store};

/// A path in JSON, whose strings are text: what is not is replaced.
pub fn path_as_text<S: serde::Serializer>(
    path: &std::path::Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Most commands work on a container for less than this: whoever waits longer wants to know for whom.
const SHORT_WAIT: Duration = Duration::from_secs(1);
/// How long apart it is asked for, in that time and afterwards.
const SHORT_PAUSE: Duration = Duration::from_millis(2);
const LONG_PAUSE: Duration = Duration::from_millis(50);

/// Keeps other processes from mounting, unmounting or committing the same container. Returns its record as
/// it is from now on: the one that the caller had may be from before others joined its layers, took a
/// snapshot or made it larger.
///
/// # Errors
/// [`ErrorKind::NotFound`] where it was removed or renamed meanwhile.
pub fn lock_container(
    store: &Store,
    container: &ContainerRecord,
) -> Result<(ContainerRecord, Box<dyn Held>)> {
    let (now, held) = lock_renamed(store, container)?;
    if now.name == container.name {
        return Ok((now, held));
    }
    // Its old name may be another's by now, and what is read by that would be of the wrong one.
    Err(Error::new(
        ErrorKind::NotFound,
        format!(
            "the container {} was renamed to {} meanwhile: try again with that name",
            container.name, now.name
        ),
    ))
}

/// As [`lock_container`], for who began with it long ago and goes by its id alone: it may have another
/// name by now.
fn lock_renamed(
    store: &Store,
    container: &ContainerRecord,
) -> Result<(ContainerRecord, Box<dyn Held>)> {
    let held = wait_for_container(store, container)?;
    // While we waited it may have been removed.
    Ok((store.find_container(&container.into())?, held))
}

/// Waits for the lock of a container, and says for whom where that takes long. It asks again and again,
/// since a signal that comes just before a call that waits does not wake it.
fn wait_for_container(store: &Store, container: &ContainerRecord) -> Result<Box<dyn Held>> {
    let path = store.runs().container_lock(container.id);
    let since = Instant::now();
    let mut told = false;
    loop {
        let held = store
            .storage()
            .lock(&path, LockMode::Exclusive, false)
            .context(|| format!("cannot lock {}", path.display()))?;
        if let Some(held) = held {
            return Ok(held);
        }
        interrupt::check()?;
        if since.elapsed() > SHORT_WAIT && !told {
            told = true;
            tracing::warn!(
                "waiting for another process that works on the container {}{}",
                container.name,
                by(serving::working(store, container).as_ref())
            );
        }
        std::thread::sleep(if told { LONG_PAUSE } else { SHORT_PAUSE });
    }
}
