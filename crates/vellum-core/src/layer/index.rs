//! The index in memory: block → a small value, in space that follows what it holds.
//!
//! A layer keeps one of states; a chain keeps one of layer numbers. A *node* stands for 2 GiB. While
//! little is in it, it is a sorted list of runs: blocks that lie alone all over a large volume cost 12
//! bytes each. Then it has *leaves* of 1024 blocks (4 MiB). A leaf is a short sorted list of runs, or,
//! once that would cost more, an array, of bytes while its values fit. A block that a person writes
//! at random costs about 8 to 24 bytes there.

mod leaf;

use std::fmt::Debug;
use std::ops::Range;

use self::leaf::{Leaf, Stretch, piece_of, set_stretches, sorted_and_merged};
use vellum_base::block::{Block, BlockState, Blocks, Run, Span, in_memory};

/// Blocks of a leaf.
const LEAF: usize = 1024;
/// Leaves of a node: a node covers 2 GiB.
const NODE: usize = 512;
/// Blocks of a node.
#[expect(clippy::cast_possible_truncation, reason = "half a million")]
const NODE_BLOCKS: u32 = (LEAF * NODE) as u32;
/// A node of more runs than this gets leaves: these cost 12 KiB, and each that is used more.
const MAX_NODE_RUNS: usize = 256;

/// What an [`Index`] says of a block.
pub trait IndexValue: Copy + Eq + Debug {
    /// What it says where nothing was set. Takes no space.
    const ABSENT: Self;

    /// What most values are in an array: a byte.
    type Small: Copy + Eq + Debug;

    /// The value as a byte. [`IndexValue::ABSENT`] has one.
    fn small(self) -> Option<Self::Small>;

    /// The value that a byte stands for.
    fn of_small(small: Self::Small) -> Self;
}

/// The map of a layer.
impl IndexValue for BlockState {
    const ABSENT: Self = BlockState::Parent;
    type Small = Self;

    fn small(self) -> Option<Self> {
        Some(self)
    }

    fn of_small(small: Self) -> Self {
        small
    }
}

/// Changes of a map: *parent* is one like the others.
impl IndexValue for Option<BlockState> {
    const ABSENT: Self = None;
    type Small = Self;

    fn small(self) -> Option<Self> {
        Some(self)
    }

    fn of_small(small: Self) -> Self {
        small
    }
}

/// 2 GiB of blocks. Where all of them have one value, that is all there is to it: one extent of a
/// map may cover terabytes, and must not take memory in proportion.
#[derive(Debug, Clone)]
enum Node<V: IndexValue> {
    Same(V),
    /// As [`Leaf::Runs`].
    Runs(Vec<Stretch<u32, V>>),
    Leaves(Box<[Leaf<V>; NODE]>),
}

/// A sparse array of values over block numbers.
#[derive(Debug, Clone)]
pub struct Index<V: IndexValue = BlockState> {
    nodes: Vec<Node<V>>,
}

impl<V: IndexValue> Default for Index<V> {
    fn default() -> Self {
        Index { nodes: Vec::new() }
    }
}

/// The number of the node that a block is in, and the block's place there.
#[inline]
fn locate(block: Block) -> (usize, u32) {
    let node = in_memory(block.get() / u64::from(NODE_BLOCKS));
    let within = block.get() % u64::from(NODE_BLOCKS);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "less than the u32 NODE_BLOCKS"
    )]
    (node, within as u32)
}

/// The number of the leaf that a place in a node is in, and the place there.
#[inline]
fn locate_in_node(within: u32) -> (usize, usize) {
    (within as usize / LEAF, within as usize % LEAF)
}

/// A number of blocks, or `most` where there are more.
#[inline]
fn bounded(blocks: Blocks, most: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "no more than a u32")]
    let bounded = blocks.get().min(most.into()) as u32;
    bounded
}

impl<V: IndexValue> Index<V> {
    /// An index that holds nothing.
    pub fn new() -> Self {
        Index::default()
    }

