//! What a run has found, as data; the modules below say what it means and show it.

mod answer;
mod beside;
pub mod calm;
mod chart;
mod cost;
pub mod files;
mod goal_table;
pub mod goals;
mod head;
mod html;
mod overview;
mod section;
mod words;

use serde::Serialize;

use crate::driver::{self, About, Kind};
use crate::durability::Flush;
use crate::stats::{LEVEL, Ratio, Spread, Verdict, pairs, verdict};
use crate::workload::{Better, Metric, Sizes};

/// The form of report.json; docs/comparing.md has it.
pub const FORMAT: u32 = 2;

/// Everything.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// The command that was run.
    pub command: String,
    /// When it began (RFC 3339).
    pub started: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// How long it was allowed to take, in seconds; none without a limit.
    pub limit: Option<f64>,
    /// Why it ended before its end; none when it did not. What was measured until then is here.
    pub cut_short: Option<String>,
    /// The host.
    pub host: Host,
    /// How much was done.
    pub sizes: Sizes,
    /// Rounds that were wanted.
    pub rounds: usize,
    /// Directories that were measured.
    pub places: Vec<Place>,
    /// Drivers.
    pub drivers: Vec<DriverReport>,
    /// Workloads.
    pub workloads: Vec<WorkloadReport>,
    /// Each figure of each run.
    pub samples: Vec<Sample>,
    /// pgbench's transactions a second.
    pub curves: Vec<Curve>,
    /// How long transactions took, from the first one on.
    pub latencies: Vec<Latency>,
    /// Where a container's blocks lie (SVG) after pgbench, from drivers that draw it.
    #[serde(skip)]
    pub pictures: Vec<(String, String)>,
    /// How long each piece of work took, with all that is around what is measured.
    pub took: Vec<Took>,
    /// Runs that failed.
    pub failures: Vec<Failure>,
    /// What was not done, and why.
    pub left_out: Vec<String>,
    /// The figures over the rounds.
    pub summary: Vec<Summary>,
    /// The project's goals, each with the figure that answers it.
    pub goals: Vec<goals::GoalResult>,
}

/// The host.
#[derive(Debug, Default, Serialize)]
pub struct Host {
    /// Kernel release.
    pub kernel: String,
    /// Processor, and how many.
    pub processors: String,
    /// How many.
    pub processor_count: usize,
    /// Its processors are emulated.
    pub emulated: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// The mean number of running processes over a minute, at the start and at the end.
    pub load: Vec<f64>,
    /// The part of the processors' time that a host below took for others (0 to 1).
    pub steal: f64,
    /// Versions of the programs that do the work.
    pub versions: Vec<String>,
}

/// A directory that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Place {
    /// In the data.
    pub id: String,
    /// For people: its file system.
    pub title: String,
    /// The directory.
    pub dir: String,
    /// It is memory (a tmpfs) and no disk.
    pub in_memory: bool,
}

/// A driver.
#[derive(Debug, Serialize)]
pub struct DriverReport {
    /// What it is.
    #[serde(flatten)]
    pub about: About,
    /// Which version of it.
    pub version: Option<String>,
    /// Why this host has it not.
    pub absent: Option<String>,
    /// The flush check.
    pub flush: Option<Flush>,
}

/// A workload.
#[derive(Debug, Serialize)]
pub struct WorkloadReport {
    /// For `--workloads`.
    pub id: String,
    /// For headings.
    pub title: String,
    /// What it does.
    pub what: String,
    /// What its figures do not say.
    pub caveats: &'static str,
    /// One of the few that readers quote.
    pub headline: bool,
    /// For which drivers.
    pub kind: Kind,
    /// Its figures.
    pub metrics: Vec<Metric>,
}

/// One figure of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Of [`Place`].
    pub place: String,
    /// Of [`WorkloadReport`].
    pub workload: String,
    /// Of [`Metric`].
    pub metric: &'static str,
    /// Of [`About`].
    pub driver: &'static str,
    /// From 0.
    pub round: usize,
    /// The figure.
    pub value: f64,
}

