//! The vocabulary of blocks: sizes, units, states, extents, and the device that exports serve.

mod memory;
mod part;
mod units;
mod window;

pub use memory::MemoryDevice;
pub use part::{array_at, part, part_from, part_mut, u32_at, u64_at};
pub use units::{Block, Blocks, Offset, Run, Span, in_memory, push_run};
pub use window::WindowPower;

use crate::error::{Error, ErrorKind, Result};

/// Bytes in a block: the unit of the map, of copy-up and of checksums.
pub const BLOCK_SIZE: u64 = 4096;

/// [`BLOCK_SIZE`] as the length of a buffer.
pub const BLOCK_LEN: usize = 4096;

/// The largest virtual size of a device, in bytes: 64 TiB.
pub const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// What a layer says of one of its blocks: in memory, in every file of a layer, and towards the
/// chain. All three states are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// The layer says nothing: the block reads as in the parent (zeros where there is none).
    Parent,
    /// The layer holds the block's bytes.
    Data,
    /// The block reads as zeros, whatever the parent holds.
    Zero,
}

impl BlockState {
    /// The number that stands for it on disk, in a table of extents, a segment of changes, a journal
    /// record and a digest.
    pub const fn code(self) -> u32 {
        match self {
            BlockState::Parent => 0,
            BlockState::Data => 1,
            BlockState::Zero => 2,
        }
    }

    /// The state that a number on disk stands for.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a number that stands for none.
    pub fn of_code(code: u32) -> Result<Self> {
        match code {
            0 => Ok(BlockState::Parent),
            1 => Ok(BlockState::Data),
            2 => Ok(BlockState::Zero),
            _ => Err(Error::new(
                ErrorKind::Corrupt,
                format!("unknown block state {code}"),
            )),
        }
    }
}

/// What a range of a device holds, as a client asks with NBD's BLOCK_STATUS or SEEK_DATA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Some layer of the chain holds bytes for it.
    Data,
    /// No layer of the chain says anything of it: reads as zeros, takes no space.
    Hole,
    /// A layer says that it is zero: reads as zeros, takes no space.
    Zero,
}

/// A run of bytes of one [`ExtentKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What the range holds.
    pub kind: ExtentKind,
}

/// Whether a write is durable when it returns (NBD's FUA).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Durability {
    /// Durable at the next flush.
    #[default]
    Buffered,
    /// Durable on return.
    Durable,
}

/// What [`BlockDevice::write_zeroes`] may do with the space below the zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ZeroMode {
    /// The space may be given back (a hole).
    #[default]
    MayUnmap,
    /// The client asks that the range stays allocated (NBD's NO_HOLE, fallocate's ZERO_RANGE).
    KeepAllocated,
}

/// A random-access device of bytes: what exports serve and file systems are made on.
///
/// Offsets and lengths are bytes and need not be aligned. All calls may come from many threads at
/// once. A read that overlaps a write in flight sees, sector by sector, the old or the new bytes.
pub trait BlockDevice: Send + Sync {
    /// Virtual size in bytes, a multiple of [`BLOCK_SIZE`].
    fn size(&self) -> u64;

    /// True when every write fails with [`ErrorKind::ReadOnly`].
    fn is_read_only(&self) -> bool;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] past the end, [`ErrorKind::Corrupt`] where a checksum fails.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `buf` at `offset`; acknowledged data is in the kernel, durable as `durability` says.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the host is full, [`ErrorKind::Poisoned`] after a failed sync.
    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()>;

    /// Makes every write that completed before the call, on whatever connection, durable.
    fn flush(&self) -> Result<()>;

    /// True where requests may wait for long for what others bring, such as blocks of a lazy layer: then so many of
    /// them may wait at once as the client sends.
    fn may_stall(&self) -> bool {
        false
    }

    /// To be told of each write after it was carried out: true where the client is one that flushes after
    /// every few writes, and [`BlockDevice::flush_ahead`] worth its while.
    fn expects_flush(&self) -> bool {
        false
    }

    /// To be called after a write was answered: begins what the next flush would have to do. A hint, which
    /// makes nothing durable.
    fn flush_ahead(&self) {}

    /// To be called after a write failed with [`crate::ErrorKind::NoSpace`], by one who can let its
    /// client wait: waits a moment, and says whether to make the write again. Says no once the disk
    /// has been full for long.
    fn wait_for_room(&self) -> bool {
        false
    }

    /// To be called every few seconds by who serves the device, also where no request comes: gives back space
    /// on the host that was taken ahead and is not used, or is wanted by others. May wait for the host.
    fn look_after_space(&self) {}

    /// Makes the range read as zeros and gives its space back. Whole blocks become durable zeros
    /// at the next flush; the unaligned ends are written as zeros.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<()>;

    /// Describes the range from `offset`, in order and without gaps, in at most `max` extents;
    /// the last may be cut, so the answer can end before `offset + len`.
    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>>;

    /// A hint that the range will be read soon.
    fn prefetch(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
}

/// Checks that `len` bytes from `offset` lie within a device of `size` bytes.
///
/// # Errors
/// [`ErrorKind::OutOfRange`], also where the sum overflows.
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            ErrorKind::OutOfRange,
            format!("{len} bytes at offset {offset} reach past the end of the device ({size})"),
        )),
    }
}
