//! `vellum volume ls` and `vellum volume rm NAME…`

use super::Context;
use vellum_base::error::Result;
use vellum_store::Store;

/// Arguments of `volume`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List named volumes
    Ls,
    /// Remove named volumes with all that is in them
    Rm {
        /// The volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    match &args.action {
        Action::Ls => context.out.print(&store.volumes()?, |volumes| {
            volumes.iter().map(|name| format!("{name}\n")).collect()
        }),
        Action::Rm { names } => super::remove::each(names, context, |name| {
            store.remove_volume(name, &users(&store, name)?)
        }),
    }
}

/// The containers that have a volume.
fn users(store: &Store, volume: &str) -> Result<Vec<String>> {
    let containers = store.containers()?.into_iter();
    Ok(containers
        .filter(|container| container.volumes.iter().any(|mount| mount.source == volume))
        .map(|container| container.name)
        .collect())
}
