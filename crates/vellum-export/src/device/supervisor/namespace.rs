//! A mount namespace of their own for the processes of a device.
//!
//! A process keeps alive what is mounted in its namespace. Where a device's processes were the last of
//! a namespace in which the file system on that very device is mounted (a container that was ended, an
//! `unshare -m`), the kernel would unmount it while the last of them dies: it would wait for ever for
//! the answer to a flush that only the dying process could give, and every sync(2) of the host with
//! it. So they live in a namespace that sees their store and the host's root, and no other mounts.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::{RunDir, RunRoot, SNAPSHOT_MOUNTS};

/// Mounts that a device's processes may want besides those on the way to the store: the kernel's, and
/// where the program of an upgrade lies.
const WANTED: [&str; 6] = ["/dev", "/proc", "/sys", "/usr", "/usr/local", "/opt"];

/// Leaves the mount namespace of whoever started this process, once what the device needs from it is
/// open. Best effort: where the kernel refuses (a user namespace whose mounts are locked) the process
/// stays where it is.
pub(super) fn leave(run_dir: &RunDir) {
    if let Err(error) = enter_own(run_dir) {
        tracing::debug!("the device stays in its caller's mount namespace: {error}");
    }
}

fn enter_own(run_dir: &RunDir) -> Result<()> {
    let mounts = MountInfo::read()?;
    if !mounts.iter().any(|mount| mount.target == Path::new("/")) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the root directory is no mount (chroot)",
        ));
    }
    let mounts = needed(run_dir, &mounts);
    let what = || "a mount namespace cannot be set up";
    let root = fs::File::open("/").context(what)?;
    let callers = fs::File::open("/proc/self/ns/mnt").context(what)?;
    unshare(CloneFlags::CLONE_NEWNS).context(what)?;
    build(run_dir, &mounts)
        .inspect_err(|_| {
            // The half-made one goes with its last process.
            let back = setns(&callers, CloneFlags::CLONE_NEWNS)
                .and_then(|()| nix::unistd::fchdir(&root))
                .and_then(|()| nix::unistd::chroot("."));
            if let Err(errno) = back {
                tracing::warn!("the caller's mount namespace cannot be entered again: {errno}");
            }
        })
        .context(what)
}

/// Makes a copy of the root without what is mounted on it, puts `mounts` into it, and lets go of all
/// else.
fn build(run_dir: &RunDir, mounts: &BTreeSet<PathBuf>) -> nix::Result<()> {
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none)?;
    // The run directory serves as a place for the new root; what is in it is open already.
    mount(Some("/"), run_dir.path(), none, MsFlags::MS_BIND, none)?;
    for target in mounts {
        let Ok(relative) = target.strip_prefix("/") else {
            continue;
        };
        let there = run_dir.path().join(relative);
        mount(Some(target), &there, none, MsFlags::MS_BIND, none)?;
    }
    nix::unistd::chdir(run_dir.path())?;
    // The old root then lies on top of the new one (pivot_root(2)).
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")
}

/// Which of the mounts a device's processes need, in an order in which they can be made.
fn needed(run_dir: &RunDir, mounts: &[MountInfo]) -> BTreeSet<PathBuf> {
    let mut wanted: Vec<PathBuf> = WANTED.iter().map(PathBuf::from).collect();
    wanted.push(run_dir.path().to_owned());
    wanted.extend(fs::read_link("/proc/self/exe"));
    wanted.extend(parts_elsewhere(run_dir));
    let on_the_way = |target: &Path| {
        target != Path::new("/") && wanted.iter().any(|path| path.starts_with(target))
    };
    mounts
        .iter()
        .map(|mount| mount.target.clone())
        .filter(|target| on_the_way(target) || is_part_of_the_store(run_dir, target))
        .collect()
}

/// The store is the parent of the directory of all run directories. Parts of it may be mounted there;
/// what is mounted below `run` and `mnt` are other devices and their file systems, which would be kept alive by
/// every device that is attached later.
fn is_part_of_the_store(run_dir: &RunDir, target: &Path) -> bool {
    let Some(root) = run_dir.store_root() else {
        return false;
    };
    let runs = RunRoot::of_store(root);
    let of_devices = [runs.path(), &root.join(SNAPSHOT_MOUNTS)];
    let is_device = of_devices.iter().any(|dir| target.starts_with(dir));
    runs.has(run_dir) && target.starts_with(root) && !is_device
}

/// Where links in the store's directory lead.
fn parts_elsewhere(run_dir: &RunDir) -> Vec<PathBuf> {
    let root = run_dir.store_root();
    let entries = root.and_then(|root| fs::read_dir(root).ok());
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()))
        .filter_map(|entry| fs::canonicalize(entry.path()).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_on_the_way_to_the_store_and_in_it_are_needed_and_other_devices_are_not() {
        let line = |target: &str| format!("1 1 8:1 / {target} rw - ext4 /dev/sda1 rw\n");
        let targets = [
            "/",
            "/proc",
            "/sys",
            "/sys/fs/fuse/connections",
            "/data",
            "/data/store",
            "/data/store/layers",
            "/data/store/mnt/2",
            "/data/store/run/1/dev",
            "/data/store/run/2/dev",
            "/data/store/run/2/rootfs",
            "/data/stores",
            "/mnt",
        ];
        let text: String = targets.iter().map(|target| line(target)).collect();
        let mounts = MountInfo::parse(text.as_bytes());
        let found = needed(&RunDir::at("/data/store/run/1".into()), &mounts);
        let expected = [
            "/data",
            "/data/store",
            "/data/store/layers",
            "/proc",
            "/sys",
        ];
        assert_eq!(found, expected.iter().map(PathBuf::from).collect());
    }
}
