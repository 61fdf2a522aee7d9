//! An ext4 that was not unmounted in order, as it is once the kernel has replayed its journal: done in
//! memory, block by block as they are asked for.
//!
//! Source: the kernel's Documentation/filesystems/ext4/journal.rst; jbd2's numbers are big-endian. What a
//! kernel would not replay as it stands here (fast commits, asynchronous ones, a checksum that does not
//! match) is refused.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::checksum::{crc, crc_but};
use super::content::Contents;
use super::{FileSystem, Source, corrupt, layout, unknown};
use vellum_base::block::{in_memory, part, part_mut};
use vellum_base::error::Result;

const MAGIC: u32 = 0xC03B_3998;

mod block_type {
    pub const DESCRIPTOR: u32 = 1;
    pub const COMMIT: u32 = 2;
    pub const SUPERBLOCK: u32 = 4;
    pub const REVOKE: u32 = 5;
}

mod feature {
    pub const REVOKE: u32 = 0x1;
    pub const BITS_64: u32 = 0x2;
    pub const CSUM_V2: u32 = 0x8;
    pub const CSUM_V3: u32 = 0x10;
    /// With these a journal can be replayed here.
    pub const KNOWN: u32 = REVOKE | BITS_64 | CSUM_V2 | CSUM_V3;
}

mod tag {
    /// The block began with the magic, which was replaced by zeros.
    pub const ESCAPED: u32 = 0x1;
    pub const SAME_UUID: u32 = 0x2;
    pub const LAST: u32 = 0x8;
}

/// Bytes before the entries of a descriptor, and of a revoke block.
const HEAD: usize = 12;
const REVOKE_HEAD: usize = 16;
/// Where a commit block has its checksum.
const COMMIT_SUM: usize = 16;
/// The kind of checksums.
const CRC32C: u8 = 4;
/// Bytes of the checksum at the end of descriptors and revoke blocks.
const TAIL: usize = 4;

/// The blocks of an ext4 as they are once its journal is replayed.
pub struct Replayed<'a> {
    source: &'a dyn Source,
    block_size: u64,
    /// Blocks of the file system that the journal holds.
    blocks: BTreeMap<u64, Journaled>,
    /// There was something to recover from.
    recovered: bool,
}

/// Where the journal has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Journaled {
    /// On the device.
    block: u64,
    escaped: bool,
}

impl<'a> Replayed<'a> {
    /// Reads the journal of the ext4 on `source`, where it wants replaying.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Unsupported`] where the kernel has to do it; as [`FileSystem::open`].
    pub fn new(source: &'a dyn Source) -> Result<Self> {
        let superblock = layout::superblock(source)?.1;
        let mut replayed = Replayed {
            source,
            block_size: superblock.block_size,
            blocks: BTreeMap::new(),
            recovered: superblock.wants_replay,
        };
        if superblock.wants_replay {
            // As it lies there, to find the journal alone: that is never journaled itself.
            let files = FileSystem::as_it_lies(source, true)?;
            let inode = match files.layout.journal {
                Some(number) if number != 0 => files.inode(number)?,
                _ => None,
            };
            let inode = inode.ok_or_else(|| unknown("its journal lies elsewhere"))?;
            let log = Log::open(&files, Contents::new(&files, &inode)?)?;
            if let Some(log) = log {
                replayed.blocks = log.replay()?;
            }
        }
        Ok(replayed)
    }

    /// Whether it was not unmounted in order.
    pub(super) fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// The blocks of the journal that the replay writes elsewhere.
    pub(super) fn journaled(&self) -> impl Iterator<Item = u64> {
        self.blocks.values().map(|from| from.block)
    }

    /// The bytes that the replay writes, in order.
    pub fn written(&self) -> impl Iterator<Item = Range<u64>> {
        let bytes = |block: &u64| block * self.block_size..(block + 1) * self.block_size;
        self.blocks.keys().map(bytes)
    }
}

impl Source for Replayed<'_> {
    fn bytes(&self) -> u64 {
        self.source.bytes()
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.source.fill(buf, offset)?;
        let (size, end) = (self.block_size, offset + buf.len() as u64);
        for (block, from) in self.blocks.range(offset / size..end.div_ceil(size)) {
            let mut bytes = vec![0; in_memory(size)];
            self.source.fill(&mut bytes, from.block * size)?;
            if from.escaped {
                part_mut(&mut bytes, 0, 4).copy_from_slice(&MAGIC.to_be_bytes());
            }
            let (start, stop) = ((block * size).max(offset), ((block + 1) * size).min(end));
            let len = in_memory(stop - start);
            let bytes = part(&bytes, in_memory(start - block * size), len);
            part_mut(buf, in_memory(start - offset), len).copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// Big-endian numbers of a block, as far as it has them.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn bytes<const LEN: usize>(&self, at: usize) -> Result<[u8; LEN]> {
        let bytes = self.0.get(at..at + LEN);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| bad("a block is cut"))
    }

    fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_be_bytes(self.bytes(at)?))
    }

    fn u16(&self, at: usize) -> Result<u16> {
        Ok(u16::from_be_bytes(self.bytes(at)?))
    }
}

