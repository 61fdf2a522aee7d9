//! `vellum import NAME SOURCE`

use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::Context;
use super::output::{Output, human_size};
use super::size::parse_size;
use crate::engine::import::{ImportOptions, ImportReport, ImportWatch, import};
use crate::error::Result;
use crate::image::Progress;

/// Arguments of `import`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The new image's name, like debian:12
    name: String,
    /// A tar (plain, gzip, zstd), directory, OCI layout or archive, Docker archive or disk image;
    /// - reads a tar from standard input
    source: PathBuf,
    /// Virtual size of containers made from it [default: 10G, or the disk image's own]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Add the tar or directory as a new layer on this image
    #[arg(long, value_name = "IMAGE")]
    from: Option<String>,
    /// Which image of an archive that holds several
    #[arg(long, value_name = "REF")]
    select: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let options = ImportOptions {
        size: args.size,
        from: args.from.clone(),
        select: args.select.clone(),
        platform: None,
    };
    let watch = Bars {
        out: context.out,
        bar: Mutex::new(None),
    };
    let report = import(&store, &args.name, &args.source, &options, &watch)?;
    context.out.print(&report, summary)
}

fn summary(report: &ImportReport) -> String {
    let made: u64 = report
        .layers
        .iter()
        .filter(|l| !l.existed)
        .map(|l| l.bytes)
        .sum();
    let existed = report.layers.iter().filter(|layer| layer.existed).count();
    let layers = report.layers.len();
    let plural = if layers == 1 { "" } else { "s" };
    let shared = if existed == 0 {
        String::new()
    } else {
        format!(", {existed} of them there already")
    };
    format!(
        "imported {}: {layers} layer{plural}{shared}, {} written\n",
        report.image.name,
        human_size(made)
    )
}

/// A progress bar for each layer that is read; a line for one that exists.
struct Bars {
    out: Output,
    bar: Mutex<Option<ProgressBar>>,
}

impl ImportWatch for Bars {
    fn layer(&self, name: &str, size: Option<u64>) -> Option<Progress<'static>> {
        if !self.out.shows_progress() {
            return None;
        }
        let (bar, template) = match size {
            Some(size) => (
                ProgressBar::new(size),
                "{msg:24!} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
            ),
            None => (
                ProgressBar::no_length(),
                "{msg:24!} {spinner} {bytes} {bytes_per_sec}",
            ),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        *self.bar.lock() = Some(bar.clone());
        Some(Box::new(move |bytes| bar.inc(bytes)))
    }

    fn exists(&self, name: &str) {
        self.out.note(&format!("{name}: Layer already exists"));
    }

    fn done(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }
}
