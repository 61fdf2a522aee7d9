//! What copy-on-write costs on this disk: each case beside plain calls on a plain sparse file,
//! round by round in turns, so that a ratio means something on a noisy machine.

mod checkpoints;
mod counting;
mod reads;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use uuid::Uuid;

use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Blocks, Durability, Offset, Span};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, ChainStats, open_chain, open_counted_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

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
    /// Bytes of checkpoints of the map for each byte written, where that was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<f64>,
}

/// Runs the cases whose names contain `only` (all, where it is empty) in a directory of its own
/// under `dir`, and removes it.
///
/// # Errors
/// Where the host fails.
pub fn run(
    dir: &Path,
    rounds: usize,
    only: &str,
    done: impl FnMut(&CaseResult),
) -> Result<Vec<CaseResult>> {
    let scratch = tempfile::Builder::new()
        .prefix("vellum-bench-")
        .tempdir_in(dir)
        .context(|| format!("cannot make a directory in {}", dir.display()))?;
    let bench = Bench::new(scratch.path())?;
    let mut cases = Cases {
        rounds,
        only,
        done,
        results: Vec::new(),
    };
    for case in WRITES {
        let raw = || bench.raw_writes(case);
        let ours = || bench.chain_writes(case);
        cases.compare(case.name, "pwrite to a sparse file", &ours, &raw)?;
    }
    reads::run(&bench, &mut cases)?;
    counting::run(&bench, &mut cases)?;
    for (name, overwrite) in [("allocating", false), ("overwriting", true)] {
        let name = format!("write 8 KiB and flush, {name}");
        let ours = || bench.chain_flushes(overwrite);
        let raw = || bench.raw_flushes(overwrite);
        cases.compare(&name, "pwrite and fdatasync", &ours, &raw)?;
    }
    checkpoints::run(&bench, &mut cases)?;
    let mut flat = None;
    for depth in [128, 1000] {
        let name = format!("open {depth} layers, 1 GiB in 10 GiB");
        if cases.wants(&name) {
            let deep = bench.open_spec(depth, (1 << 30) / depth)?;
            let flat = match &mut flat {
                Some(flat) => flat,
                none => none.insert(bench.open_spec(1, 1 << 30)?),
            };
            let ours = || bench.open_once(&deep);
            let reference = || bench.open_once(flat);
            cases.compare(&name, "the same in 1 layer", &ours, &reference)?;
        }
    }
    Ok(cases.results)
}

/// What was measured so far.
struct Cases<'a, D> {
    rounds: usize,
    only: &'a str,
    done: D,
    results: Vec<CaseResult>,
}

impl<D: FnMut(&CaseResult)> Cases<'_, D> {
    fn wants(&self, name: &str) -> bool {
        name.contains(self.only)
    }

    /// Measures a case, where it is wanted.
    fn compare(
        &mut self,
        name: &str,
        reference: &str,
        ours: Side<'_>,
        theirs: Side<'_>,
    ) -> Result<()> {
        if self.wants(name) {
            let result = compare(name, reference, self.rounds, ours, theirs)?;
            self.note(result);
        }
        Ok(())
    }

    fn note(&mut self, result: CaseResult) {
        (self.done)(&result);
        self.results.push(result);
    }
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
    #[expect(clippy::indexing_slicing, reason = "a case has at least one round")]
    fn new(name: &str, reference: &str, mine: &mut [f64], other: &mut [f64]) -> Self {
        let mut ratios: Vec<f64> = mine.iter().zip(other.iter()).map(|(a, b)| b / a).collect();
        ratios.sort_by(f64::total_cmp);
        let range = (ratios[0], ratios[ratios.len() - 1]);
        CaseResult {
            name: name.to_owned(),
            reference: reference.to_owned(),
            micros: median(mine) * 1e6,
            reference_micros: median(other) * 1e6,
            ratio: median(&mut ratios),
            range,
            checkpoints: None,
        }
    }
}

#[expect(clippy::indexing_slicing, reason = "a case has at least one round")]
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
                let start = Offset::new(at << 20).block();
                let held = layer.lock_blocks(Span::of_buffer(start, &chunk))?;
                layer.write_blocks(&held, start, &chunk).map(drop)
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
    fn fresh_chain(&self) -> Result<(Scratch, Chain)> {
        self.counted_chain(Arc::default())
    }

    /// As `fresh_chain`, with these counters.
    fn counted_chain(&self, stats: Arc<ChainStats>) -> Result<(Scratch, Chain)> {
        let (top, _) = self.new_layer(Some(self.parent_uuid), DEVICE)?;
        let spec = ChainSpec {
            sealed: vec![self.parent.clone()],
            top: Some(top.clone()),
            options: LayerOptions::default(),
        };
        let chain = open_counted_chain(&self.storage, &spec, stats)?;
        Ok((Scratch(top), chain))
    }

    fn fresh_file(&self) -> Result<(File, Scratch)> {
        self.file("raw", DEVICE)
    }

    /// A new sparse file, gone when the guard is dropped.
    fn file(&self, name: &str, len: u64) -> Result<(File, Scratch)> {
        let path = self.dir.join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        let file = file.context(|| format!("cannot make {}", path.display()))?;
        file.set_len(len)
            .context(|| format!("cannot extend {}", path.display()))?;
        Ok((file, Scratch(path)))
    }

    fn chain_writes(&self, case: &WriteCase) -> Result<f64> {
        // Dropped in the opposite order: nothing writes where the files are gone.
        let (_scratch, chain) = self.fresh_chain()?;
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
        let (_scratch, chain) = self.fresh_chain()?;
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
                    let start = Block::new(slot * RUN);
                    let span = Span::new(start, Blocks::new(RUN));
                    layer.allocate_zeroed(&layer.lock_blocks(span)?, span)
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
