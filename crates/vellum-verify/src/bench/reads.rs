//! Reads at chain depth 1 to 1,000, beside plain reads of as many files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::{Bench, CaseResult, Cases, Scratch, per_operation};
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Span};
use vellum_base::error::{Result, ResultExt};
use vellum_core::chain::{Chain, ChainSpec, open_chain};

/// How the blocks lie in the layers, which take turns.
#[derive(Debug, Clone, Copy)]
struct ReadCase {
    /// Blocks side by side in one layer.
    run: u64,
    /// Bytes in all layers together.
    bytes: u64,
    what: &'static str,
}

/// As files lie, and the worst that can be.
const READS: [ReadCase; 2] = [
    ReadCase {
        run: 16,
        bytes: 256 << 20,
        what: "runs of 64 KiB",
    },
    ReadCase {
        run: 1,
        bytes: 16 << 20,
        what: "single blocks",
    },
];

/// Depths that are compared with 1.
const DEPTHS: [u64; 3] = [8, 32, 128];
/// As a container with as many snapshots, beside as many plain files.
const MANY: u64 = 1000;

pub(super) fn run<D: FnMut(&CaseResult)>(bench: &Bench, cases: &mut Cases<'_, D>) -> Result<()> {
    for case in READS {
        let mut shallow = None;
        for depth in DEPTHS {
            let name = format!("read 4 KiB at random, {}, depth {depth}", case.what);
            if cases.wants(&name) {
                let deep = bench.deep_chain(depth, case)?;
                let shallow = match &mut shallow {
                    Some(shallow) => shallow,
                    none => none.insert(bench.deep_chain(1, case)?),
                };
                let ours = || random(case, |buf, block| read_chain(&deep, buf, block));
                let reference = || random(case, |buf, block| read_chain(shallow, buf, block));
                cases.compare(&name, "depth 1", &ours, &reference)?;
            }
        }
        let name = format!("plain pread at random, {}, 128 files", case.what);
        if cases.wants(&name) {
            let (many, one) = (bench.plain(128, case)?, bench.plain(1, case)?);
            let ours = || random(case, |buf, block| many.read(buf, block));
            let reference = || random(case, |buf, block| one.read(buf, block));
            cases.compare(&name, "1 file", &ours, &reference)?;
        }
        let name = format!("read 4 KiB at random, {}, depth {MANY}", case.what);
        if cases.wants(&name) {
            let (deep, plain) = (bench.deep_chain(MANY, case)?, bench.plain(MANY, case)?);
            let ours = || random(case, |buf, block| read_chain(&deep, buf, block));
            let reference = || random(case, |buf, block| plain.read(buf, block));
            cases.compare(&name, "pread in as many files", &ours, &reference)?;
        }
    }
    Ok(())
}

fn read_chain(chain: &Chain, buf: &mut [u8], block: u64) -> Result<()> {
    chain.read_at(buf, block * BLOCK_SIZE)
}

/// Reads every block, in an order without order; seconds a read.
fn random(case: ReadCase, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<f64> {
    let blocks = case.bytes / BLOCK_SIZE;
    let stride = (blocks as f64 * 0.618) as u64 | 1;
    let mut buf = [0; BLOCK_SIZE as usize];
    let begin = Instant::now();
    // Long enough for a clock tick or two of noise not to matter.
    let mut count = 0;
    while begin.elapsed() < Duration::from_millis(60) {
        for at in 0..blocks {
            read(&mut buf, at * stride % blocks)?;
        }
        count += blocks as usize;
    }
    Ok(per_operation(begin, count))
}

impl ReadCase {
    /// The blocks of one of `depth` layers. They are written one by one, so that the page cache
    /// holds them in the same way whatever the depth.
    fn blocks_of(self, number: u64, depth: u64) -> impl Iterator<Item = u64> {
        let runs = self.bytes / BLOCK_SIZE / self.run;
        (number..runs)
            .step_by(depth as usize)
            .flat_map(move |run| run * self.run..(run + 1) * self.run)
    }
}

/// What a chain does without a map and without checksums: the layers' reads alone.
struct PlainFiles {
    case: ReadCase,
    files: Vec<(File, Scratch)>,
}

impl PlainFiles {
    #[expect(
        clippy::indexing_slicing,
        reason = "a remainder is below what it is the remainder of; a chain has a file at least"
    )]
    fn read(&self, buf: &mut [u8], block: u64) -> Result<()> {
        let number = (block / self.case.run) as usize % self.files.len();
        let (file, _) = &self.files[number];
        file.read_exact_at(buf, block * BLOCK_SIZE)
            .context(|| "reading a plain file")
    }
}

impl Bench {
    fn plain(&self, depth: u64, case: ReadCase) -> Result<PlainFiles> {
        let mut files = Vec::new();
        for number in 0..depth {
            let (file, scratch) = self.file(&format!("plain-{depth}-{number}"), case.bytes)?;
            for block in case.blocks_of(number, depth) {
                file.write_all_at(&[0x77; BLOCK_SIZE as usize], block * BLOCK_SIZE)
                    .context(|| "writing a plain file")?;
            }
            files.push((file, scratch));
        }
        Ok(PlainFiles { case, files })
    }

    /// A read-only chain of `depth` layers.
    fn deep_chain(&self, depth: u64, case: ReadCase) -> Result<Chain> {
        let mut sealed = Vec::new();
        let mut parent = None;
        for number in 0..depth {
            let (dir, uuid) = self.sealed_layer(parent, case.bytes, |layer| {
                case.blocks_of(number, depth).try_for_each(|block| {
                    let data = [0x77; BLOCK_SIZE as usize];
                    let block = Block::new(block);
                    let held = layer.lock_blocks(Span::of(block))?;
                    layer.write_blocks(&held, block, &data).map(drop)
                })
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
}
