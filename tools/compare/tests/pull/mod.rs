//! Containers from a registry: every way of pulling works, measures, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Setup, need};

/// What every process of a run has in its environment.
const MARK: &str = "COMPARE_TEST";

/// With what pulls need besides.
struct Pulls(Setup);

impl Pulls {
    fn new() -> Self {
        for (program, package) in [
            ("docker-registry", "docker-registry"),
            ("containerd", "containerd"),
            ("crun", "crun"),
            ("python3", "python3"),
            ("tc", "iproute2"),
        ] {
            need(program, package);
        }
        Pulls(Setup::new())
    }

    fn command(&self, drivers: &str, workloads: &str, rate: &str) -> Command {
        let mut command = self.0.command(drivers, workloads);
        command
            .env(MARK, self.0.place())
            .args(["--rounds", "1", "--time-limit", "10"])
            .args(["--pull-rate", rate, "--pull-delay", "2"]);
        command
    }

    fn measure(&self, drivers: &str, workloads: &str) -> Value {
        let mut command = self.command(drivers, workloads, "1gbit");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        self.0.report()
    }

    /// Processes of the run, by their command lines.
    fn processes(&self) -> Vec<String> {
        let mark = format!("{MARK}={}", self.0.place().display());
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

    /// As [`Setup::leftovers`], and processes, among them those that hold network namespaces.
    fn leftovers(&self) -> Vec<String> {
        let mut left = self.processes();
        left.extend(self.0.leftovers());
        left
    }
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
    let setup = Pulls::new();
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
    // Of an image as small as this one all comes along with what a start reads, unless it is known before.
    let (first, all) = (
        bytes("first_bytes", "pull-hot"),
        bytes("all_bytes", "pull-full"),
    );
    assert!(first < 0.8 * all, "{first} of {all}");
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
    let page = fs::read_to_string(setup.0.out().join("report.html")).unwrap();
    assert!(page.contains("÷ overlayfs, whole") && page.contains("÷ vellum, whole"));
    assert!(page.contains("Until the service answers"), "a chart");
}

#[test]
fn a_container_starts_lazily_through_stargz_beside_overlayfs() {
    need("ctr-remote", "stargz-snapshotter");
    assert!(
        Path::new("/usr/share/gocode/src/github.com/containerd/stargz-snapshotter").exists(),
        "its library is missing: apt-get install golang-github-containerd-stargz-snapshotter-dev golang-go"
    );
    let setup = Pulls::new();
    let report = setup.measure("pull-stargz", "pull");
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    assert_in_order(&report, "pull-stargz");
    let first = |driver| figure(&report, "pull", "first_bytes", driver);
    assert!(first("pull-stargz") < first("pull-overlayfs"));
}

#[test]
fn an_interrupted_pull_leaves_no_server_namespace_or_mount() {
    let setup = Pulls::new();
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
    assert_eq!(setup.0.report()["cut_short"], "interrupted");
}
