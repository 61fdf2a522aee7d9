//! The report as one HTML file that needs nothing else.

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::goals::{GoalResult, Outcome};
use super::plots::{Axis, Bar, Line, Look, bars, lines, short};
use super::{DriverReport, Place, Report, Summary, WorkloadReport};
use crate::driver::{self, Kind};
use crate::stats::Verdict;
use crate::workload::{Better, Metric};

const SECONDS: Axis<'_> = Axis {
    label: "second",
    shown: |second| format!("{second:.0}"),
};
/// Doubles from mark to mark.
const DEPTHS: Axis<'_> = Axis {
    label: "layers",
    shown: |power| short(power.exp2()),
};
const STYLE: &str = include_str!("style.css");

/// The whole report.
pub fn render(report: &Report) -> Result<String> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { "Storage drivers for containers, compared" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Storage drivers for containers, compared" }
                (introduction(report))
                (goals(report))
                h2 { "The drivers" }
                (drivers(report))
                h2 { "Speed beside the reference" }
                (overview(report))
                @for workload in &report.workloads { (section(report, workload)?) }
                (chains(report)?)
                (remarks(report))
            }
        }
    };
    Ok(page.into_string())
}

fn introduction(report: &Report) -> Markup {
    let host = &report.host;
    html! {
        @if let Some(why) = &report.cut_short {
            p.cut { "This run did not reach its end: " (brief(why)) ". What it had measured until then is \
                     below." }
        }
        p {
            "A container starts from an image and writes without changing it. A "
            em { "storage driver" }
            " does that; there are several, and they cost differently. Here each driver did the \
             same work on the same host, in turns: one round of all, then the next round, so that \
             whatever else the host was doing hit all of them."
        }
        ul {
            li {
                b { "Ratios" } " are speeds relative to the reference of the same round: a plain \
                file without any copy-on-write. " b { "2.00 is twice as fast, 0.50 half as fast" }
                "; the median over the rounds, with the lowest and the highest in small print."
            }
            li {
                "The reference runs twice in each round. What lies within the range of the \
                 reference beside itself, or was measured in fewer than three rounds, is "
                span.noise { "noise (grey)" } ". "
                span.faster { "Green" } " was faster in every round, "
                span.slower { "red" } " slower in every round."
            }
            li {
                b { "Durability comes first." } " A driver that answers fsync without writing is \
                fast and loses data. Each was checked before any timing; one that failed is \
                measured, but " span.fails { "✗ crossed out" } ": its figures cannot be compared."
            }
            li {
                b { "First touch" } " is the first write to a place of the image, which is when \
                copy-on-write costs something; " b { "steady" } " is every later one."
            }
        }
        table.facts {
            tr { th { "Begun" } td { (report.started) ", took " (format!("{:.0}", report.seconds / 60.0)) " min" } }
            tr { th { "Rounds" } td { (report.rounds) } }
            tr { th { "Host" } td { (host.kernel) ", " (host.processors) ", "
                (format!("{:.0}", host.memory as f64 / 1e9)) " GB of memory" } }
            tr { th { "Load" } td { (host.load.join(" at the start, ")) " at the end (running processes, mean of a minute)" } }
            tr { th { "Places" } td { @for place in &report.places { (place.title) ": " code { (place.dir) } br; } } }
            tr { th { "Programs" } td { (host.versions.join("; ")) } }
            tr { th { "Command" } td { code { (report.command) } } }
        }
    }
}

