//! `vellum completions SHELL`, what completes names, and the manual pages.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::CompleteEnv;
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::Shells;

use super::output::{write_out, written};
use super::{Cli, DEFAULT_ROOT};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_store::Store;

/// The variable by which a shell's script asks this program to complete.
const VARIABLE: &str = "COMPLETE";

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The script asks this program, which has to be on the PATH, and completes names of containers, images and volumes of \
the store that VELLUM_ROOT names.")]
pub(super) struct CompletionsArgs {
    /// The shell: bash, elvish, fish, powershell or zsh
    shell: String,
}

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Write the pages of all commands into this directory [default: print that of vellum alone]
    dir: Option<PathBuf>,
}

/// Answers a shell that asks what completes a command line, and ends; returns where none does.
pub(super) fn answer_shell() {
    CompleteEnv::with_factory(Cli::command)
        .var(VARIABLE)
        .complete();
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    let shells = Shells::builtins();
    let shell = shells.completer(&args.shell).ok_or_else(|| {
        let names: Vec<&str> = shells.names().collect();
        let text = format!(
            "there are no completions for {}, but for {}",
            args.shell,
            names.join(", ")
        );
        Error::new(ErrorKind::InvalidInput, text)
    })?;
    let mut script = Vec::new();
    shell
        .write_registration(VARIABLE, "vellum", "vellum", "vellum", &mut script)
        .context(|| "cannot write the script")?;
    write_out(&script)
}

pub(super) fn man(args: &ManArgs) -> Result<()> {
    match &args.dir {
        Some(dir) => clap_mangen::generate_to(Cli::command(), dir)
            .context(|| format!("cannot write manual pages into {}", super::shown(dir))),
        None => written(|out| clap_mangen::Man::new(Cli::command()).render(out)),
    }
}

/// Completes names of containers.
pub(super) fn containers() -> ArgValueCandidates {
    ArgValueCandidates::new(|| found(container_names))
}

/// Completes names of images.
pub(super) fn images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| found(image_names))
}

/// Completes names of both.
pub(super) fn containers_and_images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        found(|store| Ok([container_names(store)?, image_names(store)?].concat()))
    })
}

/// Completes names of volumes.
pub(super) fn volumes() -> ArgValueCandidates {
    ArgValueCandidates::new(|| found(Store::volumes))
}

fn container_names(store: &Store) -> Result<Vec<String>> {
    let containers = store.containers()?.into_iter();
    Ok(containers.map(|container| container.name).collect())
}

fn image_names(store: &Store) -> Result<Vec<String>> {
    let images = store.images()?.into_iter();
    Ok(images.map(|image| image.name).collect())
}

/// Names of the store; none where it cannot be read, as nobody would see why.
fn found(names: impl FnOnce(&Store) -> Result<Vec<String>>) -> Vec<CompletionCandidate> {
    let root = std::env::var_os("VELLUM_ROOT");
    let root = root.as_deref().unwrap_or(OsStr::new(DEFAULT_ROOT));
    match Store::open(Path::new(root)).and_then(|store| names(&store)) {
        Ok(names) => names.into_iter().map(CompletionCandidate::new).collect(),
        Err(_) => Vec::new(),
    }
}
