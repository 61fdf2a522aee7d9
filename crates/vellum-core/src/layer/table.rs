//! The map on disk as a table of extents: the files `map` and `seal`. format.md, section 3.1.

use std::fmt;
use std::path::Path;

use uuid::Uuid;

use super::codec::{Reader, Writer, check_crc};
use vellum_base::block::{
    Block, BlockState, Blocks, Run, Span, in_memory, part, part_mut, u32_at, u64_at,
};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Mapping, OpenMode, Storage};

const MAGIC: &[u8; 8] = b"VELLUMMP";
/// Of a seal, and of a checkpoint that an older build made: nothing follows it.
const VERSION: u32 = 1;
/// Of a checkpoint that segments of changes may follow.
const GROWING_VERSION: u32 = 2;
const HEADER_LEN: usize = 4096;
/// Where its own CRC is in the header.
const CRC_AT: usize = HEADER_LEN - 4;
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

impl TableKind {
    /// The number that stands for it in a file.
    fn code(self) -> u32 {
        self as u32
    }
}

/// Bytes of a checkpoint of so many extents.
pub(super) fn checkpoint_len(extents: u64) -> u64 {
    (HEADER_LEN as u64 + extents * EXTENT_LEN as u64).next_multiple_of(HEADER_LEN as u64)
}

/// Bytes of the table whose first bytes these are in a file of `len`: what follows a checkpoint is
/// not part of it.
pub(super) fn table_len(front: &[u8; HEADER_LEN], len: u64) -> u64 {
    let (version, kind, extents) = (u32_at(front, 8), u32_at(front, 12), u64_at(front, 48));
    if (version, kind) == (GROWING_VERSION, TableKind::Checkpoint.code())
        && extents <= len / EXTENT_LEN as u64
    {
        checkpoint_len(extents).min(len)
    } else {
        len
    }
}

/// A run of blocks of one state as the files of a layer have it: 16 bytes, in memory too, where there
/// may be millions of them. Read from a file it may be any, until [`MapExtent::fits`] says that it is
/// one of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapExtent {
    start: Block,
    /// Blocks, not 0.
    len: u32,
    state: BlockState,
}

impl MapExtent {
    /// Its bytes in a file.
    pub(super) const LEN: usize = 16;

    /// Takes one from a file.
    pub(super) fn read(input: &mut Reader<'_>) -> Result<Self> {
        Ok(MapExtent {
            start: Block::new(input.u64()?),
            len: input.u32()?,
            state: BlockState::of_code(input.u32()?)?,
        })
    }

    /// As it lies in a file.
    pub(super) fn bytes(self) -> [u8; MapExtent::LEN] {
        let mut out = [0; MapExtent::LEN];
        let (start, rest) = out.split_at_mut(8);
        let (len, state) = rest.split_at_mut(4);
        start.copy_from_slice(&self.start.get().to_le_bytes());
        len.copy_from_slice(&self.len.to_le_bytes());
        state.copy_from_slice(&self.state.code().to_le_bytes());
        out
    }

    /// Adds it to a file.
    pub(super) fn write(self, out: &mut Writer) {
        out.bytes(&self.bytes());
    }

    /// Whether it has blocks, and all of them within the first `blocks`.
    pub(super) fn fits(self, blocks: Blocks) -> bool {
        let span = Span::checked(self.start, self.len.into());
        self.len > 0 && span.is_some_and(|span| Span::up_to(blocks).contains(span))
    }

    pub(super) fn start(self) -> Block {
        self.start
    }

    /// The blocks, of one that fits.
    pub(super) fn span(self) -> Span {
        Span::new(self.start, self.len.into())
    }

    pub(super) fn state(self) -> BlockState {
        self.state
    }

    /// The same in memory.
    pub(super) fn run(self) -> Run<BlockState> {
        Run::new(self.span(), self.state)
    }
}

/// As messages have one that may not fit.
impl fmt::Display for MapExtent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} blocks from {} in state {:?}",
            self.len, self.start, self.state
        )
    }
}

/// Cuts a run into extents that a file can hold.
pub(super) fn push_extent(extents: &mut Vec<MapExtent>, run: Run<BlockState>) {
    extents.extend(run.span.pieces(u32::MAX.into()).map(|piece| {
        #[expect(clippy::cast_possible_truncation, reason = "pieces are no longer")]
        let len = piece.len().get() as u32;
        MapExtent {
            start: piece.start(),
            len,
            state: run.value,
        }
    }));
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
        let mut next_sum = 0u64;
        for extent in self.extents {
            extent.write(&mut out);
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
        header.u32(self.kind.code());
        header.bytes(self.uuid.as_bytes());
        header.u64(self.generation);
        header.u64(self.virtual_size);
        header.u64(self.extents.len() as u64);
        header.u64(self.sums.len() as u64);
        header.bytes(&self.digest);
        header.u32(extents_crc);
        header.u32(sums_crc);
        header.pad_to(CRC_AT);
        header.crc();
        let mut bytes = out.into_bytes();
        part_mut(&mut bytes, 0, HEADER_LEN).copy_from_slice(&header.into_bytes());
        bytes
    }
}

/// The block behind an extent as it lies on disk. More than 64 bits, where something changed the file
/// since it was checked.
fn extent_end(extent: &[u8; EXTENT_LEN]) -> u128 {
    u128::from(u64_at(extent, 0)) + u128::from(u32_at(extent, 8))
}

fn sums_offset(extents: usize) -> usize {
    (HEADER_LEN + extents * EXTENT_LEN).next_multiple_of(HEADER_LEN)
}

/// A seal of up to so many bytes is read into memory, extents and checksums close together: of a chain of a
/// thousand layers each read would wait for a page or two of its own of each seal.
const SMALL: u64 = 32 << 10;

