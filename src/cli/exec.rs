//! `vellum exec C -- CMD…`

use std::process::ExitCode;

use super::Context;
use super::run::{ProcessArgs, exit};
use vellum_engine::run;

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
In a container that runs, the command joins what runs there. One that does not run is mounted for as \
long as the command takes, with its volumes, and the command runs alone in it.

Exit status: as that of `vellum run`.")]
pub(super) struct Args {
    /// The container
    container: String,
    #[command(flatten)]
    process: ProcessArgs,
    /// The command
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> ExitCode {
    exit(
        args.process
            .options(&args.command)
            .and_then(|options| run::exec(&context.store_to_change()?, &args.container, &options)),
    )
}
