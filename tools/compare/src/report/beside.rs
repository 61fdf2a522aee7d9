//! Ways of pulling beside those that pull everything: what each figure is of theirs.

use maud::{Markup, html};

use super::words::times;
use super::{DriverReport, Place, Report, WorkloadReport};
use crate::driver::{self, Kind};
use crate::stats::{LEVEL, Ratio, pairs};
use crate::workload::{Better, Metric};

/// A table for the reference and for our own way of pulling everything.
pub fn table(report: &Report, workload: &WorkloadReport, place: &Place) -> Markup {
    let metrics = workload.metrics.iter();
    let metrics: Vec<&Metric> = metrics.filter(|m| m.better != Better::Cost).collect();
    let present = report.present(Kind::Pull);
    let title = |id: &str| {
        let driver = present.iter().find(|driver| driver.about.id == id);
        driver.map(|driver| driver.about.title)
    };
    html! {
        @for whole in [driver::reference(Kind::Pull), driver::own(Kind::Pull)] {
            @if let Some(name) = title(whole) {
                div.wide { table {
                    tr {
                        th { "÷ " (name) " " small { "mean of the rounds, 95 % interval" } }
                        @for metric in &metrics { th { (metric.title) } }
                    }
                    @for driver in present.iter().filter(|driver| driver.about.id != whole) {
                        tr {
                            th { (driver.about.title) }
                            @for metric in &metrics {
                                td { (cell(quotient(report, (place, workload, metric), driver, whole))) }
                            }
                        }
                    }
                } }
            }
        }
    }
}

/// The figure itself over the other's, round by round: of times and bytes less is better.
fn quotient(
    report: &Report,
    (place, workload, metric): (&Place, &WorkloadReport, &Metric),
    driver: &DriverReport,
    whole: &str,
) -> Option<Ratio> {
    let key = (&*place.id, &*workload.id, metric.id);
    let own = report.rounds_of(key, driver.about.id);
    Ratio::of(&pairs(&own, &report.rounds_of(key, whole), true), LEVEL)
}

fn cell(ratio: Option<Ratio>) -> Markup {
    html! {
        @if let Some(ratio) = ratio {
            (times(ratio.mean))
            @if let Some([low, high]) = ratio.interval { small { " " (times(low)) "–" (times(high)) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{add, empty};
    use crate::workload;

    #[test]
    fn a_way_is_shown_as_a_part_of_each_that_pulls_everything() {
        let mut report = empty();
        let all = workload::all();
        let pull = all.iter().find(|workload| workload.id() == "pull").unwrap();
        report.workloads = vec![WorkloadReport {
            id: pull.id(),
            title: pull.title(),
            what: String::new(),
            caveats: pull.caveats(),
            headline: false,
            kind: pull.kind(),
            metrics: pull.metrics(),
        }];
        for (driver, values) in [
            ("pull-overlayfs", [10.0, 20.0, 40.0]),
            ("pull-full", [4.0, 8.0, 16.0]),
            ("pull-lazy", [1.0, 2.0, 4.0]),
        ] {
            add(&mut report, ("pull", "first"), driver, &values);
        }
        report.summarise();
        let shown = table(&report, &report.workloads[0], &report.places[0]).into_string();
        let overlay = shown.find("÷ overlayfs, whole").unwrap();
        let full = shown.find("÷ vellum, whole").unwrap();
        let part = |from: usize, what: &str| shown[from..].find(what).map(|at| from + at);
        assert!(part(overlay, "0.10").unwrap() < full, "{shown}");
        assert!(part(full, "0.25").is_some(), "{shown}");
    }
}
