//! The map on disk as a table of extents: the files `map` and `seal`. format.md, section 3.1.

use std::path::Path;

use uuid::Uuid;

use super::codec::{Reader, Writer, check_crc};
use vellum_base::block::{BLOCK_SIZE, BlockState};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Mapping, OpenMode, Storage};

const MAGIC: &[u8; 8] = b"VELLUMMP";
/// Of a seal, and of a checkpoint that an older build made: nothing follows it.
const VERSION: u32 = 1;
/// Of a checkpoint that segments of changes may follow.
const GROWING_VERSION: u32 = 2;
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
pub(super) fn checkpoint_len(extents: u64) -> u64 {
    (HEADER_LEN as u64 + extents * EXTENT_LEN as u64).next_multiple_of(HEADER_LEN as u64)
}

/// Bytes of the table whose first bytes these are in a file of `len`: what follows a checkpoint is
/// not part of it.
pub(super) fn table_len(front: &[u8; HEADER_LEN], len: u64) -> u64 {
    let [version, kind] = [8, 12].map(|at| {
        let mut field = Reader::new(front.get(at..).unwrap_or_default());
        field.u32().unwrap_or_default()
    });
    let extents = Reader::new(front.get(48..).unwrap_or_default())
        .u64()
        .unwrap_or_default();
    if (version, kind) == (GROWING_VERSION, TableKind::Checkpoint as u32)
        && extents <= len / EXTENT_LEN as u64
    {
        checkpoint_len(extents).min(len)
    } else {
        len
    }
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
        } else {
            out.pad_to(sums_offset(self.extents.len()));
        }

        let mut header = Writer::with_capacity(HEADER_LEN);
        header.bytes(MAGIC);
        header.u32(match self.kind {
            TableKind::Checkpoint => GROWING_VERSION,
            TableKind::Seal => VERSION,
        });
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
    /// Of the header: its last field.
    crc: u32,
    version: u32,
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

/// The header of a table.
struct Front {
    version: u32,
    kind: u32,
    uuid: Uuid,
    generation: u64,
    virtual_size: u64,
    extents: u64,
    sums: u64,
    digest: [u8; DIGEST_LEN],
    extents_crc: u32,
    sums_crc: u32,
    /// Its own.
    crc: u32,
}

impl Front {
    fn read(all: &[u8]) -> Result<Self> {
        if all.get(..8) != Some(MAGIC.as_slice()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "not a Vellum map (wrong magic)",
            ));
        }
        let header = all.get(..HEADER_LEN).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("truncated: {} bytes", all.len()),
            )
        })?;
        check_crc(header, "map header")?;
        let mut input = Reader::new(header);
        input.skip(8)?;
        let mut front = Front {
            version: input.u32()?,
            kind: input.u32()?,
            uuid: input.uuid()?,
            generation: input.u64()?,
            virtual_size: input.u64()?,
            extents: input.u64()?,
            sums: input.u64()?,
            digest: [0; DIGEST_LEN],
            extents_crc: 0,
            sums_crc: 0,
            crc: Reader::new(header.get(HEADER_LEN - 4..).unwrap_or_default()).u32()?,
        };
        front.digest.copy_from_slice(input.take(DIGEST_LEN)?);
        front.extents_crc = input.u32()?;
        front.sums_crc = input.u32()?;
        Ok(front)
    }

    /// Whether it is of the table that is wanted.
    fn check(&self, expected: Expected) -> Result<()> {
        let corrupt = |what: String| Err(Error::new(ErrorKind::Corrupt, what));
        let newest = if self.kind == TableKind::Checkpoint as u32 {
            GROWING_VERSION
        } else {
            VERSION
        };
        if !(VERSION..=newest).contains(&self.version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "map version {}; this build reads versions up to {newest}: use the vellum that \
                     made it",
                    self.version
                ),
            ));
        }
        if self.kind != expected.kind as u32 {
            return corrupt(format!(
                "a table of kind {} where {:?} belongs",
                self.kind, expected.kind
            ));
        }
        if self.uuid != expected.uuid {
            return corrupt(format!(
                "it belongs to layer {}, not to {}",
                self.uuid, expected.uuid
            ));
        }
        // A checkpoint may be from before the layer grew.
        let fits = match expected.kind {
            TableKind::Checkpoint => self.virtual_size <= expected.virtual_size,
            TableKind::Seal => self.virtual_size == expected.virtual_size,
        };
        if !fits {
            return corrupt(format!(
                "it is for a virtual size of {} bytes, the layer has {}",
                self.virtual_size, expected.virtual_size
            ));
        }
        Ok(())
    }
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
        let len = bytes.as_ref().len() as u64;
        let front = Front::read(bytes.as_ref())?;
        front.check(expected)?;
        // Both counts fit the file before anything is computed from them.
        let blocks = front.virtual_size / BLOCK_SIZE;
        let (extents, sums) = (front.extents, front.sums);
        if extents > (len / EXTENT_LEN as u64).min(blocks) || sums > (len / 4).min(blocks) {
            return Err(corrupt(format!(
                "{extents} extents and {sums} checksums in {len} bytes"
            )));
        }
        let (extents, sums) = (extents as usize, sums as usize);
        let end = match expected.kind {
            TableKind::Checkpoint if front.version == VERSION => HEADER_LEN + extents * EXTENT_LEN,
            TableKind::Checkpoint | TableKind::Seal => sums_offset(extents) + sums * 4,
        };
        if len != end as u64 {
            return Err(corrupt(format!(
                "{len} bytes where {end} belong: truncated or extended"
            )));
        }
        let table = Table {
            bytes,
            extents,
            sums,
            sums_crc: front.sums_crc,
            crc: front.crc,
            version: front.version,
            generation: front.generation,
            digest: front.digest,
        };
        // This first: it stops at the first extent that is none. A file may claim gigabytes of
        // them, with a hole in their place.
        table.check_extents(Expected {
            virtual_size: front.virtual_size,
            ..expected
        })?;
        if crc32fast::hash(table.extent_bytes()) != front.extents_crc {
            return Err(corrupt("the CRC of the extents does not match".into()));
        }
        Ok(table)
    }

    /// The CRC of the table's header, which has those of all else: no other table has it.
    pub(super) fn crc(&self) -> u32 {
        self.crc
    }

    /// Whether segments of changes may follow it.
    pub(super) fn grows(&self) -> bool {
        self.version == GROWING_VERSION
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
mod tests;
