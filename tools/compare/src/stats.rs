//! Medians of rounds, ratios pair by pair with their confidence intervals, and what is only noise.
//!
//! Ratios are averaged as logarithms (the mean of 2 and ½ is 1), and their intervals are Student's
//! t intervals of those logarithms: rounds are few, and what disturbs a measurement multiplies.
//! docs/comparing.md says more.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// Fewer rounds than this have no interval: they are shown as points and prove nothing.
pub const FEWEST: usize = 3;

/// The part of all repetitions whose interval would hold the true ratio.
pub const LEVEL: f64 = 0.95;

/// The middle and the extremes of some rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The lowest round.
    pub low: f64,
    /// The highest round.
    pub high: f64,
    /// How many rounds.
    pub rounds: usize,
}

impl Spread {
    /// Of these values; none of no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let upper = *values.get(values.len() / 2)?;
        let lower = *values.get((values.len() - 1) / 2)?;
        Some(Spread {
            median: (lower + upper) / 2.0,
            low: *values.first()?,
            high: *values.last()?,
            rounds: values.len(),
        })
    }
}

/// A ratio over some rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// The geometric mean of the rounds.
    pub mean: f64,
    /// Its confidence interval; none with fewer than [`FEWEST`] rounds.
    pub interval: Option<[f64; 2]>,
    /// How many rounds.
    pub rounds: usize,
}

impl Ratio {
    /// Of the ratios of single rounds, with an interval of this level (0 to 1).
    pub fn of(ratios: &[f64], level: f64) -> Option<Self> {
        let logs = Logs::of(ratios)?;
        let error = (logs.variance / logs.count).sqrt();
        Some(logs.ratio(logs.mean, error, logs.count - 1.0, level))
    }

    /// The mean of some ratios over that of others, which have nothing to do with each other: by
    /// Welch's interval, since one run may have been noisier than the other.
    pub fn quotient(over: &[f64], under: &[f64], level: f64) -> Option<Self> {
        let (a, b) = (Logs::of(over)?, Logs::of(under)?);
        let (va, vb) = (a.variance / a.count, b.variance / b.count);
        let fewest = if a.count < b.count { &a } else { &b };
        let freedom = if va + vb > 0.0 {
            let part = |v: f64, count: f64| v * v / (count - 1.0).max(1.0);
            (va + vb) * (va + vb) / (part(va, a.count) + part(vb, b.count))
        } else {
            fewest.count - 1.0
        };
        Some(fewest.ratio(a.mean - b.mean, (va + vb).sqrt(), freedom, level))
    }

    /// Whether the interval lies above 1.
    pub fn above_one(&self) -> bool {
        self.interval.is_some_and(|[low, _]| low > 1.0)
    }

    /// Whether the interval lies below 1.
    pub fn below_one(&self) -> bool {
        self.interval.is_some_and(|[_, high]| high < 1.0)
    }
}

/// Logarithms of ratios: their number, mean and variance.
struct Logs {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Logs {
    fn of(ratios: &[f64]) -> Option<Self> {
        let logs = ratios.iter().map(|ratio| ratio.ln());
        let logs: Vec<f64> = logs.filter(|log| log.is_finite()).collect();
        if logs.is_empty() {
            return None;
        }
        let count = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / count;
        let squares = logs.iter().map(|log| (log - mean).powi(2));
        Some(Logs {
            count,
            mean,
            variance: squares.sum::<f64>() / (count - 1.0).max(1.0),
        })
    }

    /// From a mean of logarithms and its standard error.
    fn ratio(&self, mean: f64, error: f64, freedom: f64, level: f64) -> Ratio {
        let rounds = self.count as usize;
        let reach = StudentsT::new(0.0, 1.0, freedom)
            .ok()
            .filter(|_| rounds >= FEWEST)
            .map(|t| t.inverse_cdf(f64::midpoint(1.0, level)) * error);
        Ratio {
            mean: mean.exp(),
            interval: reach.map(|reach| [(mean - reach).exp(), (mean + reach).exp()]),
            rounds,
        }
    }
}

/// How many times as fast as the reference, for each round that both have. `higher_is_better` says
/// which way the values count; more than 1 is always faster than the reference.
pub fn pairs(
    values: &[(usize, f64)],
    reference: &[(usize, f64)],
    higher_is_better: bool,
) -> Vec<f64> {
    let pairs = values.iter().filter_map(|(round, value)| {
        let (_, base) = reference.iter().find(|(other, _)| other == round)?;
        Some(if higher_is_better {
            value / base
        } else {
            base / value
        })
    });
    pairs.filter(|ratio| ratio.is_finite()).collect()
}

/// What a ratio says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Faster than the reference, and than the reference beside itself.
    Faster,
    /// Slower.
    Slower,
    /// The rounds do not tell it from the reference.
    Noise,
}

