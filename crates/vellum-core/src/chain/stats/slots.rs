//! Counters that cost a request next to nothing.
//!
//! Each thread has a slot of its own, on cache lines that no other thread writes, and adds to it
//! with a load and a store instead of a locked instruction. Threads beyond the number of slots share
//! the last one, with atomic additions. Sums are exact either way.
//!
//! One write in [`SAMPLE_EVERY`] is timed, since two readings of the clock cost more than all the
//! rest. Which one is drawn at random, with gaps from 1 to twice the mean, so that what a client
//! does periodically does not fall into step with it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// One write in so many is timed, on average.
pub const SAMPLE_EVERY: u32 = 16;

/// Slots of a table.
const SLOTS: usize = 16;
/// The one that threads share which came when all others were taken.
const SHARED: usize = SLOTS - 1;
const UNKNOWN: usize = usize::MAX;

/// What requests of one thread change, on two cache lines (processors fetch them in pairs).
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Slot {
    pub(super) reads: Count,
    pub(super) read_bytes: Count,
    pub(super) top_blocks: Count,
    pub(super) zero_blocks: Count,
    pub(super) first_touch_writes: Count,
    pub(super) steady_writes: Count,
    pub(super) written_bytes: Count,
    pub(super) stored_bytes: Count,
}

/// A counter of a slot.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct Count(AtomicU64);

impl Count {
    const fn new() -> Self {
        Count(AtomicU64::new(0))
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Slot {
    const fn new() -> Self {
        Slot {
            reads: Count::new(),
            read_bytes: Count::new(),
            top_blocks: Count::new(),
            zero_blocks: Count::new(),
            first_touch_writes: Count::new(),
            steady_writes: Count::new(),
            written_bytes: Count::new(),
            stored_bytes: Count::new(),
        }
    }
}

/// The slots of a table, which one process at a time counts in.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Slots([Slot; SLOTS]);

impl Slots {
    pub(super) const fn new() -> Self {
        Slots([const { Slot::new() }; SLOTS])
    }

    /// The slot of this thread, with what adds to its counters.
    #[expect(
        clippy::indexing_slicing,
        reason = "a thread claims a slot that there is, or shares the last"
    )]
    pub(super) fn own(&self) -> (&Slot, Adder) {
        let number = number();
        (&self.0[number], Adder(number != SHARED))
    }

    /// A counter over all threads.
    pub(super) fn sum(&self, counter: fn(&Slot) -> &Count) -> u64 {
        self.0.iter().map(|slot| counter(slot).get()).sum()
    }
}

/// Adds to counters of a slot: true where no other thread does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Adder(bool);

impl Adder {
    pub(super) fn add(self, counter: &Count, amount: u64) {
        if self.0 {
            let before = counter.0.load(Relaxed);
            counter.0.store(before.wrapping_add(amount), Relaxed);
        } else {
            counter.0.fetch_add(amount, Relaxed);
        }
    }
}

/// Slots that a thread of this process has for itself, a bit each.
static TAKEN: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(UNKNOWN) };
    /// Gives the slot back when the thread ends. Apart, since a value with a destructor costs more
    /// to look at.
    static CLAIM: Claim = Claim::new();
    /// Writes until the next one that is timed, itself included; 0 before the first.
    static UNTIL: Cell<u32> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
}

struct Claim(usize);

