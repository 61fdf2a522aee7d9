//! Which drivers and workloads are measured, where and for how long.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cli::Measure;
use crate::driver::{self, Driver, Kind, Link};
use crate::workload::{self, BaseKind, Sizes, Workload};

/// What a command line asks for.
pub struct Chosen {
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
    /// How long in all; none without a limit.
    pub limit: Option<Duration>,
    /// What was not chosen, and why.
    pub left_out: Vec<String>,
}

/// How much of everything.
pub fn sizes(options: &Measure) -> Sizes {
    let mut sizes = amounts(options);
    sizes.pull_link = Link {
        rate: options.pull_rate.clone(),
        round_trip: options.pull_delay,
        estargz_level: options.smoke.then_some(1),
    };
    sizes
}

fn amounts(options: &Measure) -> Sizes {
    if options.smoke {
        return Sizes::smoke(options.tree.clone());
    }
    let pick = |full, small| if options.quick { small } else { full };
    let scale = options.pg_scale.unwrap_or(pick(50, 3));
    let seconds = options.pg_seconds.unwrap_or(pick(12, 2));
    Sizes::new(
        options.quick,
        scale.max(1),
        seconds.max(2),
        options.tree.clone(),
    )
}

/// Refuses what is not there, by its name.
///
/// # Errors
/// For a driver or a workload of no such name, a driver of a name that is taken.
pub fn check_names(options: &Measure) -> Result<()> {
    let ids: Vec<_> = driver::all(Path::new("vellum"), &options.qemu, &options.driver)?
        .iter()
        .map(|driver| driver.about().id.to_owned())
        .collect();
    for brought in &options.driver {
        ensure!(
            ids.iter().filter(|id| **id == brought.name).count() == 1,
            "--driver {}: there is a driver of that name: choose another",
            brought.name
        );
    }
    let twice = ids
        .iter()
        .enumerate()
        .find(|(number, id)| ids.iter().skip(number + 1).any(|other| other == *id));
    if let Some((_, id)) = twice {
        bail!("--qemu: two are of one version, and both would be {id}: name one of them");
    }
    known("driver", &options.drivers, &ids)?;
    let workloads: Vec<_> = workload::all().iter().map(|w| w.id()).collect();
    known("workload", &options.workloads, &workloads)
}

fn known(what: &str, names: &[String], known: &[String]) -> Result<()> {
    for name in names {
        if !known.contains(name) {
            bail!(
                "no {what} is called {name}; there are: {}",
                known.join(", ")
            );
        }
    }
    Ok(())
}

/// What is to be measured.
///
/// # Errors
/// For a directory that is not there, a time that is none.
pub fn choose(options: &Measure, vellum: &Path) -> Result<Chosen> {
    let quick = options.quick || options.smoke;
    let mut left_out = Vec::new();
    let workloads = workloads(options, &mut left_out);
    let wanted = |id: &str| {
        options.drivers.is_empty()
            || options.drivers.iter().any(|name| name == id)
            || options.driver.iter().any(|brought| brought.name == id)
    };
    let mut drivers = driver::all(vellum, &options.qemu, &options.driver)?;
    drivers.retain(|driver| {
        let about = driver.about();
        // Noise says nothing about hardly any work, and a pull is the longest of it.
        let controlled = !(options.smoke && about.kind == Kind::Pull);
        let control = controlled.then(|| driver::control(about.kind));
        let reference = [Some(driver::reference(about.kind)), control];
        workloads.iter().any(|w| w.kind() == about.kind)
            && (wanted(about.id) || reference.contains(&Some(about.id)))
    });
    left_out.push(
        "Drivers that need a kernel module or a daemon of their own (ublk, device-mapper thin pools, \
         ZFS, containerd's snapshotters) are not part of this comparison, but for those that were \
         brought; docs/comparing.md says how to. Where containers are pulled from a registry, containerd unpacks for \
         those of overlayfs and stargz."
            .to_owned(),
    );
    let dirs = places(&options.dir)?;
    let usual = if quick { 4.8 } else { 40.0 * dirs.len() as f64 };
    let minutes = options.time_limit.unwrap_or(usual);
    ensure!(
        (0.0..=1e6).contains(&minutes),
        "--time-limit {minutes}: no number of minutes: give one like 40, or 0 for no limit"
    );
    Ok(Chosen {
        drivers,
        workloads,
        rounds: options.rounds.unwrap_or(if quick { 3 } else { 5 }).max(1),
        dirs,
        sizes: sizes(options),
        limit: (minutes > 0.0).then(|| Duration::from_secs_f64(minutes * 60.0)),
        left_out,
    })
}

