//! A workload's part of the page: its chart, what it does, how it was measured, what its figures do
//! not say, all of them.

use anyhow::Result;
use maud::{Markup, PreEscaped, html};

use super::beside;
use super::chart::{self, Line, Mark, NARROW, Panel, Row, lines, points};
use super::overview::{look, why_not};
use super::words::{figure, times};
use super::{DriverReport, Place, Report, Summary, WorkloadReport};
use crate::driver::{self, Kind};
use crate::stats::{FEWEST, Verdict};
use crate::workload::{Better, Metric};

/// The section of a workload.
pub fn section(report: &Report, workload: &WorkloadReport) -> Result<Markup> {
    let mut parts = Vec::new();
    for place in &report.places {
        parts.push((place, charts(report, workload, place)?));
    }
    Ok(html! {
        section #(workload.id) {
            h2 { (workload.title) " " code { (workload.id) } }
            p { (workload.what) }
            p.small { b { "How it was measured: " } (how(report, workload)) }
            p.small { b { "What the figures do not say: " } (workload.caveats) }
            @for (place, charts) in parts {
                @if report.places.len() > 1 { h3 { (place.title) } }
                @if charts.is_empty() { p.noise { "Not measured here; see “" a href="#left-out" { "What was left out" } "”." } }
                div.grid { @for chart in &charts { figure { (PreEscaped(chart)) } } }
                @if workload.kind == Kind::Pull { (beside::table(report, workload, place)) }
                @if !charts.is_empty() { (figures(report, workload, place)) }
            }
        }
    })
}

/// Rounds and order, as they were.
fn how(report: &Report, workload: &WorkloadReport) -> String {
    let had = |driver: &DriverReport| {
        let of = report
            .samples
            .iter()
            .filter(|s| s.workload == workload.id && s.driver == driver.about.id);
        of.map(|sample| sample.round + 1).max().unwrap_or(0)
    };
    let rounds: Vec<usize> = report
        .present(workload.kind)
        .into_iter()
        .map(had)
        .filter(|n| *n > 0)
        .collect();
    let (least, most) = (rounds.iter().min(), rounds.iter().max());
    let rounds = match (least, most) {
        (Some(least), Some(most)) if least == most => format!("{most} rounds"),
        (Some(least), Some(most)) => format!("{least} to {most} rounds"),
        _ => "no round".to_owned(),
    };
    if workload.kind == Kind::Pull {
        return format!(
            "{rounds} of {} ways in turns, each round beginning with another; each time into an empty store, \
             while the registry has the image in memory.",
            report.present(workload.kind).len()
        );
    }
    format!(
        "{rounds} of {} drivers in turns, each round beginning with another; a new container for each run, \
         the page cache emptied before it, and all that lay in the image read once before that.",
        report.present(workload.kind).len()
    )
}

/// A chart for each of its speeds.
fn charts(report: &Report, workload: &WorkloadReport, place: &Place) -> Result<Vec<String>> {
    let mut charts = Vec::new();
    for metric in workload.metrics.iter().filter(|m| m.better != Better::Cost) {
        let rows: Vec<Row> = report
            .present(workload.kind)
            .into_iter()
            .filter_map(|driver| row(report, workload, place, metric, driver))
            .collect();
        // Like the first minute of what took less.
        if points(&rows).next().is_none() {
            continue;
        }
        let way = match metric.better {
            Better::Higher => "more is better",
            _ => "less is better",
        };
        let unit = match metric.unit {
            "" => way.to_owned(),
            unit => format!("{unit}, {way}"),
        };
        let panel = Panel::of_medians(super::words::sentence(&metric.title), unit, rows);
        charts.push(chart::panel(&panel)?);
    }
    Ok(charts)
}

