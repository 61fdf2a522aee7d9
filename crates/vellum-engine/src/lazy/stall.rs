//! How long a read waits for a registry: `VELLUM_STALL`.

use std::time::{Duration, Instant};

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_registry::Failure;

/// Where nothing is said.
const USUAL: Duration = Duration::from_secs(300);
/// The first pause between two attempts, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The environment's word for it.
pub(super) const VARIABLE: &str = "VELLUM_STALL";

/// How long a read waits for what does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stall {
    /// Until an attempt failed.
    Fail,
    /// For so long.
    After(Duration),
    /// Until it is there.
    Never,
}

impl Stall {
    /// What the environment says; what cannot be understood is told in the log.
    pub fn of_environment() -> Stall {
        let Some(value) = std::env::var_os(VARIABLE) else {
            return Stall::After(USUAL);
        };
        let said = value.to_str().and_then(Stall::parse);
        if said.is_none() {
            tracing::warn!(
                ?value,
                "{VARIABLE}: neither a time (300, 5m), nor forever, nor fail"
            );
        }
        said.unwrap_or(Stall::After(USUAL))
    }

    fn parse(text: &str) -> Option<Stall> {
        match text.trim() {
            "fail" => Some(Stall::Fail),
            "forever" => Some(Stall::Never),
            time => {
                let time = match time.parse::<f64>() {
                    Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
                    Err(_) => humantime::parse_duration(time).ok(),
                };
                time.map(Stall::After)
            }
        }
    }

    /// When a read that begins now is given up; `None` is never.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            Stall::Fail => Some(Instant::now()),
            Stall::After(time) => Instant::now().checked_add(time),
            Stall::Never => None,
        }
    }
}

/// Pauses between attempts, which double and are drawn at random.
#[derive(Debug, Default)]
pub(super) struct Pauses(u32);

impl Pauses {
    /// The next one, or what the registry asks for.
    pub fn next(&mut self, asked: Option<Duration>) -> Duration {
        let longest = FIRST_PAUSE
            .saturating_mul(1 << self.0.min(10))
            .min(LONGEST_PAUSE);
        self.0 += 1;
        // From half of it on.
        asked.unwrap_or_else(|| longest.mul_f64(0.5 + fastrand::f64() / 2.0))
    }
}

/// Waits after an attempt that failed, until the next one.
///
/// # Errors
/// [`ErrorKind::Absent`] with what failed, where it is no use, or too late.
pub(super) fn pause_after(
    failure: &Failure,
    pauses: &mut Pauses,
    deadline: Option<Instant>,
) -> Result<()> {
    let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
    if over || !failure.passes {
        return Err(Error::new(ErrorKind::Absent, failure.error.to_string()));
    }
    let pause = pauses.next(failure.after);
    tracing::warn!("{}; once more in {pause:?}", failure.error);
    std::thread::sleep(pause);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_a_time_forever_or_fail() {
        assert_eq!(Stall::parse("fail"), Some(Stall::Fail));
        assert_eq!(Stall::parse(" forever "), Some(Stall::Never));
        assert_eq!(
            Stall::parse("2.5"),
            Some(Stall::After(Duration::from_millis(2500)))
        );
        assert_eq!(
            Stall::parse("5m"),
            Some(Stall::After(Duration::from_secs(300)))
        );
        for bad in ["", "5x", "-1", "nan", "1e300"] {
            assert_eq!(Stall::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn pauses_grow_to_five_seconds_unless_the_registry_asks_for_another() {
        let mut pauses = Pauses::default();
        let first = pauses.next(None);
        assert!(
            first >= FIRST_PAUSE / 2 && first <= FIRST_PAUSE,
            "{first:?}"
        );
        for _ in 0..40 {
            assert!(pauses.next(None) <= LONGEST_PAUSE);
        }
        assert!(pauses.next(None) >= LONGEST_PAUSE / 2);
        assert_eq!(
            pauses.next(Some(Duration::from_secs(9))),
            Duration::from_secs(9)
        );
    }
}
