//! The `vellum` command: parses, calls, prints. One file a command.
//!
//! Exit status: 0 success, 1 failure with one line `vellum: …` on standard error, 2 usage, 128 + N
//! when signal N ended it; `run` and `exec` end with the status of the command that they ran.

mod archive;
mod backup;
mod bar;
mod bench;
mod changed;
mod check;
mod commit;
mod completions;
mod confinement;
mod cp;
mod create;
mod device_server;
mod df;
mod diff;
mod docker;
mod doctor;
mod encryption;
mod exec;
mod export;
mod fetcher;
mod fork;
mod history;
mod images;
mod import;
mod inspect;
mod limits;
mod list;
mod logs;
mod map;
mod merge;
mod mount;
mod nbd;
mod often;
mod output;
mod prewarm;
mod progress;
mod prune;
mod ps;
mod registry;
mod remove;
mod rename;
mod resize;
mod restore;
mod rollback;
mod run;
mod server;
mod snapshot;
mod snapshotter;
mod space;
mod start;
mod stats;
mod tag;
mod trace;
mod transport;
mod trim;
mod upgrade_servers;
mod verify_durability;
mod vhost;
mod volume;
mod waiter;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{Parser, Subcommand};

use output::{Output, complain};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_core::layer::fetch_by;
use vellum_engine::lazy::FetcherClient;
use vellum_engine::lost::explain;
use vellum_export::device::command::{self as file_device, FileDeviceArgs};
use vellum_store::Store;

/// Where stores are by default.
const DEFAULT_ROOT: &str = "/var/lib/vellum";

/// Block-level copy-on-write storage for containers.
///
/// Images are stacks of thin, read-only block layers; each container gets a thin writable layer.
#[derive(Debug, Parser)]
#[command(name = "vellum", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

