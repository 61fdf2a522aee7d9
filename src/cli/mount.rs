//! `vellum mount C [DIR]` and `vellum umount C…`

use std::io::IsTerminal;
use std::path::PathBuf;

use super::output::write_out;
use super::transport::TransportArgs;
use super::{Context, shown};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::lost;
use vellum_engine::mount::{Rights, mount as mount_container};
use vellum_engine::teardown::{RemoveOptions, remove, umount as umount_container};
use vellum_fs::ext4::Atime;
use vellum_store::{NewContainer, Store};

/// Arguments of `mount`.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The container; of an image one is made, which is mounted read-only
    #[arg(add = super::completions::containers_and_images())]
    container: String,
    /// Where; the directory must exist [default: a directory under the store]
    dir: Option<PathBuf>,
    /// Let setuid programs of the container work for users of the host who can walk to it
    #[arg(long)]
    suid: bool,
    /// Let device nodes of the container open the host's devices
    #[arg(long)]
    dev: bool,
    /// Let nothing be written through the mount; what runs in the container still writes
    #[arg(short, long)]
    read_only: bool,
    #[command(flatten)]
    transport: TransportArgs,
    /// When reads change the access times of its files [default: as it was made, or noatime]
    #[arg(long, value_name = "WHEN", value_enum)]
    atime: Option<Atime>,
}

/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
One that is not mounted is fine: what a crash left of its mount is removed. One that an NBD server has is \
refused, with the process that has it.")]
pub(super) struct UmountArgs {
    /// The containers
    #[arg(required_unless_present = "all")]
    #[arg(add = super::completions::containers_and_images())]
    containers: Vec<String>,
    /// All containers of the store
    #[arg(short, long, conflicts_with = "containers")]
    all: bool,
    /// Also while something runs in it, which is killed, or programs use it: they get I/O errors. And
    /// where the store cannot be read (its disk is gone): what is mounted, attached and running of it is
    /// found without it, by its path
    #[arg(short, long)]
    force: bool,
}

pub(super) fn mount(args: &MountArgs, context: &Context) -> Result<()> {
    args.transport.choose();
    let store = context.store_to_change()?;
    let made = made_of_image(&store, &args.container)?;
    let rights = Rights {
        suid: args.suid,
        dev: args.dev,
        read_only: args.read_only || made.is_some(),
    };
    let name = made.as_ref().unwrap_or(&args.container);
    let dir = args.dir.as_deref();
    let mounted = mount_container(&store, name, dir, rights, args.atime);
    let mounted = match (mounted, &made) {
        (Ok(mounted), _) => mounted,
        (Err(error), None) => return Err(error),
        (Err(error), Some(made)) => {
            // The first failure is what matters.
            let _ = remove(&store, made, RemoveOptions::default());
            return Err(error);
        }
    };
    if let Some(made) = &made {
        context.out.note(&format!(
            "{} is mounted read-only as the container {made}, made for that: `vellum rm --force {made}` takes it away",
            args.container
        ));
    }
    if context.out.json || std::io::stdout().is_terminal() {
        return context
            .out
            .print(&mounted, |mounted| format!("{}\n", shown(&mounted.dir)));
    }
    // A program gets every byte of it.
    let mut line = mounted.dir.into_os_string().into_encoded_bytes();
    line.push(b'\n');
    write_out(&line)
}

/// The container that is made where `name` is an image's.
fn made_of_image(store: &Store, name: &str) -> Result<Option<String>> {
    if store.container(name).is_ok() || store.image(name).is_err() {
        return Ok(None);
    }
    let made = store.create_container(&NewContainer {
        image: name,
        ..NewContainer::default()
    })?;
    Ok(Some(made.name))
}

pub(super) fn umount(args: &UmountArgs, context: &Context) -> Result<()> {
    // One that is not there is not made: its root may have been unmounted, or moved.
    let store = Store::open(&context.root);
    let gone = |error: &Error| lost::is_lost(error) || error.kind() == ErrorKind::NotFound;
    let store = match store {
        Err(error) if args.force && gone(&error) => Err(error),
        Err(error) => return Err(lost::explain(&context.root, error)),
        Ok(store) => Ok(store),
    };
    let names = match (&store, args.all) {
        (_, false) => args.containers.clone(),
        (Ok(store), true) => match lost::attached(store) {
            Err(error) if args.force && lost::is_lost(&error) => return end_all(context),
            other => other?,
        },
        (Err(_), true) => return end_all(context),
    };
    super::remove::each(&names, context, |name| {
        let failed = match &store {
            Ok(store) => match umount_container(store, name, args.force) {
                Err(error) if args.force && lost::is_lost(&error) => error.to_string(),
                Err(error) => return Err(error),
                Ok(true) => return Ok(()),
                Ok(false) => {
                    context.out.note(&format!("{name} is not mounted"));
                    return Ok(());
                }
            },
            Err(error) => error.to_string(),
        };
        lost::end(&context.root, name).map_err(|error| error.context(failed))
    })
}

/// Ends all devices of a store that cannot be read.
fn end_all(context: &Context) -> Result<()> {
    let ended = lost::end_all(&context.root)?;
    context.out.print(&ended, |ended| {
        ended.iter().map(|name| format!("{name}\n")).collect()
    })
}
