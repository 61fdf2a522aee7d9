//! The index in memory: block number → a 32-bit value, in space that follows what it holds.
//!
//! A layer keeps one of states; a chain keeps one of layer numbers. The tree has two fixed levels
//! over *leaves* of 1024 blocks (4 MiB). A leaf is a short sorted list of runs, or, once that would
//! cost more, an array, of bytes while its values fit. A block that a person writes at random costs
//! about 8 to 24 bytes, a sequential GiB about 6 KiB.

use std::ops::Range;

/// The value of a block that the index holds nothing for.
pub const ABSENT: u32 = u32::MAX;

/// Blocks of a leaf.
const LEAF: usize = 1024;
/// Leaves of a node: a node covers 2 GiB.
const NODE: usize = 512;
/// Blocks of a node.
const NODE_BLOCKS: u64 = (LEAF * NODE) as u64;
/// A leaf of more runs than this becomes an array.
const MAX_RUNS: usize = 64;

/// A run of equal values within a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: u16,
    len: u16,
    value: u32,
}

impl Run {
    fn end(self) -> u16 {
        self.start + self.len
    }
}

#[derive(Debug, Clone)]
enum Leaf {
    /// Sorted, not overlapping, neighbours of one value merged; gaps are [`ABSENT`].
    Runs(Vec<Run>),
    /// Values that [`narrow`] knows: every cache line that a lookup touches counts.
    Bytes(Box<[u8; LEAF]>),
    Array(Box<[u32; LEAF]>),
}

/// A value as a byte: small ones, and the two largest.
fn narrow(value: u32) -> Option<u8> {
    match value {
        0..254 => Some(value as u8),
        0xffff_fffe.. => Some(value as u8),
        _ => None,
    }
}

/// What [`narrow`] made a byte of.
fn widen(byte: u8) -> u32 {
    match byte {
        0..254 => byte.into(),
        // The bytes of u32::MAX and the one below are theirs.
        _ => u32::from(byte) | !0xff,
    }
}

/// The first value of a slice, and how many of it there are.
fn same<T: Copy + PartialEq>(values: &[T]) -> Option<(T, usize)> {
    let first = *values.first()?;
    let len = values
        .iter()
        .position(|&other| other != first)
        .unwrap_or(values.len());
    Some((first, len))
}

impl Default for Leaf {
    fn default() -> Self {
        Leaf::Runs(Vec::new())
    }
}

/// A run of blocks of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValueRun {
    /// First block.
    pub start: u64,
    /// Length in blocks, never 0.
    pub len: u64,
    /// The value of each of them.
    pub value: u32,
}

/// 2 GiB of blocks. Where all of them have one value, that is all there is to it: one extent of a
/// map may cover terabytes, and must not take memory in proportion.
#[derive(Debug, Clone)]
enum Node {
    Same(u32),
    Leaves(Box<[Leaf]>),
}

impl Default for Node {
    fn default() -> Self {
        Node::Same(ABSENT)
    }
}

/// A sparse array of `u32` over block numbers.
#[derive(Debug, Clone, Default)]
pub struct Index {
    nodes: Vec<Node>,
}

/// Splits a block into (node, leaf within it, block within that).
fn locate(block: u64) -> (usize, usize, usize) {
    let node = (block / NODE_BLOCKS) as usize;
    let leaf = (block / LEAF as u64) as usize % NODE;
    (node, leaf, (block % LEAF as u64) as usize)
}

impl Index {
    /// An index that holds nothing.
    pub fn new() -> Self {
        Index::default()
    }

    /// True when no node was ever touched.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The first block beyond everything that the index can hold an entry for.
    pub fn end(&self) -> u64 {
        self.nodes.len() as u64 * NODE_BLOCKS
    }

    /// The value of `block`, or [`ABSENT`].
    pub fn get(&self, block: u64) -> u32 {
        self.run_at(block, 1).value
    }

