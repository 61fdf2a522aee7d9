//! `vellum trim C…` and `vellum trim --all`

use super::Context;
use super::output::{first_of, human_size};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_engine::trim::{Trimmed, trim, trimmable};

/// Arguments of `trim`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The containers, mounted or not
    #[arg(required_unless_present = "all")]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
    /// All that have a file system and are not served over NBD
    #[arg(long, conflicts_with = "containers")]
    all: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let names = match args.all {
        true => trimmable(&store)?,
        false => args.containers.clone(),
    };
    let mut done: Vec<Trimmed> = Vec::new();
    let mut failures: Vec<Error> = Vec::new();
    for name in &names {
        match interrupt::check().and_then(|()| trim(&store, name)) {
            Ok(trimmed) => done.push(trimmed),
            // Of all, one that was removed, or put to use, since they were listed.
            Err(error) if args.all && error.kind() == ErrorKind::NotFound => {}
            Err(error) if args.all && error.kind() == ErrorKind::InUse => {
                context.out.note(&format!("{name}: left out: {error}"));
            }
            Err(error) => failures.push(error),
        }
    }
    context.out.print(&done, |done| {
        let line = |one: &Trimmed| {
            let bytes = human_size(one.returned_bytes);
            format!("{}: {bytes} went back to the host\n", one.name)
        };
        done.iter().map(line).collect()
    })?;
    first_of(failures)
}
