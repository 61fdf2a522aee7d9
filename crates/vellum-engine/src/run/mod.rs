//! Containers that run: an image's command, or another, in a container's file system, started by
//! an OCI runtime with namespaces, capabilities and cgroups of its own.
//!
//! * [`run`] makes a container and runs a command in it; [`exec`] runs one in a container that is
//!   there, beside what runs in it or alone.
//! * [`waiter`] runs a container's command in the background; [`stop()`] ends it.
//! * [`activity()`] says what runs; unmounting and removing end it. So [`super::teardown`] stands on
//!   `activity` and `scaffold` in here, which know nothing of it, and the rest of this module on it.

pub(super) mod activity;
mod attend;
mod bundle;
mod capabilities;
pub(crate) mod cgroup;
mod end;
mod executable;
mod foreground;
mod limits;
mod output;
mod refused;
mod runtime;
pub(super) mod scaffold;
mod seccomp;
mod spec;
mod stop;
mod user;
mod volume;
pub mod waiter;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use uuid::Uuid;

use super::mount::{Rights, mount_anew, mount_locked};
use super::mount_point::{self, mounted};
use super::seal::sync_file_system;
use super::teardown::{end_for_good, refuse_halted, take_over, unmount_ended};
use super::{lock_container, lock_renamed};
use activity::{Owner, forget, kill_left, settled_activity};
use bundle::{Start, absolute, host_name, prepare, write_json};
use end::End;
use executable::{Files, NoProgram};
use foreground::Foreground;
use runtime::Runtime;
use spec::ProcessPlan;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::storage::Held;
use vellum_export::device::{self, Identity, boot_id};
use vellum_fs::run_dir::RunDir;
use vellum_store::{Confinement, ContainerRecord, Store};
use waiter::Background;

pub use activity::{Activity, activity};
pub(crate) use attend::run_for_a_trace;
pub use attend::{make, run, start};
pub use capabilities::parse_capability;
pub use output::{OutputLine, OutputOptions, Stream, logs};
pub use runtime::FAILURE;
pub(super) use runtime::find as find_runtime;
pub use seccomp::parse_seccomp;
pub use stop::{StopSignal, kill, stop, wait};
pub(super) use volume::mounted_volumes;
pub use volume::{check_volumes, parse_mount, parse_volume};

/// How often it is looked whether a container that a command could not join still runs.
const ENTER_LOOKS: usize = 10;
const ENTER_PAUSE: Duration = Duration::from_millis(50);

/// A command and what it gets.
#[derive(Debug, Clone, Default)]
pub struct CommandOptions {
    /// The program and its arguments; for [`run`] the image's where it is empty.
    pub command: Vec<String>,
    /// `NAME=VALUE` each, on top of the image's.
    pub env: Vec<String>,
    /// Where it starts; the image's where it is `None`. Made where it is missing.
    pub workdir: Option<String>,
    /// `USER[:GROUP]`, names or numbers; the image's where it is `None`.
    pub user: Option<String>,
    /// Give it a terminal; standard input must be one.
    pub terminal: bool,
}

/// How to run a new container.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The command.
    pub command: CommandOptions,
    /// The program in place of the image's entry point; empty for none.
    pub entrypoint: Option<String>,
    /// Remove the container when the command has ended.
    pub remove: bool,
}

/// A command that is run for what it touches: it has no input, and what it prints goes to standard error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traced {
    /// After so long it is asked to end, and is killed where it does not.
    pub limit: Option<Duration>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status, 128 + n after signal n; 127 where the program was not found, 126 where it
    /// could not be executed, [`FAILURE`] where it could not be started for another reason.
    pub status: u8,
    /// Why it did not start, if it did not.
    pub failure: Option<Failure>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NoProgram(why) | Failure::Runtime { why, .. } => f.write_str(why),
        }
    }
}

/// Why a command did not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is no program, and nobody has said so yet.
    NoProgram(String),
    /// The runtime failed.
    Runtime {
        /// What it said, or what is known of it.
        why: String,
        /// Whether it has said so itself, on the command's standard error.
        said: bool,
    },
}

