//! How containers are doing: sizes, mounts, servers.

use serde::Serialize;

use super::device::DeviceStats;
use super::known::Known;
use super::mount_point::{Mounted, mounted};
use super::run::{Activity, activity};
use super::serving::{Serving, serving};
use super::stats::{Space, device_stats, space};
use vellum_base::block::{BLOCK_SIZE, Blocks};
use vellum_base::error::Result;
use vellum_base::moment::rfc3339;
use vellum_core::layer::data_blocks_on_disk;
use vellum_export::device::{self, DeviceStatus, Identity, Status};
use vellum_fs::ext4;
use vellum_fs::mountinfo::MountInfo;
use vellum_store::{ContainerRecord, LastRun, SnapshotKind, SnapshotRecord, Store};

/// A container and its present state.
#[derive(Debug, Clone, Serialize)]
pub struct ContainerStatus {
    /// The record.
    #[serde(flatten)]
    pub record: ContainerRecord,
    /// One word or a short phrase: `created`, `exited (N)`, `running (pid …)`, `mounted at …`, `served over nbd by
    /// …`, `failed: …`.
    pub status: String,
    /// The first process of what runs in it.
    pub pid: Option<i32>,
    /// Where it is mounted.
    pub mounted: Option<Mounted>,
    /// Its device server.
    pub device: Option<DeviceStatus>,
    /// Another process that has it: an NBD server, or a command that works on it.
    pub serving: Option<Serving>,
    /// Space on the store's disk; `None` where nobody serves it.
    pub space: Option<Space>,
    /// Bytes of data in its writable layer; `None` where they cannot be read.
    pub size: Option<u64>,
    /// Bytes of that and of its image's layers.
    pub total_size: Option<u64>,
}

/// The state of one container; `with_size` also counts its blocks.
///
/// # Errors
/// Where the host's mounts cannot be read.
pub fn status(
    known: &Known<'_>,
    record: ContainerRecord,
    with_size: bool,
) -> Result<ContainerStatus> {
    let store = known.store();
    let device = device::status(&store.run_dir(&record))?;
    let mounted = mounted(store, &record)?;
    let activity = activity(store, &record)?;
    let serving = match device {
        // A record whose layer is gone has nobody.
        None => serving(store, &record).unwrap_or_default(),
        Some(_) => None,
    };
    let space = match (&device, &serving) {
        (Some(device), _) if answers(device) => space(store, record.id),
        (None, Some(_)) => space(store, record.id),
        _ => None,
    };
    let full = space.as_ref().and_then(|space| space.full_since.as_deref());
    let status = match (&serving, full) {
        (Some(serving), Some(since)) => {
            format!("host full since {since} ({})", serving.describe())
        }
        (Some(serving), None) => serving.describe(),
        (None, _) => describe(
            Some(&record.name),
            activity,
            device.as_ref(),
            mounted.as_ref(),
            space.as_ref(),
        )
        .unwrap_or_else(|| at_rest(record.last_run.as_ref())),
    };
    let status = match known.waiting_for(&record.layers) {
        Some(waiting) => format!("{status}, {waiting}"),
        None => status,
    };
    let pid = match activity {
        Activity::Running { pid, .. } => Some(pid),
        _ => None,
    };
    let (size, total_size) = if with_size {
        sizes(known, &record)
    } else {
        (None, None)
    };
    Ok(ContainerStatus {
        record,
        status,
        pid,
        mounted,
        device,
        serving,
        space,
        size,
        total_size,
    })
}

