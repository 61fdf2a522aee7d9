//! `vellum trace NAME -- CMD…`

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::output::human_size;
use super::{Context, shown};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_engine::registry::TraceSource;
use vellum_engine::trace::{Trace, TraceOptions, trace};

/// Arguments of `trace`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The command runs in a container of its own, which is made for it and removed; what it prints goes to \
standard error. `vellum push --trace-file FILE` makes the hot pack of the trace: what a lazy pull \
fetches ahead. `vellum push --trace CMD` does both at once.

Examples:
  vellum trace web -o web.trace -- nginx -t
  vellum trace db -o db.trace --for 20
  vellum push db registry.example/team/db:1 --trace-file db.trace")]
pub(super) struct Args {
    /// An image, a container or a snapshot (C@NAME); a container that is mounted is sealed as by a commit, and
    /// goes on
    name: String,
    /// Where the trace is written [default: nowhere: it is said how much was touched]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Ask the command to end after so many seconds, and kill it 10 s later
    #[arg(long = "for", value_name = "SECONDS", value_parser = parse_seconds)]
    limit: Option<Duration>,
    /// The command [default: the image's]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Where a push has its trace from.
#[derive(Debug, clap::Args)]
pub(super) struct PushTraceArgs {
    /// Run CMD in a container of its own, and push what it touches first in the hot pack, which lazy pulls fetch
    /// ahead; an empty one is the image's
    #[arg(long, value_name = "CMD", conflicts_with = "trace_file")]
    trace: Option<String>,
    /// Ask the command to end after so many seconds, and kill it 10 s later
    #[arg(long, value_name = "SECONDS", requires = "trace", value_parser = parse_seconds)]
    trace_for: Option<Duration>,
    /// Make the hot pack of what `vellum trace` wrote
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Push no hot pack, not even one of the file system's metadata: a lazy pull fetches nothing ahead
    #[arg(long, conflicts_with_all = ["trace", "trace_file"])]
    no_hot: bool,
}

fn parse_seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "no number of seconds".to_owned())?;
    let time = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    match time.is_zero() {
        true => Err("nothing is touched in no time".to_owned()),
        false => Ok(time),
    }
}

impl PushTraceArgs {
    /// Whether a hot pack is pushed.
    pub(super) fn is_hot(&self) -> bool {
        !self.no_hot
    }

    /// What was said.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a command with a quote that does not end; for a file that cannot be read, or is no
    /// trace.
    pub(super) fn source(&self) -> Result<Option<TraceSource>> {
        if let Some(path) = &self.trace_file {
            let bytes = fs::read(path).context(|| format!("cannot read {}", shown(path)))?;
            let trace = Trace::decode(&bytes).map_err(|error| error.context(shown(path)))?;
            return Ok(Some(TraceSource::Recorded(trace)));
        }
        let Some(text) = &self.trace else {
            return Ok(None);
        };
        let command = shlex::split(text).ok_or_else(|| {
            let text = format!("--trace {text:?}: a quote or a backslash in it does not end");
            Error::new(ErrorKind::InvalidInput, text)
        })?;
        Ok(Some(TraceSource::Command(TraceOptions {
            command,
            limit: self.trace_for,
        })))
    }
}

#[derive(Serialize)]
struct Report {
    name: String,
    /// Ranges of 64 KiB.
    ranges: usize,
    /// Bytes of these.
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let options = TraceOptions {
        command: args.command.clone(),
        limit: args.limit,
    };
    let trace = trace(&store, &args.name, &options)?;
    if let Some(path) = &args.output {
        let written = fs::write(path, trace.encode()?);
        written.context(|| format!("cannot write {}", shown(path)))?;
    }
    let report = Report {
        name: args.name.clone(),
        ranges: trace.len(),
        bytes: trace.bytes(),
        file: args.output.as_deref().map(shown),
    };
    context.out.print(&report, |report| {
        let place = report
            .file
            .as_ref()
            .map(|file| format!(", written to {file}"));
        format!(
            "traced {}: {} ranges of 64 KiB touched ({} at most){}\n",
            report.name,
            report.ranges,
            human_size(report.bytes),
            place.as_deref().unwrap_or("")
        )
    })
}
