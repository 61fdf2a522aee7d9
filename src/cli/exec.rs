//! `vellum exec C CMD…`

use std::process::ExitCode;

use super::Context;
use super::run::{ProcessArgs, TerminalArgs, exit};
use vellum_base::error::Result;
use vellum_engine::run::{self, Ended};

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
In a container that runs, the command joins what runs there. One that does not run is mounted for as \
long as the command takes, with its volumes, and the command runs alone in it.

Exit status: as that of `vellum run`.")]
pub(super) struct Args {
    /// The container
    #[arg(add = super::completions::containers())]
    container: String,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    terminal: TerminalArgs,
    /// The command
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> ExitCode {
    exit(start(args, context))
}

fn start(args: &Args, context: &Context) -> Result<Ended> {
    let mut options = args.process.options(&args.command)?;
    options.terminal = args.terminal.wanted()?;
    run::exec(&context.store_to_change()?, &args.container, &options)
}
