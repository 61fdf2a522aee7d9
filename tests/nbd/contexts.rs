//! What backup programs ask of blocks over NBD, with real clients.

use serde_json::Value;

use crate::common::{TestStore, run};
use crate::nbd_server::Server;

const MIB: u64 = 1 << 20;

fn uri(server: &Server, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", server.socket.display())
}

fn write(server: &Server, commands: &[&str]) {
    let uri = uri(server, "c");
    let mut arguments = vec!["-f", "raw", &uri];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    run("qemu-io", &arguments);
}

/// (first byte, bytes, number) of all that is not 0 in a context, as nbdinfo reads it.
fn mapped(server: &Server, export: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let map = format!("--map={context}");
    let text = run("nbdinfo", &["--json", &map, &uri(server, export)]);
    let all: Vec<Value> = serde_json::from_str(&text).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let whole = |extent: &Value| {
        (
            number(extent, "offset"),
            number(extent, "length"),
            number(extent, "type"),
        )
    };
    // Answers may end anywhere.
    let mut joined: Vec<(u64, u64, u64)> = Vec::new();
    for (offset, len, number) in all.iter().map(whole) {
        match joined.last_mut() {
            Some(last) if last.2 == number && last.0 + last.1 == offset => last.1 += len,
            _ => joined.push((offset, len, number)),
        }
    }
    joined.retain(|(_, _, number)| *number != 0);
    joined
}

/// An empty disk of 64 MiB and a container of it.
fn store_with_disk() -> TestStore {
    let store = TestStore::new();
    let disk = store.arg("disk.raw");
    run("truncate", &["-s", "64M", &disk]);
    store.ok(&["import", "disk", &disk, "--format", "raw"]);
    store.ok(&["create", "disk", "--name", "c"]);
    store
}

/// A container with the snapshots `monday` and `tuesday`, which goes on and is served with both of them.
fn served_week() -> (TestStore, Server) {
    let store = store_with_disk();
    let server = Server::start(&store, &["c"]);
    write(&server, &["write -P 1 0 2M", "write -P 1 8M 64k", "flush"]);
    server.kill();
    store.ok(&["snapshot", "c", "monday"]);
    let server = Server::start(&store, &["c"]);
    assert_eq!(mapped(&server, "c", "qemu:dirty-bitmap:monday"), []);
    write(
        &server,
        &[
            "write -P 2 1M 4k",
            "discard 8M 64k",
            "write -z -u 32M 1M",
            "flush",
        ],
    );
    server.kill();
    store.ok(&["snapshot", "c", "tuesday"]);

    let server = Server::start(&store, &["c", "c@monday", "c@tuesday"]);
    write(&server, &["write -P 3 1028k 4k", "flush"]);
    (store, server)
}

#[test]
fn what_changed_since_a_snapshot_is_told_to_real_clients_as_the_command_tells_it() {
    let (store, server) = served_week();
    let monday = [(MIB, 8192, 1), (8 * MIB, 65536, 1)];
    assert_eq!(mapped(&server, "c", "qemu:dirty-bitmap:monday"), monday);
    let tuesday = [(MIB + 4096, 4096, 1)];
    assert_eq!(mapped(&server, "c", "qemu:dirty-bitmap:tuesday"), tuesday);
    let between = [(MIB, 4096, 1), (8 * MIB, 65536, 1)];
    assert_eq!(
        mapped(&server, "c@tuesday", "qemu:dirty-bitmap:monday"),
        between
    );
    assert_eq!(mapped(&server, "c@monday", "qemu:dirty-bitmap:monday"), []);

    // As QEMU's own backup jobs read it: what is dirty is no data.
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=c,x-dirty-bitmap=qemu:dirty-bitmap:monday",
        server.socket.display()
    );
    let map = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &image],
    );
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let dirty: Vec<u64> = map
        .iter()
        .filter(|extent| extent["data"] == false)
        .map(|extent| extent["start"].as_u64().unwrap())
        .collect();
    assert_eq!(dirty, [MIB, 8 * MIB]);
    server.kill();

    // The same from the command line.
    let changed = store.json(&["changed", "c", "--since", "monday"]);
    let ranges: Vec<(u64, u64, u64)> = changed["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| {
            (
                range["offset"].as_u64().unwrap(),
                range["length"].as_u64().unwrap(),
                1,
            )
        })
        .collect();
    assert_eq!(ranges, monday);
    store.assert_nothing_runs();
}