    /// True when no node was ever touched.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The first block beyond everything that the index can hold an entry for.
    pub fn end(&self) -> Block {
        Block::new(self.nodes.len() as u64 * u64::from(NODE_BLOCKS))
    }

    /// The value of `block`.
    pub fn get(&self, block: Block) -> V {
        self.piece_at(Span::of(block)).value
    }

    /// The run of equal values at the front of `span`: it ends at a change of value, or where `span`
    /// does. Empty only where `span` is.
    pub fn first_run(&self, span: Span) -> Run<V> {
        if span.is_empty() {
            return Run::new(span, V::ABSENT);
        }
        let mut run = self.piece_at(span);
        while run.end() < span.end() {
            let next = self.piece_at(span.from(run.end()));
            if next.value != run.value {
                break;
            }
            run.span = run.span.longer_by(next.len());
        }
        run
    }

    /// As [`Index::first_run`], within one leaf or one node of a single value.
    #[inline]
    fn piece_at(&self, span: Span) -> Run<V> {
        let (node, within) = locate(span.start());
        let (value, len) = match self.nodes.get(node) {
            None => return Run::new(span, V::ABSENT),
            Some(node) => node.piece_at(within, bounded(span.len(), NODE_BLOCKS - within)),
        };
        Run::new(Span::new(span.start(), len.into()), value)
    }

    /// Gives the blocks of `span` the value; [`IndexValue::ABSENT`] forgets them.
    pub fn set(&mut self, span: Span, value: V) {
        let mut rest = span;
        while !rest.is_empty() {
            let (node, within) = locate(rest.start());
            let len = bounded(rest.len(), NODE_BLOCKS - within);
            if node >= self.nodes.len() {
                if value == V::ABSENT {
                    // There is nothing to forget from here on.
                    break;
                }
                self.nodes.resize_with(node + 1, || Node::Same(V::ABSENT));
            }
            self.node_mut(node).set(within, len, value);
            rest = rest.from(rest.start() + len.into());
        }
        if cfg!(debug_assertions) {
            self.assert_sound_at(span);
        }
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "the only caller has made the node that it names"
    )]
    fn node_mut(&mut self, node: usize) -> &mut Node<V> {
        &mut self.nodes[node]
    }

    /// Forgets every block from `end` on.
    pub fn truncate(&mut self, end: Block) {
        if end < self.end() {
            let whole = end.get().div_ceil(NODE_BLOCKS.into());
            self.nodes.truncate(in_memory(whole));
            self.set(Span::between(end, self.end()), V::ABSENT);
        }
    }

    /// The runs that cover `span`, in order, those of [`IndexValue::ABSENT`] included; each as long
    /// as can be.
    pub fn cover(&self, span: Span) -> impl Iterator<Item = Run<V>> {
        let mut rest = span;
        std::iter::from_fn(move || {
            (!rest.is_empty()).then(|| {
                let run = self.first_run(rest);
                rest = rest.from(run.end());
                run
            })
        })
    }

    /// The runs of present values within `span`, in order, each as long as can be.
    pub fn runs(&self, span: Span) -> impl Iterator<Item = Run<V>> {
        let held = Span::up_to(self.end() - Block::FIRST);
        // An empty span where it has none of them.
        let held = held
            .intersection(span)
            .unwrap_or(span.at_most(Blocks::NONE));
        self.cover(held).filter(|run| run.value != V::ABSENT)
    }

    /// All runs of present values.
    pub fn iter(&self) -> impl Iterator<Item = Run<V>> {
        self.runs(Span::up_to(self.end() - Block::FIRST))
    }

    /// Asserts that all nodes and leaves are as they are described above.
    pub fn assert_sound(&self) {
        self.nodes
            .iter()
            .for_each(|node| node.assert_sound(0..NODE));
    }

    /// As [`Index::assert_sound`], of those that a change of `span` has to do with: not all of the
    /// leaves, which would take too long after each change.
    fn assert_sound_at(&self, span: Span) {
        let (first, within) = locate(span.start());
        let (last, _) = locate(span.end());
        let (leaf, _) = locate_in_node(within);
        for node in self.nodes.iter().take(last + 1).skip(first) {
            node.assert_sound(leaf..leaf + 1);
        }
    }
}

