//! `vellum completions SHELL`, and the manual page.

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use super::output::{write_out, written};
use vellum_base::error::Result;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vellum", &mut script);
    write_out(&script)
}

pub(super) fn man() -> Result<()> {
    written(|out| clap_mangen::Man::new(Cli::command()).render(out))
}
