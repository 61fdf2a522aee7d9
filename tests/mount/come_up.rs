//! What has been done when a device comes up.

use std::fs;
use std::path::{Path, PathBuf};

use vellum_engine::device::{Target, attach_spec};
use vellum_export::device::{self, AttachSpec, DetachOptions};
use vellum_store::Store;

use crate::common::{TestStore, VELLUM};
use crate::server_support::{Container, wait_long};

/// The files of that name in the layers of a store.
fn in_layers(store: &TestStore, name: &str) -> Vec<PathBuf> {
    let layers = fs::read_dir(store.root.join("layers")).unwrap();
    let files = layers.map(|layer| layer.unwrap().path().join(name));
    files.filter(|file| file.exists()).collect()
}

#[test]
fn a_containers_journal_is_made_before_the_first_flush_wants_it_and_goes_with_the_server() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    store.ok(&["umount", "c"]);
    assert_eq!(in_layers(&store, "journal.0"), Vec::<&Path>::new());

    let opened = Store::open(&store.root).unwrap();
    let spec = AttachSpec {
        program: VELLUM.into(),
        ..attach_spec(&opened, &Target::of(&opened.container("c").unwrap()))
    };
    let attached = device::attach(&container.run_dir, &spec).unwrap();
    // Nobody writes to the device, and nobody flushes it.
    wait_long("the journal is there", || {
        in_layers(&store, "journal.0").len() == 1
    });
    drop(attached);
    device::detach(&container.run_dir, &DetachOptions::default()).unwrap();
    assert_eq!(in_layers(&store, "journal.0"), Vec::<&Path>::new());

    store.mount("c");
    store.ok(&["umount", "c"]);
    store.ok(&["rm", "c"]);
    store.assert_nothing_runs();
}
