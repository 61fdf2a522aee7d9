//! docs/design.md lists what each crate may know. The compiler keeps what the manifests say; this
//! keeps the manifests to what the page says.

use std::collections::{BTreeMap, BTreeSet};

use toml::Table;

use crate::tree;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Lines such as `vellum-store → vellum-base, vellum-core`.
fn on_the_page() -> Arrows {
    let page = tree::read("docs/design.md");
    let lines = page.lines().filter(|line| line.starts_with("vellum"));
    lines
        .filter_map(|line| line.trim().split_once('→'))
        .map(|(from, to)| {
            let to = to.split(',').map(str::trim).filter(|name| *name != "–");
            (from.trim().to_owned(), to.map(str::to_owned).collect())
        })
        .collect()
}

fn in_the_manifests() -> Arrows {
    let mut manifests = tree::files("crates", "Cargo.toml");
    manifests.push("Cargo.toml".into());
    manifests
        .into_iter()
        .map(|path| {
            let manifest: Table = tree::read(&path).parse().unwrap();
            let name = manifest["package"]["name"].as_str().unwrap().to_owned();
            let known = manifest["dependencies"].as_table().unwrap().keys();
            let known = known.filter(|name| name.starts_with("vellum-"));
            (name, known.cloned().collect())
        })
        .collect()
}

#[test]
fn the_arrows_between_crates_are_those_of_the_design_page() {
    let page = on_the_page();
    let manifests = in_the_manifests();
    for (name, known) in &manifests {
        assert_eq!(page.get(name), Some(known), "docs/design.md on {name}");
    }
    assert_eq!(page.len(), manifests.len(), "crates that are no more");
}

/// A program that wants layers builds neither servers nor registries nor a command line.
#[test]
fn the_core_needs_few_crates_from_outside() {
    let few = BTreeSet::from([
        "crc32fast",
        "hdrhistogram",
        "libc",
        "memmap2",
        "nix",
        "parking_lot",
        "serde",
        "sha2",
        "tracing",
        "uuid",
        "vellum-base",
    ]);
    let manifest: Table = tree::read("crates/vellum-core/Cargo.toml").parse().unwrap();
    for name in manifest["dependencies"].as_table().unwrap().keys() {
        assert!(
            few.contains(name.as_str()),
            "vellum-core needs {name}: is it worth it?"
        );
    }
}
