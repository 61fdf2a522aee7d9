//! How a device is doing: the state that its supervisor writes into its run directory, the loop device
//! on it, and whether anything of it lives.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::command_line::{argument, command_line};
use super::failure::Failure;
use super::process::{Identity, Seen, boot_id, namespaces};
use crate::fuse::session::Features;
use crate::local_disk::LocalDisk;
use crate::loop_device::LoopDevice;
use crate::ublk::disk::{Mark, UblkDisk};
use crate::unix_socket;
use vellum_base::error::{Error, Result, ResultExt};
use vellum_fs::held_dir::Place;
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{HeldRunDir, RunDir};

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
    /// The namespaces that its pids and start times are of.
    #[serde(default)]
    pub namespaces: String,
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
    /// Workers that were found to hang, and killed.
    #[serde(default)]
    pub hangs: u64,
    /// How the last of them hung.
    #[serde(default)]
    pub hang: Option<String>,
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
    ///
    /// # Errors
    /// Where the boot has no id.
    pub fn new(read_only: bool, run_dir: &HeldRunDir) -> Result<Self> {
        Ok(RunState {
            version: VERSION,
            boot_id: boot_id()?,
            place: run_dir.place().ok(),
            namespaces: namespaces(),
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
            hangs: 0,
            hang: None,
            last_pause_us: 0,
            longest_pause_us: 0,
            failed_upgrades: 0,
            upgrade_error: None,
        })
    }

    /// Replaces the state in `run_dir`. It need not survive a power cut, which ends all that it
    /// is about.
    ///
    /// # Errors
    /// [`NoSpace`](vellum_base::ErrorKind::NoSpace) or [`Io`](vellum_base::ErrorKind::Io).
    pub fn write(&self, run_dir: &RunDir) -> Result<()> {
        let tmp = run_dir.unfinished_state();
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal(format!("the state cannot be encoded: {error}")))?;
        fs::write(&tmp, bytes).context(|| tmp.display().to_string())?;
        fs::rename(&tmp, run_dir.state()).context(|| tmp.display().to_string())
    }

    /// Reads the state of `run_dir`; `None` when there is none, when it is cut, or when it is
    /// about another boot, or another directory, of which this is a copy.
    ///
    /// # Errors
    /// [`Permission`](vellum_base::ErrorKind::Permission) or [`Io`](vellum_base::ErrorKind::Io).
    pub fn read(run_dir: &RunDir) -> Result<Option<RunState>> {
        let path = run_dir.state();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display().to_string(), error)),
        };
        let boot = boot_id()?;
        let state = serde_json::from_slice::<RunState>(&bytes).ok();
        let Some(state) = state.filter(|s| s.version == VERSION && s.boot_id == boot) else {
            return Ok(None);
        };
        // One of an earlier program says nothing of its place.
        if let Some(place) = state.place {
            let here = run_dir.place().context(|| run_dir.to_string())?;
            return Ok((here == place).then_some(state));
        }
        Ok(Some(state))
    }

    /// True while a process that it names runs. One that it does not name may run too: a supervisor
    /// that was killed just after it sent a standby to work has not said so.
    pub fn is_alive(&self) -> bool {
        self.named().any(Identity::is_alive)
    }

    /// The processes that it names, as far as their pids mean anything here: those of another pid or
    /// time namespace are others, or none.
    pub(super) fn named(&self) -> impl Iterator<Item = Identity> {
        let all = [Some(self.supervisor), self.worker, self.standby];
        let here = self.is_of_our_namespaces();
        all.into_iter().flatten().filter(move |_| here)
    }

    fn is_of_our_namespaces(&self) -> bool {
        self.namespaces.is_empty() || self.namespaces == namespaces()
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
    /// Those of its processes that somebody stopped, by a signal or with a debugger: where one runs
    /// it replaces the others within seconds.
    pub stopped: Vec<i32>,
    /// True where none of its processes runs, since all are stopped: whoever uses the device waits.
    pub halted: bool,
    /// True where all its processes are dead and the kernel keeps the device: whoever uses it waits.
    pub abandoned: bool,
    /// The block device that shows it.
    pub disk: Option<LocalDisk>,
}

impl DeviceStatus {
    /// What its processes were given with an option; `None` where they were not, and where none of them
    /// can be seen.
    pub fn argument(&self, option: &str) -> Option<String> {
        let mut lines = self.state.named().filter_map(|one| command_line(one.pid));
        lines.find_map(|(_, arguments)| argument(&arguments, option)?.to_str().map(str::to_owned))
    }
}

