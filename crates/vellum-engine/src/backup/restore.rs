//! Containers made of backups.

use std::fs::File;
use std::io::BufReader;

use serde::Serialize;
use uuid::Uuid;

use super::description::Description;
use crate::complete::finish_layer;
use crate::lock_container;
use crate::mount_point::mounted;
use crate::progress::BlocksWatch;
use crate::serving::refuse_served;
use crate::staged::{open_staged, write_run};
use crate::teardown::take_over;
use vellum_backup::{Header, Reader, Totals};
use vellum_base::block::{BLOCK_SIZE, BlockState, Run};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt::{self, Interruptible};
use vellum_core::layer::SealedLayer;
use vellum_store::{
    ContainerRecord, ContainerSnapshot, DiskInfo, LayerInfo, Restored, Store, StoreGuard,
    VolumeMount, check_name,
};

/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;

/// Where a backup is read from.
#[derive(Debug)]
pub struct Source {
    /// For messages.
    pub name: String,
    /// Its bytes, where that is known.
    pub size: Option<u64>,
    /// From its beginning: a file, a pipe, a socket.
    pub input: File,
}

/// What was restored.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// The container.
    pub container: String,
    /// The states that were made, in order.
    pub restored: Vec<RestoredState>,
    /// Backups whose state was there already.
    pub passed: Vec<Passed>,
    /// Volumes and directories of the host that the origin had, and that the container was not given.
    pub left_out: Vec<VolumeMount>,
}

/// A state that was made.
#[derive(Debug, Clone, Serialize)]
pub struct RestoredState {
    /// The snapshot's name here.
    pub snapshot: String,
    /// Its id, here and where it comes from.
    pub state: Uuid,
    /// Bytes of data in it.
    pub bytes: u64,
}

/// A backup that was passed over.
#[derive(Debug, Clone, Serialize)]
pub struct Passed {
    /// Where it was to be read from.
    pub file: String,
    /// The snapshot that has its state.
    pub snapshot: String,
}

/// What a backup is, and holds.
#[derive(Debug, Clone, Serialize)]
pub struct BackupInfo {
    /// Where it was read from.
    pub file: String,
    /// Its own id.
    pub backup: Uuid,
    /// The container that it is of.
    pub container: String,
    /// That container's id.
    pub container_id: Uuid,
    /// The snapshot.
    pub snapshot: String,
    /// That snapshot's id.
    pub state: Uuid,
    /// When the snapshot was taken.
    pub created: String,
    /// The snapshot that it is a delta to; `None` for a full backup.
    pub since: Option<String>,
    /// And its id.
    pub base: Option<Uuid>,
    /// Bytes of the device.
    pub size: u64,
    /// Bytes of blocks with data.
    pub data_bytes: u64,
    /// Bytes of blocks that became zero.
    pub zero_bytes: u64,
}

/// A backup whose front was read.
struct Backup {
    file: String,
    size: Option<u64>,
    reader: Reader<BufReader<Interruptible<File>>>,
    header: Header,
    description: Description,
}

impl Backup {
    fn open(source: Source) -> Result<Self> {
        let Source { name, size, input } = source;
        let open = || {
            let reader = Reader::new(BufReader::with_capacity(BUFFER, Interruptible(input)))?;
            let description = Description::decode(reader.description())?;
            // What is not checked is shown to people alone.
            check_name("container", &description.container)?;
            check_name("snapshot", &description.snapshot.name)?;
            Ok((reader, description))
        };
        let (reader, description) = open().map_err(|error: Error| error.context(&name))?;
        Ok(Backup {
            file: name,
            size,
            header: reader.header().clone(),
            reader,
            description,
        })
    }

    /// Reads to the end, and hands each run of blocks on.
    fn read(
        &mut self,
        watch: &dyn BlocksWatch,
        mut each: impl FnMut(Run<BlockState>, &[u8]) -> Result<()>,
    ) -> Result<Totals> {
        if let Some(size) = self.size {
            watch.begin(size.div_ceil(BLOCK_SIZE));
        }
        let mut told = 0;
        let mut read = || {
            loop {
                interrupt::check()?;
                let Some(chunk) = self.reader.chunk().context(|| self.file.clone())? else {
                    return Ok(self.reader.totals());
                };
                for (run, bytes) in chunk.pieces() {
                    each(run, bytes)?;
                }
                let now = self.reader.position() / BLOCK_SIZE;
                watch.read(now - told);
                told = now;
            }
        };
        let done = read();
        watch.end();
        done
    }

    /// The state that it needs, as people find it.
    fn needs(&self, base: Uuid) -> String {
        let of = &self.description.container;
        match &self.description.since {
            Some(since) => format!("the state {base} (snapshot {since} of {of})"),
            None => format!("the state {base} of {of}"),
        }
    }
}

