//! Power cuts: random workloads on a simulated disk, the power cut in every sync and between, and
//! whatever is left checked against a model. docs/durability.md says what is promised. In every second
//! one only the file system goes, and is mounted again in the same boot.
//!
//! `VELLUM_LONG=1` makes it 120,000 cuts, `VELLUM_CUTS=n` any number; `VELLUM_SEED=n` runs one
//! workload, as a failure prints it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::crash::workload::{self, Op};
use crate::crash::{Cuts, Effort, Run};
use vellum_core::layer::LayerOptions;

const OPS: usize = 120;

const EFFORT: Effort = Effort {
    at_sync: 3,
    between: 1,
    one_in: 3,
};

fn env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is not a number")),
    )
}

/// Cuts that each test checks.
fn wanted() -> u64 {
    let all = env("VELLUM_CUTS").unwrap_or(match env("VELLUM_LONG") {
        Some(1..) => 120_000,
        _ => 6_600,
    });
    all.div_ceil(6)
}

fn attempt(ops: &[Op], options: LayerOptions, seed: u64, cuts: &Arc<Cuts>) -> Result<(), String> {
    Run::new(options, seed, EFFORT, cuts).run(ops)
}

/// Runs workloads until enough cuts were checked.
fn prove(test: &str, options: LayerOptions) {
    let cuts: Arc<Cuts> = Arc::default();
    let only = env("VELLUM_SEED");
    let mut seed = only.unwrap_or(1);
    loop {
        let ops = workload::generate(seed, OPS);
        if let Err(why) = attempt(&ops, options, seed, &cuts) {
            let start = std::time::Instant::now();
            let few = workload::shrink(&ops, |fewer| {
                // Where the cuts fall changes with the operations, so each is tried twice.
                start.elapsed().as_secs() < 60
                    && (seed..seed + 2).any(|seed| attempt(fewer, options, seed, &cuts).is_err())
            });
            let again = (seed..seed + 2)
                .find_map(|seed| attempt(&few, options, seed, &cuts).err())
                .unwrap_or_default();
            panic!(
                "seed {seed}: {why}\nthe fewest operations that fail: {few:#?}\n{again}\n\
                 to see it again: VELLUM_SEED={seed} cargo nextest run -p vellum-core crash_layer::{test}"
            );
        }
        if only.is_some() || cuts.all.load(Ordering::Relaxed) >= wanted() {
            break;
        }
        seed += 1;
    }
    println!(
        "{test}: {} cuts in {seed} workloads, {} of them of a file system that was mounted again",
        cuts.all.load(Ordering::Relaxed),
        cuts.remounts.load(Ordering::Relaxed)
    );
}

fn options(journal_blocks: usize, journal_start: u64, journal_max: u64) -> LayerOptions {
    LayerOptions {
        journal_blocks,
        journal_start,
        journal_max,
        // Some segments, then a table again.
        map_log: 12 << 10,
        preallocate: 1 << 20,
        background: false,
    }
}

#[test]
fn power_cuts_lose_nothing_flushed_without_blocks_in_the_journal() {
    prove(
        "power_cuts_lose_nothing_flushed_without_blocks_in_the_journal",
        options(0, 8 << 10, 16 << 10),
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_with_a_tiny_journal() {
    prove(
        "power_cuts_lose_nothing_flushed_with_a_tiny_journal",
        options(4, 16 << 10, 64 << 10),
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_with_the_default_journal() {
    prove(
        "power_cuts_lose_nothing_flushed_with_the_default_journal",
        LayerOptions {
            background: false,
            ..LayerOptions::default()
        },
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_with_many_scattered_blocks_in_the_journal() {
    prove(
        "power_cuts_lose_nothing_flushed_with_many_scattered_blocks_in_the_journal",
        LayerOptions {
            background: true,
            ..options(2, 16 << 10, 1 << 20)
        },
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_while_areas_are_freed_in_the_background() {
    prove(
        "power_cuts_lose_nothing_flushed_while_areas_are_freed_in_the_background",
        LayerOptions {
            background: true,
            ..options(4, 16 << 10, 32 << 10)
        },
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_while_tiny_areas_are_freed_in_the_background() {
    prove(
        "power_cuts_lose_nothing_flushed_while_tiny_areas_are_freed_in_the_background",
        LayerOptions {
            background: true,
            ..options(0, 4 << 10, 8 << 10)
        },
    );
}

#[test]
fn power_cuts_lose_nothing_flushed_while_growing_areas_are_freed_in_the_background() {
    prove(
        "power_cuts_lose_nothing_flushed_while_growing_areas_are_freed_in_the_background",
        LayerOptions {
            background: true,
            ..options(32, 8 << 10, 512 << 10)
        },
    );
}
