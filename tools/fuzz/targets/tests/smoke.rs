//! The fuzz targets as ordinary tests: every entry of their corpora, and some hundred changed ones.
//! A failure prints the input as hexadecimal digits, and where it came from.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use fuzz_targets::{TARGETS, Target, mutate::mutate};
use vellum_base::storage::SeededRng;

/// Changed inputs of each target.
const CHANGED: usize = 400;
/// More than any input takes on a busy machine, in a build without optimisation.
const PATIENCE: Duration = Duration::from_secs(20);

/// The entries of a target's corpus, by name.
fn corpus(target: &Target) -> BTreeMap<String, Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../corpus")
        .join(target.name);
    let entries = std::fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}: every target has a corpus", dir.display()));
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

fn check(target: &Target, input: &[u8], origin: &str) {
    let began = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| target.check(input)));
    let took = began.elapsed();
    if outcome.is_err() || took > PATIENCE {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!(
            "{}: {origin}, after {took:?}; the input (xxd -r -p makes a file of it): {hex}",
            target.name
        );
    }
}

fn smoke(name: &str) {
    let target = Target::named(name);
    let corpus = corpus(target);
    assert!(!corpus.is_empty());
    for (name, input) in &corpus {
        check(target, input, name);
    }
    let entries: Vec<_> = corpus.iter().collect();
    let mut rng = SeededRng::new(1);
    for round in 0..CHANGED {
        let (name, input) = entries[round % entries.len()];
        let (_, other) = entries[rng.below(entries.len() as u64) as usize];
        let mut input = input.clone();
        mutate(&mut rng, &mut input, other, target.max_len);
        check(target, &input, &format!("{name}, changed, round {round}"));
    }
}

macro_rules! smoke {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                smoke(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_a_smoke_test_and_a_binary() {
            let tested = [$(stringify!($name)),*];
            let binaries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz_targets");
            for target in TARGETS {
                assert!(tested.contains(&target.name), "{}", target.name);
                let binary = binaries.join(format!("{}.rs", target.name));
                assert!(binary.exists(), "{}", binary.display());
            }
        }
    };
}

smoke!(
    layer_header,
    layer_map,
    layer_seal,
    layer_journal,
    layer_live,
    layer_have,
    layer_open,
    store_records,
    nbd_session,
    vhost_queue,
    image_tar,
    image_archive,
    image_qcow2,
    filter,
    config,
    superblock,
    ext4,
    control,
    authority,
    backup,
    registry_table,
    registry_hot,
);

#[test]
fn the_corpora_hold_what_the_targets_begin_with() {
    for target in TARGETS {
        let corpus = corpus(target);
        for (name, bytes) in target.seeds() {
            assert!(
                corpus.get(&name) == Some(&bytes),
                "{}/{name} is out of date: cargo run -p fuzz-targets --example corpus",
                target.name
            );
        }
    }
}
