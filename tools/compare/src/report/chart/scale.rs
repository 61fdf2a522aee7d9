//! Axes whose ends and marks are round figures.

/// From the first to the last mark of an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    log: bool,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Scale {
    /// From 0 to a round figure that is at least `highest`, in about `steps` steps of 1, 2 or 5.
    pub fn linear(highest: f64, steps: u32) -> Self {
        let highest = if highest > 0.0 && highest.is_finite() {
            highest
        } else {
            1.0
        };
        let step = round_up(highest / f64::from(steps.max(1)));
        let count = (highest / step - 1e-9).ceil().max(1.0);
        Scale {
            log: false,
            low: 0.0,
            high: count * step,
            ticks: (0..=count as u32).map(|n| f64::from(n) * step).collect(),
        }
    }

    /// From the round figure below `low` to that above `high`, each mark some times the one before.
    /// Marks are of 1, 2 and 5 where that makes few of them, else of whole powers of ten.
    pub fn log(low: f64, high: f64) -> Self {
        let (low, high) = (round_down(low), round_up(high));
        let high = if high > low * 1.5 { high } else { low * 10.0 };
        let decades = (high / low).log10();
        let first = low.log10().floor() as i32;
        let last = high.log10().ceil() as i32;
        let digits: &[f64] = if decades <= 1.5 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let every = 1.max((decades / 5.0).ceil() as i32);
        let ticks = (first..=last)
            .filter(|power| power.rem_euclid(every) == 0)
            .flat_map(|power| digits.iter().map(move |digit| digit * 10_f64.powi(power)))
            .filter(|tick| *tick >= low * 0.999 && *tick <= high * 1.001)
            .collect();
        Scale {
            log: true,
            low,
            high,
            ticks,
        }
    }

    /// For these values: from 0, or by powers where the largest is many times the smallest.
    pub fn for_values(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().filter(|v| *v > 0.0).collect();
        let high = values.iter().copied().fold(0.0, f64::max);
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        if high / low > 20.0 {
            Scale::log(low, high)
        } else {
            Scale::linear(high, 3)
        }
    }

    /// Where a value lies, from 0 at the beginning to 1 at the end; beyond them for what is beyond.
    pub fn at(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// The marks.
    pub fn ticks(&self) -> &[f64] {
        &self.ticks
    }
}

/// The next of 1, 2, 5, 10 … at or above.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let digits = [1.0, 2.0, 5.0, 10.0].into_iter();
    let mut fitting = digits
        .map(|d| d * power)
        .filter(|r| *r >= value * 0.999_999);
    fitting.next().unwrap_or(10.0 * power)
}

/// The next of 1, 2, 5 … at or below.
fn round_down(value: f64) -> f64 {
    1.0 / round_up(1.0 / value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f64], wanted: &[f64]) {
        assert_eq!(found.len(), wanted.len(), "{found:?} {wanted:?}");
        for (found, wanted) in found.iter().zip(wanted) {
            assert!(
                (found - wanted).abs() <= 1e-9 * wanted.abs(),
                "{found} {wanted}"
            );
        }
    }

    #[test]
    fn linear_axes_begin_at_zero_and_have_round_marks() {
        close(Scale::linear(870.0, 3).ticks(), &[0.0, 500.0, 1000.0]);
        close(Scale::linear(0.93, 4).ticks(), &[0.0, 0.5, 1.0]);
        close(Scale::linear(4.0, 4).ticks(), &[0.0, 1.0, 2.0, 3.0, 4.0]);
        assert!(Scale::linear(f64::NAN, 4).ticks().len() > 1);
    }

    #[test]
    fn log_axes_end_at_round_figures_and_have_few_marks() {
        close(Scale::log(0.3, 3.0).ticks(), &[0.2, 0.5, 1.0, 2.0, 5.0]);
        close(Scale::log(0.0021, 6.0).ticks(), &[0.01, 0.1, 1.0, 10.0]);
        assert!(Scale::log(1.0, 1e12).ticks().len() < 8);
        assert!(Scale::log(1.0, 1.0).ticks().len() > 1);
        let scale = Scale::log(0.1, 10.0);
        assert!((scale.at(1.0) - 0.5).abs() < 1e-9);
        assert!(scale.at(0.01) < 0.0);
    }

    #[test]
    fn what_differs_much_is_shown_by_powers_and_the_rest_from_zero() {
        assert!(!Scale::for_values([1.0, 5.0]).log);
        assert!(Scale::for_values([1.0, 500.0]).log);
        assert!(!Scale::for_values([]).log);
    }
}
