//! What runs in a container now, and ending it: the record that `run` leaves while it runs.
//!
//! `RUN_DIR/oci/` holds the bundle (`config.json`), the runtime's own state (`root/`), its log, the
//! pid of the container's first process (`pid`), and who waits for it (`owner.json`). Beside it lies
//! `RUN_DIR/etc/`, a small tmpfs with the container's own /etc/hosts and such.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::cgroup;
use super::runtime::Runtime;
use crate::mount_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::storage::Holder;
use vellum_export::device::{Identity, boot_id};
use vellum_fs::held_dir::Place;
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// How long killed processes may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a runtime whose caller was killed may take to start or end a process.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Who started a container's processes, and with what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// The container's id with the runtime, and its cgroup.
    pub(super) id: String,
    /// The runtime's program.
    pub(super) program: PathBuf,
    /// The command that waits for it.
    pub(super) waiter: Identity,
    /// The runtime that runs it.
    pub(super) runner: Option<Identity>,
    /// The name of the container's cgroup.
    pub(super) cgroup: String,
    /// It was mounted before, and stays so.
    pub(crate) keep_mounted: bool,
    /// The boot that all this is of, and the run directory: in a copy of that it says nothing.
    #[serde(default)]
    pub(super) boot_id: String,
    #[serde(default)]
    pub(super) place: Option<Place>,
}

impl Owner {
    /// The record in a run directory; `None` where nothing was started or all was cleaned up, and
    /// where it is another's: of an earlier boot, or copied with its store while something ran.
    pub(crate) fn read(run_dir: &RunDir) -> Result<Option<Owner>> {
        let path = run_dir.oci().join("owner.json");
        match fs::read(&path) {
            // Half written: a crash that came before anything was started.
            Ok(bytes) => {
                let owner = serde_json::from_slice::<Owner>(&bytes).ok();
                match owner {
                    Some(owner) if owner.is_of(run_dir)? => Ok(Some(owner)),
                    _ => Ok(None),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }

    /// True where it is of this boot and of this very directory. A program of before says neither.
    fn is_of(&self, run_dir: &RunDir) -> Result<bool> {
        let boot = self.boot_id.is_empty() || self.boot_id == boot_id()?;
        let place = |place| run_dir.place().is_ok_and(|here| here == place);
        Ok(boot && self.place.is_none_or(place))
    }

    /// Writes the record, all of it or nothing.
    pub(super) fn write(&self, run_dir: &RunDir) -> Result<()> {
        let path = run_dir.oci().join("owner.json");
        let fresh = path.with_extension("tmp");
        let bytes = serde_json::to_vec(self).map_err(|error| {
            Error::internal(format!("the run's record cannot be encoded: {error}"))
        })?;
        fs::write(&fresh, bytes)
            .and_then(|()| fs::rename(&fresh, &path))
            .context(|| format!("cannot write {}", path.display()))
    }

    /// The runtime that knows the container.
    pub(super) fn runtime(&self, run_dir: &RunDir) -> Runtime {
        Runtime {
            program: self.program.clone(),
            root: run_dir.oci().join("root"),
        }
    }

    /// A process of the container while one lives: its first, or else another of its cgroup, for
    /// the runtime may have died before it noted the first.
    pub(super) fn process(&self, run_dir: &RunDir) -> Result<Option<Identity>> {
        match self.init(run_dir)? {
            Some(init) => Ok(Some(init)),
            None => self.any_member(),
        }
    }

    /// The container's first process while it lives. Its cgroup proves that a pid is still it.
    pub(super) fn init(&self, run_dir: &RunDir) -> Result<Option<Identity>> {
        // The runtime writes it once it has started that process.
        let Ok(text) = fs::read_to_string(run_dir.oci().join("pid")) else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(pid) => cgroup::member(pid, &self.cgroup),
            Err(_) => Ok(None),
        }
    }

    /// Whether the container's first process has become the program that it is to be: before that it is the
    /// runtime's.
    pub(super) fn executes_its_program(&self, run_dir: &RunDir) -> Result<bool> {
        let Some(init) = self.init(run_dir)? else {
            return Ok(false);
        };
        if !self.runtime(run_dir).knows(&self.id) {
            return Ok(false);
        }
        // Runtimes run from a copy of themselves in memory, or from their file.
        let runtimes = fs::canonicalize(&self.program).unwrap_or_else(|_| self.program.clone());
        let program = fs::read_link(format!("/proc/{}/exe", init.pid));
        Ok(program.is_ok_and(|program| program != runtimes && !program.starts_with("/memfd:")))
    }

    /// The oldest process of the container's cgroup, wherever its hierarchy is mounted.
    fn any_member(&self) -> Result<Option<Identity>> {
        let members = cgroup::members(&self.cgroup)?;
        Ok(members.into_iter().min_by_key(|process| process.start))
    }
}

/// What goes on in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Nothing.
    Idle,
    /// `vellum run` or `exec` is about to start a process, or to clean up after one.
    Busy,
    /// A process runs; its pid on the host. `waited` unless the command that started it is gone.
    Running {
        /// Of the container's first process.
        pid: i32,
        /// Whether the command that started it still waits for it.
        waited: bool,
    },
    /// The command that started something was killed, and nothing runs any more.
    Leftover,
}

/// What goes on in a container.
///
/// # Errors
/// Where its run directory cannot be read.
pub fn activity(store: &Store, container: &ContainerRecord) -> Result<Activity> {
    activity_in(&store.run_dir(container))
}

pub(super) fn activity_in(run_dir: &RunDir) -> Result<Activity> {
    let Some(owner) = Owner::read(run_dir)? else {
        return Ok(match run_dir.oci().exists() {
            true => Activity::Leftover,
            false => Activity::Idle,
        });
    };
    let waited = owner.waiter.is_alive();
    // The runtime goes on where the command that started it was killed.
    let busy = waited || owner.runner.is_some_and(Identity::is_alive);
    Ok(match owner.process(run_dir)? {
        Some(process) => Activity::Running {
            pid: process.pid,
            waited,
        },
        None if busy => Activity::Busy,
        None => Activity::Leftover,
    })
}

/// As [`activity_in`]. Where the command that started something was killed while the runtime began
/// or ended it, waits until it is one or the other.
pub(super) fn settled_activity(run_dir: &RunDir) -> Result<Activity> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let activity = activity_in(run_dir)?;
        let waited = Owner::read(run_dir)?.is_some_and(|owner| owner.waiter.is_alive());
        if activity != Activity::Busy || waited || Instant::now() > deadline {
            return Ok(activity);
        }
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends what runs in a container. What `run` noted of it stays, until [`forget`] removes it.
///
/// # Errors
/// [`ErrorKind::InUse`] while it runs, whether or not somebody waits for it, and `force` is not given.
pub(crate) fn end_running(run_dir: &RunDir, container: &str, force: bool) -> Result<()> {
    match settled_activity(run_dir)? {
        Activity::Idle => return Ok(()),
        Activity::Running { pid, waited } if !force => {
            let what = Holder::of(pid).map_or(String::new(), |holder| {
                let since = holder
                    .since
                    .map_or(String::new(), |since| format!(", since {since}"));
                format!(": {}{since}", holder.command)
            });
            let alone = if waited { "" } else { "; nobody waits for it" };
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the container {container} is running (pid {pid}{what}{alone}): end its command first (`vellum stop {container}`), or use --force to kill it"
                ),
            ));
        }
        Activity::Busy if !force => {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the container {container} is starting or stopping: try again, or use --force to kill it"
                ),
            ));
        }
        _ => {}
    }
    kill_left(run_dir).map_err(|error| error.context(format!("cannot clean up after {container}")))
}

