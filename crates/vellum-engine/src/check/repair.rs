//! What can be put right without guessing.

use std::time::Duration;

use uuid::Uuid;

use super::report::{CheckReport, Remedy};
use crate::complete::{complete_layer, count_layer};
use crate::snapshot::recount;
use crate::teardown::{clean_orphaned_run_dirs, umount};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::LockMode;
use vellum_core::layer::{SealedLayer, repair_layer};
use vellum_export::device::ensure_supervised;
use vellum_store::{ContainerRecord, Store};

/// How long a device server may take to start a supervisor.
const SUPERVISE_TIMEOUT: Duration = Duration::from_secs(10);

/// Applies the remedies of all findings. One that fails is noted as such and the others go on.
pub(super) fn repair(store: &Store, report: &mut CheckReport) {
    // Leftovers last: the others may leave some.
    let is_prune = |remedy: &Option<Remedy>| *remedy == Some(Remedy::Prune);
    for finding in &mut report.findings {
        let Some(remedy) = finding.remedy.clone() else {
            continue;
        };
        if remedy == Remedy::Prune {
            continue;
        }
        match apply(store, &remedy) {
            Ok(done) => finding.repaired = Some(done),
            Err(error) => finding.advice = format!("cannot be repaired now: {error}"),
        }
    }
    let mut left = report
        .findings
        .iter_mut()
        .filter(|finding| is_prune(&finding.remedy))
        .peekable();
    if left.peek().is_none() {
        return;
    }
    let pruned = clean_orphaned_run_dirs(store).and_then(|_| store.prune());
    for finding in left {
        match &pruned {
            Ok(_) if !finding.path.exists() => finding.repaired = Some("removed".into()),
            Ok(_) => finding.advice = "in use now: repair again later".into(),
            Err(error) => finding.advice = format!("cannot be removed now: {error}"),
        }
    }
}

/// Returns what was done.
fn apply(store: &Store, remedy: &Remedy) -> Result<String> {
    match remedy {
        Remedy::Layer(layer) => {
            let _gc = exclusive(store)?;
            repair_layer(&**store.storage(), &store.layer_dir(*layer))?;
            count_layer(store, *layer)?;
            Ok("the layer is complete".into())
        }
        Remedy::Count(layer) => {
            let _gc = exclusive(store)?;
            count_layer(store, *layer)?;
            Ok("counted again".into())
        }
        Remedy::Settle(name) => {
            let container = store.container(name)?;
            if !settle(store, &container)? {
                return Err(busy());
            }
            Ok("its record is up to date".into())
        }
        Remedy::Detach(name) => {
            umount(store, name, true)?;
            Ok("cleaned up".into())
        }
        Remedy::Supervise(name) => {
            let run_dir = store.run_dir(&store.container(name)?);
            ensure_supervised(&run_dir, SUPERVISE_TIMEOUT)?;
            Ok("it has a supervisor".into())
        }
        Remedy::MarkDamaged(layer, problem) => {
            let mut info = store.layer_info(*layer)?;
            info.damaged = Some(problem.clone());
            store.set_layer_info(*layer, &info)?;
            Ok("marked: nothing new is built on it".into())
        }
        Remedy::MarkSound(layer) => {
            mark_sound(store, *layer)?;
            Ok("the mark is gone".into())
        }
        Remedy::QuarantineImage(name, reason) => {
            let path = store.quarantine_image(name, reason)?;
            Ok(format!("in quarantine: {}", path.display()))
        }
        Remedy::QuarantineContainer(name, reason) => {
            // What is left of its device would have no owner any more.
            umount(store, name, false)?;
            let path = store.quarantine_container(name, reason)?;
            Ok(format!("in quarantine: {}", path.display()))
        }
        Remedy::Prune => Ok(String::new()),
    }
}

/// Takes the mark of damage from a layer, where it has one.
pub(super) fn mark_sound(store: &Store, layer: Uuid) -> Result<()> {
    let mut info = store.layer_info(layer)?;
    match info.damaged.take() {
        Some(_) => store.set_layer_info(layer, &info),
        None => Ok(()),
    }
}

fn busy() -> Error {
    Error::new(
        ErrorKind::InUse,
        "other commands are at work on layers: repair again when they are done",
    )
}

fn exclusive(store: &Store) -> Result<vellum_store::StoreGuard> {
    store.try_collection_lock()?.ok_or_else(busy)
}

/// Settles a container unless a command is at work on it: then false.
fn settle(store: &Store, container: &ContainerRecord) -> Result<bool> {
    let lock = store.runs().container_lock(container.id);
    let held = store
        .storage()
        .lock(&lock, LockMode::Exclusive, false)
        .context(|| format!("cannot lock {}", lock.display()))?;
    if held.is_none() {
        return Ok(false);
    }
    store.settle(&container.name)?;
    Ok(true)
}

/// Finishes commits that were cut off: records of containers, checksums, counts. What another
/// process works on is left alone. Damage is no error here: `check` explains it.
///
/// # Errors
/// Where the store cannot be read or written.
pub fn finish_commits(store: &Store) -> Result<()> {
    let records = store.records()?;
    for container in records.containers.iter().filter(|c| c.next.is_some()) {
        unless_gone(settle(store, container).map(drop))?;
    }
    let Some(_gc) = store.try_collection_lock()? else {
        return Ok(());
    };
    let storage = &**store.storage();
    for layer in store.records()?.used_layers() {
        let dir = store.layer_dir(layer);
        // A server gives it its checksums, or a container writes it.
        if store.is_leased(&dir) {
            continue;
        }
        let pending = SealedLayer::open(storage, &dir).is_ok_and(|sealed| {
            if sealed.is_lazy() {
                return false;
            }
            !sealed.is_checksummed()
                || ["map", "have", "sums", "journal.0", "journal.1"]
                    .iter()
                    .any(|name| storage.exists(&dir.join(name)).unwrap_or(true))
                || store
                    .layer_info(layer)
                    .is_ok_and(|info| info.bytes != sealed.data_blocks().bytes())
        });
        if pending {
            complete_layer(store, layer)?;
        }
    }
    let containers = store.containers()?;
    let recounted = |container| unless_gone(recount(store, container));
    containers.iter().try_for_each(recounted)
}

/// What was removed meanwhile, or is damaged, is left alone.
fn unless_gone(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => Ok(()),
        other => other,
    }
}
