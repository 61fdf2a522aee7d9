//! `vellum check [NAME…]`

use super::bar::Bar;
use super::output::counted;
use super::{Context, shown};
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::check::{CheckOptions, CheckReport, Severity, check};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images, containers, keys of containerd's snapshots, or UUIDs of layers [default: the whole store]
    #[arg(add = super::completions::containers_and_images())]
    names: Vec<String>,
    /// Read every block of the sealed layers and compare it with its checksum
    #[arg(long)]
    scrub: bool,
    /// Repair what needs no guessing, put what is damaged in quarantine
    #[arg(long)]
    repair: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let options = CheckOptions {
        names: args.names.clone(),
        scrub: args.scrub,
        repair: args.repair,
    };
    let watch = Bar::new(context.out, "reading");
    let report = check(&store, &options, &watch)?;
    context.out.print(&report, lines)?;
    if report.is_clean() {
        return Ok(());
    }
    let (errors, warnings) = (report.open(Severity::Error), report.open(Severity::Warning));
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let what_to_do = if report
        .findings
        .iter()
        .any(|finding| finding.repairable && finding.repaired.is_none())
        && !args.repair
    {
        ": --repair does something about it"
    } else {
        ""
    };
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "{errors} error{} and {warnings} warning{} in {}{what_to_do}",
            plural(errors),
            plural(warnings),
            shown(store.root())
        ),
    ))
}

fn lines(report: &CheckReport) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let path = shown(&finding.path);
        let problem = finding.problem.replace(char::is_control, "?");
        // Most problems name their file already.
        let place = if problem.contains(&path) {
            String::new()
        } else {
            format!(" ({path})")
        };
        out.push_str(&format!("{severity}: {}: {problem}{place}\n", finding.what));
        match &finding.repaired {
            Some(done) => out.push_str(&format!("  repaired: {done}\n")),
            None => out.push_str(&format!("  {}\n", finding.advice)),
        }
    }
    let read = if report.blocks == 0 {
        String::new()
    } else {
        let bytes = super::output::human_size(report.blocks * BLOCK_SIZE);
        format!(", {bytes} of data read")
    };
    let snapshots = match report.snapshots {
        0 => String::new(),
        number => format!(", {} of containerd's", counted(number, "snapshot")),
    };
    out.push_str(&format!(
        "{}, {}, {}{snapshots} checked{read}\n",
        counted(report.layers, "layer"),
        counted(report.images, "image"),
        counted(report.containers, "container")
    ));
    out
}
