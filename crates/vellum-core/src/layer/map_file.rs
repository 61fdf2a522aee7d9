//! The file `map` of a writable layer: a table of all extents, and behind it segments that say what
//! changed since. format.md, section 3.1.1.

use std::path::Path;

use uuid::Uuid;

use super::codec::{Reader, Writer, count, crc_around};
use super::header::Header;
use super::index::net_runs;
use super::table::{Expected, MapExtent, Table, TableContent, TableKind, push_extent, table_len};
use vellum_base::block::{Block, Blocks, in_memory, part_from, part_mut, u32_at};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, StorageFile};

/// The file's name.
pub(super) const MAP_FILE: &str = "map";

const MAGIC: &[u8; 8] = b"VELLUMMC";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
const CRC_AT: usize = 60;
/// Segments begin and end at multiples of this.
const ALIGN: usize = 4096;
/// The longest segment: a bound for what a reader allocates.
pub(super) const MAX_SEGMENT: u64 = 16 << 20;

/// Where the next segment goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogPlace {
    /// Of the table's header: no other table has it.
    table_crc: u32,
    table_len: u64,
    end: u64,
    /// Segments before.
    sequence: u64,
}

impl LogPlace {
    /// Behind a table without segments.
    fn behind(table_crc: u32, table_len: u64) -> Self {
        LogPlace {
            table_crc,
            table_len,
            end: table_len,
            sequence: 0,
        }
    }

    /// Whether a segment of so many changes may be added, where `least` bytes of segments always
    /// may: otherwise a new table costs less in the long run.
    pub(super) fn has_room(&self, changes: usize, least: u64) -> bool {
        let len = segment_len(changes) as u64;
        let used = self.end - self.table_len;
        len <= MAX_SEGMENT && used + len <= least.max(self.table_len / 2)
    }

    /// The place behind a segment of `len` bytes here.
    fn next(&self, len: u64) -> Self {
        LogPlace {
            end: self.end + len,
            sequence: self.sequence + 1,
            ..*self
        }
    }
}

fn segment_len(changes: usize) -> usize {
    (HEADER_LEN + changes * MapExtent::LEN).next_multiple_of(ALIGN)
}

/// What changes in the order of time come to: each block once, in order.
pub(super) fn net(changes: Vec<MapExtent>) -> Vec<MapExtent> {
    let mut ordered = changes.clone();
    ordered.sort_unstable_by_key(|change| change.start());
    // First writes to blocks, as most are, touch each block once.
    if ordered.is_sorted_by(|change, next| change.span().end() <= next.start()) {
        return ordered;
    }
    let mut out = Vec::new();
    for run in net_runs(changes.into_iter().map(MapExtent::run)) {
        push_extent(&mut out, run);
    }
    out
}

