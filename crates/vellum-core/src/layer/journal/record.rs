//! Records of the journal: their bytes, and the records of an area as recovery finds them. format.md,
//! section 3.2.

use uuid::Uuid;

use crate::layer::codec::{Reader, Writer, count, crc_around};
use crate::layer::options::MAX_AREA;
use crate::layer::table::MapExtent;
use vellum_base::block::{
    BLOCK_LEN, Block, Blocks, Run, Span, in_memory, part, part_from, part_mut, push_run,
};
use vellum_base::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"VELLUMJR";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 128;
const CRC_AT: usize = 68;
const DURABLE_AT: usize = 72;
const FLAG_BARRIER: u32 = 1;
/// Records begin and end at multiples of this, so that each is one direct write.
pub(super) const ALIGN: usize = 4096;

/// The largest record: a bound for what a reader allocates.
const MAX_RECORD: usize = in_memory(MAX_AREA);

/// A buffer that begins at a multiple of [`ALIGN`] in memory, for direct writes.
#[derive(Debug, Default)]
pub(in crate::layer) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// An empty buffer with room for `len` bytes of zeros.
    fn reset(&mut self, len: usize) {
        let room = len + ALIGN;
        if self.bytes.len() < room {
            self.bytes = vec![0; room];
        }
        self.start = self.bytes.as_ptr().align_offset(ALIGN);
        self.len = len;
        assert!(self.start < ALIGN, "a buffer that cannot be aligned");
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        part(&self.bytes, self.start, self.len)
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        part_mut(&mut self.bytes, self.start, self.len)
    }
}

/// A record without its place in the journal.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(in crate::layer) struct RecordBody {
    /// Older records' blocks are synced: replay must leave them out.
    pub(in crate::layer) barrier: bool,
    /// Map changes in order; [`vellum_base::block::BlockState::Parent`] too.
    pub(in crate::layer) changes: Vec<MapExtent>,
    /// Numbers of the blocks whose bytes the record carries.
    pub(in crate::layer) blocks: Vec<Block>,
}

impl RecordBody {
    /// Where the bytes of the blocks begin in a record of so many changes and blocks.
    fn head_of(changes: usize, blocks: Blocks) -> usize {
        let numbers = in_memory(blocks.get()) * 8;
        (HEADER_LEN + changes * MapExtent::LEN + numbers).next_multiple_of(ALIGN)
    }

    /// Bytes that a record of so many changes and blocks takes in an area.
    pub(in crate::layer) fn len_of(changes: usize, blocks: Blocks) -> usize {
        Self::head_of(changes, blocks) + blocks.buffer_len()
    }

    fn blocks_at(&self) -> usize {
        Self::head_of(self.changes.len(), self.carried())
    }

    /// Bytes that the record takes in an area.
    pub(in crate::layer) fn encoded_len(&self) -> usize {
        Self::len_of(self.changes.len(), self.carried())
    }

    /// How many blocks it carries.
    pub(in crate::layer) fn carried(&self) -> Blocks {
        Blocks::new(self.blocks.len() as u64)
    }
}

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::layer) struct RecordPlace {
    pub(in crate::layer) generation: u64,
    pub(in crate::layer) sequence: u64,
    /// Number of records of the generation before.
    pub(in crate::layer) records_before: u64,
    /// Number of records of this generation that were durable before this one was written.
    pub(in crate::layer) durable: u64,
}

