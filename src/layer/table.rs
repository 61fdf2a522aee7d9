//! The map on disk as a table of extents: the files `map` and `seal`. format.md, section 3.1.

use std::path::Path;

use uuid::Uuid;

use super::codec::{Reader, Writer, check_crc};
use crate::block::{BLOCK_SIZE, BlockState};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::{Mapping, OpenMode, Storage};

const MAGIC: &[u8; 8] = b"VELLUMMP";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 4096;
const EXTENT_LEN: usize = 24;

/// Length of a digest in bytes (SHA-256).
pub const DIGEST_LEN: usize = 32;

/// What a table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TableKind {
    /// The map of a writable layer, up to and with a generation of its journal.
    Checkpoint = 1,
    /// The map of a sealed layer, with checksums and a digest.
    Seal = 2,
}

/// Bytes of a checkpoint of so many extents.
pub(super) fn checkpoint_len(extents: usize) -> u64 {
    (HEADER_LEN + extents * EXTENT_LEN) as u64
}

/// A run of blocks of one state in a layer's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapExtent {
    /// First block.
    pub start: u64,
    /// Length in blocks, never 0.
    pub len: u32,
    /// [`BlockState::Data`] or [`BlockState::Zero`].
    pub state: BlockState,
}

/// Cuts a run into extents that a table can hold.
pub(super) fn push_extent(extents: &mut Vec<MapExtent>, start: u64, len: u64, state: BlockState) {
    let (mut start, mut len) = (start, len);
    while len > 0 {
        let piece = len.min(u64::from(u32::MAX));
        extents.push(MapExtent {
            start,
            len: piece as u32,
            state,
        });
        start += piece;
        len -= piece;
    }
}

/// What goes into a table besides its extents.
pub(super) struct TableContent<'a> {
    pub(super) kind: TableKind,
    pub(super) uuid: Uuid,
    /// Checkpoint: the last generation that it contains. Seal: 0.
    pub(super) generation: u64,
    pub(super) virtual_size: u64,
    pub(super) extents: &'a [MapExtent],
    /// Seal: one checksum a data block, in order.
    pub(super) sums: &'a [u32],
    pub(super) digest: [u8; DIGEST_LEN],
}

impl TableContent<'_> {
    /// The table as it lies on disk.
    pub(super) fn encode(&self) -> Vec<u8> {
        // In place, since a table may be large: room for the header, which has the CRCs, comes first.
        let mut out = Writer::with_capacity(sums_offset(self.extents.len()) + self.sums.len() * 4);
        out.pad_to(HEADER_LEN);
        let mut next_sum = 0;
        for extent in self.extents {
            out.u64(extent.start);
            out.u32(extent.len);
            out.u32(state_code(extent.state));
            if self.kind == TableKind::Seal && extent.state == BlockState::Data {
                out.u64(next_sum);
                next_sum += u64::from(extent.len);
            } else {
                out.u64(0);
            }
        }
        let extents_crc = out.crc_from(HEADER_LEN);
        let mut sums_crc = crc32fast::hash(&[]);
        if self.kind == TableKind::Seal {
            let start = sums_offset(self.extents.len());
            out.pad_to(start);
            self.sums.iter().for_each(|&sum| out.u32(sum));
            sums_crc = out.crc_from(start);
        }

        let mut header = Writer::with_capacity(HEADER_LEN);
        header.bytes(MAGIC);
        header.u32(VERSION);
        header.u32(self.kind as u32);
        header.bytes(self.uuid.as_bytes());
        header.u64(self.generation);
        header.u64(self.virtual_size);
        header.u64(self.extents.len() as u64);
        header.u64(self.sums.len() as u64);
        header.bytes(&self.digest);
        header.u32(extents_crc);
        header.u32(sums_crc);
        header.pad_to(HEADER_LEN - 4);
        header.crc();
        let mut bytes = out.into_bytes();
        if let Some(place) = bytes.get_mut(..HEADER_LEN) {
            place.copy_from_slice(&header.into_bytes());
        }
        bytes
    }
}

/// The block behind an extent as it lies on disk.
fn extent_end(extent: &[u8; EXTENT_LEN]) -> u64 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *extent;
    let start = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    start.saturating_add(u64::from(u32::from_le_bytes([i, j, k, l])))
}

fn sums_offset(extents: usize) -> usize {
    (HEADER_LEN + extents * EXTENT_LEN).next_multiple_of(HEADER_LEN)
}

