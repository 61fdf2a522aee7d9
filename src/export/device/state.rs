//! The run directory of a device: file names, and the state that the supervisor writes.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::control::Failure;
use super::detach::is_served;
use super::process::{Identity, boot_id};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::export::fuse::session::Features;
use crate::export::loop_device::LoopDevice;
use crate::fs::held_dir::{HeldDir, Place};

/// The file that the FUSE session is mounted on.
pub const DEV: &str = "dev";
/// The state, as JSON.
pub const STATE: &str = "state.json";
/// How the name ends of a [`STATE`] that is being written.
const UNFINISHED: &str = ".tmp";
/// The control socket.
pub const CONTROL: &str = "control.sock";
/// What the processes had to say.
pub const LOG: &str = "log";
/// The loop device that `attach` made: a hint, the truth is in sysfs.
pub const LOOP: &str = "loop";

const VERSION: u32 = 1;

/// How a device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The first worker is opening it.
    Starting,
    /// A worker serves it.
    Serving,
    /// A worker died and the next is on its way.
    Restarting,
    /// Workers died again and again; the session was given up.
    Failed,
    /// It was ended in order.
    Ended,
}

/// What `state.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunState {
    /// Version of this structure.
    pub version: u32,
    /// The boot that it is about.
    pub boot_id: String,
    /// The run directory that it is about: in a copy of that one it says nothing.
    #[serde(default)]
    pub place: Option<Place>,
    /// How the device is doing.
    pub status: Status,
    /// Why it failed, or why the last worker could not open the device.
    pub error: Option<String>,
    /// The process that owns the session.
    pub supervisor: Identity,
    /// The process that serves.
    pub worker: Option<Identity>,
    /// The process that waits.
    pub standby: Option<Identity>,
    /// What kernel and server agreed on.
    pub features: Option<Features>,
    /// Writes are refused.
    pub read_only: bool,
    /// Programs that took the session over by upgrades.
    pub generation: u32,
    /// Workers that replaced another, upgrades among them.
    #[serde(default)]
    pub restarts: u64,
    /// Deaths of workers in a row that count towards giving the device up.
    #[serde(default)]
    pub deaths: u32,
    /// Microseconds from the last worker's death to the service of the next one.
    #[serde(default)]
    pub last_pause_us: u64,
    /// The longest of all such times, in microseconds.
    #[serde(default)]
    pub longest_pause_us: u64,
    /// Upgrades that failed while the old program went on.
    #[serde(default)]
    pub failed_upgrades: u32,
    /// Why the last of them did.
    #[serde(default)]
    pub upgrade_error: Option<Failure>,
}

impl RunState {
    /// A state of this boot, with the calling process as supervisor.
    pub fn new(read_only: bool, run_dir: &HeldDir) -> Self {
        RunState {
            version: VERSION,
            boot_id: boot_id(),
            place: run_dir.place().ok(),
            status: Status::Starting,
            error: None,
            supervisor: Identity::current(),
            worker: None,
            standby: None,
            features: None,
            read_only,
            generation: 0,
            restarts: 0,
            deaths: 0,
            last_pause_us: 0,
            longest_pause_us: 0,
            failed_upgrades: 0,
            upgrade_error: None,
        }
    }

    /// Replaces the state in `run_dir`. It need not survive a power cut, which ends all that it
    /// is about.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] or [`ErrorKind::Io`].
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        // Of this process alone: while a supervisor is replaced there may be two that write.
        let tmp = run_dir.join(format!("{STATE}.{}{UNFINISHED}", std::process::id()));
        let bytes = serde_json::to_vec_pretty(self).map_err(|error| {
            Error::with_source(ErrorKind::Io, "the state cannot be encoded", error)
        })?;
        fs::write(&tmp, bytes).context(|| tmp.display().to_string())?;
        fs::rename(&tmp, run_dir.join(STATE)).context(|| tmp.display().to_string())
    }

    /// Reads the state of `run_dir`; `None` when there is none, when it is cut, or when it is
    /// about another boot, or another directory, of which this is a copy.
    ///
    /// # Errors
    /// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
    pub fn read(run_dir: &Path) -> Result<Option<RunState>> {
        let path = run_dir.join(STATE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display().to_string(), error)),
        };
        let state = serde_json::from_slice::<RunState>(&bytes).ok();
        let Some(state) = state.filter(|s| s.version == VERSION && s.boot_id == boot_id()) else {
            return Ok(None);
        };
        // One of an earlier program says nothing of its place.
        if let Some(place) = state.place {
            let here = Place::of(run_dir).context(|| run_dir.display().to_string())?;
            return Ok((here == place).then_some(state));
        }
        Ok(Some(state))
    }

    /// True while a supervisor, or a worker without one, holds the session.
    pub fn is_alive(&self) -> bool {
        self.supervisor.is_alive()
            || self.worker.is_some_and(Identity::is_alive)
            || self.standby.is_some_and(Identity::is_alive)
    }
}

