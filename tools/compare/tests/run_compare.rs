//! The whole program on hardly any work: what it measures, what it says, what it leaves behind.
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

/// The program with its environment: an empty directory to measure in, another for the reports.
struct Setup {
    dir: tempfile::TempDir,
    place: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "mounting needs root: run the tests with sudo"
        );
        for (program, package) in [
            ("fio", "fio"),
            ("nbdkit", "nbdkit"),
            ("qemu-io", "qemu-utils"),
            ("mke2fs", "e2fsprogs"),
        ] {
            let found = ["/usr/bin", "/usr/sbin", "/sbin", "/usr/local/bin"]
                .iter()
                .any(|dir| Path::new(dir).join(program).exists());
            assert!(found, "{program} is missing: apt-get install {package}");
        }
        // In memory: a run syncs the file system that it measures many times, and the disk may be
        // busy with the tests beside this one.
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            tempfile::tempdir_in(memory).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        let dir = tempfile::tempdir().unwrap();
        Setup { dir, place }
    }

    fn place(&self) -> PathBuf {
        self.place.path().to_owned()
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn command(&self, drivers: &str, workloads: &str) -> Command {
        let compare = Path::new(env!("CARGO_BIN_EXE_compare"));
        let vellum = compare.with_file_name("vellum");
        assert!(
            vellum.exists(),
            "{} is missing: cargo build --bin vellum",
            vellum.display()
        );
        let mut command = Command::new(compare);
        command
            .args(["--smoke", "--rounds", "2", "--time-limit", "60"])
            .args(["--drivers", drivers, "--workloads", workloads])
            .arg("--vellum")
            .arg(vellum)
            .arg("--dir")
            .arg(self.place())
            .arg("--out")
            .arg(self.out());
        command
    }

    /// Mounts and loop devices that lie in the place, and files.
    fn leftovers(&self) -> Vec<String> {
        let place = self.place().display().to_string();
        let mut left: Vec<String> = fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|line| line.contains(&place))
            .map(str::to_owned)
            .collect();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
            left.extend(backing.ok().filter(|file| file.contains(&place)));
        }
        let files = fs::read_dir(self.place()).unwrap().flatten();
        left.extend(files.map(|entry| entry.path().display().to_string()));
        left
    }
}

#[test]
fn every_driver_is_checked_then_measured_in_turns_and_nothing_is_left() {
    let setup = Setup::new();
    let output = setup
        .command("vellum,overlayfs,vellum-nbd,nbdkit-cow", "fio-fsync,nbd")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(setup.leftovers(), Vec::<String>::new());

    let json = fs::read(setup.out().join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&json).unwrap();
    let flush = |id: &str| {
        let drivers = report["drivers"].as_array().unwrap();
        let driver = drivers.iter().find(|driver| driver["id"] == id).unwrap();
        driver["flush"]["passed"].as_bool().unwrap()
    };
    for id in ["raw", "vellum", "overlayfs", "nbdkit-file", "vellum-nbd"] {
        assert!(flush(id), "{id}: {}", report["drivers"]);
    }
    // It acknowledges flushes and forgets everything, by design: the check must see that.
    assert!(!flush("nbdkit-cow"));

    let samples = report["samples"].as_array().unwrap();
    for (workload, metric, drivers) in [
        (
            "fio-fsync",
            "first",
            &["raw", "raw-again", "vellum", "overlayfs"][..],
        ),
        (
            "nbd",
            "first4k",
            &["nbdkit-file", "vellum-nbd", "nbdkit-cow"][..],
        ),
    ] {
        let order: Vec<(u64, &str)> = samples
            .iter()
            .filter(|s| s["workload"] == workload && s["metric"] == metric)
            .map(|s| (s["round"].as_u64().unwrap(), s["driver"].as_str().unwrap()))
            .collect();
        for round in 0..2 {
            for &driver in drivers {
                assert!(
                    order.contains(&(round, driver)),
                    "{driver} {round} {order:?}"
                );
            }
        }
        assert!(order.is_sorted_by_key(|(round, _)| *round), "{order:?}");
        let firsts: Vec<&str> = (0..2)
            .map(|round| order.iter().find(|(r, _)| *r == round).unwrap().1)
            .collect();
        assert_ne!(
            firsts[0], firsts[1],
            "each round begins with another driver"
        );
    }
    let cow = report["summary"].as_array().unwrap().iter();
    let mut cow = cow.filter(|line| line["driver"] == "nbdkit-cow").peekable();
    assert!(cow.peek().is_some());
    assert!(cow.all(|line| line["comparable"] == false));

    let page = fs::read_to_string(setup.out().join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("✗ nbdkit cow"));
}

#[test]
fn an_interrupted_run_cleans_up_and_fails() {
    let setup = Setup::new();
    let mut child = setup
        .command("vellum", "fio-fsync")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Until a container is in use.
    let start = Instant::now();
    while !setup
        .leftovers()
        .iter()
        .any(|line| line.contains("/c.mnt "))
    {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "nothing was mounted"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success());
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    assert!(!setup.out().exists(), "no report of half a run");
}
