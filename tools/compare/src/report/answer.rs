//! What the figures say, in sentences: for each driver, and for each use. All of it follows from the
//! figures of the run by the rules here.

use super::words::{bytes, sentence, times};
use super::{DriverReport, Place, Report};
use crate::driver::{self, Kind};
use crate::stats::{FEWEST, LEVEL, Ratio, Verdict, geometric_mean, pairs};

/// A workload that readers quote: two of its figures stand in the chart.
#[derive(Debug)]
pub struct Headline {
    /// Of the workload.
    pub workload: &'static str,
    /// Above its chart.
    pub title: &'static str,
    /// The figure of the first touch.
    pub first: &'static str,
    /// The figure of all that follows.
    pub then: &'static str,
    /// What the two are called.
    pub called: (&'static str, &'static str),
}

const fn headline(
    workload: &'static str,
    title: &'static str,
    (first, then): (&'static str, &'static str),
    called: (&'static str, &'static str),
) -> Headline {
    Headline {
        workload,
        title,
        first,
        then,
        called,
    }
}

/// The six, in the order of the chart.
pub const HEADLINES: [Headline; 6] = [
    headline(
        "first-write",
        "Write into a large file",
        ("first", "second"),
        ("first", "then"),
    ),
    headline(
        "fio-fsync",
        "Random writes, fsync each",
        ("first", "steady"),
        ("first", "then"),
    ),
    headline(
        "fio-buffered",
        "Random writes, buffered",
        ("first", "steady"),
        ("first", "then"),
    ),
    headline(
        "fio-read",
        "Random reads",
        ("cold", "warm"),
        ("cold", "warm"),
    ),
    headline(
        "sqlite-wal",
        "SQLite commits",
        ("first", "steady"),
        ("first", "then"),
    ),
    headline(
        "pgbench",
        "PostgreSQL, pgbench",
        ("first30", "steady"),
        ("first", "then"),
    ),
];

/// Writes once a container has touched what it writes.
const STEADY: [(&str, &str); 4] = [
    ("fio-fsync", "steady"),
    ("fio-buffered", "steady"),
    ("sqlite-wal", "steady"),
    ("pgbench", "steady"),
];
/// First touches of small places.
const FIRST: [(&str, &str); 4] = [
    ("fio-fsync", "first"),
    ("fio-buffered", "first"),
    ("sqlite-wal", "first"),
    ("pgbench", "first30"),
];

/// As many times the time of a plain file as a copy of a large file shows in.
const COPIES: f64 = 3.0;
/// As many times as a reader should hear of.
const SLOW: f64 = 1.5;

/// What there is to say of a driver.
#[derive(Debug, PartialEq, Eq)]
pub struct Sentence {
    /// The driver.
    pub driver: &'static str,
    /// For people.
    pub title: &'static str,
    /// The sentence.
    pub says: String,
    /// It kept what it acknowledged.
    pub comparable: bool,
}

/// A sentence for each driver that is no reference.
pub fn sentences(report: &Report, place: &Place) -> Vec<Sentence> {
    let drivers = report.drivers.iter();
    let drivers = drivers.filter(|driver| driver.about.kind == Kind::Files);
    drivers
        .filter(|driver| !driver.is_reference())
        .map(|driver| Sentence {
            driver: driver.about.id,
            title: driver.about.title,
            says: sentence(&says(report, place, driver)) + ".",
            comparable: driver.comparable(),
        })
        .collect()
}