/// A segment as it lies on disk.
fn encode_segment(place: &LogPlace, uuid: Uuid, generation: u64, changes: &[MapExtent]) -> Vec<u8> {
    let len = segment_len(changes.len());
    let mut out = Writer::with_capacity(len);
    out.bytes(MAGIC);
    out.u32(VERSION);
    out.u32(0);
    out.bytes(uuid.as_bytes());
    out.u64(generation);
    out.u64(place.sequence);
    out.u32(place.table_crc);
    out.u32(count(changes.len()));
    out.u32(count(len));
    out.u32(0);
    changes.iter().for_each(|change| change.write(&mut out));
    out.pad_to(len);
    let mut bytes = out.into_bytes();
    let crc = crc32fast::hash(&bytes);
    part_mut(&mut bytes, CRC_AT, 4).copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A segment as it was read.
#[derive(Debug)]
struct Segment {
    generation: u64,
    sequence: u64,
    /// As they lie on disk; or what is wrong with one.
    changes: Result<Vec<MapExtent>>,
    len: u64,
}

/// The length that the segment at the front of `bytes` claims to have: `None` where there is none.
fn claimed_len(bytes: &[u8]) -> Option<usize> {
    if bytes.get(..8)? != MAGIC {
        return None;
    }
    let mut input = Reader::new(bytes.get(56..)?);
    let len = input.u32().ok()? as usize;
    (len >= ALIGN && len as u64 <= MAX_SEGMENT && len.is_multiple_of(ALIGN)).then_some(len)
}

/// Reads the segment at the front of `bytes`: `None` where there is no whole one of that layer and
/// table.
fn decode_segment(bytes: &[u8], uuid: Uuid, table_crc: u32) -> Option<Segment> {
    let bytes = bytes.get(..claimed_len(bytes)?)?;
    let read = || -> Result<Option<Segment>> {
        let mut input = Reader::new(bytes);
        input.skip(8)?;
        let version = input.u32()?;
        input.skip(4)?;
        let owner = input.uuid()?;
        let (generation, sequence) = (input.u64()?, input.u64()?);
        let table = input.u32()?;
        let count = input.u32()? as usize;
        input.skip(4)?;
        let crc = input.u32()?;
        let fits = count <= bytes.len() / MapExtent::LEN && segment_len(count) == bytes.len();
        if version != VERSION || owner != uuid || table != table_crc || !fits {
            return Ok(None);
        }
        if crc_around(bytes, CRC_AT) != crc {
            return Ok(None);
        }
        Ok(Some(Segment {
            generation,
            sequence,
            changes: (0..count).map(|_| MapExtent::read(&mut input)).collect(),
            len: bytes.len() as u64,
        }))
    };
    read().ok().flatten()
}

/// What the file says.
#[derive(Debug, Default)]
pub(super) struct MapFile {
    /// `None`: there is no file.
    pub(super) table: Option<Table>,
    /// Changes since the table was made, in order.
    pub(super) changes: Vec<MapExtent>,
    /// Journal records up to and with this generation are contained.
    pub(super) generation: u64,
    /// Where the next segment goes; `None`: nothing can be added.
    pub(super) place: Option<LogPlace>,
    /// What follows is no segment.
    pub(super) torn: bool,
}

impl MapFile {
    /// Reads and checks the file of the layer in `dir`. Errors name it.
    pub(super) fn read(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Self> {
        let path = dir.join(MAP_FILE);
        let file = match storage.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(MapFile::default());
            }
            other => other.context(|| format!("cannot open {}", path.display()))?,
        };
        MapFile::read_from(&*file, header).context(|| path.display().to_string())
    }

    fn read_from(file: &dyn StorageFile, header: &Header) -> Result<Self> {
        let len = file.len().context(|| "cannot read the map")?;
        let mut front = [0; ALIGN];
        file.read_at(&mut front, 0)
            .context(|| "cannot read the map")?;
        let table_len = table_len(&front, len);
        let expected = Expected {
            kind: TableKind::Checkpoint,
            uuid: header.uuid,
            virtual_size: header.virtual_size,
        };
        let table = file
            .map(0, in_memory(table_len))
            .context(|| "cannot read the map")?;
        let table = Table::decode(table, expected)?;
        let mut map = MapFile {
            generation: table.generation,
            place: table
                .grows()
                .then(|| LogPlace::behind(table.crc(), table_len)),
            table: Some(table),
            ..MapFile::default()
        };
        map.read_segments(file, len, header)?;
        Ok(map)
    }

    fn read_segments(&mut self, file: &dyn StorageFile, len: u64, header: &Header) -> Result<()> {
        let Some(mut place) = self.place else {
            return Ok(());
        };
        while place.end < len {
            let bytes = read_claimed(file, place.end, len)?;
            let segment = decode_segment(&bytes, header.uuid, place.table_crc)
                .filter(|segment| segment.sequence == place.sequence)
                .filter(|segment| segment.generation > self.generation);
            let Some(segment) = segment else {
                self.torn = true;
                self.place = None;
                return self.check_torn_end(file, &place, len, header.uuid);
            };
            place = place.next(segment.len);
            self.add(segment, header.blocks())?;
        }
        self.place = Some(place);
        Ok(())
    }

    fn add(&mut self, segment: Segment, blocks: Blocks) -> Result<()> {
        let what = || format!("segment {}", segment.sequence);
        let mut before = Block::FIRST;
        for change in segment.changes.context(what)? {
            if !change.fits(blocks) || change.start() < before {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "{} says of blocks that they changed where none can be: {change}, after \
                         block {before} of {blocks}",
                        what()
                    ),
                ));
            }
            before = change.span().end();
            self.changes.push(change);
        }
        self.generation = segment.generation;
        Ok(())
    }

    /// One segment may have been cut off while it was written, and nothing was written behind it.
    fn check_torn_end(
        &self,
        file: &dyn StorageFile,
        place: &LogPlace,
        len: u64,
        uuid: Uuid,
    ) -> Result<()> {
        let damaged = |what: &str| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the map is damaged: at byte {} there is no segment {}, but {what}",
                    place.end, place.sequence
                ),
            )
        };
        let rest = len - place.end;
        if rest > MAX_SEGMENT {
            return Err(damaged(&format!("{rest} bytes follow")));
        }
        let mut bytes = vec![0; in_memory(rest)];
        file.read_at(&mut bytes, place.end)
            .context(|| "cannot read the map")?;
        let follows = (0..bytes.len())
            .step_by(ALIGN)
            .any(|at| decode_segment(part_from(&bytes, at), uuid, place.table_crc).is_some());
        if follows {
            return Err(damaged("another one follows"));
        }
        Ok(())
    }
}