#[test]
fn in_which_layer_a_block_lies_is_told_to_real_clients() {
    let (store, server) = served_week();
    let depths = mapped(&server, "c", "qemu:allocation-depth");
    let of = |at: u64| {
        let found = depths
            .iter()
            .find(|(offset, len, _)| (*offset..offset + len).contains(&at));
        found.map_or(0, |(_, _, depth)| *depth)
    };
    // The image is below: disk, monday, tuesday, and the top.
    assert_eq!([0, MIB, MIB + 4096, 20 * MIB].map(of), [3, 2, 1, 0]);
    assert_eq!(
        mapped(&server, "c@monday", "qemu:allocation-depth")[0],
        (0, 2 * MIB, 1)
    );

    let told = run("nbdinfo", &[&uri(&server, "c")]);
    for context in [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:tuesday",
    ] {
        assert!(told.contains(context), "{told}");
    }
    server.kill();
    store.assert_nothing_runs();
}

#[test]
fn layers_that_were_joined_since_the_server_was_started_hide_no_changed_block() {
    let store = store_with_disk();
    let fill = |byte: &str, at: &str| {
        let server = Server::start(&store, &["c"]);
        write(&server, &[&format!("write -P {byte} {at} 4k"), "flush"]);
        server.kill();
    };
    for (byte, at, name) in [("1", "1M", "a"), ("2", "2M", "b"), ("3", "2M", "other")] {
        fill(byte, at);
        store.ok(&["snapshot", "c", name]);
    }
    store.ok(&["rollback", "c", "b", "--discard"]);
    let server = Server::start(&store, &["c"]);
    store.ok(&["rm", "c@a"]);
    store.ok(&["merge", "c"]);
    // The blocks of `other` lie in as many layers as those of the server, of which one is another.
    let dirty = mapped(&server, "c", "qemu:dirty-bitmap:other");
    let covers = |at: u64| {
        dirty
            .iter()
            .any(|(offset, len, _)| (*offset..offset + len).contains(&at))
    };
    assert!(covers(2 * MIB), "{dirty:?}");
    assert!(!covers(3 * MIB), "{dirty:?}");
    // Nothing of it stays open.
    store.ok(&["rm", "c@other"]);
    server.kill();
    store.ok(&["check", "--scrub"]);
}

#[test]
fn of_a_growth_that_was_cut_off_all_that_is_there_is_told_and_exported() {
    let store = TestStore::new();
    let disk = store.arg("disk.raw");
    run("truncate", &["-s", "16777728", &disk]);
    store.ok(&["import", "disk", &disk, "--format", "raw"]);
    store.ok(&["create", "disk", "--name", "c"]);
    store.ok(&["snapshot", "c", "a"]);
    let mut resize = store.command();
    resize
        .args(["resize", "c", "32M"])
        .env("VELLUM_CRASH_AT", "resize: layer grown");
    assert_eq!(resize.status().unwrap().code(), None, "it is killed there");
    let server = Server::start(&store, &["c"]);
    write(&server, &["write -P 1 20M 4k", "flush"]);
    server.kill();
    let changed = store.json(&["changed", "c", "--since", "a"]);
    assert_eq!(changed["virtual_size"], 32 * MIB);
    assert_eq!(changed["ranges"][0]["offset"], 20 * MIB);
    let out = store.arg("out.raw");
    store.ok(&["export", "c", &out, "--format", "raw"]);
    let exported = std::fs::read(&out).unwrap();
    assert_eq!(exported.len() as u64, 32 * MIB);
    assert_eq!(exported[20 << 20], 1);
}
