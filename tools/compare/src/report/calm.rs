//! Whether the host was calm enough for its figures to mean something, and what to do where not.

use super::Report;
use super::words::times;
use crate::driver::{self, Kind};
use crate::stats::{FEWEST, Spread};
use crate::workload::Better;

/// Running processes for each processor, before the run adds its own.
const LOAD: f64 = 0.3;
/// The part of the processors' time that others may take.
const STEAL: f64 = 0.02;
/// How far apart rounds of the reference beside itself may lie, as a factor.
const APART: f64 = 1.5;

/// What was too restless, each with what to do; none for a calm host.
pub fn warnings(report: &Report) -> Vec<String> {
    let all = [
        emulated(report),
        load(report),
        steal(report),
        reference(report),
    ];
    all.into_iter().flatten().collect()
}

/// An emulated processor takes ten times as long for some instructions and fifty times for others.
fn emulated(report: &Report) -> Option<String> {
    report.host.emulated.then(|| {
        "This machine's processors are emulated (QEMU TCG): absolute times mean nothing, and ratios \
         are mostly of how much each driver computes. The flush checks hold all the same. Run on a \
         machine of its own, or with hardware virtualisation, for figures."
            .to_owned()
    })
}

fn load(report: &Report) -> Option<String> {
    let load = *report.host.load.first()?;
    let processors = report.host.processor_count.max(1);
    (load > LOAD * processors as f64).then(|| {
        format!(
            "This host was busy before the run began: load {load:.1} on {processors} processors. \
             Stop what else runs (ps aux --sort=-%cpu shows it), wait for two minutes, and run \
             again."
        )
    })
}

fn steal(report: &Report) -> Option<String> {
    let steal = report.host.steal;
    (steal > STEAL).then(|| {
        format!(
            "The machine below this virtual one gave {:.0} % of its processors' time to others \
             while the run lasted. Run on a machine of your own, or at an hour when others are \
             quiet.",
            steal * 100.0
        )
    })
}

/// The reference measured twice in each round: how far the two lie apart is what the host adds.
fn reference(report: &Report) -> Option<String> {
    let mut all = 0;
    let mut apart: Vec<f64> = Vec::new();
    for kind in [Kind::Files, Kind::Nbd] {
        let id = driver::control(kind);
        let Some(control) = report.drivers.iter().find(|driver| driver.about.id == id) else {
            continue;
        };
        for place in report.places.iter().filter(|place| !place.in_memory) {
            for workload in report.workloads.iter().filter(|w| w.kind == kind) {
                for metric in &workload.metrics {
                    if metric.better == Better::Cost {
                        continue;
                    }
                    let pairs = report.pairs(&place.id, &workload.id, metric.id, control);
                    let spread = Spread::of(pairs).filter(|spread| spread.rounds >= FEWEST);
                    let Some(spread) = spread else { continue };
                    all += 1;
                    apart.extend([spread.high / spread.low].iter().filter(|a| **a > APART));
                }
            }
        }
    }
    let most = apart.iter().copied().fold(0.0, f64::max);
    (apart.len() * 3 > all).then(|| {
        format!(
            "The plain file differed from itself by more than {APART} × between rounds in {} of \
             {all} figures, by {} × at most: this disk or this host is restless, and small \
             differences between drivers mean nothing. Stop other work; on a shared disk take more \
             rounds (--rounds 10 --time-limit 0).",
            apart.len(),
            times(most)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{add, empty};

    #[test]
    fn a_calm_host_is_not_warned_of() {
        let mut report = empty();
        report.host.processor_count = 2;
        report.host.load = vec![0.5, 9.0];
        report.host.steal = 0.01;
        assert_eq!(warnings(&report), Vec::<String>::new());
    }

    #[test]
    fn an_emulated_machine_says_so_before_all_else() {
        let mut report = empty();
        report.host.emulated = true;
        report.host.processor_count = 2;
        report.host.load = vec![1.9];
        let said = warnings(&report);
        assert!(said[0].contains("QEMU TCG"), "{said:?}");
        assert_eq!(said.len(), 2);
    }

    #[test]
    fn load_before_the_run_and_stolen_time_are_told_with_what_to_do() {
        let mut report = empty();
        report.host.processor_count = 2;
        report.host.load = vec![1.9];
        report.host.steal = 0.25;
        let said = warnings(&report);
        assert!(said[0].contains("load 1.9 on 2 processors") && said[0].contains("Stop"));
        assert!(said[1].contains("25 %") && said[1].contains("Run on"));
    }

    #[test]
    fn a_reference_that_differs_from_itself_is_told() {
        let mut report = empty();
        add(&mut report, ("fio-fsync", "first"), "raw", &[1.0, 1.0, 1.0]);
        add(
            &mut report,
            ("fio-fsync", "first"),
            "raw-again",
            &[0.5, 1.0, 1.2],
        );
        let said = warnings(&report).join("");
        assert!(said.contains("1 of 1 figures, by 2.4 × at most"), "{said}");
        // Two rounds say nothing about that.
        report.samples.retain(|sample| sample.round < 2);
        assert!(warnings(&report).is_empty());
    }
}
