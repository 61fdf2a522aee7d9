//! `vellum export NAME FILE`

use std::path::PathBuf;

use super::Context;
use super::output::{counted, human_size};
use super::progress::Bars;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::export::{ExportOptions, ExportReport, Format, export};
use vellum_image::Compression;

/// Arguments of `export`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An image, a container or a snapshot (C@NAME); a container that is mounted is sealed as by a commit, and
    /// goes on
    #[arg(add = super::completions::containers_and_images())]
    name: String,
    /// The file to write, or for --format oci the directory, unless its name ends in .tar; - is standard
    /// output
    #[arg(value_name = "FILE")]
    target: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    format: FormatArg,
    /// With qcow2: write a directory with a file for each layer, above one another; the disk is top.qcow2
    #[arg(long)]
    layers: bool,
    /// With oci: how layers are compressed [default: gzip]
    #[arg(long, value_enum, value_name = "HOW")]
    compression: Option<CompressionArg>,
    /// With oci and docker: what the image is called there [default: NAME]
    #[arg(long = "name", value_name = "REF")]
    reference: Option<String>,
    /// With layer: leave out the layers that this image has, since the other store has them
    #[arg(long, value_name = "IMAGE")]
    without: Option<String>,
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
}

/// What an export can be, as people say it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatArg {
    /// The disk, byte for byte, in a sparse file
    Raw,
    /// The disk in QEMU's format
    Qcow2,
    /// The files, as a tar
    Tar,
    /// A container image: an OCI layout, or an archive of one
    Oci,
    /// A container image as docker save writes it
    Docker,
    /// The block layers as they are, compressed, for `vellum import` into another store; a container is sealed for
    /// that as by a commit, and goes on
    Layer,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum CompressionArg {
    Gzip,
    Zstd,
    None,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Format {
        match format {
            FormatArg::Raw => Format::Raw,
            FormatArg::Qcow2 => Format::Qcow2,
            FormatArg::Tar => Format::Tar,
            FormatArg::Oci => Format::Oci,
            FormatArg::Docker => Format::Docker,
            FormatArg::Layer => Format::Layer,
        }
    }
}

impl From<CompressionArg> for Compression {
    fn from(compression: CompressionArg) -> Compression {
        match compression {
            CompressionArg::Gzip => Compression::Gzip,
            CompressionArg::Zstd => Compression::Zstd,
            CompressionArg::None => Compression::None,
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let options = ExportOptions {
        format: args.format.into(),
        layers: args.layers,
        compression: args.compression.map(Compression::from),
        name: args.reference.clone(),
        without: args.without.clone(),
        replace: args.force,
    };
    let to_stdout = args.target.as_os_str() == "-";
    if to_stdout && context.out.json {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "standard output has the export, and no place for --json: name a file",
        ));
    }
    let store = match options.format {
        // These can be read where nothing can be written; the others mount.
        Format::Raw | Format::Qcow2 | Format::Layer => context.store()?,
        Format::Tar | Format::Oci | Format::Docker => context.store_to_change()?,
    };
    let watch = Bars::new(context.out);
    let report = export(&store, &args.name, &args.target, &options, &watch)?;
    match to_stdout {
        true => Ok(()),
        false => context.out.print(&report, summary),
    }
}

fn summary(report: &ExportReport) -> String {
    let (name, path) = (&report.name, super::shown(&report.path));
    let what = match (report.bytes, report.layers) {
        (Some(bytes), None) => format!(", {} of data", human_size(bytes)),
        (Some(bytes), Some(layers)) => {
            let layers = counted(layers, "layer");
            format!(", {layers}, {} of data", human_size(bytes))
        }
        (None, Some(layers)) => format!(", {}", counted(layers, "layer")),
        (None, None) => String::new(),
    };
    format!("exported {name} to {path}{what}\n")
}
