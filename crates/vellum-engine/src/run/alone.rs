//! A command that runs alone in a container, which is mounted for it and put back after it.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use super::activity::{self, Activity, Owner, forget, kill_left};
use super::bundle::{Start, prepare};
use super::end::End;
use super::foreground::Foreground;
use super::waiter::Background;
use super::{Ended, FAILURE, Traced, ended, logged, scaffold};
use crate::mount::{Rights, mount_anew, mount_locked};
use crate::mount_point::{self, mounted};
use crate::seal::sync_file_system;
use crate::teardown::{end_for_good, refuse_halted, take_over, unmount_ended};
use crate::{lock_container, lock_renamed};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::storage::Held;
use vellum_export::device::{self, Identity, boot_id};
use vellum_fs::run_dir::RunDir;
use vellum_store::{ContainerRecord, Store};

/// Which command is run alone in a container.
#[derive(Clone, Copy)]
pub(super) enum Whose<'a> {
    /// The container's own, whose end is noted; maybe in the background.
    Own(Option<&'a Background>),
    /// That of a trace, in a container that was made for it.
    Traced(Traced),
    /// Another one.
    Another,
}

/// A container that nothing runs in, until this is dropped.
pub(super) struct Vacant {
    /// With the user, directory and environment of the command that is to be run.
    container: ContainerRecord,
    busy: Box<dyn Held>,
}

/// Sees to it that nothing runs in a container, nor will.
///
/// # Errors
/// [`ErrorKind::InUse`] where something does, or begins or ends just now.
pub(super) fn vacant(store: &Store, container: &ContainerRecord) -> Result<Vacant> {
    let (now, busy) = lock_container(store, container)?;
    let container = ContainerRecord {
        config: container.config.clone(),
        ..now
    };
    // What a killed command left is in the way of the new one.
    end_for_good(store, &container, false)?;
    refuse_halted(&store.run_dir(&container), &container.name)?;
    take_over(store, &container)?;
    Ok(Vacant { container, busy })
}

/// Mounts a container that nothing runs in, unless it is, runs a command, and puts all back.
pub(super) fn run_alone(
    store: &Store,
    vacant: Vacant,
    start: &Start,
    whose: Whose<'_>,
) -> Result<Ended> {
    let Vacant { container, busy } = vacant;
    let container = &container;
    let run_dir = store.run_dir(container);
    if let Whose::Own(_) = whose {
        store.begin_run(&container.into())?;
    }
    let before = mounted(store, container)?;
    let keep_mounted = before.is_some();
    let owner = new_owner(container, &run_dir, start, keep_mounted)?;
    let prepare = || {
        // First, so that whoever comes after us should we be killed knows what to unmount.
        owner.write(&run_dir)?;
        let rootfs = match before {
            Some(there) => {
                let there = if there.given_up {
                    mount_anew(store, container, &there, None, None)?
                } else {
                    there
                };
                let atime = container.atime.unwrap_or_default();
                mount_point::inner_dir(&run_dir, &there.dir, &there.device, atime)?
            }
            None => mount_locked(store, container, None, Rights::ALL)?.dir,
        };
        if let Some(no) = prepare(store, container, start, &run_dir, &rootfs, &owner)? {
            return Ok(Err(no));
        }
        // From here on signals are the command's; what came before is ours.
        let foreground = Foreground::new()?;
        interrupt::check()?;
        Ok(Ok((rootfs, foreground)))
    };
    let undo = |status| {
        // Nothing runs yet; the first failure is what matters.
        let _held = interrupt::hold();
        let _ = note_end(store, container, whose, status);
        let _ = end_alone(store, container, keep_mounted);
    };
    let (rootfs, foreground) = match prepare() {
        Ok(Ok(prepared)) => prepared,
        Ok(Err(no)) => {
            undo(no.status);
            return Ok(no.into());
        }
        Err(error) => {
            undo(FAILURE);
            return Err(error);
        }
    };
    // Others may ask, look and enter while it runs.
    drop(busy);
    let ended = supervise(&foreground, &run_dir, owner, &rootfs, whose);
    // First, so that it is known whatever comes in between.
    let status = ended.as_ref().map_or(FAILURE, |ended| ended.status);
    let noted = note_end(store, container, whose, status);
    let put_back = put_back(store, container, keep_mounted);
    let ended = ended?;
    put_back?;
    noted?;
    Ok(ended)
}

/// Who runs a command in a container, before anything of it is there.
fn new_owner(
    container: &ContainerRecord,
    run_dir: &RunDir,
    start: &Start,
    keep_mounted: bool,
) -> Result<Owner> {
    let oci = run_dir.oci().join("root");
    fs::create_dir_all(&oci).context(|| format!("cannot make {}", oci.display()))?;
    Ok(Owner {
        id: container.id.to_string(),
        program: start.program.clone(),
        waiter: Identity::current(),
        runner: None,
        cgroup: format!("vellum-{}", container.id),
        keep_mounted,
        boot_id: boot_id()?,
        place: run_dir.place().ok(),
    })
}