// No doc comment, which would be that of the program.
#[derive(Debug, clap::Args)]
struct GlobalArgs {
    /// Where images, containers and volumes are kept
    #[arg(long, global = true, value_name = "DIR", env = "VELLUM_ROOT")]
    #[arg(default_value = DEFAULT_ROOT)]
    root: PathBuf,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Print nothing but what was asked for
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Say more on standard error; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an image from a tar, directory, OCI image, Docker archive or disk image
    Import(import::Args),
    /// Write an image, container or snapshot to a file: raw, qcow2, tar, OCI, Docker, or its layers for another store
    Export(export::Args),
    /// Fetch an image from a registry or an object store
    Pull(registry::PullArgs),
    /// Fetch all that is missing of an image that was pulled lazily
    Complete(registry::CompleteArgs),
    /// Send an image, container or snapshot to a registry or an object store, for everybody
    Push(registry::PushArgs),
    /// Write images to an OCI archive, as a push sends them
    Save(archive::SaveArgs),
    /// Make images from an OCI archive, by the names that they have in it
    Load(archive::LoadArgs),
    /// Record what a command touches first of an image, container or snapshot, for a push of it
    Trace(trace::Args),
    /// Give a registry a name and a password, and keep them where docker does
    Login(registry::LoginArgs),
    /// Forget a registry's name and password
    Logout(registry::LogoutArgs),
    /// List images
    Images(images::Args),
    /// Show the steps that made an image
    History(history::Args),
    /// Show all that is known of an image, container or layer, as JSON
    Inspect(inspect::Args),
    /// Make a container from an image
    Create(create::Args),
    /// List containers
    Ps(ps::Args),
    /// Remove containers with their writable layers, and snapshots (C@NAME)
    Rm(remove::RmArgs),
    /// Remove images
    Rmi(remove::RmiArgs),
    /// Give an image one more name
    ///
    /// Each name is removed by itself (`vellum rmi NAME`), and the image's layers stay while it has
    /// one.
    Tag(tag::Args),
    /// Give a container another name, also while it is mounted or runs
    Rename(rename::Args),
    /// Make a container larger, and its file system with it, also while it is mounted or runs
    Resize(resize::Args),
    /// Give what deleted files took of containers' layers back to the host
    ///
    /// Containers are mounted so that this happens at once; what others deleted over NBD, or without
    /// telling, a trim finds.
    Trim(trim::Args),
    /// Mount a container's file system, without its setuid programs and device nodes
    ///
    /// A mounted container is part of the host's tree: whoever can walk to it sees it. Its setuid
    /// programs would give host users the rights of their owners, its device nodes the host's
    /// devices, so neither works unless asked for. (`vellum run` and `exec` are not concerned.)
    Mount(mount::MountArgs),
    /// Unmount a container
    Umount(mount::UmountArgs),
    /// Make a container and run a command in it, in the foreground or (-d) in the background
    Run(run::Args),
    /// Run containers' commands again, in the background or (-a) in the foreground
    Start(start::StartArgs),
    /// End what runs in containers: ask, and kill after a while
    Stop(start::StopArgs),
    /// Send a signal to what runs in containers
    Kill(start::KillArgs),
    /// Wait until containers' commands have ended, and print their exit statuses
    Wait(start::WaitArgs),
    /// Show what a container's command wrote in the background
    Logs(logs::Args),
    /// Run a command in a container that is there
    Exec(exec::Args),
    /// Copy files into a container or out of one, mounted or not, running or not
    ///
    /// One of the two is CONTAINER:PATH, the other a path of the host, or "-" for a tar. A target
    /// that is a directory gets the source in it, and a source that ends with "/." its content
    /// alone. Links in the container lead nowhere out of it, and its volumes are where they are
    /// when it runs.
    Cp(cp::Args),
    /// Make an image from what a container changed; the container goes on
    Commit(commit::Args),
    /// Keep a moment of a container, running or not
    Snapshot(snapshot::SnapshotArgs),
    /// List a container's snapshots
    Snapshots(snapshot::SnapshotsArgs),
    /// Make containers of a moment of another, running or not
    Fork(fork::Args),
    /// Make a stopped container what it was at a snapshot
    Rollback(rollback::Args),
    /// Join a container's sealed layers, in use or not, so that space of removed snapshots comes back
    Merge(merge::MergeArgs),
    /// Make an image of one layer of an image
    Flatten(merge::FlattenArgs),
    /// List the paths that a container changed, or by which two images differ
    Diff(diff::Args),
    /// List the ranges of a container's disk that changed since a snapshot
    Changed(changed::Args),
    /// Write a moment of a container, running or not, to a file or stream: all of it or what changed
    Backup(backup::Args),
    /// Make a container of a backup and the deltas after it, or verify them
    Restore(restore::Args),
    /// Show what copy-on-write costs containers: first touches, copy-ups, flushes, reads by layer
    ///
    /// Every request is counted. Of writes one in 16 is timed, drawn at random, so that counting
    /// costs next to nothing; their times are percentiles of those. Flushes are all timed.
    Stats(stats::Args),
    /// Draw which layer each block of a container or image comes from
    Map(map::Args),
    /// Copy files' blocks up ahead of traffic, so that first writes cost no more than later ones
    Prewarm(prewarm::Args),
    /// Serve containers and images over NBD until stopped
    Nbd(nbd::Args),
    /// Serve a container or image as the disk of a virtual machine (vhost-user-blk) until stopped
    Vhost(vhost::Args),
    /// Check that layers, images and containers are whole
    Check(check::Args),
    /// Remove what crashes left and nothing uses
    Prune(prune::Args),
    /// Show or set what is done while the store's disk is nearly full: warn, refuse, stop writers
    Space(space::Args),
    /// Show what images, containers and volumes take: in all, shared with others, and alone
    Df(df::Args),
    /// Look whether this host has what is needed, and say what to do where it has not
    Doctor(doctor::Args),
    /// Let this program serve what is mounted, after it was replaced by a newer one
    ///
    /// The servers of mounted containers go on with the program that started them. This command
    /// has each of them execute the program that it is run from, with the file system mounted and
    /// in use: requests wait for some milliseconds. If the new program cannot serve, the old one
    /// goes on.
    UpgradeServers(upgrade_servers::Args),
    /// Serve containerd as a snapshotter until stopped
    Snapshotter(snapshotter::Args),
    /// Find out whether a stack keeps what it acknowledged: kill it, cut the power, then check
    VerifyDurability(verify_durability::Args),
    /// Measure copy-up, chain depth and flush cost on this host
    Bench(bench::Args),
    /// List and remove named volumes
    Volume(volume::Args),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print the manual page, or write those of all commands into a directory
    Man(completions::ManArgs),
    /// Serve a chain as a local block device
    #[command(hide = true)]
    DeviceServer(device_server::Args),
    /// Run a container's command in the background, and wait for its end
    #[command(hide = true)]
    Waiter(waiter::Args),
    /// Bring blocks of the store's lazy layers, for as long as somebody wants some
    #[command(hide = true)]
    Fetcher,
    /// Serve a plain file as a local block device
    #[command(hide = true)]
    DeviceSupervisor(FileDeviceArgs),
}

