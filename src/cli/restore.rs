//! `vellum restore NAME FILE...`

use std::fs::File;
use std::path::PathBuf;

use super::Context;
use super::bar::Bar;
use super::output::human_size;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt::standard_input;
use vellum_engine::backup::{BackupInfo, RestoreReport, Source, restore, verify};

/// Arguments of `restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A full backup comes first, then each delta after the one that it is since. Where the container is there already, deltas go on top \
of it: it must not have been written since. Backups whose state it has are passed over, so that an interrupted command can be given \
again. Nothing of a backup is there before all of it was read and verified.")]
pub(super) struct Args {
    /// The container
    #[arg(required_unless_present = "check")]
    name: Option<String>,
    /// Backups in order; - reads one from standard input
    #[arg(required_unless_present = "check")]
    files: Vec<PathBuf>,
    /// Give a new container the volumes and directories of the host that its origin had
    #[arg(long)]
    volumes: bool,
    /// Read these backups to their ends and say what they are, without restoring
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["name", "files", "volumes"])]
    check: Option<Vec<PathBuf>>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    if let Some(files) = &args.check {
        let watch = Bar::new(context.out, "verifying");
        let found = verify(sources(files)?, &watch)?;
        return context
            .out
            .print(&found, |found| found.iter().map(line).collect());
    }
    let name = args.name.as_deref();
    let name = name.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "name a container"))?;
    let store = context.store_to_fill()?;
    let watch = Bar::new(context.out, "restoring");
    let report = restore(&store, name, sources(&args.files)?, args.volumes, &watch)?;
    context.out.print(&report, summary)?;
    for passed in &report.passed {
        let (container, file, snapshot) = (&report.container, &passed.file, &passed.snapshot);
        context
            .out
            .note(&format!("{file} is there already: {container}@{snapshot}"));
    }
    for volume in &report.left_out {
        context.out.note(&format!(
            "{} does not have {} at {}: `--volumes` would give it that",
            report.container,
            super::shown(volume.source.as_ref()),
            super::shown(&volume.destination)
        ));
    }
    Ok(())
}

fn sources(files: &[PathBuf]) -> Result<Vec<Source>> {
    let stdin = files.iter().filter(|file| file.as_os_str() == "-").count();
    if stdin > 1 {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "standard input (-) has one backup, and is named twice",
        ));
    }
    let source = |path: &PathBuf| {
        if path.as_os_str() == "-" {
            let input = standard_input().context(|| "cannot read standard input")?;
            return Ok(Source {
                name: "standard input".into(),
                size: None,
                input: input.0,
            });
        }
        let what = || format!("cannot read {}", super::shown(path));
        let input = File::open(path).context(what)?;
        let file = input.metadata().context(what)?;
        Ok(Source {
            name: super::shown(path),
            size: file.is_file().then_some(file.len()),
            input,
        })
    };
    files.iter().map(source).collect()
}

fn summary(report: &RestoreReport) -> String {
    let line = |state: &vellum_engine::backup::RestoredState| {
        format!(
            "{}@{}: {}\n",
            report.container,
            state.snapshot,
            human_size(state.bytes)
        )
    };
    report.restored.iter().map(line).collect()
}

fn line(info: &BackupInfo) -> String {
    let what = match &info.since {
        Some(since) => format!("since {since}"),
        None => "full".into(),
    };
    format!(
        "{}: {}@{} of {}, {what}, {} of data: whole\n",
        info.file,
        info.container,
        info.snapshot,
        info.created,
        human_size(info.data_bytes)
    )
    .replace(|c: char| c.is_control() && c != '\n', "?")
}
