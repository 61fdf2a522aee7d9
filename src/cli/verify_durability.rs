//! `vellum verify-durability write|check TARGET`

use std::time::Duration;

use super::Context;
use super::output::human_size;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::size::parse_size;
use vellum_verify::durability::{CheckReport, Log, Target, WriteOptions, check, write};

/// Arguments of `verify-durability`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
TARGET is a directory (a file is made in it), a file, a block device, or an NBD export
(nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH), of Vellum or of anything else.

A killed server, and what it did not keep:

    vellum verify-durability write 'nbd+unix:///web?socket=web.sock' --log acks --overwrite &
    kill -KILL SERVER                       # then start it again
    vellum verify-durability check 'nbd+unix:///web?socket=web.sock' --log acks

A power cut of the whole machine, with the log on another machine:

    ssh root@victim vellum verify-durability write /mnt/data --log - > acks
    (cut the power; start it again)
    ssh root@victim vellum verify-durability check /mnt/data --log - < acks

The log must survive what the target goes through, so it belongs on another disk or machine.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write and flush from several threads, and log what was acknowledged, until killed
    Write(WriteArgs),
    /// Report what was acknowledged and is not there; exit status 1 if anything is
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
struct WriteArgs {
    /// Directory, file, block device or NBD URI
    target: String,
    /// Where to log what was acknowledged: a new file on another disk, or - for standard output
    #[arg(long, value_name = "FILE")]
    log: Log,
    /// Writers at once
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// End after so many seconds [default: when the target fails or somebody ends it]
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// How much of the target to write to
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    size: u64,
    /// Bytes of a block: a power of two from 512 to 1048576
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    block: u64,
    /// Destroy what a device, an NBD export or a file holds
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The target that was written to
    target: String,
    /// The log of that, or - for standard input
    #[arg(long, value_name = "FILE")]
    log: Log,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Write(args) => run_write(args, context),
        Command::Check(args) => run_check(args, context),
    }
}

fn run_write(args: &WriteArgs, context: &Context) -> Result<()> {
    let target: Target = args.target.parse()?;
    let options = WriteOptions {
        threads: usize::from(args.threads),
        time: args.seconds.map(Duration::from_secs),
        size: args.size,
        block: args.block,
        overwrite: args.overwrite,
    };
    let out = context.out;
    let report = write(&target, &args.log, &options, &|| {
        out.note("writing: kill what is to be tested at any time");
    })?;
    if args.log == Log::Standard {
        // Standard output is the log's.
        return Ok(());
    }
    out.print(&report, |report| {
        let bytes = human_size(report.acknowledged * args.block);
        format!(
            "{} writes ({bytes}) acknowledged by {} flushes in {:.1} s\n",
            report.acknowledged, report.flushes, report.seconds
        )
    })
}

fn run_check(args: &CheckArgs, context: &Context) -> Result<()> {
    let target: Target = args.target.parse()?;
    let report = check(&target, &args.log)?;
    if report.cached {
        tracing::warn!(
            "{}: could not be read past the page cache, which may show what is not on the disk: \
             check after a restart of the machine, or on a new mount",
            args.target
        );
    }
    if report.damaged_log_lines > 1 {
        tracing::warn!(
            "{} lines of the log cannot be read, so what they acknowledged was not looked for",
            report.damaged_log_lines
        );
    }
    context.out.print(&report, lines)?;
    if report.is_lossless() {
        return Ok(());
    }
    if report.absent {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{}: the file that was written to is not there: mount what is tested at this \
                 directory and check again; if it is mounted, this stack has lost the file, with all \
                 {} blocks that it acknowledged",
                args.target, report.lost
            ),
        ));
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "{}: {} blocks are not as they were acknowledged ({} missing, {} stale, {} torn, {} \
             foreign, {} damaged, {} unreadable): this stack says that data is durable before it is",
            args.target,
            report.lost,
            report.missing,
            report.stale,
            report.torn,
            report.foreign,
            report.damaged,
            report.unreadable
        ),
    ))
}

fn lines(report: &CheckReport) -> String {
    let mut out = String::new();
    for loss in &report.losses {
        let kind = format!("{:?}", loss.kind).to_lowercase();
        let acknowledged = loss.acknowledged.map_or("nothing".to_owned(), |sequence| {
            format!("version {sequence}")
        });
        let found = loss.found.replace(char::is_control, "?");
        out.push_str(&format!(
            "{kind}: block {} at byte {}: {acknowledged} was acknowledged, found: {found}\n",
            loss.block, loss.offset
        ));
    }
    let more = report.lost - report.losses.len() as u64;
    if more > 0 {
        out.push_str(&format!("and {more} more\n"));
    }
    out.push_str(&format!(
        "{} acknowledged writes to {} blocks: {} intact, {} with a newer write, {} lost\n",
        report.acknowledged_writes,
        report.acknowledged_blocks,
        report.intact,
        report.newer,
        report.lost
    ));
    out
}
