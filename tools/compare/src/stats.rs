//! Medians with ranges, ratios pair by pair, and what is only noise.

use serde::Serialize;

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

/// How many times as fast as the reference, from the pairs of one round each. `higher_is_better`
/// says which way the values count; more than 1 is always faster than the reference.
pub fn ratios(
    values: &[(usize, f64)],
    reference: &[(usize, f64)],
    higher_is_better: bool,
) -> Option<Spread> {
    let pairs = values.iter().filter_map(|(round, value)| {
        let (_, base) = reference.iter().find(|(other, _)| other == round)?;
        Some(if higher_is_better {
            value / base
        } else {
            base / value
        })
    });
    Spread::of(pairs)
}

/// What a ratio says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every round was faster than the reference, and than the reference beside itself.
    Faster,
    /// Every round was slower.
    Slower,
    /// The rounds do not tell it from the reference.
    Noise,
}

/// Judges a ratio. `control` is the ratio of the reference to itself, measured once more in each
/// round: what lies within its range means nothing. Nor do fewer than three rounds.
pub fn verdict(ratio: Spread, control: Option<Spread>) -> Verdict {
    let (low, high) = control.map_or((1.0, 1.0), |c| (c.low.min(1.0), c.high.max(1.0)));
    if ratio.rounds < 3 {
        Verdict::Noise
    } else if ratio.low > high {
        Verdict::Faster
    } else if ratio.high < low {
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
    }

    #[test]
    fn ratios_pair_the_rounds_and_leave_out_those_without_a_partner() {
        // Twice as fast in each round, though the machine became ten times slower between them.
        let reference = [(0, 100.0), (1, 10.0), (2, 50.0)];
        let values = [(1, 20.0), (0, 200.0), (3, 1.0)];
        assert_eq!(
            ratios(&values, &reference, true),
            Some(spread(2.0, 2.0, 2.0, 2))
        );
        assert_eq!(
            ratios(&values, &reference, false),
            Some(spread(0.5, 0.5, 0.5, 2))
        );
        assert_eq!(ratios(&[(9, 1.0)], &reference, true), None);
    }

    #[test]
    fn a_range_that_reaches_one_is_noise() {
        assert_eq!(verdict(spread(1.1, 1.2, 1.3, 3), None), Verdict::Faster);
        assert_eq!(verdict(spread(0.9, 1.2, 1.3, 3), None), Verdict::Noise);
        assert_eq!(verdict(spread(0.5, 0.6, 0.7, 3), None), Verdict::Slower);
    }

    #[test]
    fn a_ratio_within_the_range_of_the_reference_beside_itself_is_noise() {
        let control = Some(spread(0.7, 1.1, 1.25, 3));
        assert_eq!(verdict(spread(1.2, 1.3, 1.4, 3), control), Verdict::Noise);
        assert_eq!(verdict(spread(1.3, 1.3, 1.4, 3), control), Verdict::Faster);
        assert_eq!(verdict(spread(0.6, 0.6, 0.69, 3), control), Verdict::Slower);
    }

    #[test]
    fn two_rounds_prove_nothing() {
        assert_eq!(verdict(spread(3.0, 3.0, 3.0, 2), None), Verdict::Noise);
    }

    #[test]
    fn percentiles_of_few_values() {
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[5.0], 0.99), Some(5.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.5), Some(3.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.99), Some(5.0));
    }
}
