//! What the tests of running containers share: a store of its own with a small image, and commands
//! that are always ended.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Both runtimes that are supported; a test runs with each.
pub const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// A store that is taken down when it is dropped.
pub struct Store {
    pub dir: tempfile::TempDir,
    pub runtime: &'static str,
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Said {
            status: output.status.code().expect("vellum was killed by a signal"),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Store {
    /// A store with the image `box`: busybox, two users, and what `more` adds.
    pub fn new(runtime: &'static str, more: impl FnOnce(&Path)) -> Store {
        assert!(
            nix::unistd::geteuid().is_root(),
            "running containers needs root: run the tests with sudo, or in a container with \
             CAP_SYS_ADMIN, /dev/fuse and loop devices"
        );
        let installed = ["/usr/bin", "/usr/sbin", "/usr/local/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(runtime).exists());
        assert!(installed, "{runtime} is missing: apt-get install {runtime}");
        let store = Store {
            dir: tempfile::tempdir().unwrap(),
            runtime,
        };
        let tree = store.path("tree");
        for dir in ["bin", "etc", "tmp", "data"] {
            fs::create_dir_all(tree.join(dir)).unwrap();
        }
        fs::copy("/bin/busybox", tree.join("bin/busybox"))
            .expect("/bin/busybox: apt-get install busybox-static");
        for name in [
            "sh", "id", "env", "pwd", "hostname", "cat", "mount", "ls", "echo", "sleep", "touch",
            "ps", "kill", "readlink", "mknod", "grep", "test",
        ] {
            symlink("busybox", tree.join("bin").join(name)).unwrap();
        }
        fs::write(
            tree.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            tree.join("etc/group"),
            "root:x:0:\nweb:x:34:\nlogs:x:40:web\n",
        )
        .unwrap();
        fs::write(tree.join("data/seed"), "seed\n").unwrap();
        fs::write(tree.join("plain"), "no program\n").unwrap();
        fs::set_permissions(tree.join("data"), fs::Permissions::from_mode(0o751)).unwrap();
        more(&tree);
        store.must(&["import", "box", tree.to_str().unwrap()]);
        store
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
        command
            .arg("--root")
            .arg(self.path("store"))
            .args(arguments)
            .env("VELLUM_RUNTIME", self.runtime)
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub fn vellum(&self, arguments: &[&str]) -> Said {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs the command to its end and wants success; what it printed.
    pub fn must(&self, arguments: &[&str]) -> String {
        let said = self.vellum(arguments);
        assert_eq!(said.status, 0, "{arguments:?}: {said:?}");
        said.out
    }

    /// Runs the shell in a container and wants success; what it printed.
    pub fn shell(&self, options: &[&str], script: &str) -> String {
        let mut arguments = vec!["run", "box", "--rm"];
        arguments.extend(options);
        arguments.extend(["--", "sh", "-ec", script]);
        self.must(&arguments)
    }

    /// Starts a container that runs until it is told to end, and waits until it does.
    pub fn start(&self, name: &str, options: &[&str]) -> Running {
        let mut arguments = vec!["run", "box", "--name", name];
        arguments.extend(options);
        let script = "trap 'exit 42' TERM; while true; do sleep 0.05; done";
        arguments.extend(["--", "sh", "-c", script]);
        let child = self.command(&arguments).spawn().unwrap();
        let running = Running { child };
        self.wait_until(|| self.status(name).starts_with("running (pid "));
        // Until then its first process is the runtime's.
        self.wait_until(|| {
            let pid = &self.row(name)["pid"];
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"sh\0-c\0trap")
        });
        running
    }

    /// What `ps` has on a container; null for none.
    fn row(&self, name: &str) -> serde_json::Value {
        let rows: serde_json::Value = serde_json::from_str(&self.must(&["ps", "--json"])).unwrap();
        let mut rows = rows.as_array().unwrap().iter();
        rows.find(|row| row["name"] == name)
            .cloned()
            .unwrap_or_default()
    }

    /// The processes that wait for commands in the background.
    pub fn waiters(&self) -> Vec<i32> {
        let mut found = self.processes();
        found.retain(|(_, line)| line.starts_with("@vellum-waiter"));
        found.into_iter().map(|(pid, _)| pid).collect()
    }

    /// (pid, command line) of every process that names the store.
    fn processes(&self) -> Vec<(i32, String)> {
        let root = self.path("store");
        let processes = fs::read_dir("/proc").unwrap();
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let lines = pids.filter_map(|pid: i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
        });
        lines
            .filter(|(_, line)| line.contains(root.to_str().unwrap()))
            .collect()
    }

    /// The status of a container as `ps` has it.
    pub fn status(&self, name: &str) -> String {
        let status = &self.row(name)["status"];
        status.as_str().unwrap_or_default().to_owned()
    }

    pub fn wait_until(&self, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(120);
        while !done() {
            assert!(Instant::now() < end, "it takes too long");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// No mount, process, cgroup or file of a running container is left.
    pub fn assert_nothing_runs(&self) {
        let root = self.path("store");
        let root = root.to_str().unwrap();
        let mounts =
            String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        assert!(!mounts.contains(root), "{mounts}");
        let run: Vec<_> = fs::read_dir(self.path("store/run"))
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().is_dir())
            .collect();
        assert!(run.is_empty(), "{run:?}");
        // What has nothing to do any more may take a moment to end.
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let running = self.processes();
            if running.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "still running: {running:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(self.path("store/containers")) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let name = name.trim_end_matches(".json");
            let _ = self.command(&["rm", "--force", name]).output();
        }
    }
}

/// A `vellum run` in the background; killed when it is dropped.
pub struct Running {
    pub child: Child,
}

impl Running {
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for its end; the exit status.
    pub fn wait(mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < end, "vellum run does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has a command take signals, whatever the shell that runs the tests ignores.
pub fn take_signals(command: &mut Command) {
    use nix::sys::signal::{SigHandler, Signal, signal};
    use std::os::unix::process::CommandExt;
    let default = || {
        for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the default action runs no code of ours.
            unsafe { signal(number, SigHandler::SigDfl) }?;
        }
        Ok(())
    };
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe { command.pre_exec(default) };
}
