//! What copy-on-write costs: in time from the first transaction on, in space, in what the disk
//! writes, and in CPU time.

use anyhow::Result;
use maud::{Markup, PreEscaped, html};

use super::answer::HEADLINES;
use super::chart::{self, Line, Mark, NARROW, Panel, Row, Scale, lines, points};
use super::overview::look;
use super::words::{figure, times};
use super::{DriverReport, Place, Report};
use crate::driver::{self, Kind};
use crate::stats::{FEWEST, LEVEL, Ratio, Spread, geometric_mean};

/// What a driver takes besides time.
#[derive(Debug, PartialEq)]
pub struct Costs {
    /// The driver.
    pub title: &'static str,
    /// It kept what it acknowledged.
    pub comparable: bool,
    /// Bytes of space for each byte that was written, after scattered synced writes.
    pub space: Option<f64>,
    /// Bytes that the disk wrote for each byte that a program wrote, each write synced.
    pub written: Option<f64>,
    /// CPU time beside the reference's for the same work.
    pub cpu: Option<f64>,
}

/// Passes over the same places that the fio workloads make.
const PASSES: f64 = 2.0;
/// Bytes of one of their writes.
const WRITE: f64 = 8192.0;

/// Of each driver that gave figures.
pub fn costs(report: &Report, place: &Place) -> Vec<Costs> {
    let drivers = report.present(Kind::Files).into_iter();
    drivers
        .filter(|driver| driver.about.id != driver::control(Kind::Files))
        .map(|driver| Costs {
            title: driver.about.title,
            comparable: driver.comparable(),
            space: median(report, place, ("fio-fsync", "space"), driver)
                .map(|mb| mb * 1e6 / (f64::from(report.sizes.synced_writes) * WRITE)),
            written: amplification(
                report,
                place,
                ("fio-fsync", report.sizes.synced_writes),
                driver,
            ),
            cpu: cpu(report, place, driver),
        })
        .collect()
}

fn median(
    report: &Report,
    place: &Place,
    (workload, metric): (&str, &str),
    driver: &DriverReport,
) -> Option<f64> {
    let found = report.find(&place.id, workload, metric, driver.about.id)?;
    Some(found.value.median)
}

fn amplification(
    report: &Report,
    place: &Place,
    (workload, writes): (&str, u32),
    driver: &DriverReport,
) -> Option<f64> {
    let written = median(report, place, (workload, "written"), driver)?;
    Some(written * 1e6 / (f64::from(writes) * WRITE * PASSES))
}

/// Of client, driver and kernel, ÷ the reference's, over the workloads that readers quote; but not of
/// those that run for a fixed time, in which more work takes more.
fn cpu(report: &Report, place: &Place, driver: &DriverReport) -> Option<f64> {
    let parts = ["cpu_client", "cpu_server", "cpu_kernel"];
    let of = |workload: &str, id: &str| -> Option<f64> {
        let found =
            parts.map(|part| Some(report.find(&place.id, workload, part, id)?.value.median));
        let all: Vec<f64> = found.into_iter().collect::<Option<_>>()?;
        Some(all.iter().sum())
    };
    let fixed = ["pgbench", "fio-read"];
    let workloads = HEADLINES.iter().filter(|h| !fixed.contains(&h.workload));
    let ratios = workloads.filter_map(|headline| {
        let own = of(headline.workload, driver.about.id)?;
        let base = of(headline.workload, driver::reference(Kind::Files))?;
        Some(own / base)
    });
    geometric_mean(ratios)
}

/// The table of the first screen.
pub fn table(report: &Report, place: &Place) -> Markup {
    let all = costs(report, place);
    let shown = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), times);
    html! {
        div.wide { table.numbers {
            tr {
                th { "What it costs" }
                th { "space for each byte written" }
                th { "bytes the disk writes for each byte written and synced" }
                th { "CPU time ÷ plain file" }
            }
            @for cost in &all {
                tr {
                    th.fails[!cost.comparable] { (cost.title) }
                    td { (shown(cost.space)) }
                    td { (shown(cost.written)) }
                    td { (shown(cost.cpu)) }
                }
            }
        } }
    }
}

/// The section on the cost of copy-on-write, with what else was drawn for it.
pub fn section(report: &Report) -> Result<Markup> {
    let mut parts = Vec::new();
    for place in &report.places {
        parts.push((
            place,
            latency(report, place)?,
            first_beside_steady(report, place)?,
            disk(report, place)?,
        ));
    }
    Ok(html! {
        section #cow {
            h2 { "What copy-on-write costs" }
            @for (place, latency, touches, disk) in parts {
                @if report.places.len() > 1 { h3 { (place.title) } }
                @if !latency.is_empty() {
                    h3 { "Latency from the first transaction on" }
                    p { "PostgreSQL in a container that was made just before, with a cold cache: how \
                         long transactions took while the run went on (median of the rounds). Copy-on-write \
                         costs most at the left end, where most blocks are touched for the first time." }
                    div.pair { @for pair in latency { (both(pair)) } }
                }
                @if !touches.is_empty() {
                    h3 { "First touch beside steady" }
                    p { "The speed of first touches relative to the same driver's own speed later, round \
                         by round: at 1 the first touch costs nothing." }
                    (grid(&touches))
                }
                @if !disk.is_empty() {
                    h3 { "Write amplification and space" }
                    p { "What the disk below wrote for each byte that the program wrote (all of the host's \
                         writes to that disk, until everything was written back), and what the container \
                         took afterwards." }
                    (grid(&disk))
                }
            }
            @for (caption, picture) in &report.pictures {
                h3 { "Where the blocks lie" }
                figure.map { figcaption { "The map of the layer: " (caption) } (PreEscaped(picture)) }
            }
        }
    })
}

