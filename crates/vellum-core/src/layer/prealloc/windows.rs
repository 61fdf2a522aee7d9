//! Which blocks are preallocated: they take space on the host, and the map does not say that they are
//! data. Nothing here is durable, and nothing that is depends on it.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use vellum_base::block::{Block, Blocks, Span, in_memory};

/// Blocks that are preallocated together: 1 MiB.
pub(super) const WINDOW: Blocks = Blocks::new(256);
/// First touches within a window after which the rest of it is worth its space.
const TOUCHES: u64 = 8;
/// A write of so many blocks is worth a call for itself, also where nothing may be taken beyond it.
/// Smaller ones, taken one by one, would leave the file in pieces on the disk.
const LARGE: Blocks = WINDOW;
/// Windows at most, for the memory that each takes.
const WINDOWS_AT_MOST: usize = 4096;
/// What no write came to for this long goes back when it is looked for.
const IDLE: Duration = Duration::from_secs(10);
/// Of what a layer holds so much may be preallocated beside it,
const PART: u64 = 10;
/// but no more than 256 MiB.
const AT_MOST: Blocks = Blocks::new(1 << 16);
/// Windows whose touches are counted at a time.
const COUNTED: u64 = 1024;
const WORDS: usize = 4;

/// What a first touch is to do ahead of its write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::layer) enum Want {
    Nothing,
    /// Have these blocks take their space, those of the write among them.
    Space(Span),
    /// Give back what lies idle: there is no room for more.
    Sweep,
}

#[derive(Debug, Default)]
struct Window {
    /// A bit for each block that is preallocated.
    blocks: [u64; WORDS],
    /// A write came since the last sweep.
    in_use: bool,
}

impl Window {
    fn count(&self) -> Blocks {
        let bits = self.blocks.iter().map(|word| u64::from(word.count_ones()));
        Blocks::new(bits.sum())
    }

    fn word_and_bit(block: Block) -> (usize, u64) {
        let within = block.get() % WINDOW.get();
        (in_memory(within / 64), 1 << (within % 64))
    }

    /// Sets or clears the bit of one block; true where that changed it.
    fn set(&mut self, block: Block, to: bool) -> bool {
        let (word, bit) = Self::word_and_bit(block);
        let Some(word) = self.blocks.get_mut(word) else {
            return false;
        };
        let before = *word;
        *word = if to { before | bit } else { before & !bit };
        *word != before
    }
}

/// First touches of one window, of those that share the place.
#[derive(Debug, Clone, Copy, Default)]
struct Touches {
    window: u64,
    count: u64,
}

/// What is preallocated of one layer, and where that would be worth its space.
#[derive(Debug, Default)]
pub(in crate::layer) struct Windows {
    /// Blocks that may be preallocated of a small layer; none: the layer preallocates nothing.
    at_least: Blocks,
    windows: HashMap<u64, Window>,
    blocks: Blocks,
    /// Blocks that a process before left, which are in no window.
    leftover: Blocks,
    touches: Vec<Touches>,
    /// Nothing is preallocated before.
    resume: Option<Instant>,
    unsupported: bool,
    swept: Option<Instant>,
    /// When all of it was last to go back, for want of space.
    given_back: Option<Instant>,
}

fn window_of(block: Block) -> u64 {
    block.get() / WINDOW.get()
}

/// The windows that some blocks touch.
fn windows_of(span: Span) -> RangeInclusive<u64> {
    window_of(span.start())..=(span.end().get() - 1) / WINDOW.get()
}

/// The blocks of a window.
fn span_of(window: u64) -> Span {
    Span::new(Block::new(window * WINDOW.get()), WINDOW)
}

impl Windows {
    /// Up to so many blocks may be preallocated, or a tenth of the data where that is more;
    /// `leftover` are there already.
    pub(in crate::layer) fn begin(&mut self, at_least: Blocks, leftover: Blocks) {
        self.at_least = at_least;
        self.leftover = leftover;
        if !at_least.is_none() {
            self.touches = vec![Touches::default(); in_memory(COUNTED)];
        }
    }

