//! A container's own command: kept with the container, and run to its end.

use std::path::PathBuf;

use super::alone::{Whose, run_alone, vacant};
use super::bundle::Start;
use super::waiter::Background;
use super::{Ended, RunOptions, Traced, check_confinement, check_volumes, runtime, spec};
use crate::teardown::{self, RemoveOptions};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_store::{ContainerRecord, NewContainer, Store};

/// Makes a container that runs a command when it is started, and nothing of it yet.
///
/// # Errors
/// As [`Store::create_container`]; as [`check_confinement`].
pub fn make(
    store: &Store,
    new: &NewContainer<'_>,
    options: &RunOptions,
) -> Result<ContainerRecord> {
    check_volumes(&new.volumes)?;
    check_confinement(&new.confinement)?;
    let mut container = store.create_container(new)?;
    configure(store, &mut container, options)?;
    Ok(container)
}

/// Has a container, and commands that are run in it later, get what the options say.
fn configure(store: &Store, container: &mut ContainerRecord, options: &RunOptions) -> Result<()> {
    let config = &mut container.config.config;
    let command = &options.command;
    spec::merge_env(&mut config.env, &command.env);
    if let Some(workdir) = &command.workdir {
        config.working_dir.clone_from(workdir);
    }
    if let Some(user) = &command.user {
        config.user.clone_from(user);
    }
    if let Some(program) = &options.entrypoint {
        // Another entry point has other arguments.
        config.entrypoint = [program.clone()]
            .into_iter()
            .filter(|p| !p.is_empty())
            .collect();
        config.cmd.clear();
    }
    if !command.command.is_empty() {
        config.cmd.clone_from(&command.command);
    }
    store.configure_container(container)
}

/// Makes a container, runs its command in the foreground, and unmounts it. While it runs, the
/// signals of the calling thread go on to the command.
///
/// A container whose command could not be started is removed again.
///
/// # Errors
/// [`ErrorKind::Missing`] without an OCI runtime; as [`make`] and
/// [`crate::mount::mount`]; [`ErrorKind::NotFound`] for a user that the image does not have.
pub fn run(store: &Store, new: &NewContainer<'_>, options: &RunOptions) -> Result<Ended> {
    let program = runtime::find()?;
    let container = make(store, new, options)?;
    let attend = Attend {
        program,
        is_new: true,
        remove: options.remove,
        terminal: options.command.terminal,
        background: None,
    };
    attend_to(store, &container, attend)
}

/// Runs the command of a container that is there, in the foreground, and unmounts it.
///
/// # Errors
/// As [`run`]; [`ErrorKind::InUse`] while something runs in it.
pub fn start(store: &Store, name: &str, terminal: bool) -> Result<Ended> {
    let attend = Attend {
        program: runtime::find()?,
        is_new: false,
        remove: false,
        terminal,
        background: None,
    };
    attend_to(store, &store.container(name)?, attend)
}

/// Runs a command in a container that was just made for a trace, and removes that.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_for_a_trace(
    store: &Store,
    mut container: ContainerRecord,
    options: &RunOptions,
    traced: Traced,
) -> Result<Ended> {
    let run = |program| {
        configure(store, &mut container, options)?;
        let start = Start {
            args: own_command(&container)?,
            env: Vec::new(),
            terminal: false,
            program,
        };
        let vacant = vacant(store, &container)?;
        run_alone(store, vacant, &start, Whose::Traced(traced))
    };
    let ended = runtime::find().and_then(run);
    let removed = remove_again(store, &container);
    let ended = ended?;
    removed?;
    Ok(ended)
}

/// How a container's command is run, and what becomes of the container.
pub(super) struct Attend {
    /// The OCI runtime.
    pub(super) program: PathBuf,
    /// It was made for that: removed where the command could not be started.
    pub(super) is_new: bool,
    /// Removed when it has ended.
    pub(super) remove: bool,
    pub(super) terminal: bool,
    pub(super) background: Option<Background>,
}

/// Runs a container's own command to its end.
pub(super) fn attend_to(
    store: &Store,
    container: &ContainerRecord,
    attend: Attend,
) -> Result<Ended> {
    let Attend {
        program,
        is_new,
        remove,
        terminal,
        background,
    } = attend;
    let ended = own_command(container).and_then(|args| {
        let start = Start {
            args,
            env: Vec::new(),
            terminal,
            program,
        };
        let vacant = vacant(store, container)?;
        run_alone(store, vacant, &start, Whose::Own(background.as_ref()))
    });
    let started = matches!(&ended, Ok(ended) if ended.failure.is_none());
    if remove || (is_new && !started) {
        match remove_again(store, container) {
            // What the command said by its status is not lost over a copy of its files.
            Err(error) if started && error.kind() == ErrorKind::InUse => {
                tracing::warn!("{error}: it is not removed");
            }
            Err(error) if started => return Err(error),
            _ => {}
        }
    }
    ended
}

/// What a container runs when it is started.
pub(super) fn own_command(container: &ContainerRecord) -> Result<Vec<String>> {
    let config = &container.config.config;
    let args: Vec<String> = config
        .entrypoint
        .iter()
        .chain(&config.cmd)
        .cloned()
        .collect();
    if args.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the image {} names no command: give one after the image",
                container.image
            ),
        ));
    }
    Ok(args)
}

pub(super) fn remove_again(store: &Store, container: &ContainerRecord) -> Result<()> {
    // Also where a signal asked us to end.
    let _held = interrupt::hold();
    // Somebody may have removed it meanwhile, or renamed it.
    match store.find_container(&container.into()) {
        Ok(there) => teardown::remove(store, &there.name, RemoveOptions::default()).map(drop),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
