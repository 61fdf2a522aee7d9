//! What the command line says.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::driver::Brought;

/// Measure storage drivers for containers side by side.
///
/// Each workload runs through each driver that this host has, in turns, round by round. Needs
/// root. Writes report.html, for people, report.json, with every figure, and charts/*.svg.
#[derive(Debug, Parser)]
#[command(
    name = "compare",
    version,
    max_term_width = 100,
    args_override_self = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do instead of measuring.
    #[command(subcommand)]
    pub other: Option<Other>,
    /// Measuring.
    #[command(flatten)]
    pub measure: Measure,
}

/// What else it does.
#[derive(Debug, Subcommand)]
pub enum Other {
    /// Say what became faster and slower from one report.json to another
    Diff {
        /// The earlier one
        a: PathBuf,
        /// The later one
        b: PathBuf,
    },
    /// Pass on what comes over TCP, later: the round trip of the link that images are pulled over
    #[command(hide = true)]
    Relay {
        /// Where to listen
        #[arg(long, value_name = "ADDRESS")]
        listen: String,
        /// Who is asked
        #[arg(long, value_name = "ADDRESS")]
        to: String,
        /// Microseconds in each direction
        #[arg(long, value_name = "N")]
        micros: u64,
    },
}

/// What to measure, and how.
#[derive(Debug, Args)]
pub struct Measure {
    /// Only these drivers (the references always run too); see --list
    #[arg(long, value_delimiter = ',', value_name = "ID")]
    pub drivers: Vec<String>,
    /// A driver of your own, as commands for sh that mount and unmount a container, or a program like
    /// those in tools/compare/drivers; may be given several times. They find $LAYERS, $DIR, $NAME and
    /// $MNT: see docs/comparing.md
    #[arg(long, value_name = "NAME=up:CMD,down:CMD | FILE")]
    pub driver: Vec<Brought>,
    /// The directory of a Debian root of another release: QEMU of that root is measured, too, beside
    /// this host's; may be given several times
    #[arg(long, value_name = "ROOT")]
    pub qemu: Vec<PathBuf>,
    /// Only these workloads; see --list
    #[arg(long, value_delimiter = ',', value_name = "ID")]
    pub workloads: Vec<String>,
    /// Rounds; fewer than three prove nothing [default: 5, with --quick 3]
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Measure on the file system of this directory; may be given several times, as with /dev/shm
    /// for memory [default: /var/tmp]
    #[arg(long, value_name = "DIR")]
    pub dir: Vec<PathBuf>,
    /// An answer within 5 minutes: the six workloads that people quote, small
    #[arg(long)]
    pub quick: bool,
    /// Take this long in all; what says least is left out first, and the report says what
    /// [default: 40 for each directory, with --quick 4.8; 0 for no limit]
    #[arg(long, value_name = "MINUTES")]
    pub time_limit: Option<f64>,
    /// Scale of pgbench: 15 MB each [default: 50, so 750 MB; with --quick 3]
    #[arg(long, value_name = "N")]
    pub pg_scale: Option<u32>,
    /// Seconds of pgbench; 60 or more for figures of the first minute [default: 12, with --quick 2]
    #[arg(long, value_name = "N")]
    pub pg_seconds: Option<u32>,
    /// Rate of the link to the registry that containers are pulled from, as tc(8) has it
    #[arg(long, value_name = "RATE", default_value = "100mbit")]
    pub pull_rate: String,
    /// Milliseconds of its round trip
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub pull_delay: u32,
    /// The tree of many small files
    #[arg(long, value_name = "DIR", default_value = "/usr/include")]
    pub tree: PathBuf,
    /// Write the reports into this directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// The vellum program [default: the release build of this workspace, built before the clock
    /// starts]
    #[arg(long, value_name = "FILE", env = "VELLUM_BIN")]
    pub vellum: Option<PathBuf>,
    /// Hold the run against this earlier report.json; the exit status is 3 where a driver became
    /// slower by more than --tolerance
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// Percent by which a ratio may be lower than the baseline's
    #[arg(
        long,
        value_name = "PERCENT",
        default_value_t = 10.0,
        requires = "baseline"
    )]
    pub tolerance: f64,
    /// Hardly any work, to see that everything works
    #[arg(long, hide = true)]
    pub smoke: bool,
    /// List drivers and workloads, with what this host lacks
    #[arg(long)]
    pub list: bool,
}
