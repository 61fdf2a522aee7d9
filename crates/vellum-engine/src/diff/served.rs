//! A state that a device server has open, read from outside.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use parking_lot::Mutex;

use crate::changed::served_sources;
use crate::sockets::Sockets;
use vellum_base::block::{
    BLOCK_LEN, Block, BlockDevice, Blocks, Offset, Run, Span, check_range, in_memory, part,
    part_mut,
};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::chain::{Chain, Source};
use vellum_fs::unmounted;

/// Blocks that are kept in memory: inodes are looked up one by one.
const KEPT: usize = 16 << 10;
/// Longer reads are contents of files, which nobody asks for twice.
const KEPT_AT_ONCE: Blocks = Blocks::new(64);

/// What a server has open, while nobody changes it. Blocks that the older state has too are read from that:
/// this process has it open, and asking the server for them would take longer.
pub(super) struct Served<'a> {
    older: &'a Chain,
    size: u64,
    runs: Vec<Run<Source>>,
    /// The blocks that the older state does not have, in order.
    differing: Vec<Span>,
    device: File,
    kept: Mutex<HashMap<Block, Box<[u8]>>>,
    /// Until when nobody changes it.
    deadline: Instant,
}

impl<'a> Served<'a> {
    /// What answers at `sockets` and is the block device `device`.
    ///
    /// # Errors
    /// Where the server does not answer or the device cannot be opened; [`ErrorKind::Unsupported`] where it
    /// has another number of layers open than `layers`, by which those of its map are known.
    pub fn new(
        older: &'a Chain,
        layers: usize,
        sockets: &Sockets,
        device: &Path,
        deadline: Instant,
    ) -> Result<Self> {
        let (size, runs) = served_sources(sockets, layers)?;
        // Not by way of the page cache, which may have the contents of files as they once were: the
        // kernel writes files past it.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(device)
            .context(|| format!("cannot open {}", device.display()))?;
        Ok(Served {
            older,
            size,
            runs,
            // Nothing is known yet.
            differing: vec![Span::up_to(Blocks::to_hold(size))],
            device: file,
            kept: Mutex::default(),
            deadline,
        })
    }

    /// Where all blocks come from.
    pub fn runs(&self) -> &[Run<Source>] {
        &self.runs
    }

    /// The same, in which only these bytes, in order, may be others than in the older state.
    pub fn with_differing(mut self, bytes: &[Range<u64>]) -> Self {
        let span = |bytes: &Range<u64>| {
            Span::touched_by(Offset::new(bytes.start), bytes.end - bytes.start)
        };
        self.differing = bytes.iter().map(span).collect();
        self
    }

    /// The whole blocks of `span`.
    fn read(&self, buf: &mut [u8], span: Span) -> Result<()> {
        let mut rest = buf;
        let mut at = span.start();
        while at < span.end() {
            let next = self.differing.partition_point(|own| own.end() <= at);
            let next = self.differing.get(next);
            let (differs, end) = match next {
                Some(own) if own.start() <= at => (true, own.end()),
                Some(own) => (false, own.start()),
                None => (false, span.end()),
            };
            let here = Span::between(at, end.min(span.end()));
            let (piece, tail) = rest.split_at_mut(here.len().buffer_len());
            match differs {
                true => self.read_device(piece, here)?,
                false => self.read_older(piece, here)?,
            }
            (rest, at) = (tail, here.end());
        }
        Ok(())
    }

    /// Blocks that both have: behind the end of the older state they are zeros.
    fn read_older(&self, buf: &mut [u8], span: Span) -> Result<()> {
        let there = self.older.size().saturating_sub(span.offset().get());
        let there = in_memory(there.min(buf.len() as u64));
        let (there, behind) = buf.split_at_mut(there);
        behind.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        self.older.read_at(there, span.offset().get())
    }

    fn read_device(&self, buf: &mut [u8], span: Span) -> Result<()> {
        if span.len() <= KEPT_AT_ONCE {
            let kept = self.kept.lock();
            let found: Option<Vec<&Box<[u8]>>> =
                span.blocks().map(|block| kept.get(&block)).collect();
            if let Some(found) = found {
                for (piece, block) in buf.chunks_exact_mut(BLOCK_LEN).zip(found) {
                    piece.copy_from_slice(block);
                }
                return Ok(());
            }
        }
        // A buffer that suits any device.
        let mut memory = vec![0; buf.len() + BLOCK_LEN];
        let start = memory.as_ptr().align_offset(BLOCK_LEN).min(BLOCK_LEN);
        let aligned = part_mut(&mut memory, start, buf.len());
        read_up_to_end(&self.device, aligned, span.offset().get())
            .context(|| format!("reading {span} of a container's device"))?;
        buf.copy_from_slice(aligned);
        if span.len() <= KEPT_AT_ONCE {
            let mut kept = self.kept.lock();
            if kept.len() >= KEPT {
                kept.clear();
            }
            let blocks = span.blocks().zip(buf.chunks_exact(BLOCK_LEN));
            kept.extend(blocks.map(|(block, bytes)| (block, bytes.into())));
        }
        Ok(())
    }
}

impl unmounted::Source for Served<'_> {
    fn bytes(&self) -> u64 {
        self.size
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        interrupt::check()?;
        if Instant::now() > self.deadline {
            return Err(Error::new(
                ErrorKind::Timeout,
                "comparing takes longer than the container's writers may wait",
            ));
        }
        check_range(offset, buf.len() as u64, self.size)?;
        let offset = Offset::new(offset);
        let span = Span::touched_by(offset, buf.len() as u64);
        let mut whole = vec![0; span.len().buffer_len()];
        self.read(&mut whole, span)?;
        buf.copy_from_slice(part(&whole, offset.within_block(), buf.len()));
        Ok(())
    }
}

/// Fills `buf` from `offset`, with zeros behind the end.
fn read_up_to_end(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let (_, rest) = buf.split_at_mut(done);
        let count = file.read_at(rest, offset + done as u64)?;
        // What is left is less than a block of the device.
        if count == 0 || !count.is_multiple_of(512) {
            rest.split_at_mut(count).1.fill(0);
            break;
        }
        done += count;
    }
    Ok(())
}