/// A table that was read and checked. Extents and checksums of a large one stay in the page cache.
#[derive(Debug)]
pub(super) struct Table {
    bytes: Mapping,
    /// Where the extents are in `bytes`.
    extents_at: usize,
    /// Where the checksums are in `bytes`.
    sums_at: usize,
    /// Of the device that it is for.
    blocks: Blocks,
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
            crc: u32_at(header, CRC_AT),
        };
        front.digest.copy_from_slice(input.take(DIGEST_LEN)?);
        front.extents_crc = input.u32()?;
        front.sums_crc = input.u32()?;
        Ok(front)
    }

    /// Whether it is of the table that is wanted.
    fn check(&self, expected: Expected) -> Result<()> {
        let corrupt = |what: String| Err(Error::new(ErrorKind::Corrupt, what));
        let newest = if self.kind == TableKind::Checkpoint.code() {
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
        if self.kind != expected.kind.code() {
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
        let named = || path.display().to_string();
        let unreadable = || format!("cannot read {}", named());
        let len = file.len().context(unreadable)?;
        if len > SMALL {
            let bytes = file.map(0, in_memory(len)).context(unreadable)?;
            return Table::decode(bytes, expected).map(Some).context(named);
        }
        let mut bytes = vec![0; in_memory(len)];
        file.read_at(&mut bytes, 0).context(unreadable)?;
        let table = Table::decode(Mapping::Owned(bytes), expected).context(named)?;
        Ok(Some(table.compact()))
    }

    /// The same without what is in front of the extents and between them and the checksums.
    fn compact(self) -> Self {
        let bytes = [self.extent_bytes(), self.sum_bytes()].concat();
        Table {
            bytes: Mapping::Owned(bytes),
            extents_at: 0,
            sums_at: self.extents * EXTENT_LEN,
            ..self
        }
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
        let blocks = Blocks::whole_in(front.virtual_size).get();
        let (extents, sums) = (front.extents, front.sums);
        if extents > (len / EXTENT_LEN as u64).min(blocks) || sums > (len / 4).min(blocks) {
            return Err(corrupt(format!(
                "{extents} extents and {sums} checksums in {len} bytes"
            )));
        }
        let (extents, sums) = (in_memory(extents), in_memory(sums));
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
            extents_at: HEADER_LEN,
            sums_at: sums_offset(extents),
            blocks: Blocks::whole_in(front.virtual_size),
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
        table.check_extents(expected.kind)?;
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
        let len = self.extents * EXTENT_LEN;
        part(self.bytes.as_ref(), self.extents_at, len)
    }

    fn sum_bytes(&self) -> &[u8] {
        part(self.bytes.as_ref(), self.sums_at, self.sums * 4)
    }

    /// The extent at `at`, of those that there are, with the index of its first checksum.
    fn extent(&self, at: usize) -> Result<(MapExtent, u64)> {
        let mut input = Reader::new(part(self.extent_bytes(), at * EXTENT_LEN, EXTENT_LEN));
        let extent = MapExtent::read(&mut input)?;
        Ok((extent, input.u64()?))
    }

    /// All extents, in order.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where something changed the file since it was checked.
    pub(super) fn extents(&self) -> impl Iterator<Item = Result<Run<BlockState>>> + '_ {
        (0..self.extents).map(|at| {
            let (extent, _) = self.extent(at)?;
            if extent.fits(self.blocks) {
                Ok(extent.run())
            } else {
                Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("extent {at} changed since the layer was opened: {extent}"),
                ))
            }
        })
    }

    fn check_extents(&self, kind: TableKind) -> Result<()> {
        let blocks = self.blocks;
        let mut end = Block::FIRST;
        let mut next_sum = 0;
        for at in 0..self.extents {
            let (extent, first_sum) = self.extent(at)?;
            let fits = extent.fits(blocks) && extent.start >= end;
            if !fits || extent.state == BlockState::Parent {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("extent {at} is impossible: {extent} after block {end} of {blocks}"),
                ));
            }
            end = extent.span().end();
            if kind == TableKind::Seal && extent.state == BlockState::Data {
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

    /// The checksums of data blocks, at least one, which lie in one extent.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the table does not have them all.
    pub(super) fn sums(&self, span: Span) -> Result<impl Iterator<Item = u32> + '_> {
        // Every read comes through here: the search looks at what it needs and at nothing else.
        let (extents, _) = self.extent_bytes().as_chunks::<EXTENT_LEN>();
        let before = u128::from(span.start().get());
        let low = extents.partition_point(|extent| extent_end(extent) <= before);
        let missing = || {
            let block = span.start();
            Error::new(ErrorKind::Corrupt, format!("no checksum for block {block}"))
        };
        if low >= self.extents {
            return Err(missing());
        }
        let (extent, first_sum) = self.extent(low)?;
        let held = extent.fits(self.blocks) && extent.span().contains(span);
        if !held || extent.state != BlockState::Data {
            return Err(missing());
        }
        // Beyond all sums where something changed the file: then there is none.
        let within = (span.start() - extent.start).get();
        let first = first_sum.checked_add(within).ok_or_else(missing)?;
        let (sums, _) = self.sum_bytes().as_chunks::<4>();
        let len = in_memory(span.len().get());
        let sums = sums
            .get(in_memory(first)..)
            .and_then(|sums| sums.get(..len));
        let sums = sums.ok_or_else(missing)?;
        Ok(sums.iter().map(|sum| u32::from_le_bytes(*sum)))
    }

    /// Number of data blocks that have a checksum.
    pub(super) fn sum_count(&self) -> Blocks {
        Blocks::new(self.sums as u64)
    }
}

#[cfg(test)]
mod tests;