/// Judges a ratio: its interval has to leave out 1, and its mean has to lie beyond all rounds of the
/// `control`, which is the reference measured once more beside itself.
pub fn verdict(ratio: Ratio, control: Option<Spread>) -> Verdict {
    let (low, high) = control.map_or((1.0, 1.0), |c| (c.low.min(1.0), c.high.max(1.0)));
    if ratio.above_one() && ratio.mean > high {
        Verdict::Faster
    } else if ratio.below_one() && ratio.mean < low {
        Verdict::Slower
    } else {
        Verdict::Noise
    }
}

/// The value below which `part` (0 to 1) of the sorted values lie.
pub fn percentile(sorted: &[f64], part: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let index = (part * last as f64).round() as usize;
    sorted.get(index.min(last)).copied()
}

/// The geometric mean; none of no values.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.into_iter().collect();
    Logs::of(&values).map(|logs| logs.mean.exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(low: f64, median: f64, high: f64, rounds: usize) -> Spread {
        Spread {
            median,
            low,
            high,
            rounds,
        }
    }

    fn close(found: f64, wanted: f64) -> bool {
        (found / wanted - 1.0).abs() < 1e-4
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(
            Spread::of([4.0, 1.0, 3.0, 2.0]),
            Some(spread(1.0, 2.5, 4.0, 4))
        );
        assert_eq!(Spread::of([7.0]), Some(spread(7.0, 7.0, 7.0, 1)));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_value_that_is_no_number_does_not_count() {
        assert_eq!(
            Spread::of([f64::NAN, 2.0, f64::INFINITY]),
            Some(spread(2.0, 2.0, 2.0, 1))
        );
        assert_eq!(Ratio::of(&[f64::NAN, 0.0], LEVEL), None);
    }

    #[test]
    fn pairs_are_of_one_round_and_leave_out_those_without_a_partner() {
        // Twice as fast in each round, though the machine became ten times slower between them.
        let reference = [(0, 100.0), (1, 10.0), (2, 50.0)];
        let values = [(1, 20.0), (0, 200.0), (3, 1.0)];
        assert_eq!(pairs(&values, &reference, true), [2.0, 2.0]);
        assert_eq!(pairs(&values, &reference, false), [0.5, 0.5]);
        assert!(pairs(&[(9, 1.0)], &reference, true).is_empty());
    }

    #[test]
    fn the_interval_is_students_of_the_logarithms() {
        // Logarithms -1, 0, 1 (base e): standard error 1/√3, t of 2 degrees is 4.30265.
        let e = std::f64::consts::E;
        let found = Ratio::of(&[1.0 / e, 1.0, e], 0.95).unwrap();
        assert!(close(found.mean, 1.0));
        let reach = 4.302_65 / 3.0_f64.sqrt();
        let [low, high] = found.interval.unwrap();
        assert!(close(low, (-reach).exp()) && close(high, reach.exp()));
    }

    #[test]
    fn two_rounds_have_no_interval_and_prove_nothing() {
        let found = Ratio::of(&[3.0, 3.0], LEVEL).unwrap();
        assert_eq!((found.interval, found.rounds), (None, 2));
        assert_eq!(verdict(found, None), Verdict::Noise);
    }

    #[test]
    fn an_interval_that_holds_one_is_noise() {
        let ratio = |mean, low, high| Ratio {
            mean,
            interval: Some([low, high]),
            rounds: 3,
        };
        assert_eq!(verdict(ratio(1.2, 1.1, 1.3), None), Verdict::Faster);
        assert_eq!(verdict(ratio(1.2, 0.9, 1.5), None), Verdict::Noise);
        assert_eq!(verdict(ratio(0.6, 0.5, 0.7), None), Verdict::Slower);
        let control = Some(spread(0.7, 1.1, 1.25, 3));
        assert_eq!(verdict(ratio(1.2, 1.1, 1.3), control), Verdict::Noise);
        assert_eq!(verdict(ratio(1.3, 1.2, 1.4), control), Verdict::Faster);
        assert_eq!(verdict(ratio(0.69, 0.6, 0.8), control), Verdict::Slower);
    }

    #[test]
    fn a_quotient_of_runs_knows_the_noise_of_both() {
        let calm = [1.0, 1.01, 0.99, 1.0];
        let twice = [2.0, 2.02, 1.98, 2.0];
        let found = Ratio::quotient(&twice, &calm, LEVEL).unwrap();
        assert!(close(found.mean, 2.0) && found.above_one());
        let noisy = [0.3, 2.0, 1.0, 1.7];
        let found = Ratio::quotient(&noisy, &calm, LEVEL).unwrap();
        assert!(!found.above_one() && !found.below_one());
        assert_eq!(
            Ratio::quotient(&twice, &[1.0], LEVEL).unwrap().interval,
            None
        );
        let slower = Ratio::quotient(&calm, &twice, LEVEL).unwrap();
        assert!(close(slower.mean, 0.5) && slower.below_one());
    }

    #[test]
    fn percentiles_of_few_values() {
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[5.0], 0.99), Some(5.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.5), Some(3.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.99), Some(5.0));
    }

    #[test]
    fn a_half_and_a_double_make_one() {
        assert!(close(geometric_mean([2.0, 0.5]).unwrap(), 1.0));
        assert_eq!(geometric_mean([]), None);
    }
}
