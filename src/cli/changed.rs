//! `vellum changed C --since SNAPSHOT`

use super::Context;
use super::output::table;
use vellum_base::error::Result;
use vellum_engine::changed::{Changed, ChangedKind, changed};

/// Arguments of `changed`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each line is a range of bytes in which the container may differ from the snapshot: `data`, or `zero` where it reads as zeros \
now. What is not listed is the same in both. A mounted container is synced first.")]
pub(super) struct Args {
    /// The container, running or not, or a snapshot (C@NAME)
    #[arg(add = super::completions::containers())]
    container: String,
    /// The snapshot of the container that it is compared with
    #[arg(long, value_name = "SNAPSHOT")]
    since: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let found = changed(&store, &args.container, &args.since)?;
    context.out.print(&found, listed)
}

fn listed(found: &Changed) -> String {
    let row = |range: &vellum_engine::changed::ChangedRange| {
        let kind = match range.kind {
            ChangedKind::Data => "data",
            ChangedKind::Zero => "zero",
        };
        vec![
            range.offset.to_string(),
            range.length.to_string(),
            kind.to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = found.ranges.iter().map(row).collect();
    table(&["OFFSET", "LENGTH", "KIND"], &rows)
}
