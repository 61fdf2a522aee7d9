//! The project's goals beside what was reached: each is answered by one figure of the report.

use serde::Serialize;

use super::{DriverReport, Place, Report};
use crate::stats::{Spread, pairs};

/// What is wanted.
#[derive(Debug, Clone, Copy)]
struct Goal {
    /// For people: what is done.
    what: &'static str,
    workload: &'static str,
    metric: &'static str,
    driver: &'static str,
    target: Target,
    at: Where,
}

/// How much is wanted.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// At least so many times as fast as that driver, pair by pair.
    TimesAsFast(f64, &'static str),
    /// At most so many times the time of that driver.
    TimesTheTime(f64, &'static str),
    /// At most so many times the bytes of that driver.
    TimesTheBytes(f64, &'static str),
    /// The figure itself is at least this.
    AtLeast(f64),
    /// The figure itself is at most this.
    AtMost(f64, &'static str),
}

/// On which file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Disk,
    Memory,
    Both,
}

const fn fast(
    what: &'static str,
    (workload, metric): (&'static str, &'static str),
    target: f64,
    than: &'static str,
    at: Where,
) -> Goal {
    Goal {
        what,
        workload,
        metric,
        driver: "vellum",
        target: Target::TimesAsFast(target, than),
        at,
    }
}

const fn nbd(what: &'static str, metric: &'static str, target: f64, than: &'static str) -> Goal {
    Goal {
        what,
        workload: "nbd",
        metric,
        driver: "vellum-nbd",
        target: Target::TimesAsFast(target, than),
        at: Where::Both,
    }
}

const fn pulled(
    what: &'static str,
    metric: &'static str,
    driver: &'static str,
    target: Target,
) -> Goal {
    Goal {
        what,
        workload: "pull",
        metric,
        driver,
        target,
        at: Where::Both,
    }
}

const fn itself(
    what: &'static str,
    workload: &'static str,
    metric: &'static str,
    target: Target,
) -> Goal {
    Goal {
        what,
        workload,
        metric,
        driver: "vellum",
        target,
        at: Where::Both,
    }
}

use Target::{AtLeast, AtMost, TimesTheBytes, TimesTheTime};
use Where::{Both, Disk, Memory};

const FSYNC: &str = "mounted ext4: 8 KiB random writes, fsync each, steady";
const FSYNC_FIRST: &str = "the same, first touch";
const BUFFERED: &str = "mounted ext4: buffered 8 KiB random writes, first touch";
const BUFFERED_STEADY: &str = "the same, steady";
const COLD: &str = "mounted ext4: cold 8 KiB random reads, depth 1";
const COLD64: &str = "mounted ext4: cold 8 KiB random reads, depth 64";
const FIRST: &str = "from a registry: until the first line";
const READY: &str = "the same: until a service answers";
const HERE: &str = "all of it is here: 4 KiB random reads";
const HERE_ORDERED: &str = "the same: 1 MiB reads in order";
const PG: &str = "pgbench, steady TPS";
const WAL: &str = "SQLite commits, write-ahead log, steady";
const ROLLBACK: &str = "SQLite commits, rollback journal, steady";

const GOALS: &[Goal] = &[
    fast(FSYNC, ("fio-fsync", "steady"), 1.2, "raw", Disk),
    fast(FSYNC, ("fio-fsync", "steady"), 2.0, "qcow2", Disk),
    fast(FSYNC, ("fio-fsync", "steady"), 0.5, "raw", Memory),
    fast(FSYNC_FIRST, ("fio-fsync", "first"), 1.2, "raw", Disk),
    fast(FSYNC_FIRST, ("fio-fsync", "first"), 2.0, "qcow2", Disk),
    fast(FSYNC_FIRST, ("fio-fsync", "first"), 0.5, "raw", Memory),
    fast(BUFFERED, ("fio-buffered", "first"), 0.9, "raw", Disk),
    fast(BUFFERED, ("fio-buffered", "first"), 1.5, "qcow2", Disk),
    fast(BUFFERED, ("fio-buffered", "first"), 0.7, "raw", Memory),
    fast(
        BUFFERED_STEADY,
        ("fio-buffered", "steady"),
        0.9,
        "raw",
        Disk,
    ),
    fast(
        BUFFERED_STEADY,
        ("fio-buffered", "steady"),
        1.5,
        "qcow2",
        Disk,
    ),
    fast(
        BUFFERED_STEADY,
        ("fio-buffered", "steady"),
        0.7,
        "raw",
        Memory,
    ),
    fast(COLD, ("fio-read", "cold"), 0.95, "raw", Disk),
    fast(COLD, ("fio-read", "cold"), 0.6, "raw", Memory),
    fast(COLD64, ("fio-read", "cold64"), 0.95, "raw", Disk),
    fast(COLD64, ("fio-read", "cold64"), 0.6, "raw", Memory),
    fast(PG, ("pgbench", "steady"), 1.1, "raw", Disk),
    fast(PG, ("pgbench", "steady"), 1.0, "overlayfs", Disk),
    fast(PG, ("pgbench", "steady"), 0.7, "raw", Memory),
    fast(WAL, ("sqlite-wal", "steady"), 1.1, "raw", Disk),
    fast(WAL, ("sqlite-wal", "steady"), 1.0, "overlayfs", Disk),
    fast(WAL, ("sqlite-wal", "steady"), 0.7, "raw", Memory),
    fast(ROLLBACK, ("sqlite-rollback", "steady"), 1.1, "raw", Disk),
    fast(
        ROLLBACK,
        ("sqlite-rollback", "steady"),
        1.0,
        "overlayfs",
        Disk,
    ),
    fast(ROLLBACK, ("sqlite-rollback", "steady"), 0.7, "raw", Memory),
    fast(
        "pgbench, first 30 s from a fresh clone",
        ("pgbench", "first30"),
        1.2,
        "overlayfs",
        Both,
    ),
    itself(
        "first 4 KiB write into a 1 GiB file of the image, with fsync",
        "first-write",
        "first",
        TimesTheTime(2.0, "raw"),
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: first write",
        "first4k",
        1.0,
        "nbdkit-file",
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: first write",
        "first4k",
        2.0,
        "qemu-qcow2",
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: rewrite",
        "again4k",
        1.0,
        "nbdkit-file",
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: rewrite",
        "again4k",
        2.0,
        "qemu-qcow2",
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: read",
        "read4k",
        1.0,
        "nbdkit-file",
    ),
    nbd(
        "NBD, 4 KiB random, depth 16: read",
        "read4k",
        2.0,
        "qemu-qcow2",
    ),
    nbd("NBD, 1 MiB in order: read", "read1m", 1.0, "nbdkit-file"),
    nbd(
        "NBD, 1 MiB in order: first write",
        "first1m",
        1.0,
        "nbdkit-file",
    ),
    fast(
        "16 containers at once, 8 KiB random writes, buffered: total",
        ("swarm", "total"),
        0.9,
        "raw",
        Both,
    ),
    itself("the same: slowest ÷ mean", "swarm", "fair", AtLeast(0.5)),
    fast(
        "16 containers at once, 8 KiB random writes, fsync each: total",
        ("swarm", "synced"),
        0.9,
        "raw",
        Both,
    ),
    itself(
        "the same: slowest ÷ mean",
        "swarm",
        "fair_synced",
        AtLeast(0.5),
    ),
    itself(
        "create, mount, unmount and remove a container, depth 64",
        "life-64",
        "life",
        AtMost(60.0, "ms"),
    ),
    pulled(FIRST, "first", "pull-lazy", TimesTheTime(0.15, "pull-full")),
    pulled(FIRST, "first", "pull-hot", TimesTheTime(0.1, "pull-full")),
    pulled(FIRST, "first", "pull-hot", TimesTheTime(0.6, "pull-stargz")),
    pulled(READY, "ready", "pull-lazy", TimesTheTime(0.35, "pull-full")),
    pulled(READY, "ready", "pull-hot", TimesTheTime(0.35, "pull-full")),
    pulled(READY, "ready", "pull-hot", TimesTheTime(0.6, "pull-stargz")),
    pulled(
        "the same: over the link until then",
        "ready_bytes",
        "pull-hot",
        TimesTheBytes(0.08, "pull-full"),
    ),
    pulled(
        "the same: until all files were read",
        "all",
        "pull-lazy",
        TimesTheTime(1.1, "pull-full"),
    ),
    pulled(
        HERE,
        "random",
        "pull-lazy",
        Target::TimesAsFast(0.98, "pull-full"),
    ),
    pulled(
        HERE_ORDERED,
        "ordered",
        "pull-lazy",
        Target::TimesAsFast(0.98, "pull-full"),
    ),
    Goal {
        what: "fetched, checked and decoded, without a limit on the link, MB/s",
        workload: "fetch",
        metric: "rate",
        driver: "pull-full",
        target: AtLeast(400.0),
        at: Memory,
    },
];

/// Whether a goal was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// In every round.
    Met,
    /// In no round.
    Missed,
    /// The median reaches it, but not every round does, or there were fewer than three.
    NoiseMet,
    /// The median misses it, but not every round does, or there were fewer than three.
    NoiseMissed,
    /// One of the two lost what it had flushed: their speeds cannot be compared.
    NotComparable,
    /// There is no figure.
    NotMeasured,
}

/// A goal with what was reached.
#[derive(Debug, Clone, Serialize)]
pub struct GoalResult {
    /// What is done.
    pub what: &'static str,
    /// Of [`Place`].
    pub place: String,
    /// The figure: workload and metric.
    pub figure: String,
    /// Of which driver.
    pub driver: &'static str,
    /// Beside which driver; none where the figure itself counts.
    pub beside: Option<&'static str>,
    /// What is wanted, like “≥ 1.2 × raw”.
    pub wanted: String,
    /// What was reached, over the rounds.
    pub reached: Option<Spread>,
    /// Whether that is enough.
    pub outcome: Outcome,
}

/// All goals that concern the places of a report.
pub fn goals(report: &Report) -> Vec<GoalResult> {
    let mut results = Vec::new();
    for place in &report.places {
        for goal in GOALS {
            let concerns = match goal.at {
                Where::Both => true,
                Where::Memory => place.in_memory,
                Where::Disk => !place.in_memory,
            };
            if concerns {
                results.push(goal.judge(report, place));
            }
        }
    }
    results
}

/// The drivers that goals of a workload name.
pub fn drivers_of(workload: &str) -> impl Iterator<Item = &'static str> {
    let goals = GOALS.iter().filter(move |goal| goal.workload == workload);
    goals.flat_map(Goal::drivers)
}

