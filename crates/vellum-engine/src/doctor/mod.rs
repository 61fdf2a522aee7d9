//! Whether a host has what Vellum needs, and what to do where it has not. Changes nothing.

mod annotations;
mod containerd;
mod image_service;
mod mirrors;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::run::find_runtime;
use vellum_base::size::human_size;
use vellum_base::storage::{FileStorage, Storage};
use vellum_export::device::{ring_self_test, ublk_check};
use vellum_export::fuse::ring::host::check as ring_check;
use vellum_export::loop_device::LoopDevice;
use vellum_fs::mountinfo::{MountInfo, shows_devices};

/// Where programs are looked for, as where they are started.
const PROGRAM_DIRS: [&str; 6] = [
    "/usr/sbin",
    "/sbin",
    "/usr/local/sbin",
    "/usr/bin",
    "/bin",
    "/usr/local/bin",
];
/// Less free space than this is worth a warning.
const LITTLE_SPACE: u64 = 1 << 30;
/// Files that a host with many containers has open: several for each layer of each.
const ENOUGH_FILES: u64 = 65_536;
/// linux/capability.h
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Good to know; nothing has to be done.
    Note,
    /// Works, but less well, or not for everything.
    Warning,
    /// Does not work without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it came out.
    pub state: State,
    /// What there is.
    pub found: String,
    /// What to do about it, where something is to be done.
    pub advice: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// In the order of the checks.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Findings in that state.
    pub fn count(&self, state: State) -> usize {
        let findings = self.findings.iter();
        findings.filter(|finding| finding.state == state).count()
    }
}

/// What to look at.
#[derive(Debug, Clone)]
pub struct Options {
    /// The store, there or not.
    pub root: PathBuf,
    /// The snapshotter's socket.
    pub address: PathBuf,
    /// containerd's configuration.
    pub containerd_config: PathBuf,
    /// The snapshotter takes block layers from registries.
    pub remote: bool,
    /// The socket of its image service, where it has one.
    pub image_service: Option<PathBuf>,
}

/// Looks at the host.
pub fn examine(options: &Options) -> Report {
    let mut look = Look::default();
    look.privileges();
    look.kernel();
    look.fuse();
    look.ring();
    look.ublk();
    look.loops();
    look.programs();
    look.store(&options.root);
    look.propagation(&options.root);
    look.containerd(options);
    look.image_service(options);
    look.mirrors();
    Report {
        findings: look.findings,
    }
}

#[derive(Default)]
struct Look {
    findings: Vec<Finding>,
}

