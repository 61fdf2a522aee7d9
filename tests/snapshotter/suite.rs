//! containerd's own conformance suite for snapshotters, against ours.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::snapshotter_support::{Area, PACKAGES};

#[test]
fn containerds_conformance_suite_passes_wholly() {
    let area = Area::new();
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/containerd-suite");
    let output = Command::new(tool)
        .env("VELLUM_BIN", env!("CARGO_BIN_EXE_vellum"))
        .env("TMPDIR", area.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = text.matches("--- PASS: TestVellum/").count();
    // Rename is skipped by the suite itself.
    assert!(
        output.status.success() && passed >= 20,
        "{}, {passed} passed\n{text}\n{}\n(needs: {PACKAGES})",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(area.mounts(), Vec::<PathBuf>::new(), "mounts are left");
}
