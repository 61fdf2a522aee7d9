//! A snapshotter with a store of its own, spoken to without a containerd.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use vellum_base::crash_point::{PANIC_VARIABLE, VARIABLE};
use vellum_export::loop_device::LoopDevice;

use super::client::Client;
use super::{Area, Daemon, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

pub struct Rig {
    daemon: Option<Daemon>,
    pub client: Client,
    pub area: Area,
}

/// The program: another one where this is not the machine that built it.
fn program() -> std::ffi::OsString {
    std::env::var_os("VELLUM_TEST_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_vellum").into())
}

impl Rig {
    /// A snapshotter that runs, with this text in its configuration.
    pub fn new(config: &str) -> Rig {
        let area = Area::new();
        let head = "version = 1\ndefault_size = '64M'\n";
        fs::write(area.at("config.toml"), format!("{head}{config}")).unwrap();
        let mut rig = Rig {
            daemon: None,
            client: Client::new(area.at("vellum.sock")),
            area,
        };
        rig.start();
        rig
    }

    pub fn root(&self) -> PathBuf {
        self.area.path().join("root")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.area.at("log")).unwrap_or_default()
    }

    /// Starts it.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts it, with this in its environment.
    fn start_with(&mut self, environment: &[(&str, &str)]) {
        let mut command = Command::new(program());
        command
            .args(["--root", &self.area.at("root"), "snapshotter"])
            .args(["--config", &self.area.at("config.toml")])
            .args(["--address", &self.area.at("vellum.sock")])
            // For a core file, where the host writes those.
            .current_dir(self.area.path())
            .env_remove(VARIABLE)
            .env_remove(PANIC_VARIABLE)
            .envs(environment.iter().copied());
        let mut daemon = Daemon::start(&mut command, &self.area.path().join("log"));
        // That somebody listens is not enough: a program that the one before was starting when it was ended may
        // have its socket for a moment. One that is to die while it starts never answers.
        wait_for("the snapshotter answers", LIMIT, || {
            self.client.list(&[]).is_ok() || daemon.0.try_wait().unwrap().is_some()
        });
        self.daemon = Some(daemon);
    }

    /// Ends it with a signal.
    pub fn end(&mut self, signal: Signal) {
        self.daemon.take().unwrap().signal(signal);
    }

    /// Starts it anew, to die at a place of `vellum_base::crash_point` as if killed, and has `work`
    /// done; true when it died there. It runs again afterwards, either way.
    pub fn dies_at<T>(&mut self, place: &str, work: impl FnOnce(&Client) -> T) -> bool {
        self.ends_with(Signal::SIGKILL, (VARIABLE, place), work)
    }

    /// As [`Rig::dies_at`], by a panic.
    pub fn panics_at<T>(&mut self, place: &str, work: impl FnOnce(&Client) -> T) -> bool {
        self.ends_with(Signal::SIGABRT, (PANIC_VARIABLE, place), work)
    }

    fn ends_with<T>(
        &mut self,
        signal: Signal,
        place: (&str, &str),
        work: impl FnOnce(&Client) -> T,
    ) -> bool {
        if !cfg!(debug_assertions) {
            panic!("places to die at are in debug builds alone: run the tests without --release");
        }
        self.end(Signal::SIGTERM);
        self.start_with(&[place]);
        work(&self.client);
        // What comes after the answer has its time too: the next one comes when it is done.
        let lives = self.client.cleanup().is_ok();
        let mut daemon = self.daemon.take().unwrap();
        let limit = match lives {
            // For what nobody waits for.
            true => Duration::from_secs(3),
            false => LIMIT,
        };
        let deadline = Instant::now() + limit;
        let died = loop {
            match daemon.0.try_wait().unwrap() {
                Some(status) => break status.signal() == Some(signal as i32),
                None if Instant::now() > deadline => break false,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        if !died {
            daemon.signal(Signal::SIGTERM);
        }
        drop(daemon);
        self.start();
        died
    }

    /// A committed snapshot with one file in it.
    pub fn committed(&self, name: &str, parent: &str, file: &str, text: &str) {
        let key = format!("{name} being made");
        let mount = self.client.prepare(&key, parent, &[]).unwrap();
        fs::write(Path::new(&mount.source).join(file), text).unwrap();
        self.client.commit(name, &key, &[]).unwrap();
    }

    /// What is in a file of a committed snapshot.
    pub fn content(&self, name: &str, file: &str) -> Option<String> {
        let key = format!("{name} looked at");
        let mount = self.client.view(&key, name, &[]).unwrap();
        let text = fs::read_to_string(Path::new(&mount.source).join(file)).ok();
        self.client.remove(&key).unwrap();
        text
    }

    /// What is on disk, mounted, attached or running that no snapshot needs, and what one needs
    /// that is not there.
    fn wrong(&self) -> Vec<String> {
        let root = self.root();
        let mut wrong = Vec::new();
        let names = |dir: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(root.join(dir)).unwrap().flatten();
            entries
                .map(|entry| entry.file_name().into_string().unwrap())
                .collect()
        };
        let records = |dir: &str| -> Vec<Value> {
            let found = names(dir);
            let found = found.iter().filter(|name| name.ends_with(".json"));
            found
                .map(|name| {
                    let bytes = fs::read(root.join(dir).join(name)).unwrap();
                    serde_json::from_slice(&bytes).unwrap()
                })
                .collect()
        };
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let snapshots = records("snapshots");
        let mut needed: BTreeSet<String> = BTreeSet::new();
        let mut live: BTreeSet<String> = BTreeSet::new();
        for record in &snapshots {
            needed.insert(text(&record["base"]));
            needed.extend(record["layers"].as_array().unwrap().iter().map(text));
            if record["kind"] != "committed" {
                live.insert(text(&record["id"]));
            }
        }
        needed.extend(records("templates").iter().map(|t| text(&t["layer"])));
        let layers = names("layers");
        wrong.extend(
            layers
                .difference(&needed)
                .map(|l| format!("layer {l} is left")),
        );
        wrong.extend(
            needed
                .difference(&layers)
                .map(|l| format!("layer {l} is lost")),
        );
        for dir in ["staging", "trash"] {
            wrong.extend(names(dir).into_iter().map(|name| format!("{dir}/{name}")));
        }
        let unfinished = names("snapshots").into_iter();
        wrong.extend(unfinished.filter(|name| !name.ends_with(".json")));
        for dir in ["run", "mnt"] {
            let there = names(dir);
            let ids = there.iter().filter(|name| name.len() == 36);
            wrong.extend(
                ids.filter(|id| !live.contains(*id))
                    .map(|id| format!("{dir}/{id}")),
            );
        }
        let is_live = |path: &Path| {
            let mut parts = path.components();
            parts.any(|part| live.contains(&*part.as_os_str().to_string_lossy()))
        };
        for mount in self.area.mounts() {
            if mount.starts_with(&root) && !is_live(&mount) {
                wrong.push(format!("mounted: {}", mount.display()));
            }
        }
        for device in LoopDevice::attached().unwrap() {
            if let Some(file) = device.backing_file()
                && file.starts_with(&root)
                && !is_live(&file)
            {
                wrong.push(format!("attached: {}", file.display()));
            }
        }
        for line in self.area.device_processes() {
            if !live.iter().any(|id| line.contains(id)) {
                wrong.push(format!("running: {line}"));
            }
        }
        let listed = self.client.list(&[]).unwrap();
        if listed.len() != snapshots.len() {
            wrong.push(format!(
                "{} listed, {} on disk",
                listed.len(),
                snapshots.len()
            ));
        }
        wrong
    }

    /// Fails unless, after some Cleanup, all is there that snapshots need and nothing else.
    pub fn assert_whole(&self, when: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.client.cleanup().unwrap();
            let wrong = self.wrong();
            if wrong.is_empty() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{when}: {wrong:#?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// `vellum check` finds nothing, once what is done in the background is done.
    pub fn assert_checks(&self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.client.cleanup().unwrap();
            let output = self.vellum(&["check"]);
            if output.status.success() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{}{}\n{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// `vellum check` finds no error now; it may warn of what will be done in time.
    pub fn assert_no_errors(&self, place: &str) {
        let output = self.vellum(&["check"]);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(" 2 snapshots"), "{place}: {said}");
        assert!(!said.contains("error: "), "{place}: {said}");
    }

    /// Another command on the same root.
    pub fn vellum(&self, arguments: &[&str]) -> std::process::Output {
        Command::new(program())
            .args(["--root", &self.area.at("root")])
            .args(arguments)
            .output()
            .unwrap()
    }
}
