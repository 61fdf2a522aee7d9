//! `vellum backup C -o FILE`

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use super::Context;
use super::bar::Bar;
use super::output::{human_size, say};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::backup::{BackupOptions, BackupReport, backup_to, backup_to_file};
use vellum_store::Store;

/// Arguments of `backup`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Of a container a crash-consistent snapshot is taken and backed up. It stays, since the next backup with --since needs it: \
`vellum rm C@NAME` removes it once that is no more. To back up one that is frozen, take it with `vellum snapshot C NAME \
--freeze`, and back up C@NAME.

An interrupted backup to a file goes on with the same command; until it is whole, the file is called FILE.partial. `vellum restore` \
makes containers of backups, and `vellum restore --check` verifies them.

A stream (-o -) that breaks is begun anew, and each attempt on a container takes one more snapshot, which stays: \
back up the one that is there (C@NAME), or remove it.")]
pub(super) struct Args {
    /// The container, running or not, or a snapshot that is there (C@NAME)
    #[arg(add = super::completions::containers())]
    container: String,
    /// Where to: a file that is not there yet, or - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Only what changed since this snapshot of the container
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<String>,
    /// The name of the snapshot that is taken [default: the time]
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let options = BackupOptions {
        since: args.since.as_deref(),
        snapshot: args.snapshot.as_deref(),
    };
    let watch = Bar::new(context.out, "backing up");
    if args.output.as_os_str() != "-" {
        let store = store(args, context)?;
        let report = backup_to_file(&store, &args.container, &options, &args.output, &watch)?;
        context.out.print(&report, |report| {
            summary(report, Some(args.output.as_path()))
        })?;
        return tell_of_snapshot(&report, context);
    }
    let mut stdout = io::stdout().lock();
    if stdout.is_terminal() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a backup is nothing for a terminal: redirect standard output, or name a file (-o FILE)",
        ));
    }
    let store = store(args, context)?;
    let report = backup_to(&store, &args.container, &options, &mut stdout, &watch)?;
    // Standard output has the backup.
    if !context.out.quiet {
        say(summary(&report, None).trim_end());
    }
    tell_of_snapshot(&report, context)
}

/// Of a snapshot that is there nothing changes: it can be backed up from a store that cannot be written.
fn store(args: &Args, context: &Context) -> Result<Store> {
    match args.container.contains('@') {
        true => context.store(),
        false => context.store_to_change(),
    }
}

fn summary(report: &BackupReport, file: Option<&Path>) -> String {
    let what = match &report.since {
        Some(since) => format!("since {since}"),
        None => "full".into(),
    };
    let resumed = match report.resumed_bytes {
        0 => String::new(),
        bytes => format!(", {} of it were there", human_size(bytes)),
    };
    let place = file.map_or(String::new(), |file| format!(" in {}", super::shown(file)));
    format!(
        "{}@{}: {what}, {} of data, {}{place}{resumed}\n",
        report.container,
        report.snapshot,
        human_size(report.data_bytes),
        human_size(report.written_bytes),
    )
}

fn tell_of_snapshot(report: &BackupReport, context: &Context) -> Result<()> {
    if report.taken {
        let (container, snapshot) = (&report.container, &report.snapshot);
        context.out.note(&format!(
            "the snapshot {container}@{snapshot} stays: the next `vellum backup {container} --since {snapshot}` \
             needs it"
        ));
    }
    Ok(())
}