fn grid(charts: &[String]) -> Markup {
    html! { div.grid { @for chart in charts { figure { (PreEscaped(chart)) } } } }
}

/// A drawing for wide screens and one for phones.
fn both([wide, narrow]: [String; 2]) -> Markup {
    html! {
        figure.on-wide { (PreEscaped(wide)) }
        figure.on-narrow { (PreEscaped(narrow)) }
    }
}

/// The width of a chart of lines on a wide screen and in a file of its own.
const WIDE: i32 = 570;

/// Medians and 99th percentiles over the run, each wide and narrow.
fn latency(report: &Report, place: &Place) -> Result<Vec<[String; 2]>> {
    let mut charts = Vec::new();
    for (which, title) in [
        (1, "PostgreSQL: median latency"),
        (2, "PostgreSQL: 99th percentile of latency"),
    ] {
        let all = latency_lines(report, place, which);
        let of = |width| {
            lines(
                (
                    title,
                    "ms, less is better",
                    "seconds since the first transaction",
                ),
                width,
                &all,
            )
        };
        let both = [of(WIDE)?, of(NARROW)?];
        if both.iter().all(|svg| !svg.is_empty()) {
            charts.push(both);
        }
    }
    Ok(charts)
}

/// The chart of latency as a file.
pub fn latency_picture(report: &Report, place: &Place) -> Result<Option<String>> {
    let found = latency(report, place)?.into_iter().next();
    Ok(found.map(|[wide, _]| wide))
}

/// Of each driver, the median over the rounds; `which` of the figures of a piece.
fn latency_lines(report: &Report, place: &Place, which: usize) -> Vec<Line> {
    let mut all = Vec::new();
    for driver in report.present(Kind::Files) {
        let id = driver.about.id;
        if !driver.comparable() || id == driver::control(Kind::Files) {
            continue;
        }
        let rounds = report.latencies.iter();
        let rounds: Vec<_> = rounds
            .filter(|l| l.place == place.id && l.driver == id)
            .collect();
        let mut ends: Vec<f64> = rounds
            .iter()
            .flat_map(|l| &l.pieces)
            .map(|piece| piece[0])
            .collect();
        ends.sort_by(f64::total_cmp);
        ends.dedup();
        let at = |end: f64| {
            let pieces = rounds
                .iter()
                .flat_map(|l| &l.pieces)
                .filter(|piece| piece[0] == end);
            let values = pieces.filter_map(|piece| piece.get(which).copied());
            Spread::of(values).map(|spread| (end, spread.median))
        };
        let points: Vec<(f64, f64)> = ends.into_iter().filter_map(at).collect();
        if !points.is_empty() {
            all.push(Line {
                label: driver.about.title.to_owned(),
                own: id == driver::own(Kind::Files),
                points,
            });
        }
    }
    all
}

/// First ÷ then, for each of the workloads that readers quote.
fn touch_panels(report: &Report, place: &Place) -> Vec<Panel> {
    let mut panels = Vec::new();
    for headline in HEADLINES.iter().filter(|h| h.workload != "fio-read") {
        let higher = report.higher_is_better(headline.workload, headline.first);
        let ratios = |driver: &DriverReport| {
            let rounds =
                |metric| report.rounds_of((&place.id, headline.workload, metric), driver.about.id);
            crate::stats::pairs(&rounds(headline.first), &rounds(headline.then), higher)
        };
        let rows = rows(report, |driver| mark_of(&ratios(driver)));
        if rows.iter().any(|row| !row.marks.is_empty()) {
            panels.push(Panel {
                title: headline.title.to_owned(),
                unit: "first touch ÷ steady speed".to_owned(),
                scale: Scale::log(0.01, 10.0),
                line: Some(1.0),
                band: None,
                columns: vec!["ratio".to_owned()],
                rows,
            });
        }
    }
    panels
}

fn first_beside_steady(report: &Report, place: &Place) -> Result<Vec<String>> {
    touch_panels(report, place)
        .iter()
        .map(chart::panel)
        .collect()
}

/// The same as one drawing.
pub fn touch_picture(report: &Report, place: &Place) -> Result<Option<String>> {
    let panels = touch_panels(report, place);
    if panels.is_empty() {
        return Ok(None);
    }
    let title = format!("What the first touch costs: {}", place.title);
    let notes = [
        "The speed of first touches ÷ the same driver's steady speed, round by round; bars are 95 % confidence intervals.",
    ];
    chart::together(&panels, 3.min(panels.len()), &title, &notes).map(Some)
}

