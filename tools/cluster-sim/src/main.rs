//! How long a cluster takes to start containers whose image is in a registry, by simulation. docs/cluster.md.
#![allow(
    clippy::indexing_slicing,
    clippy::expect_used,
    reason = "hosts, pieces and jobs have numbers of the simulation's own: a wrong one is a mistake that ends it"
)]

mod cluster;
mod fluid;
mod model;
mod report;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use model::{Calibration, Cluster, Strategy};

/// Simulates starts of containers on many hosts, from what was measured of a few
#[derive(Debug, clap::Parser)]
#[command(version)]
struct Cli {
    /// What tools/cluster-sim/calibrate wrote
    calibration: PathBuf,
    /// Hosts
    #[arg(long, default_value_t = 1000)]
    hosts: usize,
    /// Containers that each of them starts
    #[arg(long, default_value_t = 10)]
    containers: usize,
    /// Hosts for each mirror
    #[arg(long, default_value_t = 50)]
    hosts_per_mirror: usize,
    /// The registry's link, each way: 10gbit, 500mbit
    #[arg(long, default_value = "10gbit", value_parser = link)]
    registry_link: f64,
    /// A mirror's
    #[arg(long, default_value = "10gbit", value_parser = link)]
    mirror_link: f64,
    /// A host's
    #[arg(long, default_value = "10gbit", value_parser = link)]
    host_link: f64,
    /// Milliseconds from a request to the first byte of its answer, over an idle network
    #[arg(long, default_value_t = 0.5)]
    round_trip: f64,
    /// Processors of a host, of a mirror and of the registry
    #[arg(long, default_value_t = 4.0)]
    cpus: f64,
    /// Only these ways of bringing the image [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    strategies: Vec<Strategy>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Bytes a second.
fn link(text: &str) -> Result<f64> {
    let units = [
        ("gbit", 1e9 / 8.0),
        ("mbit", 1e6 / 8.0),
        ("kbit", 1e3 / 8.0),
    ];
    let found = units
        .iter()
        .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)));
    let Some((number, bytes)) = found else {
        bail!("a rate has a unit: kbit, mbit or gbit, as in 10gbit");
    };
    let rate = number
        .parse::<f64>()
        .context("not a number before the unit")?
        * bytes;
    if !rate.is_finite() || rate <= 0.0 {
        bail!("a link that carries nothing");
    }
    Ok(rate)
}

fn read(cli: &Cli) -> Result<Calibration> {
    let shown = cli.calibration.display();
    let text = std::fs::read_to_string(&cli.calibration).with_context(|| {
        format!("cannot read {shown}: make it with tools/cluster-sim/calibrate")
    })?;
    let calibration: Calibration = serde_json::from_str(&text)
        .with_context(|| format!("{shown} is not what tools/cluster-sim/calibrate writes"))?;
    if calibration.version != Calibration::VERSION {
        bail!(
            "{shown} is of version {}: calibrate again",
            calibration.version
        );
    }
    Ok(calibration)
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let positive = [cli.hosts, cli.containers, cli.hosts_per_mirror];
    if positive.contains(&0) || cli.cpus <= 0.0 || cli.round_trip < 0.0 {
        bail!(
            "there has to be at least one host, one container, one host for each mirror, and a processor"
        );
    }
    let calibration = read(&cli)?;
    let cluster = Cluster {
        hosts: cli.hosts,
        containers: cli.containers,
        registry_link: cli.registry_link,
        mirror_link: cli.mirror_link,
        host_link: cli.host_link,
        round_trip_s: cli.round_trip / 1000.0,
        hosts_per_mirror: cli.hosts_per_mirror,
        registry_cpus: cli.cpus,
        mirror_cpus: cli.cpus,
        host_cpus: cli.cpus,
        shared_cpus: None,
    };
    let strategies = match cli.strategies.as_slice() {
        [] => &Strategy::ALL[..],
        some => some,
    };
    let report = report::Report::of(&calibration, &cluster, strategies);
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_have_a_unit_and_carry_something() {
        assert_eq!(link("10gbit").unwrap(), 1.25e9);
        assert_eq!(link("0.5mbit").unwrap(), 62500.0);
        for wrong in ["10", "gbit", "0mbit", "-1mbit", "infgbit", "10MB"] {
            assert!(link(wrong).is_err(), "{wrong}");
        }
    }
}
