//! `vellum snapshotter`

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Context, DEFAULT_ROOT};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::LockMode;
use vellum_base::{crash_point, fault};
use vellum_engine::device::choose_transport;
use vellum_engine::lazy::PullSecretServer;
use vellum_engine::space::set_policy;
use vellum_export::unix_socket::{SocketFile, bind_unix};
use vellum_snapshotter::config::{Config, DEFAULT_ADDRESS, LogFormat, check_path};
use vellum_snapshotter::content::{ContentStore, DEFAULT_CONTAINERD};
use vellum_snapshotter::image_service::ImageService;
use vellum_snapshotter::pull_secrets::PullSecrets;
use vellum_snapshotter::{Defaults, Snapshotter, service};
use vellum_store::Store;

/// What is said after a panic, whose own message comes before it.
const FAULT: &str = "vellum: this is a fault of Vellum's own, and the snapshotter ends: containers run on, \
    and what was committed is there. Start it again, and please report the lines above";

/// Arguments of `snapshotter`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 after SIGTERM or SIGINT; 1 after a failure; killed by SIGABRT (134 in a shell) after a fault \
of Vellum's own. Started again, as systemd does by the unit in dist/, it goes on where it was.")]
pub(super) struct Args {
    /// The configuration file [default: /etc/vellum/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The socket for containerd [default: /run/vellum/vellum.sock]
    #[arg(long, value_name = "SOCK")]
    address: Option<PathBuf>,
    /// A socket for the kubelet (--image-service-endpoint), by which pods' pull secrets get here; calls are handed on to
    /// containerd [default: none]
    #[arg(long, value_name = "SOCK")]
    cri_image_service: Option<PathBuf>,
    /// containerd's socket, to which they are handed on [default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCK", requires = "cri_image_service")]
    cri_upstream: Option<PathBuf>,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let config = Config::load(args.config.as_deref())?;
    crash_point::arm()?;
    start_log(args, &config)?;
    fault::abort_on_panic(FAULT);
    // The command line first, then the file.
    let root = match &config.root {
        Some(root) if context.root == Path::new(DEFAULT_ROOT) => root,
        _ => &context.root,
    };
    let address = args.address.clone().or_else(|| config.address.clone());
    let address = address.unwrap_or_else(|| DEFAULT_ADDRESS.into());
    for (what, path) in [("--root", root), ("--address", &address)] {
        check_path(what, path)?;
    }
    choose_transport(config.transport);
    let store = Store::open_or_create(root)?;
    let lock = store.runs().snapshotter_lock();
    let held = store
        .storage()
        .lock(&lock, LockMode::Exclusive, false)
        .context(|| format!("cannot lock {}", lock.display()))?;
    let Some(_held) = held else {
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "another snapshotter serves {}: one store belongs to one containerd",
                store.root().display()
            ),
        ));
    };
    if let Some(policy) = config.space {
        let set = set_policy(&store, policy).map_err(|error| error.context("[space]"))?;
        for error in set.failed {
            tracing::warn!("{error}");
        }
    }
    let (listener, socket) = listen(&address)?;
    let metrics = match config.metrics.address {
        Some(address) => Some(TcpListener::bind(address).context(|| {
            format!("cannot listen on {address} for Prometheus ([metrics] address)")
        })?),
        None => None,
    };
    let defaults = Defaults {
        size: config.size()?,
        mounts: config.mounts,
    };
    let secrets = Secrets::keep(args, &config, &store)?;
    let remote = config.remote.remote()?.with_secrets(&secrets.known);
    let snapshotter = Arc::new(Snapshotter::start(&store, defaults, remote)?);
    let containerd = config.diff.containerd.as_deref();
    let content = ContentStore::new(containerd.unwrap_or(Path::new(DEFAULT_CONTAINERD)));
    let served = service::serve(&snapshotter, listener, metrics, &content, || {
        tracing::info!(address = %address.display(), "serves");
        notify("READY=1");
    });
    notify("STOPPING=1");
    // Nobody connects any more; the next to start makes it anew.
    drop(socket);
    secrets.leave();
    if let Some(snapshotter) = Arc::into_inner(snapshotter) {
        snapshotter.stop();
    }
    served
}

/// The pull secrets that are known, and who learns and hears of them.
struct Secrets {
    known: Arc<PullSecrets>,
    service: Option<(ImageService, SocketFile)>,
}

impl Secrets {
    /// Learns of pull secrets, where a socket is named for that.
    fn keep(args: &Args, config: &Config, store: &Store) -> Result<Self> {
        let known = Arc::new(PullSecrets::default());
        let of_line = args.cri_image_service.as_ref();
        let Some(address) = of_line.or(config.cri.image_service.as_ref()) else {
            PullSecretServer::none(&store.runs())?;
            let service = None;
            return Ok(Secrets { known, service });
        };
        let upstream = args.cri_upstream.as_deref();
        let upstream = upstream.or(config.cri.upstream.as_deref());
        let upstream = upstream.or(config.diff.containerd.as_deref());
        let upstream = upstream.unwrap_or(Path::new(DEFAULT_CONTAINERD));
        check_path("--cri-image-service", address)?;
        check_path("--cri-upstream", upstream)?;
        // The fetcher may ask from now on, and waits also where this start fails.
        PullSecretServer::start(&store.runs(), known.clone())?.leave();
        let (listener, socket) = listen(address)?;
        let service = ImageService::start(listener, upstream, Arc::clone(&known))?;
        tracing::info!(address = %address.display(), upstream = %upstream.display(), "image service");
        Ok(Secrets {
            known,
            service: Some((service, socket)),
        })
    }

    fn leave(self) {
        if let Some((service, socket)) = self.service {
            drop(socket);
            drop(service);
        }
    }
}

fn start_log(args: &Args, config: &Config) -> Result<()> {
    let level = args.log_level.as_ref().or(config.log.level.as_ref());
    let level = level.map_or("info", String::as_str);
    let levels = ["error", "warn", "info", "debug", "trace"];
    if !levels.contains(&level) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("log level {level:?}: it is one of {}", levels.join(", ")),
        ));
    }
    let filter = format!("vellum={level},warn");
    let log = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .log_internal_errors(false);
    match config.log.format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// Listens on the socket at `path`, whose directory is made, in place of one that nobody answers on.
fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let what = || format!("cannot listen on {}", path.display());
    if let Some(dir) = path.parent() {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
        made.context(what)?;
    }
    bind_unix(path).context(what)
}

/// Tells systemd how we are doing (sd_notify(3)), if it wants to know.
fn notify(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let name = name.as_encoded_bytes();
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(&*String::from_utf8_lossy(name))),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd cannot be told: {state}");
    }
}
