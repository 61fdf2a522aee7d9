//! The order of things: durability, then every workload through every driver, round by round.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tempfile::TempDir;

use crate::driver::{self, Base, Driver, Image, Kind};
use crate::durability;
use crate::host::{self, interrupted};
use crate::report::{
    Curve, DriverReport, Failure, Latency, Place, Report, Sample, WorkloadReport, goals,
};
use crate::schedule::{Budget, Rounds};
use crate::workload::{BaseKind, Measured, Run, Sizes, Workload, make_base};

/// What to measure.
pub struct Plan {
    /// Through which.
    pub drivers: Vec<Box<dyn Driver>>,
    /// What.
    pub workloads: Vec<Box<dyn Workload>>,
    /// How often.
    pub rounds: usize,
    /// Where.
    pub dirs: Vec<PathBuf>,
    /// How much.
    pub sizes: Sizes,
    /// When to begin nothing new.
    pub end: Option<Instant>,
    /// Keeps what has been measured so far.
    pub save: Box<dyn Fn(&mut Report)>,
}

/// Shows how far it is, on a terminal; lines for what went wrong.
struct Progress {
    bars: MultiProgress,
    bar: ProgressBar,
}

impl Progress {
    fn new(steps: usize) -> Self {
        let bars = MultiProgress::new();
        let bar = bars.add(ProgressBar::new(steps as u64));
        let style = "{bar:30} {pos}/{len} {elapsed} (about {eta} left) {msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Progress { bars, bar }
    }

    fn note(&self, line: &str) {
        if self.bars.is_hidden() {
            eprintln!("{line}");
        } else {
            drop(self.bars.println(line));
        }
    }
}

/// Does all of it. What fails is noted in the report and stops nothing else.
///
/// # Errors
/// When there is nothing to measure on, or the user interrupts.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("vcx").tempdir()?;
    for workload in &plan.workloads {
        report.workloads.push(WorkloadReport {
            id: workload.id(),
            title: workload.title(),
            what: workload.what(&plan.sizes),
            caveats: workload.caveats(),
            headline: workload.headline(),
            kind: workload.kind(),
            metrics: workload.metrics(),
        });
        if let Some(reason) = workload.absent(&plan.sizes) {
            report
                .left_out
                .push(format!("{}: {reason}", workload.title()));
        }
    }
    let runs = plan
        .workloads
        .iter()
        .map(|w| {
            plan.drivers
                .iter()
                .filter(|d| d.about().kind == w.kind())
                .count()
        })
        .sum::<usize>();
    let steps = plan.drivers.len() + runs * plan.rounds * plan.dirs.len();
    let progress = Progress::new(steps);
    let first = plan.dirs.first().context("no directory to measure in")?;
    check_durability(plan, report, &work_dir(first)?, &progress)?;
    let there = plan.workloads.iter();
    let there = there.filter(|workload| workload.absent(&plan.sizes).is_none());
    let weight: f64 = there.map(|workload| workload.share()).sum();
    for (number, dir) in plan.dirs.iter().enumerate() {
        let mut budget = Budget::new(plan.end, plan.dirs.len() - number, weight);
        let place = report
            .places
            .iter()
            .find(|place| Path::new(&place.dir) == dir);
        let place = place.context("a directory without a name")?.clone();
        let work = work_dir(dir)?;
        let sizes = fit(&plan.sizes, &place, report);
        let at = At {
            place: &place,
            work: work.path(),
            scratch: scratch.path(),
            sizes: &sizes,
            progress: &progress,
        };
        measure(plan, report, at, &mut budget)?;
    }
    progress.bar.finish_and_clear();
    Ok(())
}

/// Sizes for a place: a database in memory takes its size several times over, once for each driver
/// that copies, and the host needs some of its memory for itself.
fn fit(sizes: &Sizes, place: &Place, report: &mut Report) -> Sizes {
    let mut sizes = sizes.clone();
    let fits = host::available_memory() / 2 / 8 / (16 << 20);
    let fits = u32::try_from(fits).unwrap_or(u32::MAX).max(1);
    if place.in_memory && sizes.pg_scale > fits {
        report.left_out.push(format!(
            "pgbench in {}: scale {fits} instead of {}, since memory is not larger",
            place.dir, sizes.pg_scale
        ));
        sizes.pg_scale = fits;
    }
    sizes
}

/// A directory of our own. Its path is short: sockets lie below it.
fn work_dir(dir: &Path) -> Result<TempDir> {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new()
        .prefix("vc")
        // PostgreSQL's user has to pass through.
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(dir)
        .with_context(|| dir.display().to_string())
}

