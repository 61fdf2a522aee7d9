//! What a container changed, by paths.
//!
//! Two states of a file system whose chains have layers in common differ only in the blocks of the layers
//! that they do not share. So they are compared by these blocks ([`blocks`]); where that cannot be, both
//! are mounted and walked side by side, and the answer is the same.

mod blocks;
mod served;
mod trees;

pub use blocks::diff_devices;

use std::path::Path;

use uuid::Uuid;

use super::lock_container;
use super::mount_point::{Mounted, mounted};
use super::snapshot;
use super::teardown::take_over;
use super::temporary::TemporaryMount;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::{Comparison, Difference, Foreign, MountedTrees, compare_trees};
use vellum_store::{ContainerRecord, ContainerSnapshot, Scaffold, Store};

/// What to find out.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiffOptions {
    /// How the contents of files changed, too.
    pub contents: bool,
    /// Walk both trees, however fast it could be found out.
    pub walk: bool,
}

/// A state that never changes.
#[derive(Debug, Clone, Default)]
pub struct SealedState {
    /// Its layers, from the bottom up.
    pub layers: Vec<Uuid>,
    /// What running the container had made in it.
    pub scaffold: Scaffold,
}

/// A state that is compared with an older one.
#[derive(Debug, Clone, Copy)]
pub enum Newer<'a> {
    /// That of a container now, mounted or not. The caller has its lock.
    Container(&'a ContainerRecord),
    /// One that never changes.
    Sealed(&'a SealedState),
    /// That of a device which is served and mounted. The caller keeps its layer from being sealed.
    Mounted(&'a MountedState),
}

/// A state that programs change.
#[derive(Debug, Clone)]
pub struct MountedState {
    /// By what its servers are found: the container's, or the snapshot's.
    pub id: Uuid,
    /// The sealed layers below its writable one, from the bottom up.
    pub layers: Vec<Uuid>,
    /// Where it is mounted.
    pub mount: Mounted,
}

/// The paths by which a container, or a snapshot (`C@NAME`), differs from its image or from the container's
/// snapshot `from`, sorted. Looking changes neither.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name; [`ErrorKind::Unsupported`] where one of them holds no ext4;
/// [`ErrorKind::InUse`] while an NBD server has the container.
pub fn diff(
    store: &Store,
    name: &str,
    from: Option<&str>,
    options: DiffOptions,
) -> Result<Vec<Difference>> {
    let container = match store.container(name) {
        Ok(container) => container,
        Err(no_container) => {
            // Before it is looked at, so that what it names stays.
            let _pin = store.pin_layers()?;
            let Some(found) = snapshot::find(store, name)? else {
                return Err(snapshot::nothing_called(store, name, no_container));
            };
            check_ext4(name, found.snapshot.disk.fs.is_some())?;
            let older = older_state(store, &found.container, from)?;
            let newer = snapshot_state(&found.container, &found.snapshot)?;
            return diff_states(store, &older, Newer::Sealed(&newer), options);
        }
    };
    let (container, _busy) = lock_container(store, &container)?;
    let _pin = store.pin_layers()?;
    let container = store.as_settled(container)?;
    check_ext4(name, container.disk.fs.is_some())?;
    let older = older_state(store, &container, from)?;
    take_over(store, &container)?;
    diff_states(store, &older, Newer::Container(&container), options)
}

/// The paths by which `newer` differs from `older`, each an image or a snapshot (`C@NAME`), sorted. It is fast where
/// they have layers in common.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name; [`ErrorKind::Unsupported`] where one of them holds no ext4.
pub fn diff_sealed(
    store: &Store,
    older: &str,
    newer: &str,
    options: DiffOptions,
) -> Result<Vec<Difference>> {
    // Before they are looked at, so that what they name stays.
    let _pin = store.pin_layers()?;
    let (older, newer) = (sealed_state(store, older)?, sealed_state(store, newer)?);
    diff_states(store, &older, Newer::Sealed(&newer), options)
}

fn sealed_state(store: &Store, name: &str) -> Result<SealedState> {
    if let Some(found) = snapshot::find(store, name)? {
        check_ext4(name, found.snapshot.disk.fs.is_some())?;
        return snapshot_state(&found.container, &found.snapshot);
    }
    let image = store.image(name).map_err(|no_image| {
        let text = match store.container(name) {
            Ok(_) => format!(
                "{name} is a container: `vellum diff {name}` compares it with its image, --from with one of its \
                 snapshots"
            ),
            Err(_) => return no_image,
        };
        Error::new(ErrorKind::InvalidInput, text)
    })?;
    check_ext4(name, image.disk.fs.is_some())?;
    Ok(SealedState {
        layers: image.layers,
        scaffold: Scaffold::default(),
    })
}

fn check_ext4(name: &str, is_there: bool) -> Result<()> {
    if is_there {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("{name} holds no ext4, so it has no files to compare"),
    ))
}

/// The state of a container's snapshot, or of its image.
fn older_state(
    store: &Store,
    container: &ContainerRecord,
    snapshot: Option<&str>,
) -> Result<SealedState> {
    if let Some(snapshot) = snapshot {
        let found = container.snapshot(snapshot)?;
        check_ext4(snapshot, found.disk.fs.is_some())?;
        return snapshot_state(container, found);
    }
    // The image's own top: commits may have put layers of the container above it.
    let top = store.image_of(container)?.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "the image of {} is not there any more: compare it with a snapshot (--from)",
                container.name
            ),
        )
    })?;
    Ok(SealedState {
        layers: store.ancestry(Some(top))?,
        scaffold: Scaffold::default(),
    })
}

