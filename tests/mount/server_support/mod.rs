//! What the tests of device servers share: a mounted container's processes, and verified load.
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

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use vellum_export::device::{Identity, RunState, Status, control, status};
use vellum_fs::run_dir::RunDir;

use crate::common::{Running, TestStore, kill, kill_together, run, wait_until};

/// A container that is mounted, and the processes that serve it.
pub struct Container {
    pub name: &'static str,
    pub mounted: PathBuf,
    pub run_dir: RunDir,
}

impl Container {
    /// Makes a container with an empty directory `data` on a new image, and mounts it.
    pub fn mounted(store: &TestStore, name: &'static str) -> Container {
        if !store.names("images").contains(&"data".to_owned()) {
            let tree = store.path("root");
            std::fs::create_dir_all(tree.join("data")).unwrap();
            store.ok(&["import", "data", tree.to_str().unwrap(), "--size", "256M"]);
        }
        store.ok(&["create", "data", "--name", name]);
        let mounted = store.mount(name);
        Container::at(store, name, mounted)
    }

    /// One that is mounted already.
    pub fn at(store: &TestStore, name: &'static str, mounted: PathBuf) -> Container {
        let id = row(store, name)["id"].as_str().unwrap().to_owned();
        Container {
            name,
            mounted,
            run_dir: RunDir::at(store.root.join("run").join(id)),
        }
    }

    pub fn data(&self) -> PathBuf {
        self.mounted.join("data")
    }

    pub fn state(&self) -> RunState {
        status(&self.run_dir).unwrap().expect("a device").state
    }

    /// The state once a worker other than `before` serves.
    pub fn served(&self, before: Option<i32>) -> RunState {
        let mut found = None;
        wait_long("a worker serves", || {
            let state = self.state();
            let other = state
                .worker
                .is_some_and(|worker| Some(worker.pid) != before && worker.is_alive());
            found = (other && state.status == Status::Serving).then_some(state);
            found.is_some()
        });
        found.unwrap()
    }

    /// The state once a worker serves and a standby waits.
    pub fn settled(&self) -> RunState {
        let mut found = None;
        wait_long("there is a standby", || {
            let state = self.served(None);
            let standby = state.standby.is_some_and(Identity::is_alive);
            found = (standby && state.supervisor.is_alive()).then_some(state);
            found.is_some()
        });
        found.unwrap()
    }

    /// Kills the worker and waits for the next one.
    pub fn kill_worker(&self) -> RunState {
        let before = self.served(None).worker.unwrap().pid;
        kill(before);
        self.served(Some(before))
    }

    /// Kills all that serves it.
    pub fn kill_everything(&self) {
        let state = self.settled();
        kill_together(&[
            state.standby.unwrap().pid,
            state.supervisor.pid,
            state.worker.unwrap().pid,
        ]);
        wait_until("all are dead", || !self.state().is_alive());
    }

    pub fn call(&self, verb: &str) -> Value {
        control::call(&self.run_dir, verb, Value::Null, Duration::from_secs(120)).unwrap()
    }
}

/// Waits at most two minutes: under load the host's disk can take many seconds for a sync.
pub fn wait_long(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What `vellum ps --json` says of a container.
pub fn row(store: &TestStore, name: &str) -> Value {
    let rows = store.json(&["ps"]);
    let mut rows = rows.as_array().unwrap().iter();
    rows.find(|row| row["name"] == name).unwrap().clone()
}

/// Checks the file system of a container that is not mounted, as it is in its layer.
pub fn fsck(store: &TestStore, name: &str) {
    let (server, socket) = store.serve(name);
    let raw = store.arg("fsck.raw");
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    run("nbdcopy", &[uri.as_str(), raw.as_str()]);
    drop(server);
    // As at a mount: what the journal holds is carried out first.
    run(
        "sh",
        &["-c", "e2fsck -fy \"$0\" || [ $? = 1 ]", raw.as_str()],
    );
    run("e2fsck", &["-fn", raw.as_str()]);
    std::fs::remove_file(raw).unwrap();
}

/// fio in a thread: whole passes over a file, each with new content, written and then read back
/// and verified, until it is told to finish.
pub struct Load {
    job: Job,
    finish: Arc<AtomicBool>,
    abort: Arc<AtomicBool>,
    /// The number of passes.
    thread: Option<JoinHandle<Result<u32, String>>>,
}

/// What fio does with a file of its own in a directory.
#[derive(Clone)]
pub struct Job {
    directory: PathBuf,
    name: &'static str,
    options: &'static [&'static str],
}

