//! What the snapshotter's tests share: a directory of their own that leaves no process, mount or
//! loop device behind.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail the test"
)]

pub mod client;
pub mod content;
pub mod mounted;
pub mod oci;
pub mod rig;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vellum_export::loop_device::LoopDevice;
use vellum_fs::mountinfo::MountInfo;

pub const PACKAGES: &str = "apt-get install -y --no-install-recommends containerd runc \
     busybox-static e2fsprogs golang-go golang-github-containerd-containerd-dev";

/// The label of a snapshot's size.
pub const SIZE: &str = "containerd.io/snapshot/vellum.size";

/// Bytes of the file system that `path` lies in.
pub fn room(path: impl AsRef<Path>) -> u64 {
    let stat = nix::sys::statvfs::statvfs(path.as_ref()).unwrap();
    stat.blocks() * stat.fragment_size()
}

/// A directory; when it is dropped, everything that runs from it or is mounted in it ends.
pub struct Area {
    dir: tempfile::TempDir,
}

impl Area {
    pub fn new() -> Area {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the snapshotter's tests need root, /dev/fuse and loop devices"
        );
        let dir = tempfile::Builder::new().prefix("vellum-snap-").tempdir();
        Area { dir: dir.unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Its name, which no other has.
    pub fn name(&self) -> String {
        let name = self.path().file_name().unwrap();
        name.to_str().unwrap().to_owned()
    }

    /// A path in it, as text.
    pub fn at(&self, name: &str) -> String {
        self.path().join(name).display().to_string()
    }

    /// Processes whose arguments or environment name the directory.
    pub fn processes(&self) -> Vec<Pid> {
        let path = self.path().display().to_string();
        let named = |file: PathBuf| {
            let bytes = fs::read(file).unwrap_or_default();
            bytes
                .windows(path.len())
                .any(|part| part == path.as_bytes())
        };
        let me = nix::unistd::getpid();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
            .filter(|pid| *pid != me)
            .filter(|pid| {
                let proc = PathBuf::from(format!("/proc/{pid}"));
                named(proc.join("cmdline")) || named(proc.join("environ"))
            })
            .collect()
    }

    /// Processes that serve a device's requests.
    pub fn workers(&self) -> Vec<Pid> {
        let mut found = self.processes();
        found.retain(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim() == "vellum-worker"
        });
        found
    }

    /// Command lines of the processes that serve devices.
    pub fn device_processes(&self) -> Vec<String> {
        let lines = self.processes().into_iter().filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            Some(String::from_utf8_lossy(&line).replace('\0', " "))
        });
        lines
            .filter(|line| line.starts_with("@vellum-device"))
            .collect()
    }

    /// Ends what a reboot would end of the devices: their processes, mounts and loop devices.
    pub fn end_devices(&self) {
        let is_device = |pid: &Pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.starts_with(b"@vellum-device")
        };
        for _ in 0..20 {
            for pid in self.processes().into_iter().filter(is_device) {
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.unmount_all();
    }

    fn unmount_all(&self) {
        // First, while their files still have names: a device that is mounted goes with its mount.
        self.detach_all();
        for mount in self.mounts() {
            let flags = nix::mount::MntFlags::MNT_DETACH;
            let _ = nix::mount::umount2(&mount, flags);
        }
    }

    fn detach_all(&self) {
        for device in LoopDevice::attached().into_iter().flatten() {
            let file = device.backing_file();
            if file.is_some_and(|file| file.starts_with(self.path())) {
                let _ = device.detach_lazily();
            }
        }
    }

    /// Mounts in it, the newest first.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let mounts = MountInfo::read().unwrap().into_iter().rev();
        mounts
            .map(|mount| mount.target)
            .filter(|target| target.starts_with(self.path()))
            .collect()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // A supervisor may fork while it is being looked for.
        for _ in 0..20 {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            for pid in processes {
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // What runc leaves of groups: version 1 has one below each controller.
        let groups = Path::new("/sys/fs/cgroup");
        let _ = fs::remove_dir(groups.join(self.name()));
        for controller in fs::read_dir(groups).into_iter().flatten().flatten() {
            let group = controller.path().join(self.name());
            for container in fs::read_dir(&group).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(container.path());
            }
            let _ = fs::remove_dir(group);
        }
        self.unmount_all();
    }
}

/// A daemon that is killed when this is dropped.
pub struct Daemon(pub Child);

impl Daemon {
    pub fn start(command: &mut Command, log: &Path) -> Daemon {
        let log = fs::OpenOptions::new().create(true).append(true).open(log);
        let log = log.unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let name = command.get_program().display().to_string();
        Daemon(child.unwrap_or_else(|error| panic!("{name}: {error}: {PACKAGES}")))
    }

    pub fn signal(&mut self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `done`, and fails after `limit`.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    // A busy host may take long for anything.
    let deadline = Instant::now() + limit.max(Duration::from_secs(120));
    while !done() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
