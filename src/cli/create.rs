//! `vellum create IMAGE`

use super::Context;
use super::run::MadeArgs;
use vellum_base::error::Result;
use vellum_engine::run::make;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    made: MadeArgs,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let made = &args.made;
    let (new, options) = (made.container(made.image())?, made.options()?);
    let container = make(&context.store_to_change()?, &new, &options)?;
    context
        .out
        .print(&container, |container| format!("{}\n", container.name))
}
