//! What became faster and slower from one report.json to another.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::driver::{self, Kind};
use crate::report::{FORMAT, Report};
use crate::stats::{FEWEST, LEVEL, Ratio, pairs};

/// What is read of a report.json.
#[derive(Debug, Deserialize)]
pub struct Run {
    format: Option<u32>,
    started: String,
    #[serde(default)]
    drivers: Vec<Driver>,
    #[serde(default)]
    workloads: Vec<Workload>,
    #[serde(default)]
    samples: Vec<Sample>,
}

#[derive(Debug, Deserialize)]
struct Driver {
    id: String,
    kind: String,
    flush: Option<Flush>,
}

#[derive(Debug, Deserialize)]
struct Flush {
    passed: bool,
}

#[derive(Debug, Deserialize)]
struct Workload {
    id: String,
    kind: String,
    metrics: Vec<Metric>,
}

#[derive(Debug, Deserialize)]
struct Metric {
    id: String,
    better: String,
}

#[derive(Debug, Deserialize)]
struct Sample {
    place: String,
    workload: String,
    metric: String,
    driver: String,
    round: usize,
    value: f64,
}

/// A figure of a driver: place, workload, metric, driver.
type Key = (String, String, String, String);

impl Run {
    /// From a file.
    ///
    /// # Errors
    /// When it is not there, or no report.json of this form.
    pub fn read(file: &Path) -> Result<Self> {
        let shown = file.display();
        let text = fs::read(file).with_context(|| format!("{shown}: cannot be read"))?;
        let run: Run = serde_json::from_slice(&text)
            .with_context(|| format!("{shown} is no report.json of this program"))?;
        ensure!(
            run.format == Some(FORMAT),
            "{shown} has the form {}, this program reads {FORMAT}: measure anew with this version",
            run.format
                .map_or_else(|| "1".to_owned(), |format| format.to_string())
        );
        Ok(run)
    }

    fn of(report: &Report) -> Result<Self> {
        Ok(serde_json::from_value(serde_json::to_value(report)?)?)
    }

    /// The ratios of single rounds to the reference, of each figure of each driver that passed its
    /// flush check.
    fn ratios(&self) -> BTreeMap<Key, Vec<f64>> {
        let mut rounds: BTreeMap<Key, Vec<(usize, f64)>> = BTreeMap::new();
        for sample in &self.samples {
            let s = sample;
            let key = (
                s.place.clone(),
                s.workload.clone(),
                s.metric.clone(),
                s.driver.clone(),
            );
            rounds.entry(key).or_default().push((s.round, s.value));
        }
        let mut ratios = BTreeMap::new();
        for (key, values) in &rounds {
            let (place, workload, metric, driver) = key;
            let Some((reference, higher)) = self.judged(workload, metric, driver) else {
                continue;
            };
            let base = (
                place.clone(),
                workload.clone(),
                metric.clone(),
                reference.to_owned(),
            );
            if let Some(base) = rounds.get(&base) {
                ratios.insert(key.clone(), pairs(values, base, higher));
            }
        }
        ratios
    }

    /// The reference of a figure, and whether more is better; none for costs, references, and drivers
    /// whose speed compares with nothing.
    fn judged(&self, workload: &str, metric: &str, driver: &str) -> Option<(&'static str, bool)> {
        let driver = self.drivers.iter().find(|d| d.id == driver)?;
        let kind = match &*driver.kind {
            "files" => Kind::Files,
            "nbd" => Kind::Nbd,
            "pull" => Kind::Pull,
            _ => return None,
        };
        let of_reference = [driver::reference(kind), driver::control(kind)];
        let passed = driver.flush.as_ref().is_some_and(|flush| flush.passed);
        let passed = passed || kind == Kind::Pull;
        let workload = self
            .workloads
            .iter()
            .find(|w| w.id == workload && w.kind == driver.kind)?;
        let metric = workload.metrics.iter().find(|m| m.id == metric)?;
        let judged = passed && !of_reference.contains(&&*driver.id) && metric.better != "cost";
        judged.then(|| (driver::reference(kind), metric.better == "higher"))
    }
}

