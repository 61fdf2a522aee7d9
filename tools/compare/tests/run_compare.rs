//! The whole program on hardly any work: what it measures, what it says, what it leaves behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod pull;
mod rivals;

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

fn need(program: &str, package: &str) {
    let found = ["/usr/bin", "/usr/sbin", "/sbin", "/usr/local/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(program).exists());
    assert!(found, "{program} is missing: apt-get install {package}");
}

impl Setup {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "mounting needs root: run the tests with sudo"
        );
        need("fio", "fio");
        need("nbdkit", "nbdkit");
        need("qemu-io", "qemu-utils");
        need("mke2fs", "e2fsprogs");
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
            .arg("--smoke")
            .args(["--drivers", drivers, "--workloads", workloads])
            .arg("--vellum")
            .arg(vellum)
            .arg("--dir")
            .arg(self.place())
            .arg("--out")
            .arg(self.out())
            .args(["--rounds", "2", "--time-limit", "60"]);
        command
    }

    /// The report's data.
    fn report(&self) -> Value {
        let json = fs::read(self.out().join("report.json")).unwrap();
        serde_json::from_slice(&json).unwrap()
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

    let report = setup.report();
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
fn containers_side_by_side_answer_goals_twice_in_a_row() {
    let setup = Setup::new();
    for _ in 0..2 {
        let output = setup.command("vellum", "swarm").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(setup.leftovers(), Vec::<String>::new());
        let report = setup.report();
        assert_eq!(report["cut_short"], Value::Null);
        let goals = report["goals"].as_array().unwrap();
        for figure in ["swarm.total", "swarm.fair", "swarm.synced"] {
            let goal = goals.iter().find(|goal| goal["figure"] == figure).unwrap();
            assert_eq!(goal["reached"]["rounds"], 2, "{goal}");
            assert!(goal["reached"]["median"].as_f64().unwrap() > 0.0);
            // Two rounds prove nothing.
            let outcome = goal["outcome"].as_str().unwrap();
            assert!(outcome.starts_with("noise-"), "{goal}");
        }
        let fair = goals.iter().find(|goal| goal["figure"] == "swarm.fair");
        let fair = fair.unwrap()["reached"]["high"].as_f64().unwrap();
        assert!(
            fair <= 1.0,
            "the slowest is no faster than the mean: {fair}"
        );
        let life = goals.iter().find(|goal| goal["figure"] == "life-64.life");
        assert_eq!(life.unwrap()["outcome"], "not-measured");
        let page = fs::read_to_string(setup.out().join("report.html")).unwrap();
        assert!(
            page.contains("<h2>Goals of the project Vellum</h2>") && page.contains("≥ 0.9 × raw")
        );
    }
}

#[test]
fn a_fork_is_made_in_the_way_of_each_driver_and_has_its_origins_data() {
    let setup = Setup::new();
    let drivers = "vellum,overlayfs,fuse-overlayfs,btrfs,xfs-reflink,copy,qcow2";
    let mut command = setup.command(drivers, "fork");
    let output = command.args(["--rounds", "1"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    let report = setup.report();
    let samples = report["samples"].as_array().unwrap();
    let figure = |driver: &str, metric: &str| {
        let mut of = samples.iter().filter(|s| s["metric"] == metric);
        let sample = of.find(|s| s["driver"] == driver);
        sample.map(|sample| sample["value"].as_f64().unwrap())
    };
    for driver in report["drivers"].as_array().unwrap() {
        let id = driver["id"].as_str().unwrap();
        let there = driver["absent"].is_null() && driver["kind"] == "files";
        assert_eq!(there, figure(id, "fork").is_some(), "{driver}");
        assert!(figure(id, "first") >= figure(id, "fork"), "{driver}");
    }
    // Some copy the data, others everything.
    let space = |driver: &str| figure(driver, "space").unwrap();
    assert!(space("overlayfs") >= 4.0);
    assert!(space("vellum") < space("copy") / 2.0);
}

#[test]
fn a_limit_of_time_leaves_out_further_drivers_first_and_says_so() {
    let setup = Setup::new();
    let rounds = |report: &Value, driver: &str| {
        let samples = report["samples"].as_array().unwrap().iter();
        let of = samples.filter(|s| s["workload"] == "sqlite-rollback" && s["metric"] == "steady");
        of.filter(|s| s["driver"] == driver).count()
    };
    // On a busy machine no round may fit into the first.
    let limits = [0.4, 1.6, 6.4];
    let report = limits.into_iter().find_map(|minutes| {
        let output = setup
            .command("vellum,copy", "sqlite-rollback,untar")
            .args([
                "--rounds",
                "1000",
                "--time-limit",
                &minutes.to_string(),
                "--tree",
            ])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(setup.leftovers(), Vec::<String>::new());
        let report = setup.report();
        (rounds(&report, "raw") >= 1 && rounds(&report, "vellum") >= 1).then_some(report)
    });
    let report = report.expect("not one round in six minutes");
    let rounds = |driver: &str| rounds(&report, driver);
    let (raw, own, copy) = (rounds("raw"), rounds("vellum"), rounds("copy"));
    // It came to an end by the limit.
    assert!(raw < 1000, "{raw}");
    assert!(raw.abs_diff(own) <= 1, "{raw} {own}");
    assert!(copy < raw, "{copy} {raw}");
    let left_out = report["left_out"].to_string();
    assert!(left_out.contains("for lack of time"), "{left_out}");
    let took = report["took"].as_array().unwrap();
    assert!(took.iter().any(|took| took["what"] == "flush check"));
}

#[test]
fn a_quick_run_ends_at_its_limit_with_all_that_it_began_and_says_what_it_left_out() {
    let setup = Setup::new();
    let compare = Path::new(env!("CARGO_BIN_EXE_compare"));
    for limit in [1.0, 25.0] {
        let start = Instant::now();
        let output = Command::new(compare)
            .args(["--quick", "--time-limit", &(limit / 60.0).to_string()])
            .arg("--vellum")
            .arg(compare.with_file_name("vellum"))
            .arg("--dir")
            .arg(setup.place())
            .arg("--out")
            .arg(setup.out())
            .output()
            .unwrap();
        let took = start.elapsed();
        let said = String::from_utf8_lossy(&output.stderr);
        // What the limit stops has not failed.
        assert!(output.status.success(), "{said}");
        assert_eq!(setup.leftovers(), Vec::<String>::new());
        // What comes after the limit is unmounting what was mounted.
        assert!(took < Duration::from_secs_f64(limit + 30.0), "{took:?}");
        let report = setup.report();
        assert_eq!(report["limit"], limit);
        assert!(report["seconds"].as_f64().unwrap() <= took.as_secs_f64());
        assert_eq!(report["failures"], Value::Array(Vec::new()), "{report}");
        assert_eq!(report["cut_short"], Value::Null);
        let left_out = report["left_out"].to_string();
        assert!(left_out.contains("no time was left"), "{left_out}");
        // Who was not checked has no place in any comparison.
        for driver in report["drivers"].as_array().unwrap() {
            let id = driver["id"].as_str().unwrap();
            if driver["absent"].is_null() && driver["flush"].is_null() {
                assert!(left_out.contains(id), "{id}: {left_out}");
                let mut summary = report["summary"].as_array().unwrap().iter();
                assert!(summary.all(|s| s["driver"] != id || s["comparable"] == false));
            }
        }
        if limit < 5.0 {
            // Seventeen checks take three seconds at the very least: the limit holds for them, too.
            assert!(
                left_out.contains("The flush check: for lack of time"),
                "{left_out}"
            );
        }
    }
}

#[test]
fn the_clock_starts_after_the_build_which_hears_nothing_of_this_package() {
    use std::os::unix::fs::PermissionsExt;
    let setup = Setup::new();
    let cargo = setup.dir.path().join("cargo");
    let heard = setup.dir.path().join("heard");
    fs::write(
        &cargo,
        format!("#!/bin/sh\nenv > {}\nsleep 4\n", heard.display()),
    )
    .unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let start = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_compare"))
        .args([
            "--smoke",
            "--drivers",
            "overlayfs",
            "--workloads",
            "fio-fsync",
            "--rounds",
            "1",
        ])
        .arg("--dir")
        .arg(setup.place())
        .arg("--out")
        .arg(setup.out())
        .env_remove("VELLUM_BIN")
        .env("CARGO", &cargo)
        .env("CARGO_PKG_NAME", "compare")
        .env("CARGO_MANIFEST_DIR", "/nowhere")
        .env("CARGO_HOME", setup.dir.path())
        .output()
        .unwrap();
    let took = start.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let seconds = setup.report()["seconds"].as_f64().unwrap();
    assert!(seconds <= took - 4.0, "{seconds} of {took}");
    let heard = fs::read_to_string(heard).unwrap();
    assert!(!heard.contains("CARGO_PKG_NAME=") && !heard.contains("CARGO_MANIFEST_DIR="));
    assert!(heard.contains("CARGO_HOME="));
}

#[test]
fn a_driver_of_two_commands_is_checked_measured_and_held_against_a_baseline() {
    let setup = Setup::new();
    let mine = "mine=up:mkdir -p \"$DIR/u\" \"$DIR/w\" && mount -t overlay mine -o \
                \"lowerdir=$LAYERS,upperdir=$DIR/u,workdir=$DIR/w\" \"$MNT\",down:umount \"$MNT\"";
    let run = |more: &[&str]| {
        let mut command = setup.command("mine", "fio-fsync");
        command.args(["--driver", mine, "--rounds", "4"]).args(more);
        let output = command.output().unwrap();
        assert_eq!(setup.leftovers(), Vec::<String>::new());
        output
    };
    let output = run(&[]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut report = setup.report();
    let drivers = report["drivers"].as_array().unwrap();
    let driver = drivers
        .iter()
        .find(|driver| driver["id"] == "mine")
        .unwrap();
    assert_eq!(driver["brought"], true);
    assert_eq!(driver["flush"]["passed"], true, "{driver}");
    let samples = report["samples"].as_array_mut().unwrap();
    let count = samples
        .iter()
        .filter(|s| s["driver"] == "mine" && s["metric"] == "steady");
    assert_eq!(count.count(), 4);

    let (same, faster) = (
        setup.dir.path().join("a.json"),
        setup.dir.path().join("b.json"),
    );
    fs::copy(setup.out().join("report.json"), &same).unwrap();
    let diff = Command::new(env!("CARGO_BIN_EXE_compare"))
        .arg("diff")
        .args([&same, &same])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&diff.stdout);
    assert!(
        diff.status.success() && said.contains("0 faster, 0 slower"),
        "{said}"
    );

    // A baseline that was ten thousand times as fast, beside the same reference.
    for sample in report["samples"].as_array_mut().unwrap() {
        if sample["driver"] == "mine" {
            sample["value"] = (sample["value"].as_f64().unwrap() * 1e4).into();
        }
    }
    fs::write(&faster, report.to_string()).unwrap();
    let output = run(&["--baseline", faster.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(
        said.contains("slower than the baseline: mine fio-fsync."),
        "{said}"
    );
}

#[test]
fn a_driver_that_fails_loses_no_figure_of_the_others() {
    let setup = Setup::new();
    // A program that answers nothing.
    let output = setup
        .command("vellum,overlayfs", "fio-fsync")
        .args(["--vellum", "/bin/false"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    let report = setup.report();
    let failures = report["failures"].as_array().unwrap();
    assert!(!failures.is_empty());
    assert!(failures.iter().all(|failure| failure["driver"] == "vellum"));
    let samples = report["samples"].as_array().unwrap().iter();
    let overlay = samples.filter(|s| s["driver"] == "overlayfs" && s["metric"] == "steady");
    assert_eq!(overlay.count(), 2);
}

#[test]
fn databases_give_a_curve_and_a_picture_of_their_blocks() {
    let setup = Setup::new();
    need("mariadbd", "mariadb-server");
    need("sysbench", "sysbench");
    assert!(
        Path::new("/usr/lib/postgresql").exists(),
        "PostgreSQL is missing: apt-get install postgresql"
    );
    let output = setup
        .command("vellum", "pgbench,mariadb")
        .args(["--rounds", "1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(setup.leftovers(), Vec::<String>::new());
    let report = setup.report();
    for workload in ["pgbench", "mariadb"] {
        let curves = report["curves"].as_array().unwrap().iter();
        let mut of = curves.filter(|c| c["workload"] == workload && c["driver"] == "vellum");
        let values = of.next().unwrap()["values"].as_array().unwrap();
        assert!(!values.is_empty());
        let samples = report["samples"].as_array().unwrap().iter();
        let mut steady = samples.filter(|s| s["workload"] == workload && s["metric"] == "steady");
        assert!(steady.all(|s| s["value"].as_f64().unwrap() > 0.0));
    }
    let page = fs::read_to_string(setup.out().join("report.html")).unwrap();
    assert!(page.contains("Where the blocks lie"));
}

#[test]
fn an_interrupted_run_cleans_up_fails_and_keeps_what_it_measured() {
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
    // What was measured until then is kept, and said to be a part.
    let report = setup.report();
    assert_eq!(report["cut_short"], "interrupted");
    assert!(report["samples"].is_array());
    let page = fs::read_to_string(setup.out().join("report.html")).unwrap();
    assert!(page.contains("did not reach its end: interrupted"));
}
