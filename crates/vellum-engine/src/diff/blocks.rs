//! Two states of a file system compared by the blocks that differ.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::served::Served;
use super::trees::BlockTrees;
use super::{Newer, top_of};

use crate::changed::{Older, bytes_of};
use crate::device::{OpenChain, Target};
use crate::map::served_runs;
use crate::mount_point::{Mounted, mounted};
use crate::seal::sync_file_system;
use crate::sockets::Sockets;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::chain::Chain;
use vellum_fs::freeze;
use vellum_fs::unmounted::{self, FileSystem, Replayed, changed};
use vellum_image::{Comparison, Difference, compare_trees};
use vellum_store::Store;

/// Writers of a container that is mounted wait for no longer than this: what takes longer is walked.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);
/// Blocks in the layers of a container that is mounted, of which contents are compared while its writers
/// wait: 256 MiB, which takes less than that.
const MAX_FROZEN: u64 = 64 << 10;

/// As [`super::diff_states`], by blocks alone.
///
/// # Errors
/// [`ErrorKind::Unsupported`] and others where it has to be found out in another way.
pub(super) fn diff(
    store: &Store,
    older: &[Uuid],
    newer: Newer<'_>,
    comparison: &Comparison,
) -> Result<Vec<Difference>> {
    let open = Target::Sealed(top_of(older)?).open(store)?;
    let resolved;
    let layers = match newer {
        Newer::Sealed(state) => &state.layers,
        Newer::Container(container) => {
            resolved = store.resolve(container)?;
            &resolved.sealed
        }
        Newer::Mounted(state) => &state.layers,
    };
    let task = Task {
        store,
        older: open.chain(),
        state: Older::of(open.chain()),
        layers,
        comparison,
    };
    let container = match newer {
        Newer::Sealed(state) => {
            return task.with_chain(&Target::Sealed(top_of(&state.layers)?).open(store)?);
        }
        Newer::Mounted(state) => return task.with_mount(state.id, &state.mount),
        Newer::Container(container) => container,
    };
    match mounted(store, container)? {
        Some(mount) => task.with_mount(container.id, &mount),
        None => task.with_chain(&Target::look_at(container).open(store)?),
    }
}

/// What is compared with a newer state.
struct Task<'a> {
    store: &'a Store,
    older: &'a Chain,
    /// Where that has its blocks from.
    state: Older,
    /// The layers of the newer state, without a top.
    layers: &'a [Uuid],
    comparison: &'a Comparison,
}

impl Task<'_> {
    /// With a chain that this process has open.
    fn with_chain(&self, newer: &OpenChain) -> Result<Vec<Difference>> {
        let newer = &**newer.chain();
        let differing = bytes_of(&self.state.changed_in(newer));
        diff_devices(self.older, newer, &differing, self.comparison)
    }

    /// With what is mounted, as it is at one moment: what its programs wrote is written out, and they wait
    /// until it was compared.
    fn with_mount(&self, id: Uuid, mount: &Mounted) -> Result<Vec<Difference>> {
        if mount.given_up {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "its file system has given up, and is another on its device than its programs see",
            ));
        }
        let sockets = Sockets::new(self.store, id);
        if self.comparison.contents && self.blocks_above(&sockets)? > MAX_FROZEN {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "contents of so many blocks take longer to compare than writers may wait",
            ));
        }
        // Most of the writing happens before anybody has to wait.
        sync_file_system(&mount.dir)?;
        let frozen = freeze::freeze(&mount.dir, FREEZE_LIMIT)?;
        let deadline = frozen.since() + FREEZE_LIMIT;
        let found = self.with_served(&sockets, &mount.device, deadline);
        let frozen = frozen.thaw()?;
        tracing::debug!(frozen_ms = frozen.as_secs_f64() * 1e3, "compared by blocks");
        found
    }

    /// How many blocks come from layers that the older state does not have.
    fn blocks_above(&self, sockets: &Sockets) -> Result<u64> {
        let (_, runs) = served_runs(sockets)?;
        let shared = self.state.shared(self.layers);
        let above = |number: i64| usize::try_from(number).is_ok_and(|number| number >= shared);
        let runs = runs.iter().filter(|(_, number)| above(*number));
        Ok(runs.map(|(blocks, _)| blocks).sum())
    }

    /// With what a server has open as a device, which nobody changes until `deadline`.
    fn with_served(
        &self,
        sockets: &Sockets,
        device: &Path,
        deadline: Instant,
    ) -> Result<Vec<Difference>> {
        let served = Served::new(self.older, self.layers.len(), sockets, device, deadline)?;
        let differing = bytes_of(&self.state.changed_at(served.runs(), self.layers));
        let served = served.with_differing(&differing);
        diff_devices(self.older, &served, &differing, self.comparison)
    }
}

/// The paths by which two states of an ext4 differ, of which the bytes in `differing` may differ and all
/// others do not. The list is that of both trees mounted and compared. Journals are replayed in memory.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where a file system has to be mounted to be read, as with features that are
/// not known here; [`ErrorKind::Corrupt`] where it makes no sense; as [`unmounted::Source::fill`].
pub fn diff_devices(
    older: &dyn unmounted::Source,
    newer: &dyn unmounted::Source,
    differing: &[Range<u64>],
    comparison: &Comparison,
) -> Result<Vec<Difference>> {
    let (older, newer) = (Replayed::new(older)?, Replayed::new(newer)?);
    let mut differing = differing.to_vec();
    differing.extend(older.written().chain(newer.written()));
    let (older, newer) = (FileSystem::open(&older)?, FileSystem::open(&newer)?);
    let changed = changed(&older, &newer, &differing)?;
    let trees = BlockTrees::new(&older, &newer, &changed);
    let found = compare_trees(&&trees, comparison)?;
    trees.check_all_seen()?;
    Ok(found)
}
