//! Images of many layers.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use super::fio::fio;
use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing, random_file};
use crate::driver::Base;
use crate::stats::Spread;

/// An image of `depth` layers, with one file in each; all files together are always of one size.
pub(super) fn make(dir: &Path, depth: u32, sizes: &Sizes) -> Result<Base> {
    let size = file_size(sizes, depth);
    let mut layers = Vec::new();
    for number in 0..depth {
        let layer = dir.join(number.to_string());
        fs::create_dir_all(layer.join("data"))?;
        random_file(&layer.join(file(number)), size)?;
        layers.push(layer);
    }
    // Some MiB for each layer of a file system that copies each time.
    Ok(Base::of_layers(
        layers,
        (sizes.chain + (2 << 30)).div_ceil(1 << 30) << 30,
    ))
}

fn file_size(sizes: &Sizes, depth: u32) -> u64 {
    (sizes.chain / u64::from(depth)) & !0xffff
}

fn file(number: u32) -> String {
    format!("data/file-{number}")
}

/// Reads and a life at one depth.
pub(super) struct Chain {
    pub depth: u32,
}

impl Workload for Chain {
    fn id(&self) -> String {
        format!("chain-{}", self.depth)
    }

    fn title(&self) -> String {
        if self.depth == 1 {
            "An image of 1 layer".to_owned()
        } else {
            format!("An image of {} layers", self.depth)
        }
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "The image holds {} MiB of files, spread evenly over {} layer{}. fio reads blocks of \
             4 KiB at random places of all files, with a cold cache, and warm after all files \
             have been read. Life: create, mount, unmount, remove.",
            sizes.chain >> 20,
            self.depth,
            if self.depth == 1 { "" } else { "s" }
        )
    }

    fn caveats(&self) -> &'static str {
        "The data is the same at each depth; what grows is the way to it."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("cold", "cold reads", "reads/s", Better::Higher),
            Metric::new("warm", "warm reads", "reads/s", Better::Higher),
            Metric::new("life", "life", "ms", Better::Lower),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn base(&self) -> BaseKind {
        BaseKind::Layers(self.depth)
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[("fio", "fio")])
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let mut measured = Measured::default();
        measured.add("life", live(run)?);

        let started = run.container()?;
        let dir = started.access.dir()?;
        let files: Vec<String> = (0..self.depth)
            .map(|number| dir.join(file(number)).display().to_string())
            .collect();
        // A list of 128 names is longer than fio takes.
        let directory = format!("--directory={}", dir.join("data").display());
        let nrfiles = format!("--nrfiles={}", self.depth);
        let total = file_size(run.sizes, self.depth) * u64::from(self.depth);
        let size = format!("--size={total}");
        let number = format!("--number_ios={}", run.sizes.reads);
        let runtime = format!("--runtime={}ms", run.sizes.millis);
        let common = [
            &directory,
            "--filename_format=file-$filenum",
            &nrfiles,
            &size,
            "--rw=randread",
            "--bs=4k",
            "--ioengine=psync",
        ];
        let many = [
            "--file_service_type=random",
            "--openfiles=200",
            "--invalidate=0",
        ];
        let with = |more: &[&str]| fio(&[&common[..], &many, more].concat());
        run.cold(&started)?;
        let meter = run.meter();
        let cold = with(&[&number])?;
        for file in &files {
            std::io::copy(&mut fs::File::open(file)?, &mut std::io::sink())?;
        }
        let warm = with(&["--time_based", &runtime])?;
        measured.add("cold", cold.rate);
        measured.add("warm", warm.rate);
        measured.cpu(meter.stop(cold.cpu + warm.cpu));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// The lives of containers on a deep image, and nothing else.
pub(super) struct Life {
    pub depth: u32,
}

/// Lives in a row; the median counts.
const LIVES: usize = 7;

impl Workload for Life {
    fn id(&self) -> String {
        format!("life-{}", self.depth)
    }

    fn title(&self) -> String {
        format!("A container's life on {} layers", self.depth)
    }

    fn what(&self, _sizes: &Sizes) -> String {
        format!(
            "A container of an image of {} layers is made, mounted, unmounted and removed; the \
             median of {LIVES} in a row, in milliseconds. Each step is the command that a person \
             would type, so starting a program is part of it.",
            self.depth
        )
    }

    fn caveats(&self) -> &'static str {
        "The commands that a user would call, so the start of programs is in it."
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![Metric::new("life", "life", "ms", Better::Lower)]
    }

    fn base(&self) -> BaseKind {
        BaseKind::Layers(self.depth)
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let mut measured = Measured::default();
        let mut lives = Vec::new();
        for _ in 0..LIVES {
            lives.push(live(run)?);
        }
        if let Some(spread) = Spread::of(lives) {
            measured.add("life", spread.median);
        }
        Ok(measured)
    }
}

/// Milliseconds of a container that is made, mounted, unmounted and removed.
fn live(run: &mut Run<'_>) -> Result<f64> {
    let start = Instant::now();
    run.image.create(run.name)?;
    run.image.start(run.name)?;
    run.image.stop(run.name)?;
    run.image.remove(run.name)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}
