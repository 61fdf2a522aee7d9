//! Sealed layers on each other become one: the space of removed snapshots comes back, and chains stay short.
//! docs/snapshots.md, "Joining layers".

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::complete::finish_layer;
use super::device::{REPLACE_SEALED, ReplaceSealed};
use super::lock_container;
use super::progress::BlocksWatch;
use super::serving::served_live;
use super::wire::encode;
use vellum_base::block::Blocks;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Held, LockMode};
use vellum_core::chain::join_layers;
use vellum_core::layer::{Header, LayerOptions, SealedLayer, WritableLayer};
use vellum_export::device::{self, control};
use vellum_image::HistoryEntry;
use vellum_store::{ContainerRecord, ImageRecord, LayerInfo, Store, now};

/// Locks of containers.
type Locks = Vec<Box<dyn Held>>;

/// How long a server may take to open its layers anew.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(60);

/// Layers that became one.
#[derive(Debug, Clone, Serialize)]
pub struct Joined {
    /// From the bottom up.
    pub layers: Vec<Uuid>,
    /// The one that says what they said.
    pub into: Uuid,
    /// Bytes of data in it.
    pub bytes: u64,
}

/// What a merge did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct MergeReport {
    /// What was joined.
    pub joined: Vec<Joined>,
    /// Bytes that the layers which nothing needs any more took on the host.
    pub freed: u64,
    /// Containers that go on with the layers as they were until they are mounted again: the space that these
    /// take comes back then.
    pub later: Vec<String>,
}

/// Removes the snapshots of a container that are not in `keep`, if that is given, and joins its sealed layers
/// between those that are left. It and the containers made of it may be in use. Each group of layers is a
/// step of its own: what is interrupted goes on there the next time.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a container or snapshot; where a layer is damaged or the host fails. What was
/// joined before is.
pub fn merge(
    store: &Store,
    name: &str,
    keep: Option<&[String]>,
    watch: &dyn BlocksWatch,
) -> Result<MergeReport> {
    let (_, _busy) = lock_container(store, &store.container(name)?)?;
    let container = store.settle(name)?;
    let mut report = MergeReport::default();
    if let Some(keep) = keep {
        for kept in keep {
            container.snapshot(kept)?;
        }
        let gone = container
            .snapshots
            .iter()
            .filter(|kept| !keep.contains(&kept.name));
        let gone: Vec<&str> = gone.map(|kept| kept.name.as_str()).collect();
        if !gone.is_empty() {
            report.freed += store.remove_container_snapshots(name, &gone)?.bytes;
        }
    }
    let mut reopen = HashSet::new();
    let mut joined = Ok(());
    while let (Ok(()), Some(group)) = (&joined, next_group(store, name)?) {
        joined = join(store, name, &group, watch, &mut report, &mut reopen);
    }
    // Also after a failure, for what was joined before.
    for name in reopen {
        if !replace_served(store, &name)? {
            report.later.push(name);
        }
    }
    report.later.sort();
    joined.map(|()| report)
}

/// Layers of a container, next to each other, between which nothing needs to know a difference.
fn next_group(store: &Store, name: &str) -> Result<Option<Vec<Uuid>>> {
    let records = store.records()?;
    if let Some(damaged) = records.damaged.into_iter().next() {
        return Err(damaged.context("a record that cannot be read may need any layer"));
    }
    let mut others: HashSet<Uuid> = records.quarantined_layers.into_iter().collect();
    others.extend(records.images.iter().flat_map(|image| &image.layers));
    others.extend(records.templates.iter().map(|template| template.layer));
    others.extend(
        records
            .snapshots
            .iter()
            .flat_map(|snapshot| snapshot.layers.iter().chain([&snapshot.base])),
    );
    let ends = ends(&records.containers)?;
    let own = records
        .containers
        .iter()
        .find(|container| container.name == name);
    let Some(own) = own else { return Ok(None) };
    for layers in own.chains()? {
        let mut group = Vec::new();
        for layer in layers {
            if others.contains(&layer) {
                group.clear();
                continue;
            }
            group.push(layer);
            if ends.contains(&layer) {
                if group.len() > 1 {
                    return Ok(Some(group));
                }
                group.clear();
            }
        }
    }
    Ok(None)
}

/// The layers with which a chain ends, or on which chains part: what lies above them is not part of each chain that
/// has them.
fn ends(containers: &[ContainerRecord]) -> Result<HashSet<Uuid>> {
    let mut ends = HashSet::new();
    let mut above = HashMap::new();
    for container in containers {
        for chain in container.chains()? {
            ends.extend(chain.last());
            for (lower, upper) in chain.iter().zip(chain.iter().skip(1)) {
                if above
                    .insert(*lower, *upper)
                    .is_some_and(|other| other != *upper)
                {
                    ends.insert(*lower);
                }
            }
        }
    }
    Ok(ends)
}

