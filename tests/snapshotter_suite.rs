//! containerd's own conformance suite for snapshotters, against ours.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod snapshotter_support;

use std::path::{Path, PathBuf};
use std::process::Command;

use snapshotter_support::{Area, PACKAGES};

/// The script that builds the suite from Debian's packages and runs it.
fn script() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/containerd-suite/run");
    let script = std::env::var_os("VELLUM_SUITE").map_or(beside, PathBuf::from);
    assert!(
        script.is_file(),
        "{}: the script that runs containerd's conformance suite is not there: name it in \
         VELLUM_SUITE. It also needs: {PACKAGES}",
        script.display()
    );
    script
}

#[test]
fn containerds_conformance_suite_passes_wholly() {
    let area = Area::new();
    let command = format!(
        "{} --root {{root}} snapshotter --address {{socket}}",
        env!("CARGO_BIN_EXE_vellum")
    );
    let output = Command::new(script())
        .arg(command)
        .env("TMPDIR", area.path())
        // The suite is compiled once.
        .env(
            "VELLUM_SUITE_DIR",
            Path::new(env!("CARGO_TARGET_TMPDIR")).join("containerd-suite"),
        )
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = text.matches("--- PASS: TestSuite/").count();
    // Rename is skipped by the suite itself.
    assert!(
        output.status.success() && passed >= 20,
        "{passed} passed\n{text}\n{}\n(needs: {PACKAGES})",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(area.mounts(), Vec::<PathBuf>::new(), "mounts are left");
}