impl From<NoProgram> for Ended {
    fn from(no: NoProgram) -> Self {
        Ended {
            status: no.status,
            failure: Some(Failure::NoProgram(no.why)),
        }
    }
}

/// Checks that this host can confine a container so.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] and [`ErrorKind::Unsupported`], with what to leave out.
pub fn check_confinement(confinement: &Confinement) -> Result<()> {
    let capabilities = capabilities::of(confinement)?;
    seccomp::of(&confinement.seccomp, &capabilities)?;
    limits::of(confinement).map(drop)
}

/// Which command is run alone in a container.
#[derive(Clone, Copy)]
enum Whose<'a> {
    /// The container's own, whose end is noted; maybe in the background.
    Own(Option<&'a Background>),
    /// That of a trace, in a container that was made for it.
    Traced(Traced),
    /// Another one.
    Another,
}

/// A container that nothing runs in, until this is dropped.
struct Vacant {
    /// With the user, directory and environment of the command that is to be run.
    container: ContainerRecord,
    busy: Box<dyn Held>,
}

/// Sees to it that nothing runs in a container, nor will.
///
/// # Errors
/// [`ErrorKind::InUse`] where something does, or begins or ends just now.
fn vacant(store: &Store, container: &ContainerRecord) -> Result<Vacant> {
    let (now, busy) = lock_container(store, container)?;
    let container = ContainerRecord {
        config: container.config.clone(),
        ..now
    };
    // What a killed command left is in the way of the new one.
    end_for_good(store, &container, false)?;
    refuse_halted(&store.run_dir(&container), &container.name)?;
    take_over(store, &container)?;
    Ok(Vacant { container, busy })
}

/// Mounts a container that nothing runs in, unless it is, runs a command, and puts all back.
fn run_alone(store: &Store, vacant: Vacant, start: &Start, whose: Whose<'_>) -> Result<Ended> {
    let Vacant { container, busy } = vacant;
    let container = &container;
    let run_dir = store.run_dir(container);
    if let Whose::Own(_) = whose {
        store.begin_run(&container.into())?;
    }
    let before = mounted(store, container)?;
    let keep_mounted = before.is_some();
    let owner = new_owner(container, &run_dir, start, keep_mounted)?;
    let prepare = || {
        // First, so that whoever comes after us should we be killed knows what to unmount.
        owner.write(&run_dir)?;
        let rootfs = match before {
            Some(there) => {
                let there = if there.given_up {
                    mount_anew(store, container, &there, None, None)?
                } else {
                    there
                };
                let atime = container.atime.unwrap_or_default();
                mount_point::inner_dir(&run_dir, &there.dir, &there.device, atime)?
            }
            None => mount_locked(store, container, None, Rights::ALL)?.dir,
        };
        if let Some(no) = prepare(store, container, start, &run_dir, &rootfs, &owner)? {
            return Ok(Err(no));
        }
        // From here on signals are the command's; what came before is ours.
        let foreground = Foreground::new()?;
        interrupt::check()?;
        Ok(Ok((rootfs, foreground)))
    };
    let undo = |status| {
        // Nothing runs yet; the first failure is what matters.
        let _held = interrupt::hold();
        let _ = note_end(store, container, whose, status);
        let _ = end_alone(store, container, keep_mounted);
    };
    let (rootfs, foreground) = match prepare() {
        Ok(Ok(prepared)) => prepared,
        Ok(Err(no)) => {
            undo(no.status);
            return Ok(no.into());
        }
        Err(error) => {
            undo(FAILURE);
            return Err(error);
        }
    };
    // Others may ask, look and enter while it runs.
    drop(busy);
    let ended = supervise(&foreground, &run_dir, owner, &rootfs, whose);
    // First, so that it is known whatever comes in between.
    let status = ended.as_ref().map_or(FAILURE, |ended| ended.status);
    let noted = note_end(store, container, whose, status);
    let put_back = put_back(store, container, keep_mounted);
    let ended = ended?;
    put_back?;
    noted?;
    Ok(ended)
}