/// Joins one group, in the records of all containers that have it and that nobody works on.
fn join(
    store: &Store,
    name: &str,
    group: &[Uuid],
    watch: &dyn BlocksWatch,
    report: &mut MergeReport,
    reopen: &mut HashSet<String>,
) -> Result<()> {
    let pin = store.pin_layers()?;
    let storage = &**store.storage();
    let read = |layer: Option<&Uuid>| {
        let layer = layer.ok_or_else(|| Error::internal("a group without layers"))?;
        Header::read(storage, &store.layer_dir(*layer))
    };
    let (lowest, uppermost) = (read(group.first())?, read(group.last())?);
    let staged = store.stage_joined(&lowest, &uppermost)?;
    let layer = copied(store, group, &staged.dir(), watch)?;
    let info = LayerInfo {
        origin: format!("vellum merge {name}: {} layers", group.len()),
        chain_key: store.layer_info(uppermost.uuid)?.chain_key,
        ..LayerInfo::default()
    };
    let bytes = layer.data_blocks().bytes();
    let into = finish_layer(staged, layer, info, &pin)?;
    crash_point::here("merge: layer published");
    let (names, _held) = users(store, name, group)?;
    let removed = store.join_in_records(&names, group, into, pin)?;
    crash_point::here("merge: records replaced");
    reopen.extend(names);
    report.freed += removed.bytes;
    report.joined.push(Joined {
        layers: group.to_vec(),
        into,
        bytes,
    });
    Ok(())
}

/// A new layer in `dir` with what these say.
fn copied(
    store: &Store,
    group: &[Uuid],
    dir: &std::path::Path,
    watch: &dyn BlocksWatch,
) -> Result<Arc<WritableLayer>> {
    let storage = store.storage();
    let layer = WritableLayer::open(storage.clone(), dir, LayerOptions::default())?;
    let sealed = store
        .layer_dirs(group)
        .iter()
        .map(|dir| SealedLayer::open(&**storage, dir).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let blocks: Blocks = sealed.iter().map(|sealed| sealed.data_blocks()).sum();
    watch.begin(blocks.get());
    let done = join_layers(sealed, &layer, |blocks| watch.read(blocks.get()));
    watch.end();
    done.map(|()| layer)
}

/// The containers that have all layers of a group, the one whose lock the caller has among them, and the locks
/// of the others. One that somebody works on is left out: it keeps its layers.
fn users(store: &Store, name: &str, group: &[Uuid]) -> Result<(Vec<String>, Locks)> {
    let mut names = vec![name.to_owned()];
    let mut locks = Vec::new();
    for container in store.containers()? {
        let has = |layers: &Vec<Uuid>| layers.windows(group.len()).any(|there| there == group);
        if container.name == name || !container.chains()?.iter().any(has) {
            continue;
        }
        let path = store.runs().container_lock(container.id);
        let held = store
            .storage()
            .lock(&path, LockMode::Exclusive, false)
            .context(|| format!("cannot lock {}", path.display()))?;
        let Some(held) = held else { continue };
        // By the name that it has until the lock is released: what it was called may be another's by now.
        match store.find_container(&(&container).into()) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            now => {
                names.push(now?.name);
                locks.push(held);
            }
        }
    }
    Ok((names, locks))
}

/// Has the server of a container go on with the layers that its record names now. False where it cannot.
fn replace_served(store: &Store, name: &str) -> Result<bool> {
    let container = match store.container(name) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        other => other?,
    };
    let run_dir = store.run_dir(&container);
    if !device::status(&run_dir)?.is_some_and(|status| status.alive) {
        return match served_live(store, &container) {
            Ok(None) => Ok(true),
            Ok(Some(socket)) => replace(store, container, |args| {
                control::call_at(&socket, REPLACE_SEALED, args, REPLACE_TIMEOUT)
            }),
            // An NBD server has its files open until it ends.
            Err(error) if error.kind() == ErrorKind::InUse => Ok(false),
            Err(error) => Err(error),
        };
    }
    replace(store, container, |args| {
        control::call(&run_dir, REPLACE_SEALED, args, REPLACE_TIMEOUT)
    })
}

fn replace(
    store: &Store,
    container: ContainerRecord,
    ask: impl FnOnce(Value) -> Result<Value>,
) -> Result<bool> {
    let ContainerRecord { layers, name, .. } = store.as_settled(container)?;
    match ask(encode(&ReplaceSealed { layers })?) {
        Ok(_) => Ok(true),
        // Its successor opens the new ones.
        Err(error) => {
            tracing::warn!(%error, "{name} goes on with the layers that it has");
            Ok(false)
        }
    }
}

/// Makes an image of one layer of an image's files: what its layers say together.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for the new name; [`ErrorKind::NotFound`] for the image; where a layer is damaged
/// or the host fails: nothing is there then.
pub fn flatten(
    store: &Store,
    image: &str,
    new: &str,
    watch: &dyn BlocksWatch,
) -> Result<ImageRecord> {
    store.check_new_image(new)?;
    let pin = store.pin_layers()?;
    let mut record = store.image(image)?;
    let size = Header::read(&**store.storage(), &store.layer_dir(record.top()?))?.virtual_size;
    let staged = store.stage_layer(None, size)?;
    let layer = copied(store, &record.layers, &staged.dir(), watch)?;
    let origin = format!("vellum flatten {image}");
    let info = LayerInfo {
        origin: origin.clone(),
        ..LayerInfo::default()
    };
    record.layers = vec![finish_layer(staged, layer, info, &pin)?];
    record.name = new.to_owned();
    record.id = Uuid::new_v4();
    record.created = now();
    // Its steps are told, but none of them has a layer any more.
    record.config.settle_history(0);
    record.config.history.push(HistoryEntry {
        created: Some(now()),
        created_by: Some(origin),
        ..HistoryEntry::default()
    });
    store.put_image(&record, &pin)?;
    Ok(record)
}