    /// Blocks that take space and are not data.
    pub(in crate::layer) fn blocks(&self) -> Blocks {
        self.blocks + self.leftover
    }

    pub(super) fn leftover(&self) -> Blocks {
        self.leftover
    }

    /// So many blocks that are in no window take space.
    pub(super) fn set_leftover(&mut self, blocks: Blocks) {
        self.leftover = blocks;
    }

    /// The windows that have blocks, in order.
    pub(super) fn spans(&self) -> Vec<Span> {
        let mut windows: Vec<u64> = self.windows.keys().copied().collect();
        windows.sort_unstable();
        windows.into_iter().map(span_of).collect()
    }

    fn limit(&self, data: Blocks) -> Blocks {
        let part = Blocks::new(data.get() / PART).min(AT_MOST);
        part.max(self.at_least)
    }

    /// Whether so many blocks more may be taken beside so many of data.
    pub(super) fn has_room(&self, blocks: Blocks, data: Blocks) -> bool {
        self.windows.len() < WINDOWS_AT_MOST && self.blocks() + blocks <= self.limit(data)
    }

    /// What a write is to do first that makes blocks of `span` data, beside so many of data.
    pub(in crate::layer) fn wanted(&self, span: Span, data: Blocks) -> Want {
        if self.at_least.is_none() || self.unsupported || span.is_empty() {
            return Want::Nothing;
        }
        // A write that is smaller than a window wants at least the rest of one. Most writes end here once
        // there is no room.
        if span.len() < WINDOW && !self.has_room(WINDOW - span.len(), data) && !self.may_sweep() {
            return Want::Nothing;
        }
        let windows = windows_of(span);
        let is_wanted =
            |window: &u64| !self.windows.contains_key(window) && self.will_be_dense(*window, span);
        let Some(first) = windows.clone().find(is_wanted) else {
            return Want::Nothing;
        };
        let last = windows.rev().find(is_wanted).unwrap_or(first);
        let whole = Span::between(span_of(first).start(), span_of(last).end());
        let is_off = self.resume.is_some_and(|resume| Instant::now() < resume);
        let beyond = whole.len() - whole.intersection(span).map_or(Blocks::NONE, Span::len);
        match () {
            () if is_off => Want::Nothing,
            () if self.has_room(beyond, data) => Want::Space(whole),
            () if self.may_sweep() => Want::Sweep,
            () if span.len() >= LARGE => Want::Space(span),
            () => Want::Nothing,
        }
    }

    fn will_be_dense(&self, window: u64, span: Span) -> bool {
        let within = span_of(window).intersection(span);
        let more = within.map_or(0, |within| within.len().get());
        // A writer that goes on from one window to the next, or is all around.
        let goes_on = window > 0 && self.touches_of(window - 1) >= TOUCHES;
        goes_on || self.touches_of(window) + more >= TOUCHES
    }

    fn place(window: u64) -> usize {
        in_memory(window % COUNTED)
    }

    fn touches_of(&self, window: u64) -> u64 {
        let there = self.touches.get(Self::place(window));
        there.map_or(0, |there| match there.window == window {
            true => there.count,
            false => 0,
        })
    }

    /// Whether the last sweep is so long ago that what no write came to since then is idle.
    pub(super) fn may_sweep(&self) -> bool {
        self.swept.is_none_or(|swept| swept.elapsed() >= IDLE)
    }

    /// Blocks became data. Where they were preallocated they are not beyond that any more.
    pub(in crate::layer) fn became_data(&mut self, span: Span) {
        if self.at_least.is_none() || span.is_empty() {
            return;
        }
        let (first, last) = windows_of(span).into_inner();
        self.clear(span, |_| {});
        self.count_touches(first, span);
        // What is in the middle is full, and a whole layer may become data at once.
        if last != first {
            self.count_touches(last, span);
        }
    }

