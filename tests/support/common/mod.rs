//! What the tests of the command share: a store of its own that is always taken down again, and
//! the real binary run against it.
#![allow(
    dead_code,
    missing_docs,
    reason = "each test program uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail the test"
)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use vellum_base::crash_point;
use vellum_export::loop_device::LoopDevice;
use vellum_fs::run_dir::RunDir;

/// The binary under test.
pub const VELLUM: &str = env!("CARGO_BIN_EXE_vellum");
/// Small enough for a quick mkfs, large enough for a few files.
pub const SIZE: &str = "64M";

/// Fails unless the test runs as root.
pub fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test mounts file systems and needs root: run it with sudo, or in a container with \
         CAP_SYS_ADMIN, /dev/fuse and loop devices"
    );
}

/// Takes this test into mounts of its own. A program of another test that unshares its mounts meanwhile would
/// have this test's mounted too: they do not end with their unmount then, and without CAP_SYS_RESOURCE nothing grows
/// that somebody has mounted.
pub fn own_mounts() {
    need_root();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}

/// Runs a program to its end; it must succeed.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    let shown: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| {
            panic!("{program}: {error}: install it (apt-get install skopeo umoci podman mmdebstrap e2fsprogs zstd util-linux; cargo install fsx)")
        });
    assert!(
        output.status.success(),
        "{program} {shown:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a script in `directory`; it stops at the first command that fails.
pub fn shell(directory: &Path, script: &str) -> String {
    run(
        "sh",
        &["-euc", &format!("cd '{}'\n{script}", directory.display())],
    )
}

/// A store in a directory of its own, with room for other files. Dropping it unmounts and removes
/// everything, whatever state a test left it in.
pub struct TestStore {
    pub dir: tempfile::TempDir,
    pub root: PathBuf,
    /// Added to the environment of every command, and so of the servers that they start.
    pub env: Vec<(&'static str, &'static str)>,
}

impl TestStore {
    pub fn new() -> Self {
        Self::under(&std::env::temp_dir())
    }

    /// In a directory below `parent`.
    pub fn under(parent: &Path) -> Self {
        need_root();
        let dir = tempfile::Builder::new()
            .prefix("vellum-test-")
            .tempdir_in(parent)
            .unwrap();
        let root = dir.path().canonicalize().unwrap().join("store");
        TestStore {
            dir,
            root,
            env: Vec::new(),
        }
    }

    /// Looks at the files of an image, through a container that is there for that.
    pub fn look<T>(&self, image: &str, at: impl FnOnce(&Path) -> T) -> T {
        self.ok(&["create", image, "--name", "look"]);
        let seen = at(&self.mount("look"));
        self.ok(&["umount", "look"]);
        self.ok(&["rm", "look"]);
        seen
    }

    /// Runs a command that dies at a place.
    #[track_caller]
    pub fn killed(&self, place: &str, arguments: &[&str]) {
        let mut command = self.command();
        command.args(arguments);
        let output = command.env(crash_point::VARIABLE, place).output().unwrap();
        assert_eq!(
            output.status.code(),
            None,
            "{place} was not reached: {output:?}"
        );
    }

    /// A file or directory beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The path of something beside the store, as an argument.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The command, ready to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(VELLUM);
        command.arg("--root").arg(&self.root).stdin(Stdio::null());
        command.envs(self.env.iter().copied());
        command
    }

    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; returns its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "vellum {arguments:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must succeed; returns its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error}\n{text}"))
    }

    /// Runs a command that must fail with status 1 and one line on standard error, which it
    /// returns.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            output.status.code(),
            Some(1),
            "vellum {arguments:?}: {error}"
        );
        let lines: Vec<&str> = error
            .lines()
            .filter(|line| line.starts_with("vellum: "))
            .collect();
        assert_eq!(lines.len(), 1, "vellum {arguments:?}: {error}");
        error
    }

    /// Makes an image of a few files.
    pub fn small_image(&self, name: &str) {
        let dir = self.path("small-root");
        if !dir.exists() {
            fs::create_dir_all(dir.join("etc")).unwrap();
            fs::write(dir.join("etc/hostname"), "base\n").unwrap();
            fs::write(dir.join("file"), vec![7; 100_000]).unwrap();
        }
        let dir = dir.display().to_string();
        self.ok(&["import", name, &dir, "--size", SIZE]);
    }

    /// Mounts a container; returns where.
    pub fn mount(&self, container: &str) -> PathBuf {
        PathBuf::from(self.ok(&["mount", container]).trim_end())
    }

    /// Records of what is listed, by their names; none where nobody has made the store.
    pub fn names(&self, command: &str) -> Vec<String> {
        if !self.root.exists() {
            return Vec::new();
        }
        let rows = self.json(&[command]);
        let rows = rows.as_array().unwrap();
        rows.iter()
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Bytes that the store takes on disk.
    pub fn disk_usage(&self) -> u64 {
        // What the store keeps for a full disk comes and goes.
        let reserve = format!("--exclude={}/reserve", self.root.display());
        let text = run(
            "du",
            &["-s", "-B1", &reserve, &self.root.display().to_string()],
        );
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Names of the directories of layers.
    pub fn layers(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.root.join("layers"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// What is mounted, attached or running for this store, for messages.
    pub fn leftovers(&self) -> Vec<String> {
        let root = self.root.display().to_string();
        let mut found: Vec<String> =
            String::from_utf8_lossy(&fs::read("/proc/thread-self/mountinfo").unwrap())
                .lines()
                .filter(|line| line.contains(&root))
                .map(|line| format!("mounted: {line}"))
                .collect();
        for entry in fs::read_dir("/sys/block").unwrap() {
            let entry = entry.unwrap();
            let file = entry.path().join("loop/backing_file");
            let backing = fs::read_to_string(file).unwrap_or_default();
            if backing.contains(&root) {
                found.push(format!("attached: {backing}"));
            }
        }
        found.extend(
            self.processes()
                .into_iter()
                .map(|(pid, line)| format!("running: {pid} {line}")),
        );
        found
    }

    /// Kills all that runs for the store; false if that takes too long. A standby takes the place
    /// of one that dies, so more than once.
    pub fn kill_all(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let all = self.processes();
            let dead = all.is_empty() && !self.has_dying_servers();
            if dead || Instant::now() > deadline {
                return dead;
            }
            all.iter().for_each(|(pid, _)| kill(*pid));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// True while a device's process that has no command line any more still holds its files.
    fn has_dying_servers(&self) -> bool {
        let dirs = fs::read_dir(self.root.join("run")).into_iter().flatten();
        dirs.flatten().any(|dir| {
            let status = vellum_export::device::status(&RunDir::at(dir.path()));
            matches!(status, Ok(Some(status)) if status.alive)
        })
    }

    /// Serves a container or an image over NBD; returns the server and its socket.
    pub fn serve(&self, name: &str) -> (Running, PathBuf) {
        self.serve_with(name, &[])
    }

    /// The same with options.
    pub fn serve_with(&self, name: &str, options: &[&str]) -> (Running, PathBuf) {
        let socket = self.path("nbd.sock");
        let child = self
            .command()
            .args(["-q", "nbd", name, "--socket"])
            .arg(&socket)
            .args(options)
            .spawn()
            .unwrap();
        let server = Running(child);
        // The file is there before anybody listens.
        wait_until("the server listens", || {
            UnixStream::connect(&socket).is_ok()
        });
        (server, socket)
    }

    /// The bytes of a container's, snapshot's or image's device, as a client of its NBD export reads them.
    pub fn content(&self, name: &str) -> Vec<u8> {
        let (server, socket) = self.serve(name);
        let raw = self.arg("raw");
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        run("nbdcopy", &[uri.as_str(), &raw]);
        server.end();
        let bytes = fs::read(&raw).unwrap();
        fs::remove_file(raw).unwrap();
        bytes
    }

    /// (pid, command line) of every process of this store.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let root = self.root.display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let entry = entry.unwrap();
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let ours = line.starts_with("@vellum-") || line.starts_with(VELLUM);
            if ours && line.contains(&root) {
                found.push((pid, line));
            }
        }
        found
    }

    /// Fails the test if anything of the store is still mounted, attached or running. Ending takes
    /// the kernel a moment.
    pub fn assert_nothing_runs(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = self.leftovers();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left over: {left:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        if !self.root.exists() {
            return;
        }
        // As a user would, then by force.
        for container in fs::read_dir(self.root.join("containers"))
            .into_iter()
            .flatten()
        {
            let name = container.unwrap().file_name().into_string().unwrap();
            let name = name.trim_end_matches(".json").to_owned();
            let _ = self.output(&["rm", "--force", "--snapshots", &name]);
        }
        let _ = self.output(&["prune"]);
        self.kill_all();
        // While their files still have names: a device that is mounted goes with its mount.
        for device in LoopDevice::attached().into_iter().flatten() {
            let file = device.backing_file();
            if file.is_some_and(|file| file.starts_with(&self.root)) {
                let _ = device.detach_lazily();
            }
        }
        let root = self.root.display().to_string();
        let mounts =
            String::from_utf8_lossy(&fs::read("/proc/thread-self/mountinfo").unwrap()).into_owned();
        for line in mounts.lines().rev().filter(|line| line.contains(&root)) {
            let target = line.split(' ').nth(4).unwrap();
            let _ = Command::new("umount").args(["-l", target]).output();
        }
    }
}

/// Sends SIGKILL to one process; one that is gone is fine.
pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    );
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

/// Kills a child that is dropped before it has ended.
pub struct Running(pub Child);

impl Running {
    /// Has it end in order; it must succeed.
    pub fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits at most two minutes for a condition: a busy host may take long for anything.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
