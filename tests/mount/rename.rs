//! A mounted container gets another name, and its servers go on.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use vellum_export::device::{self, AttachSpec};

use crate::common::{TestStore, VELLUM, kill};
use crate::server_support::{Container, wait_long};

#[test]
fn servers_of_a_renamed_container_are_replaced_upgraded_and_sealed_as_before() {
    let store = TestStore::new();
    let old = Container::mounted(&store, "old");
    let file = old.data().join("file");
    fs::write(&file, "before\n").unwrap();
    // Another one has the name that its servers were started with.
    store.ok(&["rename", "old", "new"]);
    store.ok(&["create", "data", "--name", "old"]);
    let new = Container::at(&store, "new", old.mounted.clone());
    assert_eq!(new.run_dir, old.run_dir);

    new.kill_worker();
    assert_eq!(fs::read_to_string(&file).unwrap(), "before\n");
    fs::write(&file, "after\n").unwrap();
    // The next supervisor, and the next worker of that one.
    let state = new.settled();
    kill(state.supervisor.pid);
    wait_long("another supervises it", || {
        new.settled().supervisor.pid != state.supervisor.pid
    });
    new.kill_worker();
    store.ok(&["upgrade-servers", "new"]);
    store.ok(&["commit", "new", "image"]);
    new.kill_worker();
    assert_eq!(fs::read_to_string(&file).unwrap(), "after\n");
    assert_eq!(store.json(&["stats", "new"])[0]["server"], "device");

    new.kill_everything();
    store.ok(&["umount", "new"]);
    store.mount("new");
    assert_eq!(fs::read_to_string(&file).unwrap(), "after\n");
    store.ok(&["umount", "new"]);
    store.ok(&["check", "--scrub"]);
    assert_eq!(store.ok(&["diff", "old"]), "");
    store.ok(&["rm", "old", "new"]);
    store.assert_nothing_runs();
}

/// Attaches a container as earlier versions did, which told servers its name and not its id.
fn attach_by_name(container: &Container, store: &TestStore, program: &Path) -> device::Attached {
    let mut arguments: Vec<OsString> = vec!["--root".into(), (&store.root).into()];
    arguments.extend(["device-server", "--container", container.name].map(OsString::from));
    let spec = AttachSpec {
        program: program.to_owned(),
        ..AttachSpec::new(arguments)
    };
    device::attach(&container.run_dir, &spec).unwrap()
}

#[test]
fn servers_that_were_told_no_id_find_a_renamed_container_by_their_run_directory() {
    let store = TestStore::new();
    let old = Container::mounted(&store, "old");
    store.ok(&["umount", "old"]);
    let attached = attach_by_name(&old, &store, Path::new(VELLUM));
    store.ok(&["rename", "old", "new"]);
    store.ok(&["create", "data", "--name", "old"]);
    old.kill_worker();
    old.call("flush");
    drop(attached);
    store.ok(&["umount", "new"]);
    store.ok(&["rm", "old", "new"]);
    store.assert_nothing_runs();
}

#[test]
fn servers_of_another_program_that_were_told_no_id_are_to_be_upgraded_before_a_rename() {
    let store = TestStore::new();
    let old = Container::mounted(&store, "old");
    store.ok(&["umount", "old"]);
    let program = store.path("vellum");
    fs::copy(VELLUM, &program).unwrap();
    let attached = attach_by_name(&old, &store, &program);
    old.settled();
    let error = store.fails(&["rename", "old", "new"]);
    assert!(error.contains("vellum upgrade-servers old"), "{error}");
    store.ok(&["upgrade-servers", "old"]);
    store.ok(&["rename", "old", "new"]);
    old.kill_worker();
    old.call("flush");
    drop(attached);
    store.ok(&["umount", "new"]);
    store.ok(&["rm", "new"]);
    store.assert_nothing_runs();
}
