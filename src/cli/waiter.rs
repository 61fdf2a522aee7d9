//! The hidden `vellum waiter`: docs/operations.md, "Containers in the background".

use std::path::PathBuf;

use uuid::Uuid;

use super::Context;
use super::transport::TransportArgs;
use vellum_base::error::{Result, ResultExt};
use vellum_engine::run::waiter::{WaiterOptions, attend_in_background};

/// Arguments of `waiter`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The OCI runtime
    #[arg(long, value_name = "PROGRAM")]
    runtime: PathBuf,
    /// The container was made for this
    #[arg(long)]
    new: bool,
    /// Remove the container when its command has ended
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    transport: TransportArgs,
    /// The container's id
    id: Uuid,
    /// Its name at this moment
    name: String,
}

/// Goes into the background, for whoever started it to go on, and waits.
pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    nix::unistd::daemon(false, true).context(|| "the waiter cannot go into the background")?;
    args.transport.choose();
    let options = WaiterOptions {
        program: args.runtime.clone(),
        is_new: args.new,
        remove: args.rm,
    };
    attend_in_background(&context.store()?, args.id, args.name.clone(), options)
}