/// What runs that overlap come to, where later ones overwrite earlier ones: each block once, in
/// order, in runs as long as can be.
pub(super) fn net_runs(changes: impl Iterator<Item = Run<BlockState>>) -> Vec<Run<BlockState>> {
    let mut index = Index::new();
    for change in changes {
        index.set(change.span, Some(change.value));
    }
    let run = |run: Run<Option<BlockState>>| Some(Run::new(run.span, run.value?));
    index.iter().filter_map(run).collect()
}

impl<V: IndexValue> Node<V> {
    /// The value at a place, and how far it goes, up to `max`, which lies within the node.
    #[inline]
    #[expect(
        clippy::indexing_slicing,
        reason = "a place in a node lies in one of its leaves"
    )]
    fn piece_at(&self, within: u32, max: u32) -> (V, u32) {
        match self {
            Node::Leaves(leaves) => {
                let (leaf, within) = locate_in_node(within);
                leaves[leaf].piece_at(within, max)
            }
            Node::Same(value) => (*value, max),
            Node::Runs(runs) => piece_of(runs, within, max),
        }
    }

    /// Gives `len` blocks from `within` on the value.
    #[inline]
    fn set(&mut self, within: u32, len: u32, value: V) {
        match self {
            Node::Leaves(leaves) if len < NODE_BLOCKS => set_leaves(leaves, within, len, value),
            Node::Runs(runs) if len < NODE_BLOCKS => {
                set_stretches(runs, Stretch::new(within, len, value));
                if runs.len() > MAX_NODE_RUNS {
                    *self = Node::leaves_of(runs);
                }
            }
            Node::Same(same) if *same == value => {}
            Node::Same(same) if len < NODE_BLOCKS => {
                let mut runs = Vec::new();
                if *same != V::ABSENT {
                    set_stretches(&mut runs, Stretch::new(0, NODE_BLOCKS, *same));
                }
                set_stretches(&mut runs, Stretch::new(within, len, value));
                *self = Node::Runs(runs);
            }
            _ => *self = Node::Same(value),
        }
    }

    /// Asserts that it is as it is described above, and so are some of its leaves.
    fn assert_sound(&self, leaves: Range<usize>) {
        match self {
            Node::Same(_) => {}
            Node::Runs(runs) => {
                assert!(runs.len() <= MAX_NODE_RUNS, "a node of too many runs");
                assert!(sorted_and_merged(runs, NODE_BLOCKS), "a node out of order");
            }
            Node::Leaves(all) => {
                let some = all.iter().take(leaves.end).skip(leaves.start);
                some.for_each(Leaf::assert_sound);
            }
        }
    }

    /// The same with leaves.
    fn leaves_of(runs: &[Stretch<u32, V>]) -> Self {
        let mut leaves = Box::new([const { Leaf::EMPTY }; NODE]);
        for run in runs {
            set_leaves(&mut leaves, run.start(), run.len(), run.value());
        }
        Node::Leaves(leaves)
    }
}

/// Sets blocks of a node in its leaves.
#[inline]
#[expect(
    clippy::indexing_slicing,
    reason = "a place in a node lies in one of its leaves"
)]
fn set_leaves<V: IndexValue>(leaves: &mut [Leaf<V>; NODE], within: u32, len: u32, value: V) {
    let end = within as usize + len as usize;
    let mut at = within as usize;
    while at < end {
        let in_leaf = at % LEAF;
        let piece = (LEAF - in_leaf).min(end - at);
        leaves[at / LEAF].set(in_leaf, piece, value);
        at += piece;
    }
}

#[cfg(test)]
mod tests;
