//! The work that is measured.

mod chain;
mod files;
mod fio;
mod fork;
mod lifecycle;
mod mariadb;
mod nbd;
mod pgbench;
mod pull;
mod sqlite;
mod swarm;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use crate::cpu::{Cpu, Meter};
use crate::driver::{Access, Base, Image, Kind, Link};
use crate::host;

/// How much of everything.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sizes {
    /// Bytes of the file in the image that fio works on.
    pub file: u64,
    /// Bytes of the large file whose first block is written.
    pub large_file: u64,
    /// Writes that are each synced.
    pub synced_writes: u32,
    /// Writes that are not.
    pub buffered_writes: u32,
    /// Random reads of each sort.
    pub reads: u32,
    /// Commits of SQLite, in each of two passes.
    pub commits: u32,
    /// pgbench's scale: 15 MB each.
    pub pg_scale: u32,
    /// Seconds of pgbench.
    pub pg_seconds: u32,
    /// Rows of each of MariaDB's tables.
    pub maria_rows: u32,
    /// Seconds of sysbench.
    pub maria_seconds: u32,
    /// Containers that are made and removed.
    pub containers: u32,
    /// Containers that write at once.
    pub swarm: u32,
    /// Bytes of the file that each of them writes.
    pub swarm_file: u64,
    /// Writes of each of them, buffered.
    pub swarm_writes: u32,
    /// Writes of each of them that are each synced.
    pub swarm_synced: u32,
    /// Bytes that a container has written when it is forked.
    pub fork_data: u64,
    /// Bytes in all layers of a chain together.
    pub chain: u64,
    /// Bytes of the block device behind NBD.
    pub device: u64,
    /// Bytes of libraries in the image that is pulled, beside Python.
    pub pull_libraries: u64,
    /// Bytes of the file in it that is read when all is here.
    pub pull_file: u64,
    /// What it is pulled over.
    pub pull_link: Link,
    /// Milliseconds of what has no other end: reads from memory, requests over NBD.
    pub millis: u32,
    /// The tree that is unpacked.
    pub tree: PathBuf,
}

const MIB: u64 = 1 << 20;

impl Sizes {
    /// Of a full run, or of a quick one.
    pub fn new(quick: bool, pg_scale: u32, pg_seconds: u32, tree: PathBuf) -> Self {
        let pick = |full, small| if quick { small } else { full };
        Sizes {
            file: pick(256, 64) * MIB,
            large_file: pick(1024, 256) * MIB,
            synced_writes: pick(1000, 400) as u32,
            buffered_writes: pick(16_384, 4096) as u32,
            reads: pick(4000, 2500) as u32,
            commits: pick(600, 300) as u32,
            pg_scale,
            pg_seconds,
            maria_rows: pick(100_000, 5000) as u32,
            maria_seconds: pick(20, 4) as u32,
            containers: pick(10, 3) as u32,
            swarm: 16,
            swarm_file: pick(32, 8) * MIB,
            swarm_writes: pick(2048, 256) as u32,
            swarm_synced: pick(150, 16) as u32,
            fork_data: pick(256, 64) * MIB,
            chain: pick(64, 32) * MIB,
            device: pick(256, 64) * MIB,
            pull_libraries: pick(256, 64) * MIB,
            pull_file: 64 * MIB,
            pull_link: Link::default(),
            millis: pick(1000, 200) as u32,
            tree,
        }
    }

    /// The smallest of everything.
    pub fn smoke(tree: PathBuf) -> Self {
        Sizes {
            file: 4 * MIB,
            large_file: 8 * MIB,
            synced_writes: 8,
            buffered_writes: 32,
            reads: 16,
            commits: 4,
            containers: 1,
            maria_rows: 50,
            maria_seconds: 2,
            swarm: 3,
            swarm_file: MIB,
            swarm_writes: 16,
            swarm_synced: 4,
            fork_data: 4 * MIB,
            chain: 4 * MIB,
            device: 8 * MIB,
            pull_libraries: 0,
            pull_file: 2 * MIB,
            millis: 50,
            ..Self::new(true, 1, 2, tree)
        }
    }
}

/// Which way a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More is faster.
    Higher,
    /// Less is faster.
    Lower,
    /// What it cost: shown as it is, without a ratio.
    Cost,
}

/// One figure of a workload.
#[derive(Debug, Clone, Serialize)]
pub struct Metric {
    /// Its name in the report's data.
    pub id: &'static str,
    /// For people.
    pub title: String,
    /// Of the figures.
    pub unit: &'static str,
    /// Which way it counts.
    pub better: Better,
    /// Only for the workload's own table.
    pub detail: bool,
}

impl Metric {
    fn new(id: &'static str, title: impl Into<String>, unit: &'static str, better: Better) -> Self {
        Metric {
            id,
            title: title.into(),
            unit,
            better,
            detail: better == Better::Cost,
        }
    }

    /// Not for the overview.
    fn detail(mut self) -> Self {
        self.detail = true;
        self
    }

