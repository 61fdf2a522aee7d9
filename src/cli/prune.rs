//! `vellum prune`

use super::Context;
use super::output::{counted, human_size};
use vellum_base::error::Result;
use vellum_engine::check::finish_commits;
use vellum_engine::teardown::clean_orphaned_run_dirs;

/// Arguments of `prune`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    finish_commits(&store)?;
    let run_dirs = clean_orphaned_run_dirs(&store)?;
    let mut report = store.prune()?;
    report.run_dirs = run_dirs;
    if report.busy {
        context.out.note(
            "other commands are at work on layers, so some things were left: prune again later",
        );
    }
    context.out.print(&report, |report| {
        let mut out = String::new();
        for layer in &report.layers {
            out.push_str(&format!("layer {layer}\n"));
        }
        for name in report.leftovers.iter().chain(&report.run_dirs) {
            out.push_str(&format!("{name}\n"));
        }
        let bytes = human_size(report.bytes);
        out.push_str(&format!(
            "{} removed, {bytes} freed\n",
            counted(report.layers.len(), "layer")
        ));
        out
    })
}
