//! The order of things: durability, then every workload through every driver, round by round.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tempfile::TempDir;

use crate::driver::{Base, Driver, Image};
use crate::durability;
use crate::host::{self, interrupted};
use crate::report::{Curve, DriverReport, Failure, Place, Report, Sample, WorkloadReport};
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
}

/// When to begin nothing new in one place.
#[derive(Debug, Clone, Copy)]
struct Deadline(Option<Instant>);

impl Deadline {
    /// The place's part of the time that is left, when this many places are to come.
    fn share(end: Option<Instant>, places: usize) -> Self {
        let now = Instant::now();
        let part = |end: Instant| {
            let left = end.saturating_duration_since(now);
            now + left / u32::try_from(places.max(1)).unwrap_or(1)
        };
        Deadline(end.map(part))
    }

    fn passed(self) -> bool {
        self.0.is_some_and(|deadline| Instant::now() > deadline)
    }
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
    for (number, dir) in plan.dirs.iter().enumerate() {
        let deadline = Deadline::share(plan.end, plan.dirs.len() - number);
        let place = report
            .places
            .iter()
            .find(|place| Path::new(&place.dir) == dir);
        let place = place.context("a directory without a name")?.clone();
        let work = work_dir(dir)?;
        let at = At {
            place: &place,
            work: work.path(),
            scratch: scratch.path(),
            deadline,
            progress: &progress,
        };
        measure(plan, report, at)?;
    }
    progress.bar.finish_and_clear();
    Ok(())
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

fn check_durability(
    plan: &Plan,
    report: &mut Report,
    work: &TempDir,
    progress: &Progress,
) -> Result<()> {
    for driver in &plan.drivers {
        let about = driver.about();
        progress
            .bar
            .set_message(format!("flush check: {}", about.title));
        let absent = driver.absent();
        let mut flush = None;
        if absent.is_none() {
            match durability::check(driver.as_ref(), work.path()) {
                Ok(found) => flush = Some(found),
                Err(error) => {
                    stop_if_interrupted()?;
                    fail(report, progress, ("-", "flush check", about.id), &error);
                }
            }
        }
        stop_if_interrupted()?;
        report.drivers.push(DriverReport {
            about,
            absent,
            flush,
        });
        progress.bar.inc(1);
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
    deadline: Deadline,
    progress: &'a Progress,
}

/// An image of a driver, ready for containers.
struct Prepared<'a> {
    driver: &'a dyn Driver,
    image: Box<dyn Image>,
}

/// All workloads in one place; those that share an image after each other.
fn measure(plan: &Plan, report: &mut Report, at: At<'_>) -> Result<()> {
    let At {
        place,
        work,
        progress,
        ..
    } = at;
    let mut bases: Vec<BaseKind> = Vec::new();
    for workload in &plan.workloads {
        if workload.absent(&plan.sizes).is_none() && !bases.contains(&workload.base()) {
            bases.push(workload.base());
        }
    }
    for kind in bases {
        let workloads: Vec<&dyn Workload> = plan
            .workloads
            .iter()
            .map(AsRef::as_ref)
            .filter(|workload| workload.base() == kind)
            .collect();
        if at.deadline.passed() {
            for workload in workloads {
                let line = format!("{} in {}: no time was left", workload.title(), place.dir);
                report.left_out.push(line);
            }
            continue;
        }
        let base_dir = work.join("b");
        progress
            .bar
            .set_message(format!("{}: making the image", place.title));
        fs::create_dir(&base_dir)?;
        let base = make_base(kind, &base_dir, &plan.sizes).context("making the image");
        stop_if_interrupted()?;
        match base {
            Ok(base) => {
                let mut prepared = prepare(plan, report, at, (&base, kind))?;
                for workload in workloads {
                    rounds(plan, report, at, workload, &mut prepared)?;
                }
            }
            Err(error) => {
                for workload in workloads {
                    fail(report, progress, (&place.id, &workload.id(), "all"), &error);
                }
            }
        }
        for entry in fs::read_dir(work)?.flatten() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The image in every driver that is there and that the workloads are for.
fn prepare<'a>(
    plan: &'a Plan,
    report: &mut Report,
    at: At<'_>,
    (base, kind): (&Base, BaseKind),
) -> Result<Vec<Prepared<'a>>> {
    let At {
        place,
        work,
        progress,
        ..
    } = at;
    let wanted = plan.workloads.iter().find(|w| w.base() == kind);
    let wanted = wanted.map(|w| w.kind());
    let mut prepared = Vec::new();
    for (number, driver) in plan.drivers.iter().enumerate() {
        let about = driver.about();
        if Some(about.kind) != wanted || driver.absent().is_some() {
            continue;
        }
        if at.deadline.passed() {
            break;
        }
        progress
            .bar
            .set_message(format!("{}: the image in {}", place.title, about.title));
        let dir = work.join(number.to_string());
        fs::create_dir(&dir)?;
        let image = driver
            .prepare(&dir, base)
            .and_then(|()| driver.open(&dir))
            .context("preparing the image");
        stop_if_interrupted()?;
        match image {
            Ok(image) => prepared.push(Prepared {
                driver: driver.as_ref(),
                image,
            }),
            Err(error) => fail(report, progress, (&place.id, "image", about.id), &error),
        }
    }
    Ok(prepared)
}

/// One workload, round by round through every driver; each round begins with another.
fn rounds(
    plan: &Plan,
    report: &mut Report,
    at: At<'_>,
    workload: &dyn Workload,
    prepared: &mut [Prepared<'_>],
) -> Result<()> {
    let At {
        place, progress, ..
    } = at;
    let id = workload.id();
    let mut broken: Vec<&str> = Vec::new();
    for round in 0..plan.rounds {
        if progress.bars.is_hidden() {
            let (title, of) = (&place.title, plan.rounds);
            progress.note(&format!("{title}: {id}, round {} of {of}", round + 1));
        }
        for step in 0..prepared.len() {
            if at.deadline.passed() {
                report.left_out.push(format!(
                    "{} in {}: {round} of {} rounds and {step} of {} drivers, then no time was \
                     left",
                    workload.title(),
                    place.dir,
                    plan.rounds,
                    prepared.len()
                ));
                return Ok(());
            }
            let number = (step + round) % prepared.len();
            let Some(Prepared { driver, image }) = prepared.get_mut(number) else {
                continue;
            };
            let driver = driver.about().id;
            progress.bar.inc(1);
            if broken.contains(&driver) {
                continue;
            }
            progress.bar.set_message(format!(
                "{}: {id}, round {} of {}, {driver}",
                place.title,
                round + 1,
                plan.rounds
            ));
            let name = format!("{id}-{round}");
            host::sync_fs(Path::new(&place.dir))?;
            let result = workload.run(&mut Run {
                sizes: &plan.sizes,
                scratch: at.scratch,
                place: Path::new(&place.dir),
                image: image.as_mut(),
                name: &name,
            });
            stop_if_interrupted()?;
            match result {
                Ok(measured) => record(report, place, &id, (driver, round), measured),
                Err(error) => {
                    fail(report, progress, (&place.id, &id, driver), &error);
                    broken.push(driver);
                    drop(image.stop(&name));
                    drop(image.remove(&name));
                }
            }
        }
    }
    Ok(())
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
    if let Some(picture) = measured.picture.filter(|_| round == 0) {
        let caption = format!("{driver} after {workload}, {}", place.title);
        report.pictures.push((caption, picture));
    }
}
