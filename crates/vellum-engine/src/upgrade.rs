//! Running device servers taken over by this program, with their file systems mounted.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::lock_container;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_export::device::{self, DeviceStatus};
use vellum_fs::run_dir::RunDir;
use vellum_store::Store;

/// How long one device may take: its worker answers what is in flight, the new one opens the chain.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A device after [`upgrade_server`].
#[derive(Debug, Clone, Serialize)]
pub struct Upgraded {
    /// The container's name, a snapshot's key, or the name of a run directory.
    pub name: String,
    /// False when its server ran this very program already.
    pub upgraded: bool,
    /// The process that serves.
    pub pid: i32,
    /// The version of its program.
    pub version: String,
    /// Microseconds for which requests waited; `None` where nothing was upgraded.
    pub pause_us: Option<u64>,
}

/// A device that has a server.
#[derive(Debug, Clone)]
pub struct Served {
    /// As in [`Upgraded`].
    pub name: String,
    run_dir: RunDir,
    container: bool,
    /// Nobody asked for it by name: it may end meanwhile.
    listed: bool,
}

/// The file of the program that runs now.
///
/// # Errors
/// [`ErrorKind::NotFound`] when another file is there by now, or none.
pub fn own_program() -> Result<PathBuf> {
    let path = std::env::current_exe().context(|| "the path of this program")?;
    let running = file_id(Path::new("/proc/self/exe"));
    if running.is_none() || file_id(&path) != running {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{}: the file of this program was replaced while it ran: run the new one",
                path.display()
            ),
        ));
    }
    Ok(path)
}

/// The devices with a server: those of the named containers, or all of the store, those of
/// snapshots and of commands at work among them.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a container that is not there, or that nothing serves.
pub fn served(store: &Store, containers: &[String]) -> Result<Vec<Served>> {
    if containers.is_empty() {
        return all_served(store);
    }
    let one = |name: &String| {
        let run_dir = store.run_dir(&store.container(name)?);
        match device::status(&run_dir)? {
            Some(status) if status.alive => Ok(Served {
                name: name.clone(),
                run_dir,
                container: true,
                listed: false,
            }),
            Some(_) => Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "the server of {name} is dead: `vellum umount {name}` cleans up, then mount it \
                     again"
                ),
            )),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("the container {name} is not mounted: nothing serves it"),
            )),
        }
    };
    containers.iter().map(one).collect()
}

fn all_served(store: &Store) -> Result<Vec<Served>> {
    let containers = store.containers()?.into_iter();
    let containers: HashMap<Uuid, String> =
        containers.map(|record| (record.id, record.name)).collect();
    let snapshots = store.snapshots(|error| tracing::warn!("{error}"))?;
    let snapshots: HashMap<Uuid, String> = snapshots
        .into_iter()
        .map(|record| (record.id, record.key))
        .collect();
    let runs = store.runs();
    let mut found = Vec::new();
    for run_dir in runs.dirs().context(|| runs.to_string())? {
        let Some(id) = run_dir.id() else { continue };
        if !device::status(&run_dir)?.is_some_and(|status| status.alive) {
            continue;
        }
        let container = containers.get(&id);
        found.push(Served {
            container: container.is_some(),
            name: match container.or(snapshots.get(&id)) {
                Some(name) => name.clone(),
                None => run_dir.name().display().to_string(),
            },
            run_dir,
            listed: true,
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Lets `program` serve a device from now on, with the file system mounted and in use: requests
/// wait for the new server. A server that runs that program already is left alone; one whose
/// supervisor is dead gets another. `None` for a device that ended meanwhile.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the program cannot take over, and the old one goes on then;
/// [`ErrorKind::Timeout`].
pub fn upgrade_server(store: &Store, served: &Served, program: &Path) -> Result<Option<Upgraded>> {
    let result = try_upgrade(store, served, program);
    let ended = || {
        let status = device::status(&served.run_dir);
        status.is_ok_and(|status| !status.is_some_and(|status| status.alive))
    };
    match result {
        Err(_) if served.listed && ended() => Ok(None),
        Err(error) => Err(error.context(format!("cannot upgrade the server of {}", served.name))),
        Ok(upgraded) => Ok(Some(upgraded)),
    }
}

fn try_upgrade(store: &Store, served: &Served, program: &Path) -> Result<Upgraded> {
    // A commit or unmount that is at work comes first.
    let _busy = match served.container {
        true => Some(lock_container(store, &store.container(&served.name)?)?.1),
        false => None,
    };
    let run_dir = &served.run_dir;
    device::ensure_supervised(run_dir, TIMEOUT)?;
    if let Some(status) = device::status(run_dir)?
        && let Some(pid) = runs(&status, program)
    {
        return Ok(Upgraded {
            name: served.name.clone(),
            upgraded: false,
            pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pause_us: None,
        });
    }
    let answer = device::upgrade(run_dir, program, TIMEOUT)?;
    let number = |key: &str| answer.get(key).and_then(serde_json::Value::as_u64);
    let version = answer.get("version").and_then(serde_json::Value::as_str);
    let pid = number("pid").and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.ok_or_else(|| {
        Error::new(
            ErrorKind::Protocol,
            "the program took over and does not say as which process: look at `vellum ps`",
        )
    })?;
    Ok(Upgraded {
        name: served.name.clone(),
        upgraded: true,
        pid,
        version: version.unwrap_or("unknown").to_owned(),
        pause_us: number("last_pause_us"),
    })
}

/// True where this very program serves a device and watches over it.
pub(super) fn runs_this_program(status: &DeviceStatus) -> bool {
    own_program().is_ok_and(|program| runs(status, &program).is_some())
}

/// The worker's pid where it and its supervisor run this file.
fn runs(status: &DeviceStatus, program: &Path) -> Option<i32> {
    let wanted = file_id(program)?;
    let worker = status.state.worker?;
    [worker, status.state.supervisor]
        .iter()
        .all(|process| {
            let exe = PathBuf::from(format!("/proc/{}/exe", process.pid));
            process.is_alive() && file_id(&exe) == Some(wanted)
        })
        .then_some(worker.pid)
}

/// Device and inode: of the very file also where another has its path by now.
fn file_id(path: &Path) -> Option<(u64, u64)> {
    let file = fs::metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}
