//! `vellum push`, `vellum pull`, `vellum complete`, `vellum login` and `vellum logout`.

use std::io::{BufRead, Read, stdin};
use std::num::NonZeroU64;

use console::Term;
use serde::Serialize;

use super::Context;
use super::encryption::{FormatArgs, IdentityArgs};
use super::output::{counted, human_size};
use super::progress::Bars;
use super::trace::PushTraceArgs;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::size::parse_bytes;
use vellum_engine::lazy::{Background, complete};
use vellum_engine::registry::{
    Came, PullOptions, PullReport, PushFormat, PushOptions, PushReport, pull, push,
};
use vellum_image::Platform;
use vellum_registry::{Access, Location, Session, Stored, login, logout};
use vellum_store::Store;

/// The longest password that is read.
const MAX_PASSWORD: u64 = 64 << 10;

/// Arguments of `push`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What the registry has is not sent again, and what another of its repositories is known to have is \
mounted from there. One tag serves everybody: docker, podman, containerd and skopeo take the plain \
image, `vellum pull` the block layers.

Examples:
  vellum push web registry.example/team/web:1
  vellum push web@before-upgrade localhost:5000/web:old --format oci
  vellum push web registry.example/team/web:1 --trace 'nginx -t'
  vellum push web s3://bucket/team/web:1
  vellum push web registry.example/team/web:1 --encrypt-to age1… --encrypt-to ops.recipients

Credentials are docker's and podman's, see `vellum login`.")]
pub(super) struct PushArgs {
    /// An image, a container or a snapshot (C@NAME); a container that is mounted is sealed as by a commit, and
    /// goes on
    name: String,
    /// Where it goes
    // Not as above: rustdoc takes brackets for links.
    #[arg(
        value_name = "REF",
        help = "Where it goes: HOST[:PORT]/REPOSITORY[:TAG], or file:///DIR[:TAG], s3://BUCKET[/PREFIX][:TAG], gs://…, az://…"
    )]
    reference: String,
    #[command(flatten)]
    format: FormatArgs,
    /// How much the block layers are compressed (zstd), 1 to 19
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    #[command(flatten)]
    trace: PushTraceArgs,
    #[command(flatten)]
    access: AccessArgs,
}

/// How a registry is spoken to.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct AccessArgs {
    /// Speak http to the registry, without TLS; this host (localhost, 127.0.0.1) is spoken to so anyway
    #[arg(long)]
    plain_http: bool,
}

impl AccessArgs {
    fn access(self) -> Access {
        Access {
            plain_http: self.plain_http,
        }
    }
}

/// What can be pushed, as people say it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum FormatArg {
    /// The container image, and its block layers beside it
    Both,
    /// The container image alone
    Oci,
    /// The block layers alone: other programs cannot use them
    Blocks,
}

impl From<FormatArg> for PushFormat {
    fn from(format: FormatArg) -> PushFormat {
        match format {
            FormatArg::Both => PushFormat::Both,
            FormatArg::Oci => PushFormat::Oci,
            FormatArg::Blocks => PushFormat::Blocks,
        }
    }
}

/// Arguments of `pull`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Any registry's images are taken. Where `vellum push` has put block layers beside one, these are \
fetched, and nothing has to be unpacked. Layers that the store has are not fetched.

Examples:
  vellum pull debian:12
  vellum pull registry.example/team/web:1 web
  vellum pull --platform linux/arm64 alpine alpine-arm64
  vellum pull --lazy registry.example/team/web:1 web
  vellum pull --lazy s3://bucket/team/web:1 web
  vellum pull --lazy --background=20M registry.example/team/web:1 web
  vellum pull registry.example/team/secret:1 --identity web.key

Credentials are docker's and podman's, see `vellum login`.")]
pub(super) struct PullArgs {
    /// What is fetched
    #[arg(
        value_name = "REF",
        help = "The image: [HOST[:PORT]/]REPOSITORY[:TAG|@DIGEST], without a host Docker Hub's; or file:///DIR[:TAG], \
                s3://BUCKET[/PREFIX][:TAG], gs://…, az://…"
    )]
    reference: String,
    /// What it is called here [default: REF]
    name: Option<String>,
    /// Of an image for several platforms, which [default: this host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    #[command(flatten)]
    lazily: LazyArgs,
    #[command(flatten)]
    identity: IdentityArgs,
    #[command(flatten)]
    access: AccessArgs,
}

