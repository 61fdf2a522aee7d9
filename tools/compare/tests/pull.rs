//! Containers from a registry: every way of pulling works, measures, and leaves nothing behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What every process of a run has in its environment.
const MARK: &str = "COMPARE_TEST";

struct Setup {
    /// In memory, with a short path: sockets lie below it.
    place: tempfile::TempDir,
    out: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "mounting needs root: run the tests with sudo"
        );
        for (file, package) in [
            ("/usr/bin/docker-registry", "docker-registry"),
            ("/usr/bin/containerd", "containerd"),
            ("/usr/bin/crun", "crun"),
            ("/usr/bin/fio", "fio"),
            ("/usr/bin/python3", "python3"),
            ("/sbin/tc", "iproute2"),
        ] {
            need(file, package);
        }
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            tempfile::tempdir_in(memory).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        let out = tempfile::tempdir().unwrap();
        Setup { place, out }
    }

    fn mark(&self) -> String {
        format!("{MARK}={}", self.place.path().display())
    }

    fn command(&self, drivers: &str, workloads: &str, rate: &str) -> Command {
        let compare = Path::new(env!("CARGO_BIN_EXE_compare"));
        let vellum = compare.with_file_name("vellum");
        assert!(
            vellum.exists(),
            "{} is missing: cargo build --bin vellum",
            vellum.display()
        );
        let mut command = Command::new(compare);
        command
            .env(MARK, self.place.path())
            .args(["--smoke", "--rounds", "1", "--time-limit", "10"])
            .args(["--drivers", drivers, "--workloads", workloads])
            .args(["--pull-rate", rate, "--pull-delay", "2"])
            .arg("--vellum")
            .arg(vellum)
            .arg("--dir")
            .arg(self.place.path())
            .arg("--out")
            .arg(self.out.path());
        command
    }

    fn measure(&self, drivers: &str, workloads: &str) -> Value {
        let mut command = self.command(drivers, workloads, "1gbit");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        self.report()
    }

    fn report(&self) -> Value {
        let json = fs::read(self.out.path().join("report.json")).unwrap();
        serde_json::from_slice(&json).unwrap()
    }

    /// Processes of the run, by their command lines.
    fn processes(&self) -> Vec<String> {
        let mark = self.mark();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let dirs = entries.map(|entry| entry.path());
        let ours = dirs.filter(|dir: &PathBuf| {
            let environment = fs::read(dir.join("environ")).unwrap_or_default();
            let mut variables = environment.split(|byte| *byte == 0);
            variables.any(|variable| variable == mark.as_bytes())
        });
        ours.filter_map(|dir| fs::read(dir.join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .collect()
    }

    /// Processes (among them those that hold network namespaces), mounts, and files in the place.
    fn leftovers(&self) -> Vec<String> {
        let mut left = self.processes();
        let place = self.place.path().display().to_string();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        left.extend(
            table
                .lines()
                .filter(|l| l.contains(&place))
                .map(str::to_owned),
        );
        let files = fs::read_dir(self.place.path()).unwrap().flatten();
        left.extend(files.map(|entry| entry.path().display().to_string()));
        left
    }
}

fn need(file: &str, package: &str) {
    assert!(
        Path::new(file).exists(),
        "{file} is missing: apt-get install {package}"
    );
}

fn figure(report: &Value, workload: &str, metric: &str, driver: &str) -> f64 {
    let mut samples = report["samples"].as_array().unwrap().iter();
    let found = samples.find(|sample| {
        sample["workload"] == workload && sample["metric"] == metric && sample["driver"] == driver
    });
    let found = found.unwrap_or_else(|| panic!("no {workload}.{metric} of {driver}"));
    found["value"].as_f64().unwrap()
}

/// What comes later takes longer, and has brought no less.
fn assert_in_order(report: &Value, driver: &str) {
    for order in [
        ["first", "ready", "all"],
        ["first_bytes", "ready_bytes", "all_bytes"],
    ] {
        let figures = order.map(|metric| figure(report, "pull", metric, driver));
        assert!(
            figures[0] > 0.0 && figures.is_sorted(),
            "{driver} {figures:?}"
        );
    }
    for metric in ["random", "ordered", "space"] {
        assert!(
            figure(report, "pull", metric, driver) > 0.0,
            "{driver} {metric}"
        );
    }
}

#[test]
fn a_container_starts_from_a_registry_whole_and_lazily_and_nothing_is_left() {
    let setup = Setup::new();
    let report = setup.measure("pull-full,pull-lazy,pull-hot", "pull,fetch");
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    for driver in ["pull-overlayfs", "pull-full", "pull-lazy", "pull-hot"] {
        assert_in_order(&report, driver);
        assert!(figure(&report, "fetch", "rate", driver) > 0.0);
    }
    let bytes = |metric, driver| figure(&report, "pull", metric, driver);
    // Whole is whole before the first line.
    for whole in ["pull-overlayfs", "pull-full"] {
        assert!(bytes("first_bytes", whole) > 0.99 * bytes("all_bytes", whole));
    }
    for lazy in ["pull-lazy", "pull-hot"] {
        let first = bytes("first_bytes", lazy);
        assert!(
            first < 0.8 * bytes("all_bytes", "pull-full"),
            "{lazy} {first}"
        );
    }
    // Nobody who only pulls has a flush check, and all are comparable.
    let drivers = report["drivers"].as_array().unwrap().iter();
    for driver in drivers.filter(|driver| driver["kind"] == "pull") {
        assert!(driver["flush"].is_null(), "{driver}");
    }
    let mut summary = report["summary"].as_array().unwrap().iter();
    assert!(summary.all(|line| line["comparable"] == true));
    let mut goals = report["goals"].as_array().unwrap().iter();
    let goal = goals.find(|goal| goal["figure"] == "pull.first" && goal["beside"] == "pull-full");
    assert_eq!(goal.unwrap()["reached"]["rounds"], 1);
    let page = fs::read_to_string(setup.out.path().join("report.html")).unwrap();
    assert!(page.contains("÷ overlayfs, whole") && page.contains("÷ vellum, whole"));
    assert!(page.contains("Until the service answers"), "a chart");
}

#[test]
fn a_container_starts_lazily_through_stargz_beside_overlayfs() {
    need("/usr/bin/ctr-remote", "stargz-snapshotter");
    need(
        "/usr/share/gocode/src/github.com/containerd/stargz-snapshotter",
        "golang-github-containerd-stargz-snapshotter-dev golang-go",
    );
    let setup = Setup::new();
    let report = setup.measure("pull-stargz", "pull");
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    assert_in_order(&report, "pull-stargz");
    let first = |driver| figure(&report, "pull", "first_bytes", driver);
    assert!(first("pull-stargz") < first("pull-overlayfs"));
}

#[test]
fn an_interrupted_pull_leaves_no_server_namespace_or_mount() {
    let setup = Setup::new();
    // So slow that it is still under way when it is interrupted.
    let mut child = setup
        .command("pull-lazy", "pull", "1mbit")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let pulls = || {
        let processes = setup.processes();
        processes
            .iter()
            .any(|line| line.contains("images pull ") && line.contains(":5001/"))
    };
    while !pulls() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(
            start.elapsed() < Duration::from_secs(300),
            "nothing was pulled"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    assert_eq!(setup.report()["cut_short"], "interrupted");
}