/// Kills what is left of a run and removes its cgroup.
pub(super) fn kill_left(run_dir: &RunDir) -> Result<()> {
    if let Some(owner) = Owner::read(run_dir)? {
        let init = owner.init(run_dir)?;
        let runtime = owner.runtime(run_dir);
        let known = runtime.root.join(&owner.id).exists();
        if known {
            delete(&runtime, &owner)?;
        }
        let me = Identity::current();
        let runner = owner.runner.filter(|runner| *runner != me);
        for process in [init, runner].into_iter().flatten() {
            end(process)?;
        }
        while let Some(process) = owner.any_member()?.filter(|process| *process != me) {
            end(process)?;
        }
        remove_cgroups(&owner.cgroup);
    }
    Ok(())
}

/// Removes what was noted of a run that has ended, and its files.
pub(crate) fn forget(run_dir: &RunDir) -> Result<()> {
    mount_point::end_etc(run_dir)?;
    let oci = run_dir.oci();
    match fs::remove_dir_all(&oci) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", oci.display()), error))
        }
        _ => Ok(()),
    }
}

fn delete(runtime: &Runtime, owner: &Owner) -> Result<()> {
    let mut command = runtime.command();
    command.args(["delete", "--force", &owner.id]);
    match runtime.call(&mut command) {
        Ok((true, _)) => {}
        // The processes are ended below, and the files removed: nothing of it is needed.
        Ok((false, said)) => tracing::debug!("{}: {said}", runtime.program.display()),
        Err(error) => tracing::debug!(%error, "the runtime is gone"),
    }
    Ok(())
}

/// Kills a process if it does not end by itself at once, and waits for it.
fn end(process: Identity) -> Result<()> {
    let Some(open) = process.open()? else {
        return Ok(());
    };
    if open.wait(Duration::from_millis(500))? {
        return Ok(());
    }
    open.signal(Signal::SIGKILL);
    if open.wait(KILL_TIMEOUT)? {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Timeout,
        format!("process {} does not die (its disk may hang)", process.pid),
    ))
}

/// Removes the empty cgroup directories of a container that its runtime had no time to remove.
fn remove_cgroups(name: &str) {
    let base = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(base).into_iter().flatten().flatten();
    for dir in hierarchies
        .map(|entry| entry.path())
        .chain([base.to_owned()])
    {
        let dir = dir.join(name);
        if !dir.is_dir() {
            continue;
        }
        for _ in 0..50 {
            // Busy until the last process is reaped.
            match fs::remove_dir(&dir) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                _ => break,
            }
        }
    }
}
