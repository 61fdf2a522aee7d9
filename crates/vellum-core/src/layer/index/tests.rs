use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Numbers of 32 bits, as a chain has them, of which few are bytes.
impl IndexValue for u32 {
    const ABSENT: u32 = u32::MAX;
    type Small = u8;

    fn small(self) -> Option<u8> {
        match self {
            0..254 => Some(self as u8),
            0xffff_fffe.. => Some(self as u8),
            _ => None,
        }
    }

    fn of_small(byte: u8) -> u32 {
        match byte {
            0..254 => byte.into(),
            _ => u32::from(byte) | !0xff,
        }
    }
}

const ABSENT: u32 = u32::MAX;
const NODE_BLOCKS: u64 = super::NODE_BLOCKS as u64;

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

fn run(start: u64, len: u64, value: u32) -> Run<u32> {
    Run::new(span(start, len), value)
}

fn get(index: &Index<u32>, block: u64) -> u32 {
    index.get(Block::new(block))
}

#[test]
fn a_new_index_holds_nothing_anywhere() {
    let index = Index::new();
    assert_eq!(get(&index, 0), ABSENT);
    assert_eq!(
        index.first_run(span(1 << 33, 1000)),
        run(1 << 33, 1000, ABSENT)
    );
    assert_eq!(index.iter().count(), 0);
}

#[test]
fn a_run_over_leaves_and_nodes_comes_back_whole() {
    let mut index = Index::new();
    index.set(span(1000, 2_000_000), 7u32);
    let runs: Vec<_> = index.iter().collect();
    assert_eq!(runs, [run(1000, 2_000_000, 7)]);
}

#[test]
fn truncate_forgets_what_lies_beyond_and_only_that() {
    let mut index = Index::new();
    index.set(span(0, 3 * NODE_BLOCKS), 1u32);
    index.truncate(Block::new(NODE_BLOCKS + 5));
    assert_eq!(
        index.iter().collect::<Vec<_>>(),
        [run(0, NODE_BLOCKS + 5, 1)]
    );
}

#[test]
fn terabytes_of_one_value_take_no_leaves_but_where_they_begin_and_end() {
    let mut index = Index::new();
    index.set(span(5, 1 << 34), 2);
    let mixed = |index: &Index<u32>| {
        let nodes = index.nodes.iter();
        nodes.filter(|node| !matches!(node, Node::Same(_))).count()
    };
    assert_eq!(mixed(&index), 2);
    assert_eq!(index.iter().collect::<Vec<_>>(), [run(5, 1 << 34, 2)]);
    // Within a node of one value, over two of them, and a whole one away.
    index.set(span(7 * NODE_BLOCKS + 9, 1), 1);
    index.set(span(9 * NODE_BLOCKS - 1, 2), 2);
    index.set(span(10 * NODE_BLOCKS, NODE_BLOCKS), ABSENT);
    index.set(span(20 * NODE_BLOCKS, 2 * NODE_BLOCKS), 1);
    assert_eq!(mixed(&index), 3);
    assert_eq!(
        index.iter().collect::<Vec<_>>(),
        [
            run(5, 7 * NODE_BLOCKS + 4, 2),
            run(7 * NODE_BLOCKS + 9, 1, 1),
            run(7 * NODE_BLOCKS + 10, 3 * NODE_BLOCKS - 10, 2),
            run(11 * NODE_BLOCKS, 9 * NODE_BLOCKS, 2),
            run(20 * NODE_BLOCKS, 2 * NODE_BLOCKS, 1),
            run(22 * NODE_BLOCKS, (1 << 34) + 5 - 22 * NODE_BLOCKS, 2),
        ]
    );
    assert_eq!(get(&index, 10 * NODE_BLOCKS + 1), ABSENT);
}

