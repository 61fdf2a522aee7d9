//! From an attached device, or what a crash left of one, to nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::command_line::run_dir_of;
use super::lock::RunLock;
use super::process::{Identity, Process};
use super::state::{self, RunState, Status, disks, is_listened};
use crate::fuse::session::FS_TYPE;
use crate::local_disk::LocalDisk;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::held_dir::Place;
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{RunDir, RunRoot, is_there};

/// How to detach.
#[derive(Debug, Clone)]
pub struct DetachOptions {
    /// Also when it is mounted: its users get I/O errors, what they flushed is kept.
    pub force: bool,
    /// How long to wait for each step.
    pub timeout: Duration,
}

impl Default for DetachOptions {
    fn default() -> Self {
        DetachOptions {
            force: false,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Removes the block device, the session, the processes and the run directory of a device, in
/// whatever state a crash left them. A device that is not there is fine.
///
/// # Errors
/// [`ErrorKind::InUse`] while it is mounted or open and its server lives; [`ErrorKind::Timeout`].
pub fn detach(run_dir: &RunDir, options: &DetachOptions) -> Result<()> {
    let run_dir = match run_dir.canonical() {
        Ok(run_dir) => run_dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(run_dir.to_string(), error)),
    };
    match RunLock::take(&run_dir)? {
        Some(_lock) => detach_locked(&run_dir, options),
        None => Ok(()),
    }
}

pub(super) fn detach_locked(run_dir: &RunDir, options: &DetachOptions) -> Result<()> {
    clean(run_dir, options)?;
    remove_files(run_dir)
}

/// Removes the files of a device that is gone, and its run directory where nothing else is there.
pub(super) fn remove_files(run_dir: &RunDir) -> Result<()> {
    let unfinished = run_dir.unfinished_states();
    let unfinished = unfinished.context(|| run_dir.to_string())?;
    for path in run_dir.device_files().into_iter().chain(unfinished) {
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(path.display().to_string(), error)),
        }
    }
    match run_dir.remove_empty() {
        // What others keep there stays.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.context(|| run_dir.to_string()),
    }
}

/// All of [`detach`] but the files.
pub(super) fn clean(run_dir: &RunDir, options: &DetachOptions) -> Result<()> {
    if options.force || !is_listened(run_dir) {
        // Nobody answers any more, or nobody shall: with the last process the session is aborted,
        // so that nothing below can wait for an answer.
        kill_all(run_dir, options.timeout)?;
        for device in disks(run_dir)? {
            take_from_users(run_dir, device)?;
        }
        unmount_deleted(run_dir)?;
        unmount_session(run_dir)?;
        return Ok(());
    }
    for device in disks(run_dir)? {
        let mounts = mounts_of(device)?;
        if let Some(mount) = mounts.first() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{}: it is mounted on {}: unmount that first",
                    device.path().display(),
                    mount.display()
                ),
            ));
        }
        device.detach(run_dir, options.timeout)?;
    }
    unmount_session(run_dir)?;
    stop(run_dir, options.timeout)
}

fn mounts_of(device: LocalDisk) -> Result<Vec<PathBuf>> {
    let (path, number) = (device.path(), device.major_minor());
    let mounts = MountInfo::read()?;
    Ok(mounts
        .into_iter()
        .filter(|mount| Some(mount.major_minor) == number || mount.source == path)
        .map(|mount| mount.target)
        .collect())
}

/// Sees to it that nobody waits for a device whose processes are all dead: a ublk device is deleted, and its
/// mounts go. Others give errors by themselves.
///
/// # Errors
/// [`ErrorKind::Io`] where the kernel refuses.
fn abandon(run_dir: &RunDir) -> Result<()> {
    // Where no directory is there is no device, and one of the same name is another store's.
    let run_dir = match run_dir.canonical() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.context(|| run_dir.to_string())?,
    };
    if is_listened(&run_dir) {
        return Ok(());
    }
    let waits = |disk: &LocalDisk| disk.outlives_its_server();
    for disk in disks(&run_dir)?.into_iter().filter(waits) {
        tracing::warn!(
            "{}: its server is dead: whoever uses it gets I/O errors",
            disk.path().display()
        );
        take_from_users(&run_dir, disk)?;
    }
    unmount_deleted(&run_dir)
}

/// Takes a device that nobody serves away, and its mounts.
fn take_from_users(run_dir: &RunDir, device: LocalDisk) -> Result<()> {
    let number = device.major_minor();
    let ours = |mount: &MountInfo| Some(mount.major_minor) == number;
    // An unmount would wait for the answer of a server that will not come.
    unmount_all(ours, || device.abort(run_dir))?;
    device.detach_lazily()
}

