//! Chains as disk images: raw and qcow2. Their maps are walked, and only data are read.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::super::watch::Watch;
use super::output::Stream;
use super::subject::{State, Subject};
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, ExtentKind};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::inherit::result_mode;
use vellum_base::interrupt;
use vellum_core::chain::{Chain, Source};
use vellum_image::{Progress, Qcow2Writer, cluster_size};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// Runs of a map that are asked for at a time.
const RUNS: usize = 4096;

/// A disk image that is written from its beginning to its end, in units of whole bytes of its own.
trait Sink {
    /// Bytes of a unit: what is written begins with one, and ends with one or with the disk.
    fn unit(&self) -> u64;
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<()>;
    fn zero(&mut self, at: u64, len: u64) -> Result<()>;
}

/// A raw image in a file, where zeros are holes.
struct RawFile<'a>(&'a File);

impl Sink for RawFile<'_> {
    fn unit(&self) -> u64 {
        BLOCK_SIZE
    }
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.0
            .write_all_at(bytes, at)
            .context(|| "writing the disk image")
    }
    fn zero(&mut self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

/// A raw image in a stream, with every zero.
struct RawStream<'a> {
    stream: &'a mut Stream,
    at: u64,
}

impl RawStream<'_> {
    fn fill(&mut self, to: u64) -> Result<()> {
        const ZEROS: &[u8] = &[0; 64 << 10];
        while self.at < to {
            let most = (to - self.at).min(ZEROS.len() as u64);
            let (zeros, _) = ZEROS.split_at(most as usize);
            self.put(zeros)?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .context(|| "writing the disk image")?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

impl Sink for RawStream<'_> {
    fn unit(&self) -> u64 {
        BLOCK_SIZE
    }
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.fill(at)?;
        self.put(bytes)
    }
    fn zero(&mut self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

impl Sink for Qcow2Writer {
    fn unit(&self) -> u64 {
        self.cluster()
    }
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        Qcow2Writer::write(self, bytes, at)
    }
    fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        Qcow2Writer::zero(self, at, len)
    }
}

/// Copies ranges of a chain, in their order.
struct Copy<'a> {
    chain: &'a Chain,
    sink: &'a mut dyn Sink,
    /// Whether zeros are to be written: something lies below.
    zeros: bool,
    progress: Option<Progress<'static>>,
    buffer: Vec<u8>,
    /// What lies before was copied.
    done: u64,
    /// Bytes that were read.
    copied: u64,
}

impl<'a> Copy<'a> {
    fn new(chain: &'a Chain, sink: &'a mut dyn Sink, progress: Option<Progress<'static>>) -> Self {
        Copy {
            chain,
            sink,
            zeros: false,
            progress,
            buffer: vec![0; CHUNK],
            done: 0,
            copied: 0,
        }
    }

    /// Copies all units that a range of bytes touches.
    fn cover(&mut self, from: u64, to: u64) -> Result<()> {
        let unit = self.sink.unit();
        let end = to.next_multiple_of(unit).min(self.chain.size());
        self.done = self.done.max(from / unit * unit);
        while self.done < end {
            interrupt::check()?;
            let len = (end - self.done).min(CHUNK as u64);
            let mut buffer = std::mem::take(&mut self.buffer);
            let (chunk, _) = buffer.split_at_mut(len as usize);
            self.chain.read_at(chunk, self.done)?;
            let put = self.put(chunk, self.done);
            self.buffer = buffer;
            put?;
            if let Some(progress) = &mut self.progress {
                progress(len);
            }
            self.done += len;
            self.copied += len;
        }
        Ok(())
    }

    /// Has the units that lie within a range of zeros read as such, and copies those at its ends.
    fn zero(&mut self, from: u64, to: u64) -> Result<()> {
        let unit = self.sink.unit();
        let first = from.next_multiple_of(unit).max(self.done);
        let last = match to == self.chain.size() {
            true => to,
            false => to / unit * unit,
        };
        if first >= last {
            return self.cover(from, to);
        }
        if from < first {
            self.cover(from, first)?;
        }
        self.sink.zero(first, last - first)?;
        self.done = last;
        match last < to {
            true => self.cover(last, to),
            false => Ok(()),
        }
    }