/// Bytes on the heap, each allocation with what malloc(3) needs beside it.
fn memory(index: &Index<u32>) -> usize {
    fn list<T>(list: &Vec<T>) -> usize {
        (list.capacity() * size_of::<T>() + 8).next_multiple_of(16)
    }
    let leaf = |leaf: &Leaf<u32>| match leaf {
        Leaf::Runs(runs) if runs.capacity() == 0 => 0,
        Leaf::Runs(runs) => list(runs),
        Leaf::Bytes(_) => LEAF,
        Leaf::Array(_) => LEAF * 4,
    };
    let node = |node: &Node<u32>| match node {
        Node::Same(_) => 0,
        Node::Runs(runs) => list(runs),
        Node::Leaves(leaves) => {
            NODE * size_of::<Leaf<u32>>() + leaves.iter().map(leaf).sum::<usize>()
        }
    };
    list(&index.nodes) + index.nodes.iter().map(node).sum::<usize>()
}

/// `count` blocks that lie alone, all over `blocks`.
fn scattered(count: u64, blocks: u64) -> Index<u32> {
    let mut index = Index::new();
    for at in 0..count {
        // An odd multiplier visits every block of a power of two once.
        let block = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks;
        index.set(span(block, 1), 1);
    }
    assert_eq!(index.iter().map(|run| run.len().get()).sum::<u64>(), count);
    index
}

#[test]
fn blocks_that_lie_alone_cost_no_more_on_a_huge_volume_than_on_a_large_one() {
    let per_block = |terabytes: u64| {
        let index = scattered(150_000, terabytes << 28);
        memory(&index) as u64 / 150_000
    };
    // Bytes; those of 16 TiB took 820.
    let (at_1, at_16, at_64) = (per_block(1), per_block(16), per_block(64));
    println!("bytes a block over 1, 16, 64 TiB: {at_1}, {at_16}, {at_64}");
    assert!(at_1 <= 150 && at_16 <= 40 && at_64 <= 40);
}

#[test]
fn a_leaf_that_was_an_array_shrinks_when_it_is_overwritten_whole() {
    let mut index = Index::new();
    for block in 0..LEAF as u64 {
        index.set(span(block, 1), (block % 2) as u32);
    }
    index.set(span(0, LEAF as u64), 3);
    let Node::Leaves(leaves) = &index.nodes[0] else {
        panic!("{:?}", index.nodes[0]);
    };
    assert!(matches!(leaves[0], Leaf::Runs(ref runs) if runs.len() == 1));
}

proptest! {
    #[test]
    fn any_sequence_of_sets_reads_as_a_plain_map(
        ops in prop::collection::vec((0u64..3000, 1u64..1500, 0u32..4), 1..200),
        base in prop::sample::select(vec![0u64, NODE_BLOCKS - 2000, 1 << 33]),
        // The node has leaves from the start.
        dense: bool,
        // Values that fit in a byte, that do not, and that just do.
        names in prop::sample::select(vec![[0, 1, 2], [0, 1, 254], [253, ABSENT - 1, 7], [70_000, 3, ABSENT - 2]]),
    ) {
        let mut index = Index::new();
        let mut model = BTreeMap::new();
        for block in (0..1200).step_by(2).filter(|_| dense) {
            index.set(span(base + block, 1), 9);
            model.insert(block, 9);
        }
        for (start, len, value) in ops {
            // Short runs too, so that leaves become arrays.
            let len = if value == 2 { 1 } else { len };
            let value = names.get(value as usize).copied().unwrap_or(ABSENT);
            index.set(span(base + start, len), value);
            for block in start..start + len {
                if value == ABSENT { model.remove(&block); } else { model.insert(block, value); }
            }
        }
        for block in 0..4600 {
            prop_assert_eq!(get(&index, base + block), model.get(&block).copied().unwrap_or(ABSENT));
        }
        index.assert_sound();
        let mut seen = BTreeMap::new();
        let mut last: Option<Run<u32>> = None;
        for run in index.iter() {
            if let Some(last) = last {
                prop_assert!(last.end() < run.start() || last.value != run.value);
            }
            last = Some(run);
            for block in run.span.blocks() {
                seen.insert(block.get() - base, run.value);
            }
        }
        prop_assert_eq!(seen, model);
    }
}
