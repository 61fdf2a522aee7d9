//! A container gets another name, mounted or not.

use super::lock_container;
use super::upgrade::runs_this_program;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_export::device;
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// Gives a container another name. Its id stays, and by that goes whatever it has: a mount and its
/// servers, an NBD server, a command that runs in it.
///
/// # Errors
/// As [`Store::rename_container`]; [`ErrorKind::Unsupported`] where it is mounted, and served by an
/// earlier version of the program, which finds it by its name.
pub fn rename(store: &Store, name: &str, new: &str) -> Result<ContainerRecord> {
    let (container, _busy) = lock_container(store, &store.container(name)?)?;
    refuse_servers_by_name(&store.run_dir(&container), name)?;
    store.rename_container(name, new)
}

fn refuse_servers_by_name(run_dir: &RunDir, name: &str) -> Result<()> {
    let Some(status) = device::status(run_dir)?.filter(|status| status.alive) else {
        return Ok(());
    };
    // Of this very program they go by the run directory where nobody told them the id.
    if status.argument("--id").is_some() || runs_this_program(&status) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the container {name} is mounted, and an earlier version of the program serves it, which \
             would look for it by its old name: `vellum upgrade-servers {name}` first"
        ),
    ))
}