/// Something a second, over a run.
#[derive(Debug, Serialize)]
pub struct Curve {
    /// Of [`Place`].
    pub place: String,
    /// Of [`WorkloadReport`].
    pub workload: String,
    /// Of [`About`].
    pub driver: &'static str,
    /// From 0.
    pub round: usize,
    /// One figure for each second.
    pub values: Vec<f64>,
}

/// How long transactions took, over a run.
#[derive(Debug, Serialize)]
pub struct Latency {
    /// Of [`Place`].
    pub place: String,
    /// Of [`WorkloadReport`].
    pub workload: String,
    /// Of [`About`].
    pub driver: &'static str,
    /// From 0.
    pub round: usize,
    /// Pieces of the run: each one's end in seconds, and the median and the 99th percentile of the
    /// transactions that ended in it, in milliseconds.
    pub pieces: Vec<[f64; 3]>,
}

/// How long something took.
#[derive(Debug, Serialize)]
pub struct Took {
    /// Of [`Place`].
    pub place: String,
    /// A workload, an image, the flush check.
    pub what: String,
    /// Of [`About`].
    pub driver: &'static str,
    /// In all.
    pub seconds: f64,
}

/// A run that failed.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Of [`Place`].
    pub place: String,
    /// Of [`WorkloadReport`], or what was prepared.
    pub workload: String,
    /// Of [`About`].
    pub driver: &'static str,
    /// Why.
    pub error: String,
}

/// A figure over the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Of [`Place`].
    pub place: String,
    /// Of [`WorkloadReport`].
    pub workload: String,
    /// Of [`Metric`].
    pub metric: &'static str,
    /// Of [`About`].
    pub driver: &'static str,
    /// The figure itself.
    pub value: Spread,
    /// How many times as fast as the reference, pair by pair; none for costs.
    pub ratio: Option<Ratio>,
    /// What the ratio says.
    pub verdict: Option<Verdict>,
    /// Its durability check was passed: the ratio compares like with like.
    pub comparable: bool,
}

impl DriverReport {
    /// Whether it is the reference, or that once more.
    pub fn is_reference(&self) -> bool {
        let about = &self.about;
        [driver::reference(about.kind), driver::control(about.kind)].contains(&about.id)
    }

    /// Whether it passed its durability check, so that its speed compares like with like. Who only
    /// pulls is not asked to keep anything.
    pub fn comparable(&self) -> bool {
        self.about.kind == Kind::Pull || self.flush.as_ref().is_some_and(|flush| flush.passed)
    }
}

impl Report {
    /// Makes the summary from the samples.
    pub fn summarise(&mut self) {
        let mut summary = Vec::new();
        for place in &self.places {
            for workload in &self.workloads {
                for metric in &workload.metrics {
                    for driver in &self.drivers {
                        let key = (&*place.id, &*workload.id, metric.id);
                        summary.extend(self.summary_of(key, workload.kind, metric, driver));
                    }
                }
            }
        }
        self.format = FORMAT;
        self.summary = summary;
        self.goals = goals::goals(self);
    }

    /// Notes how long something took.
    pub fn took(&mut self, place: &str, what: &str, driver: &'static str, seconds: f64) {
        self.took.push(Took {
            place: place.to_owned(),
            what: what.to_owned(),
            driver,
            seconds,
        });
    }

    /// The ratios of single rounds to the reference, of a figure that is no cost.
    pub fn pairs(
        &self,
        place: &str,
        workload: &str,
        metric: &str,
        driver: &DriverReport,
    ) -> Vec<f64> {
        let key = (place, workload, metric);
        let values = self.rounds_of(key, driver.about.id);
        let base = self.rounds_of(key, driver::reference(driver.about.kind));
        pairs(&values, &base, self.higher_is_better(workload, metric))
    }