/// Reads backups to their ends, and makes nothing.
///
/// # Errors
/// As [`Reader::new`] and [`Reader::chunk`], of the first that is not whole.
pub fn verify(sources: Vec<Source>, watch: &dyn BlocksWatch) -> Result<Vec<BackupInfo>> {
    let mut found = Vec::new();
    for source in sources {
        let mut backup = Backup::open(source)?;
        let totals = backup.read(watch, |_, _| Ok(()))?;
        let Backup {
            file,
            header,
            description,
            ..
        } = backup;
        found.push(BackupInfo {
            file,
            backup: header.backup,
            container: description.container,
            container_id: header.container,
            snapshot: description.snapshot.name,
            state: header.state,
            created: description.snapshot.created,
            since: description.since,
            base: header.base,
            size: header.device_size,
            data_bytes: totals.data.bytes(),
            zero_bytes: totals.zero.bytes(),
        });
    }
    Ok(found)
}

/// Makes the container `name` of a full backup and the deltas after it, or puts deltas on one that is there.
/// Each is there whole or not at all; those whose state is there already are passed over. With `volumes` a new
/// container gets the volumes and directories of the host that its origin had.
///
/// # Errors
/// [`ErrorKind::NotFound`] for the base of a delta, by name; [`ErrorKind::AlreadyExists`] for a full backup where
/// the container is there; [`ErrorKind::InvalidInput`] where the container is not what a delta needs;
/// [`ErrorKind::InUse`] while it is mounted or served; [`ErrorKind::Corrupt`] for a backup that is damaged. What
/// was restored before stays.
pub fn restore(
    store: &Store,
    name: &str,
    sources: Vec<Source>,
    volumes: bool,
    watch: &dyn BlocksWatch,
) -> Result<RestoreReport> {
    check_name("container", name)?;
    store.check_space_for("container")?;
    let backups = sources.into_iter().map(Backup::open);
    let backups = backups.collect::<Result<Vec<Backup>>>()?;
    check_order(name, find(store, name)?.as_ref(), &backups)?;
    let mut report = RestoreReport {
        container: name.to_owned(),
        restored: Vec::new(),
        passed: Vec::new(),
        left_out: Vec::new(),
    };
    for backup in backups {
        let there = find(store, name)?;
        let has = there
            .as_ref()
            .and_then(|there| there.snapshot_by_id(backup.header.state));
        if let Some(has) = has {
            report.passed.push(Passed {
                file: backup.file,
                snapshot: has.name.clone(),
            });
            continue;
        }
        let step = match &there {
            None => create(store, name, backup, volumes, watch, &mut report),
            Some(there) => add(store, there, backup, watch, &mut report),
        };
        step.map_err(|error| match report.restored.last() {
            Some(last) => error.context(format!(
                "{name} was restored up to {name}@{}, where the same command goes on",
                last.snapshot
            )),
            None => error,
        })?;
        crash_point::here("restore: record in place");
    }
    Ok(report)
}

fn find(store: &Store, name: &str) -> Result<Option<ContainerRecord>> {
    match store.container(name) {
        Ok(there) => store.as_settled(there).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes sure that each backup finds what it needs, in a container that is there or in the backups before it.
fn check_order(name: &str, there: Option<&ContainerRecord>, backups: &[Backup]) -> Result<()> {
    let mut at = there.and_then(|there| there.at);
    let mut is_there = there.is_some();
    for backup in backups {
        if there.is_some_and(|there| there.snapshot_by_id(backup.header.state).is_some()) {
            continue;
        }
        check_base(name, there, is_there, at, backup)?;
        is_there = true;
        at = Some(backup.header.state);
    }
    Ok(())
}

fn check_base(
    name: &str,
    there: Option<&ContainerRecord>,
    is_there: bool,
    at: Option<Uuid>,
    backup: &Backup,
) -> Result<()> {
    let file = &backup.file;
    let Some(base) = backup.header.base else {
        if !is_there {
            return Ok(());
        }
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "{file} is a full backup ({}), of which a new container is made, and {name} is there by then: \
                 restore it under another name",
                backup.description.moment()
            ),
        ));
    };
    if at == Some(base) {
        return Ok(());
    }
    let needs = backup.needs(base);
    let kept = there.and_then(|there| there.snapshot_by_id(base));
    Err(match (kept, is_there) {
        (Some(kept), _) => Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{file} needs {needs}, and {name} does not go on from there: `vellum rollback {name} {}` makes \
                 it that again, and keeps what it is now",
                kept.name
            ),
        ),
        (None, true) => Error::new(
            ErrorKind::NotFound,
            format!(
                "{file} needs {needs}, which {name} does not have by then: a backup of that comes before it"
            ),
        ),
        (None, false) => Error::new(
            ErrorKind::NotFound,
            format!(
                "{file} is a delta: it needs {needs}, and there is no container {name}: name the full backup \
                 first, and every delta since"
            ),
        ),
    })
}

