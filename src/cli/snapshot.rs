//! `vellum snapshot C` and `vellum snapshots C`

use serde::Serialize;

use super::Context;
use super::output::{human_size, table};
use super::remove::say_what_is_left;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::retention::Retention;
use vellum_engine::seal::How;
use vellum_engine::snapshot::{PrunedSnapshots, SnapshotReport, prune_snapshots, snapshot};
use vellum_store::{Consistency, ContainerRecord, ContainerSnapshot};

/// Arguments of `snapshot`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Crash-consistent: the snapshot holds what a power cut at that moment would have left, with everything that \
was written before the command began. A container made from it replays ext4's journal at its first mount, and a \
database in it recovers. With --freeze also what programs had written and not flushed is in it, and the file system needs no \
recovery; the kernel holds all writers back for that, for tens of milliseconds.")]
pub(super) struct SnapshotArgs {
    /// The container: running, mounted or neither
    #[arg(add = super::completions::containers())]
    container: String,
    /// The snapshot's name [default: the time]
    name: Option<String>,
    /// Freeze the file system, so that it needs no recovery; writers wait longer
    #[arg(long)]
    freeze: bool,
    /// A remark for `vellum snapshots`
    #[arg(short, long)]
    message: Option<String>,
}

/// Arguments of `snapshots`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct SnapshotsArgs {
    /// The container
    #[arg(required = true)]
    #[arg(add = super::completions::containers())]
    container: Option<String>,
    #[command(subcommand)]
    command: Option<SnapshotsCommand>,
}

#[derive(Debug, clap::Subcommand)]
enum SnapshotsCommand {
    /// Remove snapshots that a policy does not keep
    ///
    /// A snapshot stays where any of the rules keeps it. Each rule keeps the newest snapshot of so many
    /// hours, days, weeks (from Monday), months or years that have one; times are UTC.
    Prune(PruneArgs),
}

#[derive(Debug, clap::Args)]
struct PruneArgs {
    /// The container
    #[arg(add = super::completions::containers())]
    container: String,
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: usize,
    /// Keep the newest of each of N hours
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: usize,
    /// Keep the newest of each of N days
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: usize,
    /// Keep the newest of each of N weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: usize,
    /// Keep the newest of each of N months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: usize,
    /// Keep the newest of each of N years
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_yearly: usize,
    /// Keep whatever is younger, as 36h or 2days
    #[arg(long, value_name = "TIME", default_value = "0s")]
    keep_within: humantime::Duration,
    /// Only say what would be removed
    #[arg(short = 'n', long)]
    dry_run: bool,
}

impl PruneArgs {
    fn policy(&self) -> Retention {
        Retention {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within.into(),
        }
    }
}

pub(super) fn run(args: &SnapshotArgs, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let how = if args.freeze { How::Frozen } else { How::Crash };
    let report = snapshot(
        &context.store_to_change()?,
        &args.container,
        args.name.as_deref(),
        how,
        args.message.as_deref(),
    )?;
    context.out.print(&report, summary)
}

fn summary(report: &SnapshotReport) -> String {
    format!(
        "{}@{}: {}{}\n",
        report.container,
        report.snapshot.name,
        human_size(report.snapshot.bytes),
        waited(report.waited_seconds)
    )
}

/// How long writers waited, for the end of a line.
pub(super) fn waited(seconds: Option<f64>) -> String {
    seconds.map_or(String::new(), |seconds| {
        format!(", writers waited {:.1} ms", seconds * 1000.0)
    })
}

/// What `snapshots` prints as JSON.
#[derive(Serialize)]
struct Listed<'a> {
    container: &'a str,
    /// The id of the snapshot that the container goes on from.
    at: Option<uuid::Uuid>,
    snapshots: &'a [ContainerSnapshot],
}

pub(super) fn list(args: &SnapshotsArgs, context: &Context) -> Result<()> {
    match (&args.command, &args.container) {
        (Some(SnapshotsCommand::Prune(args)), _) => prune(args, context),
        (None, Some(container)) => show(container, context),
        (None, None) => Err(Error::new(ErrorKind::InvalidInput, "name a container")),
    }
}

fn prune(args: &PruneArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let report = prune_snapshots(&store, &args.container, &args.policy(), args.dry_run)?;
    say_what_is_left(&report.removed, context);
    context.out.print(&report, verdicts)
}

fn verdicts(report: &PrunedSnapshots) -> String {
    let gone = if report.dry_run {
        "would be removed"
    } else {
        "removed"
    };
    let fate = |kept_by: &[&str]| match kept_by {
        [] => gone.to_owned(),
        rules => format!("kept: {}", rules.join(", ")),
    };
    let rows = report.snapshots.iter();
    let rows: Vec<Vec<String>> = rows
        .map(|verdict| vec![verdict.name.clone(), fate(&verdict.kept_by)])
        .collect();
    table(&["SNAPSHOT", ""], &rows)
}

fn show(container: &str, context: &Context) -> Result<()> {
    let store = context.store()?;
    let container = store.as_settled(store.container(container)?)?;
    let listed = Listed {
        container: &container.name,
        at: container.at,
        snapshots: &container.snapshots,
    };
    context.out.print(&listed, |_| tree(&container))
}

/// Snapshots below their parents, each branch in the order in which it was taken; the container comes last
/// on the snapshot that it goes on from. A line without branches is a list, however long.
fn tree(container: &ContainerRecord) -> String {
    let mut rows = Vec::new();
    grow(container, None, "", &mut rows);
    table(&["SNAPSHOT", "CREATED", "SIZE", "STATE", "REMARK"], &rows)
}

/// Adds what lies on `parent`, each line behind `margin`.
fn grow(
    container: &ContainerRecord,
    parent: Option<uuid::Uuid>,
    margin: &str,
    rows: &mut Vec<Vec<String>>,
) {
    let mut parent = parent;
    loop {
        let on = |snapshot: &&ContainerSnapshot| snapshot.parent == parent;
        let mut lines: Vec<Option<&ContainerSnapshot>> =
            container.snapshots.iter().filter(on).map(Some).collect();
        lines.extend((container.at == parent).then_some(None));
        match lines.as_slice() {
            [] => return,
            [line] => {
                rows.push(row(*line, margin));
                let Some(snapshot) = line else { return };
                parent = Some(snapshot.id);
            }
            [others @ .., last] => {
                let others = others.iter().map(|line| (line, "├ ", "│ "));
                for (line, mark, below) in others.chain([(last, "└ ", "  ")]) {
                    rows.push(row(*line, &format!("{margin}{mark}")));
                    if let Some(snapshot) = line {
                        grow(
                            container,
                            Some(snapshot.id),
                            &format!("{margin}{below}"),
                            rows,
                        );
                    }
                }
                return;
            }
        }
    }
}

/// A snapshot, or the container as it is now.
fn row(snapshot: Option<&ContainerSnapshot>, margin: &str) -> Vec<String> {
    let Some(snapshot) = snapshot else {
        return vec![format!("{margin}(now)")];
    };
    let state = match snapshot.consistency {
        Consistency::Clean => "clean",
        Consistency::Crash => "crash-consistent",
    };
    let comment = snapshot
        .comment
        .as_deref()
        .map_or(String::new(), |comment| {
            comment.replace(char::is_control, " ")
        });
    vec![
        format!("{margin}{}", snapshot.name),
        snapshot.created.clone(),
        human_size(snapshot.bytes),
        state.to_owned(),
        comment,
    ]
}