/// In words, where there is something to say; `name` of a container that is ours to unmount, `None` for what the snapshotter mounts.
fn describe(
    name: Option<&str>,
    activity: Activity,
    device: Option<&DeviceStatus>,
    mounted: Option<&Mounted>,
    space: Option<&Space>,
) -> Option<String> {
    let place = match activity {
        Activity::Running { pid, waited: true } => Some(format!("running (pid {pid})")),
        Activity::Running { pid, waited: false } => {
            Some(format!("running (pid {pid}), nobody waits for it"))
        }
        Activity::Busy => Some("starting or stopping".into()),
        Activity::Leftover => Some("left by a killed command: `vellum umount` cleans up".into()),
        Activity::Idle => mounted.map(|mounted| format!("mounted at {}", mounted.dir.display())),
    };
    let Some(device) = device else {
        return place;
    };
    let trouble = match device.state.status {
        Status::Failed => {
            let why = device.state.error.as_deref().unwrap_or("its server died");
            Some(match name {
                Some(name) => format!("failed: {why}: `vellum umount {name}`, then mount it again"),
                None => format!("failed: {why}"),
            })
        }
        _ if device.abandoned => Some(match name {
            Some(name) => format!(
                "failed: its server is dead, and who uses it waits: `vellum umount --force {name}`"
            ),
            None => "failed: its server is dead, and who uses it waits".into(),
        }),
        _ if !device.alive => Some(match name {
            Some(name) => format!("failed: its server is dead: `vellum umount {name}` cleans up"),
            None => "failed: its server is dead".into(),
        }),
        _ if device.halted => {
            let pids = pids(&device.stopped);
            let cure = name.map_or(String::new(), |name| {
                format!(", or `vellum umount --force {name}`")
            });
            Some(format!(
                "halted: its server is stopped (by a signal or a debugger): `kill -CONT {pids}`{cure}"
            ))
        }
        _ if !device.stopped.is_empty() => Some(format!(
            "process {} of its server is stopped (by a signal or a debugger) and is being replaced",
            pids(&device.stopped)
        )),
        Status::Restarting if device.state.hang.is_some() => {
            let hang = device.state.hang.as_deref().unwrap_or_default();
            Some(format!("restarting: {hang} and is replaced"))
        }
        Status::Restarting if device.state.deaths > 1 => {
            let deaths = device.state.deaths;
            let why = device.state.error.as_deref();
            let why = why.map_or(String::new(), |why| format!(": {why}"));
            Some(format!("restarting, {deaths} failures in a row{why}"))
        }
        Status::Restarting => Some("restarting".into()),
        _ if !device.supervised => {
            Some("served without a supervisor: `vellum check --repair` starts one".into())
        }
        _ => space_trouble(name, mounted, space),
    };
    Some(match (trouble, place) {
        (Some(trouble), Some(place)) => format!("{trouble} ({place})"),
        (Some(trouble), None) => trouble,
        (None, Some(place)) => place,
        (None, None) => "attached".into(),
    })
}

/// Of a container that nobody has.
fn at_rest(last_run: Option<&LastRun>) -> String {
    match last_run {
        None => "created".into(),
        Some(LastRun {
            ended: Some(end), ..
        }) => format!("exited ({})", end.status),
        Some(LastRun { ended: None, .. }) => "exited (unknown)".into(),
    }
}

/// True where a server can be asked: one that is being replaced would answer when the next one is there.
fn answers(device: &DeviceStatus) -> bool {
    let works = device.state.worker.is_some_and(Identity::is_alive);
    works && device.stopped.is_empty() && device.state.status == Status::Serving
}

/// What a full disk of the host has done to a container, in words.
fn space_trouble(
    name: Option<&str>,
    mounted: Option<&Mounted>,
    space: Option<&Space>,
) -> Option<String> {
    let full = space.and_then(|space| space.full_since.as_deref());
    let given_up = mounted.is_some_and(|mounted| mounted.given_up);
    let cure = match name {
        Some(name) => format!("`vellum mount {name}` mounts it anew"),
        None => "containerd's next start of it mounts it anew".into(),
    };
    match (given_up, full) {
        (true, Some(since)) => Some(format!("read-only: host full since {since}: {cure}")),
        (true, None) => Some(format!("read-only: its file system met an error: {cure}")),
        (false, Some(since)) => Some(format!("host full since {since}")),
        (false, None) => None,
    }
}

fn pids(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    pids.join(" ")
}

/// (bytes in the writable layer, bytes in all layers).
fn sizes(known: &Known<'_>, record: &ContainerRecord) -> (Option<u64>, Option<u64>) {
    let store = known.store();
    let size = match stats(store, record) {
        Ok(stats) => Some(stats.top_blocks.saturating_mul(BLOCK_SIZE)),
        // Nobody serves it: the map on disk is all there is.
        Err(_) => store.resolve(record).ok().and_then(|resolved| {
            let dir = store.layer_dir(resolved.top);
            data_blocks_on_disk(&**store.storage(), &dir)
                .ok()
                .map(Blocks::bytes)
        }),
    };
    let below = known.bytes_of(&record.layers);
    (size, size.map(|size| size + below))
}