/// Writes a record into `buf`; `fill` reads its blocks, those that lie next to each other at once.
pub(in crate::layer) fn encode_record(
    buf: &mut AlignedBuf,
    uuid: Uuid,
    place: RecordPlace,
    body: &RecordBody,
    mut fill: impl FnMut(Block, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut head = Writer::with_capacity(body.blocks_at());
    head.bytes(MAGIC);
    head.u32(VERSION);
    head.u32(if body.barrier { FLAG_BARRIER } else { 0 });
    head.bytes(uuid.as_bytes());
    head.u64(place.generation);
    head.u64(place.sequence);
    head.u64(place.records_before);
    head.u32(count(body.changes.len()));
    head.u32(count(body.blocks.len()));
    head.u32(count(body.encoded_len()));
    head.u32(0);
    head.u64(place.durable);
    head.pad_to(HEADER_LEN);
    body.changes
        .iter()
        .for_each(|change| change.write(&mut head));
    body.blocks.iter().for_each(|block| head.u64(block.get()));
    head.pad_to(body.blocks_at());
    let head = head.into_bytes();

    buf.reset(body.encoded_len());
    let (front, payload) = buf.as_mut_slice().split_at_mut(head.len());
    front.copy_from_slice(&head);
    let mut rest = payload;
    let mut runs = Vec::new();
    for &block in &body.blocks {
        push_run(&mut runs, Run::new(Span::of(block), ()));
    }
    for run in runs {
        let (bytes, behind) = rest.split_at_mut(run.len().buffer_len());
        fill(run.start(), bytes)?;
        rest = behind;
    }
    assert!(rest.is_empty(), "a record with room for other blocks");
    let crc = crc32fast::hash(buf.as_slice());
    part_mut(buf.as_mut_slice(), CRC_AT, 4).copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// A record as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::layer) struct Record {
    pub(in crate::layer) place: RecordPlace,
    pub(in crate::layer) body: RecordBody,
    /// The bytes of `body.blocks`, one after the other.
    pub(in crate::layer) payload: Vec<u8>,
}

/// Reads the record at the front of `bytes`: `None` where there is no valid one.
pub(in crate::layer) fn decode_record(bytes: &[u8], uuid: Uuid) -> Option<Record> {
    if bytes.get(..8)? != MAGIC {
        return None;
    }
    let read = || -> Result<Option<Record>> {
        let mut input = Reader::new(bytes);
        input.skip(8)?;
        let version = input.u32()?;
        let flags = input.u32()?;
        let owner = input.uuid()?;
        let (generation, sequence, records_before) = (input.u64()?, input.u64()?, input.u64()?);
        let changes = input.u32()? as usize;
        let blocks = input.u32()? as usize;
        let len = input.u32()? as usize;
        let crc = input.u32()?;
        let place = RecordPlace {
            generation,
            sequence,
            records_before,
            durable: input.u64()?,
        };
        input.skip(HEADER_LEN - DURABLE_AT - 8)?;
        if version != VERSION || owner != uuid || len > MAX_RECORD {
            return Ok(None);
        }
        let Some(record) = bytes.get(..len) else {
            return Ok(None);
        };
        // Bounded by the record's length before anything is allocated for them.
        if changes > len / MapExtent::LEN || blocks > len / BLOCK_LEN {
            return Ok(None);
        }
        if record.len() < HEADER_LEN || crc_around(record, CRC_AT) != crc {
            return Ok(None);
        }
        let mut body = RecordBody {
            barrier: flags & FLAG_BARRIER != 0,
            ..RecordBody::default()
        };
        for _ in 0..changes {
            body.changes.push(MapExtent::read(&mut input)?);
        }
        for _ in 0..blocks {
            body.blocks.push(Block::new(input.u64()?));
        }
        if body.encoded_len() != len {
            return Ok(None);
        }
        let payload = part_from(record, body.blocks_at());
        Ok(Some(Record {
            place,
            body,
            payload: payload.to_vec(),
        }))
    };
    read().ok().flatten()
}

/// The records of one area, as recovery finds them.
#[derive(Debug)]
pub(in crate::layer) struct AreaRecords {
    pub(in crate::layer) generation: u64,
    /// Number of records of the generation before, as the first record says.
    pub(in crate::layer) records_before: u64,
    /// At least one.
    pub(in crate::layer) records: Vec<Record>,
}

/// Reads an area: `None` where it holds no generation after `covered`, the one that the checkpoint
/// contains. An area that is free may be torn anywhere, as the next generation's first record is.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where a record is damaged that was durable once, as a record behind it
/// says: a crash can tear only those that no sync had covered.
pub(in crate::layer) fn read_area(
    bytes: &[u8],
    uuid: Uuid,
    covered: u64,
) -> Result<Option<AreaRecords>> {
    let mut records: Vec<Record> = Vec::new();
    let mut at = 0;
    while let Some(record) = decode_record(part_from(bytes, at), uuid) {
        let generation = records
            .first()
            .map_or(record.place.generation, |r| r.place.generation);
        if record.place.sequence != records.len() as u64 || record.place.generation != generation {
            break;
        }
        at += record.body.encoded_len();
        records.push(record);
    }
    let first = match records.first() {
        Some(first) if first.place.generation > covered => first.place,
        _ => return Ok(None),
    };
    let generation = first.generation;
    let next = records.len() as u64;
    let mut behind = at;
    while let Some(rest) = bytes.get(behind..).filter(|rest| !rest.is_empty()) {
        if let Some(record) = decode_record(rest, uuid)
            && record.place.generation == generation
            && record.place.durable > next
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the journal is damaged: record {next} of generation {generation} at byte {at} \
                     is unreadable, but record {} says that it was durable",
                    record.place.sequence
                ),
            ));
        }
        behind += ALIGN;
    }
    Ok(Some(AreaRecords {
        generation,
        records_before: first.records_before,
        records,
    }))
}

