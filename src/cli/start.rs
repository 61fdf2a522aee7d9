//! `vellum start C…`, `stop C…`, `kill C…` and `wait C…`

use std::process::ExitCode;
use std::time::Duration;

use super::Context;
use super::output::complain;
use super::remove::each;
use super::run::{TerminalArgs, exit};
use super::transport::TransportArgs;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_engine::run::waiter::start_in_background;
use vellum_engine::run::{self, Failure, StopSignal};

/// Arguments of `start`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status with -a: as that of `vellum run`.")]
pub(super) struct StartArgs {
    /// The containers; one that runs already is fine
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
    /// Run it in the foreground, as `run` does, and end with its exit status; of one container
    #[arg(short, long)]
    attach: bool,
    #[command(flatten)]
    terminal: TerminalArgs,
    #[command(flatten)]
    transport: TransportArgs,
}

/// Arguments of `stop`.
#[derive(Debug, clap::Args)]
pub(super) struct StopArgs {
    /// The containers; one that does not run is fine
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
    /// Seconds until what has not ended is killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
    /// What it is asked with, like TERM or 15 [default: what the image names, or TERM]
    #[arg(short, long, value_name = "SIGNAL")]
    signal: Option<StopSignal>,
}

/// Arguments of `kill`.
#[derive(Debug, clap::Args)]
pub(super) struct KillArgs {
    /// The containers
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
    /// Which signal, like HUP or 1
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    signal: StopSignal,
}

/// Arguments of `wait`.
#[derive(Debug, clap::Args)]
pub(super) struct WaitArgs {
    /// The containers; of one that has ended, how it did
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
}

pub(super) fn start(args: &StartArgs, context: &Context) -> ExitCode {
    args.transport.choose();
    match (
        args.attach || args.terminal.is_asked_for(),
        &*args.containers,
    ) {
        (true, [name]) => {
            let start = || {
                let terminal = args.terminal.wanted()?;
                run::start(&context.store_to_change()?, name, terminal)
            };
            exit(start())
        }
        (true, _) => exit(Err(Error::new(
            ErrorKind::InvalidInput,
            "-a, -i and -t are for one container: leave them out, or name one",
        ))),
        (false, names) => match start_each(names, args, context) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                interrupt::exit_status().map_or(ExitCode::FAILURE, ExitCode::from)
            }
        },
    }
}

fn start_each(names: &[String], args: &StartArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    each(names, context, |name| {
        let ended = start_in_background(&store, name, &args.transport.arguments())?;
        match ended.and_then(|ended| ended.failure) {
            None => Ok(()),
            Some(Failure::NoProgram(why) | Failure::Runtime { why, .. }) => {
                Err(Error::new(ErrorKind::Command, format!("{name}: {why}")))
            }
        }
    })
}

pub(super) fn stop(args: &StopArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let grace = Duration::from_secs(args.time.into());
    each(&args.containers, context, |name| {
        if !run::stop(&store, name, args.signal, grace)? {
            context.out.note(&format!("nothing runs in {name}"));
        }
        Ok(())
    })
}

pub(super) fn kill(args: &KillArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    each(&args.containers, context, |name| {
        run::kill(&store, name, args.signal)
    })
}

pub(super) fn wait(args: &WaitArgs, context: &Context) -> Result<()> {
    let store = context.store()?;
    for name in &args.containers {
        let status = run::wait(&store, name)?;
        context.out.print(&status, |status| format!("{status}\n"))?;
    }
    Ok(())
}
