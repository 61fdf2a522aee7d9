//! `vellum completions SHELL`, and the manual page.

use std::io;

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use crate::error::{Result, ResultExt};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    clap_complete::generate(args.shell, &mut Cli::command(), "vellum", &mut io::stdout());
    Ok(())
}

pub(super) fn man() -> Result<()> {
    clap_mangen::Man::new(Cli::command())
        .render(&mut io::stdout())
        .context(|| "cannot write to standard output")
}