/// The bytes that the segment at `at` claims, as far as the file has them.
fn read_claimed(file: &dyn StorageFile, at: u64, len: u64) -> Result<Vec<u8>> {
    let rest = in_memory((len - at).min(MAX_SEGMENT));
    let mut bytes = vec![0; rest.min(ALIGN)];
    file.read_at(&mut bytes, at)
        .context(|| "cannot read the map")?;
    if let Some(claimed) = claimed_len(&bytes)
        && claimed > bytes.len()
    {
        bytes = vec![0; claimed.min(rest)];
        file.read_at(&mut bytes, at)
            .context(|| "cannot read the map")?;
    }
    Ok(bytes)
}

/// Replaces the file by a table, durably. Returns where changes to it go.
pub(super) fn replace_map(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    generation: u64,
    extents: &[MapExtent],
) -> Result<LogPlace> {
    let content = TableContent {
        kind: TableKind::Checkpoint,
        uuid: header.uuid,
        generation,
        virtual_size: header.virtual_size,
        extents,
        sums: &[],
        digest: Default::default(),
    };
    let bytes = content.encode();
    let path = dir.join(MAP_FILE);
    storage
        .write_atomic(&path, &bytes)
        .context(|| format!("cannot write the map {}", path.display()))?;
    let crc = u32_at(&bytes, ALIGN - 4);
    Ok(LogPlace::behind(crc, bytes.len() as u64))
}

/// A segment that could not be added.
#[derive(Debug)]
pub(super) struct NotAdded {
    pub(super) error: Error,
    /// It may be found in the page cache, clean, although the disk does not have it.
    pub(super) unsure: bool,
}

/// Adds a segment of net changes, durably. Returns its length and where the next one goes.
pub(super) fn add_segment(
    storage: &dyn Storage,
    dir: &Path,
    place: &LogPlace,
    header: &Header,
    generation: u64,
    changes: &[MapExtent],
) -> std::result::Result<(u64, LogPlace), NotAdded> {
    let bytes = encode_segment(place, header.uuid, generation, changes);
    let len = bytes.len() as u64;
    let path = dir.join(MAP_FILE);
    let failed = |error, unsure| NotAdded {
        error: Error::io(format!("cannot add to the map {}", path.display()), error),
        unsure,
    };
    let file = storage
        .open(&path, OpenMode::Write)
        .map_err(|error| failed(error, false))?;
    // What is left of it takes space. Not cut off: another process may be reading it.
    let punch = || file.punch_hole(place.end, len);
    file.write_at(&bytes, place.end).map_err(|error| {
        let _ = punch();
        failed(error, false)
    })?;
    file.sync_data()
        .map_err(|error| failed(error, punch().is_err()))?;
    Ok((len, place.next(len)))
}

/// Makes the file durable as it is read now: whoever wrote it may have died before it was.
pub(super) fn sync_map(storage: &dyn Storage, dir: &Path) -> Result<()> {
    with_file(storage, dir, |file| file.sync_data())
}

/// Has the file read from the disk, where a sync failed before: memory may show what it does not
/// have.
pub(super) fn drop_map_cache(storage: &dyn Storage, dir: &Path) -> Result<()> {
    with_file(storage, dir, |file| {
        file.sync_data()?;
        file.drop_cache()
    })
}

fn with_file(
    storage: &dyn Storage,
    dir: &Path,
    work: impl FnOnce(&dyn StorageFile) -> std::io::Result<()>,
) -> Result<()> {
    let path = dir.join(MAP_FILE);
    match storage.open(&path, OpenMode::Write) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other
            .and_then(|file| work(&*file))
            .context(|| format!("cannot sync {}", path.display())),
    }
}

#[cfg(test)]
mod tests;