    /// The run of equal values that begins at `block`, of at most `max` (≥ 1) blocks.
    ///
    /// It ends early only at a change of value or after `max`.
    pub fn run_at(&self, block: u64, max: u64) -> ValueRun {
        let (value, mut len) = self.piece_at(block, max);
        while len < max {
            let (next, more) = self.piece_at(block + len, max - len);
            if next != value {
                break;
            }
            len += more;
        }
        ValueRun {
            start: block,
            len,
            value,
        }
    }

    /// As [`Index::run_at`], within one leaf or one node of a single value.
    #[inline]
    fn piece_at(&self, block: u64, max: u64) -> (u32, u64) {
        let (node, leaf, within) = locate(block);
        let leaf = match self.nodes.get(node) {
            Some(Node::Leaves(leaves)) => leaves.get(leaf),
            Some(Node::Same(value)) => {
                return (*value, max.min(NODE_BLOCKS - block % NODE_BLOCKS));
            }
            None => None,
        };
        let Some(leaf) = leaf else {
            return (ABSENT, max);
        };
        let (value, len) = leaf.piece_at(within, max.min((LEAF - within) as u64) as usize);
        (value, len as u64)
    }

    /// Gives `len` blocks from `start` the value; [`ABSENT`] forgets them.
    pub fn set(&mut self, start: u64, len: u64, value: u32) {
        let end = start + len;
        let mut at = start;
        while at < end {
            let (node, leaf, within) = locate(at);
            if at.is_multiple_of(NODE_BLOCKS) && end - at >= NODE_BLOCKS {
                if let Some(slot) = self.node_mut(node, value) {
                    *slot = Node::Same(value);
                }
                at += NODE_BLOCKS;
                continue;
            }
            let piece = ((LEAF - within) as u64).min(end - at);
            if let Some(leaf) = self.leaf_mut(node, leaf, value) {
                leaf.set(within, piece as usize, value);
            }
            at += piece;
        }
    }

    /// The node to change, made where it is missing; `None` where there is nothing to forget.
    fn node_mut(&mut self, node: usize, value: u32) -> Option<&mut Node> {
        if node >= self.nodes.len() {
            if value == ABSENT {
                return None;
            }
            self.nodes.resize_with(node + 1, Node::default);
        }
        self.nodes.get_mut(node)
    }

    /// The leaf to change, made where it is missing; `None` where it has the value already.
    fn leaf_mut(&mut self, node: usize, leaf: usize, value: u32) -> Option<&mut Leaf> {
        let slot = self.node_mut(node, value)?;
        if let Node::Same(same) = *slot {
            if same == value {
                return None;
            }
            let leaves = std::iter::repeat_with(|| Leaf::same(same)).take(NODE);
            *slot = Node::Leaves(leaves.collect());
        }
        match slot {
            Node::Leaves(leaves) => leaves.get_mut(leaf),
            Node::Same(_) => None,
        }
    }

    /// Forgets every block from `end` on.
    pub fn truncate(&mut self, end: u64) {
        let last = self.end();
        if end < last {
            let whole = end.div_ceil(NODE_BLOCKS);
            self.nodes.truncate(whole as usize);
            let last = self.end();
            if end < last {
                self.set(end, last - end, ABSENT);
            }
        }
    }

    /// The runs of present values within a range of blocks, in order, each as long as can be.
    pub fn runs(&self, range: Range<u64>) -> Runs<'_> {
        Runs {
            index: self,
            at: range.start,
            end: range.end.min(self.end()),
        }
    }

    /// All runs.
    pub fn iter(&self) -> Runs<'_> {
        self.runs(0..self.end())
    }
}

/// The iterator of [`Index::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    index: &'a Index,
    at: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = ValueRun;

    fn next(&mut self) -> Option<ValueRun> {
        while self.at < self.end {
            let run = self.index.run_at(self.at, self.end - self.at);
            self.at += run.len;
            if run.value != ABSENT {
                return Some(run);
            }
        }
        None
    }
}

impl Leaf {
    /// A leaf of one value.
    fn same(value: u32) -> Self {
        let mut leaf = Leaf::default();
        if value != ABSENT {
            leaf.set(0, LEAF, value);
        }
        leaf
    }

