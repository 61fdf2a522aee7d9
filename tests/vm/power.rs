//! Power cuts, and the kernel's NBD client, in a virtual machine: short runs of `tools/vmtest`.
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs `tools/vmtest` with this build's program; what it printed, if it succeeded.
pub fn vmtest(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/vmtest");
    let output = Command::new(script)
        .args(["--vellum", env!("CARGO_BIN_EXE_vellum")])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("tools/vmtest: apt-get install python3");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}{errors}", output.status);
    said
}

#[test]
fn after_power_cuts_nothing_acknowledged_is_missing_and_a_disk_that_lies_is_found_out() {
    let said = vmtest(&["--cuts", "2", "--work", "3", "--no-nbd"]);
    assert!(said.contains("2 power cuts, "), "{said}");
    assert!(said.contains("none missing"), "{said}");
    assert!(said.contains("is found out: "), "{said}");
}

#[test]
fn the_kernels_nbd_client_mounts_reconnects_and_outlives_killed_servers_and_a_store_that_was_shut_down()
 {
    let said = vmtest(&["--cuts", "0", "--no-control", "--kills", "1"]);
    assert!(said.contains("reconnected over TCP"), "{said}");
    assert!(said.contains("killed 1 times under load"), "{said}");
    assert!(
        said.contains("shut down and mounted again, "),
        "the store's file system: {said}"
    );
    assert!(said.contains("nbd: done"), "{said}");
}
