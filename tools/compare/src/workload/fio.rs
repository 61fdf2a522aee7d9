//! fio on a file of the image.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use super::{Better, Measured, Metric, Run, Sizes, Workload, missing, random_file};
use crate::host;

/// The file in the image, and another for the buffered writes to have its own first touch.
const FILE: &str = "data/file";

/// Puts the file into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    std::fs::create_dir_all(tree.join("data"))?;
    random_file(&tree.join(FILE), sizes.file)
}

/// What a run of fio gave.
pub(super) struct Job {
    /// Requests.
    pub requests: f64,
    /// Requests a second.
    pub rate: f64,
    /// Bytes a second.
    pub bytes: f64,
    /// CPU seconds of its requests.
    pub cpu: f64,
}

impl Job {
    /// Seconds of the requests alone, without fio's own start.
    pub fn seconds(&self) -> f64 {
        self.requests / self.rate
    }
}

/// Runs fio and takes what it says in JSON.
pub(super) fn fio(arguments: &[&str]) -> Result<Job> {
    let mut command = std::process::Command::new("fio");
    command
        .args(["--name=job", "--output-format=json", "--fallocate=none"])
        .args(arguments);
    let report = run_fio(&mut command)?;
    job(report.pointer("/jobs/0").context("fio ran no job")?)
}

/// Runs the same job on several files at once.
pub(super) fn fio_jobs(arguments: &[&str], files: &[std::path::PathBuf]) -> Result<Vec<Job>> {
    let mut command = std::process::Command::new("fio");
    command
        .args(["--output-format=json", "--fallocate=none", "--thread"])
        .args(arguments);
    for (number, file) in files.iter().enumerate() {
        command
            .arg(format!("--name=job{number}"))
            .arg(format!("--filename={}", file.display()));
    }
    let report = run_fio(&mut command)?;
    let jobs = report.pointer("/jobs").and_then(|jobs| jobs.as_array());
    let jobs: Vec<Job> = jobs.into_iter().flatten().map(job).collect::<Result<_>>()?;
    anyhow::ensure!(
        jobs.len() == files.len(),
        "fio ran {} of {} jobs",
        jobs.len(),
        files.len()
    );
    Ok(jobs)
}

fn run_fio(command: &mut std::process::Command) -> Result<serde_json::Value> {
    let finished = host::run(command)?;
    // It may say something before the object, on standard output too.
    let start = finished.stdout.find('{').context("fio gave no JSON")?;
    let json = finished.stdout.get(start..).unwrap_or_default();
    serde_json::from_str(json).context("fio's JSON")
}

fn job(job: &serde_json::Value) -> Result<Job> {
    let figure = |direction: &str, name: &str| {
        job.pointer(&format!("/{direction}/{name}"))
            .and_then(serde_json::Value::as_f64)
            .unwrap_or(0.0)
    };
    let both = |name: &str| figure("read", name) + figure("write", name);
    let requests = both("total_ios");
    let millis = figure("read", "runtime").max(figure("write", "runtime"));
    anyhow::ensure!(requests > 0.0, "fio carried out no request");
    let seconds = millis.max(1.0) / 1000.0;
    // Not of the whole program, which spends a quarter of a second on calibrating its clock.
    let top = |name: &str| {
        job.get(name)
            .and_then(serde_json::Value::as_f64)
            .unwrap_or(0.0)
    };
    let cpu = (top("usr_cpu") + top("sys_cpu")) / 100.0 * top("job_runtime") / 1000.0;
    Ok(Job {
        requests,
        rate: requests / seconds,
        bytes: both("io_bytes") / seconds,
        cpu,
    })
}

fn absent() -> Option<String> {
    missing(&[("fio", "fio")])
}

/// 8 KiB random writes.
pub(super) struct RandomWrite {
    /// With fsync after each.
    pub synced: bool,
}

impl Workload for RandomWrite {
    fn id(&self) -> String {
        if self.synced {
            "fio-fsync"
        } else {
            "fio-buffered"
        }
        .to_owned()
    }

    fn title(&self) -> String {
        if self.synced {
            "8 KiB random writes, fsync after each"
        } else {
            "8 KiB random writes, one fsync at the end"
        }
        .to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        let writes = if self.synced {
            sizes.synced_writes
        } else {
            sizes.buffered_writes
        };
        format!(
            "fio writes {writes} blocks of 8 KiB at random places of a file of {} MiB that the \
             image holds. First touch: the container writes these blocks for the first time \
             (opening the file included, since overlayfs copies it then). Steady: the same blocks \
             in the same order once more. Requests a second.",
            sizes.file >> 20
        )
    }

    fn headline(&self) -> bool {
        true
    }