fn mark_of(ratios: &[f64]) -> Option<Mark> {
    let ratio = Ratio::of(ratios, LEVEL)?;
    Some(Mark {
        at: ratio.mean,
        interval: ratio.interval,
        points: if ratio.rounds < FEWEST {
            ratios.to_vec()
        } else {
            Vec::new()
        },
        hollow: false,
        shown: (0, times(ratio.mean)),
    })
}

/// A row for each driver that gave figures, those that lost data crossed out.
fn rows(report: &Report, mark: impl Fn(&DriverReport) -> Option<Mark>) -> Vec<Row> {
    let drivers = report.present(Kind::Files).into_iter();
    drivers
        .filter(|driver| driver.about.id != driver::control(Kind::Files))
        .map(|driver| Row {
            label: driver.about.title.to_owned(),
            look: look(driver),
            note: (!driver.comparable()).then(|| super::overview::why_not(driver).to_owned()),
            marks: mark(driver)
                .into_iter()
                .filter(|_| driver.comparable())
                .collect(),
        })
        .collect()
}

/// What the disk wrote, and what the container took.
fn disk(report: &Report, place: &Place) -> Result<Vec<String>> {
    let (synced, buffered) = (report.sizes.synced_writes, report.sizes.buffered_writes);
    let mut charts = Vec::new();
    for (workload, metric, writes, title) in [
        (
            "fio-fsync",
            "written",
            f64::from(synced) * PASSES,
            "Written, fsync each",
        ),
        (
            "fio-buffered",
            "written",
            f64::from(buffered) * PASSES,
            "Written, buffered",
        ),
        (
            "fio-fsync",
            "space",
            f64::from(synced),
            "Space, after synced writes",
        ),
    ] {
        let per_byte = |driver: &DriverReport| -> Vec<f64> {
            let rounds = report.rounds_of((&place.id, workload, metric), driver.about.id);
            rounds
                .iter()
                .map(|(_, mb)| mb * 1e6 / (writes * WRITE))
                .collect()
        };
        let rows = rows(report, |driver| {
            let values = per_byte(driver);
            let spread = Spread::of(values.iter().copied())?;
            Some(Mark {
                at: spread.median,
                interval: None,
                points: values,
                hollow: false,
                shown: (0, figure(spread.median)),
            })
        });
        if points(&rows).any(|value| value > 0.0) {
            let unit = "bytes for each byte written".to_owned();
            let panel = Panel::of_medians(title.to_owned(), unit, rows);
            charts.push(chart::panel(&panel)?);
        }
    }
    Ok(charts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Latency;
    use crate::report::tests::{add, empty};

    #[test]
    fn space_and_disk_writes_are_for_each_byte_written_and_cpu_beside_the_reference() {
        let mut report = empty();
        let mb = f64::from(report.sizes.synced_writes) * WRITE / 1e6;
        for (driver, space, written, cpu) in [("raw", 1.0, 4.0, 2.0), ("vellum", 1.5, 6.0, 3.0)] {
            add(&mut report, ("fio-fsync", "space"), driver, &[space * mb]);
            add(
                &mut report,
                ("fio-fsync", "written"),
                driver,
                &[written * mb],
            );
            for part in ["cpu_client", "cpu_server", "cpu_kernel"] {
                add(&mut report, ("fio-fsync", part), driver, &[cpu]);
            }
        }
        report.summarise();
        let all = costs(&report, &report.places[0]);
        let of = all.iter().find(|cost| cost.title == "vellum").unwrap();
        let close = |found: Option<f64>, wanted: f64| (found.unwrap() - wanted).abs() < 1e-9;
        assert!(
            close(of.space, 1.5) && close(of.written, 3.0) && close(of.cpu, 1.5),
            "{of:?}"
        );
    }

    #[test]
    fn latency_is_drawn_from_the_first_transaction_on_and_the_first_touch_beside_steady() {
        let mut report = empty();
        for round in 0..3 {
            report.latencies.push(Latency {
                place: "disk".into(),
                workload: "pgbench".into(),
                driver: "vellum",
                round,
                pieces: vec![[0.5, 9.0, 20.0], [1.0, 3.0, 9.0]],
            });
        }
        add(
            &mut report,
            ("pgbench", "first30"),
            "vellum",
            &[50.0, 50.0, 50.0],
        );
        add(
            &mut report,
            ("pgbench", "steady"),
            "vellum",
            &[100.0, 100.0, 100.0],
        );
        report.summarise();
        let lines = latency_lines(&report, &report.places[0], 1);
        assert_eq!(lines[0].points, [(0.5, 9.0), (1.0, 3.0)]);
        let page = section(&report).unwrap().into_string();
        assert!(page.contains("median latency") && page.contains("first touch ÷ steady"));
        assert!(page.contains("\n0.50\n"), "half as fast at first");
    }
}