fn says(report: &Report, place: &Place, driver: &DriverReport) -> String {
    if let Some(reason) = &driver.absent {
        return format!("not on this host: {reason}");
    }
    match &driver.flush {
        Some(flush) if !flush.passed => {
            return format!(
                "loses what it acknowledged as durable ({}), so its speed is compared with nothing",
                flush.detail
            );
        }
        None => return "not checked for durability, so its speed is compared with nothing".into(),
        Some(_) => {}
    }
    let clauses: Vec<String> = [
        first_write(report, place, driver),
        first_touches(report, place, driver),
        steady(report, place, driver),
        cold_reads(report, place, driver),
    ]
    .into_iter()
    .flatten()
    .collect();
    if clauses.is_empty() {
        return "not measured".to_owned();
    }
    let few = few_rounds(report, place, driver);
    let doubt = if few {
        " (too few rounds to be sure)"
    } else {
        ""
    };
    format!("{}{doubt}", clauses.join("; "))
}

/// Whether one of the figures that sentences are made of has too few rounds for an interval.
fn few_rounds(report: &Report, place: &Place, driver: &DriverReport) -> bool {
    let figures = HEADLINES
        .iter()
        .flat_map(|h| [(h.workload, h.first), (h.workload, h.then)]);
    let mut rounds = figures
        .filter_map(|(w, m)| report.find(&place.id, w, m, driver.about.id)?.ratio)
        .map(|ratio| ratio.rounds);
    rounds.any(|rounds| rounds < FEWEST)
}

/// Whether it copies a large file, by the time and the space that 4 KiB into it take.
fn first_write(report: &Report, place: &Place, driver: &DriverReport) -> Option<String> {
    let find = |metric| report.find(&place.id, "first-write", metric, driver.about.id);
    let found = find("first")?;
    let time = 1.0 / found.ratio?.mean;
    let size = report.sizes.large_file;
    let space = find("space").map(|space| space.value.median * 1e6);
    let copied = space.is_some_and(|space| space >= size as f64 / 2.0);
    let size = bytes(size);
    Some(if time >= COPIES && copied {
        format!(
            "copies a {size} file whole at its first write: {} × the time",
            times(time)
        )
    } else if copied {
        "has a whole copy of every file from the start".to_owned()
    } else if time >= SLOW && found.verdict == Some(Verdict::Slower) {
        let time = times(time);
        format!("copies no large file, and its first write to one takes {time} × the time")
    } else {
        "copies no large file at its first write".to_owned()
    })
}

/// Nothing where a copy is at hand from the start: nothing is touched first then.
fn first_touches(report: &Report, place: &Place, driver: &DriverReport) -> Option<String> {
    let ratio = together(report, place, driver, &FIRST)?;
    let steady = together(report, place, driver, &STEADY)?;
    let differ = (ratio.mean / steady.mean).ln().abs() > 1.1_f64.ln();
    // Of two that nobody can tell from a plain file one clause is enough.
    (differ && (told(ratio) || told(steady)))
        .then(|| format!("small first touches {}", beside(ratio)))
}

fn steady(report: &Report, place: &Place, driver: &DriverReport) -> Option<String> {
    let ratio = together(report, place, driver, &STEADY)?;
    let own = combined(report, place, driver, &STEADY);
    let others: Vec<Option<Ratio>> = rivals(report, driver)
        .map(|other| against(&own, &combined(report, place, other, &STEADY)))
        .filter(Option::is_some)
        .collect();
    let beats = |other: &Option<Ratio>| other.is_some_and(|ratio| ratio.above_one());
    let leads = |other: &Option<Ratio>| other.is_some_and(|ratio| ratio.mean >= 1.0);
    Some(
        if others.iter().all(beats) && ratio.above_one() && !others.is_empty() {
            format!("then fastest of all ({} × a plain file)", times(ratio.mean))
        } else if others.iter().all(leads) && ratio.mean >= 1.0 && !others.is_empty() {
            let times = times(ratio.mean);
            format!("then among the fastest ({times} × a plain file)")
        } else {
            format!("then {}", beside(ratio))
        },
    )
}

