//! Rivals of another release, and of a kernel that this host may lack (docs/comparing.md).

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::Setup;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn driver(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("drivers")
        .join(name)
}

/// The first release with containerd 2.1: Debian 13 has 1.7, its backports none that is newer.
const RELEASE: &str = "forky";
const PACKAGES: &str = "qemu-utils containerd erofs-utils";

/// A root of a newer release with QEMU and containerd, made once for each list of packages and kept beside the
/// build.
fn newer_root() -> PathBuf {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let root = temporary.join(format!("rivals-{RELEASE}"));
    let recipe = root.with_extension("recipe");
    let kept = std::fs::read_to_string(&recipe).unwrap_or_default();
    if !root.exists() || kept != PACKAGES {
        let script = format!(
            ". tools/packages; . tools/debian-root; need_packages mmdebstrap debian-archive-keyring; \
             make_debian_root \"$1\" {RELEASE} 1 {PACKAGES}"
        );
        let made = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &script, "rivals"])
            .arg(&root)
            .current_dir(repository())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{said}");
        // Last: a root with a recipe is whole.
        std::fs::write(&recipe, PACKAGES).unwrap();
    }
    root
}

/// Each of them has passed the flush check, and has figures of the workload.
fn measured(report: &Value, workload: &str, drivers: &[&str]) {
    let samples = report["samples"].as_array().unwrap();
    let all = report["drivers"].as_array().unwrap();
    for id in drivers {
        let driver = all.iter().find(|driver| driver["id"] == *id).unwrap();
        assert_eq!(driver["flush"]["passed"], true, "{driver}");
        assert!(
            samples
                .iter()
                .any(|s| s["driver"] == *id && s["workload"] == workload),
            "no figure of {id}"
        );
    }
    assert_eq!(report["failures"], Value::Array(Vec::new()));
}

#[test]
fn a_newer_qemu_and_containerds_snapshotters_are_checked_and_measured() {
    let root = newer_root();
    let setup = Setup::new();
    let mut command = setup.command("raw", "fio-fsync,nbd");
    // Which version it is stands in the names.
    let list = Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(["--list", "--qemu"])
        .arg(&root)
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let mut ids = list.split_whitespace();
    let mounted = ids.find(|id| id.starts_with("qcow2-qemu")).unwrap();
    let major = mounted.trim_start_matches("qcow2-qemu");
    let served = format!("qemu{major}-qcow2");
    let output = command
        .args(["--rounds", "1", "--drivers"])
        .arg(format!("{mounted},{served}"))
        .arg("--qemu")
        .arg(&root)
        .arg("--driver")
        .arg(driver("containerd-erofs"))
        .arg("--driver")
        .arg(driver("containerd-blockfile"))
        .env("CONTAINERD_ROOT", &root)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(setup.leftovers(), Vec::<String>::new());

    let report = setup.report();
    let files = ["containerd-erofs", "containerd-blockfile", mounted];
    measured(&report, "fio-fsync", &files);
    measured(&report, "nbd", &[&served]);
    for driver in report["drivers"].as_array().unwrap() {
        let (id, shown) = (driver["id"].as_str().unwrap(), &driver["version"]);
        if id == mounted || id == served {
            let shown = shown.as_str().unwrap();
            assert!(
                shown.starts_with("qemu-") && shown.contains(&format!(" {major}.")),
                "{shown}"
            );
        } else if id.starts_with("containerd-") {
            assert!(
                shown.as_str().unwrap().starts_with("containerd 2."),
                "{shown}"
            );
        }
    }
}

#[test]
fn thin_volumes_are_checked_and_measured_in_a_machine_whose_report_says_that_it_is_emulated() {
    let compare = Path::new(env!("CARGO_BIN_EXE_compare"));
    let out = tempfile::tempdir().unwrap();
    let output = Command::new(repository().join("tools/vmtest"))
        .args([
            "--kernel",
            "trixie",
            "--smoke",
            "--rounds",
            "1",
            "--compare",
        ])
        .arg(compare)
        .arg("--vellum")
        .arg(compare.with_file_name("vellum"))
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    let report = std::fs::read(out.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let drivers = ["raw", "dm-thin"];
    measured(&report, "fio-fsync", &drivers);
    assert_eq!(report["host"]["emulated"], true);
    let page = std::fs::read_to_string(out.path().join("report.html")).unwrap();
    assert!(page.contains("processors are emulated"));
}
