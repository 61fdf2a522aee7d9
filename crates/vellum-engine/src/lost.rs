//! Ending the devices of a store that cannot be read: its file system was shut down, its disk is gone,
//! its root was unmounted under them. All that is needed is the path: the rest is told by processes'
//! command lines, by sysfs and by the table of mounts.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::mount_point;
use super::run::cgroup;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_export::device::{self, DetachOptions, FoundDevice};
use vellum_fs::run_dir::{RunDir, RunRoot};
use vellum_store::Store;

/// How long each step may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A device of a store that cannot be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostDevice {
    /// The container, by the name that it had when it was mounted, where a process of the device is
    /// left to tell.
    pub container: Option<String>,
    /// Its run directory, whose name is the container's id.
    pub run_dir: RunDir,
    /// Where it is mounted.
    pub mounts: Vec<PathBuf>,
}

impl LostDevice {
    fn is(&self, name: &str) -> bool {
        self.container.as_deref() == Some(name) || self.id() == name
    }

    fn id(&self) -> Cow<'_, str> {
        self.run_dir.name().to_string_lossy()
    }

    /// The container's name, or else its id, with where it is mounted.
    fn describe(&self) -> String {
        let id = self.id();
        let name = self.container.as_deref().unwrap_or(&id);
        match self.mounts.first() {
            Some(dir) => format!("{name} (mounted at {})", dir.display()),
            None => name.to_owned(),
        }
    }
}

/// True for failures of a store that say nothing of what was asked of it.
pub fn is_lost(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Io | ErrorKind::ReadOnly | ErrorKind::Corrupt | ErrorKind::Permission
    )
}

/// What is left attached or running of the store at `root`, which is not read.
///
/// # Errors
/// Where /proc or /sys are missing.
pub fn devices(root: &Path) -> Result<Vec<LostDevice>> {
    let root = match root.canonicalize() {
        Ok(root) => root,
        // Its disk does not even say what lies on the way.
        Err(_) => std::path::absolute(root).unwrap_or_else(|_| root.to_owned()),
    };
    let found = device::find_devices(&RunRoot::of_store(&root))?;
    Ok(found
        .into_iter()
        .map(|found: FoundDevice| LostDevice {
            container: found.argument("--container"),
            run_dir: found.run_dir,
            mounts: found.mounts,
        })
        .collect())
}

/// Adds to the failure to open a store what of it is still there, and how to end that.
pub fn explain(root: &Path, error: Error) -> Error {
    let left = devices(root).unwrap_or_default();
    if left.is_empty() || !is_lost(&error) {
        return error;
    }
    let names: Vec<String> = left.iter().map(LostDevice::describe).collect();
    Error::new(
        error.kind(),
        format!(
            "{error}; still attached: {}: `vellum umount --force NAME`, or --all, ends that without \
             reading the store",
            names.join(", ")
        ),
    )
}

/// Unmounts a container by force and ends its processes and devices, whatever state its store is in.
/// Its files in the store are left as they are. `name` is the container's, or its id.
///
/// # Errors
/// [`ErrorKind::NotFound`] where nothing of that name is left; [`ErrorKind::InUse`] where others
/// mounted something on it.
pub fn end(root: &Path, name: &str) -> Result<()> {
    let all = devices(root)?;
    let wanted: Vec<&LostDevice> = all.iter().filter(|device| device.is(name)).collect();
    if wanted.is_empty() {
        let names: Vec<String> = all.iter().map(LostDevice::describe).collect();
        let left = match names.is_empty() {
            true => "nothing of this store is attached".into(),
            false => format!("left of this store are: {}", names.join(", ")),
        };
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("no device of {name:?} is found without reading the store: {left}"),
        ));
    }
    wanted.into_iter().try_for_each(end_device)
}

/// Ends all devices of a store that cannot be read. Returns their names, or else ids.
///
/// # Errors
/// As [`end`].
pub fn end_all(root: &Path) -> Result<Vec<String>> {
    let all = devices(root)?;
    let mut ended = Vec::new();
    for device in &all {
        end_device(device)?;
        ended.push(
            device
                .container
                .clone()
                .unwrap_or_else(|| device.id().into_owned()),
        );
    }
    Ok(ended)
}

fn end_device(device: &LostDevice) -> Result<()> {
    end_processes(&device.id())?;
    let options = DetachOptions {
        force: true,
        timeout: TIMEOUT,
    };
    device::end_lost(&device.run_dir, &options)?;
    mount_point::end_etc(&device.run_dir).or_else(|error| match is_lost(&error) {
        // Its directory stays where its disk does not answer.
        true => Ok(()),
        false => Err(error),
    })
}

/// Kills what `vellum run` and `exec` started in a container: by its cgroup, since the record of it
/// lies in the store.
fn end_processes(id: &str) -> Result<()> {
    let mut killed = Vec::new();
    for process in cgroup::members(&format!("vellum-{id}"))? {
        if let Some(open) = process.open()? {
            open.signal(nix::sys::signal::Signal::SIGKILL);
            killed.push(open);
        }
    }
    // They end once their disk answers, if only with errors: the device is ended next.
    for process in killed {
        process.wait(Duration::from_millis(200))?;
    }
    Ok(())
}

/// The containers of a store that have a device, for `umount --all`.
///
/// # Errors
/// Where the store cannot be read.
pub fn attached(store: &Store) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for container in store.containers()? {
        if store.run_dir(&container).exists() {
            names.push(container.name);
        }
    }
    Ok(names)
}
