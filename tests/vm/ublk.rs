//! Containers on ublk devices, which the kernel of most build machines lacks: `tools/vmtest --ublk`.

use crate::power::vmtest;

#[test]
fn containers_on_ublk_devices_outlive_killed_servers_and_leave_nothing_behind() {
    let said = vmtest(&[
        "--ublk",
        "--kernel",
        "trixie",
        "--kills",
        "20",
        "--attaches",
        "10",
    ]);
    for wanted in [
        "ublk: mounted, fsx, trimmed, unmounted, mounted again",
        "ublk: 20 kills under load",
        "ublk: snapshot, commit and upgrade while it works",
        "transactions under 3 kills, all kept",
        "ublk: a container ran",
        "ublk: attached and detached 10 times",
        "ublk: a server dies with all requests that a device can have",
        "ublk: unmounted after its device was deleted",
        "ublk: namespaces that end and copies of the store do no harm",
        "ublk: done",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is missing: {said}");
    }
}
