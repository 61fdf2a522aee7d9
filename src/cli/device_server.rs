//! The hidden subcommand behind mounts: one process a device.

use std::path::Path;

use uuid::Uuid;

use crate::engine::device::{Target, served_stats};
use crate::error::Result;
use crate::export::device::{SupervisorArgs, supervise};
use crate::store::Store;

/// Arguments of `device-server`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    supervisor: SupervisorArgs,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// A container's chain, writable
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// A layer that is being made, on its parents
    #[arg(long, value_name = "UUID")]
    staged: Option<Uuid>,
    /// A published layer on its parents
    #[arg(long, value_name = "UUID")]
    layer: Option<Uuid>,
    /// A sealed layer on its parents, read-only
    #[arg(long, value_name = "UUID")]
    sealed: Option<Uuid>,
}

pub(super) fn run(args: &Args, root: &Path) -> Result<()> {
    let which = &args.which;
    let target = match (&which.container, which.staged, which.layer, which.sealed) {
        (Some(name), ..) => Target::Container(name.clone()),
        (_, Some(layer), ..) => Target::Staged(layer),
        (_, _, Some(layer), _) => Target::Layer(layer),
        (.., layer) => Target::Sealed(layer.unwrap_or_default()),
    };
    supervise(&args.supervisor, &|memory| {
        let store = Store::open_or_create(root)?;
        let stats = served_stats(memory)?;
        let open = target.open_counted(&store, stats)?;
        if let Target::Layer(_) = target {
            // Which is mounted at once.
            open.prepare_journal();
        }
        Ok(open.into_served())
    })
}
