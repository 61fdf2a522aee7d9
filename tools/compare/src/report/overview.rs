//! The chart that answers: every driver in the six workloads that readers quote.

use anyhow::Result;

use super::answer::{HEADLINES, Headline};
use super::chart::{self, Look, Mark, Panel, Row, Scale};
use super::words::times;
use super::{DriverReport, Place, Report};
use crate::driver::{self, Kind};
use crate::stats::{FEWEST, Spread};

/// What the marks mean, below the chart.
pub const LEGEND: [&str; 3] = [
    "Times as fast as a plain file without copy-on-write (the line at 1); logarithmic. Right is faster.",
    "Ring: the first touch (or cold). Dot: from then on (or warm). Bar: 95 % confidence interval over the rounds; small points: single rounds.",
    "Shaded: the plain file beside itself, which is noise. Arrow: beyond the axis.",
];

/// A panel for each workload of which there is a figure.
pub fn panels(report: &Report, place: &Place) -> Vec<Panel> {
    let all = HEADLINES
        .iter()
        .map(|headline| panel(report, place, headline));
    all.flatten().collect()
}

/// All panels as one drawing.
pub fn picture(report: &Report, place: &Place) -> Result<Option<String>> {
    let panels = panels(report, place);
    if panels.is_empty() {
        return Ok(None);
    }
    let title = format!(
        "Storage drivers for containers beside a plain file: {}",
        place.title
    );
    chart::together(&panels, 3.min(panels.len()), &title, &LEGEND).map(Some)
}

fn panel(report: &Report, place: &Place, headline: &Headline) -> Option<Panel> {
    let workload = report
        .workloads
        .iter()
        .find(|w| w.id == headline.workload)?;
    let drivers = report.drivers.iter();
    let drivers = drivers.filter(|d| d.about.kind == workload.kind && !d.is_reference());
    let rows: Vec<Row> = drivers
        .map(|driver| row(report, place, headline, driver))
        .collect();
    rows.iter().any(|row| !row.marks.is_empty()).then(|| Panel {
        title: headline.title.to_owned(),
        unit: "× as fast as a plain file".to_owned(),
        // The same for all: what lies beyond has its figure beside it.
        scale: Scale::log(0.1, 10.0),
        line: Some(1.0),
        band: band(report, place, headline),
        columns: [headline.called.0, headline.called.1]
            .map(str::to_owned)
            .to_vec(),
        rows,
    })
}

fn row(report: &Report, place: &Place, headline: &Headline, driver: &DriverReport) -> Row {
    let mut row = Row {
        label: driver.about.title.to_owned(),
        look: look(driver),
        marks: Vec::new(),
        note: None,
    };
    if driver.absent.is_some() {
        row.note = Some("not on this host".to_owned());
        return row;
    }
    if !driver.comparable() {
        row.note = Some(why_not(driver).to_owned());
        return row;
    }
    let figures = [(headline.first, true), (headline.then, false)];
    for (column, (metric, hollow)) in figures.into_iter().enumerate() {
        let found = report.find(&place.id, headline.workload, metric, driver.about.id);
        let Some(ratio) = found.and_then(|found| found.ratio) else {
            continue;
        };
        let single = ratio.rounds < FEWEST;
        let points = report.pairs(&place.id, headline.workload, metric, driver);
        row.marks.push(Mark {
            at: ratio.mean,
            interval: ratio.interval,
            points: if single { points } else { Vec::new() },
            hollow,
            shown: (column, times(ratio.mean)),
        });
    }
    if row.marks.is_empty() {
        row.note = Some("not measured".to_owned());
    }
    row
}

/// Why a driver is crossed out, in a few words.
pub fn why_not(driver: &DriverReport) -> &'static str {
    match driver.flush {
        Some(_) => "✗ loses flushed data",
        None => "✗ flushes not checked",
    }
}

/// How a driver's row is drawn.
pub fn look(driver: &DriverReport) -> Look {
    let about = &driver.about;
    if !driver.comparable() {
        Look::NotComparable
    } else if driver::is_own(about.id) {
        Look::Own
    } else {
        Look::Other
    }
}

/// Where rounds of the reference beside itself lay, of both figures.
fn band(report: &Report, place: &Place, headline: &Headline) -> Option<[f64; 2]> {
    let id = driver::control(Kind::Files);
    let control = report.drivers.iter().find(|driver| driver.about.id == id)?;
    let pairs = [headline.first, headline.then]
        .into_iter()
        .flat_map(|metric| report.pairs(&place.id, headline.workload, metric, control));
    Spread::of(pairs)
        .filter(|spread| spread.rounds > 2)
        .map(|spread| [spread.low, spread.high])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;

    #[test]
    fn the_not_comparable_are_crossed_out_with_the_reason_and_without_figures() {
        let report = example();
        let panels = panels(&report, &report.places[0]);
        assert_eq!(panels.len(), 1);
        let row = |label: &str| {
            panels[0]
                .rows
                .iter()
                .find(|row| row.label == label)
                .unwrap()
        };
        assert_eq!(row("btrfs").look, Look::NotComparable);
        assert_eq!(row("btrfs").note.as_deref(), Some("✗ loses flushed data"));
        assert!(row("btrfs").marks.is_empty());
        assert_eq!(row("qcow2").note.as_deref(), Some("not on this host"));
        assert_eq!(row("overlayfs").marks[0].shown.1, "2.0");
        assert!(row("overlayfs").marks[0].interval.is_some());
        assert_eq!(panels[0].band, Some([0.95, 1.05]));
        assert!(
            picture(&report, &report.places[0])
                .unwrap()
                .unwrap()
                .contains("<svg")
        );
    }

    #[test]
    fn single_rounds_are_points_and_no_range() {
        let mut report = example();
        report.samples.retain(|sample| sample.round == 0);
        report.summarise();
        let panels = panels(&report, &report.places[0]);
        let marks = panels[0].rows.iter().flat_map(|row| &row.marks);
        assert!(marks.clone().count() > 0);
        for mark in marks {
            assert_eq!((mark.interval, mark.points.len()), (None, 1));
        }
    }
}
