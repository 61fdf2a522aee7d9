//! `vellum upgrade-servers [C…]`

use super::Context;
use super::output::first_of;
use vellum_base::error::{Error, Result};
use vellum_engine::upgrade::{Upgraded, own_program, served, upgrade_server};

/// Arguments of `upgrade-servers`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The containers [default: every device of the store that is served]
    #[arg(add = super::completions::containers())]
    containers: Vec<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let program = own_program()?;
    let mut done: Vec<Upgraded> = Vec::new();
    let mut failures: Vec<Error> = Vec::new();
    for device in served(&store, &args.containers)? {
        match upgrade_server(&store, &device, &program) {
            Ok(upgraded) => done.extend(upgraded),
            Err(error) => failures.push(error),
        }
    }
    context
        .out
        .print(&done, |done| done.iter().map(line).collect())?;
    first_of(failures)
}

fn line(row: &Upgraded) -> String {
    let name = row.name.replace(char::is_control, "?");
    let version = &row.version;
    match row.pause_us {
        Some(pause) => format!(
            "{name}: served by {version}, process {}, after a pause of {:.1} ms\n",
            row.pid,
            pause as f64 / 1000.0
        ),
        None => format!(
            "{name}: served by this program already, process {}\n",
            row.pid
        ),
    }
}
