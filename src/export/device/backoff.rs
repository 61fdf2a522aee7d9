//! When to give up on a worker that keeps dying.

use std::time::Duration;

/// Deaths in a row after which the device is given up.
const MAX_DEATHS: u32 = 5;
/// A worker that lived this long ends the row.
const STABLE: Duration = Duration::from_secs(10);
/// The wait before the second restart; each further one is four times as long.
const FIRST_DELAY: Duration = Duration::from_millis(20);

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

/// Counts the deaths in a row that are the worker's own fault.
///
/// A SIGKILL of a worker that served ends the row, however often it comes and whether or not anyone
/// asked the worker for something. Everything else counts: an abort, a fault, an exit, or a SIGKILL
/// before it could serve.
#[derive(Debug, Default)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// Judges one death.
    pub fn judge(&mut self, death: Death) -> Verdict {
        if death.lived >= STABLE {
            self.deaths = 0;
        }
        if death.killed && death.served {
            self.deaths = 0;
            return Verdict::Restart(Duration::ZERO);
        }
        self.deaths += 1;
        match self.deaths {
            1 => Verdict::Restart(Duration::ZERO),
            n if n <= MAX_DEATHS => Verdict::Restart(FIRST_DELAY * 4u32.pow(n - 2)),
            _ => Verdict::GiveUp,
        }
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
    fn kills_before_any_worker_serves_lead_to_giving_up() {
        let mut backoff = Backoff::default();
        let killed = Death {
            killed: true,
            served: false,
            ..FAULT
        };
        for _ in 0..5 {
            assert_ne!(backoff.judge(killed), Verdict::GiveUp);
        }
        assert_eq!(backoff.judge(killed), Verdict::GiveUp);
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