/// How much of an image is fetched before it is used, and when the rest.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct LazyArgs {
    /// Of an image that is pulled, fetch what is needed to use it, and each block when it is first read
    #[arg(long)]
    lazy: bool,
    /// Fetch the rest too, whenever nobody waits for a block, at most RATE (20M) in a second
    #[arg(
        long,
        value_name = "RATE",
        requires = "lazy",
        num_args = 0..=1,
        require_equals = true,
        value_parser = parse_rate
    )]
    background: Option<Option<NonZeroU64>>,
}

fn parse_rate(text: &str) -> std::result::Result<NonZeroU64, String> {
    let bytes = parse_bytes(text)?;
    NonZeroU64::new(bytes).ok_or_else(|| "0 is no rate".to_owned())
}

impl LazyArgs {
    fn options(
        self,
        platform: Option<Platform>,
        access: AccessArgs,
        identity: &IdentityArgs,
    ) -> PullOptions {
        PullOptions {
            platform,
            identities: identity.identity.clone(),
            access: access.access(),
            lazy: self.lazy,
            background: self.background.map(|rate| Background { rate }),
        }
    }
}

/// Arguments of `complete`.
#[derive(Debug, clap::Args)]
pub(super) struct CompleteArgs {
    /// An image, or a container, whose image is meant
    name: String,
}

/// Arguments of `login`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The password is asked for, or read from standard input. It is kept where docker keeps it: in the \
credential helper that ~/.docker/config.json names, else in that file (DOCKER_CONFIG names another \
directory).

Examples:
  vellum login registry.example
  echo $TOKEN | vellum login ghcr.io -u me --password-stdin")]