    fn caveats(&self) -> &'static str {
        "Both passes write the same places in the same order: a first touch is told apart \
         from a rewrite, and from nothing else. What the disk does with an fsync decides much \
         of the figure; a virtual disk may answer faster than a real one."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("first", "first touch", "writes/s", Better::Higher),
            Metric::new("steady", "steady", "writes/s", Better::Higher),
            Metric::new("open", "opening the file for writing", "ms", Better::Cost),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn weight(&self) -> f64 {
        5.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        absent()
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let file = started.access.dir()?.join(FILE);
        let mut measured = Measured::default();
        run.cold(&started)?;
        let meter = run.meter();
        let start = Instant::now();
        drop(OpenOptions::new().write(true).open(&file)?);
        let open = start.elapsed().as_secs_f64();
        let (writes, sync) = if self.synced {
            (run.sizes.synced_writes, "--fsync=1")
        } else {
            (run.sizes.buffered_writes, "--end_fsync=1")
        };
        let filename = format!("--filename={}", file.display());
        let size = format!("--size={}", run.sizes.file);
        let number = format!("--number_ios={writes}");
        let arguments = [
            &filename,
            &size,
            &number,
            sync,
            "--rw=randwrite",
            "--bs=8k",
            "--ioengine=psync",
            // The second pass writes what the first one wrote.
            "--randrepeat=1",
            "--overwrite=1",
        ];
        let first = fio(&arguments)?;
        let steady = fio(&arguments)?;
        measured.add("open", open * 1000.0);
        measured.add("first", first.requests / (first.seconds() + open));
        measured.add("steady", steady.rate);
        measured.cpu(meter.stop(first.cpu + steady.cpu));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// 8 KiB random reads, cold and warm.
pub(super) struct RandomRead;

impl Workload for RandomRead {
    fn id(&self) -> String {
        "fio-read".to_owned()
    }

    fn title(&self) -> String {
        "8 KiB random reads".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "fio reads {} blocks of 8 KiB at random places of a file of {} MiB that the image \
             holds. Cold: with an empty page cache, one at a time and, with an empty one again, 64 \
             at a time. Warm: after the file has been read whole, so from memory.",
            sizes.reads,
            sizes.file >> 20
        )
    }

    fn headline(&self) -> bool {
        true
    }

    fn caveats(&self) -> &'static str {
        "Cold is cold in this host's page cache alone: a cache below the disk, as virtual \
         machines have one, knows the image of each driver alike. Warm reads never leave \
         memory, so they show the file system above the driver more than the driver."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("cold", "cold, one at a time", "reads/s", Better::Higher),
            Metric::new("cold64", "cold, 64 at a time", "reads/s", Better::Higher),
            Metric::new("warm", "warm, one at a time", "reads/s", Better::Higher),
            Metric::new("warm64", "warm, 64 at a time", "reads/s", Better::Higher),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn weight(&self) -> f64 {
        8.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        absent()
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let file = started.access.dir()?.join(FILE);
        let filename = format!("--filename={}", file.display());
        let size = format!("--size={}", run.sizes.file);
        let number = format!("--number_ios={}", run.sizes.reads);
        let runtime = format!("--runtime={}ms", run.sizes.millis);
        let common = [&filename, &size, "--rw=randread", "--bs=8k"];
        let with = |more: &[&str]| fio(&[&common[..], more].concat());
        let mut measured = Measured::default();
        run.cold(&started)?;
        let meter = run.meter();
        let cold = with(&[&number, "--ioengine=psync"])?;
        run.cold(&started)?;
        let cold64 = with(&[
            &number,
            "--ioengine=io_uring",
            "--iodepth=64",
            "--randseed=7",
        ])?;
        std::io::copy(&mut std::fs::File::open(&file)?, &mut std::io::sink())?;
        let warm = with(&[
            "--ioengine=psync",
            "--invalidate=0",
            "--time_based",
            &runtime,
        ])?;
        let warm64 = with(&[
            "--ioengine=io_uring",
            "--iodepth=64",
            "--invalidate=0",
            "--time_based",
            &runtime,
        ])?;
        measured.add("cold", cold.rate);
        measured.add("cold64", cold64.rate);
        measured.add("warm", warm.rate);
        measured.add("warm64", warm64.rate);
        measured.cpu(meter.stop(cold.cpu + cold64.cpu + warm.cpu + warm64.cpu));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// Large requests in order.
pub(super) struct Sequential;

impl Workload for Sequential {
    fn id(&self) -> String {
        "fio-sequential".to_owned()
    }

    fn title(&self) -> String {
        "Sequential reads and writes".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "fio reads a file of {0} MiB of the image in order with a cold cache, writes a new \
             file of {0} MiB with one fsync at the end, and writes it again. 1 MiB a request.",
            sizes.file >> 20
        )
    }

    fn caveats(&self) -> &'static str {
        "Megabytes a second of one stream. The disk itself is the limit of most of these."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("read", "cold read", "MB/s", Better::Higher),
            Metric::new("first", "write, new file", "MB/s", Better::Higher),
            Metric::new("steady", "write, again", "MB/s", Better::Higher),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        absent()
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let dir = started.access.dir()?;
        let size = format!("--size={}", run.sizes.file);
        let read = format!("--filename={}", dir.join(FILE).display());
        let write = format!("--filename={}", dir.join("data/new").display());
        let common = [&size, "--bs=1m", "--ioengine=psync"];
        let with = |more: &[&str]| fio(&[&common[..], more].concat());
        let writing = [&write, "--rw=write", "--end_fsync=1"];
        let mut measured = Measured::default();
        run.cold(&started)?;
        let meter = run.meter();
        let read = with(&[&read, "--rw=read"])?;
        let first = with(&writing)?;
        let steady = with(&[&writing[..], &["--overwrite=1"]].concat())?;
        measured.add("read", read.bytes / 1e6);
        measured.add("first", first.bytes / 1e6);
        measured.add("steady", steady.bytes / 1e6);
        measured.cpu(meter.stop(read.cpu + first.cpu + steady.cpu));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}