/// A device as other commands see it.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceStatus {
    /// What the supervisor wrote last.
    pub state: RunState,
    /// True while any of its processes runs.
    pub alive: bool,
    /// False when supervisor and standby are dead, so that the worker's death would end the
    /// device.
    pub supervised: bool,
    /// The loop device on it.
    pub loop_device: Option<PathBuf>,
}

/// The device of `run_dir`, or `None` when nothing of this boot is there.
///
/// # Errors
/// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
pub fn status(run_dir: &Path) -> Result<Option<DeviceStatus>> {
    let Some(state) = RunState::read(run_dir)? else {
        return Ok(None);
    };
    let device = hinted_loop(run_dir).map(LoopDevice::path);
    Ok(Some(DeviceStatus {
        alive: is_served(run_dir, Some(&state))?,
        supervised: state.supervisor.is_alive() || state.standby.is_some_and(Identity::is_alive),
        loop_device: device,
        state,
    }))
}

/// Files that processes which were killed while they wrote the state left in `run_dir`.
///
/// # Errors
/// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
pub(super) fn unfinished(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let what = || run_dir.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(STATE) && name.ends_with(UNFINISHED)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The tag that a loop device of `run_dir` carries, also after its file was unmounted. It stays that
/// of the directory when that is moved, and is not that of a copy.
pub fn loop_tag(run_dir: &Path) -> String {
    use sha2::Digest;
    use std::os::unix::ffi::OsStrExt;
    let digest = match Place::of(run_dir) {
        Ok(place) => sha2::Sha256::digest(format!("{}:{}", place.dev, place.ino)),
        // Nothing can be looked at there: its devices are found by their backing file alone.
        Err(_) => sha2::Sha256::digest(run_dir.as_os_str().as_bytes()),
    };
    let hex: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("vellum:{hex}")
}

/// The loop device that the hint names, if it is still the device's.
pub fn hinted_loop(run_dir: &Path) -> Option<LoopDevice> {
    let text = fs::read_to_string(run_dir.join(LOOP)).ok()?;
    let device = LoopDevice::from_path(Path::new(text.trim()))?;
    device
        .serves(&run_dir.join(DEV), &loop_tag(run_dir))
        .then_some(device)
}

/// The lock on a run directory, so that commands attach and detach one after the other.
pub struct RunLock(#[allow(dead_code, reason = "held for its Drop")] Flock<fs::File>);

impl RunLock {
    /// Locks `run_dir`, which must exist; `None` when it was removed meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
    pub fn take(run_dir: &Path) -> Result<Option<RunLock>> {
        use std::os::unix::fs::MetadataExt;
        loop {
            let dir = match fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(run_dir)
            {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io(run_dir.display().to_string(), error)),
            };
            let lock = Flock::lock(dir, FlockArg::LockExclusive)
                .map_err(|(_, errno)| io::Error::from(errno))
                .context(|| format!("{}: cannot be locked", run_dir.display()))?;
            // The holder before us may have removed it, and another may have made it anew.
            let locked = lock.metadata().context(|| run_dir.display().to_string())?;
            match fs::symlink_metadata(run_dir) {
                Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => {
                    return Ok(Some(RunLock(lock)));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What another process has written half of is neither taken for the state nor destroyed.
    #[test]
    fn a_state_that_another_process_is_writing_is_left_to_it_and_found_when_it_died() {
        let dir = tempfile::tempdir().unwrap();
        let half = dir.path().join(format!("{STATE}.1{UNFINISHED}"));
        fs::write(&half, b"{\"version\"").unwrap();
        let held = HeldDir::open(dir.path()).unwrap();
        RunState::new(false, &held).write(dir.path()).unwrap();
        assert!(RunState::read(dir.path()).unwrap().is_some());
        assert_eq!(fs::read(&half).unwrap(), b"{\"version\"");
        assert_eq!(unfinished(dir.path()).unwrap(), [half]);
    }

    /// A backup program copies what it finds, also of what runs.
    #[test]
    fn the_state_of_a_directory_says_nothing_in_a_copy_and_still_holds_after_a_move() {
        let dir = tempfile::tempdir().unwrap();
        let (first, copy) = (dir.path().join("first"), dir.path().join("copy"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&copy).unwrap();
        let held = HeldDir::open(&first).unwrap();
        RunState::new(false, &held).write(&held.path()).unwrap();
        fs::copy(first.join(STATE), copy.join(STATE)).unwrap();
        assert!(RunState::read(&first).unwrap().is_some());
        assert!(RunState::read(&copy).unwrap().is_none());
        let (tag, moved) = (loop_tag(&first), dir.path().join("moved"));
        fs::rename(&first, &moved).unwrap();
        assert!(RunState::read(&moved).unwrap().is_some());
        assert_eq!(loop_tag(&moved), tag);
        fs::rename(&copy, &first).unwrap();
        assert!(RunState::read(&first).unwrap().is_none());
        assert_ne!(loop_tag(&first), tag);
    }
}
