//! `vellum nbd NAME…`

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::Context;
use super::server::prepare;
use vellum_base::error::{Error, Result, ResultExt};
use vellum_engine::serve::export;
use vellum_export::nbd::{
    ClientCertificates, Server, ServerConfig, SocketFile, TlsConfig, bind_tcp, bind_unix,
};

/// Arguments of `nbd`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 after SIGTERM, SIGINT or SIGHUP; 1 after a failure; killed by SIGABRT (134 in a shell) after a \
fault of Vellum's own. Clients that reconnect lose nothing that was acknowledged once it is started again, \
by hand or by systemd (Restart=on-failure).")]
pub(super) struct Args {
    /// Containers (writable), images and snapshots (C@NAME; read-only); each is an export of its name
    #[arg(required = true)]
    #[arg(add = super::completions::containers_and_images())]
    names: Vec<String>,
    /// Listen on this unix socket, of mode 0600 [default without --listen: run/nbd.sock in the store]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on TCP: HOST:PORT, or PORT on this host alone. Without TLS anybody who reaches it may
    /// read, and write what is writable
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Serve over TLS alone, with server-cert.pem and server-key.pem from this directory
    #[arg(long, value_name = "DIR")]
    tls_certs: Option<PathBuf>,
    /// Refuse clients without a certificate that ca-cert.pem (in the same directory) vouches for
    #[arg(long, requires = "tls_certs")]
    tls_verify_clients: bool,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Clients served at once
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().max_connections)]
    max_connections: usize,
    /// Memory for the requests of all clients together, beyond 2 MiB for each
    #[arg(long, value_name = "SIZE", value_parser = vellum_base::size::parse_size, default_value = "256M")]
    memory: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let (store, signals) = prepare(context, args.read_only)?;
    let server = Arc::new(Server::new(config(args)?)?);
    // Closed after the server's last request.
    let mut chains = Vec::new();
    let mut writable = Vec::new();
    for name in &args.names {
        let (export, chain) = export(&store, name, args.read_only)?;
        if !export.is_read_only() {
            writable.push(name.as_str());
        }
        server.add_export(export)?;
        chains.push((name, chain));
    }
    let (listeners, socket_file) =
        listen(args, context, &server, store.runs().nbd_socket(), &writable)?;
    signals.wait().context(|| "cannot wait for signals")?;
    drop(socket_file);
    let ended = server.shutdown();
    for listener in listeners {
        listener
            .join()
            .map_err(|_| Error::internal("a listener panicked"))??;
    }
    let mut closed = Ok(());
    for (name, chain) in chains {
        if let Err(error) = chain.close() {
            let error = error.context(format!("{name} was not closed in order"));
            tracing::error!("{error}");
            closed = closed.and(Err(error));
        }
    }
    ended.and(closed)
}

fn config(args: &Args) -> Result<ServerConfig> {
    let clients = if args.tls_verify_clients {
        ClientCertificates::Required
    } else {
        ClientCertificates::NotRequired
    };
    let tls = args
        .tls_certs
        .as_deref()
        .map(|dir| TlsConfig::load(dir, clients))
        .transpose()?;
    Ok(ServerConfig {
        max_connections: args.max_connections,
        // All of them come back at once when the server was started again.
        max_handshakes: ServerConfig::default()
            .max_handshakes
            .max(args.max_connections),
        memory: usize::try_from(args.memory).unwrap_or(usize::MAX),
        tls,
        ..ServerConfig::default()
    })
}

/// Threads that accept clients.
type Listeners = Vec<JoinHandle<Result<()>>>;

/// Listens where the arguments say, or else on a unix socket at `default`, which goes with the answer.
fn listen(
    args: &Args,
    context: &Context,
    server: &Arc<Server>,
    default: PathBuf,
    writable: &[&str],
) -> Result<(Listeners, Option<SocketFile>)> {
    let mut listeners = Vec::new();
    let mut socket_file = None;
    let socket = match (&args.socket, &args.listen) {
        (Some(path), _) => Some(path.clone()),
        (None, Some(_)) => None,
        (None, None) => Some(default),
    };
    if let Some(path) = &socket {
        let (listener, file) = bind_unix(path)?;
        socket_file = Some(file);
        let server = Arc::clone(server);
        listeners.push(std::thread::spawn(move || server.serve_unix(listener)));
        context
            .out
            .note(&format!("listening on {}", path.display()));
    }
    if let Some(address) = &args.listen {
        let listener = bind_tcp(address)?;
        let address = listener
            .local_addr()
            .context(|| "the listening socket has no address")?;
        if let Some(warning) = exposure(args, address.ip(), writable) {
            tracing::warn!("{address}: {warning}");
        }
        let server = Arc::clone(server);
        listeners.push(std::thread::spawn(move || server.serve_tcp(listener)));
        context.out.note(&format!("listening on {address}"));
    }
    Ok((listeners, socket_file))
}

/// What somebody who listens on `ip` may not have thought of.
fn exposure(args: &Args, ip: IpAddr, writable: &[&str]) -> Option<String> {
    let what = match writable {
        [] => String::from("read what it serves"),
        names => format!("read and write {}", names.join(", ")),
    };
    let cure = "use --tls-certs with --tls-verify-clients, or a unix socket (--socket)";
    match (&args.tls_certs, ip.is_loopback()) {
        (Some(_), _) if args.tls_verify_clients => None,
        (Some(_), true) => None,
        (Some(_), false) => Some(format!(
            "TLS without client certificates: anybody who reaches this address may {what}: add \
             --tls-verify-clients"
        )),
        (None, true) => Some(format!(
            "no TLS: every user of this host, and every container on its network, may {what}: {cure}"
        )),
        (None, false) => Some(format!(
            "no TLS: anybody who reaches this address may {what}, and whoever is on the way may read \
             and change it: {cure}"
        )),
    }
}
