//! The hidden subcommand behind mounts: one process a device.

use std::path::Path;

use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::device::{Target, served_stats};
use vellum_export::device::{SupervisorArgs, supervise};
use vellum_fs::run_dir::RunDir;
use vellum_store::Store;

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
    /// A container's chain as it was closed, read-only
    #[arg(long, value_name = "NAME")]
    look: Option<String>,
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

/// The root of the store that a run directory lies in: where it is now, not where it was when the device
/// was attached.
fn root_of(run_dir: &RunDir) -> Result<&Path> {
    run_dir.store_root().ok_or_else(|| {
        let text = format!("{run_dir} is not in a store");
        Error::new(ErrorKind::InvalidInput, text)
    })
}

pub(super) fn run(args: &Args) -> Result<()> {
    super::limits::lift_size_limit();
    let which = &args.which;
    let names = (&which.container, &which.look);
    let target = match (names, which.staged, which.layer, which.sealed) {
        ((Some(name), _), ..) => Target::Container(name.clone()),
        ((_, Some(name)), ..) => Target::Look(name.clone()),
        (_, Some(layer), ..) => Target::Staged(layer),
        (_, _, Some(layer), _) => Target::Layer(layer),
        (.., Some(layer)) => Target::Sealed(layer),
        (.., None) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "it is not said what to serve",
            ));
        }
    };
    supervise(&args.supervisor, &|memory, run_dir| {
        let store = Store::open(root_of(run_dir)?)?;
        let stats = served_stats(memory)?;
        let open = target.open_counted(&store, stats)?;
        if let Target::Layer(_) = target {
            // Which is mounted at once.
            open.prepare_journal();
        }
        Ok(open.into_served())
    })
}