impl Job {
    fn command(&self, pass: u32) -> Command {
        let mut command = Command::new("fio");
        command
            .arg(format!("--name={}", self.name))
            .arg(format!("--directory={}", self.directory.display()))
            .arg(format!("--randseed={}", pass + 1))
            .args([
                "--size=12m",
                "--rw=randwrite",
                "--bssplit=4k/50:12k/50",
                "--ioengine=psync",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fallocate=none",
                "--verify_state_save=0",
            ])
            .args(self.options)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// One pass; an error is fio's output. `Ok(false)` when it was aborted.
    fn pass(&self, pass: u32, more: &[&str], abort: &AtomicBool) -> Result<bool, String> {
        let child = self.command(pass).args(more).spawn();
        let mut fio = Running(child.expect("fio is missing: apt-get install fio"));
        while fio.0.try_wait().unwrap().is_none() {
            if abort.load(Ordering::Acquire) {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Some lines: they fit in the pipes.
        let status = fio.0.wait().unwrap();
        let mut text = String::new();
        use std::io::Read;
        let (mut out, mut err) = (fio.0.stdout.take().unwrap(), fio.0.stderr.take().unwrap());
        out.read_to_string(&mut text).unwrap();
        err.read_to_string(&mut text).unwrap();
        if status.success() && !text.contains("verify:") && !text.contains("error=") {
            return Ok(true);
        }
        Err(format!("{}, pass {pass}: {status}\n{text}", self.name))
    }

    /// Reads the content of that pass once more, in `directory`.
    pub fn verify(&self, directory: &Path, pass: u32) {
        let job = Job {
            directory: directory.to_owned(),
            ..self.clone()
        };
        job.pass(pass, &["--verify_only"], &AtomicBool::new(false))
            .unwrap();
    }
}

impl Load {
    /// Begins at once; returns when its file is there.
    pub fn start(directory: &Path, name: &'static str, options: &'static [&'static str]) -> Load {
        let job = Job {
            directory: directory.to_owned(),
            name,
            options,
        };
        let finish = Arc::new(AtomicBool::new(false));
        let abort = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (job, finish, abort) = (job.clone(), finish.clone(), abort.clone());
            move || {
                let mut passes = 0;
                while passes == 0 || !finish.load(Ordering::Acquire) {
                    if !job.pass(passes, &[], &abort)? {
                        break;
                    }
                    passes += 1;
                }
                Ok(passes)
            }
        });
        // As fio names it.
        let file = directory.join(format!("{name}.0.0"));
        let load = Load {
            job,
            finish,
            abort,
            thread: Some(thread),
        };
        wait_long("fio writes", || file.exists());
        load
    }

    /// With a sync after every few writes.
    pub fn synced(directory: &Path) -> Load {
        Load::start(directory, "synced", &["--fsync=8"])
    }

    /// With one sync at the end of each pass.
    pub fn buffered(directory: &Path) -> Load {
        Load::start(directory, "buffered", &["--end_fsync=1"])
    }

    /// False when it has ended by itself, which only an error does.
    pub fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Lets the present pass end; returns the job and the number of its last pass.
    pub fn finish(mut self) -> (Job, u32) {
        self.finish.store(true, Ordering::Release);
        let passes = self.thread.take().unwrap().join().unwrap();
        let passes = passes.unwrap_or_else(|error| panic!("{error}"));
        println!("{}: {passes} passes", self.job.name);
        (self.job.clone(), passes - 1)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.abort.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