/// A figure in two runs.
#[derive(Debug)]
struct Change {
    key: Key,
    /// The ratios to the reference, before and after.
    before: f64,
    after: f64,
    /// After ÷ before; below 1 is slower.
    change: Ratio,
}

/// Every figure that both runs have, with an interval of this level for its change.
fn changes(a: &Run, b: &Run, level: impl Fn(usize) -> f64) -> Vec<Change> {
    let (before, after) = (a.ratios(), b.ratios());
    let both: Vec<_> = before
        .into_iter()
        .filter_map(|(key, before)| Some((after.get(&key)?, key, before)))
        .collect();
    let level = level(both.len());
    let change = |(after, key, before): (&Vec<f64>, Key, Vec<f64>)| {
        Some(Change {
            before: Ratio::of(&before, LEVEL)?.mean,
            after: Ratio::of(after, LEVEL)?.mean,
            change: Ratio::quotient(after, &before, level)?,
            key,
        })
    };
    both.into_iter().filter_map(change).collect()
}

/// Prints what changed from one report.json to another.
///
/// # Errors
/// When one of them cannot be read, or they have no figure in common.
pub fn diff(a: &Path, b: &Path) -> Result<()> {
    let (first, second) = (Run::read(a)?, Run::read(b)?);
    let all = changes(&first, &second, |_| LEVEL);
    ensure!(
        !all.is_empty(),
        "{} and {} have no figure of the same driver, workload and directory",
        a.display(),
        b.display()
    );
    println!("A: {} ({})", a.display(), first.started);
    println!("B: {} ({})", b.display(), second.started);
    println!("Ratios to the plain file; B ÷ A with its 95 % interval, below 1 is slower.\n");
    println!(
        "{:52} {:>7} {:>7} {:>7}  interval",
        "figure", "A", "B", "B ÷ A"
    );
    for change in &all {
        println!("{}", line(change));
    }
    println!("\n{}", summary(&all));
    Ok(())
}

fn line(change: &Change) -> String {
    let (place, workload, metric, driver) = &change.key;
    let interval = match change.change.interval {
        Some([low, high]) => format!("{low:.2}–{high:.2}"),
        None => format!("fewer than {FEWEST} rounds"),
    };
    let said = if change.change.above_one() {
        " faster"
    } else if change.change.below_one() {
        " SLOWER"
    } else {
        ""
    };
    format!(
        "{:52} {:7.3} {:7.3} {:7.3}  {interval}{said}",
        format!("{driver} {workload}.{metric} {place}"),
        change.before,
        change.after,
        change.change.mean
    )
}

fn summary(all: &[Change]) -> String {
    let count = |of: fn(&Ratio) -> bool| all.iter().filter(|c| of(&c.change)).count();
    format!(
        "{} figures: {} faster, {} slower, the rest not told apart. Of that many figures {:.0} would \
         be told apart by chance.",
        all.len(),
        count(Ratio::above_one),
        count(Ratio::below_one),
        (all.len() as f64 * (1.0 - LEVEL)).ceil()
    )
}

/// Holds a run against an earlier one: whether a driver became slower by more than `tolerance` percent
/// in any figure. Said with 95 % confidence for all figures together (Bonferroni's correction).
///
/// # Errors
/// When they have no figure in common.
pub fn hold(baseline: &Run, report: &Report, tolerance: f64) -> Result<bool> {
    let run = Run::of(report)?;
    let all = changes(baseline, &run, |figures| {
        1.0 - (1.0 - LEVEL) / figures.max(1) as f64
    });
    ensure!(
        !all.is_empty(),
        "the baseline and this run have no figure of the same driver, workload and directory: \
         measure the baseline with the same options"
    );
    let allowed = 1.0 - tolerance / 100.0;
    let slower: Vec<&Change> = all
        .iter()
        .filter(|change| is_slower(change, allowed))
        .collect();
    for change in &slower {
        println!("slower than the baseline: {}", line(change));
    }
    let undecided = all
        .iter()
        .filter(|change| change.change.interval.is_none())
        .count();
    println!(
        "baseline: {} of {} figures slower by more than {tolerance} %, {undecided} with too few rounds \
         to say",
        slower.len(),
        all.len()
    );
    Ok(!slower.is_empty())
}