fn create(
    store: &Store,
    name: &str,
    backup: Backup,
    volumes: bool,
    watch: &dyn BlocksWatch,
    report: &mut RestoreReport,
) -> Result<()> {
    store.check_new_containers(&[name.to_owned()])?;
    let pin = store.pin_layers()?;
    let wanted = backup.description.run.volumes.clone();
    let restored = receive(store, backup, None, None, &pin, watch)?;
    let given = match volumes {
        true => wanted.clone(),
        false => Vec::new(),
    };
    let record = store.create_restored(name, restored, given, &pin)?;
    if !volumes {
        report.left_out = wanted;
    }
    note(report, &record);
    Ok(())
}

/// Puts a delta on a container that is what it needs.
fn add(
    store: &Store,
    container: &ContainerRecord,
    backup: Backup,
    watch: &dyn BlocksWatch,
    report: &mut RestoreReport,
) -> Result<()> {
    let name = &container.name;
    let (_, _busy) = lock_container(store, container)?;
    let pin = store.pin_layers()?;
    let container = store.settle(name)?;
    check_base(name, Some(&container), true, container.at, &backup)?;
    take_over(store, &container)?;
    if let Some(mounted) = mounted(store, &container)? {
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the container {name} is mounted at {}: unmount it first (`vellum umount {name}`)",
                mounted.dir.display()
            ),
        ));
    }
    refuse_served(store, &container)?;
    // Whoever comes to serve it finds the layer leased.
    let lease = store
        .lease_layer(container.top)
        .context(|| format!("the container {name}"))?;
    check_unwritten(store, &container)?;
    let below = container.layers.last().copied();
    let restored = receive(store, backup, below, container.at, &pin, watch)?;
    let record = store.add_restored(name, restored, &pin)?;
    drop((lease, pin));
    store.discard_layer(container.top)?;
    note(report, &record);
    Ok(())
}

fn note(report: &mut RestoreReport, record: &ContainerRecord) {
    report
        .restored
        .extend(record.snapshots.last().map(|last| RestoredState {
            snapshot: last.name.clone(),
            state: last.id,
            bytes: last.bytes,
        }));
}

/// Makes sure that nothing was written since the snapshot that a container goes on from.
fn check_unwritten(store: &Store, container: &ContainerRecord) -> Result<()> {
    let mut written = !container.layers_since_snapshot()?.is_empty();
    let dir = store.layer_dir(container.top);
    let top = SealedLayer::open_unsealed(&**store.storage(), &dir)?;
    top.for_each_run(|_| written = true)?;
    if !written {
        return Ok(());
    }
    let name = &container.name;
    let at = container.at.and_then(|at| container.snapshot_by_id(at));
    let at = at.map_or("SNAPSHOT", |at| &at.name);
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "the container {name} was written since {name}@{at}, which the backup is a delta to: `vellum \
             rollback {name} {at}` makes it that again, and keeps what it is now"
        ),
    ))
}

/// Makes a layer of a backup, on `below`, and an empty one above it. No record names them yet.
fn receive(
    store: &Store,
    mut backup: Backup,
    below: Option<Uuid>,
    parent: Option<Uuid>,
    pin: &StoreGuard,
    watch: &dyn BlocksWatch,
) -> Result<Restored> {
    let virtual_size = backup.header.virtual_size;
    let staged = store.stage_layer(below, virtual_size)?;
    let layer = open_staged(store, &staged)?;
    backup.read(watch, |run, bytes| {
        write_run(&layer, run, bytes)?;
        crash_point::here("restore: piece written");
        Ok(())
    })?;
    let info = LayerInfo {
        origin: format!("vellum restore {}", backup.description.moment()),
        ..LayerInfo::default()
    };
    let bytes = layer.data_blocks().bytes();
    let layer = finish_layer(staged, layer, info, pin)?;
    crash_point::here("restore: layer published");
    let top = store
        .stage_layer(Some(layer), virtual_size)?
        .publish(&LayerInfo::writable(), pin)?;
    let Backup {
        header,
        description,
        ..
    } = backup;
    let run_as = description.run_as();
    let moment = description.snapshot;
    Ok(Restored {
        snapshot: ContainerSnapshot {
            name: moment.name,
            id: header.state,
            parent,
            layers: vec![layer],
            disk: DiskInfo {
                virtual_size,
                device_size: Some(header.device_size).filter(|shown| *shown < virtual_size),
                fs: moment.fs,
                holds: moment.holds,
            },
            consistency: moment.consistency,
            bytes,
            scaffold: moment.scaffold,
            created: moment.created,
            comment: moment.comment,
        },
        top,
        run_as,
    })
}