/// Each goal beside what was reached; nothing where no goal was measured.
fn goals(report: &Report) -> Markup {
    let measured = |goal: &GoalResult| goal.outcome != Outcome::NotMeasured;
    if !report.goals.iter().any(measured) {
        return html! {};
    }
    html! {
        h2 { "Goals" }
        p {
            "What this project wants to reach, and what it did in this run: the median of the \
             ratios of each round, with the lowest and the highest. " b { "Met" } " and "
            b { "missed" } " are said where every round says so, of at least three; all else is "
            span.noise { "noise" } "."
        }
        @for place in &report.places {
            @let rows: Vec<_> = report.goals.iter().filter(|goal| goal.place == place.id).collect();
            @let count = |outcomes: &[Outcome]| {
                rows.iter().filter(|goal| outcomes.contains(&goal.outcome)).count()
            };
            h3 { (place.title) ": " (count(&[Outcome::Met])) " met, "
                (count(&[Outcome::Missed])) " missed, "
                (count(&[Outcome::NoiseMet, Outcome::NoiseMissed])) " not decided (noise), "
                (count(&[Outcome::NotMeasured, Outcome::NotComparable])) " without a figure" }
            div.wide { table {
                tr { th { "What" } th { "Figure" } th { "Goal" } th { "Reached" } th { "Rounds" } th { "" } }
                @for goal in rows {
                    tr {
                        td { (goal.what) }
                        td.figure { code { (goal.figure) } }
                        td { (goal.wanted) }
                        td {
                            @if let Some(reached) = goal.reached {
                                b { (times(reached.median)) }
                                @if reached.rounds > 1 {
                                    small { " " (times(reached.low)) "–" (times(reached.high)) }
                                }
                            } @else { "–" }
                        }
                        td { (goal.reached.map_or(0, |reached| reached.rounds)) }
                        td { (outcome(goal.outcome)) }
                    }
                }
            } }
        }
    }
}

fn outcome(outcome: Outcome) -> Markup {
    let (class, text) = match outcome {
        Outcome::Met => ("faster", "✓ met"),
        Outcome::Missed => ("slower", "missed"),
        Outcome::NoiseMet => ("noise", "noise; the median reaches it"),
        Outcome::NoiseMissed => ("noise", "noise; the median misses it"),
        Outcome::NotComparable => ("noise", "not comparable: a flush check failed"),
        Outcome::NotMeasured => ("noise", "not measured"),
    };
    html! { span.said class=(class) { (text) } }
}

fn drivers(report: &Report) -> Markup {
    html! {
        table {
            tr { th { "Driver" } th { "--drivers" } th { "What it is" } th { "Flush check" } }
            @for driver in &report.drivers {
                tr {
                    th { (driver.about.title) }
                    td { code { (driver.about.id) } }
                    td { (driver.about.what) }
                    td { (flush(driver)) }
                }
            }
        }
        p.small {
            "The check: a container writes and flushes, and the disk below is copied at once, as a \
             power cut would leave it. The driver is opened on the copy, and all that was flushed \
             has to be there; the disk must have been told to flush."
        }
    }
}

fn flush(driver: &DriverReport) -> Markup {
    match (&driver.absent, &driver.flush) {
        (Some(reason), _) => html! { span.noise { "absent: " (reason) } },
        (None, None) => html! { span.noise { "not checked" } },
        (None, Some(flush)) if flush.passed => html! { span.faster { "✓ " (flush.detail) } },
        (None, Some(flush)) => html! { span.fails { "✗ " (flush.detail) } },
    }
}

/// The drivers of a kind that gave figures, in order.
fn present(report: &Report, kind: Kind) -> Vec<&DriverReport> {
    let gave = |driver: &&DriverReport| {
        let id = driver.about.id;
        driver.about.kind == kind && report.samples.iter().any(|sample| sample.driver == id)
    };
    report.drivers.iter().filter(gave).collect()
}

/// Ratios of all workloads, in one table for each kind and place.
fn overview(report: &Report) -> Markup {
    let speeds = |metric: &&Metric| !metric.detail;
    html! {
        @for place in &report.places {
            @for (kind, name) in [(Kind::Files, "mounted containers"), (Kind::Nbd, "block devices over NBD")] {
                @let columns: Vec<_> = present(report, kind)
                    .into_iter()
                    .filter(|driver| driver.about.id != driver::reference(kind))
                    .collect();
                @let rows: Vec<_> = report.workloads.iter().filter(|w| w.kind == kind).collect();
                @if !columns.is_empty() && !rows.is_empty() {
                    h3 { (place.title) ": " (name) }
                    div.wide { table.ratios {
                        tr {
                            th { "× as fast as " (title(report, driver::reference(kind))) }
                            @for driver in &columns {
                                th.fails[!driver.comparable()] {
                                    @if !driver.comparable() { "✗ " }
                                    (driver.about.title)
                                }
                            }
                        }
                        @for workload in rows {
                            @for metric in workload.metrics.iter().filter(speeds) {
                                tr {
                                    td { (workload.title) ", " b { (metric.title) } }
                                    @for driver in &columns {
                                        td { (ratio(report.find(&place.id, &workload.id, metric.id, driver.about.id))) }
                                    }
                                }
                            }
                        }
                    } }
                }
            }
        }
    }
}

