//! `vellum mount C [DIR]` and `vellum umount C…`

use std::io::IsTerminal;
use std::path::PathBuf;

use super::output::write_out;
use super::{Context, shown};
use crate::engine::mount::{Rights, mount as mount_container, umount as umount_container};
use crate::error::Result;

/// Arguments of `mount`.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The container
    container: String,
    /// Where; the directory must exist [default: a directory under the store]
    dir: Option<PathBuf>,
    /// Let setuid programs of the container work for users of the host who can walk to it
    #[arg(long)]
    suid: bool,
    /// Let device nodes of the container open the host's devices
    #[arg(long)]
    dev: bool,
}

/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
    /// Also while programs use it: they get I/O errors
    #[arg(short, long)]
    force: bool,
}

pub(super) fn mount(args: &MountArgs, context: &Context) -> Result<()> {
    let rights = Rights {
        suid: args.suid,
        dev: args.dev,
    };
    let store = context.store()?;
    let mounted = mount_container(&store, &args.container, args.dir.as_deref(), rights)?;
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

pub(super) fn umount(args: &UmountArgs, context: &Context) -> Result<()> {
    let store = context.store()?;
    super::remove::each(&args.containers, context, |name| {
        umount_container(&store, name, args.force)
    })
}
