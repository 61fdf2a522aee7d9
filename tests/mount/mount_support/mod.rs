//! What the mount tests share: a file that is served as a device, mounted, and always cleaned up.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test"
)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use vellum_export::device::{
    AttachSpec, DetachOptions, RunState, Status, attach, control, detach, status,
};
use vellum_export::local_disk::DiskHold;
use vellum_export::loop_device::LoopDevice;
use vellum_fs::run_dir::RunDir;

/// Runs a program to its end and fails the test, with its output, unless it succeeds.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = try_run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a program to its end; fails the test when it is not installed.
pub fn try_run(program: &str, arguments: &[&str]) -> Output {
    need_root();
    Command::new(program)
        .args(arguments)
        .env(
            "PATH",
            std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "{program}: {error}: install it (tools/test does; by hand: \
                 apt-get install fio e2fsprogs util-linux, cargo install fsx)"
            )
        })
}

/// Mounting needs root: without it the tests fail rather than pass without having tested.
pub fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "the mount tests need root: run them with sudo, or in a container with CAP_SYS_ADMIN, \
         /dev/fuse and loop devices"
    );
}

/// A device on a plain file, with its own directories; dropping it takes everything down.
pub struct Device {
    pub dir: tempfile::TempDir,
    pub backing: PathBuf,
    pub run_dir: RunDir,
    pub mount_point: PathBuf,
    pub loop_device: Option<LoopDevice>,
    /// What keeps the loop device attached while nothing is mounted.
    hold: Mutex<Option<DiskHold>>,
}

impl Device {
    /// Has fio write at random and verify what it wrote, in each of these ways (engine, range of sizes).
    pub fn verify_with_fio(&self, ways: &[(&str, &str)]) {
        let filename = format!("--filename={}", self.path());
        for (engine, range) in ways {
            run(
                "fio",
                &[
                    "--name=verify",
                    &filename,
                    "--direct=1",
                    "--rw=randwrite",
                    &format!("--ioengine={engine}"),
                    &format!("--bsrange={range}"),
                    "--bs_unaligned=0",
                    "--iodepth=16",
                    "--size=32m",
                    "--verify=crc32c",
                    "--do_verify=1",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--fsync=64",
                ],
            );
        }
        assert_eq!(self.call("status")["failures"], 0);
    }

    /// Makes an ext4 on it, in which fsx finds no difference and e2fsck afterwards nothing to mend.
    pub fn exercise_its_file_system(&self) {
        self.mkfs();
        self.mount();
        let file = self.mount_point.join("fsx");
        let output = try_run("fsx", &["-N", "3000", "-S", "7", file.to_str().unwrap()]);
        assert!(
            output.status.success(),
            "fsx: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        self.umount();
        run("e2fsck", &["-fn", &self.path()]);
    }

    /// A sparse file of `size` bytes below `parent` (or the system's temporary directory), not
    /// attached yet.
    pub fn new_in(parent: Option<&Path>, size: u64) -> Device {
        need_root();
        let dir = match parent {
            Some(parent) => tempfile::tempdir_in(parent).unwrap(),
            None => tempfile::tempdir().unwrap(),
        };
        let backing = dir.path().join("backing");
        File::create(&backing).unwrap().set_len(size).unwrap();
        let mount_point = dir.path().join("mnt");
        fs::create_dir(&mount_point).unwrap();
        Device {
            backing,
            run_dir: RunDir::at(dir.path().join("run").join("one")),
            mount_point,
            loop_device: None,
            hold: Mutex::default(),
            dir,
        }
    }

    pub fn new(size: u64) -> Device {
        Device::new_in(None, size)
    }

    /// As [`Device::new`], attached.
    pub fn attached(size: u64) -> Device {
        let mut device = Device::new(size);
        device.attach(&[]);
        device
    }

    pub fn spec(&self, more: &[&str]) -> AttachSpec {
        let mut arguments: Vec<OsString> = vec![
            "device-supervisor".into(),
            "--file".into(),
            self.backing.clone().into(),
        ];
        arguments.extend(more.iter().map(OsString::from));
        AttachSpec {
            program: PathBuf::from(env!("CARGO_BIN_EXE_vellum")),
            ..AttachSpec::new(arguments)
        }
    }

    pub fn attach(&mut self, more: &[&str]) {
        self.attach_as(&self.spec(more));
    }

    pub fn attach_as(&mut self, spec: &AttachSpec) {
        let attached = attach(&self.run_dir, spec).unwrap();
        self.loop_device = LoopDevice::from_path(&attached.device.path());
        *self.hold.lock().unwrap() = Some(attached.hold);
    }

    /// The loop device's path.
    pub fn path(&self) -> String {
        let device = self.loop_device.expect("attached");
        device.path().display().to_string()
    }

    pub fn mkfs(&self) {
        run(
            "mke2fs",
            &["-q", "-t", "ext4", "-m", "0", "-F", &self.path()],
        );
    }

    pub fn mount(&self) {
        let target = self.mount_point.display().to_string();
        run(
            "mount",
            &["-t", "ext4", "-o", "discard", &self.path(), &target],
        );
    }

    pub fn umount(&self) {
        run("umount", &[&self.mount_point.display().to_string()]);
    }

    /// Nothing but a mount keeps the loop device from now on.
    pub fn let_go(&self) {
        self.hold.lock().unwrap().take();
    }

    pub fn detach(&self) {
        self.let_go();
        detach(&self.run_dir, &DetachOptions::default()).unwrap();
    }

    pub fn call(&self, verb: &str) -> Value {
        control::call(&self.run_dir, verb, Value::Null, Duration::from_secs(120)).unwrap()
    }

    pub fn state(&self) -> RunState {
        status(&self.run_dir).unwrap().expect("a state").state
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.run_dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until a worker serves and a standby waits, as one does soon after; returns that state.
    pub fn wait_for_standby(&self) -> RunState {
        let mut found = None;
        wait_until("there is a standby", || {
            let state = self.state();
            let both = [state.worker, state.standby];
            let alive = both.iter().all(|p| p.is_some_and(|p| p.is_alive()));
            found = Some(state).filter(|state| alive && state.status == Status::Serving);
            found.is_some()
        });
        found.unwrap()
    }

    /// Fails the test if anything of the device is still mounted, attached or running.
    pub fn assert_nothing_left(&self) {
        let mounts =
            String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        let dir = self.dir.path().display().to_string();
        assert!(!mounts.contains(&dir), "still mounted:\n{mounts}");
        for entry in fs::read_dir("/sys/block").unwrap() {
            let file = entry.unwrap().path().join("loop/backing_file");
            let backing = fs::read_to_string(file).unwrap_or_default();
            assert!(!backing.contains(&dir), "still attached: {backing}");
        }
        let mut running = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path().join("cmdline");
            let line = fs::read(path).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.starts_with("@vellum-device") && line.contains(&dir) {
                running.push(line);
            }
        }
        assert!(running.is_empty(), "still running: {running:?}");
        assert!(!self.run_dir.exists(), "the run directory is still there");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the device\n{}", self.log());
        }
        self.let_go();
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        if let Err(error) = detach(&self.run_dir, &options) {
            eprintln!("{error}");
        }
    }
}

/// Waits at most two minutes for a condition: a busy host may take long for anything.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends SIGKILL to one process.
pub fn kill(pid: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

/// Kills processes that watch each other: none of them sees the death of another.
pub fn kill_together(pids: &[i32]) {
    use nix::sys::signal::Signal;
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in pids {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), signal).unwrap();
        }
    }
}
