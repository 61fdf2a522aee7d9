//! Figures and sizes as people read them.

/// A figure with three digits.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => trimmed(value / 1e6, 2) + " M",
        size if size >= 10_000.0 => trimmed(value / 1e3, 1) + " k",
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => trimmed(value, 1),
        0.0 => "0".to_owned(),
        size if size < 0.01 => trimmed(value, 4),
        _ => trimmed(value, 2),
    }
}

/// So many places, without zeros at the end.
fn trimmed(value: f64, places: usize) -> String {
    let shown = format!("{value:.places$}");
    match shown.contains('.') {
        true => shown.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => shown,
    }
}

/// A ratio with as many digits as say something.
pub fn times(ratio: f64) -> String {
    match ratio {
        r if r >= 100.0 => format!("{:.0}", two_digits(r)),
        r if r >= 10.0 => format!("{r:.0}"),
        r if r >= 2.0 => format!("{r:.1}"),
        r if r >= 0.095 => format!("{r:.2}"),
        r => format!("{r:.3}"),
    }
}

/// 487 is 490: nobody measures the third digit.
fn two_digits(value: f64) -> f64 {
    let step = 10_f64.powf(value.log10().floor() - 1.0);
    (value / step).round() * step
}

/// Bytes like “1 GiB”.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{b} B"),
    }
}

/// “a, b and c”.
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// With its first letter large.
pub fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + letters.as_str()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_no_zeros_at_the_end() {
        let shown = [
            0.0, 0.0012, 0.123, 0.5, 4.567, 45.67, 456.7, 45_670.0, 4.5e6,
        ]
        .map(figure);
        let wanted = [
            "0", "0.0012", "0.12", "0.5", "4.57", "45.7", "457", "45.7 k", "4.5 M",
        ];
        assert_eq!(shown, wanted);
        assert_eq!(
            [10.0, 100.0, 1000.0, 20_000.0].map(figure),
            ["10", "100", "1000", "20 k"]
        );
    }

    #[test]
    fn ratios_have_two_digits() {
        let shown = [487.0, 36.4, 3.13, 1.019, 0.75, 0.0021].map(times);
        assert_eq!(shown, ["490", "36", "3.1", "1.02", "0.75", "0.002"]);
    }

    #[test]
    fn sizes_lists_and_sentences() {
        assert_eq!(
            [1 << 30, 256 << 20, 5].map(bytes),
            ["1 GiB", "256 MiB", "5 B"]
        );
        let names = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(list(&names), "a, b and c");
        assert_eq!(list(&names[..1]), "a");
        assert_eq!(sentence("überall"), "Überall");
        assert_eq!(sentence(""), "");
    }
}
