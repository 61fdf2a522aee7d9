//! A device in memory: the reference that tests and protocol checks hold real ones against.

use std::collections::BTreeMap;

use parking_lot::RwLock;

use super::{
    BLOCK_LEN, BLOCK_SIZE, Block, BlockDevice, Durability, Extent, ExtentKind, Offset, ZeroMode,
    check_range, in_memory, part, part_mut,
};
use crate::error::{Error, ErrorKind, Result};

/// A sparse device in memory. Nothing outlives it; a flush has nothing to do.
#[derive(Debug)]
pub struct MemoryDevice {
    size: u64,
    read_only: bool,
    blocks: RwLock<BTreeMap<Block, Box<[u8; BLOCK_LEN]>>>,
}

impl MemoryDevice {
    /// An empty device of `size` bytes, rounded up to whole blocks.
    pub fn new(size: u64) -> Self {
        MemoryDevice {
            size: size.next_multiple_of(BLOCK_SIZE),
            read_only: false,
            blocks: RwLock::default(),
        }
    }

    /// The same device, refusing writes.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the device is read-only"));
        }
        check_range(offset, len, self.size)
    }
}

/// Bytes within one block.
#[derive(Clone, Copy)]
struct Piece {
    block: Block,
    /// The first of them in the block.
    within: usize,
    len: usize,
}

/// Splits a byte range at the borders of blocks.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let end = Offset::new(offset) + len;
    let mut at = Offset::new(offset);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let within = at.within_block();
        let len = (BLOCK_LEN - within).min(in_memory(end - at));
        let block = at.block();
        at = at + len as u64;
        Some(Piece { block, within, len })
    })
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let blocks = self.blocks.read();
        let mut rest = buf;
        for at in pieces(offset, rest.len() as u64) {
            let (piece, tail) = rest.split_at_mut(at.len);
            rest = tail;
            match blocks.get(&at.block) {
                Some(data) => piece.copy_from_slice(part(&**data, at.within, at.len)),
                None => piece.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _durability: Durability) -> Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        let mut blocks = self.blocks.write();
        let mut rest = buf;
        for at in pieces(offset, buf.len() as u64) {
            let (piece, tail) = rest.split_at(at.len);
            rest = tail;
            let data = blocks
                .entry(at.block)
                .or_insert_with(|| Box::new([0; BLOCK_LEN]));
            part_mut(&mut **data, at.within, at.len).copy_from_slice(piece);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroMode::MayUnmap, Durability::Buffered)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroMode, _: Durability) -> Result<()> {
        self.check_write(offset, len)?;
        let mut blocks = self.blocks.write();
        for at in pieces(offset, len) {
            if at.len == BLOCK_LEN {
                blocks.remove(&at.block);
            } else if let Some(data) = blocks.get_mut(&at.block) {
                part_mut(&mut **data, at.within, at.len).fill(0);
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        check_range(offset, len, self.size)?;
        let blocks = self.blocks.read();
        let mut extents: Vec<Extent> = Vec::new();
        for at in pieces(offset, len) {
            let kind = if blocks.contains_key(&at.block) {
                ExtentKind::Data
            } else {
                ExtentKind::Hole
            };
            let len = at.len as u64;
            if let Some(last) = extents.last_mut().filter(|last| last.kind == kind) {
                last.len += len;
            } else if extents.len() < max {
                extents.push(Extent {
                    offset: at.block.offset().get() + at.within as u64,
                    len,
                    kind,
                });
            } else {
                break;
            }
        }
        Ok(extents)
    }
}