/// Notes how a container's own command ended.
fn note_end(
    store: &Store,
    container: &ContainerRecord,
    whose: Whose<'_>,
    status: u8,
) -> Result<()> {
    let Whose::Own(_) = whose else {
        return Ok(());
    };
    match store.end_run(&container.into(), status) {
        // Removed by force.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes what a run left, and unmounts.
fn put_back(store: &Store, container: &ContainerRecord, keep_mounted: bool) -> Result<()> {
    let _held = interrupt::hold();
    let (_, _busy) = match lock_renamed(store, container) {
        // Removed by force, mounts and all.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let run_dir = store.run_dir(container);
    match Owner::read(&run_dir)? {
        // Ended by force, and another runs in it by now.
        Some(owner) if owner.waiter != Identity::current() => Ok(()),
        Some(_) => match end_alone(store, container, keep_mounted) {
            Err(error) if error.kind() == ErrorKind::InUse && !keep_mounted => {
                leave_mounted(store, container, &error)
            }
            other => other,
        },
        // Ended by force.
        None => Ok(()),
    }
}

/// Leaves a container whose command has ended mounted, since a program of the host uses its files, with
/// what the command wrote on the disk, as after an unmount. A command of ours unmounts it when it is done.
fn leave_mounted(store: &Store, container: &ContainerRecord, why: &Error) -> Result<()> {
    let run_dir = store.run_dir(container);
    forget(&run_dir)?;
    if let Some(mounted) = mounted(store, container)? {
        sync_file_system(&mounted.dir)?;
    }
    let name = store.find_container(&container.into())?.name;
    tracing::warn!(
        "{why}: {name} stays mounted: `vellum umount {name}` when nobody uses its files"
    );
    Ok(())
}

/// True where a container is mounted for a command that runs in it, and is unmounted when that ends.
pub(crate) fn is_mounted_for_run(run_dir: &RunDir) -> Result<bool> {
    Ok(Owner::read(run_dir)?.is_some_and(|owner| !owner.keep_mounted))
}

/// Unmounts a container that was [mounted for a run](is_mounted_for_run), where that has ended meanwhile
/// and could not, since its files were in use.
pub(crate) fn unmount_after_run(store: &Store, container: &ContainerRecord) -> Result<()> {
    let run_dir = store.run_dir(container);
    if matches!(activity::activity_in(&run_dir)?, Activity::Running { .. }) {
        return Ok(());
    }
    // Whoever ends the run has the lock until it is unmounted, or left to us.
    let (_, _busy) = lock_renamed(store, container)?;
    match Owner::read(&run_dir)? {
        None if device::status(&run_dir)?.is_some() => unmount_ended(store, container, false),
        _ => Ok(()),
    }
}

/// Ends what is left of a run of ours, and unmounts.
fn end_alone(store: &Store, container: &ContainerRecord, keep_mounted: bool) -> Result<()> {
    let run_dir = store.run_dir(container);
    if keep_mounted {
        kill_left(&run_dir)?;
        if let Some(mounted) = mounted(store, container)? {
            let dir = mount_point::writable_dir(&run_dir, &mounted.dir)?;
            scaffold::take_away(store, container, &dir)?;
        }
        mount_point::end_inner(&run_dir)?;
        return forget(&run_dir);
    }
    kill_left(&run_dir)?;
    unmount_ended(store, container, false)
}

/// Starts the runtime on the bundle and waits for it.
fn supervise(
    foreground: &Foreground,
    run_dir: &RunDir,
    mut owner: Owner,
    rootfs: &Path,
    whose: Whose<'_>,
) -> Result<Ended> {
    let oci = run_dir.oci();
    let runtime = owner.runtime(run_dir);
    let log = oci.join("log");
    let mut command = logged(&runtime, &log);
    command
        .args(["run", "--bundle"])
        .arg(&oci)
        .arg("--pid-file")
        .arg(oci.join("pid"))
        .arg(&owner.id);
    match whose {
        Whose::Own(Some(background)) => background.stdio(&mut command)?,
        Whose::Traced(_) => drop(command.stdin(Stdio::null()).stdout(std::io::stderr())),
        Whose::Own(None) | Whose::Another => {}
    }
    let mut child = runtime.spawn(&mut command, Some(rootfs))?;
    let noted = Identity::of(child.id() as i32).and_then(|runner| {
        owner.runner = runner;
        owner.write(run_dir)
    });
    if let Whose::Own(Some(background)) = whose {
        background.tell_when_it_runs(&mut child, &owner, run_dir)?;
    }
    let mut end = match whose {
        Whose::Traced(Traced { limit: Some(limit) }) => Some(End::after(limit, &owner, run_dir)),
        Whose::Traced(_) | Whose::Own(_) | Whose::Another => None,
    };
    let status = foreground.wait(&mut child, |child| {
        end.as_mut().map_or(Ok(()), |end| end.look(child))
    })?;
    noted?;
    Ok(ended(status, &log))
}