/// What commands get besides their own arguments.
struct Context {
    root: PathBuf,
    out: Output,
}

impl Context {
    /// The store, which has to be there.
    fn store(&self) -> Result<Store> {
        let is_empty = |root: &Path| !root.join(vellum_store::MARKER).exists();
        let opened = match Store::open(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound && is_empty(&self.root) => {
                Err(Error::new(
                    ErrorKind::NotFound,
                    format!(
                        "there is no store at {}: `vellum import`, `pull`, `run`, `restore` and `volume create` \
                         make one, and --root names another",
                        shown(&self.root)
                    ),
                ))
            }
            opened => opened,
        };
        opened.map_err(|error| explain(&self.root, error))
    }

    /// As [`Context::store_to_change`], for a command that brings something in: made where there is none.
    fn store_to_fill(&self) -> Result<Store> {
        let store = Store::open_or_create(&self.root);
        writable(store.map_err(|error| explain(&self.root, error))?)
    }
}

impl Context {
    /// As [`Context::store`], for a command that changes something.
    fn store_to_change(&self) -> Result<Store> {
        writable(self.store()?)
    }
}

fn writable(store: Store) -> Result<Store> {
    if !store.is_read_only() {
        return Ok(store);
    }
    Err(Error::new(
        ErrorKind::ReadOnly,
        format!(
            "the store {} cannot be written (Read-only file system, or somebody else's): it can be \
             looked at, checked, and served by `vellum nbd`",
            store.root().display()
        ),
    ))
}

