//! When to give up on a worker that keeps dying.

use std::time::Duration;

/// Deaths in a row that were the worker's own fault, after which the device is given up.
const MAX_FAULTS: u32 = 5;
/// Deaths in a row of any kind after which it is: 22 s, in which a want of memory may end.
const MAX_DEATHS: u32 = 9;
/// A worker that lived this long ends the row.
const STABLE: Duration = Duration::from_secs(10);
/// The wait before the second restart; each further one is four times as long, up to the longest.
const FIRST_DELAY: Duration = Duration::from_millis(20);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// How a worker died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Death {
    /// By SIGKILL: somebody else's doing (an operator, the OOM killer).
    pub killed: bool,
    /// It had opened the device and begun to serve.
    pub served: bool,
    /// How long it lived.
    pub lived: Duration,
}

/// What to do after a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start the next one after this long.
    Restart(Duration),
    /// It has died too often: give up.
    GiveUp,
}

/// Counts the deaths in a row.
///
/// A SIGKILL of a worker that served ends the row, however often it comes and whether or not anyone
/// asked the worker for something. Everything else counts: an abort, a fault or an exit as a fault
/// of its own, and a SIGKILL before it could serve, of which more are put up with.
#[derive(Debug, Default)]
pub struct Backoff {
    deaths: u32,
    faults: u32,
}

impl Backoff {
    /// Judges one death.
    pub fn judge(&mut self, death: Death) -> Verdict {
        if death.lived >= STABLE {
            *self = Backoff::default();
        }
        if death.killed && death.served {
            *self = Backoff::default();
            return Verdict::Restart(Duration::ZERO);
        }
        self.deaths += 1;
        self.faults += u32::from(!death.killed);
        if self.deaths > MAX_DEATHS || self.faults > MAX_FAULTS {
            return Verdict::GiveUp;
        }
        let Some(steps) = self.deaths.checked_sub(2) else {
            return Verdict::Restart(Duration::ZERO);
        };
        let delay = FIRST_DELAY.saturating_mul(4u32.saturating_pow(steps));
        Verdict::Restart(delay.min(LONGEST_DELAY))
    }

    /// Deaths in a row that count.
    pub fn deaths(&self) -> u32 {
        self.deaths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULT: Death = Death {
        killed: false,
        served: true,
        lived: Duration::from_millis(50),
    };

    #[test]
    fn kills_after_work_never_lead_to_giving_up() {
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            let killed = Death {
                killed: true,
                ..FAULT
            };
            assert_eq!(backoff.judge(killed), Verdict::Restart(Duration::ZERO));
        }
    }

    #[test]
    fn kills_that_hit_some_workers_before_they_serve_do_not_add_up() {
        let mut backoff = Backoff::default();
        for round in 0..1000 {
            let killed = Death {
                killed: true,
                served: round % 3 == 0,
                ..FAULT
            };
            assert_ne!(backoff.judge(killed), Verdict::GiveUp, "round {round}");
        }
    }

    #[test]
    fn kills_before_any_worker_serves_lead_to_giving_up_after_twenty_seconds() {
        let mut backoff = Backoff::default();
        let killed = Death {
            killed: true,
            served: false,
            ..FAULT
        };
        let mut waited = Duration::ZERO;
        for _ in 0..9 {
            match backoff.judge(killed) {
                Verdict::Restart(delay) => waited += delay,
                Verdict::GiveUp => panic!("too early"),
            }
        }
        assert!((20..30).contains(&waited.as_secs()), "{waited:?}");
        assert_eq!(backoff.judge(killed), Verdict::GiveUp);
    }

    #[test]
    fn faults_among_kills_count_as_faults() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            assert_ne!(backoff.judge(FAULT), Verdict::GiveUp);
        }
        let killed = Death {
            killed: true,
            served: false,
            ..FAULT
        };
        assert_ne!(backoff.judge(killed), Verdict::GiveUp);
        assert_eq!(backoff.judge(FAULT), Verdict::GiveUp);
    }

    #[test]
    fn six_faults_in_a_row_lead_to_giving_up_within_ten_seconds() {
        let mut backoff = Backoff::default();
        let mut waited = Duration::ZERO;
        for _ in 0..5 {
            match backoff.judge(FAULT) {
                Verdict::Restart(delay) => waited += delay,
                Verdict::GiveUp => panic!("too early"),
            }
        }
        assert!(waited < Duration::from_secs(10), "{waited:?}");
        assert_eq!(backoff.judge(FAULT), Verdict::GiveUp);
    }

    #[test]
    fn a_worker_that_lived_long_ends_the_row() {
        let mut backoff = Backoff::default();
        for _ in 0..50 {
            for _ in 0..4 {
                assert_ne!(backoff.judge(FAULT), Verdict::GiveUp);
            }
            let long = Death {
                lived: STABLE,
                ..FAULT
            };
            assert_eq!(backoff.judge(long), Verdict::Restart(Duration::ZERO));
        }
    }
}
