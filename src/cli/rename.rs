//! `vellum rename C NAME`

use super::Context;
use vellum_base::error::Result;
use vellum_engine::rename::rename;

/// Arguments of `rename`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not, running or not
    #[arg(add = super::completions::containers())]
    container: String,
    /// Its new name
    name: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let container = rename(&store, &args.container, &args.name)?;
    context
        .out
        .print(&container, |container| format!("{}\n", container.name))
}