fn title<'a>(report: &'a Report, id: &'a str) -> &'a str {
    let found = report.drivers.iter().find(|driver| driver.about.id == id);
    found.map_or(id, |driver| driver.about.title)
}

fn ratio(summary: Option<&Summary>) -> Markup {
    let Some((summary, ratio)) = summary.and_then(|s| Some((s, s.ratio?))) else {
        return html! { span.noise { "–" } };
    };
    let class = match (summary.comparable, summary.verdict) {
        (false, _) => "fails",
        (true, Some(Verdict::Faster)) => "faster",
        (true, Some(Verdict::Slower)) => "slower",
        (true, _) => "noise",
    };
    html! {
        span class=(class) {
            (times(ratio.median))
            small { " " (times(ratio.low)) "–" (times(ratio.high)) }
        }
    }
}

/// A ratio with as many digits as say something.
fn times(ratio: f64) -> String {
    if ratio < 10.0 {
        format!("{ratio:.2}")
    } else {
        format!("{ratio:.0}")
    }
}

/// One workload: plots of its speeds, a table of everything.
fn section(report: &Report, workload: &WorkloadReport) -> Result<Markup> {
    let drivers = present(report, workload.kind);
    let mut parts = Vec::new();
    for place in &report.places {
        parts.push(workload_at(report, workload, place, &drivers)?);
    }
    Ok(html! {
        section {
            h2 { (workload.title) " " code { (workload.id) } }
            p { (workload.what) }
            @for part in parts { (part) }
        }
    })
}

#[expect(clippy::too_many_lines, reason = "a template of a page, in its order")]
fn workload_at(
    report: &Report,
    workload: &WorkloadReport,
    place: &Place,
    drivers: &[&DriverReport],
) -> Result<Markup> {
    let find = |metric: &Metric, driver: &DriverReport| {
        report.find(&place.id, &workload.id, metric.id, driver.about.id)
    };
    let drivers: Vec<_> = drivers
        .iter()
        .filter(|driver| workload.metrics.iter().any(|m| find(m, driver).is_some()))
        .collect();
    if drivers.is_empty() {
        return Ok(html! { h3 { (place.title) } p.noise { "Not measured." } });
    }
    let mut plots = Vec::new();
    for metric in workload.metrics.iter().filter(|m| m.better != Better::Cost) {
        let mut list = Vec::new();
        for driver in &drivers {
            let Some(summary) = find(metric, driver) else {
                continue;
            };
            list.push(Bar {
                label: driver.about.title,
                median: summary.value.median,
                rounds: rounds(report, summary),
                look: look(driver),
            });
        }
        let way = match metric.better {
            Better::Higher => "more is better",
            _ => "less is better",
        };
        // Like the first minute of what took less.
        if list.is_empty() {
            continue;
        }
        let caption = match metric.unit {
            "" => format!("{} ({way})", metric.title),
            unit => format!("{} ({unit}, {way})", metric.title),
        };
        plots.push((caption, bars(metric.unit, &list)?));
    }
    let curve = curves(report, workload, place)?;
    Ok(html! {
        h3 { (place.title) }
        @if let Some(curve) = curve {
            figure { figcaption { "Transactions in each second, from the first one on (median of the rounds)" } (PreEscaped(curve)) }
        }
        div.plots {
            @for (caption, plot) in plots {
                figure { figcaption { (caption) } (PreEscaped(plot)) }
            }
        }
        details {
            summary { "All figures" }
            div.wide { table {
                tr {
                    th { "Median " small { "lowest–highest" } }
                    @for metric in &workload.metrics {
                        th { (metric.title) @if !metric.unit.is_empty() { ", " (metric.unit) } }
                    }
                }
                @for driver in &drivers {
                    tr {
                        th.fails[!driver.comparable()] {
                            @if !driver.comparable() { "✗ " }
                            (driver.about.title)
                        }
                        @for metric in &workload.metrics {
                            td {
                                @if let Some(summary) = find(metric, driver) {
                                    (short(summary.value.median))
                                    small { " " (short(summary.value.low)) "–" (short(summary.value.high)) }
                                    @if summary.ratio.is_some() { br; "× " (ratio(Some(summary))) }
                                }
                            }
                        }
                    }
                }
            } }
        }
    })
}

