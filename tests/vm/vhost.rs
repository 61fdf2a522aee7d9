//! Debian in a virtual machine whose disk is a container: `tools/vmtest --vhost`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::power::vmtest;

/// A Debian root, made once and kept beside the build.
fn debian_tar() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-bookworm.tar");
    if !path.exists() {
        let unfinished = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let made = Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--format=tar", "bookworm"])
            .arg(unfinished.path())
            .status()
            .expect("mmdebstrap: apt-get install mmdebstrap");
        assert!(made.success(), "mmdebstrap: {made}");
        unfinished.persist(&path).unwrap();
    }
    path
}

#[test]
fn debian_on_a_container_outlives_killed_servers_grows_and_is_forked_while_it_works() {
    let tar = debian_tar().display().to_string();
    let said = vmtest(&["--vhost", &tar, "--kills", "10"]);
    assert!(said.contains("died at 5 places"), "{said}");
    assert!(said.contains("killed 10 times under load"), "{said}");
    assert!(said.contains("grown, "), "{said}");
    assert!(said.contains("the fork boots, "), "{said}");
    assert!(said.contains("vhost: done"), "{said}");
}