fn cold_reads(report: &Report, place: &Place, driver: &DriverReport) -> Option<String> {
    let found = report.find(&place.id, "fio-read", "cold", driver.about.id)?;
    let ratio = found.ratio?;
    let noise = found.verdict == Some(Verdict::Noise) && ratio.interval.is_some();
    Some(if noise {
        "cold reads not told apart from a plain file's".to_owned()
    } else {
        format!("cold reads {} × as fast", times(ratio.mean))
    })
}

/// “0.80 × as fast as a plain file”, or that the two are not told apart.
fn beside(ratio: Ratio) -> String {
    if told(ratio) {
        format!("{} × as fast as a plain file", times(ratio.mean))
    } else {
        "not told apart from a plain file".to_owned()
    }
}

/// Whether there is something to say of it: it lies on one side, or is a point without an interval.
fn told(ratio: Ratio) -> bool {
    ratio.above_one() || ratio.below_one() || ratio.interval.is_none()
}

/// The other drivers whose speed may be compared.
fn rivals<'a>(
    report: &'a Report,
    driver: &'a DriverReport,
) -> impl Iterator<Item = &'a DriverReport> {
    report.drivers.iter().filter(move |other| {
        let (a, b) = (&other.about, &driver.about);
        a.kind == b.kind && a.id != b.id && other.comparable() && !other.is_reference()
    })
}

/// Values by their rounds.
type Rounds = Vec<(usize, f64)>;

/// For each round, the geometric mean of the ratios to the reference of those figures that the reference
/// has here. A round in which the driver lacks one of them does not count: what remains would be of
/// other work than the others' is.
fn combined(
    report: &Report,
    place: &Place,
    driver: &DriverReport,
    figures: &[(&str, &str)],
) -> Rounds {
    let reference = driver::reference(driver.about.kind);
    let measured = figures.iter().filter(|(workload, metric)| {
        report
            .find(&place.id, workload, metric, reference)
            .is_some()
    });
    let measured: Vec<&(&str, &str)> = measured.collect();
    let of_round = |round: usize| {
        let ratios = measured
            .iter()
            .map(|(workload, metric)| report.ratio_in(&place.id, workload, metric, driver, round));
        let ratios: Vec<f64> = ratios.collect::<Option<_>>()?;
        Some((round, geometric_mean(ratios)?))
    };
    (0..report.rounds).filter_map(of_round).collect()
}

/// The values without their rounds.
fn values(rounds: &[(usize, f64)]) -> Vec<f64> {
    rounds.iter().map(|(_, value)| *value).collect()
}

fn together(
    report: &Report,
    place: &Place,
    driver: &DriverReport,
    figures: &[(&str, &str)],
) -> Option<Ratio> {
    Ratio::of(&values(&combined(report, place, driver, figures)), LEVEL)
}

/// One driver over another, round by round.
fn against(own: &[(usize, f64)], other: &[(usize, f64)]) -> Option<Ratio> {
    Ratio::of(&pairs(own, other, true), LEVEL)
}

