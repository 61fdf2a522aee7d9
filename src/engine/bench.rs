//! What copy-on-write costs on this disk: each case beside plain calls on a plain sparse file,
//! round by round in turns, so that a ratio means something on a noisy machine.

mod counting;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;

use crate::block::{BLOCK_SIZE, BlockDevice, Durability};
use crate::chain::{Chain, ChainSpec, ChainStats, open_chain, open_counted_chain};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::layer::{Header, LayerOptions, WritableLayer, seal_in_place};
use crate::storage::{FileStorage, Storage};

/// Virtual size of the devices that are written: small enough to stay in the page cache.
const DEVICE: u64 = 256 << 20;
/// Bytes that one round of a throughput case moves.
const ROUND: u64 = 64 << 20;
/// Flushes of one round.
const FLUSHES: u64 = 100;

/// One case.
#[derive(Debug, Clone, Serialize)]
pub struct CaseResult {
    /// What is measured.
    pub name: String,
    /// What it is compared with.
    pub reference: String,
    /// Microseconds an operation, the median over rounds.
    pub micros: f64,
    /// Microseconds an operation of the reference.
    pub reference_micros: f64,
    /// Speed relative to the reference, the median over rounds: above 1 is faster.
    pub ratio: f64,
    /// The smallest and the largest ratio of a round.
    pub range: (f64, f64),
}

/// Measures what the counters of a chain cost, in a directory of its own under `dir`, and removes
/// it.
///
/// # Errors
/// Where the host fails.
pub fn run_counting(
    dir: &Path,
    rounds: usize,
    mut done: impl FnMut(&CaseResult),
) -> Result<Vec<CaseResult>> {
    let scratch = scratch_dir(dir)?;
    let bench = Bench::new(scratch.path())?;
    let mut results = Vec::new();
    counting::run(&bench, rounds, |result| {
        done(&result);
        results.push(result);
    })?;
    Ok(results)
}

fn scratch_dir(dir: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("vellum-bench-")
        .tempdir_in(dir)
        .context(|| format!("cannot make a directory in {}", dir.display()))
}

/// Runs all cases in a directory of its own under `dir`, and removes it.
///
/// # Errors
/// Where the host fails.
pub fn run(
    dir: &Path,
    rounds: usize,
    mut done: impl FnMut(&CaseResult),
) -> Result<Vec<CaseResult>> {
    let scratch = scratch_dir(dir)?;
    let bench = Bench::new(scratch.path())?;
    let mut results = Vec::new();
    let mut note = |result: CaseResult| {
        done(&result);
        results.push(result);
    };
    for case in WRITES {
        let raw = || bench.raw_writes(case);
        let ours = || bench.chain_writes(case);
        note(compare(
            case.name,
            "pwrite to a sparse file",
            rounds,
            &ours,
            &raw,
        )?);
    }
    let shallow = bench.deep_chain(1, 16)?;
    for depth in [8, 32, 128] {
        let deep = bench.deep_chain(depth, 16)?;
        let name = format!("read 4 KiB at random, depth {depth}");
        let ours = || random_reads(&deep);
        let reference = || random_reads(&shallow);
        note(compare(&name, "depth 1", rounds, &ours, &reference)?);
    }
    for (name, overwrite) in [("allocating", false), ("overwriting", true)] {
        let name = format!("write 8 KiB and flush, {name}");
        let ours = || bench.chain_flushes(overwrite);
        let raw = || bench.raw_flushes(overwrite);
        note(compare(&name, "pwrite and fdatasync", rounds, &ours, &raw)?);
    }
    let deep = bench.open_spec(128, 8 << 20)?;
    let flat = bench.open_spec(1, 1 << 30)?;
    let ours = || bench.open_once(&deep);
    let reference = || bench.open_once(&flat);
    let name = "open 128 layers, 1 GiB in 10 GiB";
    note(compare(
        name,
        "the same in 1 layer",
        rounds,
        &ours,
        &reference,
    )?);
    Ok(results)
}

/// A kind of first write.
#[derive(Debug, Clone, Copy)]
struct WriteCase {
    name: &'static str,
    len: usize,
    random: bool,
    /// Write this much less than `len`, so that the rest is copied up.
    short: usize,
}

const WRITES: &[WriteCase] = &[
    WriteCase {
        name: "first write, 4 KiB in order",
        len: 4096,
        random: false,
        short: 0,
    },
    WriteCase {
        name: "first write, 4 KiB at random",
        len: 4096,
        random: true,
        short: 0,
    },
    WriteCase {
        name: "first write, 64 KiB at random",
        len: 65536,
        random: true,
        short: 0,
    },
    WriteCase {
        name: "first write, 1 MiB in order",
        len: 1 << 20,
        random: false,
        short: 0,
    },
    WriteCase {
        name: "copy-up, 512 B of 4 KiB at random",
        len: 4096,
        random: true,
        short: 3584,
    },
];

