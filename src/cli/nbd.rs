//! `vellum nbd NAME…`

use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};

use super::Context;
use crate::engine::serve::export;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::export::nbd::{
    ClientCertificates, Server, ServerConfig, TlsConfig, bind_tcp, bind_unix,
};

/// Arguments of `nbd`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Containers (writable) and images (read-only); each is an export of its name
    #[arg(required = true)]
    names: Vec<String>,
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on TCP: HOST:PORT, or PORT on this host alone [default without --socket: 10809]
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
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_connections: usize,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let signals = block_signals()?;
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
    let config = ServerConfig {
        max_connections: args.max_connections,
        tls,
        ..ServerConfig::default()
    };
    let server = Arc::new(Server::new(config)?);
    // Closed after the server's last request, at the end of this function.
    let mut chains = Vec::new();
    for name in &args.names {
        let (export, chain) = export(&store, name, args.read_only)?;
        server.add_export(export)?;
        chains.push(chain);
    }
    let mut listeners = Vec::new();
    let mut socket_file = None;
    if let Some(path) = &args.socket {
        let (listener, file) = bind_unix(path)?;
        socket_file = Some(file);
        let server = Arc::clone(&server);
        listeners.push(std::thread::spawn(move || server.serve_unix(listener)));
        context
            .out
            .note(&format!("listening on {}", path.display()));
    }
    if args.listen.is_some() || args.socket.is_none() {
        let listener = bind_tcp(args.listen.as_deref().unwrap_or_default())?;
        let address = listener
            .local_addr()
            .context(|| "the listening socket has no address")?;
        let server = Arc::clone(&server);
        listeners.push(std::thread::spawn(move || server.serve_tcp(listener)));
        context.out.note(&format!("listening on {address}"));
    }
    signals.wait().context(|| "cannot wait for signals")?;
    drop(socket_file);
    let ended = server.shutdown();
    for listener in listeners {
        listener
            .join()
            .map_err(|_| Error::new(ErrorKind::Io, "a listener ended unexpectedly"))??;
    }
    ended
}

/// SIGTERM and SIGINT come to whoever waits for them. Before any thread is started.
fn block_signals() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context(|| "cannot block signals")?;
    Ok(signals)
}
