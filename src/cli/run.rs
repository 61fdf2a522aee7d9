//! `vellum run IMAGE CMD…`

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use super::Context;
use super::confinement::ConfinementArgs;
use super::docker::DockerArgs;
use super::encryption::IdentityArgs;
use super::output::{complain, say};
use super::registry::{AccessArgs, LazyArgs, pull_absent};
use super::transport::TransportArgs;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_base::size::parse_bytes;
use vellum_engine::run::waiter::run_in_background;
use vellum_engine::run::{
    self, CommandOptions, Ended, FAILURE, Failure, RunOptions, parse_mount, parse_volume,
};
use vellum_fs::ext4::Atime;
use vellum_store::{ContainerRecord, NewContainer};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What comes after the image is the command, with its own options, as with docker; options of Vellum's may \
stand between the two, and `--` ends them.

The container stays when the command ends, unless --rm is given: `vellum start` runs its command again, \
`vellum exec` further ones in it with the same rights and limits, `vellum commit` makes an image of it, \
`vellum rm` removes it.

Exit status: the command's; 128+N when signal N ended it; 127 when the container has no such program \
or not the interpreter that it needs, 126 when it cannot be executed, 125 when vellum failed, \
128+N when signal N came before it started. With -d: 0 once it has begun.

The OCI runtime is crun or runc, whichever is installed; VELLUM_RUNTIME names another.

Examples:
  vellum run -it debian:12 bash
  vellum run -d --name web -v data:/srv registry.example/web:1 serve --port 80
  vellum run --rm debian:12 -- --version")]
pub(super) struct Args {
    #[command(flatten)]
    made: MadeArgs,
    #[command(flatten)]
    lazily: LazyArgs,
    #[command(flatten)]
    identity: IdentityArgs,
    /// Remove the container when the command has ended
    #[arg(long)]
    rm: bool,
    /// Run it in the background, and print the container's name: `vellum logs` has what it writes
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    transport: TransportArgs,
    #[command(flatten)]
    terminal: TerminalArgs,
    #[command(flatten)]
    access: AccessArgs,
}

/// What `run` and `create` share: of what a container is made, and what it runs.
#[derive(Debug, clap::Args)]
pub(super) struct MadeArgs {
    /// The image; `run` pulls one that the store does not have from its registry
    #[arg(add = super::completions::images())]
    image: String,
    /// The container's name [default: made from the image's]
    #[arg(long)]
    name: Option<String>,
    /// A volume (NAME:/dst) or a directory of the host (/src:/dst, ./src:/dst), made where it is
    /// missing; :ro keeps writes out
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    volume: Vec<String>,
    /// The same as docker writes it: type=bind,source=/src,target=/dst or type=volume,source=NAME,target=/dst, with
    /// ,readonly to keep writes out; the directory has to be there
    #[arg(long, value_name = "MOUNT")]
    mount: Vec<String>,
    /// The program in place of the image's entry point; empty for none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Virtual size, not smaller than the image's; the file system grows at the first mount
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: Option<u64>,
    /// When reads change the access times of its files [default: noatime]
    #[arg(long, value_name = "WHEN", value_enum)]
    atime: Option<Atime>,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    confinement: ConfinementArgs,
    #[command(flatten)]
    docker: DockerArgs,
    /// Say more on standard error; twice for still more
    // In place of the global one, whose short form is the volume's here.
    #[arg(long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// The command [default: the image's]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

impl MadeArgs {
    /// The container, of the image with this name.
    pub(super) fn container<'a>(&'a self, image: &'a str) -> Result<NewContainer<'a>> {
        self.docker.check()?;
        let volumes = self.volume.iter().map(|text| parse_volume(text));
        let mounts = self.mount.iter().map(|text| parse_mount(text));
        Ok(NewContainer {
            image,
            name: self.name.as_deref(),
            virtual_size: self.size,
            volumes: volumes.chain(mounts).collect::<Result<_>>()?,
            atime: self.atime,
            confinement: self.confinement.confinement()?,
        })
    }

    /// What it runs.
    pub(super) fn options(&self) -> Result<RunOptions> {
        Ok(RunOptions {
            command: self.process.options(&self.command)?,
            entrypoint: self.entrypoint.clone(),
            remove: false,
        })
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }
}

/// What `run`, `create` and `exec` share.
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
}

/// What `run` and `exec` share.
#[derive(Debug, clap::Args)]
pub(super) struct TerminalArgs {
    /// Give it a terminal [default: when standard input and output are terminals]
    #[arg(short, long)]
    tty: bool,
    /// Accepted for docker's users: standard input is always passed on
    #[arg(short, long)]
    interactive: bool,
}

impl TerminalArgs {
    /// Whether the command gets a terminal.
    pub(super) fn wanted(&self) -> Result<bool> {
        let is_terminal = io::stdin().is_terminal();
        if self.tty && !is_terminal {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "-t needs a terminal on standard input: leave it out",
            ));
        }
        Ok(self.tty || (is_terminal && io::stdout().is_terminal()))
    }

    /// Whether one of the two was given.
    pub(super) fn is_asked_for(&self) -> bool {
        self.tty || self.interactive
    }

    /// Refuses what a command in the background cannot have.
    fn refuse_in_background(&self) -> Result<()> {
        if !self.is_asked_for() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidInput,
            "-d has neither a terminal nor standard input, so -i and -t do not go with it: leave them out; for a \
             container to work in, run `sleep infinity` in it with -d, and `vellum exec -it C sh`",
        ))
    }
}

impl ProcessArgs {
    pub(super) fn options(&self, command: &[String]) -> Result<CommandOptions> {
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
            terminal: false,
        })
    }
}

pub(super) fn run(args: &Args, context: &Context) -> ExitCode {
    let made = start(args, context);
    match made {
        Ok(Begun::Ended(ended)) => exit(Ok(ended)),
        Ok(Begun::Runs(container)) => {
            let name = |container: &ContainerRecord| format!("{}\n", container.name);
            match context.out.print(&container, |container| name(container)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => exit(Err(error)),
            }
        }
        Err(error) => exit(Err(error)),
    }
}

/// What has become of a command.
enum Begun {
    Ended(Ended),
    /// In the background.
    Runs(Box<ContainerRecord>),
}

fn start(args: &Args, context: &Context) -> Result<Begun> {
    let made = &args.made;
    let mut options = made.options()?;
    options.remove = args.rm;
    // What is refused is refused before an image is pulled.
    made.container(made.image())?;
    if args.detach {
        args.terminal.refuse_in_background()?;
    } else {
        options.command.terminal = args.terminal.wanted()?;
    }
    args.transport.choose();
    let store = context.store_to_fill()?;
    let how = (args.lazily, &args.identity);
    let image = pull_absent(&store, made.image(), context, args.access, how)?;
    let new = made.container(&image)?;
    if !args.detach {
        return run::run(&store, &new, &options).map(Begun::Ended);
    }
    let begun = run_in_background(&store, &new, &options, &args.transport.arguments())?;
    Ok(match begun {
        Ok(container) => Begun::Runs(Box::new(container)),
        Err(ended) => Begun::Ended(ended),
    })
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
