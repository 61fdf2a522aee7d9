//! `vellum rollback C SNAPSHOT`

use super::Context;
use vellum_base::crash_point;
use vellum_base::error::Result;
use vellum_engine::snapshot::{Present, RollbackReport, rollback};

/// Arguments of `rollback`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, stopped
    #[arg(add = super::completions::containers())]
    container: String,
    /// The snapshot that it goes back to
    snapshot: String,
    /// Do not keep what it is now as a snapshot
    #[arg(long)]
    discard: bool,
    /// End what runs in it, and unmount it
    #[arg(short, long)]
    force: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let present = if args.discard {
        Present::Discard
    } else {
        Present::Keep
    };
    let store = context.store_to_change()?;
    let report = rollback(&store, &args.container, &args.snapshot, present, args.force)?;
    context.out.print(&report, |report| summary(args, report))
}

fn summary(args: &Args, report: &RollbackReport) -> String {
    let name = &report.container.name;
    let kept = match &report.kept {
        Some(kept) => format!("; what it was is {name}@{}", kept.name),
        None => String::new(),
    };
    format!("{name} is {name}@{} again{kept}\n", args.snapshot)
}
