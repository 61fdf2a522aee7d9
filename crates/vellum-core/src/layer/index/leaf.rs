//! What an index keeps of 4 MiB, and sorted lists of runs.

use std::fmt::Debug;
use std::ops::{Add, Sub};

use super::{IndexValue, LEAF};

/// A leaf of more runs than this becomes an array.
const MAX_RUNS: usize = 64;

/// A number of blocks within a leaf, or within a node: a run there takes few bytes.
pub(super) trait Place:
    Copy + Ord + Debug + Add<Output = Self> + Sub<Output = Self> + Into<u32>
{
}

impl Place for u16 {}
impl Place for u32 {}

/// A run of equal values within a leaf or a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch<P, V> {
    start: P,
    len: P,
    value: V,
}

impl<P: Place, V: Copy> Stretch<P, V> {
    pub(super) fn new(start: P, len: P, value: V) -> Self {
        Stretch { start, len, value }
    }

    pub(super) fn start(self) -> P {
        self.start
    }

    pub(super) fn len(self) -> P {
        self.len
    }

    pub(super) fn value(self) -> V {
        self.value
    }

    fn end(self) -> P {
        self.start + self.len
    }
}

#[derive(Debug, Clone)]
pub(super) enum Leaf<V: IndexValue> {
    /// Sorted, not overlapping, neighbours of one value merged; gaps are [`IndexValue::ABSENT`].
    Runs(Vec<Stretch<u16, V>>),
    /// Values that are bytes: every cache line that a lookup touches counts.
    Bytes(Box<[V::Small; LEAF]>),
    Array(Box<[V; LEAF]>),
}

/// A place in a leaf, or its end, as a run there has it.
#[inline]
fn place(within: usize) -> u16 {
    debug_assert!(within <= LEAF, "a place behind the leaf");
    #[expect(clippy::cast_possible_truncation, reason = "LEAF is far below 2^16")]
    let place = within as u16;
    place
}

/// The first value of a range of an array, and how many of it there are.
#[inline]
#[expect(
    clippy::indexing_slicing,
    reason = "callers name at least one place, and all of them in the leaf"
)]
fn same<T: Copy + PartialEq>(values: &[T; LEAF], within: usize, max: usize) -> (T, u32) {
    let values = &values[within..within + max];
    let first = values[0];
    let len = values.iter().take_while(|&&other| other == first).count();
    (first, place(len).into())
}

/// Gives places of an array a value.
#[inline]
#[expect(clippy::indexing_slicing, reason = "callers name places in the leaf")]
fn fill<T: Copy>(values: &mut [T; LEAF], within: usize, len: usize, value: T) {
    values[within..within + len].fill(value);
}

impl<V: IndexValue> Leaf<V> {
    /// A leaf that holds nothing.
    pub(super) const EMPTY: Self = Leaf::Runs(Vec::new());

    /// The value at a place, and how far it goes, up to `max` and the leaf's end.
    #[inline]
    pub(super) fn piece_at(&self, within: usize, max: u32) -> (V, u32) {
        let most = (max as usize).min(LEAF - within);
        match self {
            Leaf::Runs(runs) => piece_of(runs, place(within).into(), place(most).into()),
            Leaf::Bytes(values) => {
                let (byte, len) = same(values, within, most);
                (V::of_small(byte), len)
            }
            Leaf::Array(values) => same(values, within, most),
        }
    }

    /// Gives `len` places from `within` on the value.
    pub(super) fn set(&mut self, within: usize, len: usize, value: V) {
        if len == LEAF {
            *self = Leaf::EMPTY;
        }
        match self {
            Leaf::Runs(runs) => {
                set_stretches(runs, Stretch::new(place(within), place(len), value));
                if runs.len() > MAX_RUNS {
                    *self = Leaf::array_of(runs);
                }
            }
            Leaf::Bytes(values) => match value.small() {
                Some(byte) => fill(values, within, len, byte),
                None => {
                    let mut values = Box::new(values.map(V::of_small));
                    fill(&mut values, within, len, value);
                    *self = Leaf::Array(values);
                }
            },
            Leaf::Array(values) => fill(values, within, len, value),
        }
    }