    /// The ratio of one round to the reference's, of a figure that is no cost.
    pub fn ratio_in(
        &self,
        place: &str,
        workload: &str,
        metric: &str,
        driver: &DriverReport,
        round: usize,
    ) -> Option<f64> {
        let key = (place, workload, metric);
        let mut values = self.rounds_of(key, driver.about.id);
        values.retain(|(other, _)| *other == round);
        let base = self.rounds_of(key, driver::reference(driver.about.kind));
        let higher = self.higher_is_better(workload, metric);
        pairs(&values, &base, higher).first().copied()
    }

    /// The drivers of a kind that gave figures, in order.
    pub fn present(&self, kind: Kind) -> Vec<&DriverReport> {
        let gave = |driver: &&DriverReport| {
            let id = driver.about.id;
            driver.about.kind == kind && self.samples.iter().any(|sample| sample.driver == id)
        };
        self.drivers.iter().filter(gave).collect()
    }

    fn metric(&self, workload: &str, metric: &str) -> Option<&Metric> {
        let workload = self.workloads.iter().find(|w| w.id == workload)?;
        workload.metrics.iter().find(|m| m.id == metric)
    }

    fn higher_is_better(&self, workload: &str, metric: &str) -> bool {
        self.metric(workload, metric)
            .is_none_or(|metric| metric.better == Better::Higher)
    }

    fn rounds_of(&self, key: (&str, &str, &str), driver: &str) -> Vec<(usize, f64)> {
        let matching = self.samples.iter().filter(|sample| {
            (&*sample.place, &*sample.workload, sample.metric) == key && sample.driver == driver
        });
        matching
            .map(|sample| (sample.round, sample.value))
            .collect()
    }

    fn summary_of(
        &self,
        key: (&str, &str, &str),
        kind: Kind,
        metric: &Metric,
        driver: &DriverReport,
    ) -> Option<Summary> {
        let values = self.rounds_of(key, driver.about.id);
        let value = Spread::of(values.iter().map(|(_, value)| *value))?;
        let reference = driver::reference(kind);
        let higher = metric.better == Better::Higher;
        let against = |values: &[(usize, f64)]| {
            let base = self.rounds_of(key, reference);
            pairs(values, &base, higher)
        };
        let ratio = (metric.better != Better::Cost && driver.about.id != reference)
            .then(|| Ratio::of(&against(&values), LEVEL))
            .flatten();
        let control = Spread::of(against(&self.rounds_of(key, driver::control(kind))));
        Some(Summary {
            place: key.0.to_owned(),
            workload: key.1.to_owned(),
            metric: metric.id,
            driver: driver.about.id,
            value,
            ratio,
            verdict: ratio.map(|ratio| {
                if driver.about.id == driver::control(kind) {
                    Verdict::Noise
                } else {
                    verdict(ratio, control)
                }
            }),
            comparable: driver.comparable(),
        })
    }

