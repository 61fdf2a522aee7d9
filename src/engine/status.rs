//! How containers are doing: sizes, mounts, servers.

use std::time::Duration;

use serde::Serialize;

use super::device::{DeviceStats, STATS};
use super::mount::{Mounted, mounted};
use super::run::{Activity, activity};
use crate::block::BLOCK_SIZE;
use crate::error::{Error, ErrorKind, Result};
use crate::export::device::{self, DeviceStatus, Status, control};
use crate::layer::data_blocks_on_disk;
use crate::store::{ContainerRecord, Store};

/// How long a device server may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// A container and its present state.
#[derive(Debug, Clone, Serialize)]
pub struct ContainerStatus {
    /// The record.
    #[serde(flatten)]
    pub record: ContainerRecord,
    /// One word or a short phrase: `created`, `running (pid …)`, `mounted at …`, `failed: …`.
    pub status: String,
    /// The first process of what runs in it.
    pub pid: Option<i32>,
    /// Where it is mounted.
    pub mounted: Option<Mounted>,
    /// Its device server.
    pub device: Option<DeviceStatus>,
    /// Bytes of data in its writable layer; `None` where they cannot be read.
    pub size: Option<u64>,
    /// Bytes of that and of its image's layers.
    pub total_size: Option<u64>,
}

/// The state of one container; `with_size` also counts its blocks.
///
/// # Errors
/// Where the host's mounts cannot be read.
pub fn status(store: &Store, record: ContainerRecord, with_size: bool) -> Result<ContainerStatus> {
    let device = device::status(&store.run_dir(&record))?;
    let mounted = mounted(store, &record)?;
    let activity = activity(store, &record)?;
    let status = describe(&record.name, activity, device.as_ref(), mounted.as_ref());
    let pid = match activity {
        Activity::Running { pid, .. } => Some(pid),
        _ => None,
    };
    let (size, total_size) = if with_size {
        sizes(store, &record)
    } else {
        (None, None)
    };
    Ok(ContainerStatus {
        record,
        status,
        pid,
        mounted,
        device,
        size,
        total_size,
    })
}

fn describe(
    name: &str,
    activity: Activity,
    device: Option<&DeviceStatus>,
    mounted: Option<&Mounted>,
) -> String {
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
        return place.unwrap_or_else(|| "created".into());
    };
    let trouble = match device.state.status {
        Status::Failed => {
            let why = device.state.error.as_deref().unwrap_or("its server died");
            Some(format!(
                "failed: {why}: `vellum umount {name}`, then mount it again"
            ))
        }
        _ if !device.alive => Some(format!(
            "failed: its server is dead: `vellum umount {name}` cleans up"
        )),
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
        _ => None,
    };
    match (trouble, place) {
        (Some(trouble), Some(place)) => format!("{trouble} ({place})"),
        (Some(trouble), None) => trouble,
        (None, Some(place)) => place,
        (None, None) => "attached".into(),
    }
}

/// (bytes in the writable layer, bytes in all layers).
fn sizes(store: &Store, record: &ContainerRecord) -> (Option<u64>, Option<u64>) {
    let size = match stats(store, record) {
        Ok(stats) => Some(stats.top_blocks * BLOCK_SIZE),
        // Nobody serves it: the map on disk is all there is.
        Err(_) => store.resolve(record).ok().and_then(|resolved| {
            let dir = store.layer_dir(resolved.top);
            data_blocks_on_disk(&**store.storage(), &dir)
                .ok()
                .map(|blocks| blocks * BLOCK_SIZE)
        }),
    };
    let below: u64 = record
        .layers
        .iter()
        .map(|layer| store.layer_info(*layer).map_or(0, |info| info.bytes))
        .sum();
    (size, size.map(|size| size + below))
}

/// The counters of a container's device server.
///
/// # Errors
/// [`ErrorKind::NotFound`] while it is not mounted.
pub fn stats(store: &Store, record: &ContainerRecord) -> Result<DeviceStats> {
    let run_dir = store.run_dir(record);
    let answer = control::call(&run_dir, STATS, serde_json::Value::Null, ASK_TIMEOUT)?;
    serde_json::from_value(answer).map_err(|error| {
        Error::with_source(
            ErrorKind::Protocol,
            "the device server's counters make no sense",
            error,
        )
    })
}
