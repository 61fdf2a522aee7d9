//! Chains of descriptors in the guest's memory, none of whose bytes is trusted.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::config::MAX_QUEUE_SIZE;

/// The memory of a virtual machine.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Why a chain is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

const OUTSIDE: Malformed = Malformed("it leads out of the machine's memory");

/// Some bytes of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    at: GuestAddress,
    len: u32,
}

/// The bytes of a request: those that the guest wrote, and those that it wants to read.
#[derive(Debug, Default)]
pub(super) struct Chain {
    readable: Vec<Part>,
    writable: Vec<Part>,
}

/// A table of descriptors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    /// Where it is in the guest's memory.
    pub(super) at: u64,
    /// Its entries.
    pub(super) len: u32,
}

impl Table {
    fn descriptor(self, memory: &Memory, index: u16) -> Result<Descriptor, Malformed> {
        if u32::from(index) >= self.len {
            return Err(Malformed(
                "it names a descriptor that its table does not have",
            ));
        }
        let at = GuestAddress(self.at).checked_add(u64::from(index) * DESCRIPTOR);
        at.and_then(|at| memory.read_obj(at).ok()).ok_or(OUTSIDE)
    }
}

impl Chain {
    /// The chain that begins at a descriptor of a queue's table.
    ///
    /// # Errors
    /// Where it cannot be followed to its end.
    pub(super) fn follow(memory: &Memory, table: Table, head: u16) -> Result<Chain, Malformed> {
        let (mut chain, mut total) = (Chain::default(), 0u32);
        let (mut table, mut next, mut indirect) = (table, head, false);
        // The specification allows no chain to be longer than a queue.
        for _ in 0..=MAX_QUEUE_SIZE {
            let descriptor = table.descriptor(memory, next)?;
            if descriptor.refers_to_indirect_table() {
                let len = u64::from(descriptor.len());
                if indirect || descriptor.has_next() || len % DESCRIPTOR != 0 {
                    return Err(Malformed("its indirect table cannot be one"));
                }
                table = Table {
                    at: descriptor.addr().raw_value(),
                    len: (len / DESCRIPTOR) as u32,
                };
                (next, indirect) = (0, true);
                continue;
            }
            total = total
                .checked_add(descriptor.len())
                .ok_or(Malformed("it has more bytes than 32 bits count"))?;
            chain.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            next = descriptor.next();
        }
        Err(Malformed("it has no end, or more parts than a queue"))
    }

    fn push(&mut self, descriptor: Descriptor) -> Result<(), Malformed> {
        let part = Part {
            at: descriptor.addr(),
            len: descriptor.len(),
        };
        match descriptor.is_write_only() {
            true => self.writable.push(part),
            false if self.writable.is_empty() => self.readable.push(part),
            false => return Err(Malformed("it goes back to bytes to be read")),
        }
        Ok(())
    }

    /// Bytes that the guest wrote.
    pub(super) fn readable(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes that the guest wants to read.
    pub(super) fn writable(&self) -> u64 {
        length(&self.writable)
    }

    /// Reads what the guest wrote from `offset`; fills all of `buf`.
    ///
    /// # Errors
    /// Past the end, and outside of the memory.
    pub(super) fn read(
        &self,
        memory: &Memory,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), Malformed> {
        let mut rest = buf;
        for (at, len) in pieces(&self.readable, offset, rest.len()) {
            let (piece, others) = rest.split_at_mut_checked(len).ok_or(OUTSIDE)?;
            memory.read_slice(piece, at?).map_err(|_| OUTSIDE)?;
            rest = others;
        }
        ended(rest)
    }

    /// Writes all of `buf` to what the guest wants to read, from `offset`.
    ///
    /// # Errors
    /// Past the end, and outside of the memory.
    pub(super) fn write(&self, memory: &Memory, offset: u64, buf: &[u8]) -> Result<(), Malformed> {
        let mut rest = buf;
        for (at, len) in pieces(&self.writable, offset, rest.len()) {
            let (piece, others) = rest.split_at_checked(len).ok_or(OUTSIDE)?;
            memory.write_slice(piece, at?).map_err(|_| OUTSIDE)?;
            rest = others;
        }
        ended(rest)
    }
}

fn ended(rest: &[u8]) -> Result<(), Malformed> {
    match rest.is_empty() {
        true => Ok(()),
        false => Err(Malformed("it is too short for what it asks for")),
    }
}

fn length(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.len)).sum()
}

/// The parts of `len` bytes from `offset`, as far as there are.
fn pieces(
    parts: &[Part],
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (Result<GuestAddress, Malformed>, usize)> {
    let (mut skip, mut left) = (offset, len);
    parts.iter().filter_map(move |part| {
        let part_len = u64::from(part.len);
        if skip >= part_len || left == 0 {
            skip = skip.saturating_sub(part_len);
            return None;
        }
        let taken = (part_len - skip).min(left as u64) as usize;
        let at = part.at.checked_add(skip).ok_or(OUTSIDE);
        skip = 0;
        left -= taken;
        Some((at, taken))
    })
}
