//! What the changes that a flush has frozen come to.

use crate::layer::index::Index;
use crate::layer::map_state::Change;
use crate::layer::state_of_value;
use crate::layer::table::{MapExtent, push_extent, state_code, state_of_code};

/// The changes by block, where no block is in two of them, as first writes to blocks are.
fn in_order(changes: &[Change]) -> Option<Vec<Change>> {
    let mut ordered = changes.to_vec();
    ordered.sort_unstable_by_key(|change| change.start);
    let apart = ordered
        .iter()
        .zip(ordered.iter().skip(1))
        .all(|(change, next)| change.start + change.len <= next.start);
    apart.then_some(ordered)
}

/// What a sequence of changes comes to: the last of each block, in runs as long as can be, in order.
pub(super) fn net_changes(changes: &[Change]) -> Vec<MapExtent> {
    let mut net = Vec::new();
    if let [only] = changes {
        push_extent(&mut net, only.start, only.len, state_of_value(only.new));
        return net;
    }
    if let Some(ordered) = in_order(changes) {
        let mut changes = ordered.iter().copied().peekable();
        while let Some(mut change) = changes.next() {
            while let Some(next) = changes
                .next_if(|next| next.start == change.start + change.len && next.new == change.new)
            {
                change.len += next.len;
            }
            let state = state_of_value(change.new);
            push_extent(&mut net, change.start, change.len, state);
        }
        return net;
    }
    // Codes of states, since parent is a change like the others here.
    let mut codes = Index::new();
    for change in changes {
        let code = state_code(state_of_value(change.new));
        codes.set(change.start, change.len, code);
    }
    for run in codes.iter() {
        #[expect(clippy::expect_used, reason = "the codes are those from above")]
        let state = state_of_code(run.value).expect("a code that was made here");
        push_extent(&mut net, run.start, run.len, state);
    }
    net
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{ABSENT, STATE_DATA, STATE_ZERO};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn net_changes_are_the_last_of_each_block_in_runs_as_long_as_can_be(
            changes in prop::collection::vec(
                (0u64..300, 1u64..20, prop::sample::select(vec![ABSENT, STATE_DATA, STATE_ZERO])),
                0..12,
            ),
        ) {
            let mut model = BTreeMap::new();
            let changes: Vec<Change> = changes
                .into_iter()
                .map(|(start, len, new)| {
                    for block in start..start + len {
                        model.insert(block, state_of_value(new));
                    }
                    Change { start, len, old: ABSENT, new }
                })
                .collect();
            let net = net_changes(&changes);
            let mut seen = BTreeMap::new();
            let mut last = None;
            prop_assert!(net.len() <= 2 * changes.len());
            for change in &net {
                prop_assert!(last.is_none_or(|(end, state)| end < change.start || end == change.start && state != change.state));
                last = Some((change.start + u64::from(change.len), change.state));
                for block in change.start..change.start + u64::from(change.len) {
                    seen.insert(block, change.state);
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
