//! `vellum commit C IMAGE`

use super::Context;
use super::output::human_size;
use super::snapshot::waited;
use vellum_base::error::Result;
use vellum_engine::commit::{CommitReport, commit};

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not
    #[arg(add = super::completions::containers())]
    container: String,
    /// The new image's name
    image: String,
    /// A remark for the image's history
    #[arg(short, long)]
    message: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let report = commit(
        &context.store_to_change()?,
        &args.container,
        &args.image,
        args.message.as_deref(),
    )?;
    context.out.print(&report, summary)
}

fn summary(report: &CommitReport) -> String {
    format!(
        "committed {}: a layer of {}{}\n",
        report.image.name,
        human_size(report.bytes),
        waited(report.frozen_seconds)
    )
}
