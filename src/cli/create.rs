//! `vellum create IMAGE`

use super::Context;
use super::confinement::ConfinementArgs;
use vellum_base::error::Result;
use vellum_base::size::parse_bytes;
use vellum_fs::ext4::Atime;
use vellum_store::NewContainer;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    image: String,
    /// The container's name [default: made from the image's]
    #[arg(long)]
    name: Option<String>,
    /// Virtual size, not smaller than the image's; the file system grows at the first mount
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: Option<u64>,
    /// When reads change the access times of its files [default: noatime]
    #[arg(long, value_name = "WHEN", value_enum)]
    atime: Option<Atime>,
    #[command(flatten)]
    confinement: ConfinementArgs,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let container = context.store_to_change()?.create_container(&NewContainer {
        image: &args.image,
        name: args.name.as_deref(),
        virtual_size: args.size,
        volumes: Vec::new(),
        atime: args.atime,
        confinement: args.confinement.confinement()?,
    })?;
    context
        .out
        .print(&container, |container| format!("{}\n", container.name))
}
