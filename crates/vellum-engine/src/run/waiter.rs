//! The waiter of a container in the background: a process that does what `vellum run` does in the foreground,
//! and keeps what the command writes. docs/operations.md says what happens when it is killed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::activity::{Activity, Owner, activity};
use super::attend::{Attend, attend_to, make, own_command, remove_again};
use super::output::Output;
use super::runtime;
use super::{Ended, Failure, RunOptions};
use crate::teardown::{self, RemoveOptions};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt::{self, Interruptible};
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, ContainerRef, NewContainer, Store};

/// The subcommand that is a waiter.
pub const WAITER_COMMAND: &str = "waiter";
/// How long a runtime may take to execute the command, once it has the container.
const BEGINS_WITHIN: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// What a waiter tells whoever started it, on one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    /// The command runs, or has run.
    Began,
    /// It was none that can be started.
    NotStarted { status: u8, why: String },
    /// Something failed before.
    Failed(String),
}

/// What a waiter is told.
#[derive(Debug, Clone)]
pub struct WaiterOptions {
    /// The OCI runtime.
    pub program: PathBuf,
    /// The container was made for this run: it is removed where the command cannot be started.
    pub is_new: bool,
    /// It is removed when the command has ended.
    pub remove: bool,
}

/// Makes a container and runs its command in the background. Returns once it has begun: the container, or how
/// it could not be started; then the container is removed again.
///
/// `more` are options of the waiter that are not the run's.
///
/// # Errors
/// As [`super::run`].
pub fn run_in_background(
    store: &Store,
    new: &NewContainer<'_>,
    options: &RunOptions,
    more: &[OsString],
) -> Result<std::result::Result<ContainerRecord, Ended>> {
    let waiter = WaiterOptions {
        program: runtime::find()?,
        is_new: true,
        remove: options.remove,
    };
    let container = make(store, new, options)?;
    match start_waiter(store, &container, &waiter, more) {
        Ok(None) => Ok(Ok(container)),
        Ok(Some(ended)) => Ok(Err(ended)),
        Err(error) => {
            if error.kind() == ErrorKind::Interrupted {
                let _held = interrupt::hold();
                let force = RemoveOptions {
                    force: true,
                    ..RemoveOptions::default()
                };
                // Of two failures the first is what matters.
                let _ = teardown::remove(store, &container.name, force);
            }
            Err(error)
        }
    }
}

/// Runs the command of a container that is there in the background. `None` once it has begun, or where it runs
/// already; else how it could not be started.
///
/// # Errors
/// As [`super::start`].
pub fn start_in_background(store: &Store, name: &str, more: &[OsString]) -> Result<Option<Ended>> {
    let container = store.container(name)?;
    if let Activity::Running { .. } = activity(store, &container)? {
        return Ok(None);
    }
    let waiter = WaiterOptions {
        program: runtime::find()?,
        is_new: false,
        remove: false,
    };
    start_waiter(store, &container, &waiter, more)
}

fn start_waiter(
    store: &Store,
    container: &ContainerRecord,
    options: &WaiterOptions,
    more: &[OsString],
) -> Result<Option<Ended>> {
    let what = || format!("the waiter of {} cannot be started", container.name);
    if let Err(error) = own_command(container) {
        if options.is_new {
            remove_again(store, container)?;
        }
        return Err(error);
    }
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("@vellum-waiter")
        .arg("--root")
        .arg(store.root())
        .arg(WAITER_COMMAND)
        .args(more)
        .arg("--runtime")
        .arg(&options.program)
        .args(options.is_new.then_some("--new"))
        .args(options.remove.then_some("--rm"))
        .arg(container.id.to_string())
        .arg(&container.name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/");
    let mut child = command.spawn().context(what)?;
    let told = child.stdout.take();
    // It goes into the background at once, and the child with it.
    child.wait().context(what)?;
    let told = told.ok_or_else(|| Error::internal("a waiter without standard output"))?;
    let mut line = String::new();
    let told = std::os::fd::OwnedFd::from(told);
    BufReader::new(Interruptible(File::from(told)))
        .read_line(&mut line)
        .context(what)?;
    match serde_json::from_str(&line) {
        Ok(Told::Began) => Ok(None),
        Ok(Told::NotStarted { status, why }) => Ok(Some(Ended {
            status,
            failure: Some(Failure::NoProgram(why)),
        })),
        Ok(Told::Failed(why)) => Err(Error::new(ErrorKind::Command, why)),
        Err(_) => Err(Error::new(
            ErrorKind::Command,
            format!(
                "{}: it ended without a word (see `vellum logs {}`)",
                what(),
                container.name
            ),
        )),
    }
}

/// Runs the command of a container to its end, in the process that is its waiter. Whoever started it is told on
/// standard output how it begins.
///
/// # Errors
/// As [`super::run`], for the log: whoever started it has been told.
pub fn attend_in_background(
    store: &Store,
    id: Uuid,
    name: String,
    options: WaiterOptions,
) -> Result<()> {
    let ended = store
        .find_container(&ContainerRef { id, name })
        .and_then(|container| {
            let attend = Attend {
                program: options.program,
                is_new: options.is_new,
                remove: options.remove,
                terminal: false,
                background: Some(Background {
                    output: Output::begin(store, &container)?,
                }),
            };
            attend_to(store, &container, attend)
        });
    tell(&match &ended {
        Ok(Ended { status, failure }) => match failure {
            None => Told::Began,
            Some(Failure::NoProgram(why)) => Told::NotStarted {
                status: *status,
                why: why.clone(),
            },
            Some(Failure::Runtime { why, .. }) => Told::NotStarted {
                status: *status,
                why: format!("the command could not be started: {why}"),
            },
        },
        Err(error) => Told::Failed(error.to_string()),
    });
    ended.map(drop)
}

/// Tells whoever started this process, once: afterwards nobody listens.
fn tell(told: &Told) {
    // Nobody may be there any more, and what was to be told is in the container's record.
    if let Ok(mut line) = serde_json::to_vec(told) {
        line.push(b'\n');
        let _ = std::io::stdout().write_all(&line);
        let _ = std::io::stdout().flush();
    }
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
    }
}

/// What a command in the background has instead of a terminal and somebody who looks at it.
pub(super) struct Background {
    output: Output,
}

impl Background {
    /// Has the command write to the log, and read nothing.
    pub(super) fn stdio(&self, command: &mut Command) -> Result<()> {
        let pipe = |pipe: &std::os::fd::OwnedFd| {
            let pipe = pipe.try_clone();
            pipe.context(|| "the log of a command cannot be begun")
        };
        command
            .stdin(Stdio::null())
            .stdout(pipe(&self.output.stdout)?)
            .stderr(pipe(&self.output.stderr)?);
        Ok(())
    }

    /// Says that the command has begun once its program is executed; of one that ends before, its end says what
    /// there is to be said.
    pub(super) fn tell_when_it_runs(
        &self,
        runner: &mut Child,
        owner: &Owner,
        run_dir: &RunDir,
    ) -> Result<()> {
        let deadline = Instant::now() + BEGINS_WITHIN;
        loop {
            if runner
                .try_wait()
                .context(|| "cannot wait for the command")?
                .is_some()
            {
                return Ok(());
            }
            if owner.executes_its_program(run_dir)? || Instant::now() > deadline {
                tell(&Told::Began);
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
    }
}
