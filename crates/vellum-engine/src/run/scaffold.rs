//! Mount points that a container needs and its image lacks: made before it starts, taken away when it
//! has ended, and noted in its record in between, so that they never count as its own changes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::spec::Bind;
use super::user::open_in_root;
use super::volume::follow;
use vellum_base::error::{Result, ResultExt};
use vellum_store::{ContainerRecord, MountPoint, Scaffold, Store, Touched};

/// Makes what is missing in the file system of `container`, mounted at `rootfs`, to mount `binds` and
/// the runtime's own file systems on, and notes it in the record first.
pub(super) fn make(
    store: &Store,
    container: &ContainerRecord,
    rootfs: &Path,
    binds: &[Bind],
) -> Result<()> {
    let mut wanted: Vec<(PathBuf, bool)> = Vec::new();
    for mount in oci_spec::runtime::get_default_mounts() {
        wanted.push((follow(rootfs, mount.destination())?, true));
    }
    for bind in binds {
        let directory = fs::metadata(&bind.source).is_ok_and(|source| source.is_dir());
        wanted.push((bind.destination.clone(), directory));
    }
    wanted.sort();
    let mut missing = Vec::new();
    for (index, (path, directory)) in wanted.iter().enumerate() {
        // What lies in another mount is that one's business.
        let mut above = wanted.iter().take(index);
        if above.any(|(above, _)| path.starts_with(above)) {
            continue;
        }
        missing.extend(missing_of(rootfs, path, *directory));
    }
    missing.dedup_by(|a, b| a.path == b.path);
    if missing.is_empty() {
        return Ok(());
    }
    let mut record = store.find_container(&container.into())?;
    let mut scaffold = std::mem::take(&mut record.scaffold);
    for point in missing {
        if scaffold.points.iter().all(|there| there.path != point.path) {
            scaffold.points.push(point);
        }
    }
    // Before the first is made: what is noted and not there does no harm.
    record.scaffold = scaffold.clone();
    store.update_container(&record)?;
    for point in &scaffold.points {
        let made = make_one(rootfs, point, &mut scaffold.touched);
        made.context(|| format!("cannot make {} to mount on", point.path.display()))?;
    }
    record.scaffold = scaffold;
    store.update_container(&record)
}

/// The components of `path` that are not there.
fn missing_of(rootfs: &Path, path: &Path, directory: bool) -> Vec<MountPoint> {
    let mut missing = Vec::new();
    let mut here = Some(path);
    while let Some(at) = here.filter(|at| *at != Path::new("/")) {
        match open_in_root(rootfs, at, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Err(Errno::ENOENT) => missing.push(MountPoint {
                path: at.to_owned(),
                directory: directory || at != path,
            }),
            // It is there; or the runtime says what is wrong with it.
            _ => break,
        }
        here = at.parent();
    }
    missing.reverse();
    missing
}

fn parent(rootfs: &Path, path: &Path) -> nix::Result<OwnedFd> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    open_in_root(rootfs, parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
}

fn name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

fn mtime(directory: &OwnedFd) -> nix::Result<(i64, i64)> {
    let stat = fstat(directory)?;
    Ok((stat.st_mtime, stat.st_mtime_nsec))
}

/// Makes one, unless it is there, and notes what that did to its directory.
fn make_one(rootfs: &Path, point: &MountPoint, touched: &mut Vec<Touched>) -> nix::Result<()> {
    let directory = parent(rootfs, &point.path)?;
    let before = mtime(&directory)?;
    let made = match point.directory {
        true => mkdirat(
            &directory,
            name(&point.path),
            Mode::from_bits_truncate(0o755),
        )
        .map(|()| open_in_root(rootfs, &point.path, OFlag::O_RDONLY | OFlag::O_DIRECTORY).ok()),
        false => {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let mode = Mode::from_bits_truncate(0o644);
            openat(&directory, name(&point.path), flags, mode).map(Some)
        }
    };
    let made = match made {
        Err(Errno::EEXIST) => return Ok(()),
        other => other?,
    };
    if let Some(made) = made {
        // Whatever the umask took away.
        let mode = if point.directory { 0o755 } else { 0o644 };
        let _ = File::from(made).set_permissions(fs::Permissions::from_mode(mode));
    }
    let after = mtime(&directory)?;
    let path = point.path.parent().unwrap_or(Path::new("/")).to_owned();
    match touched.iter_mut().find(|there| there.path == path) {
        // Nobody else was at it in between.
        Some(there) if there.after == before => there.after = after,
        Some(there) => (there.before, there.after) = (before, after),
        None => touched.push(Touched {
            path,
            before,
            after,
        }),
    }
    Ok(())
}

