//! Which snapshots of a container a policy keeps. The rules, and their names, are restic's `forget`: each
//! keeps the newest snapshot of each of so many hours, days, weeks, months or years that have one.

use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::ContainerSnapshot;

/// How many of each are kept; times are UTC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest ones.
    pub last: usize,
    /// The newest of each of so many hours that have one; and so on.
    pub hourly: usize,
    /// Days.
    pub daily: usize,
    /// Weeks, which begin on Monday.
    pub weekly: usize,
    /// Months.
    pub monthly: usize,
    /// Years.
    pub yearly: usize,
    /// Those that are younger than this are kept in any case.
    pub within: Duration,
}

impl Retention {
    /// True where it would keep nothing.
    pub fn keeps_nothing(&self) -> bool {
        *self == Retention::default()
    }
}

/// A snapshot, and why it is kept: for none of these reasons, it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The snapshot.
    pub name: String,
    /// The rules that keep it, as `daily`.
    pub kept_by: Vec<&'static str>,
}

/// What a policy says of snapshots, at the time `now` (since 1970), the newest first. The times of snapshots are
/// in RFC 3339, in UTC.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a snapshot whose time is none.
pub fn judge(
    snapshots: &[ContainerSnapshot],
    policy: &Retention,
    now: Duration,
) -> Result<Vec<Verdict>> {
    let mut times = Vec::new();
    for (place, snapshot) in snapshots.iter().enumerate() {
        times.push((seconds(snapshot)?, place, snapshot));
    }
    // Of one second the later in the record is the newer.
    times.sort_by_key(|(time, place, _)| std::cmp::Reverse((*time, *place)));
    let mut rules = [
        Rule::new("last", policy.last),
        Rule::new("hourly", policy.hourly),
        Rule::new("daily", policy.daily),
        Rule::new("weekly", policy.weekly),
        Rule::new("monthly", policy.monthly),
        Rule::new("yearly", policy.yearly),
    ];
    let mut verdicts = Vec::new();
    for (number, (time, _, snapshot)) in times.iter().enumerate() {
        let mut kept_by = Vec::new();
        if !policy.within.is_zero() && Duration::from_secs(*time) + policy.within > now {
            kept_by.push("within");
        }
        for rule in &mut rules {
            let period = match rule.name {
                "last" => number.to_string(),
                "weekly" => week(*time).to_string(),
                "hourly" => prefix(snapshot, "2026-11-26T05"),
                "daily" => prefix(snapshot, "2026-11-26"),
                "monthly" => prefix(snapshot, "2026-11"),
                _ => prefix(snapshot, "2026"),
            };
            if rule.keeps(period) {
                kept_by.push(rule.name);
            }
        }
        verdicts.push(Verdict {
            name: snapshot.name.clone(),
            kept_by,
        });
    }
    Ok(verdicts)
}

/// One rule, and the periods of which it has kept the newest.
struct Rule {
    name: &'static str,
    left: usize,
    seen: BTreeSet<String>,
}

impl Rule {
    fn new(name: &'static str, left: usize) -> Self {
        Rule {
            name,
            left,
            seen: BTreeSet::new(),
        }
    }

    fn keeps(&mut self, period: String) -> bool {
        if self.left == 0 || !self.seen.insert(period) {
            return false;
        }
        self.left -= 1;
        true
    }
}

/// When it was taken, in seconds since 1970.
fn seconds(snapshot: &ContainerSnapshot) -> Result<u64> {
    let time = humantime::parse_rfc3339(&snapshot.created).ok();
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map(|since| since.as_secs()).ok_or_else(|| {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "the snapshot {} was taken at {:?}, which is no time: see `vellum check`",
                snapshot.name, snapshot.created
            ),
        )
    })
}

/// The front of the time that is as long as this example.
fn prefix(snapshot: &ContainerSnapshot, example: &str) -> String {
    snapshot.created.chars().take(example.len()).collect()
}