impl Look {
    fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.add(check, State::Ok, found, None);
    }

    fn add(
        &mut self,
        check: &'static str,
        state: State,
        found: impl Into<String>,
        advice: Option<&str>,
    ) {
        self.findings.push(Finding {
            check,
            state,
            found: found.into(),
            advice: advice.map(str::to_owned),
        });
    }

    /// A file of the kernel's that says how a check goes; `None` where it cannot be read, which is then
    /// what is found.
    fn read(&mut self, check: &'static str, path: &str) -> Option<String> {
        fs::read_to_string(path)
            .inspect_err(|error| {
                let advice = "mount -t proc proc /proc";
                self.add(
                    check,
                    State::Missing,
                    format!("{path}: {error}"),
                    Some(advice),
                );
            })
            .ok()
    }

    fn privileges(&mut self) {
        let capabilities = self
            .read("privileges", "/proc/self/status")
            .and_then(|status| {
                let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
                u64::from_str_radix(line?.trim(), 16).ok()
            });
        let Some(capabilities) = capabilities else {
            return;
        };
        let has = |capability: u32| (capabilities >> capability) & 1 == 1;
        if has(CAP_SYS_ADMIN) {
            self.ok("privileges", "CAP_SYS_ADMIN");
        } else {
            self.add(
                "privileges",
                State::Missing,
                "no CAP_SYS_ADMIN: nothing can be mounted or attached",
                Some("run as root (sudo), in a container with --privileged"),
            );
        }
        if !has(CAP_SYS_RESOURCE) {
            self.add(
                "growth",
                State::Note,
                "no CAP_SYS_RESOURCE: a file system that shall be larger is unmounted for a moment",
                None,
            );
        }
        use nix::sys::resource::{Resource, getrlimit};
        match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((_, hard)) if hard < ENOUGH_FILES => self.add(
                "open files",
                State::Warning,
                format!("a process may open {hard} files"),
                Some("raise the hard limit: LimitNOFILE= in the unit, or ulimit -Hn"),
            ),
            _ => self.ok("open files", "enough"),
        }
    }

    fn kernel(&mut self) {
        let release = nix::sys::utsname::uname().map_or(String::new(), |name| {
            name.release().to_string_lossy().into_owned()
        });
        match version(&release) {
            Some(at_least) if at_least >= (6, 9) => {
                self.ok("kernel", format!("{release}, with FUSE passthrough"));
            }
            Some(at_least) if at_least >= (5, 8) => self.add(
                "kernel",
                State::Note,
                format!("{release}: FUSE passthrough came with 6.9; it is not needed"),
                None,
            ),
            _ => self.add(
                "kernel",
                State::Missing,
                format!("{release}: loop devices are attached in a way that came with 5.8"),
                Some("use a newer kernel"),
            ),
        }
        let Some(known) = self.read("ext4", "/proc/filesystems") else {
            return;
        };
        let knows = |name: &str| known.lines().any(|line| line.trim_start() == name);
        if knows("ext4") {
            self.ok("ext4", "known to the kernel");
        } else {
            // It may still be loaded at the first mount.
            self.add(
                "ext4",
                State::Warning,
                "not known to the kernel yet",
                Some("modprobe ext4"),
            );
        }
    }

    fn fuse(&mut self) {
        match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
            Ok(_) => self.ok("FUSE", "/dev/fuse"),
            Err(error) => self.add(
                "FUSE",
                State::Missing,
                format!("/dev/fuse: {error}"),
                Some("modprobe fuse; in a container, give it the device (--device /dev/fuse)"),
            ),
        }
    }

    fn ring(&mut self) {
        let check = "FUSE over io_uring";
        let slower = "flushes and reads of one client at a time are slower without it";
        match (ring_check(), ring_self_test()) {
            (Err(error), _) => self.add(check, State::Note, error.to_string(), Some(slower)),
            (Ok(()), None) => self.add(check, State::Ok, "on; not tried in this boot yet", None),
            (Ok(()), Some(Ok(()))) => self.ok(check, "on; its self-test passed in this boot"),
            (Ok(()), Some(Err(error))) => {
                self.add(check, State::Note, error.to_string(), Some(slower));
            }
        }
    }

    fn ublk(&mut self) {
        match ublk_check() {
            Ok(()) => self.ok("ublk", "/dev/ublk-control"),
            Err(error) => self.add(
                "ublk",
                State::Note,
                error.to_string(),
                Some("containers are served by FUSE and a loop device without it, which is slower"),
            ),
        }
    }

    fn loops(&mut self) {
        if let Err(error) = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
        {
            self.add(
                "loop devices",
                State::Missing,
                format!("/dev/loop-control: {error}"),
                Some("modprobe loop; in a container, run it with --privileged and the host's /dev"),
            );
            return;
        }
        match LoopDevice::attached() {
            Ok(attached) => {
                // Whether more can be made: a container's /dev may not show new ones.
                let found = format!("{} in use", attached.len());
                if shows_devices() {
                    self.ok("loop devices", found);
                } else {
                    self.add(
                        "loop devices",
                        State::Note,
                        format!(
                            "{found}; /dev is no devtmpfs, so new ones do not show up by themselves"
                        ),
                        None,
                    );
                }
            }
            Err(error) => self.add(
                "loop devices",
                State::Missing,
                error.to_string(),
                Some("modprobe loop"),
            ),
        }
    }

    fn programs(&mut self) {
        let find = |program| {
            PROGRAM_DIRS
                .iter()
                .map(|dir| Path::new(dir).join(program))
                .find(|path| path.is_file())
        };
        const E2FSPROGS: &str = "apt-get install e2fsprogs";
        for (program, without, found, advice) in [
            ("mke2fs", State::Missing, "not installed", E2FSPROGS),
            ("resize2fs", State::Missing, "not installed", E2FSPROGS),
            ("e2fsck", State::Missing, "not installed", E2FSPROGS),
            (
                "qemu-img",
                State::Note,
                "not installed: of qcow2 images, those compressed with zstd, with extended L2 entries or not \
                 closed in order cannot be imported",
                "apt-get install qemu-utils",
            ),
        ] {
            match find(program) {
                Some(path) => self.ok(program, path.display().to_string()),
                None => self.add(program, without, found, Some(advice)),
            }
        }
        match find_runtime() {
            Ok(path) => self.ok("OCI runtime", path.display().to_string()),
            Err(error) => self.add(
                "OCI runtime",
                State::Warning,
                error.to_string(),
                Some("`vellum run` and containerd need one: apt-get install crun, or runc"),
            ),
        }
    }

    fn store(&mut self, root: &Path) {
        let Some(dir) = existing(root) else {
            return;
        };
        let place = if dir == root {
            format!("{}", dir.display())
        } else {
            format!("{} (the store is not there yet)", dir.display())
        };
        if self.store_can_be_there(&dir, &place) {
            self.store_stays_there(&dir, &place);
            self.free_space(&dir);
        }
    }

    /// Looks whether a store works on that file system at all.
    fn store_can_be_there(&mut self, dir: &Path, place: &str) -> bool {
        match FileStorage.lacks(dir) {
            Ok(missing) if !missing.is_empty() => {
                let kind = dir
                    .canonicalize()
                    .ok()
                    .and_then(|dir| MountInfo::of(&dir).ok()?);
                let kind = kind.map_or("its file system".into(), |mount| mount.fs_type);
                self.add(
                    "store",
                    State::Missing,
                    format!("{place}: {kind} cannot {}", missing.join(", nor ")),
                    Some("put the store on ext4, XFS or btrfs: --root, or root in config.toml"),
                );
                return false;
            }
            // What keeps it from being tried is told below.
            _ => {}
        }
        match punch(dir) {
            Ok(true) => self.ok("store", format!("{place}: sparse files, holes can be punched")),
            Ok(false) => self.add(
                "store",
                State::Missing,
                format!("{place}: its file system keeps no holes, so every layer would take its whole size"),
                Some("put the store on ext4, XFS or btrfs: --root, or root in config.toml"),
            ),
            Err(error) => self.add(
                "store",
                State::Missing,
                format!("{place}: {error}"),
                Some("make it writable, or put the store on ext4, XFS or btrfs: --root, or root in config.toml"),
            ),
        }
        true
    }

    /// Warns of a file system that forgets, or that others may see differently.
    fn store_stays_there(&mut self, dir: &Path, place: &str) {
        use nix::sys::statfs;
        let kind = statfs::statfs(dir).map(|fs| fs.filesystem_type());
        if kind == Ok(statfs::TMPFS_MAGIC) {
            self.add(
                "store",
                State::Warning,
                format!("{place}: a tmpfs: all of it is gone after a reboot"),
                Some("put the store on a disk"),
            );
        } else if kind == Ok(statfs::NFS_SUPER_MAGIC) {
            self.add(
                "store",
                State::Warning,
                format!("{place}: NFS: its locks and syncs are not tested"),
                Some("put the store on a local disk"),
            );
        }
    }

    fn free_space(&mut self, dir: &Path) {
        match nix::sys::statvfs::statvfs(dir) {
            Ok(stat) => {
                let unit = stat.fragment_size();
                let (free, size) = (stat.blocks_available() * unit, stat.blocks() * unit);
                let found = format!("{} of {} free", human_size(free), human_size(size));
                if free < LITTLE_SPACE || free < size / 20 {
                    self.add(
                        "free space",
                        State::Warning,
                        found,
                        Some("a full store stops containers' writes with ENOSPC: make room, or put it elsewhere; `vellum prune` removes what nothing uses"),
                    );
                } else {
                    self.ok("free space", found);
                }
            }
            Err(errno) => self.add("free space", State::Warning, errno.to_string(), None),
        }
    }

    fn propagation(&mut self, root: &Path) {
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        let (mine, first) = (namespace("self"), namespace("1"));
        if mine.is_some() && first.is_some() && mine != first {
            self.add(
                "mount namespace",
                State::Warning,
                "another than that of process 1",
                Some("`vellum snapshotter` must mount where containerd looks: start it in the host's mount namespace"),
            );
        }
        let Some(dir) = existing(root).and_then(|dir| dir.canonicalize().ok()) else {
            return;
        };
        // Paths of others need not be text.
        let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
        let mounts = String::from_utf8_lossy(&mounts);
        match propagation_of(&mounts, &dir) {
            Some((target, true)) => self.ok("mount propagation", format!("{target} is shared")),
            Some((target, false)) => self.add(
                "mount propagation",
                State::Note,
                format!("{target} is private: mounts are seen in this mount namespace alone"),
                Some("only where containerd runs in another mount namespace: mount --make-rshared / before both start"),
            ),
            None => {}
        }
    }
}

