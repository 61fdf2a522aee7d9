//! A command in a container that is there: beside what runs in it, or alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::activity::{Activity, Owner, settled_activity};
use super::alone::{Whose, run_alone, vacant};
use super::bundle::{Start, absolute, host_name, write_json};
use super::executable::{self, Files};
use super::foreground::Foreground;
use super::spec::{self, ProcessPlan};
use super::{CommandOptions, Ended, FAILURE, Failure, capabilities, ended, logged, runtime, user};
use crate::mount_point::mounted;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// How often it is looked whether a container that a command could not join still runs.
const ENTER_LOOKS: usize = 10;
const ENTER_PAUSE: Duration = Duration::from_millis(50);

/// Runs a command in a container that is there, in the foreground: beside what runs in it, in its
/// namespaces; or, where nothing does, alone, mounted for as long as it takes.
///
/// # Errors
/// As [`super::run`]; [`ErrorKind::InUse`] while the container starts or stops.
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
pub(super) fn can_be_entered(run_dir: &RunDir) -> Result<bool> {
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
            status: FAILURE,
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