/// Those that say most first, as far as there is time: what took so long for one takes so long for
/// the next.
fn check_durability(
    plan: &Plan,
    report: &mut Report,
    work: &TempDir,
    progress: &Progress,
) -> Result<()> {
    let mut longest = Duration::ZERO;
    let mut unchecked = Vec::new();
    for driver in &plan.drivers {
        let about = driver.about();
        progress
            .bar
            .set_message(format!("flush check: {}", about.title));
        let absent = driver.absent();
        let mut flush = None;
        let time = plan.end.is_none_or(|end| Instant::now() + longest < end);
        let checked = absent.is_none() && about.kind != Kind::Pull;
        if checked && !time {
            unchecked.push(about.id);
        } else if checked {
            let start = Instant::now();
            match durability::check(driver.as_ref(), work.path()) {
                Ok(found) => flush = Some(found),
                Err(_) if host::out_of_time() => unchecked.push(about.id),
                Err(error) => {
                    stop_if_interrupted()?;
                    fail(report, progress, ("-", "flush check", about.id), &error);
                }
            }
            longest = longest.max(start.elapsed());
            let seconds = start.elapsed().as_secs_f64();
            report.took("-", "flush check", about.id, seconds);
        }
        stop_if_interrupted()?;
        report.drivers.push(DriverReport {
            about,
            version: absent.is_none().then(|| driver.version()).flatten(),
            absent,
            flush,
        });
        progress.bar.inc(1);
    }
    if !unchecked.is_empty() {
        report.left_out.push(format!(
            "The flush check: for lack of time without {}, whose speed is compared with nothing",
            unchecked.join(", ")
        ));
    }
    Ok(())
}

fn stop_if_interrupted() -> Result<()> {
    if interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

fn fail(
    report: &mut Report,
    progress: &Progress,
    (place, workload, driver): (&str, &str, &'static str),
    error: &anyhow::Error,
) {
    progress.note(&format!("{place} {workload} {driver}: {error:#}"));
    report.failures.push(Failure {
        place: place.to_owned(),
        workload: workload.to_owned(),
        driver,
        error: format!("{error:#}"),
    });
}

/// One place, while it is measured.
#[derive(Clone, Copy)]
struct At<'a> {
    place: &'a Place,
    /// A directory there.
    work: &'a Path,
    /// For what is not measured.
    scratch: &'a Path,
    sizes: &'a Sizes,
    progress: &'a Progress,
}

/// An image of a driver, ready for containers.
struct Prepared<'a> {
    driver: &'a dyn Driver,
    image: Box<dyn Image>,
    /// Where the image and its containers lie.
    dir: PathBuf,
}

/// All workloads in one place; those that share an image after each other.
fn measure(plan: &Plan, report: &mut Report, at: At<'_>, budget: &mut Budget) -> Result<()> {
    let mut bases: Vec<BaseKind> = Vec::new();
    for workload in &plan.workloads {
        if workload.absent(at.sizes).is_none() && !bases.contains(&workload.base()) {
            bases.push(workload.base());
        }
    }
    for (number, kind) in bases.into_iter().enumerate() {
        let workloads: Vec<&dyn Workload> = plan
            .workloads
            .iter()
            .map(AsRef::as_ref)
            .filter(|workload| workload.base() == kind && workload.absent(at.sizes).is_none())
            .collect();
        // Each image in a directory of its own: one that cannot be removed hinders no other.
        let dir = at.work.join(number.to_string());
        let done = measure_image(plan, report, at, budget, (kind, &dir, &workloads));
        // What was measured is kept, whatever happens next.
        (plan.save)(report);
        done?;
        if let Err(error) = fs::remove_dir_all(&dir) {
            let error = anyhow::Error::new(error).context(dir.display().to_string());
            fail(
                report,
                at.progress,
                (&at.place.id, "cleaning up", "-"),
                &error,
            );
        }
    }
    Ok(())
}

/// The workloads that start from one image.
fn measure_image(
    plan: &Plan,
    report: &mut Report,
    at: At<'_>,
    budget: &mut Budget,
    (kind, dir, workloads): (BaseKind, &Path, &[&dyn Workload]),
) -> Result<()> {
    let At {
        place, progress, ..
    } = at;
    fs::create_dir(dir)?;
    let weight: f64 = workloads.iter().map(|workload| workload.share()).sum();
    let share = budget.share(weight);
    // Less than that is not even enough to make the image.
    if share < 1.0 {
        no_time(report, place, workloads);
        budget.done(weight);
        return Ok(());
    }
    progress
        .bar
        .set_message(format!("{}: making the image", place.title));
    let base_dir = dir.join("b");
    fs::create_dir(&base_dir)?;
    let base = make_base(kind, &base_dir, at.sizes).context("making the image");
    stop_if_interrupted()?;
    let base = match base {
        Ok(base) => base,
        Err(_) if host::out_of_time() => {
            no_time(report, place, workloads);
            return Ok(());
        }
        Err(error) => {
            for workload in workloads {
                fail(report, progress, (&place.id, &workload.id(), "-"), &error);
            }
            budget.done(weight);
            return Ok(());
        }
    };
    let mut prepared = prepare(plan, report, at, (&base, dir, workloads), share)?;
    for workload in workloads {
        rounds(plan, report, at, *workload, &mut prepared, budget)?;
        budget.done(workload.share());
        (plan.save)(report);
    }
    Ok(())
}