impl Goal {
    fn drivers(&self) -> impl Iterator<Item = &'static str> + use<> {
        [Some(self.driver), self.beside()].into_iter().flatten()
    }

    fn beside(&self) -> Option<&'static str> {
        match self.target {
            Target::TimesAsFast(_, than) | TimesTheTime(_, than) | TimesTheBytes(_, than) => {
                Some(than)
            }
            AtLeast(_) | AtMost(..) => None,
        }
    }

    fn judge(&self, report: &Report, place: &Place) -> GoalResult {
        let key = (&*place.id, self.workload, self.metric);
        let own = report.rounds_of(key, self.driver);
        let other = |than| report.rounds_of(key, than);
        let alone = || Spread::of(own.iter().map(|(_, value)| *value));
        let higher = report.higher_is_better(self.workload, self.metric);
        let (reached, limit, at_least, wanted) = match self.target {
            Target::TimesAsFast(limit, than) => (
                Spread::of(pairs(&own, &other(than), higher)),
                limit,
                true,
                format!("≥ {limit} × {than}"),
            ),
            TimesTheTime(limit, than) => (
                // Times: what counts here is how many times as long it took.
                Spread::of(pairs(&own, &other(than), true)),
                limit,
                false,
                format!("≤ {limit} × the time of {than}"),
            ),
            TimesTheBytes(limit, than) => (
                Spread::of(pairs(&own, &other(than), true)),
                limit,
                false,
                format!("≤ {limit} × the bytes of {than}"),
            ),
            AtLeast(limit) => (alone(), limit, true, format!("≥ {limit}")),
            AtMost(limit, unit) => (alone(), limit, false, format!("≤ {limit} {unit}")),
        };
        let kept = |id: &str| {
            let driver = report.drivers.iter().find(|driver| driver.about.id == id);
            driver.is_some_and(DriverReport::comparable)
        };
        let comparable = kept(self.driver) && self.beside().is_none_or(kept);
        let outcome = match reached {
            None => Outcome::NotMeasured,
            Some(_) if !comparable => Outcome::NotComparable,
            Some(reached) => outcome(reached, limit, at_least),
        };
        GoalResult {
            what: self.what,
            place: place.id.clone(),
            figure: format!("{}.{}", self.workload, self.metric),
            driver: self.driver,
            beside: self.beside(),
            wanted,
            reached,
            outcome,
        }
    }
}