impl WriteCase {
    /// Offsets in the order of the case, the same for both sides.
    fn offsets(self) -> Vec<u64> {
        let len = self.len as u64;
        let slots = DEVICE / len;
        let count = (ROUND / len).min(slots);
        // An odd stride visits every slot of a power of two once.
        let stride = if self.random {
            (slots as f64 * 0.618) as u64 | 1
        } else {
            1
        };
        (0..count).map(|at| at * stride % slots * len).collect()
    }
}

/// Seconds an operation.
type Side<'a> = &'a dyn Fn() -> Result<f64>;

fn compare(
    name: &str,
    reference: &str,
    rounds: usize,
    ours: Side<'_>,
    theirs: Side<'_>,
) -> Result<CaseResult> {
    let mut mine = Vec::new();
    let mut other = Vec::new();
    // The first round warms both up and does not count.
    for round in 0..=rounds.max(1) {
        // Who comes first changes, in case it matters.
        let (a, b) = if round % 2 == 0 {
            let a = ours()?;
            (a, theirs()?)
        } else {
            let b = theirs()?;
            (ours()?, b)
        };
        if round > 0 {
            mine.push(a);
            other.push(b);
        }
    }
    Ok(CaseResult::new(name, reference, &mut mine, &mut other))
}

impl CaseResult {
    /// From the seconds an operation of both sides, round by round.
    fn new(name: &str, reference: &str, mine: &mut [f64], other: &mut [f64]) -> Self {
        let mut ratios: Vec<f64> = mine.iter().zip(other.iter()).map(|(a, b)| b / a).collect();
        ratios.sort_by(f64::total_cmp);
        let range = (
            ratios.first().copied().unwrap_or_default(),
            ratios.last().copied().unwrap_or_default(),
        );
        CaseResult {
            name: name.to_owned(),
            reference: reference.to_owned(),
            micros: median(mine) * 1e6,
            reference_micros: median(other) * 1e6,
            ratio: median(&mut ratios),
            range,
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn per_operation(begin: Instant, count: usize) -> f64 {
    begin.elapsed().as_secs_f64() / count.max(1) as f64
}

struct Bench {
    dir: PathBuf,
    storage: Arc<dyn Storage>,
    parent: PathBuf,
    parent_uuid: Uuid,
}

impl Bench {
    fn new(dir: &Path) -> Result<Self> {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage);
        let mut bench = Bench {
            dir: dir.to_owned(),
            storage,
            parent: PathBuf::new(),
            parent_uuid: Uuid::nil(),
        };
        // A parent that holds every block, so that a copy-up has something to copy.
        let (parent, uuid) = bench.sealed_layer(None, DEVICE, |layer| {
            let chunk = vec![0x5a; 1 << 20];
            (0..DEVICE / (1 << 20)).try_for_each(|at| {
                layer
                    .write_blocks(at * ((1 << 20) / BLOCK_SIZE), &chunk)
                    .map(drop)
            })
        })?;
        bench.parent = parent;
        bench.parent_uuid = uuid;
        Ok(bench)
    }

    fn new_layer(&self, parent: Option<Uuid>, size: u64) -> Result<(PathBuf, Uuid)> {
        let header = Header::new(parent, size)?;
        let dir = self.dir.join(header.uuid.to_string());
        WritableLayer::create(&*self.storage, &dir, &header)?;
        Ok((dir, header.uuid))
    }

    fn sealed_layer(
        &self,
        parent: Option<Uuid>,
        size: u64,
        fill: impl FnOnce(&WritableLayer) -> Result<()>,
    ) -> Result<(PathBuf, Uuid)> {
        let (dir, uuid) = self.new_layer(parent, size)?;
        let layer = WritableLayer::open(self.storage.clone(), &dir, LayerOptions::default())?;
        fill(&layer)?;
        layer.seal()?;
        drop(layer);
        seal_in_place(&*self.storage, &dir, |_| {})?;
        Ok((dir, uuid))
    }

    /// A fresh layer on the parent, gone when the guard is dropped.
    fn fresh_chain(&self) -> Result<(Chain, Scratch)> {
        self.counted_chain(Arc::default())
    }

    fn counted_chain(&self, stats: Arc<ChainStats>) -> Result<(Chain, Scratch)> {
        let (top, _) = self.new_layer(Some(self.parent_uuid), DEVICE)?;
        let spec = ChainSpec {
            sealed: vec![self.parent.clone()],
            top: Some(top.clone()),
            options: LayerOptions::default(),
        };
        let chain = open_counted_chain(&self.storage, &spec, stats)?;
        Ok((chain, Scratch(top)))
    }

    fn fresh_file(&self) -> Result<(File, Scratch)> {
        let path = self.dir.join("raw");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        let file = file.context(|| format!("cannot make {}", path.display()))?;
        file.set_len(DEVICE)
            .context(|| format!("cannot extend {}", path.display()))?;
        Ok((file, Scratch(path)))
    }

    fn chain_writes(&self, case: &WriteCase) -> Result<f64> {
        let (chain, _scratch) = self.fresh_chain()?;
        let offsets = case.offsets();
        let buf = vec![0xa5; case.len - case.short];
        let begin = Instant::now();
        for &offset in &offsets {
            chain.write_at(&buf, offset, Durability::Buffered)?;
        }
        Ok(per_operation(begin, offsets.len()))
    }

    fn raw_writes(&self, case: &WriteCase) -> Result<f64> {
        let (file, _scratch) = self.fresh_file()?;
        let offsets = case.offsets();
        let buf = vec![0xa5; case.len - case.short];
        let begin = Instant::now();
        for &offset in &offsets {
            file.write_all_at(&buf, offset)
                .context(|| "writing the raw file")?;
        }
        Ok(per_operation(begin, offsets.len()))
    }

    fn chain_flushes(&self, overwrite: bool) -> Result<f64> {
        let (chain, _scratch) = self.fresh_chain()?;
        let buf = [0xa5; 8192];
        if overwrite {
            chain.write_at(&vec![1; ROUND as usize], 0, Durability::Buffered)?;
        } else {
            // The journal's own making is not a flush's cost.
            chain.write_at(&buf, DEVICE - 8192, Durability::Buffered)?;
        }
        chain.flush()?;
        let begin = Instant::now();
        for at in 0..FLUSHES {
            chain.write_at(&buf, at * 37 % FLUSHES * 65536, Durability::Buffered)?;
            chain.flush()?;
        }
        Ok(per_operation(begin, FLUSHES as usize))
    }

    fn raw_flushes(&self, overwrite: bool) -> Result<f64> {
        let (file, _scratch) = self.fresh_file()?;
        let buf = [0xa5; 8192];
        let what = || "writing the raw file";
        if overwrite {
            file.write_all_at(&vec![1; ROUND as usize], 0)
                .context(what)?;
        }
        file.sync_data().context(what)?;
        let begin = Instant::now();
        for at in 0..FLUSHES {
            file.write_all_at(&buf, at * 37 % FLUSHES * 65536)
                .context(what)?;
            file.sync_data().context(what)?;
        }
        Ok(per_operation(begin, FLUSHES as usize))
    }

    /// A read-only chain of `depth` layers, `mib` MiB in all, whose blocks take turns.
    fn deep_chain(&self, depth: u64, mib: u64) -> Result<Chain> {
        let blocks = (mib << 20) / BLOCK_SIZE;
        let mut sealed = Vec::new();
        let mut parent = None;
        for number in 0..depth {
            let (dir, uuid) = self.sealed_layer(parent, mib << 20, |layer| {
                (number..blocks)
                    .step_by(depth as usize)
                    .try_for_each(|block| layer.write_blocks(block, &[0x77; 4096]).map(drop))
            })?;
            sealed.push(dir);
            parent = Some(uuid);
        }
        open_chain(
            &self.storage,
            &ChainSpec {
                sealed,
                ..ChainSpec::default()
            },
        )
    }

    /// `depth` layers of 10 GiB that hold `bytes` each, in runs of 64 KiB all over.
    fn open_spec(&self, depth: u64, bytes: u64) -> Result<ChainSpec> {
        const RUN: u64 = 16;
        const SIZE: u64 = 10 << 30;
        let slots = SIZE / BLOCK_SIZE / RUN;
        let mut sealed = Vec::new();
        let mut parent = None;
        for number in 0..depth {
            let runs = bytes / (RUN * BLOCK_SIZE);
            let (dir, uuid) = self.sealed_layer(parent, SIZE, |layer| {
                (0..runs).try_for_each(|at| {
                    let slot = (number * runs + at) * 40_507 % slots;
                    layer.allocate_zeroed(slot * RUN, RUN)
                })
            })?;
            sealed.push(dir);
            parent = Some(uuid);
        }
        Ok(ChainSpec {
            sealed,
            ..ChainSpec::default()
        })
    }

    fn open_once(&self, spec: &ChainSpec) -> Result<f64> {
        let begin = Instant::now();
        let chain = open_chain(&self.storage, spec)?;
        let seconds = begin.elapsed().as_secs_f64();
        if chain.base().depth() != spec.sealed.len() {
            return Err(Error::new(ErrorKind::Io, "the chain lost a layer"));
        }
        Ok(seconds)
    }
}

/// Reads every block of the chain once, in an order without order.
fn random_reads(chain: &Chain) -> Result<f64> {
    let blocks = chain.size() / BLOCK_SIZE;
    let stride = (blocks as f64 * 0.618) as u64 | 1;
    let mut buf = [0; 4096];
    let begin = Instant::now();
    // Long enough for a clock tick or two of noise not to matter.
    let mut count = 0;
    while begin.elapsed() < Duration::from_millis(60) {
        for at in 0..blocks {
            chain.read_at(&mut buf, at * stride % blocks * BLOCK_SIZE)?;
        }
        count += blocks as usize;
    }
    Ok(per_operation(begin, count))
}

/// A file or directory that is removed at the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // The whole directory goes in the end.
        let _ = if self.0.is_dir() {
            std::fs::remove_dir_all(&self.0)
        } else {
            std::fs::remove_file(&self.0)
        };
    }
}
