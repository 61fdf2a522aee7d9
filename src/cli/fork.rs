//! `vellum fork C NEW`

use super::Context;
use super::snapshot::waited;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::snapshot::{ForkReport, ForkVolumes, fork};

/// How many forks one command makes at most.
const MAX_COUNT: u64 = 10_000;

/// Arguments of `fork`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container: running, mounted or neither
    #[arg(add = super::completions::containers())]
    container: String,
    /// The new container's name
    new: String,
    /// Make N of one moment, called NEW-1 to NEW-N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_COUNT))]
    count: Option<u64>,
    /// Make it of this snapshot, and leave the container alone
    #[arg(long, value_name = "SNAPSHOT")]
    from: Option<String>,
    /// Give it the container's volumes: both write the same files
    #[arg(long, conflicts_with = "no_volumes")]
    share_volumes: bool,
    /// Give it no volumes
    #[arg(long)]
    no_volumes: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let names = match args.count {
        None => vec![args.new.clone()],
        Some(count) => (1..=count)
            .map(|number| format!("{}-{number}", args.new))
            .collect(),
    };
    if args.new == args.container {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a fork is another container: give it a name of its own",
        ));
    }
    let volumes = match (args.share_volumes, args.no_volumes) {
        (true, _) => ForkVolumes::Share,
        (_, true) => ForkVolumes::None,
        _ => ForkVolumes::Ask,
    };
    let from = args.from.as_deref();
    let store = context.store_to_change()?;
    let report = fork(&store, &args.container, &names, from, volumes)?;
    context.out.print(&report, summary)?;
    if report.waited_seconds.is_some() {
        context.out.note(&format!(
            "{}{}",
            args.container,
            waited(report.waited_seconds)
        ));
    }
    Ok(())
}

fn summary(report: &ForkReport) -> String {
    report
        .containers
        .iter()
        .map(|container| format!("{}\n", container.name))
        .collect()
}
