//! A device in memory: the reference that tests and protocol checks hold real ones against.

use std::collections::BTreeMap;

use parking_lot::RwLock;

use super::{
    BLOCK_LEN, BLOCK_SIZE, BlockDevice, Durability, Extent, ExtentKind, ZeroMode, check_range,
};
use crate::error::{Error, ErrorKind, Result};

/// A sparse device in memory. Nothing outlives it; a flush has nothing to do.
#[derive(Debug)]
pub struct MemoryDevice {
    size: u64,
    read_only: bool,
    blocks: RwLock<BTreeMap<u64, Box<[u8; BLOCK_LEN]>>>,
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

/// Splits a byte range into (block, first byte within it, length) pieces.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let within = at % BLOCK_SIZE;
        let piece = (BLOCK_SIZE - within).min(end - at);
        let item = (at / BLOCK_SIZE, within as usize, piece as usize);
        at += piece;
        Some(item)
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
        for (block, within, len) in pieces(offset, rest.len() as u64) {
            let (piece, tail) = rest.split_at_mut(len);
            rest = tail;
            match blocks
                .get(&block)
                .and_then(|data| data.get(within..within + len))
            {
                Some(data) => piece.copy_from_slice(data),
                None => piece.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _durability: Durability) -> Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        let mut blocks = self.blocks.write();
        let mut rest = buf;
        for (block, within, len) in pieces(offset, buf.len() as u64) {
            let (piece, tail) = rest.split_at(len);
            rest = tail;
            let data = blocks
                .entry(block)
                .or_insert_with(|| Box::new([0; BLOCK_LEN]));
            if let Some(target) = data.get_mut(within..within + len) {
                target.copy_from_slice(piece);
            }
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
        for (block, within, len) in pieces(offset, len) {
            if len == BLOCK_LEN {
                blocks.remove(&block);
            } else if let Some(target) = blocks
                .get_mut(&block)
                .and_then(|data| data.get_mut(within..within + len))
            {
                target.fill(0);
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>> {
        check_range(offset, len, self.size)?;
        let blocks = self.blocks.read();
        let mut extents: Vec<Extent> = Vec::new();
        for (block, within, len) in pieces(offset, len) {
            let kind = if blocks.contains_key(&block) {
                ExtentKind::Data
            } else {
                ExtentKind::Hole
            };
            let len = len as u64;
            if let Some(last) = extents.last_mut().filter(|last| last.kind == kind) {
                last.len += len;
            } else if extents.len() < max {
                extents.push(Extent {
                    offset: block * BLOCK_SIZE + within as u64,
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