/// Something that people use containers for, and what did it best.
#[derive(Debug, PartialEq)]
pub struct Use {
    /// What for.
    pub what: &'static str,
    /// By which figures that is judged.
    pub by: &'static str,
    /// The best, and those that are not told from it, with their ratios to the reference.
    pub best: Vec<(&'static str, f64)>,
    /// With too few rounds to be sure.
    pub doubtful: bool,
}

type Judged = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

const USES: [Judged; 5] = [
    (
        "Large files that are changed in place: disk images, grown databases",
        "the first 4 KiB into a large file",
        &[("first-write", "first")],
    ),
    (
        "A database in a fresh container",
        "first touches of SQLite and PostgreSQL",
        &[("sqlite-wal", "first"), ("pgbench", "first30")],
    ),
    (
        "A database that has run for a while",
        "SQLite and PostgreSQL, steady",
        &[("sqlite-wal", "steady"), ("pgbench", "steady")],
    ),
    (
        "Builds and other work that writes much and syncs little",
        "buffered random writes, first and steady",
        &[("fio-buffered", "first"), ("fio-buffered", "steady")],
    ),
    (
        "Services that read",
        "cold random reads",
        &[("fio-read", "cold")],
    ),
];

/// What suits which use; uses without a figure are left out.
pub fn uses(report: &Report, place: &Place) -> Vec<Use> {
    let few = |figures: &[(&str, &str)]| {
        let mut rounds = figures.iter().filter_map(|(workload, metric)| {
            let found = report.find(&place.id, workload, metric, "raw")?;
            Some(found.value.rounds)
        });
        rounds.any(|rounds| rounds < FEWEST)
    };
    let uses = USES.iter().map(|(what, by, figures)| Use {
        what,
        by,
        best: best(report, place, figures),
        doubtful: few(figures),
    });
    uses.filter(|of| !of.best.is_empty()).collect()
}

fn best(report: &Report, place: &Place, figures: &[(&str, &str)]) -> Vec<(&'static str, f64)> {
    let drivers = report.present(Kind::Files).into_iter();
    let candidates = drivers.filter(|driver| driver.comparable() && !driver.is_reference());
    let mut all: Vec<(&'static str, Rounds, f64)> = candidates
        .filter_map(|driver| {
            let rounds = combined(report, place, driver, figures);
            let mean = geometric_mean(values(&rounds))?;
            Some((driver.about.title, rounds, mean))
        })
        .collect();
    all.sort_by(|(_, _, a), (_, _, b)| b.total_cmp(a));
    let Some((_, first, _)) = all.first().cloned() else {
        return Vec::new();
    };
    // Those that nothing tells from the best, and that are not far off by their means either.
    let near = |rounds: &[(usize, f64)], mean: f64, most: f64| {
        let told = against(&first, rounds).is_some_and(|ratio| ratio.above_one());
        !told && mean * SLOW >= most
    };
    let most = all.first().map_or(1.0, |(_, _, mean)| *mean);
    all.iter()
        .filter(|(_, rounds, mean)| near(rounds, *mean, most))
        .map(|(title, _, mean)| (*title, *mean))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{add, empty};

    /// overlayfs copies and is the fastest then; vellum copies nothing; copy has all from the start.
    fn measured() -> Report {
        let mut report = empty();
        let three = |value: f64| [value, value * 1.01, value * 0.99];
        for (driver, first_ms, space_mb, first, steady) in [
            ("raw", 2.0, 1100.0, 1000.0, 1000.0),
            ("raw-again", 2.0, 1100.0, 1000.0, 1000.0),
            ("overlayfs", 1000.0, 1100.0, 300.0, 2000.0),
            ("vellum", 2.2, 1.0, 700.0, 900.0),
            ("copy", 2.0, 1100.0, 1000.0, 1000.0),
            ("btrfs", 2.0, 1.0, 9000.0, 9000.0),
        ] {
            add(
                &mut report,
                ("first-write", "first"),
                driver,
                &three(first_ms),
            );
            add(&mut report, ("first-write", "space"), driver, &[space_mb]);
            for (workload, metric) in FIRST {
                add(&mut report, (workload, metric), driver, &three(first));
            }
            for (workload, metric) in STEADY {
                add(&mut report, (workload, metric), driver, &three(steady));
            }
        }
        report.summarise();
        report
    }

    fn of<'a>(all: &'a [Sentence], driver: &str) -> &'a str {
        &all.iter().find(|s| s.driver == driver).unwrap().says
    }

    #[test]
    fn who_copies_a_file_is_told_by_its_time_and_its_space() {
        let report = measured();
        let all = sentences(&report, &report.places[0]);
        let overlay = of(&all, "overlayfs");
        assert!(
            overlay.starts_with("Copies a 1 GiB file whole at its first write: 500 × the time; "),
            "{overlay}"
        );
        assert!(
            overlay.ends_with("then fastest of all (2.0 × a plain file)."),
            "{overlay}"
        );
        assert!(of(&all, "vellum").starts_with("Copies no large file at its first write; "));
        assert!(of(&all, "copy").starts_with("Has a whole copy of every file from the start; "));
    }

