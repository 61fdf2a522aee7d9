//! Sizes as people type and read them.

/// As [`parse_bytes`], in whole blocks: the result is a multiple of 4096.
///
/// # Errors
/// As [`parse_bytes`].
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse_bytes(text).map(|bytes| bytes.next_multiple_of(4096))
}

/// Reads `10G`, `512M`, `1.5T`, `4096`: K, M, G, T are powers of 1024, with or without `iB` or `B`.
///
/// # Errors
///
/// A sentence for the user: text that is no size, or one below 1 byte or above 64 TiB.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (number, shift) = [('k', 10), ('m', 20), ('g', 30), ('t', 40)]
        .into_iter()
        .find_map(|(unit, shift)| Some((digits.strip_suffix(unit)?, shift)))
        .unwrap_or((digits, 0));
    let bad = || format!("{text:?} is no size: write a number and K, M, G or T, like 10G");
    let value: f64 = number.parse().map_err(|_| bad())?;
    let bytes = value * (1u64 << shift) as f64;
    if !(1.0..=(64u64 << 40) as f64).contains(&bytes) {
        return Err(format!("{text:?} is out of range: from 4096 bytes to 64T"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded just now, and parts of a byte do not count"
    )]
    let bytes = bytes as u64;
    Ok(bytes)
}

/// Bytes as docker prints them: decimal units, three digits.
#[expect(clippy::indexing_slicing, reason = "the loop ends with the last unit")]
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let name = UNITS[unit];
    if unit == 0 || value >= 99.95 {
        format!("{value:.0}{name}")
    } else if value >= 9.995 {
        format!("{value:.1}{name}")
    } else {
        format!("{value:.2}{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::{human_size, parse_bytes, parse_size};

    #[test]
    fn sizes_read_as_docker_prints_them() {
        let shown = [0, 4096, 999, 1000, 12_345_678, 10 << 30].map(human_size);
        assert_eq!(
            shown,
            ["0B", "4.10kB", "999B", "1.00kB", "12.3MB", "10.7GB"]
        );
    }

    #[test]
    fn sizes_with_and_without_units_become_whole_blocks() {
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("4097"), Ok(8192));
        assert_eq!(parse_bytes("4097"), Ok(4097));
        assert_eq!(parse_size("64T"), Ok(64 << 40));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for bad in ["", "G", "-1G", "65T", "1X", "0", "nan", "inf"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
