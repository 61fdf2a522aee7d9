//! `vellum commit C IMAGE`

use super::Context;
use super::output::human_size;
use vellum_base::error::Result;
use vellum_engine::commit::{CommitReport, commit};

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not
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
    let frozen = report.frozen_seconds.map_or(String::new(), |seconds| {
        format!(", writers waited {:.1} ms", seconds * 1000.0)
    });
    format!(
        "committed {}: a layer of {}{frozen}\n",
        report.image.name,
        human_size(report.bytes)
    )
}
