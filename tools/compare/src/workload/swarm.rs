//! Many containers at once.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use super::fio::{Job, fio_jobs};
use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing, random_file};
use crate::host;

const FILE: &str = "data/file";

/// Puts the file that each container writes into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    fs::create_dir_all(tree.join("data"))?;
    random_file(&tree.join(FILE), sizes.swarm_file)
}

/// Containers of one image that write at the same time.
pub(super) struct Swarm;

impl Workload for Swarm {
    fn id(&self) -> String {
        "swarm".to_owned()
    }

    fn title(&self) -> String {
        "Containers side by side".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "{} containers of one image write at the same time, each blocks of 8 KiB at random \
             places of its own file of {} MiB. Buffered: {} first touches each, one fsync at the \
             end (opening the file included, since overlayfs copies it then). Synced: {} of these \
             blocks again, fsync after each. Total: writes a second of all until the last has \
             ended. Fairness: the slowest container beside the mean, 1 where all are equal.",
            sizes.swarm,
            sizes.swarm_file >> 20,
            sizes.swarm_writes,
            sizes.swarm_synced
        )
    }

    fn caveats(&self) -> &'static str {
        "Sixteen containers on few processors: the driver's CPU time decides more here than \
         its way to the disk."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("total", "buffered, total", "writes/s", Better::Higher),
            Metric::new("synced", "synced, total", "writes/s", Better::Higher),
            Metric::new("fair", "buffered, slowest ÷ mean", "", Better::Higher).detail(),
            Metric::new("fair_synced", "synced, slowest ÷ mean", "", Better::Higher).detail(),
            Metric::new("start", "create and mount all", "ms", Better::Lower).detail(),
        ];
        metrics.extend(Metric::cpu());
        metrics.push(Metric::space("space taken by all"));
        metrics
    }

    fn base(&self) -> BaseKind {
        BaseKind::Swarm
    }

    fn weight(&self) -> f64 {
        4.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[("fio", "fio")])
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let names: Vec<String> = (0..run.sizes.swarm)
            .map(|number| format!("{}-{number}", run.name))
            .collect();
        let measured = work(run, &names);
        for name in &names {
            // What never was made cannot be removed, and that is not what went wrong.
            let stopped = run.image.stop(name).and_then(|()| run.image.remove(name));
            if measured.is_ok() {
                stopped?;
            }
        }
        measured
    }
}

fn work(run: &mut Run<'_>, names: &[String]) -> Result<Measured> {
    let mut measured = Measured::default();
    let before = run.image.used()?;
    let start = Instant::now();
    let mut dirs: Vec<PathBuf> = Vec::new();
    for name in names {
        run.image.create(name)?;
        dirs.push(run.image.start(name)?.dir()?.to_owned());
    }
    measured.add("start", start.elapsed().as_secs_f64() * 1000.0);
    run.cold_all(&dirs)?;
    let servers = names.iter().flat_map(|name| run.image.servers(name));
    let mut servers: Vec<u32> = servers.collect();
    servers.sort_unstable();
    servers.dedup();
    let meter = super::Counting {
        disk: host::written(run.place),
        cpu: crate::cpu::Meter::start(servers),
    };
    let files: Vec<PathBuf> = dirs.iter().map(|dir| dir.join(FILE)).collect();
    let start = Instant::now();
    for file in &files {
        drop(OpenOptions::new().write(true).open(file)?);
    }
    let open = start.elapsed().as_secs_f64();
    let size = format!("--size={}", run.sizes.swarm_file);
    let common = [
        &size,
        "--rw=randwrite",
        "--bs=8k",
        "--ioengine=psync",
        "--randrepeat=1",
        "--overwrite=1",
    ];
    let mut client = 0.0;
    let buffered = format!("--number_ios={}", run.sizes.swarm_writes);
    let synced = format!("--number_ios={}", run.sizes.swarm_synced);
    for (total, fair, open, more) in [
        ("total", "fair", open, [&*buffered, "--end_fsync=1"]),
        ("synced", "fair_synced", 0.0, [&*synced, "--fsync=1"]),
    ] {
        let jobs = fio_jobs(&[&common[..], &more].concat(), &files)?;
        let (rate, slowest) = together(&jobs, open);
        measured.add(total, rate);
        measured.add(fair, slowest);
        client += jobs.iter().map(|job| job.cpu).sum::<f64>();
    }
    measured.cpu(meter.stop(client));
    for dir in &dirs {
        host::sync_fs(dir)?;
    }
    let used = run.image.used()?.saturating_sub(before);
    measured.add("space", used as f64 / 1e6);
    Ok(measured)
}

/// Requests a second of all jobs until the last has ended, and the slowest rate beside the mean.
fn together(jobs: &[Job], open: f64) -> (f64, f64) {
    let seconds = jobs.iter().map(Job::seconds).fold(0.0, f64::max) + open;
    let requests: f64 = jobs.iter().map(|job| job.requests).sum();
    let mean = jobs.iter().map(|job| job.rate).sum::<f64>() / jobs.len().max(1) as f64;
    let slowest = jobs
        .iter()
        .map(|job| job.rate)
        .fold(f64::INFINITY, f64::min);
    (requests / seconds, slowest / mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_lasts_until_the_slowest_has_ended_and_starving_shows() {
        let job = |rate| Job {
            requests: 100.0,
            rate,
            bytes: 0.0,
            cpu: 0.0,
        };
        let (total, fair) = together(&[job(100.0), job(100.0), job(25.0)], 0.0);
        assert_eq!(total, 75.0);
        assert!((fair - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(together(&[job(50.0)], 0.0), (50.0, 1.0));
    }
}