fn outcome(reached: Spread, limit: f64, at_least: bool) -> Outcome {
    let good = |value: f64| {
        if at_least {
            value >= limit
        } else {
            value <= limit
        }
    };
    let proven = reached.rounds >= 3;
    match (good(reached.low), good(reached.high), good(reached.median)) {
        (true, true, _) if proven => Outcome::Met,
        (false, false, _) if proven => Outcome::Missed,
        (_, _, true) => Outcome::NoiseMet,
        (_, _, false) => Outcome::NoiseMissed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;
    use crate::{driver, workload};

    #[test]
    fn every_goal_names_a_figure_and_drivers_that_exist() {
        let workloads = workload::all();
        let drivers = driver::all(std::path::Path::new("vellum"), &[], &[]).unwrap();
        for goal in GOALS {
            let workload = workloads.iter().find(|w| w.id() == goal.workload);
            let workload = workload.unwrap_or_else(|| panic!("{}", goal.workload));
            let metrics = workload.metrics();
            assert!(
                metrics.iter().any(|metric| metric.id == goal.metric),
                "{goal:?}"
            );
            for id in goal.drivers() {
                let driver = drivers
                    .iter()
                    .find(|driver| driver.about().id == id)
                    .unwrap();
                assert_eq!(driver.about().kind, workload.kind(), "{goal:?}");
            }
        }
    }

    #[test]
    fn a_goal_is_met_or_missed_in_every_round_and_else_noise() {
        let of = |low, median, high, rounds| Spread {
            low,
            median,
            high,
            rounds,
        };
        assert_eq!(outcome(of(1.2, 1.3, 1.4, 5), 1.2, true), Outcome::Met);
        assert_eq!(outcome(of(1.0, 1.1, 1.19, 5), 1.2, true), Outcome::Missed);
        assert_eq!(outcome(of(1.0, 1.3, 1.4, 5), 1.2, true), Outcome::NoiseMet);
        assert_eq!(
            outcome(of(1.0, 1.1, 1.4, 5), 1.2, true),
            Outcome::NoiseMissed
        );
        assert_eq!(outcome(of(2.0, 2.0, 2.0, 2), 1.2, true), Outcome::NoiseMet);
        assert_eq!(outcome(of(40.0, 50.0, 60.0, 3), 60.0, false), Outcome::Met);
        assert_eq!(
            outcome(of(61.0, 65.0, 70.0, 3), 60.0, false),
            Outcome::Missed
        );
    }

    #[test]
    fn the_goals_of_a_place_are_judged_by_pairs_of_one_round() {
        let results = goals(&example());
        let of = |figure: &str, beside| {
            let mut found = results
                .iter()
                .filter(|goal| goal.figure == figure && goal.beside == Some(beside));
            found.next().unwrap()
        };
        // 1.02 × raw in each round, though the machine gets slower from round to round.
        let first = of("fio-fsync.first", "raw");
        assert_eq!(first.wanted, "≥ 1.2 × raw");
        let reached = first.reached.unwrap();
        assert!((reached.low - 1.02).abs() < 1e-9 && (reached.high - 1.02).abs() < 1e-9);
        assert_eq!(first.outcome, Outcome::Missed);
        assert_eq!(
            of("nbd.read4k", "nbdkit-file").outcome,
            Outcome::NotMeasured
        );
        // On a disk the goals for memory are no question.
        let fsync = results.iter().filter(|g| g.figure == "fio-fsync.first");
        assert_eq!(fsync.count(), 2);
    }
}