/// Who runs a command in a container, before anything of it is there.
fn new_owner(
    container: &ContainerRecord,
    run_dir: &RunDir,
    start: &Start,
    keep_mounted: bool,
) -> Result<Owner> {
    let oci = run_dir.oci().join("root");
    fs::create_dir_all(&oci).context(|| format!("cannot make {}", oci.display()))?;
    Ok(Owner {
        id: container.id.to_string(),
        program: start.program.clone(),
        waiter: Identity::current(),
        runner: None,
        cgroup: format!("vellum-{}", container.id),
        keep_mounted,
        boot_id: boot_id()?,
        place: run_dir.place().ok(),
    })
}

/// Notes how a container's own command ended.
fn note_end(
    store: &Store,
    container: &ContainerRecord,
    whose: Whose<'_>,
    status: u8,
) -> Result<()> {
    let Whose::Own(_) = whose else {
        return Ok(());
    };
    match store.end_run(&container.into(), status) {
        // Removed by force.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes what a run left, and unmounts.
fn put_back(store: &Store, container: &ContainerRecord, keep_mounted: bool) -> Result<()> {
    let _held = interrupt::hold();
    let (_, _busy) = match lock_renamed(store, container) {
        // Removed by force, mounts and all.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let run_dir = store.run_dir(container);
    match Owner::read(&run_dir)? {
        // Ended by force, and another runs in it by now.
        Some(owner) if owner.waiter != Identity::current() => Ok(()),
        Some(_) => match end_alone(store, container, keep_mounted) {
            Err(error) if error.kind() == ErrorKind::InUse && !keep_mounted => {
                leave_mounted(store, container, &error)
            }
            other => other,
        },
        // Ended by force.
        None => Ok(()),
    }
}

/// Leaves a container whose command has ended mounted, since a program of the host uses its files, with
/// what the command wrote on the disk, as after an unmount. A command of ours unmounts it when it is done.
fn leave_mounted(store: &Store, container: &ContainerRecord, why: &Error) -> Result<()> {
    let run_dir = store.run_dir(container);
    forget(&run_dir)?;
    if let Some(mounted) = mounted(store, container)? {
        sync_file_system(&mounted.dir)?;
    }
    let name = store.find_container(&container.into())?.name;
    tracing::warn!(
        "{why}: {name} stays mounted: `vellum umount {name}` when nobody uses its files"
    );
    Ok(())
}

/// True where a container is mounted for a command that runs in it, and is unmounted when that ends.
pub(super) fn is_mounted_for_run(run_dir: &RunDir) -> Result<bool> {
    Ok(Owner::read(run_dir)?.is_some_and(|owner| !owner.keep_mounted))
}

/// Unmounts a container that was [mounted for a run](is_mounted_for_run), where that has ended meanwhile
/// and could not, since its files were in use.
pub(super) fn unmount_after_run(store: &Store, container: &ContainerRecord) -> Result<()> {
    let run_dir = store.run_dir(container);
    if matches!(activity::activity_in(&run_dir)?, Activity::Running { .. }) {
        return Ok(());
    }
    // Whoever ends the run has the lock until it is unmounted, or left to us.
    let (_, _busy) = lock_renamed(store, container)?;
    match Owner::read(&run_dir)? {
        None if device::status(&run_dir)?.is_some() => unmount_ended(store, container, false),
        _ => Ok(()),
    }
}

/// Ends what is left of a run of ours, and unmounts.
fn end_alone(store: &Store, container: &ContainerRecord, keep_mounted: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    if keep_mounted {
        kill_left(&run_dir)?;
        if let Some(mounted) = mounted(store, container)? {
            let dir = mount_point::writable_dir(&run_dir, &mounted.dir)?;
            scaffold::take_away(store, container, &dir)?;
        }
        mount_point::end_inner(&run_dir)?;
        return forget(&run_dir);
    }
    kill_left(&run_dir)?;
    unmount_ended(store, container, false)
}

/// Starts the runtime on the bundle and waits for it.
fn supervise(
    foreground: &Foreground,
    run_dir: &RunDir,
    mut owner: Owner,
    rootfs: &Path,
    whose: Whose<'_>,
) -> Result<Ended> {
    let oci = run_dir.oci();
    let runtime = owner.runtime(run_dir);
    let log = oci.join("log");
    let mut command = logged(&runtime, &log);
    command
        .args(["run", "--bundle"])
        .arg(&oci)
        .arg("--pid-file")
        .arg(oci.join("pid"))
        .arg(&owner.id);
    match whose {
        Whose::Own(Some(background)) => background.stdio(&mut command)?,
        Whose::Traced(_) => drop(command.stdin(Stdio::null()).stdout(std::io::stderr())),
        Whose::Own(None) | Whose::Another => {}
    }
    let mut child = runtime.spawn(&mut command, Some(rootfs))?;
    let noted = Identity::of(child.id() as i32).and_then(|runner| {
        owner.runner = runner;
        owner.write(run_dir)
    });
    if let Whose::Own(Some(background)) = whose {
        background.tell_when_it_runs(&mut child, &owner, run_dir)?;
    }
    let mut end = match whose {
        Whose::Traced(Traced { limit: Some(limit) }) => Some(End::after(limit, &owner, run_dir)),
        Whose::Traced(_) | Whose::Own(_) | Whose::Another => None,
    };
    let status = foreground.wait(&mut child, |child| {
        end.as_mut().map_or(Ok(()), |end| end.look(child))
    })?;
    noted?;
    Ok(ended(status, &log))
}

fn logged(runtime: &Runtime, log: &Path) -> Command {
    let mut command = runtime.command();
    // By its name alone: crun takes what stands before a colon in a path for a kind of log.
    if let (Some(dir), Some(name)) = (log.parent(), log.file_name()) {
        command.current_dir(dir).arg("--log").arg(name);
    }
    command.args(["--log-format", "json"]);
    command
}

/// Tells the command's exit status from a failure of the runtime.
fn ended(status: u8, log: &Path) -> Ended {
    match runtime::logged_failure(log).filter(|_| status != 0) {
        Some(failure) => Ended {
            status: runtime::status_of_failure(&failure),
            failure: Some(Failure::Runtime {
                why: failure,
                said: true,
            }),
        },
        None => Ended {
            status,
            failure: None,
        },
    }
}

/// Runs a command in a container that is there, in the foreground: beside what runs in it, in its
/// namespaces; or, where nothing does, alone, mounted for as long as it takes.
///
/// # Errors
/// As [`run`]; [`ErrorKind::InUse`] while the container starts or stops.
pub fn exec(store: &Store, name: &str, options: &CommandOptions) -> Result<Ended> {
    let mut container = store.container(name)?;
    if options.command.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "there is no command: give one after the container",
        ));
    }
    let config = &mut container.config.config;
    if let Some(workdir) = &options.workdir {
        config.working_dir.clone_from(workdir);
    }
    if let Some(user) = &options.user {
        config.user.clone_from(user);
    }
    let mut looks = ENTER_LOOKS;
    let vacant = loop {
        if let Some(ended) = join(store, &container, options)? {
            return Ok(ended);
        }
        looks -= 1;
        match vacant(store, &container) {
            // What a killed command had begun to start runs only now: then it is joined.
            Err(error) if error.kind() == ErrorKind::InUse && looks > 0 => {
                std::thread::sleep(ENTER_PAUSE);
            }
            vacant => break vacant?,
        }
    };
    let start = Start {
        args: options.command.clone(),
        env: options.env.clone(),
        terminal: options.terminal,
        program: runtime::find()?,
    };
    run_alone(store, vacant, &start, Whose::Another)
}

