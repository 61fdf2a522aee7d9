//! How much comes with a window that is missing: docs/lazy.md, "What comes with a read".

use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Windows of a region: those of one that is read densely come together.
pub(super) const REGION: u32 = 32;
/// Regions that are remembered, those in which something was missing last.
const REGIONS: usize = 16;
/// Points of a region of which all is wanted, so that those behind it come, too; and the most.
const WHOLE: u8 = 15;
const MOST: u8 = 19;

/// Where in a layer windows were missing lately.
#[derive(Debug, Default)]
pub(super) struct Near {
    /// The last one is that of the last window.
    regions: VecDeque<Region>,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    number: u32,
    points: u8,
}

/// What is worth fetching with a window.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Worth {
    /// It, and those beside it.
    pub block: RangeInclusive<u32>,
    /// How many behind those are read next.
    pub ahead: u32,
}

impl Near {
    /// Notes that a window is missing; `follows` if the one before it is here or on its way.
    ///
    /// What comes with it doubles with every third window of a region that somebody misses, and sooner where they follow
    /// what is here: who reads in order, or a directory's files in any order, soon has all of it in one request, and who
    /// reads here and there gets little that was not wanted. A region begins with what one beside it came to.
    pub fn missed(&mut self, window: u32, follows: bool) -> Worth {
        let number = window / REGION;
        let known = [number.saturating_sub(1), number, number.saturating_add(1)];
        let points = known.map(|number| self.points(number));
        let points = points.into_iter().fold(0, u8::max) + if follows { 2 } else { 1 };
        let points = points.min(MOST);
        let regions = match points.checked_sub(WHOLE) {
            Some(more) => 1 << (more / 2),
            None => 0,
        };
        // Nothing will be missing in those ahead, and who comes to their end reads on.
        if regions > 0 {
            self.note(number.saturating_add(regions), points);
        }
        self.note(number, points);
        let length = REGION.min(1 << (points / 3));
        let start = window - window % length;
        Worth {
            block: start..=start + (length - 1),
            ahead: regions * REGION,
        }
    }

    fn note(&mut self, number: u32, points: u8) {
        self.regions.retain(|region| region.number != number);
        if self.regions.len() == REGIONS {
            self.regions.pop_front();
        }
        self.regions.push_back(Region { number, points });
    }

    fn points(&self, number: u32) -> u8 {
        let mut regions = self.regions.iter();
        let known = regions.find(|region| region.number == number);
        known.map_or(0, |region| region.points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of so many windows when somebody reads those in that order, and how many requests that are.
    fn read(order: impl Iterator<Item = u32>, windows: u32) -> (usize, usize) {
        let (mut near, mut here) = (Near::default(), vec![false; windows as usize]);
        let mut requests = 0;
        for window in order {
            if here[window as usize] {
                continue;
            }
            let follows = window > 0 && here[window as usize - 1];
            let worth = near.missed(window, follows);
            assert!(worth.block.contains(&window));
            let end = worth.block.end() + worth.ahead;
            for one in *worth.block.start()..=end.min(windows - 1) {
                here[one as usize] = true;
            }
            requests += 1;
        }
        (here.iter().filter(|here| **here).count(), requests)
    }

    #[test]
    fn who_reads_in_order_has_all_of_it_in_few_requests() {
        let (here, requests) = read(0..1024, 1024);
        assert_eq!(here, 1024);
        assert!(requests <= 20, "{requests}");
        let (_, requests) = read((0..1024).rev(), 1024);
        assert!(requests <= 120, "{requests} from the end to the beginning");
    }

    #[test]
    fn files_of_a_directory_in_any_order_come_together() {
        // All windows of each four regions, drawn.
        let drawn = (0..8).flat_map(|part| (0..128).map(move |at| part * 128 + at * 77 % 128));
        let (here, requests) = read(drawn, 1024);
        assert_eq!(here, 1024);
        assert!(requests <= 100, "{requests}");
    }

    #[test]
    fn who_reads_here_and_there_gets_little_that_was_not_wanted() {
        // One in 64, all over a layer of 16 GiB.
        let windows = 1 << 17;
        let touched = windows / 64;
        let order = (0..touched).map(|at| (at * 40_503) % windows);
        let (here, requests) = read(order, windows);
        assert!(requests as u32 >= touched * 9 / 10, "{requests}");
        assert!((here as u32) < touched * 2, "{here} of {touched} wanted");
    }

    #[test]
    fn a_window_at_the_end_of_a_layer_has_a_block_around_it() {
        let last = u32::MAX;
        let worth = Near::default().missed(last, false);
        assert_eq!(
            worth,
            Worth {
                block: last..=last,
                ahead: 0
            }
        );
    }
}
