//! The index in memory: block number → a 32-bit value, in space that follows what it holds.
//!
//! A layer keeps one of states; a chain keeps one of layer numbers. A *node* stands for 2 GiB. While
//! little is in it, it is a sorted list of runs: blocks that lie alone all over a large volume cost 12
//! bytes each. Then it has *leaves* of 1024 blocks (4 MiB). A leaf is a short sorted list of runs, or,
//! once that would cost more, an array, of bytes while its values fit. A block that a person writes
//! at random costs about 8 to 24 bytes there.

use std::ops::{Add, Range, Sub};

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
/// A node of more runs than this gets leaves: these cost 12 KiB, and each that is used more.
const MAX_NODE_RUNS: usize = 256;

/// A number of blocks within a leaf, or within a node.
trait Place: Copy + Ord + Add<Output = Self> + Sub<Output = Self> + Into<u64> {}

impl Place for u16 {}
impl Place for u32 {}

/// A run of equal values within a leaf or a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run<P> {
    start: P,
    len: P,
    value: u32,
}

impl<P: Place> Run<P> {
    fn end(self) -> P {
        self.start + self.len
    }
}

#[derive(Debug, Clone)]
enum Leaf {
    /// Sorted, not overlapping, neighbours of one value merged; gaps are [`ABSENT`].
    Runs(Vec<Run<u16>>),
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
    /// As [`Leaf::Runs`].
    Runs(Vec<Run<u32>>),
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
            Some(Node::Runs(runs)) => {
                let within = block % NODE_BLOCKS;
                return piece_of(runs, within, max.min(NODE_BLOCKS - within));
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
            let within = at % NODE_BLOCKS;
            let piece = (NODE_BLOCKS - within).min(end - at);
            if let Some(node) = self.node_mut((at / NODE_BLOCKS) as usize, value) {
                node.set(within as usize, piece as usize, value);
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

impl Node {
    /// Gives `len` blocks from `within` on the value.
    #[inline]
    fn set(&mut self, within: usize, len: usize, value: u32) {
        match self {
            Node::Leaves(leaves) if len < NODE * LEAF => set_leaves(leaves, within, len, value),
            Node::Runs(runs) if len < NODE * LEAF => {
                set_runs(runs, within as u32, len as u32, value);
                if runs.len() > MAX_NODE_RUNS {
                    *self = Node::leaves_of(runs);
                }
            }
            Node::Same(same) if *same == value => {}
            Node::Same(same) if len < NODE * LEAF => {
                let mut runs = Vec::new();
                if *same != ABSENT {
                    set_runs(&mut runs, 0, NODE_BLOCKS as u32, *same);
                }
                set_runs(&mut runs, within as u32, len as u32, value);
                *self = Node::Runs(runs);
            }
            _ => *self = Node::Same(value),
        }
    }

    /// The same with leaves.
    fn leaves_of(runs: &[Run<u32>]) -> Self {
        let mut leaves: Box<[Leaf]> = std::iter::repeat_with(Leaf::default).take(NODE).collect();
        for run in runs {
            set_leaves(&mut leaves, run.start as usize, run.len as usize, run.value);
        }
        Node::Leaves(leaves)
    }
}

/// Sets blocks of a node in its leaves.
#[inline]
fn set_leaves(leaves: &mut [Leaf], within: usize, len: usize, value: u32) {
    let end = within + len;
    let mut at = within;
    while at < end {
        let in_leaf = at % LEAF;
        let piece = (LEAF - in_leaf).min(end - at);
        if let Some(leaf) = leaves.get_mut(at / LEAF) {
            leaf.set(in_leaf, piece, value);
        }
        at += piece;
    }
}

/// The value at a place in a sorted list of runs, and how far it goes, up to `max`.
#[inline]
fn piece_of<P: Place>(runs: &[Run<P>], within: u64, max: u64) -> (u32, u64) {
    let next = runs.partition_point(|run| run.end().into() <= within);
    match runs.get(next) {
        None => (ABSENT, max),
        Some(run) if run.start.into() > within => (ABSENT, max.min(run.start.into() - within)),
        Some(run) => (run.value, max.min(run.end().into() - within)),
    }
}

impl Leaf {
    #[inline]
    fn piece_at(&self, within: usize, max: usize) -> (u32, usize) {
        match self {
            Leaf::Runs(runs) => {
                let (value, len) = piece_of(runs, within as u64, max as u64);
                (value, len as usize)
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
    fn array_of(runs: &[Run<u16>]) -> Self {
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
fn set_runs<P: Place>(runs: &mut Vec<Run<P>>, start: P, len: P, value: u32) {
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
mod tests;
