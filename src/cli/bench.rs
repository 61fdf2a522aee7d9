//! `vellum bench`

use std::path::PathBuf;

use super::Context;
use super::output::table;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_verify::bench::{CaseResult, run as run_bench};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Measure on the file system of this directory; needs about 3 GiB there
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Rounds of each case
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Only cases whose names contain this, as "first write" or "depth 128"
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    case: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let results = run_bench(&args.dir, args.rounds, &args.case, |result| {
        context
            .out
            .note(&format!("{}: {:.3} ×", result.name, result.ratio));
    })?;
    if results.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "no case has {:?} in its name: without --case all of them run",
                args.case
            ),
        ));
    }
    context.out.print(&results, |results| {
        let rows: Vec<Vec<String>> = results.iter().map(cells).collect();
        let header = [
            "CASE",
            "µs",
            "COMPARED WITH",
            "µs",
            "SPEED",
            "RANGE OVER ROUNDS",
            "CHECKPOINTS",
        ];
        table(&header, &rows)
    })
}

fn cells(result: &CaseResult) -> Vec<String> {
    vec![
        result.name.clone(),
        format!("{:.2}", result.micros),
        result.reference.clone(),
        format!("{:.2}", result.reference_micros),
        format!("{:.3} ×", result.ratio),
        format!("{:.3}–{:.3}", result.range.0, result.range.1),
        // Bytes for each byte that was written.
        result
            .checkpoints
            .map_or(String::new(), |ratio| format!("{ratio:.4} B a byte")),
    ]
}