/// The whole program.
pub fn main() -> ExitCode {
    completions::answer_shell();
    limits::survive_size_limit();
    let cli = match often::try_parse().map_or_else(Cli::try_parse, Ok) {
        Ok(cli) => cli,
        Err(said) => return say_usage(&said),
    };
    let global = cli.global;
    // The snapshotter's log is as its configuration says.
    if !matches!(cli.command, Command::Snapshotter(_)) {
        start_log(global.verbose, global.quiet);
    }
    limits::raise_file_limit();
    fetch_by(Box::new(FetcherClient));
    let out = Output {
        json: global.json,
        quiet: global.quiet,
    };
    let context = Context {
        root: global.root,
        out,
    };
    let listening = match cli.command.undoes() {
        true => interrupt::listen(),
        false => Ok(()),
    };
    match listening.and_then(|()| dispatch(cli.command, &context)) {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            interrupt::exit_status().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

/// Prints the help or the version that was asked for, or what is wrong with the command line.
fn say_usage(said: &clap::Error) -> ExitCode {
    let wrong = said.get(ContextKind::InvalidSubcommand);
    if let Some(ContextValue::String(wrong)) = wrong
        && let Some(instead) = docker::instead_of(wrong)
    {
        output::say(&format!("vellum: {wrong}: {instead}"));
        return ExitCode::from(said.exit_code() as u8);
    }
    if said.use_stderr() {
        let _ = said.print();
        return ExitCode::from(said.exit_code() as u8);
    }
    match output::written(|_| said.print()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

impl Command {
    /// True for commands that undo what they have half done when a signal asks them to end. The
    /// others leave nothing, and end at once, or have a way of their own.
    fn undoes(&self) -> bool {
        matches!(
            self,
            Command::Import(_)
                | Command::Export(_)
                | Command::Pull(_)
                | Command::Complete(_)
                | Command::Push(_)
                | Command::Save(_)
                | Command::Load(_)
                | Command::Trace(_)
                | Command::Create(_)
                | Command::Rm(_)
                | Command::Rmi(_)
                | Command::Tag(_)
                | Command::Rename(_)
                | Command::Resize(_)
                | Command::Trim(_)
                | Command::Mount(_)
                | Command::Umount(_)
                | Command::Run(_)
                | Command::Start(_)
                | Command::Stop(_)
                | Command::Kill(_)
                | Command::Wait(_)
                | Command::Logs(_)
                | Command::Waiter(_)
                | Command::Exec(_)
                | Command::Commit(_)
                | Command::Cp(_)
                | Command::Snapshot(_)
                | Command::Fork(_)
                | Command::Rollback(_)
                | Command::Merge(_)
                | Command::Flatten(_)
                | Command::Diff(_)
                | Command::Backup(_)
                | Command::Restore(_)
                | Command::Prewarm(_)
                | Command::Prune(_)
        )
    }
}

fn dispatch(command: Command, context: &Context) -> Result<ExitCode> {
    match command {
        Command::Import(args) => import::run(&args, context)?,
        Command::Export(args) => export::run(&args, context)?,
        Command::Pull(args) => registry::run_pull(&args, context)?,
        Command::Complete(args) => registry::run_complete(&args, context)?,
        Command::Push(args) => registry::run_push(&args, context)?,
        Command::Save(args) => archive::run_save(&args, context)?,
        Command::Load(args) => archive::run_load(&args, context)?,
        Command::Trace(args) => trace::run(&args, context)?,
        Command::Login(args) => registry::run_login(&args, context)?,
        Command::Logout(args) => registry::run_logout(&args, context)?,
        Command::Images(args) => images::run(&args, context)?,
        Command::History(args) => history::run(&args, context)?,
        Command::Inspect(args) => inspect::run(&args, context)?,
        Command::Create(args) => create::run(&args, context)?,
        Command::Ps(args) => ps::run(&args, context)?,
        Command::Rm(args) => remove::rm(&args, context)?,
        Command::Rmi(args) => remove::rmi(&args, context)?,
        Command::Tag(args) => tag::run(&args, context)?,
        Command::Rename(args) => rename::run(&args, context)?,
        Command::Resize(args) => resize::run(&args, context)?,
        Command::Trim(args) => trim::run(&args, context)?,
        Command::Mount(args) => mount::mount(&args, context)?,
        Command::Umount(args) => mount::umount(&args, context)?,
        Command::Run(args) => return Ok(run::run(&args, context)),
        Command::Start(args) => return Ok(start::start(&args, context)),
        Command::Stop(args) => start::stop(&args, context)?,
        Command::Kill(args) => start::kill(&args, context)?,
        Command::Wait(args) => start::wait(&args, context)?,
        Command::Logs(args) => logs::run(&args, context)?,
        Command::Waiter(args) => waiter::run(&args, context)?,
        Command::Exec(args) => return Ok(exec::run(&args, context)),
        Command::Cp(args) => cp::run(&args, context)?,
        Command::Commit(args) => commit::run(&args, context)?,
        Command::Snapshot(args) => snapshot::run(&args, context)?,
        Command::Snapshots(args) => snapshot::list(&args, context)?,
        Command::Fork(args) => fork::run(&args, context)?,
        Command::Rollback(args) => rollback::run(&args, context)?,
        Command::Merge(args) => merge::run(&args, context)?,
        Command::Flatten(args) => merge::flatten_image(&args, context)?,
        Command::Diff(args) => diff::run(&args, context)?,
        Command::Changed(args) => changed::run(&args, context)?,
        Command::Backup(args) => backup::run(&args, context)?,
        Command::Restore(args) => restore::run(&args, context)?,
        Command::Stats(args) => stats::run(&args, context)?,
        Command::Map(args) => map::run(&args, context)?,
        Command::Prewarm(args) => prewarm::run(&args, context)?,
        Command::Nbd(args) => nbd::run(&args, context)?,
        Command::Vhost(args) => vhost::run(&args, context)?,
        Command::Check(args) => check::run(&args, context)?,
        Command::Prune(args) => prune::run(&args, context)?,
        Command::Space(args) => space::run(&args, context)?,
        Command::Df(args) => df::run(&args, context)?,
        Command::Doctor(args) => doctor::run(&args, context)?,
        Command::UpgradeServers(args) => upgrade_servers::run(&args, context)?,
        Command::Snapshotter(args) => snapshotter::run(&args, context)?,
        Command::VerifyDurability(args) => verify_durability::run(&args, context)?,
        Command::Bench(args) => bench::run(&args, context)?,
        Command::Volume(args) => volume::run(&args, context)?,
        Command::Completions(args) => completions::completions(&args)?,
        Command::Man(args) => completions::man(&args)?,
        Command::DeviceServer(args) => device_server::run(&args)?,
        Command::Fetcher => fetcher::run(context)?,
        Command::DeviceSupervisor(args) => file_device::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn start_log(verbose: u8, quiet: bool) {
    let level = match (verbose, quiet) {
        (_, true) => "error",
        (0, _) => "warn",
        (1, _) => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("VELLUM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        // A device's log may lie on the very disk that is full: a line that cannot be written is
        // dropped, instead of a complaint that cannot be written either and ends the server.
        .log_internal_errors(false)
        .init();
}

/// A path for people: without control characters.
fn shown(path: &Path) -> String {
    path.display().to_string().replace(char::is_control, "?")
}