fn look(driver: &DriverReport) -> Look {
    let about = &driver.about;
    if !driver.comparable() {
        Look::NotComparable
    } else if about.id == driver::reference(about.kind) || about.id == driver::control(about.kind) {
        Look::Reference
    } else if about.id == driver::own(about.kind) {
        Look::Own
    } else {
        Look::Other
    }
}

fn rounds(report: &Report, summary: &Summary) -> Vec<f64> {
    let matching = report.samples.iter().filter(|sample| {
        sample.place == summary.place
            && sample.workload == summary.workload
            && sample.metric == summary.metric
            && sample.driver == summary.driver
    });
    matching.map(|sample| sample.value).collect()
}

/// Second by second, the median of the rounds.
fn curves(report: &Report, workload: &WorkloadReport, place: &Place) -> Result<Option<String>> {
    let mut list = Vec::new();
    for driver in &report.drivers {
        let of_driver: Vec<&Vec<f64>> = report
            .curves
            .iter()
            .filter(|curve| {
                curve.place == place.id
                    && curve.workload == workload.id
                    && curve.driver == driver.about.id
            })
            .map(|curve| &curve.values)
            .collect();
        let longest = of_driver
            .iter()
            .map(|values| values.len())
            .max()
            .unwrap_or(0);
        let points: Vec<(f64, f64)> = (0..longest)
            .filter_map(|second| {
                let values = of_driver
                    .iter()
                    .filter_map(|values| values.get(second).copied());
                let spread = crate::stats::Spread::of(values)?;
                Some((second as f64, spread.median))
            })
            .collect();
        if !points.is_empty() {
            list.push(Line {
                label: driver.about.title,
                points,
            });
        }
    }
    if list.is_empty() {
        return Ok(None);
    }
    let svg = lines(SECONDS, "transactions", &list, "vellum")?;
    Ok((!svg.is_empty()).then_some(svg))
}

/// The workloads `chain-N` once more, over the depth.
fn chains(report: &Report) -> Result<Markup> {
    let depths: Vec<(f64, &WorkloadReport)> = report
        .workloads
        .iter()
        .filter_map(|workload| {
            let depth: u32 = workload.id.strip_prefix("chain-")?.parse().ok()?;
            Some((f64::from(depth), workload))
        })
        .collect();
    let Some((_, any)) = depths.first().filter(|_| depths.len() > 1) else {
        return Ok(html! {});
    };
    let mut figures = Vec::new();
    for place in &report.places {
        for metric in any.metrics.iter().filter(|m| m.better != Better::Cost) {
            let mut list = Vec::new();
            for driver in present(report, Kind::Files) {
                let points = depths.iter().filter_map(|(depth, workload)| {
                    let found = report.find(&place.id, &workload.id, metric.id, driver.about.id)?;
                    Some((depth.log2(), found.value.median))
                });
                list.push(Line {
                    label: driver.about.title,
                    points: points.collect(),
                });
            }
            list.retain(|line| !line.points.is_empty());
            let svg = lines(DEPTHS, metric.unit, &list, "vellum")?;
            if !svg.is_empty() {
                figures.push((format!("{}: {}", place.title, metric.title), svg));
            }
        }
    }
    Ok(html! {
        section {
            h2 { "What depth costs" }
            p { "The same data in images of more and more layers. A flat line is what one hopes for." }
            div.plots {
                @for (caption, svg) in figures {
                    figure { figcaption { (caption) } (PreEscaped(svg)) }
                }
            }
        }
    })
}