    #[test]
    fn first_touches_are_told_where_they_differ_from_what_follows() {
        let report = measured();
        let all = sentences(&report, &report.places[0]);
        assert!(of(&all, "vellum").contains("small first touches 0.70 × as fast as a plain file"));
        assert!(of(&all, "vellum").contains("then 0.90 × as fast"));
        assert!(!of(&all, "copy").contains("first touches"));
    }

    #[test]
    fn who_lost_data_is_compared_with_nothing_and_takes_no_first_place() {
        let report = measured();
        let all = sentences(&report, &report.places[0]);
        let btrfs = of(&all, "btrfs");
        assert_eq!(
            btrfs,
            "Loses what it acknowledged as durable (3 of 16 flushed pieces were lost), so its speed \
             is compared with nothing."
        );
        assert!(of(&all, "qcow2").starts_with("Not on this host: qemu <is> not here"));
        let uses = uses(&report, &report.places[0]);
        assert!(
            uses.iter()
                .all(|of| of.best.iter().all(|(title, _)| *title != "btrfs"))
        );
    }

    #[test]
    fn a_round_counts_only_with_all_figures_and_beside_the_same_round() {
        let mut report = measured();
        // What vellum lacks in one round makes no mean of other work.
        report
            .samples
            .retain(|s| (s.driver, &*s.workload, s.round) != ("vellum", "pgbench", 1));
        report.summarise();
        let (place, drivers) = (&report.places[0], &report.drivers);
        let driver = |id| drivers.iter().find(|driver| driver.about.id == id).unwrap();
        let own = combined(&report, place, driver("vellum"), &STEADY);
        let rounds: Vec<usize> = own.iter().map(|(round, _)| *round).collect();
        assert_eq!(rounds, [0, 2]);
        let other = combined(&report, place, driver("overlayfs"), &STEADY);
        assert_eq!(against(&own, &other).unwrap().rounds, 2);
    }

    #[test]
    fn one_round_is_in_doubt_and_noise_is_no_difference() {
        let mut report = measured();
        report.samples.retain(|sample| sample.round == 0);
        report.summarise();
        let all = sentences(&report, &report.places[0]);
        assert!(of(&all, "vellum").ends_with("(too few rounds to be sure)."));
        let uses = uses(&report, &report.places[0]);
        assert!(!uses.is_empty() && uses.iter().all(|of| of.doubtful));
        let noise = Ratio {
            mean: 0.8,
            interval: Some([0.5, 1.3]),
            rounds: 3,
        };
        assert_eq!(beside(noise), "not told apart from a plain file");
    }

    #[test]
    fn the_best_for_a_use_are_those_that_nothing_tells_apart() {
        let report = measured();
        let uses = uses(&report, &report.places[0]);
        let best = |what: &str| {
            let of = uses.iter().find(|of| of.what.contains(what)).unwrap();
            of.best.iter().map(|(title, _)| *title).collect::<Vec<_>>()
        };
        assert_eq!(best("run for a while"), ["overlayfs"]);
        assert_eq!(best("fresh container"), ["full copy"]);
        assert_eq!(best("Large files"), ["full copy"]);
    }

    #[test]
    fn every_headline_names_figures_that_exist() {
        let report = empty();
        assert_eq!(report.workloads.len(), HEADLINES.len());
        let pairs = HEADLINES
            .iter()
            .flat_map(|h| [(h.workload, h.first), (h.workload, h.then)]);
        let used = USES
            .iter()
            .flat_map(|(_, _, figures)| figures.iter().copied());
        for (workload, metric) in pairs.chain(used).chain(FIRST).chain(STEADY) {
            assert!(
                report.metric(workload, metric).is_some(),
                "{workload}.{metric}"
            );
        }
    }
}