/// Takes away what [`make`] made in `container`, mounted at `rootfs`, as far as it is as it was made;
/// nothing runs in it any more. What is in use by then is the container's.
pub(crate) fn take_away(store: &Store, container: &ContainerRecord, rootfs: &Path) -> Result<()> {
    let mut record = store.find_container(&container.into())?;
    if record.scaffold == Scaffold::default() {
        return Ok(());
    }
    let scaffold = std::mem::take(&mut record.scaffold);
    let untouched: Vec<&Touched> = scaffold
        .touched
        .iter()
        .filter(|touched| {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let directory = open_in_root(rootfs, &touched.path, flags);
            directory.and_then(|directory| mtime(&directory)) == Ok(touched.after)
        })
        .collect();
    for point in scaffold.points.iter().rev() {
        match remove_one(rootfs, point) {
            Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
            Err(errno) => tracing::warn!("{}: stays: {errno}", point.path.display()),
        }
    }
    for touched in untouched {
        let (seconds, nanoseconds) = touched.before;
        let time = TimeSpec::new(seconds, nanoseconds);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        // One that was made for a mount point itself is gone.
        if let Ok(directory) = open_in_root(rootfs, &touched.path, flags) {
            let set = futimens(&directory, &TimeSpec::UTIME_OMIT, &time);
            set.context(|| format!("cannot set the time of {}", touched.path.display()))?;
        }
    }
    store.update_container(&record)
}

fn remove_one(rootfs: &Path, point: &MountPoint) -> nix::Result<()> {
    let directory = parent(rootfs, &point.path)?;
    let stat = fstatat(&directory, name(&point.path), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
    match (kind, point.directory) {
        (SFlag::S_IFDIR, true) => unlinkat(&directory, name(&point.path), UnlinkatFlags::RemoveDir),
        (SFlag::S_IFREG, false) if stat.st_size == 0 => {
            unlinkat(&directory, name(&point.path), UnlinkatFlags::NoRemoveDir)
        }
        // Somebody made it something else.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_missing_is_found_component_by_component() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let missing = |path: &str, directory| missing_of(root.path(), Path::new(path), directory);
        assert_eq!(missing("/etc", true), []);
        let points = missing("/etc/a/hosts", false);
        let paths: Vec<_> = points
            .iter()
            .map(|point| (point.path.to_str(), point.directory))
            .collect();
        assert_eq!(
            paths,
            [(Some("/etc/a"), true), (Some("/etc/a/hosts"), false)]
        );
    }

    #[test]
    fn what_was_made_goes_and_the_times_above_come_back_unless_somebody_used_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/kept")).unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        let set = |name: &str| {
            let directory = File::open(root.path().join(name)).unwrap();
            directory.set_modified(old).unwrap();
        };
        set("etc");
        set("");
        let mut touched = Vec::new();
        let point = |path: &str, directory| MountPoint {
            path: path.into(),
            directory,
        };
        let points = [
            point("/proc", true),
            point("/dev", true),
            point("/etc/hosts", false),
        ];
        for one in &points {
            make_one(root.path(), one, &mut touched).unwrap();
            // Again, as after a crash.
            make_one(root.path(), one, &mut touched).unwrap();
        }
        assert_eq!(touched.len(), 2);
        assert!(touched.iter().all(|touched| touched.before == (1000, 0)));
        fs::write(root.path().join("dev/used"), "x").unwrap();
        assert_eq!(remove_one(root.path(), &points[0]), Ok(()));
        assert_eq!(remove_one(root.path(), &points[1]), Err(Errno::ENOTEMPTY));
        assert_eq!(remove_one(root.path(), &points[2]), Ok(()));
        assert!(!root.path().join("etc/hosts").exists());
        assert!(root.path().metadata().unwrap().mtime() != 1000);
    }
}