fn snapshot_state(
    container: &ContainerRecord,
    snapshot: &ContainerSnapshot,
) -> Result<SealedState> {
    Ok(SealedState {
        layers: container.snapshot_layers(snapshot.id)?,
        scaffold: snapshot.scaffold.clone(),
    })
}

/// The paths by which a newer state differs from an older one. The caller holds the pin. It is fast where
/// both have layers in common.
///
/// # Errors
/// [`ErrorKind::InUse`] while an NBD server has the container; where one of them cannot be opened or
/// mounted; [`ErrorKind::InvalidInput`] where there is no layer.
pub fn diff_states(
    store: &Store,
    older: &SealedState,
    newer: Newer<'_>,
    options: DiffOptions,
) -> Result<Vec<Difference>> {
    let plain = Scaffold::default();
    let comparison = Comparison {
        older: foreign(&older.scaffold),
        newer: foreign(match newer {
            Newer::Container(container) => &container.scaffold,
            Newer::Sealed(state) => &state.scaffold,
            // What is mounted without a container has nothing made in it.
            Newer::Mounted(_) => &plain,
        }),
        contents: options.contents,
    };
    if !options.walk {
        match blocks::diff(store, &older.layers, newer, &comparison) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                tracing::debug!("both trees are mounted and walked: {error}");
            }
            done => return done,
        }
    }
    walk(store, &older.layers, newer, &comparison)
}

fn walk(
    store: &Store,
    older: &[Uuid],
    newer: Newer<'_>,
    comparison: &Comparison,
) -> Result<Vec<Difference>> {
    let older = TemporaryMount::of_image(store, top_of(older)?)?;
    let compare = |newer: &Path| compare_trees(&MountedTrees::new(older.dir(), newer), comparison);
    let compare_then_end = |newer: TemporaryMount| {
        let found = compare(newer.dir())?;
        newer.end().map(|()| found)
    };
    let found = match newer {
        Newer::Container(container) => match mounted(store, container)? {
            Some(mount) => compare(&mount.dir)?,
            None => compare_then_end(TemporaryMount::of_container(store, container)?)?,
        },
        Newer::Sealed(state) => {
            compare_then_end(TemporaryMount::of_image(store, top_of(&state.layers)?)?)?
        }
        Newer::Mounted(state) => compare(&state.mount.dir)?,
    };
    older.end()?;
    Ok(found)
}

pub(super) fn top_of(layers: &[Uuid]) -> Result<Uuid> {
    let top = layers.last().copied();
    top.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a state without layers"))
}

/// What running the container made in it.
pub(super) fn foreign(scaffold: &Scaffold) -> Foreign {
    let points = scaffold.points.iter();
    let touched = scaffold.touched.iter();
    let before = touched.clone();
    Foreign {
        points: points
            .map(|point| (point.path.clone(), point.directory))
            .collect(),
        times: touched
            .map(|touched| (touched.path.clone(), touched.after))
            .collect(),
        before: before
            .map(|touched| (touched.path.clone(), touched.before))
            .collect(),
    }
}