/// The device of `run_dir`, or `None` when nothing of this boot is there.
///
/// # Errors
/// [`Permission`](vellum_base::ErrorKind::Permission) or [`Io`](vellum_base::ErrorKind::Io).
pub fn status(run_dir: &RunDir) -> Result<Option<DeviceStatus>> {
    let Some(state) = RunState::read(run_dir)? else {
        return Ok(None);
    };
    let disk = hinted_disk(run_dir);
    let listened = is_listened(run_dir);
    let looked: Vec<(Identity, Seen)> = state.named().map(|one| (one, one.look())).collect();
    let alive = || looked.iter().filter(|(_, seen)| *seen != Seen::Gone);
    let stopped = alive().filter(|(_, seen)| *seen == Seen::Stopped);
    let stopped: Vec<i32> = stopped.map(|(one, _)| one.pid).collect();
    let supervises = |one: Identity| one == state.supervisor || Some(one) == state.standby;
    Ok(Some(DeviceStatus {
        alive: listened,
        abandoned: !listened && disk.is_some_and(LocalDisk::outlives_its_server),
        supervised: !state.is_of_our_namespaces() || alive().any(|(one, _)| supervises(*one)),
        halted: !stopped.is_empty() && stopped.len() == alive().count(),
        stopped,
        disk,
        state,
    }))
}

/// True while a process of the device of `run_dir` lives, whether or not it answers, and in whatever
/// namespaces: all of them hold the socket.
pub(super) fn is_listened(run_dir: &RunDir) -> bool {
    let short = run_dir.control().short_path();
    short.is_ok_and(|(_handle, path)| unix_socket::is_listened(&path))
}

/// True where all processes of the device of `run_dir` are stopped.
pub(super) fn is_halted(run_dir: &RunDir) -> bool {
    let status = status(run_dir).ok().flatten();
    status.is_some_and(|status| status.halted)
}

/// What to say of a device whose server does not answer since somebody stopped it; `None` where
/// nobody did.
pub(super) fn stopped(run_dir: &RunDir) -> Option<String> {
    let status = status(run_dir).ok()??;
    let [first, ..] = status.stopped.as_slice() else {
        return None;
    };
    let pids: Vec<String> = status.stopped.iter().map(i32::to_string).collect();
    let pids = pids.join(" ");
    Some(match status.halted {
        true => format!(
            "all its processes are stopped (by a signal or a debugger): `kill -CONT {pids}`, or \
             `vellum umount --force`, which gives those who use it I/O errors"
        ),
        false => format!(
            "its process {first} is stopped (by a signal or a debugger) and is being replaced: try \
             again in some seconds"
        ),
    })
}

/// Which block device is the one of a run directory, as `attach` noted it.
///
/// The number alone says little: it is given to one device after the other. The kernel counts that
/// (diskseq, Linux 5.15), so number and count name one attachment, also where the backing file has
/// lost its name: its FUSE file was unmounted, or went with a mount namespace. The directory's inode
/// keeps a copy of it from being taken for the original.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hint {
    device: PathBuf,
    diskseq: Option<u64>,
    /// Major and minor, which mounts of a device show that was deleted.
    #[serde(default)]
    number: Option<(u32, u32)>,
    boot_id: String,
    run_dir: Place,
}

impl Hint {
    /// Notes the device of `run_dir`. It need not survive a power cut. Best effort: without it the
    /// device is found by its backing file.
    pub(super) fn write(run_dir: &RunDir, device: LocalDisk) {
        let (Ok(place), Ok(boot_id)) = (run_dir.place(), boot_id()) else {
            return;
        };
        let hint = Hint {
            device: device.path(),
            diskseq: device.diskseq(),
            number: device.major_minor(),
            boot_id,
            run_dir: place,
        };
        if let Ok(bytes) = serde_json::to_vec(&hint) {
            let _ = fs::write(run_dir.loop_hint(), bytes);
        }
    }