fn no_time(report: &mut Report, place: &Place, workloads: &[&dyn Workload]) {
    for workload in workloads {
        let line = format!("{} in {}: no time was left", workload.title(), place.dir);
        report.left_out.push(line);
    }
}

/// The drivers that say most about a workload: all of them where readers quote it; else its reference,
/// ours, what most hosts use today, those that goals name, and those that the user brought.
fn foremost(plan: &Plan, workload: &dyn Workload) -> Vec<&'static str> {
    let kind = workload.kind();
    let of_kind = plan.drivers.iter().map(|driver| driver.about());
    let of_kind = of_kind.filter(|about| about.kind == kind);
    let mut foremost: Vec<&str> = of_kind
        .filter(|about| {
            workload.headline()
                || about.brought
                || [driver::reference(kind), driver::own(kind), "overlayfs"].contains(&about.id)
        })
        .map(|about| about.id)
        .collect();
    foremost.extend(goals::drivers_of(&workload.id()));
    foremost
}

/// The image in every driver that is there and that the workloads are for; those first that say
/// most, and of the others as many as a third of the time is enough for.
fn prepare<'a>(
    plan: &'a Plan,
    report: &mut Report,
    at: At<'_>,
    (base, dir, workloads): (&Base, &Path, &[&dyn Workload]),
    share: f64,
) -> Result<Vec<Prepared<'a>>> {
    let At {
        place, progress, ..
    } = at;
    let begin = Instant::now();
    let kind = workloads.first().map(|workload| workload.kind());
    let first: Vec<&str> = workloads.iter().flat_map(|w| foremost(plan, *w)).collect();
    let mut drivers: Vec<&dyn Driver> = plan
        .drivers
        .iter()
        .map(AsRef::as_ref)
        .filter(|driver| Some(driver.about().kind) == kind && driver.absent().is_none())
        .collect();
    drivers.sort_by_key(|driver| {
        let id = driver.about().id;
        let control = kind.is_some_and(|kind| driver::control(kind) == id);
        (!first.contains(&id), !control)
    });
    let mut prepared = Vec::new();
    let mut longest: f64 = 0.0;
    let mut without = Vec::new();
    let ids: Vec<String> = workloads.iter().map(|workload| workload.id()).collect();
    let what = format!("image for {}", ids.join(", "));
    for (number, driver) in drivers.into_iter().enumerate() {
        let about = driver.about();
        let time = begin.elapsed().as_secs_f64() + longest < share / 3.0;
        if host::out_of_time() || (!time && !first.contains(&about.id)) {
            without.push(about.id);
            continue;
        }
        progress
            .bar
            .set_message(format!("{}: the image in {}", place.title, about.title));
        let dir = dir.join(number.to_string());
        fs::create_dir(&dir)?;
        let start = Instant::now();
        let image = driver
            .prepare(&dir, base)
            .and_then(|()| driver.open(&dir))
            .context("preparing the image");
        let seconds = start.elapsed().as_secs_f64();
        longest = longest.max(seconds);
        report.took(&place.id, &what, about.id, seconds);
        stop_if_interrupted()?;
        match image {
            Ok(image) => prepared.push(Prepared { driver, image, dir }),
            Err(_) if host::out_of_time() => without.push(about.id),
            Err(error) => fail(report, progress, (&place.id, "image", about.id), &error),
        }
    }
    if !without.is_empty() {
        let titles: Vec<String> = workloads.iter().map(|workload| workload.title()).collect();
        report.left_out.push(format!(
            "{} in {}: for lack of time without {}",
            titles.join("; "),
            place.dir,
            without.join(", ")
        ));
    }
    Ok(prepared)
}