/// Those that were named; else all, with `--quick` those that readers quote.
fn workloads(options: &Measure, left_out: &mut Vec<String>) -> Vec<Box<dyn Workload>> {
    let mut chosen = workload::all();
    if !options.workloads.is_empty() {
        chosen.retain(|workload| options.workloads.contains(&workload.id()));
        return chosen;
    }
    if options.quick {
        chosen.retain(|workload| workload.headline());
        left_out.push("All workloads but six, and drivers over NBD: not with --quick".to_owned());
    } else if options.smoke {
        let deep = |w: &dyn Workload| matches!(w.base(), BaseKind::Layers(depth) if depth > 8);
        chosen.retain(|workload| !deep(workload.as_ref()));
    }
    chosen
}

/// The directories to measure in.
fn places(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let usual = [PathBuf::from("/var/tmp")];
    let dirs = if given.is_empty() { &usual } else { given };
    let canonical =
        |dir: &PathBuf| fs::canonicalize(dir).with_context(|| format!("--dir {}", dir.display()));
    dirs.iter().map(canonical).collect()
}

/// When a run that begins now has to end.
pub fn end(limit: Option<Duration>) -> Option<Instant> {
    limit.and_then(|limit| Instant::now().checked_add(limit))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn options(arguments: &[&str]) -> Measure {
        let line = [&["compare", "--dir", "/tmp"], arguments].concat();
        Cli::try_parse_from(line).unwrap().measure
    }

    fn chosen(arguments: &[&str]) -> Chosen {
        let options = options(arguments);
        check_names(&options).unwrap();
        choose(&options, Path::new("vellum")).unwrap()
    }

    fn ids(chosen: &Chosen) -> Vec<&'static str> {
        chosen.drivers.iter().map(|d| d.about().id).collect()
    }

    #[test]
    fn quick_is_the_six_that_people_quote_through_every_driver_in_three_rounds() {
        let quick = chosen(&["--quick"]);
        let workloads: Vec<String> = quick.workloads.iter().map(|w| w.id()).collect();
        assert_eq!(
            workloads,
            [
                "first-write",
                "fio-fsync",
                "fio-buffered",
                "fio-read",
                "sqlite-wal",
                "pgbench"
            ]
        );
        assert_eq!(quick.rounds, 3);
        let limit = quick.limit.unwrap();
        assert!(limit < Duration::from_secs(300) && limit > Duration::from_secs(200));
        let every = driver::all(Path::new("vellum"), &[], &[]).unwrap();
        let files = every
            .iter()
            .filter(|d| d.about().kind == Kind::Files)
            .count();
        assert_eq!(quick.drivers.len(), files);
    }

    #[test]
    fn a_full_run_begins_with_what_people_quote_and_has_all() {
        let full = chosen(&[]);
        let headline: Vec<bool> = full.workloads.iter().map(|w| w.headline()).collect();
        assert!(
            headline.is_sorted_by_key(|headline| !headline),
            "{headline:?}"
        );
        assert_eq!(full.workloads.len(), workload::all().len());
        assert_eq!(full.limit, Some(Duration::from_secs(2400)));
        assert_eq!(chosen(&["--time-limit", "0"]).limit, None);
    }

    #[test]
    fn a_driver_of_the_users_own_runs_beside_the_references() {
        let own = [
            "--driver",
            "mine=up:true,down:true",
            "--drivers",
            "overlayfs",
            "--quick",
        ];
        assert_eq!(
            ids(&chosen(&own)),
            ["raw", "raw-again", "overlayfs", "mine"]
        );
        let taken = Cli::try_parse_from(["compare", "--driver", "raw=up:true,down:true"]);
        let error = check_names(&taken.unwrap().measure).unwrap_err();
        assert!(format!("{error}").contains("choose another"));
    }

    #[test]
    fn a_qemu_of_a_root_stands_beside_this_hosts_with_its_version_in_the_name() {
        let of_root = options(&["--qemu", "/", "--drivers", "raw"]);
        let all = driver::all(Path::new("vellum"), &of_root.qemu, &[]).unwrap();
        let ids: Vec<_> = all.iter().map(|d| d.about().id).collect();
        let newer = |id: &&str| id.starts_with("qemu") && !id.starts_with("qemu-");
        assert_eq!(ids.iter().filter(|id| newer(id)).count(), 3, "{ids:?}");
        assert!(ids.iter().any(|id| id.starts_with("qcow2-qemu")), "{ids:?}");
        check_names(&of_root).unwrap();
        let error = check_names(&options(&["--qemu", "/", "--qemu", "/"])).unwrap_err();
        assert!(format!("{error}").contains("of one version"), "{error}");
    }

    #[test]
    fn a_name_that_nothing_has_is_refused_with_those_that_there_are() {
        let options = Cli::try_parse_from(["compare", "--drivers", "zfs"]).unwrap();
        let error = check_names(&options.measure).unwrap_err();
        assert!(format!("{error}").contains("there are: raw"));
    }
}
