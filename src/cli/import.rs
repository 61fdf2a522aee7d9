//! `vellum import NAME SOURCE`

use std::path::PathBuf;

use super::Context;
use super::output::human_size;
use super::progress::Bars;
use vellum_base::crash_point;
use vellum_base::error::Result;
use vellum_base::size::parse_size;
use vellum_engine::import::{ImportOptions, ImportReport, import};
use vellum_image::Format;

/// Arguments of `import`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The new image's name, like debian:12
    name: String,
    /// A tar (plain, gzip, zstd), directory, OCI layout or archive, Docker archive, disk image
    /// (raw, qcow2) or layer file; - reads a tar or layer file from standard input
    source: PathBuf,
    /// Virtual size of containers made from it [default: 10G, more where the content needs it, or
    /// the disk image's own]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Add the tar or directory as a new layer on this image
    #[arg(long, value_name = "IMAGE")]
    from: Option<String>,
    /// Which image of an archive that holds several
    #[arg(long, value_name = "REF")]
    select: Option<String>,
    /// What the source is [default: found out by its content]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// A file, or a directory of files, that a qcow2 image may name as its backing file; those that lie
    /// beside it may be named anyway
    #[arg(long, value_name = "PATH")]
    allow_backing: Vec<PathBuf>,
}

/// What a source can be, as people say it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatArg {
    /// A directory that is a root file system
    Dir,
    /// A tar of files
    Tar,
    /// An OCI layout or archive
    Oci,
    /// A Docker archive
    Docker,
    /// A disk image or block device, byte for byte
    Raw,
    /// A disk image in QEMU's format
    Qcow2,
    /// An image with its block layers, as export --format layer writes it
    Layer,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Format {
        match format {
            FormatArg::Dir => Format::Directory,
            FormatArg::Tar => Format::Tar,
            FormatArg::Oci => Format::Oci,
            FormatArg::Docker => Format::Docker,
            FormatArg::Raw => Format::Raw,
            FormatArg::Qcow2 => Format::Qcow2,
            FormatArg::Layer => Format::Layer,
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let store = context.store_to_fill()?;
    let options = ImportOptions {
        size: args.size,
        from: args.from.clone(),
        select: args.select.clone(),
        platform: None,
        format: args.format.map(Format::from),
        allow_backing: args.allow_backing.clone(),
    };
    let watch = Bars::new(context.out);
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
    let name = &report.image.name;
    let disk = match &report.image.disk.holds {
        Some(holds) if report.mountable => format!("; it holds {holds}\n"),
        Some(holds) => format!(
            "; it holds {holds}, which cannot be mounted or run here: `vellum nbd {name}` serves \
             it to clients that know it\n"
        ),
        None if report.mountable => "\n".into(),
        None => format!(
            "; what it holds is not known, so it cannot be mounted: `vellum nbd {name}` serves it\n"
        ),
    };
    format!(
        "imported {name}: {layers} layer{plural}{shared}, {} written{disk}",
        human_size(made)
    )
}
