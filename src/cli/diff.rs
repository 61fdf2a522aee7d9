//! `vellum diff C`

use serde::Serialize;

use super::Context;
use vellum_base::error::Result;
use vellum_engine::diff::diff;

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not
    container: String,
}

#[derive(Serialize)]
struct Line {
    /// A, C or D.
    kind: char,
    path: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let lines: Vec<Line> = diff(&context.store_to_change()?, &args.container)?
        .into_iter()
        .map(|change| Line {
            kind: change.kind.letter(),
            path: super::shown(&change.path),
        })
        .collect();
    context.out.print(&lines, |lines| {
        lines
            .iter()
            .map(|line| format!("{} {}\n", line.kind, line.path))
            .collect()
    })
}
