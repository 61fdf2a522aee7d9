//! `vellum rm C…` and `vellum rmi IMAGE…`

use super::Context;
use super::output::first_of;
use vellum_base::error::{Error, Result};
use vellum_base::interrupt;
use vellum_engine::snapshot;
use vellum_engine::teardown::{self, RemoveOptions};
use vellum_store::PruneReport;

/// Arguments of `rm`.
#[derive(Debug, clap::Args)]
pub(super) struct RmArgs {
    /// The containers; C@NAME is a snapshot of one
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
    /// Also when they are mounted, or something runs in them, which is killed
    #[arg(short, long)]
    force: bool,
    /// Also those that have snapshots, which go with them
    #[arg(long)]
    snapshots: bool,
}

/// Arguments of `rmi`.
#[derive(Debug, clap::Args)]
pub(super) struct RmiArgs {
    /// The images
    #[arg(required = true)]
    #[arg(add = super::completions::images())]
    images: Vec<String>,
}

pub(super) fn rm(args: &RmArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    each(&args.containers, context, |name| {
        let report = match name.split_once('@') {
            Some((container, name)) => snapshot::remove_snapshot(&store, container, name)?,
            None => {
                let options = RemoveOptions {
                    force: args.force,
                    snapshots: args.snapshots,
                };
                teardown::remove(&store, name, options)?
            }
        };
        say_what_is_left(&report, context);
        Ok(())
    })
}

pub(super) fn rmi(args: &RmiArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    // All at once: each by itself reads the records of all.
    let (each, collected) = store.remove_images(&args.images)?;
    let outcomes = args.images.iter().zip(each);
    report(outcomes, context).and(collected.map(|report| say_what_is_left(&report, context)))
}

/// Layers that could not be removed beside others' work take space until somebody removes them.
pub(super) fn say_what_is_left(report: &PruneReport, context: &Context) {
    if report.busy {
        context.out.note(
            "other commands are at work on layers, so its layers are still there: `vellum prune` \
             removes them later",
        );
    }
}

/// Removes all that can be removed; fails with the first failure, after saying the others.
pub(super) fn each(
    names: &[String],
    context: &Context,
    remove: impl Fn(&String) -> Result<()>,
) -> Result<()> {
    let outcome = |name| (name, interrupt::check().and_then(|()| remove(name)));
    report(names.iter().map(outcome), context)
}

/// Prints what was removed; fails with the first failure, after saying the others.
fn report<'a>(
    outcomes: impl Iterator<Item = (&'a String, Result<()>)>,
    context: &Context,
) -> Result<()> {
    let mut removed = Vec::new();
    let mut failures: Vec<Error> = Vec::new();
    for (name, outcome) in outcomes {
        match outcome {
            Ok(()) => removed.push(name),
            Err(error) => failures.push(error),
        }
    }
    context.out.print(&removed, |removed| {
        removed.iter().map(|name| format!("{name}\n")).collect()
    })?;
    first_of(failures)
}
