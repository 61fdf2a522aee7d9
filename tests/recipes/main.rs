//! Every block of commands of the pages is run: README, CONTRIBUTING and docs/. What a page shows as
//! output is what the commands print, but for times, sizes and ids.
//!
//! A comment right before a block says how it is run, if not alone in a fresh place:
//!
//! * `<!-- recipe: not run: REASON -->`
//! * `<!-- recipe: goes on -->`: in the shell and the place of the block before
//! * `<!-- recipe: network -->`: with the host's network, and not a loopback alone
//! * `<!-- recipe: first: COMMANDS -->`, `<!-- recipe: then: COMMANDS -->`: before and after it, unseen
//!
//! `<!-- recipes: not run: REASON -->` is about all blocks of a page. Blocks in a fence of another language
//! than `sh` or `console` are no commands.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

#[path = "../support/common/mod.rs"]
mod common;

mod blocks;
mod output;
mod stage;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use blocks::{Block, Doing};

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(page: &str) -> String {
    let path = top().join(page);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Runs what a page has, and with `RECIPES_WRITE` set writes into the page what its commands printed.
fn run(page: &str) {
    let text = read(page);
    let found = blocks::of(&text).unwrap_or_else(|error| panic!("{page}: {error}"));
    let mut wrong = Vec::new();
    let mut printed = Vec::new();
    for scene in scenes(&found) {
        match stage::play(scene) {
            Ok(outputs) => printed.extend(outputs),
            Err(trouble) => wrong.push(format!("{page}:{}: {trouble}", scene[0].line)),
        }
    }
    if std::env::var_os("RECIPES_WRITE").is_some() && wrong.is_empty() {
        fs::write(top().join(page), output::rewritten(&text, &printed)).unwrap();
        return;
    }
    for (block, printed) in &printed {
        wrong.extend(
            output::differences(block, printed)
                .map(|what| format!("{page}:{}: {what}", block.line)),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// Blocks that are run one after the other in one place.
fn scenes(blocks: &[Block]) -> Vec<&[Block]> {
    let mut scenes = Vec::new();
    let mut from = 0;
    for (at, block) in blocks.iter().enumerate() {
        if block.doing != Doing::GoesOn && at > from {
            scenes.push(&blocks[from..at]);
            from = at;
        }
    }
    scenes.push(&blocks[from..]);
    scenes.retain(|scene| {
        scene
            .first()
            .is_some_and(|block| block.doing != Doing::NotRun)
    });
    scenes
}

/// A test for each page.
macro_rules! pages {
    ($($name:ident: $page:literal,)*) => {
        const PAGES: &[&str] = &[$($page),*];
        $(
            #[test]
            fn $name() {
                run($page);
            }
        )*
    };
}

pages! {
    readme: "README.md",
    contributing: "CONTRIBUTING.md",
    book: "docs/README.md",
    summary: "docs/SUMMARY.md",
    learn_layers: "docs/learn/layers.md",
    learn_copy_on_write: "docs/learn/copy-on-write.md",
    learn_deleting: "docs/learn/deleting.md",
    learn_sharing: "docs/learn/sharing.md",
    learn_volumes: "docs/learn/volumes.md",
    learn_sizes: "docs/learn/sizes.md",
    learn_docker: "docs/learn/docker.md",
    backup: "docs/backup.md",
    cluster: "docs/cluster.md",
    comparing: "docs/comparing.md",
    containerd: "docs/containerd.md",
    design: "docs/design.md",
    durability: "docs/durability.md",
    encryption: "docs/encryption.md",
    format: "docs/format.md",
    images: "docs/images.md",
    lazy: "docs/lazy.md",
    local_device: "docs/local-device.md",
    object_stores: "docs/object-stores.md",
    operations: "docs/operations.md",
    packages: "docs/packages.md",
    performance: "docs/performance.md",
    registry: "docs/registry.md",
    snapshots: "docs/snapshots.md",
    vhost: "docs/vhost.md",
}

/// Whoever reads them does not begin anew with each.
#[test]
fn the_chapters_for_newcomers_can_be_followed_one_after_the_other() {
    let chapters = [
        "layers",
        "copy-on-write",
        "deleting",
        "sharing",
        "volumes",
        "sizes",
    ];
    let mut all = Vec::new();
    for chapter in chapters {
        all.extend(blocks::of(&read(&format!("docs/learn/{chapter}.md"))).unwrap());
    }
    for block in &mut all {
        block.first.clear();
    }
    if let Err(trouble) = stage::play(&all) {
        panic!("{trouble}");
    }
}

/// The pages below a directory, from the top of the checkout.
fn pages_below(dir: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            pages_below(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "md") {
            into.insert(path.strip_prefix(top()).unwrap().to_owned());
        }
    }
}

#[test]
fn each_page_has_a_test() {
    let mut there = BTreeSet::new();
    pages_below(&top().join("docs"), &mut there);
    there.insert("README.md".into());
    there.insert("CONTRIBUTING.md".into());
    let tested: BTreeSet<PathBuf> = PAGES.iter().map(PathBuf::from).collect();
    assert_eq!(
        there, tested,
        "tests/recipes/main.rs lists the pages whose commands are run"
    );
}
