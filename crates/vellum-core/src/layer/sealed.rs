//! A sealed layer: read-only, each block checked against its checksum. format.md, sections 4, 5.

mod digest;
mod heal;
mod seal;

pub use heal::Healer;
pub use seal::seal_in_place;
pub(super) use seal::{remove_what_a_seal_replaces, seal_as_expected};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::data::DataFiles;
use super::files::sync_names;
use super::header::Header;
use super::index::Index;
use super::lazy::{self, Lazy};
use super::live::{self, Left};
use super::recovery::{AsRecovered, load_as_recovered, load_map};
use super::shared::Shared;
use super::table::{DIGEST_LEN, Expected, MapExtent, Table, TableKind, push_extent};
use digest::walk;
use vellum_base::block::{BLOCK_LEN, Block, BlockState, Blocks, Run, Span, part_mut};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, refuses_to_stall};

/// The seal's file name.
pub(super) const SEAL_FILE: &str = "seal";

/// A layer that never changes again.
#[derive(Debug)]
pub struct SealedLayer {
    dir: PathBuf,
    header: Header,
    data: Arc<DataFiles>,
    map: SealedMap,
    /// Blocks may not be here yet.
    lazy: Option<Arc<Lazy>>,
}

#[derive(Debug)]
enum SealedMap {
    /// With checksums.
    Table(Table),
    /// Sealed, but the seal file has not been made yet.
    Pending(Index),
    /// Sealed a moment ago by this process, which has the map in memory.
    Written(Arc<Shared>),
    /// Not sealed, but nobody can write it: recovered in memory.
    Unsealed(AsRecovered),
}

/// What [`SealedLayer::scrub`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Data blocks read.
    pub blocks: Blocks,
    /// Blocks whose bytes do not match their checksum, at most the first 1000.
    pub corrupt: Vec<Block>,
    /// The layer's digest, where every block was fine and it matched.
    pub digest: Option<[u8; DIGEST_LEN]>,
}

impl SealedLayer {
    /// Opens a sealed layer. All of its structure is checked; blocks are as they are read.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a layer that is not sealed; otherwise as
    /// [`Header::decode`]; the message names the file.
    pub fn open(storage: &dyn Storage, dir: &Path) -> Result<Self> {
        let layer = SealedLayer::open_unsynced(storage, dir)?;
        if let SealedMap::Pending(_) = layer.map {
            // Whoever sealed it may have died before that was durable.
            sync_names(storage, dir)?;
        }
        Ok(layer)
    }

    /// Opens a layer that is not sealed for reading alone, in a store that cannot be written: as it
    /// would be after recovery, which is done in memory. Nobody may be writing it.
    ///
    /// # Errors
    /// As [`SealedLayer::open`].
    pub fn open_unsealed(storage: &dyn Storage, dir: &Path) -> Result<Self> {
        let header = Header::read(storage, dir)?;
        if header.sealed {
            return SealedLayer::open(storage, dir);
        }
        let data = DataFiles::open(storage, dir, &header, OpenMode::Read)?;
        let left = live::read_left(storage, dir, &header, &data)?;
        if left == (Left::Stale { reread: true }) {
            data.drop_cache()?;
        }
        let found = load_as_recovered(storage, dir, &header, &left)?;
        Ok(SealedLayer {
            dir: dir.to_owned(),
            header,
            data: Arc::new(data),
            map: SealedMap::Unsealed(found),
            lazy: None,
        })
    }

    /// A layer that this process has just sealed, with the map that it has in memory: nothing is read.
    pub(super) fn written(layer: &Arc<Shared>) -> Self {
        assert!(layer.is_sealed(), "a layer that may still be written");
        SealedLayer {
            dir: layer.dir.clone(),
            header: Header {
                sealed: true,
                ..layer.header()
            },
            data: layer.data.clone(),
            map: SealedMap::Written(layer.clone()),
            lazy: None,
        }
    }

