//! `vellum merge C` and `vellum flatten IMAGE NEW`

use super::Context;
use super::bar::Bar;
use super::output::{counted, human_size};
use vellum_base::crash_point;
use vellum_base::error::Result;
use vellum_engine::merge::{MergeReport, flatten, merge};

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
pub(super) struct MergeArgs {
    /// The container, in use or not
    #[arg(add = super::completions::containers())]
    container: String,
    /// Keep these snapshots, with commas in between, and remove the others [default: all stay]
    #[arg(long, value_name = "LIST", value_delimiter = ',', num_args = 0..)]
    keep: Option<Vec<String>>,
}

/// Arguments of `flatten`.
#[derive(Debug, clap::Args)]
pub(super) struct FlattenArgs {
    /// The image
    #[arg(add = super::completions::images())]
    image: String,
    /// The new image's name
    new: String,
}

pub(super) fn run(args: &MergeArgs, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let store = context.store_to_change()?;
    let watch = Bar::new(context.out, "joining");
    let report = merge(&store, &args.container, args.keep.as_deref(), &watch)?;
    context.out.print(&report, |report| summary(args, report))?;
    for name in &report.later {
        context.out.note(&format!(
            "{name} goes on with the layers that it has open: their space comes back once it is mounted again"
        ));
    }
    Ok(())
}

fn summary(args: &MergeArgs, report: &MergeReport) -> String {
    let before: usize = report.joined.iter().map(|joined| joined.layers.len()).sum();
    let after = report.joined.len();
    match after {
        0 => format!(
            "{}: no layers to join; {} freed\n",
            args.container,
            human_size(report.freed)
        ),
        _ => format!(
            "{}: {} are {after} now; {} freed\n",
            args.container,
            counted(before, "layer"),
            human_size(report.freed)
        ),
    }
}

pub(super) fn flatten_image(args: &FlattenArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let watch = Bar::new(context.out, "copying");
    let image = flatten(&store, &args.image, &args.new, &watch)?;
    context.out.print(&image, |image| {
        let bytes = image
            .layers
            .iter()
            .filter_map(|layer| store.layer_info(*layer).ok());
        let bytes = bytes.map(|info| info.bytes).sum();
        format!("{}: one layer of {}\n", image.name, human_size(bytes))
    })
}
