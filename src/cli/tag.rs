//! `vellum tag IMAGE NAME`

use super::Context;
use vellum_base::error::Result;

/// Arguments of `tag`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    #[arg(add = super::completions::images())]
    image: String,
    /// Its further name
    name: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let image = store.tag_image(&args.image, &args.name)?;
    context
        .out
        .print(&image, |image| format!("{}\n", image.name))
}
