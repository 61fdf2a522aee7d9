//! What the changes that a flush has frozen come to.

use crate::layer::index::net_runs;
use crate::layer::map_state::Change;
use crate::layer::table::{MapExtent, push_extent};
use vellum_base::block::{BlockState, Run, push_run};

/// The changes by block, where no block is in two of them, as first writes to blocks are.
fn in_order(changes: &[Change]) -> Option<Vec<Change>> {
    let mut ordered = changes.to_vec();
    ordered.sort_unstable_by_key(Change::start);
    let apart = ordered.is_sorted_by(|change, next| change.end() <= next.start());
    apart.then_some(ordered)
}

fn became(change: &Change) -> Run<BlockState> {
    Run::new(change.span, change.value.new)
}

/// What a sequence of changes comes to: the last of each block, in runs as long as can be, in order.
pub(super) fn net_changes(changes: &[Change]) -> Vec<MapExtent> {
    let runs = match in_order(changes) {
        Some(ordered) => {
            let mut runs = Vec::with_capacity(ordered.len());
            ordered
                .iter()
                .for_each(|change| push_run(&mut runs, became(change)));
            runs
        }
        None => net_runs(changes.iter().map(became)),
    };
    let mut net = Vec::with_capacity(runs.len());
    runs.into_iter().for_each(|run| push_extent(&mut net, run));
    net
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::map_state::Became;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use vellum_base::block::{Block, Blocks, Span};

    proptest! {
        #[test]
        fn net_changes_are_the_last_of_each_block_in_runs_as_long_as_can_be(
            changes in prop::collection::vec(
                (0u64..300, 1u64..20, prop::sample::select(vec![BlockState::Parent, BlockState::Data, BlockState::Zero])),
                0..12,
            ),
        ) {
            let mut model = BTreeMap::new();
            let changes: Vec<Change> = changes
                .into_iter()
                .map(|(start, len, new)| {
                    for block in start..start + len {
                        model.insert(block, new);
                    }
                    let span = Span::new(Block::new(start), Blocks::new(len));
                    Run::new(span, Became { old: BlockState::Parent, new })
                })
                .collect();
            let net = net_changes(&changes);
            let mut seen = BTreeMap::new();
            let mut last = None;
            prop_assert!(net.len() <= 2 * changes.len());
            for change in &net {
                let (span, state) = (change.span(), change.state());
                prop_assert!(last.is_none_or(|(end, before)| end < span.start() || end == span.start() && before != state));
                last = Some((span.end(), state));
                for block in span.blocks() {
                    seen.insert(block.get(), state);
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
