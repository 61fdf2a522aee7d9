//! `vellum vhost NAME`

use std::path::PathBuf;

use super::Context;
use super::server::prepare;
use vellum_base::error::{Error, Result, ResultExt};
use vellum_engine::serve::disk;
use vellum_export::vhost::{DEFAULT_QUEUES, MAX_QUEUES, bind_unix};

/// Arguments of `vhost`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The machine's memory must be shared, and its monitor connect again by itself. With QEMU:
  -object memory-backend-memfd,id=mem,size=2G,share=on -machine memory-backend=mem
  -chardev socket,id=disk,path=PATH,reconnect=1 -device vhost-user-blk-pci,chardev=disk
docs/vhost.md has the settings of Cloud Hypervisor, Firecracker and Kata.

While the machine runs, `vellum snapshot`, `fork` and `resize` work on its disk.

Exit status: 0 after SIGTERM, SIGINT or SIGHUP; 1 after a failure; killed by SIGABRT (134 in a shell) after a \
fault of Vellum's own. The machine's requests wait until it is started again, by hand or by systemd \
(Restart=on-failure), and nothing is lost.")]
pub(super) struct Args {
    /// A container (writable), an image or a snapshot (C@NAME; read-only)
    #[arg(add = super::completions::containers_and_images())]
    name: String,
    /// Listen on this unix socket, of mode 0600
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Queues that the machine may use: one a processor is enough
    #[arg(long, value_name = "N", default_value_t = DEFAULT_QUEUES,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: u16,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let (store, signals) = prepare(context, args.read_only)?;
    let name = &args.name;
    let (server, chain) = disk(&store, name, args.read_only, args.queues)?;
    let (listener, socket_file) = bind_unix(&args.socket)?;
    let serving = std::thread::spawn({
        let server = server.clone();
        move || server.serve(listener)
    });
    context
        .out
        .note(&format!("listening on {}", args.socket.display()));
    signals.wait().context(|| "cannot wait for signals")?;
    drop(socket_file);
    server.shutdown();
    let ended = serving
        .join()
        .map_err(|_| Error::internal("the server panicked"))?;
    let closed = chain
        .close()
        .map_err(|error| error.context(format!("{name} was not closed in order")));
    ended.and(closed)
}
