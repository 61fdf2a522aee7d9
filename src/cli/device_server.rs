//! The hidden subcommand behind mounts: one process a device.

use std::path::Path;

use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::device::{Target, served_stats};
use vellum_engine::trace::Recorder;
use vellum_export::device::{SupervisorArgs, supervise};
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRef, Store};

/// Arguments of `device-server`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    which: Which,
    /// The container's id, by which it is found whatever its name is by now
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
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

impl Args {
    fn target(&self, store: &Store, run_dir: &RunDir) -> Result<Target> {
        let which = &self.which;
        let container = |name: &String| container(store, name, self.id, run_dir);
        let names = (&which.container, &which.look);
        Ok(match (names, which.staged, which.layer, which.sealed) {
            ((Some(name), _), ..) => Target::Container(container(name)?),
            ((_, Some(name)), ..) => Target::Look(container(name)?),
            (_, Some(layer), ..) => Target::Staged(layer),
            (_, _, Some(layer), _) => Target::Layer(layer),
            (.., Some(layer)) => Target::Sealed(layer),
            (.., None) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "it is not said what to serve",
                ));
            }
        })
    }
}

/// The container of that name, or by now of another. A server that an earlier version started was told
/// no id: that of a mount has it by its run directory.
fn container(
    store: &Store,
    name: &str,
    id: Option<Uuid>,
    run_dir: &RunDir,
) -> Result<ContainerRef> {
    let named = |id| ContainerRef {
        id,
        name: name.to_owned(),
    };
    if let Some(id) = id {
        return Ok(named(id));
    }
    if let Some(mounted) = run_dir.id().map(named)
        && store.find_container(&mounted).is_ok()
    {
        return Ok(mounted);
    }
    Ok((&store.container(name)?).into())
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
    supervise(&args.supervisor, &|memory, run_dir| {
        let store = Store::open(root_of(run_dir)?)?;
        let target = args.target(&store, run_dir)?;
        let stats = served_stats(memory)?;
        let open = target.open_counted(&store, stats)?;
        if let Target::Container(container) = &target
            && let Some(recorder) = Recorder::open(&store.runs().trace(container.id))?
        {
            open.chain().tell_touches(Box::new(recorder));
        }
        if let Target::Layer(_) | Target::Container(_) = target {
            // Which is mounted at once.
            open.prepare_journal();
        }
        Ok(open.into_served())
    })
}