fn bad(what: &str) -> vellum_base::Error {
    corrupt(format!("its journal: {what}"))
}

/// The journal.
struct Log<'a> {
    contents: Contents<'a>,
    block_size: usize,
    /// Blocks of the file system.
    blocks: u64,
    /// Its blocks are numbers from `first` up to `end`, and then from `first` again.
    first: u32,
    end: u32,
    /// Where the oldest transaction begins, and its number.
    start: u32,
    sequence: u32,
    features: u32,
    /// With what checksums begin; `None` without checksums.
    seed: Option<u32>,
}

/// A transaction that was committed: its blocks in the journal.
struct Transaction {
    sequence: u32,
    descriptors: Vec<u32>,
    revokes: Vec<u32>,
}

/// What a descriptor says of one of the blocks behind it.
struct Tag {
    block: u64,
    escaped: bool,
    sum: Option<u32>,
}

impl<'a> Log<'a> {
    /// `None` of a journal in which nothing is left to replay.
    fn open(files: &FileSystem<'_>, contents: Contents<'a>) -> Result<Option<Self>> {
        let mut log = Log {
            contents,
            block_size: in_memory(files.block_size()),
            blocks: files.layout.blocks,
            first: 0,
            end: 1,
            start: 0,
            sequence: 0,
            features: 0,
            seed: None,
        };
        let bytes = log.block(0)?;
        let numbers = Numbers(&bytes);
        if numbers.u32(0)? != MAGIC || numbers.u32(4)? != block_type::SUPERBLOCK {
            return Err(unknown("its journal is of an older form"));
        }
        log.features = numbers.u32(0x28)?;
        let (compatible, read_only) = (numbers.u32(0x24)?, numbers.u32(0x2C)?);
        if log.features & !feature::KNOWN != 0 || compatible != 0 || read_only != 0 {
            return Err(unknown(format!(
                "its journal has the features {compatible:#x}, {:#x}, {read_only:#x}",
                log.features
            )));
        }
        if log.features & (feature::CSUM_V2 | feature::CSUM_V3) != 0 {
            if bytes.get(0x50) != Some(&CRC32C) {
                return Err(unknown("its journal's checksums are of another kind"));
            }
            let own = part(&bytes, 0, 1024);
            if crc_but(!0, own, 0xFC, 4) != numbers.u32(0xFC)? {
                return Err(bad("its superblock does not match its checksum"));
            }
            log.seed = Some(crc(!0, part(&bytes, 0x30, 16)));
        }
        (log.first, log.end) = (numbers.u32(0x14)?, numbers.u32(0x10)?);
        (log.sequence, log.start) = (numbers.u32(0x18)?, numbers.u32(0x1C)?);
        if numbers.u32(0x20)? != 0 {
            return Err(unknown("its journal notes an error"));
        }
        if log.start == 0 {
            return Ok(None);
        }
        let size = files.block_size();
        if numbers.u32(0x0C)? != size as u32
            || u64::from(log.end) > log.contents.size() / size
            || !(1..log.end).contains(&log.first)
            || !(log.first..log.end).contains(&log.start)
        {
            return Err(bad("the numbers of its superblock do not fit"));
        }
        Ok(Some(log))
    }