    /// Writes the units that are not zero, and zeros where they are wanted.
    fn put(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        let unit = self.sink.unit() as usize;
        let is_zero = |piece: &[u8]| piece.iter().all(|byte| *byte == 0);
        let mut rest = bytes;
        let mut at = at;
        while let Some(first) = rest.chunks(unit).next() {
            let zero = is_zero(first);
            let same = rest.chunks(unit).take_while(|piece| is_zero(piece) == zero);
            let len = same.map(<[u8]>::len).sum();
            let (run, after) = rest.split_at(len);
            match zero {
                false => self.sink.write(run, at)?,
                true if self.zeros => self.sink.zero(at, len as u64)?,
                true => {}
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }
}

/// The data of a chain, range by range.
fn each_data(chain: &Chain, mut each: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    each_extent(chain, 0, chain.size(), |kind, from, to| match kind {
        ExtentKind::Data => each(from, to),
        ExtentKind::Hole | ExtentKind::Zero => Ok(()),
    })
}

fn each_extent(
    chain: &Chain,
    mut at: u64,
    end: u64,
    mut each: impl FnMut(ExtentKind, u64, u64) -> Result<()>,
) -> Result<()> {
    while at < end {
        let extents = chain.extents(at, end - at, RUNS)?;
        for extent in extents {
            at = extent.offset + extent.len;
            each(extent.kind, extent.offset, at)?;
        }
    }
    Ok(())
}

/// Copies all that a chain holds. Returns how many bytes that were.
fn copy_whole(
    chain: &Chain,
    sink: &mut dyn Sink,
    progress: Option<Progress<'static>>,
) -> Result<u64> {
    let mut copy = Copy::new(chain, sink, progress);
    each_data(chain, |from, to| copy.cover(from, to))?;
    Ok(copy.copied)
}

/// Copies what the topmost layer of a chain says: its data, and its zeros over what lies below.
fn copy_layer(
    chain: &Chain,
    below: Option<&Chain>,
    sink: &mut dyn Sink,
    progress: Option<Progress<'static>>,
) -> Result<u64> {
    let own = chain.base().depth().checked_sub(1);
    let own = own.ok_or_else(|| Error::internal("a chain without layers"))?;
    let mut copy = Copy::new(chain, sink, progress);
    copy.zeros = below.is_some();
    let mut start = Block::FIRST;
    loop {
        let runs = chain.sources(start, RUNS);
        let Some(last) = runs.last() else {
            return Ok(copy.copied);
        };
        start = last.end();
        for run in runs {
            let from = run.start().offset().get();
            let to = run.end().offset().get().min(chain.size());
            match (run.value, below) {
                (Source::Sealed(number), _) if number as usize == own => copy.cover(from, to)?,
                (Source::Zero | Source::Hole, Some(below)) => {
                    let end = to.min(below.size());
                    each_extent(below, from.min(end), end, |kind, from, to| match kind {
                        ExtentKind::Data => copy.zero(from, to),
                        ExtentKind::Hole | ExtentKind::Zero => Ok(()),
                    })?;
                }
                _ => {}
            }
        }
    }
}

/// How many bytes of data a chain holds.
pub(super) fn data_bytes(chain: &Chain) -> Result<u64> {
    let mut sum = 0;
    each_data(chain, |from, to| {
        sum += to - from;
        Ok(())
    })?;
    Ok(sum)
}

/// Writes the disk to a file, byte for byte, with holes for zeros.
pub(super) fn raw_file(
    chain: &Chain,
    file: &File,
    progress: Option<Progress<'static>>,
) -> Result<u64> {
    let copied = copy_whole(chain, &mut RawFile(file), progress)?;
    file.set_len(chain.size())
        .context(|| "writing the disk image")?;
    Ok(copied)
}

/// Writes the disk to a stream, byte for byte.
pub(super) fn raw_stream(
    chain: &Chain,
    stream: &mut Stream,
    progress: Option<Progress<'static>>,
) -> Result<u64> {
    let mut sink = RawStream { stream, at: 0 };
    copy_whole(chain, &mut sink, progress)?;
    sink.fill(chain.size())?;
    Ok(sink.at)
}

/// Writes the disk as a qcow2 to an empty file.
pub(super) fn qcow2_file(
    chain: &Chain,
    file: &File,
    progress: Option<Progress<'static>>,
) -> Result<u64> {
    let size = chain.size();
    let mut writer = Qcow2Writer::new(file, size, cluster_size(size, false), None)?;
    let copied = copy_whole(chain, &mut writer, progress)?;
    writer.finish().map(|()| copied)
}

/// The name of the file with the whole disk.
const TOP: &str = "top.qcow2";

/// Writes each layer as a qcow2 into `dir`, above the one before.
pub(super) fn qcow2_layers(subject: &Subject<'_>, dir: &Path, watch: &dyn Watch) -> Result<u64> {
    let states = subject.states();
    let mut copied = 0;
    let mut below: Option<(String, super::super::device::OpenChain)> = None;
    for (index, state) in states.iter().enumerate() {
        interrupt::check()?;
        let is_top = index + 1 == states.len();
        let open = match is_top {
            true => subject.open_whole()?,
            false => subject.open(*state)?,
        };
        let name = match (is_top, state) {
            (false, State::Sealed(layer)) => format!("{layer}.qcow2"),
            _ => TOP.to_owned(),
        };
        let chain = open.chain();
        let progress = watch.begin(&name, None);
        let file = new_file(&dir.join(&name))?;
        let cluster = cluster_size(chain.size(), true);
        let base = below.as_ref().map(|(name, _)| name.as_str());
        let mut writer = Qcow2Writer::new(&file, chain.size(), cluster, base)?;
        let lower = below.as_ref().map(|(_, open)| &**open.chain());
        check_above(chain, lower)?;
        copied += copy_layer(chain, lower, &mut writer, progress)?;
        writer.finish()?;
        watch.done();
        below = Some((name, open));
    }
    Ok(copied)
}

/// Makes sure that a chain is another one and a layer: what comes from its topmost layer is told by numbers.
fn check_above(chain: &Chain, below: Option<&Chain>) -> Result<()> {
    let mut layers = chain.base().uuids();
    layers.pop();
    if layers == below.map_or_else(Vec::new, |below| below.base().uuids()) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InUse,
        "its layers were joined while they were exported: try again",
    ))
}

fn new_file(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(result_mode())
        .open(path)
        .context(|| format!("cannot make {}", path.display()))
}