    #[inline]
    fn piece_at(&self, within: usize, max: usize) -> (u32, usize) {
        match self {
            Leaf::Runs(runs) => {
                let next = runs.partition_point(|run| usize::from(run.end()) <= within);
                match runs.get(next) {
                    None => (ABSENT, max),
                    Some(run) if usize::from(run.start) > within => {
                        (ABSENT, max.min(usize::from(run.start) - within))
                    }
                    Some(run) => (run.value, max.min(usize::from(run.end()) - within)),
                }
            }
            Leaf::Bytes(values) => {
                let piece = values.get(within..within + max).and_then(same);
                piece.map_or((ABSENT, max), |(byte, len)| (widen(byte), len))
            }
            Leaf::Array(values) => {
                let piece = values.get(within..within + max).and_then(same);
                piece.unwrap_or((ABSENT, max))
            }
        }
    }

    fn set(&mut self, within: usize, len: usize, value: u32) {
        if len == LEAF {
            *self = Leaf::Runs(Vec::new());
        }
        match self {
            Leaf::Runs(runs) => {
                set_runs(runs, within as u16, len as u16, value);
                if runs.len() > MAX_RUNS {
                    *self = Leaf::array_of(runs);
                }
            }
            Leaf::Bytes(values) => match narrow(value) {
                Some(byte) => {
                    if let Some(target) = values.get_mut(within..within + len) {
                        target.fill(byte);
                    }
                }
                None => {
                    *self = Leaf::Array(Box::new(values.map(widen)));
                    self.set(within, len, value);
                }
            },
            Leaf::Array(values) => {
                if let Some(target) = values.get_mut(within..within + len) {
                    target.fill(value);
                }
            }
        }
    }

    /// The same as an array.
    fn array_of(runs: &[Run]) -> Self {
        let mut bytes = Box::new([u8::MAX; LEAF]);
        let mut fits = true;
        for run in runs {
            let range = usize::from(run.start)..usize::from(run.end());
            match (narrow(run.value), bytes.get_mut(range)) {
                (Some(byte), Some(target)) => target.fill(byte),
                _ => fits = false,
            }
        }
        if fits {
            return Leaf::Bytes(bytes);
        }
        let mut values = Box::new([ABSENT; LEAF]);
        for run in runs {
            let range = usize::from(run.start)..usize::from(run.end());
            if let Some(target) = values.get_mut(range) {
                target.fill(run.value);
            }
        }
        Leaf::Array(values)
    }
}