    fn read(run_dir: &RunDir) -> Option<Hint> {
        let bytes = fs::read(run_dir.loop_hint()).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn is_about(&self, run_dir: &RunDir) -> bool {
        // One that cannot be told from a copy's is no hint.
        let boot = boot_id().is_ok_and(|boot| boot == self.boot_id);
        boot && run_dir.place().ok() == Some(self.run_dir)
    }

    /// The device, if it is attached as it was then.
    fn device(&self, run_dir: &RunDir) -> Option<LocalDisk> {
        if !self.is_about(run_dir) {
            return None;
        }
        let device = LocalDisk::from_path(&self.device).filter(|disk| disk.is_attached())?;
        let same = match self.diskseq {
            Some(diskseq) => device.diskseq() == Some(diskseq),
            // A kernel that does not count.
            None => device.is_backed_by(&run_dir.dev()),
        };
        same.then_some(device)
    }
}

/// A ublk device that was deleted, perhaps under its mounts: as long as one is there, no other device gets its
/// number.
pub(super) struct DeletedDisk {
    device: PathBuf,
    number: (u32, u32),
}

impl DeletedDisk {
    /// True of a mount of it.
    pub(super) fn has(&self, mount: &MountInfo) -> bool {
        mount.major_minor == self.number && mount.source == self.device
    }
}

/// The device that the hint of `run_dir` names, if it was deleted.
pub(super) fn deleted_disk(run_dir: &RunDir) -> Option<DeletedDisk> {
    let hint = Hint::read(run_dir).filter(|hint| hint.is_about(run_dir))?;
    let disk = LocalDisk::from_path(&hint.device)?;
    let deleted = disk.outlives_its_server() && disk.diskseq() != hint.diskseq;
    deleted.then_some(DeletedDisk {
        device: hint.device,
        number: hint.number?,
    })
}

/// The block device that the hint names, if it is still the device's.
pub fn hinted_disk(run_dir: &RunDir) -> Option<LocalDisk> {
    if let Some(hint) = Hint::read(run_dir) {
        return hint.device(run_dir);
    }
    // As earlier versions wrote it: the path alone.
    let text = fs::read_to_string(run_dir.loop_hint()).ok()?;
    let device = LocalDisk::from_path(Path::new(text.trim()))?;
    device.is_backed_by(&run_dir.dev()).then_some(device)
}

/// The block devices of `run_dir`. No other device is asked for anything: what lies below one may
/// hang, and whoever asks the kernel for more than the name of its backing file hangs with it.
///
/// # Errors
/// [`Io`](vellum_base::ErrorKind::Io) where sysfs cannot be read.
pub(super) fn disks(run_dir: &RunDir) -> Result<Vec<LocalDisk>> {
    if let Some(disk) = hinted_disk(run_dir) {
        return Ok(vec![disk]);
    }
    let loops = LoopDevice::find(&run_dir.dev())?.into_iter();
    let ublk = UblkDisk::find(Mark::of(run_dir))?;
    Ok(loops
        .map(LocalDisk::from)
        .chain(ublk.into_iter().map(LocalDisk::from))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What another process has written half of is neither taken for the state nor destroyed.
    #[test]
    fn a_state_that_another_process_is_writing_is_left_to_it_and_found_when_it_died() {
        let dir = tempfile::tempdir().unwrap();
        let half = dir.path().join("state.json.1.tmp");
        fs::write(&half, b"{\"version\"").unwrap();
        let run_dir = RunDir::at(dir.path().to_owned());
        let held = run_dir.hold().unwrap();
        let state = RunState::new(false, &held).unwrap();
        state.write(&run_dir).unwrap();
        assert!(RunState::read(&run_dir).unwrap().is_some());
        assert_eq!(fs::read(&half).unwrap(), b"{\"version\"");
        assert_eq!(run_dir.unfinished_states().unwrap(), [half]);
    }

    /// Its diskseq may be the same for as long as it is not attached again.
    #[test]
    fn a_loop_device_that_is_not_attached_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(dir.path().to_owned());
        let attached = LoopDevice::attached().unwrap();
        let numbers = fs::read_dir("/sys/block").unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name();
            name.to_str()?.strip_prefix("loop")?.parse().ok()
        });
        let free = numbers
            .map(LoopDevice::from_number)
            .filter(|device| !attached.contains(device))
            .max()
            .expect("a free loop device: modprobe loop");
        Hint::write(&run_dir, free.into());
        assert!(Hint::read(&run_dir).unwrap().diskseq.is_some());
        assert!(hinted_disk(&run_dir).is_none());
    }

    /// A backup program copies what it finds, also of what runs.
    #[test]
    fn the_state_of_a_directory_says_nothing_in_a_copy_and_still_holds_after_a_move() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| RunDir::at(dir.path().join(name));
        let (first, copy) = (at("first"), at("copy"));
        fs::create_dir(first.path()).unwrap();
        fs::create_dir(copy.path()).unwrap();
        let held = first.hold().unwrap();
        let state = RunState::new(false, &held).unwrap();
        state.write(&held.now()).unwrap();
        fs::copy(first.state(), copy.state()).unwrap();
        assert!(RunState::read(&first).unwrap().is_some());
        assert!(RunState::read(&copy).unwrap().is_none());
        Hint::write(&first, LoopDevice::from_number(7).into());
        let moved = at("moved");
        let note = || Hint::read(&moved).unwrap();
        fs::rename(first.path(), moved.path()).unwrap();
        assert!(RunState::read(&moved).unwrap().is_some());
        assert!(note().is_about(&moved));
        fs::rename(copy.path(), first.path()).unwrap();
        assert!(RunState::read(&first).unwrap().is_none());
        assert!(!note().is_about(&first));
    }
}