/// Checks that a record's blocks and changes lie within `blocks`.
pub(in crate::layer) fn check_record(record: &Record, blocks: Blocks) -> Result<()> {
    let body = &record.body;
    let changes_fit = body.changes.iter().all(|change| change.fits(blocks));
    let end = Block::FIRST + blocks;
    if changes_fit && body.blocks.iter().all(|&block| block < end) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        "a journal record reaches past the end of the layer",
    ))
}

/// Blocks that a generation's records carry and replay must write: those from the last barrier on.
pub(in crate::layer) fn payload_to_replay(
    records: &[Record],
) -> impl Iterator<Item = (Block, &[u8])> {
    let barrier = records.iter().rposition(|record| record.body.barrier);
    // Without a barrier, from the first.
    records
        .iter()
        .skip(barrier.map_or(0, |at| at))
        .flat_map(|record| {
            record
                .body
                .blocks
                .iter()
                .copied()
                .zip(record.payload.chunks_exact(BLOCK_LEN))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::table::push_extent;
    use vellum_base::block::BlockState;

    const UUID: Uuid = Uuid::from_u128(5);

    fn data(start: u64, len: u64) -> MapExtent {
        let span = Span::new(Block::new(start), Blocks::new(len));
        let mut extents = Vec::new();
        push_extent(&mut extents, Run::new(span, BlockState::Data));
        extents[0]
    }

    fn numbered(blocks: &[u64]) -> Vec<Block> {
        blocks.iter().copied().map(Block::new).collect()
    }

    fn record(generation: u64, sequence: u64, blocks: &[u64], barrier: bool) -> Vec<u8> {
        let mut body = RecordBody {
            barrier,
            blocks: numbered(blocks),
            ..Default::default()
        };
        body.changes.push(data(sequence * 10, 3));
        let mut buf = AlignedBuf::default();
        let place = RecordPlace {
            generation,
            sequence,
            records_before: 0,
            durable: sequence,
        };
        encode_record(&mut buf, UUID, place, &body, |first, bytes| {
            for (block, bytes) in (first.get()..).zip(bytes.chunks_exact_mut(BLOCK_LEN)) {
                bytes.fill(block as u8);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(buf.as_slice().as_ptr() as usize % ALIGN, 0);
        buf.as_slice().to_vec()
    }

    fn area(records: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = records.concat();
        bytes.resize(bytes.len() + 8192, 0);
        bytes
    }

    #[test]
    fn records_read_back_in_order_with_their_blocks() {
        let bytes = area(&[record(4, 0, &[7, 9], false), record(4, 1, &[], true)]);
        let found = read_area(&bytes, UUID, 0).unwrap().unwrap();
        assert_eq!(found.generation, 4);
        assert_eq!(found.records.len(), 2);
        assert_eq!(found.records[0].body.blocks, numbered(&[7, 9]));
        assert!(
            found.records[0].payload[..4096]
                .iter()
                .all(|&byte| byte == 7)
        );
        assert!(found.records[1].body.barrier);
    }

    #[test]
    fn blocks_that_lie_next_to_each_other_are_read_at_once() {
        let mut body = RecordBody {
            blocks: numbered(&[3, 4, 5, 9, 11, 12]),
            ..Default::default()
        };
        body.changes.push(data(3, 3));
        let place = RecordPlace {
            generation: 1,
            sequence: 0,
            records_before: 0,
            durable: 0,
        };
        let mut reads = Vec::new();
        encode_record(
            &mut AlignedBuf::default(),
            UUID,
            place,
            &body,
            |first, bytes| {
                reads.push((first.get(), bytes.len() / BLOCK_LEN));
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(reads, [(3, 3), (9, 1), (11, 2)]);
    }

    #[test]
    fn any_torn_last_record_ends_the_generation_before_it() {
        let good = area(&[record(1, 0, &[1], false), record(1, 1, &[2, 3], false)]);
        let second = record(1, 0, &[1], false).len();
        for at in (second..good.len() - 8192).step_by(256) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let found = read_area(&bad, UUID, 0).unwrap().unwrap();
            assert_eq!(found.records.len(), 1, "byte {at}");
        }
    }

    #[test]
    fn a_damaged_record_that_others_follow_is_corrupt() {
        let mut bytes = area(&[
            record(1, 0, &[], false),
            record(1, 1, &[], false),
            record(1, 2, &[], false),
        ]);
        bytes[4096 + 130] ^= 1;
        assert_eq!(
            read_area(&bytes, UUID, 0).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    /// The first record of a generation, torn, over an older generation of shorter records.
    #[test]
    fn a_free_area_torn_by_the_next_generation_is_empty_and_not_damaged() {
        let mut bytes = area(&[
            record(3, 0, &[], false),
            record(3, 1, &[], false),
            record(3, 2, &[], false),
        ]);
        let new = record(5, 0, &[7], false);
        bytes[4096..8192].copy_from_slice(&new[4096..8192]);
        assert!(read_area(&bytes, UUID, 3).unwrap().is_none());
        assert_eq!(
            read_area(&bytes, UUID, 2).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn leftovers_of_an_older_generation_are_not_read() {
        let mut bytes = area(&[record(3, 0, &[1], false), record(3, 1, &[2], false)]);
        let new = record(5, 0, &[], false);
        bytes[..new.len()].copy_from_slice(&new);
        let found = read_area(&bytes, UUID, 0).unwrap().unwrap();
        assert_eq!((found.generation, found.records.len()), (5, 1));
    }

    #[test]
    fn another_layer_s_records_and_zeros_are_no_records() {
        assert!(read_area(&area(&[]), UUID, 0).unwrap().is_none());
        let bytes = area(&[record(1, 0, &[1], false)]);
        assert!(read_area(&bytes, Uuid::from_u128(6), 0).unwrap().is_none());
    }

    #[test]
    fn blocks_before_the_last_barrier_are_not_replayed() {
        let bytes = area(&[
            record(1, 0, &[1], false),
            record(1, 1, &[2], true),
            record(1, 2, &[3], false),
        ]);
        let found = read_area(&bytes, UUID, 0).unwrap().unwrap();
        let replayed: Vec<u64> = payload_to_replay(&found.records)
            .map(|(block, _)| block.get())
            .collect();
        assert_eq!(replayed, [2, 3]);
    }
}
