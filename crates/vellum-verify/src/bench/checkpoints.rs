//! What checkpoints of a large map cost: bytes of them for each byte that a client writes, where it
//! flushes after each write and the map holds two million extents.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use super::{Bench, Cases, FLUSHES, Scratch, compare, per_operation};
use crate::bench::CaseResult;
use vellum_base::block::{BLOCK_SIZE, Block, BlockState, Span};
use vellum_base::error::Result;
use vellum_core::layer::{LayerOptions, WritableLayer};

/// Extents of the map. They are zeros: a map of data is as large, but 8 GiB of it take long to write.
const EXTENTS: u64 = 2_000_000;
/// What is written lies behind them, this many blocks apart from each other.
const APART: u64 = 37;
/// Different blocks that are written.
const PLACES: u64 = 1 << 16;
/// Bytes of a write.
const LEN: usize = 8192;

/// Runs the cases.
pub(super) fn run<D: FnMut(&CaseResult)>(bench: &Bench, cases: &mut Cases<'_, D>) -> Result<()> {
    for (kind, overwrite) in [("overwriting", true), ("allocating", false)] {
        let name = format!("write 8 KiB and flush, 2 million extents held, {kind}");
        if !cases.wants(&name) {
            continue;
        }
        let (_scratch, layer) = large_map(bench)?;
        let next = Cell::new(0);
        let place = || {
            let at = next.get();
            next.set(at + 1);
            // A stride without a common divisor visits every place once before the first again.
            let at = if overwrite { at % FLUSHES } else { at };
            Block::new(2 * EXTENTS + at * 40_503 % PLACES * APART)
        };
        let bytes = [0xa5; LEN];
        let once = || {
            let start = place();
            {
                let held = layer.lock_blocks(Span::of_buffer(start, &bytes))?;
                layer.write_blocks(&held, start, &bytes)?;
            }
            layer.flush()
        };
        if overwrite {
            (0..FLUSHES).try_for_each(|_| once())?;
        }
        let (before, first) = (layer.stats().snapshot().checkpoint_bytes, next.get());
        let ours = || {
            let begin = Instant::now();
            (0..FLUSHES * 4).try_for_each(|_| once())?;
            Ok(per_operation(begin, 4 * FLUSHES as usize))
        };
        let raw = || bench.raw_flushes(overwrite);
        let mut result = compare(&name, "pwrite and fdatasync", cases.rounds, &ours, &raw)?;
        let written = (next.get() - first) * LEN as u64;
        let checkpoints = layer.stats().snapshot().checkpoint_bytes - before;
        result.checkpoints = Some(checkpoints as f64 / written.max(1) as f64);
        cases.note(result);
    }
    Ok(())
}

/// A layer with such a map, gone when the guard is dropped.
fn large_map(bench: &Bench) -> Result<(Scratch, Arc<WritableLayer>)> {
    let blocks = 2 * EXTENTS + PLACES * APART;
    let (dir, _) = bench.new_layer(None, blocks * BLOCK_SIZE)?;
    let scratch = Scratch(dir.clone());
    let layer = WritableLayer::open(bench.storage.clone(), &dir, LayerOptions::default())?;
    for extent in 0..EXTENTS {
        let zero = Span::of(Block::new(2 * extent));
        let held = layer.lock_blocks(zero)?;
        layer.clear_blocks(&held, zero, BlockState::Zero)?;
    }
    // All of it is in the map, and the next checkpoint adds to it.
    layer.close()?;
    Ok((scratch, layer))
}