    fn count_touches(&mut self, window: u64, span: Span) {
        let within = span_of(window).intersection(span);
        let more = within.map_or(0, |within| within.len().get());
        if let Some(there) = self.touches.get_mut(Self::place(window)) {
            if there.window != window {
                *there = Touches { window, count: 0 };
            }
            there.count = there.count.saturating_add(more);
        }
    }

    /// Notes that blocks take space from now on that are not data.
    pub(super) fn add(&mut self, span: Span) {
        for block in span.blocks() {
            let window = self.windows.entry(window_of(block)).or_default();
            window.in_use = true;
            if window.set(block, true) {
                self.blocks += Blocks::ONE;
            }
        }
    }

    /// Takes out those of `span` that are preallocated, and says which, in order.
    pub(in crate::layer) fn take(&mut self, span: Span) -> Vec<Span> {
        let mut taken: Vec<Span> = Vec::new();
        self.clear(span, |block| match taken.last_mut() {
            Some(last) if last.end() == block => *last = last.longer_by(Blocks::ONE),
            _ => taken.push(Span::of(block)),
        });
        taken
    }

    /// Takes out those of `span` that are preallocated; each is told of, in order.
    fn clear(&mut self, span: Span, mut each: impl FnMut(Block)) {
        if self.windows.is_empty() || span.is_empty() {
            return;
        }
        let windows = windows_of(span);
        if windows.end() - windows.start() < self.windows.len() as u64 {
            windows.for_each(|number| self.clear_window(number, span, &mut each));
            return;
        }
        let there = self.windows.keys().copied();
        let mut there: Vec<u64> = there.filter(|window| windows.contains(window)).collect();
        there.sort_unstable();
        for number in there {
            self.clear_window(number, span, &mut each);
        }
    }

    fn clear_window(&mut self, number: u64, span: Span, each: &mut impl FnMut(Block)) {
        let Some(window) = self.windows.get_mut(&number) else {
            return;
        };
        window.in_use = true;
        let part = span_of(number).intersection(span);
        for block in part.into_iter().flat_map(Span::blocks) {
            if window.set(block, false) {
                self.blocks -= Blocks::ONE;
                each(block);
            }
        }
        if window.count().is_none() {
            self.windows.remove(&number);
        }
    }

    /// The windows that no write came to since the last sweep. From then on they have to be written to
    /// again to stay.
    pub(super) fn sweep(&mut self) -> Vec<Span> {
        self.swept = Some(Instant::now());
        let idle = self.windows.iter_mut().filter_map(|(number, window)| {
            let was_in_use = std::mem::take(&mut window.in_use);
            (!was_in_use).then_some(span_of(*number))
        });
        idle.collect()
    }

    /// Takes no more space for so long.
    pub(super) fn pause(&mut self, time: Duration) {
        self.resume = Some(Instant::now() + time);
    }

    /// All of it goes back now, for want of space.
    pub(super) fn gives_back(&mut self) {
        self.given_back = Some(Instant::now());
    }

    /// Whether that was tried within this time.
    pub(super) fn was_given_back_within(&self, time: Duration) -> bool {
        self.given_back.is_some_and(|at| at.elapsed() < time)
    }