/// One workload, round by round through every driver; each round begins with another.
#[expect(
    clippy::too_many_lines,
    reason = "the steps of a comparison, in their order"
)]
fn rounds(
    plan: &Plan,
    report: &mut Report,
    at: At<'_>,
    workload: &dyn Workload,
    prepared: &mut [Prepared<'_>],
    budget: &Budget,
) -> Result<()> {
    let At {
        place, progress, ..
    } = at;
    let id = workload.id();
    let mut time = Rounds::new(
        budget.share(workload.share()),
        plan.rounds,
        foremost(plan, workload)
            .into_iter()
            .filter(|id| prepared.iter().any(|p| p.driver.about().id == *id)),
    );
    let mut broken: Vec<&str> = Vec::new();
    let mut skipped: BTreeMap<&str, usize> = BTreeMap::new();
    for round in 0..plan.rounds {
        if progress.bars.is_hidden() {
            let (title, of) = (&place.title, plan.rounds);
            progress.note(&format!("{title}: {id}, round {} of {of}", round + 1));
        }
        for step in 0..prepared.len() {
            let number = (step + round) % prepared.len();
            let Some(Prepared { driver, image, dir }) = prepared.get_mut(number) else {
                continue;
            };
            let driver = driver.about().id;
            progress.bar.inc(1);
            if broken.contains(&driver) {
                continue;
            }
            if !time.has_time(driver, round, budget.left()) {
                *skipped.entry(driver).or_default() += 1;
                continue;
            }
            progress.bar.set_message(format!(
                "{}: {id}, round {} of {}, {driver}",
                place.title,
                round + 1,
                plan.rounds
            ));
            let name = format!("{id}-{round}");
            let start = Instant::now();
            let result = host::sync_fs(Path::new(&place.dir)).and_then(|()| {
                workload.run(&mut Run {
                    sizes: at.sizes,
                    scratch: at.scratch,
                    place: Path::new(&place.dir),
                    on_disk: (!place.in_memory).then_some(dir),
                    image: image.as_mut(),
                    name: &name,
                })
            });
            let seconds = start.elapsed().as_secs_f64();
            time.had(driver, seconds);
            report.took(&place.id, &id, driver, seconds);
            stop_if_interrupted()?;
            match result {
                Ok(measured) => record(report, place, &id, (driver, round), measured),
                Err(error) => {
                    // What was stopped at the limit has not failed.
                    if host::out_of_time() {
                        *skipped.entry(driver).or_default() += 1;
                    } else {
                        fail(report, progress, (&place.id, &id, driver), &error);
                        broken.push(driver);
                        time.gave_up(driver);
                    }
                    let _cleaning = host::CleaningUp::begin();
                    drop(image.stop(&name));
                    drop(image.remove(&name));
                }
            }
        }
    }
    if !skipped.is_empty() {
        let line = format!(
            "{} in {}: for lack of time {}",
            workload.title(),
            place.dir,
            fewer(&skipped, plan.rounds)
        );
        report.left_out.push(line);
    }
    Ok(())
}

/// Who had fewer rounds, like “overlayfs 3 of 5 rounds; without copy, btrfs”.
fn fewer(skipped: &BTreeMap<&str, usize>, rounds: usize) -> String {
    let mut parts: Vec<String> = Vec::new();
    for had in (0..rounds).rev() {
        let drivers = skipped
            .iter()
            .filter(|(_, without)| rounds - **without == had);
        let drivers: Vec<&str> = drivers.map(|(driver, _)| *driver).collect();
        if drivers.is_empty() {
            continue;
        }
        let drivers = drivers.join(", ");
        parts.push(match had {
            0 => format!("without {drivers}"),
            had => format!("{drivers} {had} of {rounds} rounds"),
        });
    }
    parts.join("; ")
}

fn record(
    report: &mut Report,
    place: &Place,
    workload: &str,
    (driver, round): (&'static str, usize),
    measured: Measured,
) {
    for (metric, value) in measured.values {
        report.samples.push(Sample {
            place: place.id.clone(),
            workload: workload.to_owned(),
            metric,
            driver,
            round,
            value,
        });
    }
    if !measured.curve.is_empty() {
        report.curves.push(Curve {
            place: place.id.clone(),
            workload: workload.to_owned(),
            driver,
            round,
            values: measured.curve,
        });
    }
    if !measured.latency.is_empty() {
        report.latencies.push(Latency {
            place: place.id.clone(),
            workload: workload.to_owned(),
            driver,
            round,
            pieces: measured.latency,
        });
    }
    if let Some(picture) = measured.picture.filter(|_| round == 0) {
        let caption = format!("{driver} after {workload}, {}", place.title);
        report.pictures.push((caption, picture));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacked_time_is_said_by_the_number_of_rounds() {
        let skipped = BTreeMap::from([("copy", 5), ("overlayfs", 2), ("btrfs", 5), ("raw", 2)]);
        assert_eq!(
            fewer(&skipped, 5),
            "overlayfs, raw 3 of 5 rounds; without btrfs, copy"
        );
    }
}