    fn block(&self, number: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block_size];
        self.contents
            .read(&mut bytes, u64::from(number) * self.block_size as u64)?;
        Ok(bytes)
    }

    /// The block `count` behind `number`, around the end. A circle is no longer than the journal.
    fn behind(&self, number: u32, count: u32) -> u32 {
        let len = u64::from(self.end - self.first);
        let at = u64::from(number - self.first) + u64::from(count);
        self.first + (at % len) as u32
    }

    /// What the transactions that were committed leave in the file system.
    fn replay(&self) -> Result<BTreeMap<u64, Journaled>> {
        let transactions = self.transactions()?;
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        for transaction in &transactions {
            for revoke in &transaction.revokes {
                for block in self.revoked_by(&self.block(*revoke)?)? {
                    // The later one counts: transactions are in order.
                    revoked.insert(block, transaction.sequence);
                }
            }
        }
        let is_revoked = |block: u64, sequence: u32| {
            let by = revoked.get(&block);
            by.is_some_and(|by| sequence.wrapping_sub(*by).cast_signed() <= 0)
        };
        let mut written = BTreeMap::new();
        for transaction in &transactions {
            for descriptor in &transaction.descriptors {
                let mut at = *descriptor;
                for tag in self.tags(&self.block(*descriptor)?)? {
                    at = self.behind(at, 1);
                    if tag.block >= self.blocks {
                        return Err(bad("it holds a block beyond the end"));
                    }
                    if is_revoked(tag.block, transaction.sequence) {
                        continue;
                    }
                    self.check_data(at, transaction.sequence, &tag)?;
                    let block = self.contents.block(u64::from(at));
                    let block = block.ok_or_else(|| bad("it has a hole"))?;
                    let escaped = tag.escaped;
                    written.insert(tag.block, Journaled { block, escaped });
                }
            }
        }
        Ok(written)
    }

    /// The transactions that were committed, in order.
    fn transactions(&self) -> Result<Vec<Transaction>> {
        let mut found = Vec::new();
        let next = |sequence| Transaction {
            sequence,
            descriptors: Vec::new(),
            revokes: Vec::new(),
        };
        let mut open = next(self.sequence);
        let (mut at, mut left) = (self.start, self.end - self.first);
        loop {
            let bytes = self.block(at)?;
            let numbers = Numbers(&bytes);
            if numbers.u32(0)? != MAGIC || numbers.u32(8)? != open.sequence {
                return Ok(found);
            }
            let mut blocks = 1;
            match numbers.u32(4)? {
                block_type::DESCRIPTOR => {
                    self.check_tail(&bytes)?;
                    blocks += self.tags(&bytes)?.len() as u32;
                    open.descriptors.push(at);
                }
                block_type::REVOKE => {
                    self.check_tail(&bytes)?;
                    open.revokes.push(at);
                }
                block_type::COMMIT => {
                    self.check_sum(&bytes, COMMIT_SUM)?;
                    let sequence = open.sequence.wrapping_add(1);
                    found.push(std::mem::replace(&mut open, next(sequence)));
                }
                _ => return Ok(found),
            }
            at = self.behind(at, blocks);
            left = match left.checked_sub(blocks) {
                Some(left) if left > 0 => left,
                // All of it is one circle of transactions, or their blocks make no sense.
                Some(_) => return Ok(found),
                None => return Err(bad("a transaction is longer than the journal")),
            };
        }
    }

    /// Checks the checksum in the last bytes of a descriptor or revoke block.
    fn check_tail(&self, bytes: &[u8]) -> Result<()> {
        self.check_sum(bytes, bytes.len() - TAIL)
    }

    fn check_sum(&self, bytes: &[u8], at: usize) -> Result<()> {
        match self.seed {
            Some(seed) if crc_but(seed, bytes, at, 4) != Numbers(bytes).u32(at)? => {
                Err(bad("a block does not match its checksum"))
            }
            _ => Ok(()),
        }
    }

    fn check_data(&self, at: u32, sequence: u32, tag: &Tag) -> Result<()> {
        let (Some(seed), Some(expected)) = (self.seed, tag.sum) else {
            return Ok(());
        };
        let sum = crc(crc(seed, &sequence.to_be_bytes()), &self.block(at)?);
        let sum = match self.features & feature::CSUM_V3 {
            0 => sum & 0xFFFF,
            _ => sum,
        };
        match sum == expected {
            true => Ok(()),
            false => Err(bad("a block that it holds does not match its checksum")),
        }
    }

    /// What a descriptor says.
    fn tags(&self, bytes: &[u8]) -> Result<Vec<Tag>> {
        let numbers = Numbers(bytes);
        let wide = self.features & feature::BITS_64 != 0;
        let third = self.features & feature::CSUM_V3 != 0;
        let second = self.features & feature::CSUM_V2 != 0;
        let len = match (third, wide) {
            (true, _) => 16,
            (false, wide) => 8 + 4 * usize::from(wide) + 2 * usize::from(second),
        };
        let tail = TAIL * usize::from(self.seed.is_some());
        let mut tags = Vec::new();
        let mut at = HEAD;
        while at + len <= bytes.len() - tail {
            let low = numbers.u32(at)?;
            let flags = match third {
                true => numbers.u32(at + 4)?,
                false => numbers.u16(at + 6)?.into(),
            };
            let high = if wide { numbers.u32(at + 8)? } else { 0 };
            let sum = match (third, second) {
                (true, _) => Some(numbers.u32(at + 12)?),
                (_, true) => Some(numbers.u16(at + 4)?.into()),
                _ => None,
            };
            tags.push(Tag {
                block: u64::from(high) << 32 | u64::from(low),
                escaped: flags & tag::ESCAPED != 0,
                sum,
            });
            at += len;
            if flags & tag::SAME_UUID == 0 {
                at += 16;
            }
            if flags & tag::LAST != 0 {
                break;
            }
        }
        Ok(tags)
    }

    /// The blocks that a revoke block names: earlier transactions do not count for them.
    fn revoked_by(&self, bytes: &[u8]) -> Result<Vec<u64>> {
        let numbers = Numbers(bytes);
        let wide = self.features & feature::BITS_64 != 0;
        let end = numbers.u32(HEAD)? as usize;
        let tail = TAIL * usize::from(self.seed.is_some());
        if !(REVOKE_HEAD..=bytes.len() - tail).contains(&end) {
            return Err(bad("a revoke block of another size"));
        }
        let len = if wide { 8 } else { 4 };
        let count = (end - REVOKE_HEAD) / len;
        let places = (0..count).map(|number| REVOKE_HEAD + number * len);
        places
            .map(|at| match wide {
                true => Ok(u64::from(numbers.u32(at)?) << 32 | u64::from(numbers.u32(at + 4)?)),
                false => Ok(numbers.u32(at)?.into()),
            })
            .collect()
    }
}