    /// The host cannot preallocate.
    pub(super) fn give_up(&mut self) {
        self.unsupported = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn span(start: u64, len: u64) -> Span {
        Span::new(Block::new(start), Blocks::new(len))
    }

    fn windows() -> Windows {
        let mut windows = Windows::default();
        windows.begin(Blocks::new(4096), Blocks::NONE);
        windows
    }

    const NO_DATA: Blocks = Blocks::NONE;

    #[test]
    fn a_window_is_wanted_at_its_eighth_touch_or_by_a_write_of_as_many_blocks() {
        let mut some = windows();
        for block in 0..7 {
            let touch = span(1000 - 4 * block, 1);
            assert_eq!(some.wanted(touch, NO_DATA), Want::Nothing);
            some.became_data(touch);
        }
        let window = span(768, 256);
        assert_eq!(some.wanted(span(800, 1), NO_DATA), Want::Space(window));
        assert_eq!(windows().wanted(span(800, 8), NO_DATA), Want::Space(window));
        // Once it was taken it is wanted no more.
        some.add(window);
        assert_eq!(some.wanted(span(800, 8), NO_DATA), Want::Nothing);
    }

    #[test]
    fn a_writer_in_order_has_the_next_window_at_its_first_touch() {
        let mut windows = windows();
        for block in 0..256 {
            windows.became_data(span(block, 1));
        }
        assert_eq!(
            windows.wanted(span(256, 1), NO_DATA),
            Want::Space(span(256, 256))
        );
        assert_eq!(windows.wanted(span(512, 1), NO_DATA), Want::Nothing);
    }

    #[test]
    fn sparse_touches_take_no_space() {
        let mut windows = windows();
        for window in 0..1000 {
            for block in 0..3 {
                let touch = span(window * 512 + 50 * block, 1);
                assert_eq!(windows.wanted(touch, NO_DATA), Want::Nothing);
                windows.became_data(touch);
            }
        }
    }

    #[test]
    fn no_more_is_taken_than_16_mib_or_a_tenth_and_a_large_write_takes_its_own() {
        let mut windows = windows();
        windows.add(span(0, 4096 - 100));
        windows.swept = Some(Instant::now());
        assert_eq!(windows.wanted(span(8192, 8), NO_DATA), Want::Nothing);
        assert_eq!(windows.wanted(span(8300, 255), NO_DATA), Want::Nothing);
        let large = span(8300, 256);
        assert_eq!(windows.wanted(large, NO_DATA), Want::Space(large));
        // What is written at once is not beyond it.
        assert_eq!(
            windows.wanted(span(8200, 156), NO_DATA),
            Want::Space(span(8192, 256))
        );
        let data = Blocks::new(50_000);
        assert_eq!(
            windows.wanted(span(8192, 8), data),
            Want::Space(span(8192, 256))
        );
        // What was left by a process before counts.
        windows.set_leftover(Blocks::new(1000));
        assert_eq!(windows.wanted(span(8192, 8), data), Want::Nothing);
        windows.swept = None;
        assert_eq!(windows.wanted(span(8192, 8), data), Want::Sweep);
    }

    #[test]
    fn what_no_write_came_to_between_two_sweeps_is_idle() {
        let mut windows = windows();
        windows.add(span(0, 256));
        windows.add(span(512, 256));
        assert_eq!(windows.sweep(), []);
        windows.became_data(span(3, 1));
        assert_eq!(windows.sweep(), [span(512, 256)]);
        assert_eq!(windows.take(span(512, 256)), [span(512, 256)]);
        assert_eq!(windows.blocks(), Blocks::new(255));
    }

    #[test]
    fn a_whole_device_that_becomes_data_is_not_looked_at_window_by_window() {
        let mut windows = windows();
        windows.add(span(700, 20));
        windows.became_data(span(0, u64::from(u32::MAX)));
        assert_eq!((windows.blocks(), windows.spans()), (Blocks::NONE, vec![]));
    }

    proptest! {
        #[test]
        fn blocks_are_preallocated_from_when_they_are_added_until_they_are_taken(
            steps in prop::collection::vec((any::<bool>(), 0u64..2000, 1u64..600), 0..40),
        ) {
            let (mut windows, mut model) = (windows(), BTreeSet::new());
            for (adds, start, len) in steps {
                if adds {
                    windows.add(span(start, len));
                    model.extend(start..start + len);
                } else {
                    let taken = windows.take(span(start, len));
                    let taken: Vec<u64> =
                        taken.into_iter().flat_map(Span::blocks).map(Block::get).collect();
                    let expected: Vec<u64> = model.range(start..start + len).copied().collect();
                    prop_assert_eq!(&taken, &expected);
                    expected.iter().for_each(|block| { model.remove(block); });
                }
                prop_assert_eq!(windows.blocks().get(), model.len() as u64);
            }
        }
    }
}
