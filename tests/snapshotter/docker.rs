//! Docker on the snapshotter: all that `tools/docker-e2e` checks.

use std::path::Path;
use std::process::Command;

use crate::snapshotter_support::Area;

#[test]
fn docker_loads_runs_commits_builds_pushes_pulls_and_removes_on_vellum() {
    let area = Area::new();
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/docker-e2e"))
        .env("VELLUM_BIN", env!("CARGO_BIN_EXE_vellum"))
        .env("TMPDIR", area.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = text.lines().filter(|line| line.starts_with("ok ")).count();
    assert!(
        output.status.success() && passed > 90,
        "{}, {passed} checks passed\n{text}\n{}\n(needs: apt-get install -y \
         --no-install-recommends mmdebstrap debian-archive-keyring)",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