impl Claim {
    fn new() -> Self {
        let mut taken = TAKEN.load(Relaxed);
        loop {
            let free = taken.trailing_ones() as usize;
            if free >= SHARED {
                return Claim(SHARED);
            }
            // Acquire and release: what the slot's last thread stored comes before what we load.
            match TAKEN.compare_exchange_weak(
                taken,
                taken | 1 << free,
                std::sync::atomic::Ordering::Acquire,
                Relaxed,
            ) {
                Ok(_) => return Claim(free),
                Err(now) => taken = now,
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What still counts on this thread, in destructors of other values, shares.
        let _ = NUMBER.try_with(|number| number.set(SHARED));
        if self.0 != SHARED {
            TAKEN.fetch_and(!(1 << self.0), std::sync::atomic::Ordering::Release);
        }
    }
}

fn number() -> usize {
    let number = NUMBER.get();
    if number != UNKNOWN {
        return number;
    }
    first_number()
}

#[cold]
fn first_number() -> usize {
    let number = CLAIM.try_with(|claim| claim.0).unwrap_or(SHARED);
    NUMBER.set(number);
    number
}

/// Whether this write is one of those that are timed.
pub(super) fn is_sampled() -> bool {
    let until = UNTIL.get();
    if until > 1 {
        UNTIL.set(until - 1);
        return false;
    }
    next_sample(until == 0)
}

/// Draws the next gap. True unless it is the first one, which only begins somewhere.
#[cold]
fn next_sample(first: bool) -> bool {
    let mut random = RANDOM.get();
    if random == 0 {
        random = super::now() ^ (number() as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    }
    // Marsaglia's xorshift.
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    RANDOM.set(random);
    let drawn = (random >> 32) as u32;
    if first {
        // Some place within a gap, so that threads of few writes are timed no more than others.
        let place = drawn % SAMPLE_EVERY;
        UNTIL.set(place.max(1));
        if place > 0 {
            return false;
        }
    }
    UNTIL.set(drawn % (2 * SAMPLE_EVERY - 1) + 1);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Barrier};

    #[test]
    fn one_in_sixteen_is_sampled_and_never_in_step() {
        let total = 160_000;
        let sampled: Vec<u32> = (0..total).filter(|_| is_sampled()).collect();
        let expected = f64::from(total) / f64::from(SAMPLE_EVERY);
        let found = sampled.len() as f64;
        assert!((found / expected - 1.0).abs() < 0.05, "{found}");
        // Whatever a client does at each 16th (or 2nd, 32nd) request is seen as often as the rest.
        for period in [2, SAMPLE_EVERY, 2 * SAMPLE_EVERY] {
            let hits = sampled.iter().filter(|at| *at % period == 0).count() as f64;
            let fair = found / f64::from(period);
            assert!((hits / fair - 1.0).abs() < 0.3, "{period}: {hits} {fair}");
        }
    }

    #[test]
    fn threads_that_count_few_writes_are_sampled_no_more_than_others() {
        let sampled: usize = (0..800)
            .map(|_| {
                let thread = std::thread::spawn(|| (0..2).filter(|_| is_sampled()).count());
                thread.join().unwrap()
            })
            .sum();
        // 1600 writes: 100 are expected.
        assert!((50..150).contains(&sampled), "{sampled}");
    }

    #[test]
    fn many_threads_lose_no_count_with_a_slot_of_their_own_or_shared() {
        let slots = Arc::new(Slots::new());
        let threads = 3 * SLOTS;
        let all_there = Arc::new(Barrier::new(threads));
        let handles: Vec<_> = (0..threads)
            .map(|_| {
                let (slots, all_there) = (slots.clone(), all_there.clone());
                std::thread::spawn(move || {
                    for at in 0..10_000 {
                        let (slot, adder) = slots.own();
                        adder.add(&slot.reads, 1);
                        if at == 0 {
                            // Nobody gives a slot back before all have one.
                            all_there.wait();
                        }
                    }
                    number()
                })
            })
            .collect();
        let numbers: Vec<usize> = handles.into_iter().map(|h| h.join().unwrap()).collect();
        assert_eq!(slots.sum(|slot| &slot.reads), threads as u64 * 10_000);
        let own: std::collections::HashSet<_> = numbers.iter().filter(|n| **n != SHARED).collect();
        let of_own = numbers.iter().filter(|n| **n != SHARED).count();
        assert_eq!(own.len(), of_own, "a slot was given to two at a time");
        assert!(numbers.contains(&SHARED));
    }
}
