//! `vellum save` and `vellum load`

use std::path::PathBuf;

use super::Context;
use super::encryption::{FormatArgs, IdentityArgs};
use super::output::{counted, human_size};
use super::progress::Bars;
use super::registry::pulled;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::registry::{LoadReport, SaveOptions, SaveReport, load, save};

/// Arguments of `save`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What `vellum push` sends to a registry goes to a file: an OCI archive, which skopeo \
(oci-archive:FILE), podman, containerd and Docker read too. `vellum export` writes other formats, \
and an OCI layout as a directory.

Examples:
  vellum save web db -o images.tar
  vellum save web -o - | ssh host vellum load -i -")]
pub(super) struct SaveArgs {
    /// Images, containers or snapshots (C@NAME); a container that is mounted is sealed as by a commit, and goes on
    #[arg(required = true, value_name = "NAME")]
    #[arg(add = super::completions::containers_and_images())]
    names: Vec<String>,
    /// The file to write; - is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    /// How much the block layers are compressed (zstd), 1 to 19
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `load`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The images get the names that they have in the archive. Of those with block layers these are taken, \
others are unpacked. `vellum import` takes one image of an archive under a name of your own, and \
archives of Docker before 25.")]
pub(super) struct LoadArgs {
    /// An OCI archive, as vellum save, docker save (since 25) and skopeo write it; - is standard input
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    #[command(flatten)]
    identity: IdentityArgs,
}

pub(super) fn run_save(args: &SaveArgs, context: &Context) -> Result<()> {
    let to_stdout = args.output.as_os_str() == "-";
    if to_stdout && context.out.json {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "standard output has the archive, and no place for --json: name a file",
        ));
    }
    let (format, encryption) = args.format.wanted()?;
    let options = SaveOptions {
        format,
        encryption,
        level: args.level,
        replace: args.force,
    };
    let store = context.store_to_change()?;
    let watch = Bars::new(context.out);
    let report = save(&store, &args.names, &args.output, &options, &watch)?;
    match to_stdout {
        true => Ok(()),
        false => context.out.print(&report, saved),
    }
}

fn saved(report: &SaveReport) -> String {
    let images = counted(report.images.len(), "image");
    let mut text = format!(
        "saved {images} to {}, {} of blobs\n",
        super::shown(&report.path),
        human_size(report.bytes)
    );
    for image in &report.images {
        text += &format!("{} {}\n", image.name, image.digest);
    }
    text
}

pub(super) fn run_load(args: &LoadArgs, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let store = context.store_to_fill()?;
    let watch = Bars::new(context.out);
    let report = load(&store, &args.input, &args.identity.identity, &watch)?;
    context.out.print(&report, loaded)
}

fn loaded(report: &LoadReport) -> String {
    let each = report.images.iter();
    each.map(|image| pulled("loaded", image)).collect()
}