pub(super) struct LoginArgs {
    /// The registry
    #[arg(default_value = "docker.io", hide_default_value = true)]
    #[arg(help = "The registry: HOST[:PORT] [default: Docker Hub]")]
    registry: String,
    /// The name [default: asked for]
    #[arg(short, long, value_name = "USER")]
    username: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// Arguments of `logout`.
#[derive(Debug, clap::Args)]
pub(super) struct LogoutArgs {
    /// The registry
    #[arg(default_value = "docker.io", hide_default_value = true)]
    #[arg(help = "The registry: HOST[:PORT] [default: Docker Hub]")]
    registry: String,
}

pub(super) fn run_push(args: &PushArgs, context: &Context) -> Result<()> {
    let (format, encryption) = args.format.wanted()?;
    let options = PushOptions {
        format,
        encryption,
        level: args.level,
        access: args.access.access(),
        trace: args.trace.source()?,
        hot: args.trace.is_hot(),
    };
    if options.trace.is_some() && options.format == PushFormat::Oci {
        let text = "a hot pack is of block layers, which --format oci leaves out: leave one of the two out";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    let reference = Location::parse(&args.reference)?;
    let store = context.store_to_change()?;
    let watch = Bars::new(context.out);
    let report = push(&store, &args.name, &reference, &options, &watch)?;
    context.out.print(&report, pushed)
}

fn pushed(report: &PushReport) -> String {
    let mut there = String::new();
    if report.existed > 0 {
        there += &format!(", {} there already", report.existed);
    }
    if report.mounted > 0 {
        there += &format!(", {} from another repository", report.mounted);
    }
    let plural = if report.sent == 1 { "" } else { "s" };
    format!(
        "pushed {} to {}: {} blob{plural} sent ({}){there}\n{}\n",
        report.name,
        report.reference,
        report.sent,
        human_size(report.sent_bytes),
        report.digest
    )
}

pub(super) fn run_pull(args: &PullArgs, context: &Context) -> Result<()> {
    crash_point::arm()?;
    let store = context.store_to_fill()?;
    let options = args
        .lazily
        .options(args.platform.clone(), args.access, &args.identity);
    let reference = Location::parse(&args.reference)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => reference.name(&args.reference),
    };
    let report = pull(&store, &reference, &name, &options, &Bars::new(context.out))?;
    context
        .out
        .print(&report, |report| pulled("pulled", report))
}

/// What came of an image that was `done`: pulled, loaded.
pub(super) fn pulled(done: &str, report: &PullReport) -> String {
    let layers = report.layers.len();
    let plural = if layers == 1 { "" } else { "s" };
    let existed = report.layers.iter().filter(|layer| layer.existed).count();
    let new = report.layers.iter().filter(|layer| !layer.existed);
    let bytes: u64 = match report.came {
        Came::Lazily => 0,
        Came::Blocks | Came::Tars => new.map(|layer| layer.bytes).sum(),
    };
    let shared = match existed {
        0 => String::new(),
        existed => format!(", {existed} of them there already"),
    };
    let how = match report.came {
        Came::Blocks => "as blocks",
        Came::Lazily => "lazily: the rest comes when it is read",
        Came::Tars => "unpacked",
    };
    format!(
        "{done} {}: {layers} layer{plural}{shared}, {} written, {how}\n{}\n",
        report.image.name,
        human_size(bytes),
        report.digest
    )
}

/// Pulls what is to be run, where the store has no image of that name, and it can be one of a registry. Returns what
/// it is called here.
///
/// # Errors
/// As [`pull`].
pub(super) fn pull_absent(
    store: &Store,
    image: &str,
    context: &Context,
    args: AccessArgs,
    (lazily, identity): (LazyArgs, &IdentityArgs),
) -> Result<String> {
    let reference = Location::parse(image);
    let name = match &reference {
        Ok(reference) => reference.name(image),
        Err(_) => image.to_owned(),
    };
    let absent = match store.image(&name) {
        Err(error) if error.kind() == ErrorKind::NotFound => error,
        _ => return Ok(name),
    };
    // What is no reference is a name that is not there.
    let Ok(reference) = reference else {
        return Err(absent);
    };
    let options = lazily.options(None, args, identity);
    context.out.note(&format!(
        "there is no image {image} here: pulling {reference}"
    ));
    match pull(store, &reference, &name, &options, &Bars::new(context.out)) {
        // Another command pulled it meanwhile.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && store.image(&name).is_ok() => {}
        pulled => drop(pulled?),
    }
    Ok(name)
}

pub(super) fn run_complete(args: &CompleteArgs, context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    let report = complete(&store, &args.name, &Bars::new(context.out))?;
    context
        .out
        .print(&report, |report| match report.layers.len() {
            0 => format!("all of {} is here\n", args.name),
            layers => format!("completed {}: {}\n", args.name, counted(layers, "layer")),
        })
}

#[derive(Serialize)]
struct LoggedIn {
    registry: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    helper: Option<String>,
}

pub(super) fn run_login(args: &LoginArgs, context: &Context) -> Result<()> {
    let registry = &args.registry;
    let user = match (&args.username, args.password_stdin) {
        (Some(user), _) => user.clone(),
        (None, true) => {
            let text = "--password-stdin leaves nowhere to ask for the name: give -u";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        (None, false) => ask_name()?,
    };
    let password = match args.password_stdin {
        true => read_password()?,
        false => ask_password()?,
    };
    Session::try_login(registry, args.access.access(), &user, &password)?;
    let stored = login(registry, &user, &password)?;
    let (file, helper) = match stored {
        Stored::File(path) => (Some(path.display().to_string()), None),
        Stored::Helper(name) => (None, Some(name)),
    };
    let report = LoggedIn {
        registry: registry.clone(),
        file,
        helper,
    };
    context.out.print(&report, |report| {
        let kept = match (&report.file, &report.helper) {
            (Some(file), _) => format!(
                "; the password lies in {file}, unencrypted: a credential helper (credsStore in it) keeps it better"
            ),
            (_, Some(helper)) => format!("; docker-credential-{helper} keeps the password"),
            _ => String::new(),
        };
        format!("logged in to {}{kept}\n", report.registry)
    })
}

fn ask_name() -> Result<String> {
    let term = Term::stderr();
    if !term.is_term() {
        let text = "there is no terminal to ask for the name: give -u, and --password-stdin";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    let asked = term.write_str("Name: ").and_then(|()| {
        let mut line = String::new();
        stdin().lock().read_line(&mut line)?;
        Ok(line.trim().to_owned())
    });
    asked.context(|| "asking for the name")
}

fn ask_password() -> Result<String> {
    let term = Term::stderr();
    if !term.is_term() {
        let text = "there is no terminal to ask for the password: give --password-stdin";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    let asked = term
        .write_str("Password: ")
        .and_then(|()| term.read_secure_line());
    asked.context(|| "asking for the password")
}

fn read_password() -> Result<String> {
    let mut password = String::new();
    stdin()
        .take(MAX_PASSWORD)
        .read_to_string(&mut password)
        .context(|| "reading the password from standard input")?;
    Ok(password.trim_end_matches(['\r', '\n']).to_owned())
}

pub(super) fn run_logout(args: &LogoutArgs, context: &Context) -> Result<()> {
    let registry = &args.registry;
    if !logout(registry)? {
        let text = format!("nobody is logged in to {registry}: `vellum login {registry}` does it");
        return Err(Error::new(ErrorKind::NotFound, text));
    }
    let report = LoggedIn {
        registry: registry.clone(),
        file: None,
        helper: None,
    };
    let print = |report: &LoggedIn| format!("logged out of {}\n", report.registry);
    context.out.print(&report, print)
}