/// The number of the week since the Monday before 1970.
fn week(seconds: u64) -> u64 {
    // The first of January 1970 was a Thursday.
    (seconds / (24 * 60 * 60) + 3) / 7
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

    use super::*;
    use uuid::Uuid;
    use vellum_store::{Consistency, DiskInfo};

    fn at(time: &str) -> ContainerSnapshot {
        ContainerSnapshot {
            name: time.into(),
            id: Uuid::nil(),
            parent: None,
            layers: Vec::new(),
            disk: DiskInfo {
                virtual_size: 0,
                device_size: None,
                fs: None,
                holds: None,
            },
            consistency: Consistency::Crash,
            bytes: 0,
            scaffold: Default::default(),
            created: time.into(),
            comment: None,
        }
    }

    fn kept(times: &[&str], policy: &Retention) -> Vec<String> {
        let snapshots: Vec<_> = times.iter().map(|time| at(time)).collect();
        let now = humantime::parse_rfc3339("2026-11-26T12:00:00Z").unwrap();
        let now = now.duration_since(UNIX_EPOCH).unwrap();
        let verdicts = judge(&snapshots, policy, now).unwrap();
        let kept = verdicts
            .into_iter()
            .filter(|verdict| !verdict.kept_by.is_empty());
        kept.map(|verdict| verdict.name).collect()
    }

    const HOURS: [&str; 5] = [
        "2026-11-24T23:10:00Z",
        "2026-11-25T01:10:00Z",
        "2026-11-25T01:50:00Z",
        "2026-11-26T10:00:00Z",
        "2026-11-26T11:00:00Z",
    ];

    #[test]
    fn the_last_ones_are_the_newest_whatever_their_order() {
        let policy = Retention {
            last: 2,
            ..Retention::default()
        };
        let mut times = HOURS;
        times.reverse();
        assert_eq!(kept(&times, &policy), [HOURS[4], HOURS[3]]);
    }

    #[test]
    fn the_newest_of_each_hour_day_week_month_and_year_is_kept() {
        let policy = |set: fn(&mut Retention)| {
            let mut policy = Retention::default();
            set(&mut policy);
            policy
        };
        let hourly = policy(|policy| policy.hourly = 3);
        assert_eq!(kept(&HOURS, &hourly), [HOURS[4], HOURS[3], HOURS[2]]);
        let daily = policy(|policy| policy.daily = 2);
        assert_eq!(kept(&HOURS, &daily), [HOURS[4], HOURS[2]]);
        // The 22nd of November 2026 was a Sunday.
        let days = [
            "2026-11-22T12:00:00Z",
            "2026-11-23T00:00:00Z",
            "2026-11-26T00:00:00Z",
        ];
        let weekly = policy(|policy| policy.weekly = 5);
        assert_eq!(kept(&days, &weekly), [days[2], days[0]]);
        let months = [
            "2025-12-31T23:59:59Z",
            "2026-01-01T00:00:00Z",
            "2026-01-31T00:00:00Z",
        ];
        let monthly = policy(|policy| policy.monthly = 5);
        assert_eq!(kept(&months, &monthly), [months[2], months[0]]);
        let yearly = policy(|policy| policy.yearly = 1);
        assert_eq!(kept(&months, &yearly), [months[2]]);
    }

    #[test]
    fn what_is_young_is_kept_and_without_rules_nothing_is() {
        let young = Retention {
            within: Duration::from_secs(3 * 60 * 60),
            ..Retention::default()
        };
        assert_eq!(kept(&HOURS, &young), [HOURS[4], HOURS[3]]);
        assert!(kept(&HOURS, &Retention::default()).is_empty());
        assert!(Retention::default().keeps_nothing());
        assert!(!young.keeps_nothing());
    }

    #[test]
    fn rules_add_up_and_each_says_what_it_keeps() {
        let policy = Retention {
            last: 1,
            daily: 1,
            ..Retention::default()
        };
        let snapshots: Vec<_> = HOURS.iter().map(|time| at(time)).collect();
        let verdicts = judge(&snapshots, &policy, Duration::ZERO).unwrap();
        assert_eq!(verdicts[0].kept_by, ["last", "daily"]);
        assert!(verdicts[1].kept_by.is_empty());
        let none = [at("yesterday")];
        assert_eq!(
            judge(&none, &policy, Duration::ZERO).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