    /// A driver's line of the summary.
    pub fn find(
        &self,
        place: &str,
        workload: &str,
        metric: &str,
        driver: &str,
    ) -> Option<&Summary> {
        self.summary.iter().find(|summary| {
            summary.place == place
                && summary.workload == workload
                && summary.metric == metric
                && summary.driver == driver
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::workload;

    /// Adds the rounds of a figure.
    pub(crate) fn add(
        report: &mut Report,
        (workload, metric): (&str, &'static str),
        driver: &'static str,
        values: &[f64],
    ) {
        for (round, &value) in values.iter().enumerate() {
            report.samples.push(Sample {
                place: "disk".into(),
                workload: workload.into(),
                metric,
                driver,
                round,
                value,
            });
        }
    }

    /// A report without figures: the six workloads that readers quote, all drivers, of which btrfs
    /// fails its flush check and qcow2 is not there.
    pub(crate) fn empty() -> Report {
        let sizes = Sizes::new(false, 1, 1, "/".into());
        let workloads = workload::all();
        let workloads = workloads.iter().filter(|workload| workload.headline());
        let drivers = driver::all(std::path::Path::new("vellum"), &[], &[]).unwrap();
        Report {
            command: "compare".into(),
            started: "now".into(),
            rounds: 3,
            workloads: workloads
                .map(|workload| WorkloadReport {
                    id: workload.id(),
                    title: workload.title(),
                    what: workload.what(&sizes),
                    caveats: workload.caveats(),
                    headline: true,
                    kind: workload.kind(),
                    metrics: workload.metrics(),
                })
                .collect(),
            sizes,
            places: vec![Place {
                id: "disk".into(),
                title: "Disk (ext4)".into(),
                dir: "/x".into(),
                in_memory: false,
            }],
            drivers: drivers
                .iter()
                .map(|driver| {
                    let about = driver.about();
                    DriverReport {
                        about,
                        version: Some("1.0".into()),
                        absent: (about.id == "qcow2").then(|| "qemu <is> not here".to_owned()),
                        flush: Some(Flush {
                            passed: about.id != "btrfs",
                            detail: "3 of 16 flushed pieces were lost".into(),
                        }),
                    }
                })
                .collect(),
            left_out: vec!["MariaDB".into()],
            ..Report::default()
        }
    }

    /// A report of three rounds in which overlayfs is twice as fast as raw, though the machine
    /// gets slower from round to round, and btrfs fails its flush check.
    pub(crate) fn example() -> Report {
        let mut report = empty();
        report
            .workloads
            .retain(|workload| workload.id == "fio-fsync");
        for (driver, factors) in [
            ("raw", [1.0, 1.0, 1.0]),
            ("raw-again", [0.95, 1.0, 1.05]),
            ("overlayfs", [2.0, 2.0, 2.0]),
            ("btrfs", [9.0, 9.0, 9.0]),
            ("vellum", [1.02, 1.02, 1.02]),
        ] {
            let rounds = factors.iter().enumerate();
            let rounds: Vec<f64> = rounds
                .map(|(round, factor)| 1000.0 / (round + 1) as f64 * factor)
                .collect();
            add(&mut report, ("fio-fsync", "first"), driver, &rounds);
        }
        report.curves.push(Curve {
            place: "disk".into(),
            workload: "fio-fsync".into(),
            driver: "raw",
            round: 0,
            values: vec![1.0, 2.0, 3.0],
        });
        report.summarise();
        report
    }

    #[test]
    fn ratios_are_of_pairs_and_not_of_medians() {
        let report = example();
        let found = report
            .find("disk", "fio-fsync", "first", "overlayfs")
            .unwrap();
        let ratio = found.ratio.unwrap();
        assert!((ratio.mean - 2.0).abs() < 1e-9);
        assert!(
            ratio
                .interval
                .unwrap()
                .iter()
                .all(|end| (end - 2.0).abs() < 1e-9)
        );
        assert_eq!(found.verdict, Some(Verdict::Faster));
        assert!(found.comparable);
    }

    #[test]
    fn what_lies_within_the_reference_beside_itself_is_noise() {
        let report = example();
        let found = report.find("disk", "fio-fsync", "first", "vellum").unwrap();
        assert_eq!(found.verdict, Some(Verdict::Noise));
    }

    #[test]
    fn a_driver_that_failed_its_flush_check_is_measured_and_marked() {
        let report = example();
        let found = report.find("disk", "fio-fsync", "first", "btrfs").unwrap();
        assert!(found.ratio.is_some());
        assert!(!found.comparable);
    }

    #[test]
    fn costs_have_no_ratio_and_the_reference_none_to_itself() {
        let mut report = example();
        for driver in ["raw", "overlayfs"] {
            report.samples.push(Sample {
                place: "disk".into(),
                workload: "fio-fsync".into(),
                metric: "space",
                driver,
                round: 0,
                value: 5.0,
            });
        }
        report.summarise();
        let space = report
            .find("disk", "fio-fsync", "space", "overlayfs")
            .unwrap();
        assert_eq!(space.value.median, 5.0);
        assert_eq!(space.ratio, None);
        let raw = report.find("disk", "fio-fsync", "first", "raw").unwrap();
        assert_eq!(raw.ratio, None);
    }
}
