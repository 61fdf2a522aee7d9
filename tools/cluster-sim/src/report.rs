//! What comes out, and how far it lies from what was measured.

use std::fmt;

use serde::Serialize;

use crate::cluster::{Outcome, simulate};
use crate::model::{Calibration, Cluster, Strategy};

/// All that is printed.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    about: String,
    checks: Vec<Check>,
    cluster: Cluster,
    rows: Vec<Row>,
}

/// A simulation of what was measured.
#[derive(Debug, Serialize)]
struct Check {
    strategy: Strategy,
    hosts: usize,
    measured_median_s: f64,
    simulated_median_s: f64,
    measured_last_s: f64,
    simulated_last_s: f64,
}

/// A simulation of the cluster.
#[derive(Debug, Serialize)]
struct Row {
    strategy: Strategy,
    median_s: f64,
    p99_s: f64,
    last_s: f64,
    registry_bytes: f64,
    registry_requests: u64,
}

impl Report {
    pub(crate) fn of(
        calibration: &Calibration,
        cluster: &Cluster,
        strategies: &[Strategy],
    ) -> Self {
        let rows = strategies.iter().map(|strategy| {
            let outcome = simulate(calibration, cluster, *strategy);
            Row::of(*strategy, &outcome)
        });
        Report {
            about: calibration.about.clone(),
            checks: checks(calibration),
            cluster: cluster.clone(),
            rows: rows.collect(),
        }
    }
}

/// Each host alone, and the hosts that were measured together.
fn checks(calibration: &Calibration) -> Vec<Check> {
    let alone = [Strategy::Full, Strategy::Ranges, Strategy::Hot].map(|strategy| {
        (
            strategy,
            1,
            vec![calibration.start(strategy).first_output_s],
        )
    });
    let together = calibration
        .together
        .iter()
        .map(|row| (row.strategy, row.hosts, row.first_output_s.clone()));
    alone
        .into_iter()
        .chain(together)
        .filter(|(_, _, measured)| !measured.is_empty())
        .map(|(strategy, hosts, mut measured)| {
            measured.sort_by(f64::total_cmp);
            let cluster = Cluster {
                hosts,
                containers: 1,
                ..calibration.cluster.clone()
            };
            let simulated = simulate(calibration, &cluster, strategy).first_output_s;
            Check {
                strategy,
                hosts,
                measured_median_s: at(&measured, 0.5),
                simulated_median_s: at(&simulated, 0.5),
                measured_last_s: at(&measured, 1.0),
                simulated_last_s: at(&simulated, 1.0),
            }
        })
        .collect()
}

impl Row {
    fn of(strategy: Strategy, outcome: &Outcome) -> Self {
        Row {
            strategy,
            median_s: at(&outcome.first_output_s, 0.5),
            p99_s: at(&outcome.first_output_s, 0.99),
            last_s: at(&outcome.first_output_s, 1.0),
            registry_bytes: outcome.registry_bytes,
            registry_requests: outcome.registry_requests,
        }
    }
}

/// The value below which that part of them lies, of sorted ones: the nearest rank.
fn at(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "Calibrated: {}", self.about)?;
        writeln!(
            out,
            "\nSeconds to the first output, as measured and as simulated:\n"
        )?;
        writeln!(
            out,
            "{:9} {:>5}  {:>22}  {:>22}",
            "", "hosts", "median: measured, sim.", "last: measured, sim."
        )?;
        for check in &self.checks {
            let pair = |measured: f64, simulated: f64| {
                let off = 100.0 * (simulated / measured - 1.0);
                format!("{measured:6.2} {simulated:6.2} ({off:+4.0} %)")
            };
            writeln!(
                out,
                "{:9} {:>5}  {:>22}  {:>22}",
                check.strategy.name(),
                check.hosts,
                pair(check.measured_median_s, check.simulated_median_s),
                pair(check.measured_last_s, check.simulated_last_s)
            )?;
        }
        let cluster = &self.cluster;
        writeln!(
            out,
            "\nSimulated: {} hosts with {} containers each, links of {:.3} Gbit/s (registry), {:.3} (mirrors), {:.3} (hosts), \
             a mirror for {} hosts, {} processors each:\n",
            cluster.hosts,
            cluster.containers,
            cluster.registry_link * 8.0 / 1e9,
            cluster.mirror_link * 8.0 / 1e9,
            cluster.host_link * 8.0 / 1e9,
            cluster.hosts_per_mirror,
            cluster.host_cpus
        )?;
        writeln!(
            out,
            "{:9} {:>9} {:>9} {:>9}  {:>14} {:>14}",
            "", "median", "99 %", "last", "registry sends", "requests"
        )?;
        for row in &self.rows {
            writeln!(
                out,
                "{:9} {:7.2} s {:7.2} s {:7.2} s  {:11.2} GB {:14}",
                row.strategy.name(),
                row.median_s,
                row.p99_s,
                row.last_s,
                row.registry_bytes / 1e9,
                row.registry_requests
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::at;

    #[test]
    fn parts_of_a_row_are_those_of_the_nearest_rank() {
        let row: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(
            [at(&row, 0.5), at(&row, 0.99), at(&row, 1.0)],
            [100.0, 198.0, 200.0]
        );
        assert_eq!(at(&[7.0], 0.5), 7.0);
    }
}