fn is_slower(change: &Change, allowed: f64) -> bool {
    let interval = change.change.interval;
    interval.is_some_and(|[_, high]| high < allowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{add, empty};

    /// vellum at this many times raw, with a little noise; raw gets slower from round to round.
    fn report(ratio: f64) -> Report {
        let mut report = empty();
        let raw = [1000.0, 500.0, 800.0, 900.0, 700.0];
        let noise = [1.0, 1.01, 0.99, 1.005, 0.995];
        let own: Vec<f64> = raw
            .iter()
            .zip(noise)
            .map(|(raw, n)| raw * ratio * n)
            .collect();
        let lost: Vec<f64> = raw.iter().map(|raw| raw * ratio).collect();
        add(&mut report, ("fio-fsync", "steady"), "raw", &raw);
        add(&mut report, ("fio-fsync", "steady"), "raw-again", &raw);
        add(&mut report, ("fio-fsync", "steady"), "vellum", &own);
        add(&mut report, ("fio-fsync", "steady"), "btrfs", &lost);
        add(
            &mut report,
            ("fio-fsync", "space"),
            "vellum",
            &[1.0, 1.0, 1.0],
        );
        report.summarise();
        report
    }

    fn run(ratio: f64) -> Run {
        Run::of(&report(ratio)).unwrap()
    }

    #[test]
    fn only_speeds_of_drivers_that_kept_their_data_are_compared() {
        let all = changes(&run(1.0), &run(0.5), |_| LEVEL);
        assert_eq!(all.len(), 1, "no reference, no cost, not btrfs: {all:?}");
        let change = &all[0];
        assert_eq!(change.key.3, "vellum");
        assert!((change.change.mean - 0.5).abs() < 0.01 && change.change.below_one());
        assert!(line(change).contains("vellum fio-fsync.steady disk"));
        assert!(line(change).ends_with(" SLOWER"));
        assert!(summary(&all).starts_with("1 figures: 0 faster, 1 slower"));
    }

    #[test]
    fn a_baseline_is_broken_by_what_is_slower_beyond_its_tolerance_alone() {
        assert!(hold(&run(1.0), &report(0.5), 10.0).unwrap());
        assert!(!hold(&run(1.0), &report(0.95), 10.0).unwrap());
        assert!(!hold(&run(1.0), &report(2.0), 10.0).unwrap());
        assert!(!hold(&run(1.0), &report(1.0), 0.0).unwrap());
    }

    #[test]
    fn two_rounds_break_no_baseline() {
        let mut now = report(0.5);
        now.samples.retain(|sample| sample.round < 2);
        assert!(!hold(&run(1.0), &now, 10.0).unwrap());
    }

    #[test]
    fn runs_that_have_nothing_in_common_are_an_error() {
        let mut other = report(1.0);
        for sample in &mut other.samples {
            sample.place = "elsewhere".to_owned();
        }
        let error = hold(&run(1.0), &other, 10.0).unwrap_err();
        assert!(format!("{error}").contains("same options"));
    }

    #[test]
    fn what_is_no_report_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.json");
        assert!(format!("{:#}", Run::read(&file).unwrap_err()).contains("x.json"));
        fs::write(&file, "{").unwrap();
        assert!(format!("{:#}", Run::read(&file).unwrap_err()).contains("is no report.json"));
        fs::write(&file, "{\"started\": \"then\"}").unwrap();
        assert!(format!("{:#}", Run::read(&file).unwrap_err()).contains("measure anew"));
        let good = serde_json::to_string(&report(1.0)).unwrap();
        fs::write(&file, good).unwrap();
        assert!(Run::read(&file).is_ok());
    }
}