/// The number that stands for a state on disk.
pub(super) fn state_code(state: BlockState) -> u32 {
    match state {
        BlockState::Parent => 0,
        BlockState::Data => 1,
        BlockState::Zero => 2,
    }
}

/// The state that a number on disk stands for.
pub(super) fn state_of_code(code: u32) -> Result<BlockState> {
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

/// A table that was read and checked. The extents and checksums stay in the page cache.
#[derive(Debug)]
pub(super) struct Table {
    bytes: Mapping,
    extents: usize,
    sums: usize,
    sums_crc: u32,
    pub(super) generation: u64,
    pub(super) digest: [u8; DIGEST_LEN],
}

/// What a table must agree with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    pub(super) kind: TableKind,
    pub(super) uuid: Uuid,
    pub(super) virtual_size: u64,
}

impl Table {
    /// Opens the table at `path` and checks all but the checksums' own CRC; `None` where there is
    /// no such file. Errors name the file.
    pub(super) fn open(
        storage: &dyn Storage,
        path: &Path,
        expected: Expected,
    ) -> Result<Option<Self>> {
        let file = match storage.open(path, OpenMode::Read) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("cannot open {}", path.display()))?,
        };
        let bytes = file
            .len()
            .and_then(|len| file.map(0, len as usize))
            .context(|| format!("cannot read {}", path.display()))?;
        Table::decode(bytes, expected)
            .map(Some)
            .context(|| path.display().to_string())
    }

    /// Reads and checks a table.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for foreign bytes, [`ErrorKind::Corrupt`] for all else.
    pub(super) fn decode(bytes: Mapping, expected: Expected) -> Result<Self> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, what);
        let all = bytes.as_ref();
        if all.get(..8) != Some(MAGIC.as_slice()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "not a Vellum map (wrong magic)",
            ));
        }
        let header = all
            .get(..HEADER_LEN)
            .ok_or_else(|| corrupt(format!("truncated: {} bytes", all.len())))?;
        check_crc(header, "map header")?;
        let mut input = Reader::new(header);
        input.skip(8)?;
        let version = input.u32()?;
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("map version {version}; this build reads version {VERSION}"),
            ));
        }
        let kind = input.u32()?;
        let uuid = input.uuid()?;
        let generation = input.u64()?;
        let virtual_size = input.u64()?;
        let extents = input.u64()?;
        let sums = input.u64()?;
        let mut digest = [0; DIGEST_LEN];
        digest.copy_from_slice(input.take(DIGEST_LEN)?);
        let extents_crc = input.u32()?;
        let sums_crc = input.u32()?;
        if kind != expected.kind as u32 {
            return Err(corrupt(format!(
                "a table of kind {kind} where {:?} belongs",
                expected.kind
            )));
        }
        if uuid != expected.uuid {
            return Err(corrupt(format!(
                "it belongs to layer {uuid}, not to {}",
                expected.uuid
            )));
        }
        // A checkpoint may be from before the layer grew.
        let fits = match expected.kind {
            TableKind::Checkpoint => virtual_size <= expected.virtual_size,
            TableKind::Seal => virtual_size == expected.virtual_size,
        };
        if !fits {
            return Err(corrupt(format!(
                "it is for a virtual size of {virtual_size} bytes, the layer has {}",
                expected.virtual_size
            )));
        }
        // Both counts fit the file before anything is computed from them.
        let len = all.len() as u64;
        let blocks = virtual_size / BLOCK_SIZE;
        if extents > (len / EXTENT_LEN as u64).min(blocks) || sums > (len / 4).min(blocks) {
            return Err(corrupt(format!(
                "{extents} extents and {sums} checksums in {len} bytes"
            )));
        }
        let (extents, sums) = (extents as usize, sums as usize);
        let end = match expected.kind {
            TableKind::Checkpoint => HEADER_LEN + extents * EXTENT_LEN,
            TableKind::Seal => sums_offset(extents) + sums * 4,
        };
        if all.len() != end {
            return Err(corrupt(format!(
                "{len} bytes where {end} belong: truncated or extended"
            )));
        }
        let table = Table {
            extents,
            sums,
            sums_crc,
            generation,
            digest,
            bytes,
        };
        // This first: it stops at the first extent that is none. A file may claim gigabytes of
        // them, with a hole in their place.
        table.check_extents(Expected {
            virtual_size,
            ..expected
        })?;
        if crc32fast::hash(table.extent_bytes()) != extents_crc {
            return Err(corrupt("the CRC of the extents does not match".into()));
        }
        Ok(table)
    }

    fn extent_bytes(&self) -> &[u8] {
        let end = HEADER_LEN + self.extents * EXTENT_LEN;
        self.bytes.as_ref().get(HEADER_LEN..end).unwrap_or_default()
    }

    fn sum_bytes(&self) -> &[u8] {
        let start = sums_offset(self.extents);
        self.bytes
            .as_ref()
            .get(start..start + self.sums * 4)
            .unwrap_or_default()
    }

    /// The extent at `at`, with the index of its first checksum.
    fn extent(&self, at: usize) -> Result<(MapExtent, u64)> {
        let mut input = Reader::new(
            self.extent_bytes()
                .get(at * EXTENT_LEN..)
                .unwrap_or_default(),
        );
        let extent = MapExtent {
            start: input.u64()?,
            len: input.u32()?,
            state: state_of_code(input.u32()?)?,
        };
        Ok((extent, input.u64()?))
    }

    /// All extents, in order.
    pub(super) fn extents(&self) -> impl Iterator<Item = MapExtent> + '_ {
        // They were checked when the table was opened.
        (0..self.extents).map_while(|at| self.extent(at).ok().map(|(extent, _)| extent))
    }

    fn check_extents(&self, expected: Expected) -> Result<()> {
        let blocks = expected.virtual_size / BLOCK_SIZE;
        let mut end = 0;
        let mut next_sum = 0;
        for at in 0..self.extents {
            let (extent, first_sum) = self.extent(at)?;
            let extent_end = extent.start.checked_add(u64::from(extent.len));
            let fits = extent.start >= end && extent_end.is_some_and(|end| end <= blocks);
            if !fits || extent.len == 0 || extent.state == BlockState::Parent {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("extent {at} is impossible: {extent:?} after block {end} of {blocks}"),
                ));
            }
            end = extent.start + u64::from(extent.len);
            if expected.kind == TableKind::Seal && extent.state == BlockState::Data {
                if first_sum != next_sum {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("extent {at} claims checksum {first_sum}, it has {next_sum}"),
                    ));
                }
                next_sum += u64::from(extent.len);
            }
        }
        if next_sum != self.sums as u64 {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{} checksums for {next_sum} data blocks", self.sums),
            ));
        }
        Ok(())
    }

    /// Checks the CRC of the checksums, which opening leaves out.
    pub(super) fn check_sums_crc(&self) -> Result<()> {
        if crc32fast::hash(self.sum_bytes()) == self.sums_crc {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Corrupt,
            "the CRC of the checksums does not match",
        ))
    }

    /// The checksums of `len` data blocks from `block`, which lie in one extent.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the table does not have them all.
    pub(super) fn sums(&self, block: u64, len: usize) -> Result<impl Iterator<Item = u32> + '_> {
        // Every read comes through here: the search looks at what it needs and at nothing else.
        let (extents, _) = self.extent_bytes().as_chunks::<EXTENT_LEN>();
        let low = extents.partition_point(|extent| extent_end(extent) <= block);
        let missing = || Error::new(ErrorKind::Corrupt, format!("no checksum for block {block}"));
        if low >= self.extents {
            return Err(missing());
        }
        let (extent, first_sum) = self.extent(low)?;
        let within = block.checked_sub(extent.start).ok_or_else(missing)?;
        if within + len as u64 > u64::from(extent.len) || extent.state != BlockState::Data {
            return Err(missing());
        }
        let start = (first_sum + within) as usize * 4;
        let bytes = self
            .sum_bytes()
            .get(start..start + len * 4)
            .ok_or_else(missing)?;
        Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|sum| u32::from_le_bytes(*sum)))
    }

    /// Number of data blocks that have a checksum.
    pub(super) fn sum_count(&self) -> u64 {
        self.sums as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid::from_u128(7);

    fn expected(kind: TableKind) -> Expected {
        Expected {
            kind,
            uuid: UUID,
            virtual_size: 1 << 30,
        }
    }

    fn seal() -> Vec<u8> {
        TableContent {
            kind: TableKind::Seal,
            uuid: UUID,
            generation: 0,
            virtual_size: 1 << 30,
            extents: &[
                MapExtent {
                    start: 3,
                    len: 2,
                    state: BlockState::Data,
                },
                MapExtent {
                    start: 5,
                    len: 9,
                    state: BlockState::Zero,
                },
                MapExtent {
                    start: 100,
                    len: 1,
                    state: BlockState::Data,
                },
            ],
            sums: &[11, 22, 33],
            digest: [9; 32],
        }
        .encode()
    }

    fn decode(bytes: Vec<u8>, kind: TableKind) -> Result<Table> {
        Table::decode(Mapping::Owned(bytes), expected(kind))
    }

    #[test]
    fn a_seal_reads_back_with_each_block_s_checksum() {
        let table = decode(seal(), TableKind::Seal).unwrap();
        assert_eq!(table.extents().count(), 3);
        assert_eq!(table.sums(3, 2).unwrap().collect::<Vec<_>>(), [11, 22]);
        assert_eq!(table.sums(4, 1).unwrap().collect::<Vec<_>>(), [22]);
        assert_eq!(table.sums(100, 1).unwrap().collect::<Vec<_>>(), [33]);
        table.check_sums_crc().unwrap();
    }

    #[test]
    fn a_checksum_that_the_table_lacks_is_corrupt_and_not_zero() {
        let table = decode(seal(), TableKind::Seal).unwrap();
        for (block, len) in [(0, 1), (3, 3), (5, 1), (99, 1), (100, 2), (1000, 1)] {
            assert_eq!(
                table.sums(block, len).err().unwrap().kind(),
                ErrorKind::Corrupt
            );
        }
    }

    #[test]
    fn every_single_changed_byte_is_found() {
        let good = seal();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            let found = decode(bad, TableKind::Seal).and_then(|table| table.check_sums_crc());
            // Padding between extents and checksums carries nothing.
            let padding = (4096 + 3 * 24..8192).contains(&at);
            assert_eq!(found.is_err(), !padding, "byte {at}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let good = seal();
        for len in (0..good.len()).step_by(7) {
            decode(good[..len].to_vec(), TableKind::Seal).unwrap_err();
        }
    }

    #[test]
    fn a_table_of_another_layer_kind_or_size_is_refused() {
        decode(seal(), TableKind::Checkpoint).unwrap_err();
        for expected in [
            Expected {
                uuid: Uuid::from_u128(8),
                ..expected(TableKind::Seal)
            },
            Expected {
                virtual_size: 1 << 31,
                ..expected(TableKind::Seal)
            },
        ] {
            let error = Table::decode(Mapping::Owned(seal()), expected).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn overlapping_unsorted_empty_and_outlying_extents_are_refused() {
        let data = BlockState::Data;
        let blocks = (1u64 << 30) / 4096;
        for extents in [
            vec![(3, 2), (4, 1)],
            vec![(9, 2), (3, 1)],
            vec![(3, 0)],
            vec![(blocks - 1, 2)],
            vec![(u64::MAX, 1)],
        ] {
            let extents: Vec<_> = extents
                .iter()
                .map(|&(start, len)| MapExtent {
                    start,
                    len,
                    state: data,
                })
                .collect();
            let bytes = TableContent {
                kind: TableKind::Checkpoint,
                uuid: UUID,
                generation: 1,
                virtual_size: 1 << 30,
                extents: &extents,
                sums: &[],
                digest: [0; 32],
            }
            .encode();
            let error = decode(bytes, TableKind::Checkpoint).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{extents:?}");
        }
    }

    #[test]
    fn extents_that_are_a_hole_are_refused_at_the_first_and_not_checksummed_to_the_last() {
        let mut bytes = seal();
        bytes.truncate(HEADER_LEN);
        bytes[48..56].copy_from_slice(&10_000u64.to_le_bytes());
        bytes[56..64].copy_from_slice(&0u64.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..4092]);
        bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
        bytes.resize(sums_offset(10_000), 0);
        let error = decode(bytes, TableKind::Seal).unwrap_err();
        assert!(
            error.to_string().contains("extent 0 is impossible"),
            "{error}"
        );
    }

    #[test]
    fn a_hostile_count_is_refused_before_anything_is_allocated() {
        let mut bytes = seal();
        bytes[48..56].copy_from_slice(&u64::MAX.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..4092]);
        bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(
            decode(bytes, TableKind::Seal).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
