//! What is done to containers while commands run in them: they grow.

use std::path::Path;

use crate::run_support::{RUNTIMES, Store};
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;

fn store() -> Store {
    Store::new(RUNTIMES[0], |_| {})
}

fn size_of(store: &Store) -> u64 {
    let text = store.must(&["inspect", "c", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&text).unwrap();
    shown[0]["container"]["virtual_size"].as_u64().unwrap()
}

fn capacity(dir: &str) -> u64 {
    let stat = nix::sys::statvfs::statvfs(Path::new(dir)).unwrap();
    stat.blocks() * stat.fragment_size()
}

#[test]
fn a_container_grows_while_its_command_runs_or_nothing_changes_where_this_host_cannot() {
    let store = store();
    let running = store.start("c", &["--size", "11G"]);
    let before = size_of(&store);
    let status = store.status("c");
    if vellum_fs::ext4::may_grow_mounted().unwrap() {
        store.must(&["resize", "c", "12G"]);
        assert_eq!(size_of(&store), 12 << 30);
    } else {
        let said = store.vellum(&["resize", "c", "12G"]);
        assert_eq!(said.status, 1);
        assert!(said.err.contains("CAP_SYS_RESOURCE"), "{said:?}");
        assert!(said.err.contains("end what runs in c"), "{said:?}");
        assert_eq!(size_of(&store), before);
    }
    // Its command, and others, go on.
    assert_eq!(store.status("c"), status);
    store.must(&["exec", "c", "--", "touch", "/tmp/after"]);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait(), Some(42));
    store.must(&["resize", "c", "12G"]);
    let dir = store.must(&["mount", "c"]);
    assert!(capacity(dir.trim()) > 11 * 1024 * MIB);
    assert!(Path::new(dir.trim()).join("tmp/after").exists());
    store.must(&["umount", "c"]);
    store.assert_nothing_runs();
}
