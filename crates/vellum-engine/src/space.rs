//! The store's policy for a disk that is nearly full, with those who serve its containers.

use std::time::Duration;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::WritableLayer;
use vellum_store::{SpacePolicy, Store, StoreSpace};

use super::device::{KEEP_FREE, KeepFree};
use super::sockets::Sockets;
use super::wire::encode;

/// How long a server may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);

/// Has the writers of a layer leave free what the store's policy says.
pub(crate) fn follow_policy(store: &Store, layer: &WritableLayer) {
    match store.space() {
        Ok(space) => layer.keep_free(space.map_or(0, |space| space.stop_bytes)),
        // A container goes on: no policy makes its data less safe.
        Err(error) => tracing::error!(%error, "nothing of the disk is kept free"),
    }
}

/// What came of a new policy.
#[derive(Debug)]
pub struct PolicySet {
    /// Servers that follow it from now on.
    pub told: usize,
    /// Those that could not be told: by the name of the container or snapshot.
    pub failed: Vec<Error>,
}

/// Sets the policy of the store, for whoever serves something of it by now too.
///
/// # Errors
/// As [`Store::set_space_policy`].
pub fn set_policy(store: &Store, policy: SpacePolicy) -> Result<PolicySet> {
    store.set_space_policy(policy)?;
    let bytes = store.space()?.map_or(0, |space| space.stop_bytes);
    let containers = store.containers()?.into_iter();
    let snapshots = store.snapshots(Store::warn_damaged)?.into_iter();
    let all = containers
        .map(|container| (container.id, container.name))
        .chain(snapshots.map(|snapshot| (snapshot.id, snapshot.key)));
    let ask = encode(&KeepFree { bytes })?;
    let mut set = PolicySet {
        told: 0,
        failed: Vec::new(),
    };
    for (id, name) in all {
        match Sockets::new(store, id).ask(KEEP_FREE, &ask, ASK_TIMEOUT) {
            Ok(_) => set.told += 1,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => set.failed.push(error.context(format!(
                "the server of {name} goes on as before: `vellum upgrade-servers`, or mount it anew"
            ))),
        }
    }
    Ok(set)
}

/// The disk under the store and its policy.
///
/// # Errors
/// As [`Store::space`]; [`ErrorKind::Unsupported`] where the host does not say how much is left.
pub fn space(store: &Store) -> Result<StoreSpace> {
    store.space()?.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "the file system of {} does not say what is left",
                store.root().display()
            ),
        )
    })
}
