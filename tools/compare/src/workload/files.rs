//! Whole files: the first write into a large one, and many small ones.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing, random_file};
use crate::host;

/// Puts the large file into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    random_file(&tree.join("large"), sizes.large_file)
}

/// The first 4 KiB into a large file.
pub(super) struct FirstWrite;

impl Workload for FirstWrite {
    fn id(&self) -> String {
        "first-write".to_owned()
    }

    fn title(&self) -> String {
        "The first 4 KiB into a large file".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "A new container opens a file of {} MiB that the image holds, writes 4 KiB into its \
             middle and calls fsync; then does the same at another place. Milliseconds of the \
             whole.",
            sizes.large_file >> 20
        )
    }

    fn headline(&self) -> bool {
        true
    }

    fn caveats(&self) -> &'static str {
        "The container is new and its cache is cold, so the time holds opening the file. A \
         driver that copies whole files pays with the size of the file, others do not: with a \
         file of another size the ratio is another."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("first", "first write", "ms", Better::Lower),
            Metric::new("second", "second write", "ms", Better::Lower),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn base(&self) -> BaseKind {
        BaseKind::LargeFile
    }

    fn weight(&self) -> f64 {
        2.5
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let file = started.access.dir()?.join("large");
        run.cold(&started)?;
        let mut measured = Measured::default();
        let before = crate::cpu::of_process(std::process::id()).unwrap_or(0.0);
        let meter = run.meter();
        for (id, part) in [("first", 2), ("second", 4)] {
            let start = Instant::now();
            let file = OpenOptions::new().write(true).open(&file)?;
            file.write_all_at(&[7; 4096], run.sizes.large_file / part)?;
            file.sync_all()?;
            measured.add(id, start.elapsed().as_secs_f64() * 1000.0);
        }
        let after = crate::cpu::of_process(std::process::id()).unwrap_or(0.0);
        measured.cpu(meter.stop(after - before));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// Many small files.
pub(super) struct Untar;

impl Workload for Untar {
    fn id(&self) -> String {
        "untar".to_owned()
    }

    fn title(&self) -> String {
        "Many small files".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "tar unpacks the host's {} and the file system is synced; with a cold cache all files \
             are read back; they are removed.",
            sizes.tree.display()
        )
    }

    fn caveats(&self) -> &'static str {
        "All files are new, so nothing is copied on a write: it shows a file system's own \
         work with many small files."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("unpack", "unpack and sync", "s", Better::Lower),
            Metric::new("read", "read all, cold", "s", Better::Lower),
            Metric::new("remove", "remove and sync", "s", Better::Lower),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn absent(&self, sizes: &Sizes) -> Option<String> {
        if !sizes.tree.is_dir() {
            let tree = sizes.tree.display();
            return Some(format!("{tree} is no directory: name one with --tree"));
        }
        missing(&[("tar", "tar")])
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let archive = run.scratch.join("tree.tar");
        if !archive.exists() {
            host::run(
                Command::new("tar")
                    .arg("-C")
                    .arg(&run.sizes.tree)
                    .arg("-cf")
                    .arg(&archive)
                    .arg("."),
            )?;
        }
        let started = run.container()?;
        let dir = started.access.dir()?.join("unpacked");
        fs::create_dir(&dir)?;
        let mut measured = Measured::default();
        run.cold(&started)?;
        // The archive itself is not what is measured.
        std::io::copy(&mut fs::File::open(&archive)?, &mut std::io::sink())?;
        let meter = run.meter();
        let mut client = 0.0;
        let mut timed = |id, command: &mut Command| -> Result<()> {
            let start = Instant::now();
            client += host::run(command)?.cpu;
            host::sync_fs(&dir)?;
            measured.add(id, start.elapsed().as_secs_f64());
            Ok(())
        };
        timed(
            "unpack",
            Command::new("tar")
                .arg("-xf")
                .arg(&archive)
                .arg("-C")
                .arg(&dir),
        )?;
        run.cold(&started)?;
        timed("read", &mut host::reading(&dir))?;
        let used = run.image.used()?.saturating_sub(started.before);
        let remove = format!("rm -rf '{}'/*", dir.display());
        timed("remove", Command::new("sh").args(["-c", &remove]))?;
        measured.cpu(meter.stop(client));
        run.done(&started, &mut measured)?;
        // Before the removal says more.
        measured.values.retain(|(id, _)| *id != "space");
        measured.add("space", used as f64 / 1e6);
        Ok(measured)
    }
}
