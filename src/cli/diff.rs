//! `vellum diff C` and `vellum diff IMAGE IMAGE`

use std::fmt::Write;

use serde::Serialize;

use super::Context;
use vellum_base::error::Result;
use vellum_engine::diff::{DiffOptions, diff, diff_sealed};
use vellum_image::{ContentChange, Difference};

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, mounted or not, or a snapshot (C@NAME); of two, the older image or snapshot
    #[arg(add = super::completions::containers_and_images())]
    container: String,
    /// The newer image or snapshot, which is compared with the first
    #[arg(conflicts_with = "from", value_name = "IMAGE")]
    #[arg(add = super::completions::images())]
    newer: Option<String>,
    /// Compare it with this snapshot of the container instead of its image
    #[arg(long, value_name = "SNAPSHOT")]
    from: Option<String>,
    /// Say of each file which of its bytes changed
    ///
    /// Below the path of a file stand its size before and now, where they differ, and the ranges of bytes
    /// that differ, as OFFSET+LENGTH, in blocks of 4096 bytes: a file as it was before, cut or lengthened
    /// to the new size, with these ranges copied to it, is the file as it is now. A new file is compared
    /// with an empty one.
    #[arg(long)]
    content: bool,
    /// Mount both trees and compare them file by file, which takes longer and gives the same answer
    #[arg(long)]
    walk: bool,
}

#[derive(Serialize)]
struct Line {
    /// A, C or D.
    kind: char,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Content>,
}

#[derive(Serialize)]
struct Content {
    size_before: u64,
    size: u64,
    /// Bytes in all ranges.
    bytes: u64,
    /// Offset and length.
    ranges: Vec<(u64, u64)>,
}

impl From<ContentChange> for Content {
    fn from(change: ContentChange) -> Self {
        Content {
            size_before: change.size_before,
            size: change.size,
            bytes: change.bytes(),
            ranges: change.ranges,
        }
    }
}

impl From<Difference> for Line {
    fn from(difference: Difference) -> Self {
        Line {
            kind: difference.change.kind.letter(),
            path: super::shown(&difference.change.path),
            content: difference.content.map(Content::from),
        }
    }
}

impl Line {
    /// As `docker diff` prints it, with what changed in the file below.
    fn print(&self, out: &mut String) {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{} {}", self.kind, self.path);
        let Some(content) = &self.content else {
            return;
        };
        if content.size_before != content.size {
            let _ = writeln!(out, "    size {} {}", content.size_before, content.size);
        }
        for (offset, length) in &content.ranges {
            let _ = writeln!(out, "    {offset}+{length}");
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let options = DiffOptions {
        contents: args.content,
        walk: args.walk,
    };
    let store = context.store_to_change()?;
    let found = match &args.newer {
        Some(newer) => diff_sealed(&store, &args.container, newer, options)?,
        None => diff(&store, &args.container, args.from.as_deref(), options)?,
    };
    let lines: Vec<Line> = found.into_iter().map(Line::from).collect();
    context.out.print(&lines, |lines| {
        let mut out = String::new();
        lines.iter().for_each(|line| line.print(&mut out));
        out
    })
}
