//! `vellum logs C`

use std::io::{self, Write};

use super::Context;
use vellum_base::error::{Error, Result};
use vellum_engine::run::{OutputLine, OutputOptions, Stream, logs};

/// Arguments of `logs`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    #[arg(add = super::completions::containers())]
    container: String,
    /// Go on until its command has ended
    #[arg(short, long)]
    follow: bool,
    /// The last lines alone, so many [default: all that are kept]
    #[arg(short = 'n', long, visible_alias = "lines", value_name = "N", value_parser = parse_tail)]
    tail: Option<Tail>,
    /// With the time of each line
    #[arg(short, long)]
    timestamps: bool,
}

/// How many lines; docker has `all` for all.
#[derive(Debug, Clone, Copy)]
struct Tail(Option<usize>);

fn parse_tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail(None)),
        text => match text.parse() {
            Ok(lines) => Ok(Tail(Some(lines))),
            Err(_) => Err(format!("{text:?} is no number of lines, like 100 or all")),
        },
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let options = OutputOptions {
        last: args.tail.and_then(|Tail(lines)| lines),
        follow: args.follow,
    };
    let mut nobody_reads = false;
    let shown = logs(&context.store()?, &args.container, options, |line| {
        show(line, args, context).map_err(|error| {
            // The reader has seen enough: `vellum logs -f C | head -1`.
            nobody_reads = error.kind() == io::ErrorKind::BrokenPipe;
            Error::io("cannot write what was logged", error)
        })
    });
    match shown {
        Err(_) if nobody_reads => Ok(()),
        other => other,
    }
}

fn show(line: &OutputLine, args: &Args, context: &Context) -> io::Result<()> {
    let mut text = Vec::new();
    if context.out.json {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    } else {
        if args.timestamps {
            text.extend(format!("{} ", line.time).bytes());
        }
        text.extend(line.text.bytes());
    }
    match line.stream {
        Stream::Stdout => write(&mut io::stdout(), &text),
        _ if context.out.json => write(&mut io::stdout(), &text),
        Stream::Stderr | Stream::Vellum => write(&mut io::stderr(), &text),
    }
}

fn write(out: &mut impl Write, text: &[u8]) -> io::Result<()> {
    out.write_all(text).and_then(|()| out.flush())
}