/// Runs a command beside what runs in the container; `None` where nothing does, or it ended before the
/// command could begin.
fn join(
    store: &Store,
    container: &ContainerRecord,
    options: &CommandOptions,
) -> Result<Option<Ended>> {
    let run_dir = store.run_dir(container);
    let mut refused: Option<Ended> = None;
    for _ in 0..ENTER_LOOKS {
        if !runs(&run_dir)? {
            return Ok(None);
        }
        if refused.as_ref().is_none_or(is_absence) {
            let ended = exec_beside(store, container, options)?;
            let began = !matches!(ended.failure, Some(Failure::Runtime { .. }));
            if began || ended.status != FAILURE {
                return Ok(Some(ended));
            }
            refused = Some(ended);
        }
        // A runtime fails in many ways to enter what is ending.
        std::thread::sleep(ENTER_PAUSE);
    }
    Ok(refused)
}

/// True where the runtime did not find what runs.
fn is_absence(ended: &Ended) -> bool {
    matches!(&ended.failure, Some(Failure::Runtime { why, .. }) if runtime::is_absence(why))
}

/// Whether something runs in the container that another command can join.
fn runs(run_dir: &RunDir) -> Result<bool> {
    let runs = matches!(settled_activity(run_dir)?, Activity::Running { .. });
    Ok(runs && can_be_entered(run_dir)?)
}