fn row(
    report: &Report,
    workload: &WorkloadReport,
    place: &Place,
    metric: &Metric,
    driver: &DriverReport,
) -> Option<Row> {
    let found = report.find(&place.id, &workload.id, metric.id, driver.about.id)?;
    let key = (&*place.id, &*workload.id, metric.id);
    let rounds = report.rounds_of(key, driver.about.id);
    let comparable = driver.comparable();
    let mark = Mark {
        at: found.value.median,
        interval: None,
        points: rounds.iter().map(|(_, value)| *value).collect(),
        hollow: false,
        shown: (0, figure(found.value.median)),
    };
    Some(Row {
        label: driver.about.title.to_owned(),
        look: look(driver),
        marks: Some(mark).filter(|_| comparable).into_iter().collect(),
        note: (!comparable).then(|| why_not(driver).to_owned()),
    })
}

/// The table of everything.
fn figures(report: &Report, workload: &WorkloadReport, place: &Place) -> Markup {
    let find = |metric: &Metric, driver: &DriverReport| {
        report.find(&place.id, &workload.id, metric.id, driver.about.id)
    };
    let drivers = report.present(workload.kind).into_iter();
    let drivers: Vec<_> = drivers
        .filter(|driver| workload.metrics.iter().any(|m| find(m, driver).is_some()))
        .collect();
    html! {
        details {
            summary { "All figures" }
            div.wide { table {
                tr {
                    th { "Median " small { "lowest–highest; × reference, 95 % interval" } }
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
                            td { @if let Some(summary) = find(metric, driver) { (cell(summary)) } }
                        }
                    }
                }
            } }
        }
    }
}

fn cell(summary: &Summary) -> Markup {
    let value = summary.value;
    html! {
        (figure(value.median))
        @if value.rounds >= FEWEST { small { " " (figure(value.low)) "–" (figure(value.high)) } }
        @if let Some(ratio) = summary.ratio {
            @let class = match (summary.comparable, summary.verdict) {
                (false, _) => "fails",
                (true, Some(Verdict::Faster)) => "faster",
                (true, Some(Verdict::Slower)) => "slower",
                (true, _) => "noise",
            };
            br;
            span class=(class) {
                "× " (times(ratio.mean))
                @if let Some([low, high]) = ratio.interval { small { " " (times(low)) "–" (times(high)) } }
            }
        }
    }
}

/// The workloads `chain-N` once more, over the depth.
pub fn chains(report: &Report) -> Result<Markup> {
    let depth = |workload: &WorkloadReport| workload.id.strip_prefix("chain-")?.parse().ok();
    let all = report.workloads.iter();
    let depths: Vec<(f64, &WorkloadReport)> = all.filter_map(|w| Some((depth(w)?, w))).collect();
    let mut charts = Vec::new();
    for place in &report.places {
        let metrics = depths.first().map(|(_, workload)| workload.metrics.iter());
        for metric in metrics
            .into_iter()
            .flatten()
            .filter(|m| m.better != Better::Cost)
        {
            let line = |driver: &DriverReport| Line {
                label: driver.about.title.to_owned(),
                own: driver.about.id == driver::own(Kind::Files),
                points: depths
                    .iter()
                    .filter_map(|(depth, workload)| {
                        let found =
                            report.find(&place.id, &workload.id, metric.id, driver.about.id)?;
                        Some((*depth, found.value.median))
                    })
                    .collect(),
            };
            let drivers = report
                .present(Kind::Files)
                .into_iter()
                .filter(|d| d.comparable());
            let mut all: Vec<Line> = drivers.map(line).collect();
            all.retain(|line| line.points.len() > 1);
            let title = format!("{}: {}", place.title, metric.title);
            let svg = lines((&title, metric.unit, "layers"), NARROW, &all)?;
            charts.extend(Some(svg).filter(|svg| !svg.is_empty()));
        }
    }
    Ok(html! {
        @if !charts.is_empty() {
            section #depth {
                h2 { "What depth costs" }
                p { "The same data in images of more and more layers. A flat line is what one hopes for." }
                div.grid { @for chart in charts { figure { (PreEscaped(chart)) } } }
            }
        }
    })
}
