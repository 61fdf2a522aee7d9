//! When a part of a blob that does not come is asked for a second time. docs/registry.md, "Transport".

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// How many requests are remembered, and from how many on they say something.
const REMEMBERED: usize = 128;
const ENOUGH: usize = 16;
/// How long nothing may move before a second request, where little is known, at least, and at most.
const UNKNOWN: Duration = Duration::from_secs(1);
const LEAST: Duration = Duration::from_millis(150);
const LONGEST: Duration = Duration::from_secs(5);
/// Requests for each second one, and how many second ones may be saved up.
const PRICE: u32 = 25;
const SAVED: u32 = 4;

/// How many parts of blobs were asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// In all, without second requests.
    pub requests: u64,
    /// A second time, because nothing moved.
    pub hedges: u64,
    /// Where the second request was answered first.
    pub hedges_won: u64,
}

/// How long requests stood still lately, and how many second ones may be sent.
#[derive(Debug)]
pub(crate) struct Hedging {
    state: Mutex<State>,
    requests: AtomicU64,
    hedges: AtomicU64,
    won: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// The longest pause of each of the last requests.
    pauses: VecDeque<Duration>,
    credit: u32,
    off_until: Option<Instant>,
}

impl Default for Hedging {
    fn default() -> Self {
        Hedging {
            state: Mutex::new(State {
                pauses: VecDeque::with_capacity(REMEMBERED),
                credit: PRICE,
                off_until: None,
            }),
            requests: AtomicU64::new(0),
            hedges: AtomicU64::new(0),
            won: AtomicU64::new(0),
        }
    }
}

impl Hedging {
    /// A request begins. Returns how long nothing may move until it is worth a second one.
    pub fn begin(&self) -> Duration {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.credit = (state.credit + 1).min(SAVED * PRICE);
        if state.pauses.len() < ENOUGH {
            return UNKNOWN;
        }
        let mut pauses: Vec<Duration> = state.pauses.iter().copied().collect();
        drop(state);
        let index = pauses.len() * 95 / 100;
        let (_, pause, _) = pauses.select_nth_unstable(index);
        (*pause * 3 / 2).clamp(LEAST, LONGEST)
    }

    /// Whether a second request may be sent, which then counts.
    pub fn may_ask_again(&self) -> bool {
        let mut state = self.state.lock();
        let off = state.off_until.is_some_and(|end| end > Instant::now());
        if off || state.credit < PRICE {
            return false;
        }
        state.credit -= PRICE;
        self.hedges.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// The second request was answered first.
    pub fn won(&self) {
        self.won.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was answered, and nothing had moved for so long at most.
    pub fn done(&self, pause: Duration) {
        let mut state = self.state.lock();
        if state.pauses.len() >= REMEMBERED {
            state.pauses.pop_front();
        }
        state.pauses.push_back(pause);
    }

    /// The registry has too much to do: nothing is asked twice for so long.
    pub fn off_for(&self, time: Duration) {
        let end = Instant::now().checked_add(time);
        let mut state = self.state.lock();
        state.off_until = state.off_until.max(end);
    }

    pub fn traffic(&self) -> Traffic {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            requests: get(&self.requests),
            hedges: get(&self.hedges),
            hedges_won: get(&self.won),
        }
    }
}

/// When something of a request moved last.
#[derive(Debug)]
pub(crate) struct Pace(Mutex<(Instant, Duration)>);

impl Pace {
    pub fn new() -> Self {
        Pace(Mutex::new((Instant::now(), Duration::ZERO)))
    }

    /// Something came.
    pub fn moved(&self) {
        let mut state = self.0.lock();
        state.1 = state.1.max(state.0.elapsed());
        state.0 = Instant::now();
    }

    /// For how long nothing has moved at most.
    pub fn longest(&self) -> Duration {
        let state = self.0.lock();
        state.1.max(state.0.elapsed())
    }

    /// Waits until nothing has moved for so long.
    pub async fn stands_still_for(&self, patience: Duration) {
        loop {
            let left = patience.saturating_sub(self.0.lock().0.elapsed());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_follows_from_what_requests_took() {
        let hedging = Hedging::default();
        assert_eq!(hedging.begin(), UNKNOWN);
        for _ in 0..REMEMBERED {
            hedging.done(Duration::from_millis(10));
        }
        assert_eq!(hedging.begin(), LEAST);
        for _ in 0..REMEMBERED / 2 {
            hedging.done(Duration::from_millis(400));
        }
        assert_eq!(hedging.begin(), Duration::from_millis(600));
        for _ in 0..REMEMBERED {
            hedging.done(Duration::from_secs(9));
        }
        assert_eq!(hedging.begin(), LONGEST);
    }

    #[test]
    fn second_requests_are_a_few_of_a_hundred_and_none_while_the_registry_is_busy() {
        let hedging = Hedging::default();
        let mut sent = 0;
        for _ in 0..1000 {
            hedging.begin();
            sent += u64::from(hedging.may_ask_again());
        }
        assert!((30..=41).contains(&sent), "{sent}");
        assert_eq!(hedging.traffic().requests, 1000);
        assert_eq!(hedging.traffic().hedges, sent);
        for _ in 0..1000 {
            hedging.begin();
        }
        hedging.off_for(Duration::from_secs(60));
        assert!(!hedging.may_ask_again());
        hedging.off_for(Duration::ZERO);
        assert!(!hedging.may_ask_again(), "it is off for the longer time");
    }
}