fn remarks(report: &Report) -> Markup {
    html! {
        @for (caption, picture) in &report.pictures {
            section { h2 { "Where the blocks lie" } figure { figcaption { (caption) } (PreEscaped(picture)) } }
        }
        h2 { "What to keep in mind" }
        ul {
            li { "CPU time of kernel threads is the whole host's, since threads of loop devices and \
                  file systems belong to nobody: other work on the host is in it." }
            li { "Loop devices use direct I/O. A cold cache is cold in the page cache alone: below \
                  the host may be another cache, so all that a driver has on the disk is read once \
                  before each, for that to know all of them alike. On a tmpfs nothing is ever cold." }
            li { "overlayfs, full copies and fuse-overlayfs use the host's own file system; the \
                  others bring theirs (ext4, btrfs, XFS)." }
            @for line in &report.left_out { li { (line) } }
        }
        @if !report.failures.is_empty() {
            h2 { "What failed" }
            table {
                tr { th { "Where" } th { "Workload" } th { "Driver" } th { "Why" } }
                @for failure in &report.failures {
                    tr { td { (failure.place) } td { (failure.workload) } td { (failure.driver) } td.why { (brief(&failure.error)) } }
                }
            }
        }
        p.small { "All figures of all runs, and errors whole: report.json, beside this file." }
    }
}

/// An error's beginning, which says what was done, and its end, which says what went wrong: between
/// them may be a command line of a hundred file names.
fn brief(error: &str) -> String {
    const BEGINNING: usize = 300;
    // As much as a failed command's own words have.
    const END: usize = 600;
    let count = error.chars().count();
    if count <= BEGINNING + END {
        return error.to_owned();
    }
    let beginning: String = error.chars().take(BEGINNING).collect();
    let end: String = error.chars().skip(count - END).collect();
    format!("{beginning} […] {end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Failure;
    use crate::report::tests::example;

    #[test]
    fn the_report_needs_no_other_file() {
        let page = render(&example()).unwrap();
        for link in ["<script", "<link", "src=", "@import", "url("] {
            assert!(!page.contains(link), "{link}");
        }
        assert!(page.contains("<svg"));
    }

    #[test]
    fn an_absent_driver_is_listed_with_its_reason_and_cannot_add_markup() {
        let page = render(&example()).unwrap();
        assert!(page.contains("absent: qemu &lt;is&gt; not here"));
    }

    #[test]
    fn a_long_error_is_cut_in_its_middle_on_the_page_and_whole_in_the_data() {
        let names = "ä".repeat(10_000);
        let error = format!("fio --filename={names}: exit status: 1: no space left");
        let mut report = example();
        report.failures.push(Failure {
            place: "disk".into(),
            workload: "chain-128".into(),
            driver: "raw",
            error: error.clone(),
        });
        report.cut_short = Some(error.clone());
        let page = render(&report).unwrap();
        assert_eq!(page.matches("fio --filename=ä").count(), 2);
        assert_eq!(page.matches("ä: exit status: 1: no space left").count(), 2);
        assert!(!page.contains(&"ä".repeat(1000)));
        let data = serde_json::to_value(&report).unwrap();
        assert_eq!(data["failures"][0]["error"], *error);
        assert_eq!(data["cut_short"], *error);
        // What is short stays as it is.
        assert_eq!(brief("no root"), "no root");
        assert_eq!(brief(&"ä".repeat(900)), "ä".repeat(900));
    }

    #[test]
    fn a_driver_that_fails_its_check_is_marked_in_every_table() {
        let page = render(&example()).unwrap();
        // In the overview's head, in the workload's table; its ratio is not green.
        assert_eq!(page.matches("✗ btrfs").count(), 2);
        assert!(page.contains("<span class=\"fails\">9.00"));
        assert!(page.contains("<span class=\"faster\">2.00"));
    }

    #[test]
    fn noise_is_shown_as_noise() {
        let page = render(&example()).unwrap();
        assert!(page.contains("<span class=\"noise\">1.02"));
    }
}
