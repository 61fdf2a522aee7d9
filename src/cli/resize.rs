//! `vellum resize C SIZE`

use super::Context;
use super::output::human_size;
use vellum_base::crash_point;
use vellum_base::error::Result;
use vellum_base::size::parse_bytes;
use vellum_engine::resize::resize;

/// Arguments of `resize`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not, running or not
    #[arg(add = super::completions::containers())]
    container: String,
    /// Its new virtual size, not smaller than it is
    #[arg(value_name = "SIZE", value_parser = parse_bytes)]
    size: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let store = context.store_to_change()?;
    let resized = resize(&store, &args.container, args.size)?;
    context.out.print(&resized, |resized| {
        format!(
            "resized {} from {} to {}\n",
            resized.name,
            human_size(resized.before),
            human_size(resized.size)
        )
    })
}
