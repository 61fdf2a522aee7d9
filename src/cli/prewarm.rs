//! `vellum prewarm NAME PATH…`

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use super::output::human_size;
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::Result;
use vellum_engine::prewarm::prewarm;

/// Arguments of `prewarm`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container; it may be mounted and at work
    #[arg(add = super::completions::containers())]
    name: String,
    /// Files and directories in the container, directories with all below them
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let bar = if context.out.shows_progress() {
        ProgressBar::new(0)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    let report = prewarm(&store, &args.name, &args.paths, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    context.out.print(&report?, |report| {
        format!(
            "prewarmed {} of {} in {} {}: {} copied, {} made room for, {} there before, in {:.1} s\n",
            human_size(report.bytes),
            report.name,
            report.files,
            if report.files == 1 { "file" } else { "files" },
            human_size(report.copied_blocks * BLOCK_SIZE),
            human_size(report.zeroed_blocks * BLOCK_SIZE),
            human_size(report.present_blocks * BLOCK_SIZE),
            report.seconds,
        )
    })
}
