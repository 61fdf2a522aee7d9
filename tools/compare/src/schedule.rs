//! What there is time for. A time limit takes away the work that says least. Of what readers quote all
//! drivers lose rounds together; of the rest first the drivers that say least lose rounds, then those
//! drivers go, then rounds of the others, then workloads.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Infinite without an end.
fn seconds_until(end: Option<Instant>) -> f64 {
    end.map_or(f64::INFINITY, |end| {
        end.saturating_duration_since(Instant::now()).as_secs_f64()
    })
}

/// The time of one place, shared by its workloads by weight. What one does not use the next ones
/// have.
#[derive(Debug)]
pub struct Budget {
    end: Option<Instant>,
    /// Of the workloads that are to come, the present one included.
    weight: f64,
}

impl Budget {
    /// The place's part of the time until `end`, when this many places are to come, for workloads
    /// of this weight in all.
    pub fn new(end: Option<Instant>, places: usize, weight: f64) -> Self {
        let now = Instant::now();
        let part = |end: Instant| {
            let left = end.saturating_duration_since(now);
            now + left / u32::try_from(places.max(1)).unwrap_or(1)
        };
        Budget {
            end: end.map(part),
            weight,
        }
    }

    /// Seconds that are left in this place; infinite without a limit.
    pub fn left(&self) -> f64 {
        seconds_until(self.end)
    }

    /// Seconds of that for work of this weight.
    pub fn share(&self, weight: f64) -> f64 {
        self.left() * (weight / self.weight.max(weight)).min(1.0)
    }

    /// Work of this weight is done, or will not be.
    pub fn done(&mut self, weight: f64) {
        self.weight -= weight;
    }
}

/// The rounds of one workload within its share.
#[derive(Debug)]
pub struct Rounds {
    end: Option<Instant>,
    rounds: usize,
    /// Drivers that come first, with the rounds that they have had.
    first: HashMap<&'static str, usize>,
    /// Seconds of a driver's latest round.
    costs: HashMap<&'static str, f64>,
}

impl Rounds {
    /// So many rounds in so many seconds; `first` are the drivers that matter most.
    pub fn new(seconds: f64, rounds: usize, first: impl IntoIterator<Item = &'static str>) -> Self {
        let end = Duration::try_from_secs_f64(seconds).ok();
        Rounds {
            end: end.and_then(|left| Instant::now().checked_add(left)),
            rounds,
            first: first.into_iter().map(|driver| (driver, 0)).collect(),
            costs: HashMap::new(),
        }
    }

    /// What a round of a driver takes: as its latest, or as the longest of the others.
    fn cost(&self, driver: &str) -> f64 {
        let longest = || self.costs.values().copied().fold(0.0, f64::max);
        self.costs.get(driver).copied().unwrap_or_else(longest)
    }

    /// Whether there is time for a driver in this round, when the place has `place_left` seconds.
    pub fn has_time(&self, driver: &str, round: usize, place_left: f64) -> bool {
        self.fits(driver, round, seconds_until(self.end), place_left)
    }

    fn fits(&self, driver: &str, round: usize, left: f64, place_left: f64) -> bool {
        let cost = self.cost(driver);
        if self.first.contains_key(driver) {
            if round == 0 {
                // It may take from the workloads that follow: it says the most.
                return place_left > cost;
            }
            // A round of one says nothing without the others': what has begun is finished, at the cost of
            // what follows, and a round begins with time for all.
            if self.first.values().any(|had| *had > round) {
                return place_left > cost;
            }
            let waiting = self.first.iter().filter(|(_, had)| **had <= round);
            return left > waiting.map(|(driver, _)| self.cost(driver)).sum();
        }
        let to_come = self.first.iter().map(|(driver, had)| {
            let rounds = self.rounds.saturating_sub(*had) as f64;
            rounds * self.cost(driver)
        });
        left.min(place_left) - to_come.sum::<f64>() > cost
    }

    /// A driver has had a round, or failed in it.
    pub fn had(&mut self, driver: &'static str, seconds: f64) {
        self.costs.insert(driver, seconds);
        if let Some(rounds) = self.first.get_mut(driver) {
            *rounds += 1;
        }
    }

    /// A driver takes no more part.
    pub fn gave_up(&mut self, driver: &str) {
        self.first.remove(driver);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_gets_its_share_and_what_others_left() {
        let end = Instant::now() + Duration::from_secs(200);
        let mut budget = Budget::new(Some(end), 2, 10.0);
        assert!((99.0..=100.0).contains(&budget.left()));
        assert!((19.0..=20.0).contains(&budget.share(2.0)));
        budget.done(8.0);
        assert!((99.0..=100.0).contains(&budget.share(2.0)));
        assert!(Budget::new(None, 2, 10.0).share(1.0).is_infinite());
    }

    #[test]
    fn without_a_limit_there_is_always_time() {
        let mut rounds = Rounds::new(f64::INFINITY, 5, ["raw"]);
        rounds.had("raw", 1e9);
        assert!(rounds.has_time("raw", 4, f64::INFINITY));
        assert!(rounds.has_time("btrfs", 4, f64::INFINITY));
    }

    #[test]
    fn drivers_of_goals_have_all_their_rounds_before_others_have_any() {
        let mut rounds = Rounds::new(1.0, 3, ["raw", "vellum"]);
        rounds.had("raw", 10.0);
        rounds.had("vellum", 10.0);
        // 40 s are still to come for the two, and the other takes 10.
        assert!(!rounds.fits("btrfs", 0, 45.0, 100.0));
        assert!(rounds.fits("btrfs", 0, 51.0, 100.0));
        assert!(rounds.fits("raw", 1, 21.0, 100.0));
        assert!(!rounds.fits("raw", 1, 19.0, 100.0), "the next workload's");
        // A driver that failed keeps nothing for itself.
        rounds.gave_up("vellum");
        assert!(rounds.fits("btrfs", 0, 31.0, 100.0));
    }

    #[test]
    fn a_round_begins_with_time_for_all_that_are_compared_and_then_has_it() {
        let mut rounds = Rounds::new(1.0, 9, ["raw", "vellum"]);
        rounds.had("raw", 10.0);
        rounds.had("vellum", 1.0);
        // A reference that was slow once does not leave the other to itself.
        assert!(!rounds.fits("raw", 1, 9.0, 100.0));
        assert!(!rounds.fits("vellum", 1, 9.0, 100.0));
        assert!(rounds.fits("raw", 1, 12.0, 100.0));
        rounds.had("raw", 10.0);
        assert!(rounds.fits("vellum", 1, 2.0, 100.0));
        // The other took longer than last time, which leaves this one no share; it has its round.
        assert!(rounds.fits("vellum", 1, 0.0, 100.0));
        assert!(!rounds.fits("vellum", 1, 0.0, 0.5), "there is an end");
    }

    #[test]
    fn a_first_round_may_take_from_what_follows_but_not_from_the_end() {
        let mut rounds = Rounds::new(1.0, 3, ["raw", "vellum"]);
        rounds.had("raw", 10.0);
        assert!(rounds.fits("vellum", 0, 1.0, 100.0));
        assert!(!rounds.fits("vellum", 0, 1.0, 9.0));
    }
}