/// Unmounts what is mounted from a device of `run_dir` that was deleted under it.
///
/// # Errors
/// [`ErrorKind::InUse`] where others mounted something on it.
pub fn unmount_deleted(run_dir: &RunDir) -> Result<()> {
    let Some(deleted) = state::deleted_disk(run_dir) else {
        return Ok(());
    };
    unmount_all(|mount| deleted.has(mount), || Ok(()))
}

/// Unmounts the mounts that are `ours`, after `before`, which is done where all of them can be.
fn unmount_all(
    ours: impl Fn(&MountInfo) -> bool,
    before: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // Others' mounts are not ours to take away.
    let mounts = MountInfo::read()?;
    let found = || mounts.iter().filter(|mount| ours(mount));
    for mount in found() {
        mount.check_uncovered(&mounts)?;
    }
    before()?;
    // The last mounted is the first to go.
    for mount in found().rev() {
        let target = &mount.target;
        tracing::warn!("{}: unmounted, since its device is gone", target.display());
        lazily_unmount(target)?;
    }
    Ok(())
}

fn unmount_session(run_dir: &RunDir) -> Result<()> {
    let dev = run_dir.dev();
    // Whatever lies on top of it, one after the other, but not for ever.
    for _ in 0..16 {
        match umount2(&dev, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not mounted, or not there.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(Error::io(
                    format!("{}: cannot be unmounted", dev.display()),
                    errno.into(),
                ));
            }
        }
    }
    Ok(())
}

fn lazily_unmount(target: &Path) -> Result<()> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(Error::io(
            format!("{}: cannot be unmounted", target.display()),
            errno.into(),
        )),
    }
}

/// Ends the processes in order: the session is unmounted, so they may be ending already.
fn stop(run_dir: &RunDir, timeout: Duration) -> Result<()> {
    let Some(state) = RunState::read(run_dir)? else {
        return kill_all(run_dir, timeout);
    };
    let open = |process: Option<Identity>| match process {
        Some(process) if !process.is_stopped() => process.open(),
        _ => Ok(None),
    };
    let mut named = state.named();
    let told = match open(named.next())? {
        Some(supervisor) => {
            supervisor.signal(Signal::SIGTERM);
            supervisor.wait(timeout)?
        }
        None => match open(named.next())? {
            Some(worker) => {
                worker.signal(Signal::SIGTERM);
                worker.wait(timeout)?
            }
            None => false,
        },
    };
    // A supervisor that ended in order has waited for the others and said so.
    let ended = RunState::read(run_dir)?.is_some_and(|state| state.status == Status::Ended);
    if told && ended {
        return Ok(());
    }
    kill_all(run_dir, timeout)
}

/// Sees to it that a device answers again whose processes are all stopped, or dead, before it is taken away
/// from those who use it: whoever unmounts it waits in the kernel otherwise. Stopped ones go on; where
/// something, as a debugger, keeps them, they are killed. For dead ones the kernel answers, with errors.
///
/// # Errors
/// [`ErrorKind::Timeout`] where they do not die.
pub fn wake(run_dir: &RunDir) -> Result<()> {
    if !state::is_halted(run_dir) {
        return abandon(run_dir);
    }
    let run_dir = run_dir.canonical().context(|| run_dir.to_string())?;
    for process in open_all(processes(&run_dir)?)? {
        tracing::warn!("process {} was stopped: it goes on", process.pid());
        process.signal(Signal::SIGCONT);
    }
    let deadline = Instant::now() + Duration::from_secs(1);
    while state::is_halted(&run_dir) {
        if Instant::now() >= deadline {
            return kill_all(&run_dir, DetachOptions::default().timeout);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Handles on those of the processes that are not gone.
fn open_all(processes: Vec<Identity>) -> Result<Vec<Process>> {
    let opened = processes.into_iter().map(Identity::open);
    opened.filter_map(Result::transpose).collect()
}

/// So many times in a row, 10 ms apart, no process of a device is found before it counts as dead.
const CALM_ROUNDS: u32 = 3;

/// Kills every process of the device, whatever the state file says, and waits until none is left
/// that could still hold a lock.
fn kill_all(run_dir: &RunDir, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut calm = 0;
    loop {
        // A standby that becomes the supervisor while its elders die is found in the next round.
        let mut found = processes(run_dir)?;
        found.extend(dying(run_dir));
        let open = open_all(found)?;
        for process in &open {
            process.signal(Signal::SIGKILL);
        }
        for process in &open {
            let left = deadline.saturating_duration_since(Instant::now());
            if !process.wait(left)? {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!(
                        "{run_dir}: process {} of the device does not die (its disk may hang)",
                        process.pid()
                    ),
                ));
            }
        }
        // One that is just being executed has no command line yet.
        calm = match open.is_empty() && !is_listened(run_dir) {
            true => calm + 1,
            false => 0,
        };
        if calm == CALM_ROUNDS {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{run_dir}: processes of the device live on after {timeout:?}: new ones came \
                     again and again, or they cannot be seen from here (another pid namespace, as a \
                     container's): do this there, or end that"
                ),
            ));
        }
        if open.is_empty() {
            std::thread::sleep(Duration::from_millis(if calm == 0 { 1 } else { 10 }));
        }
    }
}