    /// As [`SealedLayer::open`], for one who builds nothing on it.
    pub(super) fn open_unsynced(storage: &dyn Storage, dir: &Path) -> Result<Self> {
        let header = Header::read(storage, dir)?;
        if !header.sealed {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: the layer is not sealed", dir.display()),
            ));
        }
        let data = DataFiles::open(storage, dir, &header, OpenMode::Read)?;
        let expected = Expected {
            kind: TableKind::Seal,
            uuid: header.uuid,
            virtual_size: header.virtual_size,
        };
        let seal = || Table::open(storage, &dir.join(SEAL_FILE), expected);
        let (map, lazy) = match seal()? {
            Some(table) => (SealedMap::Table(table), None),
            None => {
                let pending = load_map(storage, dir, &header);
                let lazy = header.lazy.then(|| Lazy::open(storage, dir, &header));
                // Made meanwhile: then the map, or the journal, may have been gone before we read
                // it, and what we read means nothing.
                match seal()? {
                    Some(table) => (SealedMap::Table(table), None),
                    None => (SealedMap::Pending(pending?), lazy.transpose()?),
                }
            }
        };
        Ok(SealedLayer {
            dir: dir.to_owned(),
            header,
            data: Arc::new(data),
            map,
            lazy,
        })
    }

    /// Identity, parent and size.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The layer's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// True when the layer has checksums and a digest.
    pub fn is_checksummed(&self) -> bool {
        matches!(self.map, SealedMap::Table(_))
    }

    /// True for a layer of which blocks may be somewhere else.
    pub fn is_lazy(&self) -> bool {
        self.lazy.is_some()
    }

    /// The digest over the layer's content, `None` until it has been made.
    pub fn digest(&self) -> Option<[u8; DIGEST_LEN]> {
        match &self.map {
            SealedMap::Table(table) => Some(table.digest),
            SealedMap::Pending(_) | SealedMap::Written(_) | SealedMap::Unsealed(_) => None,
        }
    }

    /// The run at the front of `span`, of a layer that has its map in memory, as one that was just sealed
    /// has; otherwise `None`.
    pub(crate) fn first_run(&self, span: Span) -> Option<Run<BlockState>> {
        match &self.map {
            SealedMap::Table(_) => None,
            SealedMap::Written(layer) => Some(layer.map.read().index().first_run(span)),
            SealedMap::Pending(index) | SealedMap::Unsealed(AsRecovered { index, .. }) => {
                Some(index.first_run(span))
            }
        }
    }

    /// Calls `each` with every run of blocks that the layer says something of, in order. Neighbours
    /// may be of one state.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where something changed the seal since the layer was opened; the
    /// message names the file.
    pub fn for_each_run(&self, mut each: impl FnMut(Run<BlockState>)) -> Result<()> {
        match &self.map {
            SealedMap::Table(table) => {
                for run in table.extents() {
                    each(run.context(|| self.dir.join(SEAL_FILE).display().to_string())?);
                }
            }
            SealedMap::Written(layer) => layer.map.read().index().iter().for_each(each),
            SealedMap::Pending(index) | SealedMap::Unsealed(AsRecovered { index, .. }) => {
                index.iter().for_each(each);
            }
        }
        Ok(())
    }

    /// Data blocks that the layer holds.
    pub fn data_blocks(&self) -> Blocks {
        match &self.map {
            SealedMap::Table(table) => table.sum_count(),
            SealedMap::Written(layer) => layer.map.read().data_blocks(),
            SealedMap::Pending(index) | SealedMap::Unsealed(AsRecovered { index, .. }) => {
                super::recovery::data_blocks(index)
            }
        }
    }

    /// Bytes that the data files take on the host.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.data.allocated()
    }

    /// Reads whole blocks from `start`, all of them data in one extent, and checks each. Waits for those of a lazy
    /// layer that are not here, and for those that the disk lost or changed where somebody can bring them again.
    ///
    /// # Errors
    /// [`ErrorKind::Absent`] for blocks that cannot be had.
    /// [`ErrorKind::Corrupt`] where a block does not match its checksum: it names layer and block.
    pub fn read_blocks(&self, buf: &mut [u8], start: Block) -> Result<()> {
        let span = Span::of_buffer(start, buf);
        let mut brought = false;
        loop {
            let epoch = self.epoch()?;
            if let Some(lazy) = &self.lazy
                && let Some(windows) = lazy.missing(span)
            {
                lazy::want(lazy, windows)?;
            }
            let read = self.read_here(buf, span);
            if self.epoch()? != epoch {
                // Some of these blocks may have been evicted before they were read.
                continue;
            }
            match read {
                // Who may not wait, as for what is not in the page cache, leaves it to one who may.
                Err(damage)
                    if !brought
                        && self.tells_damage()
                        && is_damage(&damage)
                        && !refuses_to_stall() =>
                {
                    lazy::heal(&self.dir, span, damage)?;
                    brought = true;
                }
                other => {
                    if let Some(lazy) = &self.lazy {
                        lazy.note_read(span);
                    }
                    return other;
                }
            }
        }
    }

    /// See [`Lazy::epoch`]. Of other layers nothing is evicted.
    fn epoch(&self) -> Result<u64> {
        self.lazy.as_ref().map_or(Ok(0), |lazy| lazy.epoch())
    }

    /// Whether blocks have checksums, by which it is found what the disk lost or changed: those of a layer that is not whole
    /// too, as far as they are here.
    pub fn tells_damage(&self) -> bool {
        self.is_checksummed() || self.lazy.as_ref().is_some_and(|lazy| lazy.is_checked())
    }

    /// Reads what the host has, and checks it.
    fn read_here(&self, buf: &mut [u8], span: Span) -> Result<()> {
        self.data.read(buf, span.start().offset())?;
        let advice = match &self.map {
            SealedMap::Table(_) => "restore the layer from its image",
            _ => "it has to be fetched again",
        };
        match self.first_wrong(buf, span)? {
            None => Ok(()),
            Some(block) => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: block {block} does not match its checksum: the disk lost or changed it; {advice}",
                    self.dir.display(),
                ),
            )),
        }
    }

    /// The first of these blocks that does not match its checksum. Puts what is in a journal in its place.
    fn first_wrong(&self, buf: &mut [u8], span: Span) -> Result<Option<Block>> {
        let table = match &self.map {
            SealedMap::Table(table) => table,
            SealedMap::Pending(_) => {
                let lazy = self.lazy.as_ref();
                return lazy.map_or(Ok(None), |lazy| lazy.first_wrong(span, buf));
            }
            SealedMap::Written(_) => return Ok(None),
            SealedMap::Unsealed(found) => {
                found.fill(buf, span);
                return Ok(None);
            }
        };
        let sums = table
            .sums(span)
            .context(|| self.dir.join(SEAL_FILE).display().to_string())?;
        let mut both = span.blocks().zip(buf.chunks_exact(BLOCK_LEN).zip(sums));
        let wrong = both.find(|(_, (bytes, sum))| crc32fast::hash(bytes) != *sum);
        Ok(wrong.map(|(block, _)| block))
    }

    /// A hint that blocks will be read soon.
    ///
    /// # Errors
    /// When the range lies outside the layer.
    pub fn prefetch(&self, span: Span) -> Result<()> {
        match &self.lazy {
            Some(lazy) if lazy.missing(span).is_some() => Ok(()),
            _ => self.data.prefetch(span),
        }
    }

    /// Reads every block and checks the checksums, their own CRC and the digest; of a lazy layer those that are
    /// here. `progress` is called with the number of blocks just read.
    ///
    /// # Errors
    /// Where a file cannot be read; corrupt blocks are in the report instead.
    pub fn scrub(&self, mut progress: impl FnMut(Blocks)) -> Result<ScrubReport> {
        let mut report = ScrubReport::default();
        if let SealedMap::Table(table) = &self.map {
            table
                .check_sums_crc()
                .context(|| self.dir.join(SEAL_FILE).display().to_string())?;
        }
        let found = walk(
            &self.header,
            &self.data,
            &self.extents_here()?,
            |span, bytes| {
                let mut sums = match &self.map {
                    SealedMap::Table(table) => Some(table.sums(span)?),
                    SealedMap::Pending(_) | SealedMap::Written(_) | SealedMap::Unsealed(_) => None,
                };
                for (block, bytes) in span.blocks().zip(bytes.chunks_exact(BLOCK_LEN)) {
                    let wrong = match (&mut sums, &self.lazy) {
                        (Some(sums), _) => {
                            sums.next().is_some_and(|sum| crc32fast::hash(bytes) != sum)
                        }
                        (None, Some(lazy)) => lazy.first_wrong(Span::of(block), bytes)?.is_some(),
                        (None, None) => false,
                    };
                    // Of one that was evicted before it was read nothing is known.
                    if wrong
                        && report.corrupt.len() < 1000
                        && (!self.is_lazy() || self.is_damaged(block)?)
                    {
                        report.corrupt.push(block);
                    }
                }
                report.blocks += span.len();
                progress(span.len());
                Ok(())
            },
        )?;
        if report.corrupt.is_empty() {
            match self.digest() {
                Some(stated) if stated != found => {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "{}: every block matches its checksum, but the digest does not",
                            self.dir.join(SEAL_FILE).display()
                        ),
                    ));
                }
                stated => report.digest = stated,
            }
        }
        Ok(report)
    }

    /// Whether a data block of a lazy layer is here, and damaged.
    fn is_damaged(&self, block: Block) -> Result<bool> {
        let span = Span::of(block);
        let mut bytes = [0; BLOCK_LEN];
        loop {
            let epoch = self.epoch()?;
            let is_here = |lazy: &Arc<Lazy>| lazy.missing(span).is_none();
            if !self.lazy.as_ref().is_some_and(is_here) {
                return Ok(false);
            }
            let damaged = self.read_here(&mut bytes, span).is_err();
            if self.epoch()? == epoch {
                return Ok(damaged);
            }
        }
    }

    /// The extents, without the data blocks that are not here.
    fn extents_here(&self) -> Result<Vec<MapExtent>> {
        let mut extents = Vec::new();
        self.for_each_run(|run| match &self.lazy {
            Some(lazy) if run.value == BlockState::Data => {
                let mut rest = run.span;
                while !rest.is_empty() {
                    let window = lazy.power().span(lazy.power().window_of(rest.start()));
                    let piece = Span::between(rest.start(), rest.end().min(window.end()));
                    if lazy.missing(piece).is_none() {
                        push_extent(&mut extents, Run::new(piece, BlockState::Data));
                    }
                    rest = rest.from(piece.end());
                }
            }
            _ => push_extent(&mut extents, run),
        })?;
        Ok(extents)
    }
}

/// True where a read says that the disk lost or changed blocks.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io)
}

impl AsRecovered {
    /// Puts the bytes of blocks that are in the journal in the place of what the data files hold.
    fn fill(&self, buf: &mut [u8], span: Span) {
        for (block, bytes) in self.blocks.range(span.start()..span.end()) {
            let at = (*block - span.start()).buffer_len();
            part_mut(buf, at, BLOCK_LEN).copy_from_slice(bytes);
        }
    }
}
