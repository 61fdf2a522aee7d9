//! `vellum doctor`

use std::path::{Path, PathBuf};

use super::{Context, DEFAULT_ROOT};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::doctor::{Options, Report, State, examine};
use vellum_snapshotter::config::{Config, DEFAULT_ADDRESS};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The snapshotter's configuration [default: /etc/vellum/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// containerd's configuration
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    containerd_config: PathBuf,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let config = Config::load(args.config.as_deref())?;
    let root = match config.root {
        Some(root) if context.root == Path::new(DEFAULT_ROOT) => root,
        _ => context.root.clone(),
    };
    let address = config.address.unwrap_or_else(|| DEFAULT_ADDRESS.into());
    let report = examine(&Options {
        root,
        address,
        containerd_config: args.containerd_config.clone(),
        remote: !config.remote.from.is_empty(),
        image_service: config.cri.image_service,
    });
    context.out.print(&report, lines)?;
    match report.count(State::Missing) {
        0 => Ok(()),
        missing => Err(Error::new(
            ErrorKind::Missing,
            format!(
                "this host lacks {missing} thing{} that Vellum needs",
                if missing == 1 { "" } else { "s" }
            ),
        )),
    }
}

fn lines(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let state = match finding.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Warning => "warning",
            State::Missing => "MISSING",
        };
        let found = finding.found.replace(char::is_control, " ");
        text.push_str(&format!("{state:7}  {}: {found}\n", finding.check));
        for line in finding.advice.iter().flat_map(|advice| advice.lines()) {
            text.push_str(&format!("         {line}\n"));
        }
    }
    text
}
