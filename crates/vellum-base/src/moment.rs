//! Moments as people and programs read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, ErrorKind, Result};

/// The time since 1970.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a host whose clock is before that.
pub fn unix_time() -> Result<Duration> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| {
            Error::with_source(
                ErrorKind::InvalidInput,
                "the host's clock is before 1970",
                error,
            )
        })
}

/// A moment as RFC 3339 in UTC, to the second.
///
/// Records and answers may name moments that no calendar has: those after the year 9999, or before 1970,
/// are shown as seconds.
pub fn rfc3339(time: SystemTime) -> String {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => rfc3339_of_seconds(since.as_secs()),
        Err(before) => format!("{} seconds before 1970", before.duration().as_secs()),
    }
}

/// As [`rfc3339`], of seconds since 1970.
pub fn rfc3339_of_seconds(seconds: u64) -> String {
    /// The first second of the year 10000.
    const TOO_LATE: u64 = 253_402_300_800;
    if seconds >= TOO_LATE {
        return format!("{seconds} seconds after 1970");
    }
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

/// As [`rfc3339`], to the nanosecond.
pub fn rfc3339_nanos(time: SystemTime) -> String {
    let to_the_second = rfc3339(time);
    // Not of a moment that no calendar has.
    match to_the_second.ends_with('Z') {
        true => humantime::format_rfc3339_nanos(time).to_string(),
        false => to_the_second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_that_no_calendar_has_are_shown_as_seconds() {
        assert_eq!(rfc3339_of_seconds(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339_of_seconds(253_402_300_799), "9999-12-31T23:59:59Z");
        for seconds in [253_402_300_800, u64::MAX] {
            let shown = rfc3339_of_seconds(seconds);
            assert_eq!(shown, format!("{seconds} seconds after 1970"));
        }
        let before = UNIX_EPOCH - Duration::from_secs(7);
        assert_eq!(rfc3339(before), "7 seconds before 1970");
        let after = UNIX_EPOCH + Duration::from_millis(1500);
        assert_eq!(rfc3339(after), "1970-01-01T00:00:01Z");
        assert_eq!(rfc3339_nanos(after), "1970-01-01T00:00:01.500000000Z");
        assert_eq!(rfc3339_nanos(before), "7 seconds before 1970");
    }
}