    /// The same as an array.
    fn array_of(runs: &[Stretch<u16, V>]) -> Self {
        let mut values = Box::new([V::ABSENT; LEAF]);
        for run in runs {
            fill(&mut values, run.start.into(), run.len.into(), run.value);
        }
        let Some(absent) = V::ABSENT.small() else {
            return Leaf::Array(values);
        };
        let mut bytes = Box::new([absent; LEAF]);
        for run in runs {
            match run.value.small() {
                Some(byte) => fill(&mut bytes, run.start.into(), run.len.into(), byte),
                None => return Leaf::Array(values),
            }
        }
        Leaf::Bytes(bytes)
    }

    /// Asserts that it is as it is described above.
    pub(super) fn assert_sound(&self) {
        if let Leaf::Runs(runs) = self {
            assert!(runs.len() <= MAX_RUNS, "a leaf of too many runs");
            assert!(
                sorted_and_merged(runs, u32::from(place(LEAF))),
                "a leaf out of order"
            );
        }
    }
}

/// Whether runs are as [`Leaf::Runs`] has them, all of them before `end`.
pub(super) fn sorted_and_merged<P: Place, V: IndexValue>(runs: &[Stretch<P, V>], end: u32) -> bool {
    let alone = |run: &Stretch<P, V>| run.len.into() > 0 && run.value != V::ABSENT;
    runs.iter().all(alone)
        && runs.last().is_none_or(|last| last.end().into() <= end)
        && runs.is_sorted_by(|run, next| {
            run.end() < next.start || run.end() == next.start && run.value != next.value
        })
}

/// The value at a place in a sorted list of runs, and how far it goes, up to `max`.
#[inline]
pub(super) fn piece_of<P: Place, V: IndexValue>(
    runs: &[Stretch<P, V>],
    within: u32,
    max: u32,
) -> (V, u32) {
    let next = runs.partition_point(|run| run.end().into() <= within);
    match runs.get(next) {
        None => (V::ABSENT, max),
        Some(run) if run.start.into() > within => (V::ABSENT, max.min(run.start.into() - within)),
        Some(run) => (run.value, max.min(run.end().into() - within)),
    }
}

/// Overwrites the places of `new` in a sorted list of runs.
#[expect(
    clippy::indexing_slicing,
    reason = "the bounds come from searches of the same list"
)]
pub(super) fn set_stretches<P: Place, V: IndexValue>(
    runs: &mut Vec<Stretch<P, V>>,
    new: Stretch<P, V>,
) {
    let Stretch { start, value, .. } = new;
    let end = new.end();
    // The runs that the new one overlaps or touches.
    let mut first = runs.partition_point(|run| run.end() < start);
    let mut last = first + runs[first..].partition_point(|run| run.start <= end);
    let mut new = new;
    let mut head = None;
    let mut tail = None;
    if first < last && runs[first].start < start {
        let run = runs[first];
        if run.value == value {
            new = Stretch::new(run.start, end - run.start, value);
        } else if run.end() == start {
            first += 1;
        } else {
            head = Some(Stretch::new(run.start, start - run.start, run.value));
        }
    }
    if first < last && runs[last - 1].end() > end {
        let run = runs[last - 1];
        if run.value == value {
            new.len = run.end() - new.start;
        } else if run.start == end {
            last -= 1;
        } else {
            tail = Some(Stretch::new(end, run.end() - end, run.value));
        }
    }
    let new = (value != V::ABSENT).then_some(new);
    match (new, head, tail) {
        // The commonest case, in place: a run grows or changes its value.
        (Some(new), None, None) if last == first + 1 => runs[first] = new,
        // The next commonest, without the cost of a splice.
        (Some(new), None, None) if first == last => runs.insert(first, new),
        (None, None, None) => drop(runs.drain(first..last)),
        _ => drop(runs.splice(first..last, [head, new, tail].into_iter().flatten())),
    }
}