    /// What every workload costs besides time.
    fn costs() -> Vec<Self> {
        let mut costs = Self::cpu();
        costs.push(Metric::new(
            "written",
            "written to the disk (whole host)",
            "MB",
            Better::Cost,
        ));
        costs.push(Self::space("space taken by the container afterwards"));
        costs
    }

    /// What [`Measured::cpu`] gives.
    fn cpu() -> Vec<Self> {
        [
            ("cpu_client", "CPU time of the program"),
            ("cpu_server", "CPU time of the driver's processes"),
            ("cpu_kernel", "CPU time of kernel threads (whole host)"),
        ]
        .map(|(id, title)| Metric::new(id, title, "s", Better::Cost))
        .to_vec()
    }

    fn space(title: &str) -> Self {
        Metric::new("space", title, "MB", Better::Cost)
    }
}

/// What one run gave.
#[derive(Debug, Default)]
pub struct Measured {
    /// Figures by the metrics' names.
    pub values: Vec<(&'static str, f64)>,
    /// Something a second, from the start on.
    pub curve: Vec<f64>,
    /// How long transactions took, from the start on: the end of each piece of the run in seconds,
    /// and the median and the 99th percentile of those that ended in it, in milliseconds.
    pub latency: Vec<[f64; 3]>,
    /// What the disk had written when the work began, in bytes.
    disk_before: Option<u64>,
    /// A drawing of the container (SVG), if the driver has one.
    pub picture: Option<String>,
}

impl Measured {
    fn add(&mut self, id: &'static str, value: f64) {
        self.values.push((id, value));
    }

    fn cpu(&mut self, (cpu, disk_before): (Cpu, Option<u64>)) {
        self.disk_before = disk_before;
        self.add("cpu_client", cpu.client);
        self.add("cpu_server", cpu.server);
        self.add("cpu_kernel", cpu.kernel);
    }
}

/// The images that workloads start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseKind {
    /// A small root, a file for fio, an SQLite database.
    General,
    /// One large file.
    LargeFile,
    /// A PostgreSQL cluster.
    Cluster,
    /// MariaDB's data directory.
    MariaDb,
    /// A small file for each of many containers.
    Swarm,
    /// Files spread over this many layers.
    Layers(u32),
    /// A block device full of random bytes.
    Device,
    /// Python and libraries, in a registry.
    Pulled,
}

/// What a run needs.
pub struct Run<'a> {
    /// How much.
    pub sizes: &'a Sizes,
    /// A directory for things that are not measured.
    pub scratch: &'a Path,
    /// The place that is measured, to sync it.
    pub place: &'a Path,
    /// Where the image and its containers lie, if that is on a disk.
    pub on_disk: Option<&'a Path>,
    /// Where containers come from.
    pub image: &'a mut dyn Image,
    /// The container's name, new for each run.
    pub name: &'a str,
}

impl Run<'_> {
    /// Makes and starts a container.
    fn container(&mut self) -> Result<Started> {
        let before = self.image.used()?;
        self.image.create(self.name)?;
        let access = self.image.start(self.name)?;
        Ok(Started { access, before })
    }

    /// The space that a container has taken, then stops and removes it.
    fn done(&mut self, started: &Started, measured: &mut Measured) -> Result<()> {
        if let Access::Dir(dir) = &started.access {
            host::sync_fs(dir)?;
        }
        let used = self.image.used()?.saturating_sub(started.before);
        measured.add("space", used as f64 / 1e6);
        let written = measured.disk_before.zip(host::written(self.place));
        if let Some((before, after)) = written {
            measured.add("written", after.saturating_sub(before) as f64 / 1e6);
        }
        let _cleaning = host::CleaningUp::begin();
        self.image.stop(self.name)?;
        self.image.remove(self.name)
    }

    /// Counts CPU time, and what the disk writes, from here on.
    fn meter(&self) -> Counting {
        Counting {
            disk: host::written(self.place),
            cpu: Meter::start(self.image.servers(self.name)),
        }
    }

    /// Empties the page cache, and leaves nothing to write back to disturb what follows.
    fn cold(&self, started: &Started) -> Result<()> {
        match &started.access {
            Access::Dir(dir) => self.cold_all(std::slice::from_ref(dir)),
            Access::Nbd(_) => self.cold_all(&[]),
        }
    }

    /// As [`Run::cold`], for several containers with a directory each.
    fn cold_all(&self, dirs: &[PathBuf]) -> Result<()> {
        if let Some(dir) = self.on_disk {
            host::read_all(dir)?;
        }
        let mut places: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
        places.push(self.place);
        host::drop_caches(&places)
    }
}

/// What a piece of work takes, while it runs.
struct Counting {
    disk: Option<u64>,
    cpu: Meter,
}

impl Counting {
    /// The CPU time until here, `client` of it of the clients; what the disk had written before.
    fn stop(&self, client: f64) -> (Cpu, Option<u64>) {
        (self.cpu.stop(client), self.disk)
    }
}

/// A container in use.
struct Started {
    access: Access,
    before: u64,
}

/// Some work.
pub trait Workload {
    /// For `--workloads`.
    fn id(&self) -> String;