/// Major and minor version of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The path, or the nearest directory above it that is there.
fn existing(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let mut above = path.ancestors();
    above.find(|dir| dir.is_dir()).map(Path::to_owned)
}

/// The mount that `dir` lies on, and whether it is shared with other mount namespaces.
fn propagation_of(mountinfo: &str, dir: &Path) -> Option<(String, bool)> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let target = line.split(' ').nth(4)?;
        let shared = line.split(" - ").next()?.contains(" shared:");
        dir.starts_with(target).then(|| (target.to_owned(), shared))
    });
    // Of mounts at one place the last one is seen.
    mounts.max_by_key(|(target, _)| target.len())
}

/// True when a hole that is punched into a file in `dir` takes no space.
fn punch(dir: &Path) -> std::io::Result<bool> {
    const LEN: usize = 1 << 20;
    let file = tempfile::tempfile_in(dir)?;
    file.set_len(64 << 20)?;
    file.write_all_at(&vec![1; LEN], 0)?;
    file.sync_data()?;
    let full = file.metadata()?.blocks();
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match nix::fcntl::fallocate(&file, mode, 0, LEN as i64) {
        Ok(()) => {}
        Err(nix::errno::Errno::EOPNOTSUPP) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    }
    file.sync_data()?;
    let left = file.metadata()?.blocks();
    // 64 MiB long, 1 MiB written, which is gone again.
    Ok(full <= (16 << 20) / 512 && left < full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_kernels_are_compared_as_numbers() {
        assert_eq!(version("6.18.5-1-amd64"), Some((6, 18)));
        assert_eq!(version("6.9"), Some((6, 9)));
        assert_eq!(version("5.10.0-rc1"), Some((5, 10)));
        assert_eq!(version("unknown"), None);
        assert!(version("6.10.1") > version("6.9.9"));
    }

    #[test]
    fn the_mount_that_a_directory_lies_on_is_the_deepest() {
        let mounts = "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n\
                      2 1 8:2 / /var rw - ext4 /dev/b rw\n";
        let of = |dir: &str| propagation_of(mounts, Path::new(dir));
        assert_eq!(of("/var/lib"), Some(("/var".into(), false)));
        assert_eq!(of("/variable"), Some(("/".into(), true)));
    }
}