/// Overwrites `len` places from `start` in a sorted list of runs.
fn set_runs(runs: &mut Vec<Run>, start: u16, len: u16, value: u32) {
    let end = start + len;
    // The runs that the new one overlaps or touches.
    let mut first = runs.partition_point(|run| run.end() < start);
    let mut last = first
        + runs
            .get(first..)
            .unwrap_or_default()
            .partition_point(|run| run.start <= end);
    let mut new = Run { start, len, value };
    let mut head = None;
    let mut tail = None;
    if let Some(run) = runs.get(first).filter(|run| run.start < start) {
        if run.value == value {
            new = Run {
                start: run.start,
                len: new.end() - run.start,
                value,
            };
        } else if run.end() == start {
            first += 1;
        } else {
            head = Some(Run {
                start: run.start,
                len: start - run.start,
                value: run.value,
            });
        }
    }
    if last > first
        && let Some(run) = runs.get(last - 1).filter(|run| run.end() > end)
    {
        if run.value == value {
            new.len = run.end() - new.start;
        } else if run.start == end {
            last -= 1;
        } else {
            tail = Some(Run {
                start: end,
                len: run.end() - end,
                value: run.value,
            });
        }
    }
    let new = (value != ABSENT).then_some(new);
    if head.is_none() && tail.is_none() && last == first + 1 {
        // The commonest case, in place: a run grows or changes its value.
        match (new, runs.get_mut(first)) {
            (Some(new), Some(slot)) => *slot = new,
            _ => drop(runs.drain(first..last)),
        }
        return;
    }
    match new {
        // The next commonest, without the cost of a splice.
        Some(new) if first == last => runs.insert(first, new),
        _ => drop(runs.splice(first..last, [head, new, tail].into_iter().flatten())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_new_index_holds_nothing_anywhere() {
        let index = Index::new();
        assert_eq!(index.get(0), ABSENT);
        assert_eq!(
            index.run_at(1 << 33, 1000),
            ValueRun {
                start: 1 << 33,
                len: 1000,
                value: ABSENT
            }
        );
        assert_eq!(index.iter().count(), 0);
    }

    #[test]
    fn a_run_over_leaves_and_nodes_comes_back_whole() {
        let mut index = Index::new();
        index.set(1000, 2_000_000, 7);
        let runs: Vec<_> = index.iter().collect();
        assert_eq!(
            runs,
            [ValueRun {
                start: 1000,
                len: 2_000_000,
                value: 7
            }]
        );
    }

    #[test]
    fn truncate_forgets_what_lies_beyond_and_only_that() {
        let mut index = Index::new();
        index.set(0, 3 * NODE_BLOCKS, 1);
        index.truncate(NODE_BLOCKS + 5);
        assert_eq!(
            index.iter().collect::<Vec<_>>(),
            [ValueRun {
                start: 0,
                len: NODE_BLOCKS + 5,
                value: 1
            }]
        );
    }

    #[test]
    fn terabytes_of_one_value_take_no_leaves_but_where_they_begin_and_end() {
        let mut index = Index::new();
        index.set(5, 1 << 34, 2);
        let leaves = |index: &Index| {
            let nodes = index.nodes.iter();
            nodes.filter(|node| matches!(node, Node::Leaves(_))).count()
        };
        assert_eq!(leaves(&index), 2);
        let run = |start, len, value| ValueRun { start, len, value };
        assert_eq!(index.iter().collect::<Vec<_>>(), [run(5, 1 << 34, 2)]);
        // Within a node of one value, over two of them, and a whole one away.
        index.set(7 * NODE_BLOCKS + 9, 1, 1);
        index.set(9 * NODE_BLOCKS - 1, 2, 2);
        index.set(10 * NODE_BLOCKS, NODE_BLOCKS, ABSENT);
        index.set(20 * NODE_BLOCKS, 2 * NODE_BLOCKS, 1);
        assert_eq!(leaves(&index), 3);
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
        assert_eq!(index.get(10 * NODE_BLOCKS + 1), ABSENT);
    }

    #[test]
    fn a_leaf_that_was_an_array_shrinks_when_it_is_overwritten_whole() {
        let mut index = Index::new();
        for block in 0..LEAF as u64 {
            index.set(block, 1, (block % 2) as u32);
        }
        index.set(0, LEAF as u64, 3);
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
            // Values that fit in a byte, that do not, and that just do.
            names in prop::sample::select(vec![[0, 1, 2], [0, 1, 254], [253, ABSENT - 1, 7], [70_000, 3, ABSENT - 2]]),
        ) {
            let mut index = Index::new();
            let mut model = BTreeMap::new();
            for (start, len, value) in ops {
                // Short runs too, so that leaves become arrays.
                let len = if value == 2 { 1 } else { len };
                let value = names.get(value as usize).copied().unwrap_or(ABSENT);
                index.set(base + start, len, value);
                for block in start..start + len {
                    if value == ABSENT { model.remove(&block); } else { model.insert(block, value); }
                }
            }
            for block in 0..4600 {
                prop_assert_eq!(index.get(base + block), model.get(&block).copied().unwrap_or(ABSENT));
            }
            let mut seen = BTreeMap::new();
            let mut last: Option<ValueRun> = None;
            for run in index.iter() {
                if let Some(last) = last {
                    prop_assert!(last.start + last.len < run.start || last.value != run.value);
                }
                last = Some(run);
                for block in run.start..run.start + run.len {
                    seen.insert(block - base, run.value);
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