/// Waits until the runtime has noted what it started; false where that has ended meanwhile.
fn can_be_entered(run_dir: &RunDir) -> Result<bool> {
    let Some(owner) = Owner::read(run_dir)? else {
        return Ok(false);
    };
    let lives = || Ok(owner.process(run_dir)?.is_some());
    owner.runtime(run_dir).wait_for(&owner.id, lives)?;
    lives()
}

fn exec_beside(
    store: &Store,
    container: &ContainerRecord,
    options: &CommandOptions,
) -> Result<Ended> {
    let run_dir = store.run_dir(container);
    let gone = || {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "the command in {} has just ended: try again",
                container.name
            ),
        )
    };
    let owner = Owner::read(&run_dir)?.ok_or_else(gone)?;
    let rootfs = mounted(store, container)?.ok_or_else(gone)?.dir;
    let config = &container.config.config;
    let who = user::resolve(&rootfs, &config.user)?;
    let env = spec::environment(
        &host_name(container),
        options.terminal,
        &who.home,
        &config.env,
        &options.env,
    );
    let cwd = absolute(&config.working_dir);
    if let Some(init) = owner.init(&run_dir)? {
        // As its first process sees them, with all that is mounted there.
        let root = PathBuf::from(format!("/proc/{}/root", init.pid));
        let files = Files {
            root: &root,
            binds: &[],
        };
        if let Some(no) = executable::check(&files, &options.command, &env, &cwd) {
            return Ok(no.into());
        }
    }
    let process = spec::process(&ProcessPlan {
        args: options.command.clone(),
        env,
        cwd,
        who,
        terminal: options.terminal,
        capabilities: capabilities::of(&container.confinement)?,
        no_new_privileges: container.confinement.no_new_privileges,
    })?;
    let files = ExecFiles::new(&run_dir.oci());
    write_json(&files.process, &process)?;
    let runtime = owner.runtime(&run_dir);
    let mut command = logged(&runtime, &files.log);
    command
        .args(["exec", "--process"])
        .arg(&files.process)
        .arg("--pid-file")
        .arg(&files.pid)
        .arg(&owner.id);
    let foreground = Foreground::new()?;
    interrupt::check()?;
    let mut child = runtime.spawn(&mut command, Some(&rootfs))?;
    let status = foreground.wait(&mut child, |_| Ok(()))?;
    let ended = ended(status, &files.log);
    if ended.failure.is_none() && status == runtime::ITS_OWN_FAILURE && !files.pid.exists() {
        return Ok(Ended {
            status: runtime::FAILURE,
            failure: Some(Failure::Runtime {
                why: format!(
                    "{} failed before it began, and did not say why",
                    runtime.program.display()
                ),
                said: false,
            }),
        });
    }
    Ok(ended)
}

/// The files of one `exec`, gone with it.
struct ExecFiles {
    process: PathBuf,
    log: PathBuf,
    /// Where the runtime notes the command's process before it ends with the command's status.
    pid: PathBuf,
}

impl ExecFiles {
    fn new(oci: &Path) -> Self {
        let base = oci.join(format!("exec-{}", Uuid::new_v4()));
        ExecFiles {
            process: base.with_extension("json"),
            log: base.with_extension("log"),
            pid: base.with_extension("pid"),
        }
    }
}

impl Drop for ExecFiles {
    fn drop(&mut self) {
        // Whoever cleans up after the container removes what stays.
        for file in [&self.process, &self.log, &self.pid] {
            let _ = fs::remove_file(file);
        }
    }
}
