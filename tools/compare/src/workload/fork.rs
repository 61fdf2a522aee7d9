//! A second container of what a first one is now.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::{Better, Measured, Metric, Run, Sizes, Workload, random_file};
use crate::host;

/// Bytes of each file of the data.
const FILE: u64 = 1 << 20;

/// A container with data of its own is forked.
pub(super) struct Fork;

impl Workload for Fork {
    fn id(&self) -> String {
        "fork".to_owned()
    }

    fn title(&self) -> String {
        "A fork of a container with data".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "A container writes {} MiB into files of {} MiB and syncs them; with a cold cache a second \
             container is made of what it is then, in the way of each driver: vellum fork, a snapshot of a \
             btrfs subvolume, a copy that shares blocks (XFS), a copy of all that it wrote (overlayfs: the \
             upper directory). A copy of files while somebody writes them is not of one moment. The raw \
             file is copied, and qcow2 gets two overlays on it, while the container is unmounted, which is \
             part of the time. Milliseconds until the fork is durable and the container in use again, and \
             until the fork is mounted too and the first of its files was read.",
            sizes.fork_data >> 20,
            FILE >> 20
        )
    }

    fn caveats(&self) -> &'static str {
        "Drivers that copy files do not copy one moment of them; raw and qcow2 are unmounted \
         for the copy, which counts."
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            Metric::new("fork", "fork made, durable", "ms", Better::Lower),
            Metric::new("first", "its first file read", "ms", Better::Lower),
            Metric::space("space taken by the fork, mounted"),
        ]
    }

    fn weight(&self) -> f64 {
        2.0
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let data = started.access.dir()?.join("written");
        let expected = fill(&data, run.sizes.fork_data)?;
        let before = run.image.used()?;
        run.cold(&started)?;
        let name = format!("{}-fork", run.name);
        let mut measured = Measured::default();
        let mut figure = |id, since: Instant| {
            measured.add(id, since.elapsed().as_secs_f64() * 1000.0);
        };
        let start = Instant::now();
        run.image.fork(run.name, &name)?;
        figure("fork", start);
        let access = run.image.start(&name)?;
        let read = fs::read(access.dir()?.join("written/0"))?;
        figure("first", start);
        ensure!(read == expected, "the fork holds something else");
        let used = run.image.used()?.saturating_sub(before);
        measured.add("space", used as f64 / 1e6);
        for name in [&name, run.name] {
            run.image.stop(name)?;
            run.image.remove(name)?;
        }
        Ok(measured)
    }
}

/// Writes the data; returns what is in the first file.
fn fill(data: &Path, bytes: u64) -> Result<Vec<u8>> {
    fs::create_dir(data)?;
    for number in 0..bytes / FILE {
        random_file(&data.join(number.to_string()), FILE)?;
    }
    host::sync_fs(data)?;
    Ok(fs::read(data.join("0"))?)
}
