//! Contents of files, and where two of them differ.

use std::ops::ControlFlow;

use super::extents::Extent;
use super::inode::Inode;
use super::{FileSystem, corrupt};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, in_memory, part_mut};
use vellum_base::error::Result;
use vellum_base::interrupt;

/// Bytes that are read of each file at a time.
const WINDOW: u64 = 32 * BLOCK_SIZE;

/// The content of a regular file or a link. Behind its end it reads as zeros.
pub struct Contents<'a> {
    files: &'a FileSystem<'a>,
    size: u64,
    extents: Vec<Extent>,
}

/// Where a block of a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nowhere: it reads as zeros.
    Hole,
    /// In this block of the device.
    At(u64),
}

impl<'a> Contents<'a> {
    /// The content of `inode`.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Corrupt`] where its map makes no sense; as [`super::Source::fill`].
    pub fn new(files: &'a FileSystem<'_>, inode: &Inode) -> Result<Self> {
        // No file has more blocks than their numbers have 32 bits for.
        if inode.size() / files.block_size() > u64::from(u32::MAX) {
            return Err(corrupt(format!(
                "inode {} is larger than a file can be",
                inode.number()
            )));
        }
        let mut extents = files.blocks_of(inode)?.content;
        extents.retain(|extent| extent.written);
        Ok(Contents {
            files,
            size: inode.size(),
            extents,
        })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the block `block` lies, and how many from there on lie behind each other, or are a hole.
    fn place(&self, block: u64) -> (Place, u64) {
        let next = self.extents.partition_point(|extent| extent.end() <= block);
        match self.extents.get(next) {
            None => (Place::Hole, u64::MAX - block),
            Some(extent) if extent.logical > block => (Place::Hole, extent.logical - block),
            Some(extent) => {
                let within = block - extent.logical;
                (Place::At(extent.physical + within), extent.len - within)
            }
        }
    }

    /// The block of the device that holds the block `block`; `None` in a hole.
    pub(super) fn block(&self, block: u64) -> Option<u64> {
        match self.place(block).0 {
            Place::Hole => None,
            Place::At(block) => Some(block),
        }
    }

    /// Fills `buf` with the bytes from `offset` on, which is the border of a block.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let block_size = self.files.block_size();
        let end = self.size.min(offset + buf.len() as u64);
        let mut at = offset;
        while at < end {
            let (place, blocks) = self.place(at / block_size);
            // A hole at the end goes on for ever.
            let len = (end - at).min(blocks.saturating_mul(block_size));
            if let Place::At(block) = place {
                let bytes = self.files.blocks(block, len.div_ceil(block_size))?;
                let (bytes, _) = bytes.split_at(in_memory(len));
                part_mut(buf, in_memory(at - offset), bytes.len()).copy_from_slice(bytes);
            }
            at += len;
        }
        Ok(())
    }
}

impl FileSystem<'_> {
    /// The whole content of a small file.
    pub(super) fn content(&self, inode: &Inode) -> Result<Vec<u8>> {
        let contents = Contents::new(self, inode)?;
        let mut bytes = vec![0; in_memory(contents.size)];
        contents.read(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// As [`Contents::new`].
    pub fn link_target(&self, inode: &Inode) -> Result<Vec<u8>> {
        if let Some(target) = inode.short_target() {
            return Ok(target.to_vec());
        }
        if inode.size() > self.block_size() {
            return Err(corrupt(format!(
                "the link {} is longer than a block",
                inode.number()
            )));
        }
        self.content(inode)
    }
}

/// Calls `each` with the offset and length of every piece of `newer` that differs from `older` (of
/// nothing, where there is none), until it breaks. Pieces are [`BLOCK_SIZE`] bytes from the start of the
/// file on, the last one as far as it goes. `same` says how many blocks of the device, of so many from one
/// on, are the same in both states up to the first that may differ.
///
/// # Errors
/// As [`super::Source::fill`].
pub fn differences(
    older: Option<&Contents<'_>>,
    newer: &Contents<'_>,
    same: &dyn Fn(u64, u64) -> u64,
    each: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<()> {
    let (mut left, mut right) = (vec![0; WINDOW as usize], vec![0; WINDOW as usize]);
    let mut at = 0;
    while let Some(next) = next_suspect(older, newer, same, at) {
        interrupt::check()?;
        let start = next - next % BLOCK_SIZE;
        let len = WINDOW.min(newer.size - start);
        let (left, _) = left.split_at_mut(in_memory(len));
        let (right, _) = right.split_at_mut(in_memory(len));
        match older {
            Some(older) => older.read(left, start)?,
            None => left.fill(0),
        }
        newer.read(right, start)?;
        let pieces = left.chunks(BLOCK_LEN).zip(right.chunks(BLOCK_LEN));
        let mut offset = start;
        for (old, new) in pieces {
            if old != new && each(offset, new.len() as u64).is_break() {
                return Ok(());
            }
            offset += new.len() as u64;
        }
        // The last window of a file may end within a block.
        at = start + WINDOW;
    }
    Ok(())
}

/// The first byte from `at` on, a border of a block, that has to be read to know whether it differs.
fn next_suspect(
    older: Option<&Contents<'_>>,
    newer: &Contents<'_>,
    same: &dyn Fn(u64, u64) -> u64,
    at: u64,
) -> Option<u64> {
    let block_size = newer.files.block_size();
    // Both end there, or one goes on: what lies behind the end in its last block is not content.
    let whole = match older {
        Some(older) if older.size == newer.size => newer.size.div_ceil(block_size),
        Some(older) => older.size.min(newer.size) / block_size,
        None => u64::MAX,
    };
    let mut block = at / block_size;
    while block < newer.size.div_ceil(block_size) {
        let (old, old_len) = match older {
            Some(older) => older.place(block),
            None => (Place::Hole, u64::MAX - block),
        };
        let (new, new_len) = newer.place(block);
        let len = old_len.min(new_len);
        match (old, new) {
            (Place::Hole, Place::Hole) => block += len,
            (Place::At(old), Place::At(new)) if old == new && block < whole => {
                match same(new, len.min(whole - block)) {
                    0 => return Some(block * block_size),
                    same => block += same,
                }
            }
            _ => return Some(block * block_size),
        }
    }
    None
}
