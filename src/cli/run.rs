//! `vellum run IMAGE -- CMD…`

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use super::Context;
use super::confinement::ConfinementArgs;
use super::output::{complain, say};
use super::registry::{AccessArgs, LazyArgs, pull_absent};
use super::transport::TransportArgs;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_base::size::parse_bytes;
use vellum_engine::run::{self, CommandOptions, Ended, FAILURE, Failure, RunOptions, parse_volume};
use vellum_fs::ext4::Atime;
use vellum_store::NewContainer;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The container stays when the command ends, unless --rm is given: `vellum exec` runs further commands \
in it with the same rights and limits, `vellum commit` makes an image of it, `vellum rm` removes it.

Exit status: the command's; 128+N when signal N ended it; 127 when the container has no such program \
or not the interpreter that it needs, 126 when it cannot be executed, 125 when vellum failed, \
128+N when signal N came before it started.

The OCI runtime is crun or runc, whichever is installed; VELLUM_RUNTIME names another.")]
pub(super) struct Args {
    /// The image; one that the store does not have is pulled from its registry
    image: String,
    #[command(flatten)]
    lazily: LazyArgs,
    /// The container's name [default: made from the image's]
    #[arg(long)]
    name: Option<String>,
    /// Remove the container when the command has ended
    #[arg(long)]
    rm: bool,
    /// A volume (NAME:/dst) or a directory of the host (/src:/dst, ./src:/dst); :ro keeps writes out
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    volume: Vec<String>,
    /// The program in place of the image's entry point; empty for none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Virtual size, not smaller than the image's
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: Option<u64>,
    /// When reads change the access times of its files [default: noatime]
    #[arg(long, value_name = "WHEN", value_enum)]
    atime: Option<Atime>,
    #[command(flatten)]
    transport: TransportArgs,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    confinement: ConfinementArgs,
    #[command(flatten)]
    access: AccessArgs,
    /// Say more on standard error; twice for still more
    // In place of the global one, whose short form is the volume's here.
    #[arg(long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// The command [default: the image's]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// What `run` and `exec` share.
#[derive(Debug, clap::Args)]
pub(super) struct ProcessArgs {
    /// Set an environment variable; without a value, pass ours on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Where it starts [default: the image's]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Who runs it, names or numbers [default: the image's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Give it a terminal [default: when standard input and output are terminals]
    #[arg(short, long)]
    tty: bool,
    /// Accepted for docker's users: standard input is always passed on
    #[arg(short, long)]
    interactive: bool,
}

impl ProcessArgs {
    pub(super) fn options(&self, command: &[String]) -> Result<CommandOptions> {
        let is_terminal = io::stdin().is_terminal();
        if self.tty && !is_terminal {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "-t needs a terminal on standard input: leave it out",
            ));
        }
        let mut env = Vec::new();
        for entry in &self.env {
            match entry.split_once('=') {
                Some(("", _)) => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("{entry:?} is no environment variable: write NAME=VALUE"),
                    ));
                }
                Some(_) => env.push(entry.clone()),
                // As docker: one that we do not have either is left out.
                None => env.extend(
                    std::env::var(entry)
                        .ok()
                        .map(|value| format!("{entry}={value}")),
                ),
            }
        }
        Ok(CommandOptions {
            command: command.to_vec(),
            env,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            terminal: self.tty || (is_terminal && io::stdout().is_terminal()),
        })
    }
}

pub(super) fn run(args: &Args, context: &Context) -> ExitCode {
    exit(start(args, context))
}

fn start(args: &Args, context: &Context) -> Result<Ended> {
    let volumes = args
        .volume
        .iter()
        .map(|text| parse_volume(text))
        .collect::<Result<Vec<_>>>()?;
    let options = RunOptions {
        command: args.process.options(&args.command)?,
        entrypoint: args.entrypoint.clone(),
        remove: args.rm,
        ..RunOptions::default()
    };
    args.transport.choose();
    let store = context.store_to_change()?;
    let image = pull_absent(&store, &args.image, context, args.access, args.lazily)?;
    let new = NewContainer {
        image: &image,
        name: args.name.as_deref(),
        virtual_size: args.size,
        volumes,
        atime: args.atime,
        confinement: args.confinement.confinement()?,
    };
    run::run(&store, &new, &options)
}

/// The command's exit status, or why there is none.
pub(super) fn exit(ended: Result<Ended>) -> ExitCode {
    match ended {
        Ok(ended) => {
            match &ended.failure {
                Some(Failure::NoProgram(why)) => say(&format!("vellum: {why}")),
                Some(Failure::Runtime { why, said: false }) => {
                    say(&format!("vellum: the command could not be started: {why}"));
                }
                Some(Failure::Runtime { said: true, .. }) => {
                    say("vellum: the command could not be started");
                }
                None => {}
            }
            ExitCode::from(ended.status)
        }
        Err(error) => {
            complain(&error);
            ExitCode::from(interrupt::exit_status().unwrap_or(FAILURE))
        }
    }
}