/// The counters of a container's device server.
///
/// # Errors
/// [`vellum_base::ErrorKind::NotFound`] while it is not mounted.
pub fn stats(store: &Store, record: &ContainerRecord) -> Result<DeviceStats> {
    device_stats(&store.run_dir(record))
}

/// A snapshot of containerd's and its present state.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotStatus {
    /// containerd's key.
    pub name: String,
    /// What it was made from: another snapshot's key; empty for one that began empty.
    pub image: String,
    /// When it got its kind.
    pub created: String,
    /// As in [`ContainerStatus`]; `committed` for one that is not mounted itself.
    pub status: String,
    /// Where it is mounted.
    pub mounted: Option<Mounted>,
    /// Its device server.
    pub device: Option<DeviceStatus>,
    /// Space on the store's disk; `None` where nobody serves it.
    pub space: Option<Space>,
    /// Bytes of data in its own layers; `None` where they cannot be read, or nobody asked.
    pub size: Option<u64>,
    /// Bytes of that and of all that it was made from.
    pub total_size: Option<u64>,
    /// Layers in its chain.
    pub depth: usize,
    /// Size of its device in bytes.
    pub virtual_size: u64,
    /// View, active or committed.
    pub kind: SnapshotKind,
}

/// The state of a snapshot; `with_size` also counts blocks.
///
/// # Errors
/// Where the host's mounts cannot be read.
pub fn snapshot_status(
    known: &Known<'_>,
    record: &SnapshotRecord,
    with_size: bool,
) -> Result<SnapshotStatus> {
    let store = known.store();
    let device = device::status(&store.runs().dir(record.id))?;
    let dir = store.snapshot_mount_dir(record.id);
    let mounted = MountInfo::at(&dir)?.map(|mount| Mounted {
        given_up: ext4::has_given_up(&mount),
        dir: mount.target,
        device: mount.source,
    });
    let space = match record.kind {
        SnapshotKind::Active if device.as_ref().is_some_and(answers) => space(store, record.id),
        _ => None,
    };
    let status = match record.kind {
        SnapshotKind::Committed => "committed".to_owned(),
        _ => describe(
            None,
            Activity::Idle,
            device.as_ref(),
            mounted.as_ref(),
            space.as_ref(),
        )
        .unwrap_or_else(|| "created".into()),
    };
    let waiting = match record.kind {
        SnapshotKind::Committed => None,
        SnapshotKind::Active | SnapshotKind::View => {
            // Of a chain that cannot be opened others say why.
            let layers = store.ancestry(Some(record.base)).ok();
            layers.and_then(|layers| known.waiting_for(&layers))
        }
    };
    let status = match waiting {
        Some(waiting) => format!("{status}, {waiting}"),
        None => status,
    };
    let size = with_size.then(|| snapshot_size(store, record)).flatten();
    Ok(SnapshotStatus {
        name: record.key.clone(),
        image: record.parent.clone().unwrap_or_default(),
        created: rfc3339(record.created),
        status,
        mounted,
        device,
        space,
        size,
        total_size: size.map(|size| size + known.total(record.parent.as_deref())),
        depth: known.depth(record.top()),
        virtual_size: record.virtual_size,
        kind: record.kind,
    })
}

/// Bytes of data in a snapshot's own layers.
fn snapshot_size(store: &Store, record: &SnapshotRecord) -> Option<u64> {
    if record.kind != SnapshotKind::Active {
        return Some(record.bytes);
    }
    if let Ok(stats) = snapshot_stats(store, record)
        && record.layers.len() == 1
    {
        return Some(stats.top_blocks.saturating_mul(BLOCK_SIZE));
    }
    let mut blocks = Blocks::NONE;
    for layer in &record.layers {
        blocks += data_blocks_on_disk(&**store.storage(), &store.layer_dir(*layer)).ok()?;
    }
    Some(blocks.bytes())
}

/// The counters of a snapshot's device server.
///
/// # Errors
/// [`vellum_base::ErrorKind::NotFound`] while it is not attached.
pub fn snapshot_stats(store: &Store, record: &SnapshotRecord) -> Result<DeviceStats> {
    device_stats(&store.runs().dir(record.id))
}