/// The living processes of the device, by their command line and the directory that they hold: the
/// state file may be half written.
fn processes(run_dir: &RunDir) -> Result<Vec<Identity>> {
    let mut found = Vec::new();
    let place = run_dir.place().ok();
    for entry in fs::read_dir("/proc").context(|| "/proc: cannot be read")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if is_of(pid, run_dir, place)
            && let Some(identity) = Identity::of(pid)?
            && identity.is_alive()
        {
            found.push(identity);
        }
    }
    Ok(found)
}

/// Those that the state names and that are dying: they have no command line any more, and may still
/// have their files. A directory that was copied names the living processes of another.
fn dying(run_dir: &RunDir) -> Vec<Identity> {
    // Where nothing can be read any more, by force, nothing is known of them.
    let Ok(Some(state)) = RunState::read(run_dir) else {
        return Vec::new();
    };
    let dying = |one: &Identity| {
        let line = fs::read(format!("/proc/{}/cmdline", one.pid));
        line.is_ok_and(|line| line.is_empty()) && one.is_alive()
    };
    state.named().filter(dying).collect()
}

/// True for a process of the device of `run_dir`, which is at `place`.
fn is_of(pid: i32, run_dir: &RunDir, place: Option<Place>) -> bool {
    let Some(told) = run_dir_of(pid) else {
        return false;
    };
    // The last part of the path is the device's own name, which it keeps.
    if told.name() != run_dir.name() {
        return false;
    }
    let Some(place) = place else {
        // Nothing can be looked at there (its disk is gone).
        return told == *run_dir;
    };
    let held = held_dirs(pid);
    if held.is_empty() {
        // A program from before run directories were held.
        return told == *run_dir;
    }
    held.contains(&place)
}

/// The directories that a process has open.
fn held_dirs(pid: i32) -> Vec<Place> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    files
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| {
            let path = file.path();
            // Not the files of the device: to look at one may mean to wait for its server.
            let link = fs::read_link(&path).ok()?;
            if !link.is_absolute() || link.starts_with("/dev") {
                return None;
            }
            let metadata = fs::metadata(&path).ok()?;
            metadata.is_dir().then(|| Place::from(&metadata))
        })
        .collect()
}

/// Something of a device that is left without a living server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// The device's run directory: [`detach`] it to clean up.
    pub run_dir: RunDir,
    /// What is there, for a person.
    pub what: String,
    /// True where its file system is still mounted, so that somebody may look there and see errors.
    /// Anything else the next [`attach`](super::attach()) replaces.
    pub mounted: bool,
}

/// What dead devices of a store left behind.
///
/// # Errors
/// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
pub fn find_leaks(runs: &RunRoot) -> Result<Vec<Leak>> {
    let runs = match runs.canonical() {
        Ok(runs) => runs,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(runs.to_string(), error)),
    };
    let mut leaks = Vec::new();
    let mounts = MountInfo::read()?;
    for run_dir in runs.dirs().context(|| runs.to_string())? {
        let state = RunState::read(&run_dir)?;
        // Before a look at the device's file, for whose answer a server that hangs lets us wait.
        if is_listened(&run_dir) {
            continue;
        }
        if !is_there(&run_dir.dev()) && !is_there(&run_dir.state()) {
            continue;
        }
        let mut what = vec![match state {
            Some(state) => match state.error {
                Some(error) => format!("its server is dead ({error})"),
                None => "its server is dead".to_string(),
            },
            None => "a run directory of an earlier boot, or half made".to_string(),
        }];
        let mut mounted = false;
        let dev = run_dir.dev();
        for device in disks(&run_dir)? {
            what.push(format!("{} is still attached", device.path().display()));
            let (before, number) = (what.len(), device.major_minor());
            what.extend(
                mounts
                    .iter()
                    .filter(|mount| Some(mount.major_minor) == number)
                    .map(|mount| format!("{} is still mounted", mount.target.display())),
            );
            mounted |= what.len() > before;
        }
        if mounts
            .iter()
            .any(|mount| mount.target == dev && mount.fs_type == FS_TYPE)
        {
            what.push(format!("{} is still mounted", dev.display()));
        }
        what.extend(
            processes(&run_dir)?
                .iter()
                .map(|process| format!("process {} still runs", process.pid)),
        );
        leaks.push(Leak {
            run_dir,
            mounted,
            what: what.join("; "),
        });
    }
    leaks.sort_by(|a, b| a.run_dir.cmp(&b.run_dir));
    Ok(leaks)
}