    /// For headings.
    fn title(&self) -> String;

    /// What it does, for readers who do not know the programs.
    fn what(&self, sizes: &Sizes) -> String;

    /// What it gives.
    fn metrics(&self) -> Vec<Metric>;

    /// The drivers it is for.
    fn kind(&self) -> Kind {
        Kind::Files
    }

    /// What its containers start from.
    fn base(&self) -> BaseKind {
        BaseKind::General
    }

    /// One of the few that readers quote: all drivers have their rounds of it before anything else.
    fn headline(&self) -> bool {
        false
    }

    /// What its figures do not say.
    fn caveats(&self) -> &'static str;

    /// Its share of the time there is by its value to readers: of what nobody quotes, less than it
    /// would take.
    fn share(&self) -> f64 {
        self.weight() * if self.headline() { 1.0 } else { 0.4 }
    }

    /// How long it takes beside others; 1.5 for the shortest.
    fn weight(&self) -> f64 {
        1.5
    }

    /// Why this host cannot do it; none when it can.
    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        None
    }

    /// Does it once, in a new container.
    fn run(&self, run: &mut Run<'_>) -> Result<Measured>;
}

/// All workloads: those that readers quote first, and of the others the longest last, which take what
/// time the others leave.
pub fn all() -> Vec<Box<dyn Workload>> {
    let mut all: Vec<Box<dyn Workload>> = vec![
        Box::new(files::FirstWrite),
        Box::new(fio::RandomWrite { synced: true }),
        Box::new(fio::RandomWrite { synced: false }),
        Box::new(fio::RandomRead),
        Box::new(sqlite::Sqlite { wal: true }),
        Box::new(pgbench::Pgbench),
        Box::new(sqlite::Sqlite { wal: false }),
        Box::new(lifecycle::Lifecycle),
        Box::new(files::Untar),
        Box::new(fio::Sequential),
        Box::new(nbd::Nbd),
        Box::new(swarm::Swarm),
        Box::new(fork::Fork),
        Box::new(chain::Life { depth: 64 }),
    ];
    for depth in [1, 8, 32, 128] {
        all.push(Box::new(chain::Chain { depth }));
    }
    all.push(Box::new(mariadb::Sysbench));
    all.push(Box::new(pull::Pull));
    all.push(Box::new(pull::Fetch));
    all
}

/// The PostgreSQL server that is used, if there is one.
pub fn postgres_program() -> Option<String> {
    let dir = pgbench::programs()?;
    Some(dir.join("postgres").to_string_lossy().into_owned())
}

/// Makes the image that workloads of this kind start from, in an empty directory.
pub fn make_base(kind: BaseKind, dir: &Path, sizes: &Sizes) -> Result<Base> {
    let layer = dir.join("0");
    std::fs::create_dir_all(&layer)?;
    match kind {
        BaseKind::General => {
            fio::fill(&layer, sizes)?;
            sqlite::fill(&layer)?;
            lifecycle::fill(&layer)?;
        }
        BaseKind::LargeFile => files::fill(&layer, sizes)?,
        BaseKind::Cluster => pgbench::fill(&layer, sizes)?,
        BaseKind::MariaDb => mariadb::fill(&layer, sizes)?,
        BaseKind::Swarm => swarm::fill(&layer, sizes)?,
        BaseKind::Pulled => {
            pull::fill(&layer, sizes)?;
            let size = device_size(&layer, sizes)?;
            return Ok(Base::of_layers(vec![layer], size).over(sizes.pull_link.clone()));
        }
        BaseKind::Layers(depth) => return chain::make(dir, depth, sizes),
        BaseKind::Device => {
            let raw = dir.join("device.raw");
            random_file(&raw, sizes.device)?;
            return Ok(Base::of_raw(raw, sizes.device));
        }
    }
    let size = device_size(&layer, sizes)?;
    Ok(Base::of_layers(vec![layer], size))
}

/// Twice what the tree has, what workloads add, and some more; whole GiB.
fn device_size(tree: &Path, sizes: &Sizes) -> Result<u64> {
    host::sync_fs(tree)?;
    let bytes = host::allocated(tree) * 2 + sizes.file + (2 << 30);
    Ok(bytes.div_ceil(1 << 30) << 30)
}

/// A file of bytes that no driver can compress or leave out.
fn random_file(path: &Path, size: u64) -> Result<()> {
    use std::io::Read;
    let mut random = std::fs::File::open("/dev/urandom")?.take(size);
    let mut file = std::fs::File::create(path)?;
    std::io::copy(&mut random, &mut file)?;
    Ok(())
}

/// The reason when there is no user of that name.
fn missing_user(name: &str) -> Option<String> {
    let reason = || format!("there is no user {name} to run it as");
    host::user(name).is_err().then(reason)
}

/// The reason when a program is missing.
fn missing(programs: &[(&str, &str)]) -> Option<String> {
    programs
        .iter()
        .find(|(program, _)| host::find_program(program).is_none())
        .map(|(program, package)| {
            format!("{program} is not installed (Debian: apt-get install {package})")
        })
}
