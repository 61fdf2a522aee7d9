//! Map changes that clients were told of and no flush has made durable yet, in memory that
//! outlives the process: a killed server's successor must know them, since the file system above
//! goes on and takes its writes for done. format.md, section 6.
//!
//! The file is shared memory, not storage: it counts only where it is proved that the page cache is
//! what it was ([`bond`]).

mod bond;

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use self::bond::Bond;
use super::codec::{Reader, Writer, check_crc};
use super::data::DataFiles;
use super::files::remove_if_there;
use super::header::Header;
use super::index::Index;
use vellum_base::block::{Block, BlockState, Blocks, Run, Span, in_memory, part, part_mut};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, SharedFile, Storage, StorageFile};

/// The file's name within the layer's directory.
pub(super) const LIVE_FILE: &str = "live";
const LIVE_TMP: &str = "live.tmp";

const MAGIC: &[u8; 8] = b"VELLUMLV";
const VERSION: u32 = 2;
const HEADER_LEN: u64 = 4096;
/// Length of the part of the header that says whose it is.
const IDENTITY_LEN: usize = 56;
/// Where the layer's and the boot's ids are in it, in every version.
const UUID_AT: usize = 16;
const BOOT_AT: usize = 32;
/// Where the two regions' epochs are, and the poison mark.
const EPOCHS_AT: [u64; 2] = [64, 80];
const POISON_AT: u64 = 96;
const ENTRY_LEN: usize = 32;
/// Of an entry's second number: below them is the length, above them what it says.
const LEN_BITS: u32 = 48;
/// Entries of a region.
const CAPACITY: u64 = 256 << 10;
/// More changes than these between two flushes are refused. Unit tests fill it all the time.
const LIMIT: u64 = if cfg!(test) { 24 } else { CAPACITY };
/// From here on a flush is due.
const SOFT_LIMIT: u64 = LIMIT / 4;
/// Changes of the map that one request makes at most between two calls of
/// [`super::WritableLayer::lock_blocks`], so that several at once find room in the log.
pub const CHANGES_AT_ONCE: u64 = LIMIT / 8;
const REGION_LEN: u64 = CAPACITY * ENTRY_LEN as u64;
/// Bytes of each region that have their space from the start.
const AT_LEAST: u64 = 64 << 10;
/// Length of the file.
const FILE_LEN: u64 = HEADER_LEN + 2 * REGION_LEN;

/// A change as it was logged.
pub(super) type LiveChange = Run<Noted>;

/// What an entry says of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noted {
    /// They get this state. Data was written before that was said.
    Becomes(BlockState),
    /// They become data that was reserved and not written: zeros, where the file may have a hole.
    Reserved,
    /// Those that are data are about to be made zeros: the file may have holes there.
    Emptied,
}

impl Noted {
    /// The state that the blocks get; `None`: they keep theirs.
    pub(super) fn state(self) -> Option<BlockState> {
        match self {
            Noted::Becomes(state) => Some(state),
            Noted::Reserved => Some(BlockState::Data),
            Noted::Emptied => None,
        }
    }

    /// As it is written: the log says more than states, so its numbers are its own.
    fn code(self) -> u64 {
        match self {
            Noted::Becomes(BlockState::Parent) => 0,
            Noted::Becomes(BlockState::Data) => 2,
            Noted::Becomes(BlockState::Zero) => 3,
            Noted::Reserved => 4,
            Noted::Emptied => 5,
        }
    }

    fn of(code: u64) -> Option<Noted> {
        Some(match code {
            0 => Noted::Becomes(BlockState::Parent),
            2 => Noted::Becomes(BlockState::Data),
            3 => Noted::Becomes(BlockState::Zero),
            4 => Noted::Reserved,
            5 => Noted::Emptied,
            _ => return None,
        })
    }
}

/// The file of a log, shared with whoever poisons the layer without having its map.
type LogFile = Arc<Mutex<Box<dyn SharedFile>>>;

/// The log of a layer that is open.
#[derive(Debug)]
pub(super) struct Live {
    file: LogFile,
    regions: [Region; 2],
    /// Where changes go now.
    current: usize,
    /// The host had no space for more entries: a flush makes room.
    refused: bool,
}

/// One of the two parts of a log.
#[derive(Debug)]
struct Region {
    /// Entries in it.
    used: u64,
    epoch: u64,
}

/// Marks a log as one of a layer that is poisoned.
#[derive(Debug, Clone)]
pub(super) struct PoisonMark(LogFile);

impl PoisonMark {
    /// Tells whoever opens the layer next in this boot.
    pub(super) fn set(&self) {
        // If even that fails, the next to open it meets the host's error itself.
        let _ = self.0.lock().write(POISON_AT, &1u32.to_le_bytes());
    }
}

/// What a process left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// No log: the layer was closed in order, or never written.
    Nothing,
    /// A log that is not to be trusted: the layer is recovered from its journal, as after a reboot.
    Stale {
        /// The page cache may hold what is not on the disk: it is to be read afresh.
        reread: bool,
    },
    /// The page cache holds everything that was written, so no block may be replayed over it. The
    /// changes since the last flush, in order.
    Trusted(Vec<LiveChange>),
}

fn identity(uuid: Uuid, boot: [u8; 16]) -> Vec<u8> {
    let mut out = Writer::with_capacity(IDENTITY_LEN);
    out.bytes(MAGIC);
    out.u32(VERSION);
    out.u32(0);
    out.bytes(uuid.as_bytes());
    out.bytes(&boot);
    out.u32(0);
    out.crc();
    out.into_bytes()
}

/// On the stack: every first write to a block makes one.
fn entry(change: LiveChange, epoch: u64) -> [u8; ENTRY_LEN] {
    let mut out = [0; ENTRY_LEN];
    let len = change.len().get();
    assert!(len < 1 << LEN_BITS, "an entry has no room for {len} blocks");
    let packed = len | change.value.code() << LEN_BITS;
    let fields = [change.start().get(), packed, epoch];
    for (field, value) in out.chunks_exact_mut(8).zip(fields) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    let crc = crc32fast::hash(part(&out, 0, ENTRY_LEN - 4));
    part_mut(&mut out, ENTRY_LEN - 4, 4).copy_from_slice(&crc.to_le_bytes());
    out
}

/// What a region has behind its last entry.
struct NoEntry;

/// Reads an entry: its blocks, `None` where they have no numbers, and what it says of them.
fn decode_entry(bytes: &[u8], epoch: u64) -> std::result::Result<(Option<Span>, Noted), NoEntry> {
    let read = || -> Result<(u64, u64, u64)> {
        check_crc(bytes, "entry")?;
        let mut input = Reader::new(bytes);
        Ok((input.u64()?, input.u64()?, input.u64()?))
    };
    let (start, packed, found) = read().map_err(|_| NoEntry)?;
    let what = Noted::of(packed >> LEN_BITS).ok_or(NoEntry)?;
    if found != epoch {
        return Err(NoEntry);
    }
    let len = Blocks::new(packed & ((1 << LEN_BITS) - 1));
    Ok((Span::checked(Block::new(start), len), what))
}

fn epoch_field(epoch: u64) -> Vec<u8> {
    let mut out = Writer::with_capacity(16);
    out.u64(epoch);
    out.u32(0);
    out.crc();
    out.into_bytes()
}

#[expect(clippy::indexing_slicing, reason = "there are two regions")]
fn epoch_at(region: usize) -> u64 {
    EPOCHS_AT[region]
}

fn region_at(region: usize) -> u64 {
    HEADER_LEN + region as u64 * REGION_LEN
}

impl Live {
    /// Makes the log with `changes` in it, in the place of an older one, whose two regions hold no
    /// more than these two.
    pub(super) fn create(
        storage: &dyn Storage,
        dir: &Path,
        uuid: Uuid,
        data: &DataFiles,
        changes: &[LiveChange],
    ) -> Result<Self> {
        Self::create_aside(storage, dir, uuid, data, changes).inspect_err(|_| {
            // On a full disk its space counts.
            let _ = storage.remove_file(&dir.join(LIVE_TMP));
        })
    }

    fn create_aside(
        storage: &dyn Storage,
        dir: &Path,
        uuid: Uuid,
        data: &DataFiles,
        changes: &[LiveChange],
    ) -> Result<Self> {
        let tmp = dir.join(LIVE_TMP);
        let path = dir.join(LIVE_FILE);
        let what = || format!("cannot make {}", path.display());
        let file = storage.open_shared(&tmp, FILE_LEN).context(what)?;
        let mut live = Live {
            file: Arc::new(Mutex::new(file)),
            regions: [1, 2].map(|epoch| Region { used: 0, epoch }),
            current: 0,
            refused: false,
        };
        live.write_at(0, &identity(uuid, storage.boot_id()))?;
        live.bind(storage, dir, data, true)?;
        for region in [0, 1] {
            let epoch = live.region(region).epoch;
            live.write_at(epoch_at(region), &epoch_field(epoch))?;
        }
        for region in [0, 1] {
            // So that on a full disk either of them takes some changes.
            let first = live.file.lock().reserve(region_at(region), AT_LEAST);
            first.context(what)?;
        }
        for (at, change) in changes.iter().enumerate() {
            if at as u64 == LIMIT {
                live.current = 1;
            }
            live.append(*change)?;
        }
        storage.rename(&tmp, &path).context(what)?;
        Ok(live)
    }

    /// Says which files the log belongs to. `with_header` is false while the layer's header is being
    /// replaced: then it may be any.
    pub(super) fn bind(
        &mut self,
        storage: &dyn Storage,
        dir: &Path,
        data: &DataFiles,
        with_header: bool,
    ) -> Result<()> {
        let bond = Bond::of(&**self.file.lock(), storage, dir, data, with_header)?;
        self.write_at(bond::BOND_AT, &bond.encode())
    }

    /// What marks this log as poisoned, to be kept apart from the map.
    pub(super) fn poison_mark(&self) -> PoisonMark {
        PoisonMark(self.file.clone())
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .lock()
            .write(at, bytes)
            .context(|| "cannot note a change of the map")
    }

    /// Notes a change, before the client hears of it.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the host is full, or when far too much changed since the last
    /// flush.
    pub(super) fn append(&mut self, change: LiveChange) -> Result<()> {
        let &Region { used, epoch } = self.region(self.current);
        if used >= LIMIT {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{LIMIT} changes of the map wait for a flush: flush more often"),
            ));
        }
        let at = region_at(self.current) + used * ENTRY_LEN as u64;
        self.write_at(at, &entry(change, epoch))
            .inspect_err(|error| self.refused = error.kind() == ErrorKind::NoSpace)?;
        self.region_mut(self.current).used += 1;
        Ok(())
    }

    #[expect(clippy::indexing_slicing, reason = "there are two regions")]
    fn region(&self, which: usize) -> &Region {
        &self.regions[which]
    }

    #[expect(clippy::indexing_slicing, reason = "there are two regions")]
    fn region_mut(&mut self, which: usize) -> &mut Region {
        &mut self.regions[which]
    }

    /// True when a flush is due to make room.
    pub(super) fn is_filling(&self) -> bool {
        self.refused || self.region(self.current).used >= SOFT_LIMIT
    }

    /// A flush froze everything so far: what comes now goes to the other region, if that is empty.
    /// If not, because the flush before failed, everything stays where it is, and this flush
    /// empties the older region alone.
    pub(super) fn freeze(&mut self) {
        let which = 1 - self.current;
        let (other, current) = (self.region(which), self.region(self.current));
        if other.used == 0 && other.epoch > current.epoch {
            self.current = which;
        }
    }

    /// What was frozen is durable: forgets it, or else keeps it, which does no harm: applied
    /// again in its order, followed by all that came later, it changes nothing.
    pub(super) fn committed(&mut self) {
        if let Err(error) = self.clear(1 - self.current) {
            tracing::warn!(%error, "the log of changes cannot be emptied");
        }
    }

    /// Empties a region: its entries belong to an epoch that is over.
    fn clear(&mut self, which: usize) -> Result<()> {
        let (region, other) = (self.region(which), self.region(1 - which));
        // Its epoch must still come after the other's, since order is by epoch.
        if region.used == 0 && region.epoch > other.epoch {
            return Ok(());
        }
        let epoch = region.epoch.max(other.epoch) + 1;
        self.write_at(epoch_at(which), &epoch_field(epoch))?;
        *self.region_mut(which) = Region { used: 0, epoch };
        self.refused = false;
        Ok(())
    }
}

/// What a process left in `dir`, whose data files are open: so they cannot go away from here on.
///
/// # Errors
/// Where the host cannot read it. What the file says is never an error: it is trusted or not.
pub(super) fn read_left(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    data: &DataFiles,
) -> Result<Left> {
    let (layer, boot) = (header, storage.boot_id());
    let path = dir.join(LIVE_FILE);
    let what = || format!("cannot read {}", path.display());
    let file = match storage.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Left::Nothing),
        other => other.context(what)?,
    };
    let mut header = vec![0; in_memory(bond::BOND_AT) + bond::BOND_LEN];
    file.read_at(&mut header, 0).context(what)?;
    let poisoned = part(&header, in_memory(POISON_AT), 4) != [0; 4];
    let why = if !of_this_boot(&header, layer.uuid, boot) {
        tracing::info!(layer = %dir.display(), "a log of changes of an earlier boot is not used");
        return Ok(Left::Stale { reread: false });
    } else if poisoned {
        "a sync had failed".into()
    } else if part(&header, 0, IDENTITY_LEN) != identity(layer.uuid, boot) {
        "another version of Vellum wrote it, or it is damaged".into()
    } else if let Some(why) = Bond::broken(&header, &*file, storage, dir, data)? {
        why
    } else {
        match read_changes(&*file, &header, layer.blocks()).context(what)? {
            Err(why) => why,
            Ok(changes) => match hole_in_data(&changes, data)? {
                None => return Ok(Left::Trusted(changes)),
                Some(block) => format!(
                    "it says that block {block} was written, where the data file has a hole"
                ),
            },
        }
    };
    tracing::info!(
        layer = %dir.display(),
        "the log of changes is not trusted ({why}): going back to the last flush"
    );
    Ok(Left::Stale { reread: true })
}

/// Whether a header is one of this layer and boot, of any version.
fn of_this_boot(header: &[u8], uuid: Uuid, boot: [u8; 16]) -> bool {
    part(header, 0, 8) == MAGIC
        && part(header, UUID_AT, 16) == uuid.as_bytes()
        && part(header, BOOT_AT, 16) == boot
}

/// The entries, in order; or why they cannot be those of a layer of so many blocks.
fn read_changes(
    file: &dyn StorageFile,
    header: &[u8],
    blocks: Blocks,
) -> Result<std::result::Result<Vec<LiveChange>, String>> {
    let layer = Span::up_to(blocks);
    let mut regions: Vec<(u64, Vec<LiveChange>)> = Vec::new();
    for (region, at) in EPOCHS_AT.into_iter().enumerate() {
        let field = part(header, in_memory(at), 16);
        // A torn epoch: the region was being emptied.
        if check_crc(field, "epoch").is_err() {
            continue;
        }
        let epoch = Reader::new(field).u64()?;
        let mut changes = Vec::new();
        let mut chunk = vec![0; 2048 * ENTRY_LEN];
        'region: for first in (0..REGION_LEN).step_by(chunk.len()) {
            file.read_at(&mut chunk, region_at(region) + first)
                .context(|| "the entries")?;
            for bytes in chunk.chunks_exact(ENTRY_LEN) {
                let Ok((span, what)) = decode_entry(bytes, epoch) else {
                    break 'region;
                };
                match span.filter(|span| layer.contains(*span)) {
                    Some(span) => changes.push(Run::new(span, what)),
                    None => return Ok(Err("it names blocks that the layer does not have".into())),
                }
            }
        }
        regions.push((epoch, changes));
    }
    regions.sort_by_key(|(epoch, _)| *epoch);
    let ordered = regions.into_iter().flat_map(|(_, changes)| changes);
    Ok(Ok(ordered.collect()))
}

/// A block that was written, as `changes` have it, where the data file has a hole. Bytes are in the
/// file before their entry is in the log, so what is in memory is not what the log was written with.
fn hole_in_data(changes: &[LiveChange], data: &DataFiles) -> Result<Option<Block>> {
    let mut written = Index::new();
    for change in changes {
        let state = match change.value {
            Noted::Becomes(BlockState::Data) => BlockState::Data,
            _ => BlockState::Parent,
        };
        written.set(change.span, state);
    }
    for run in written.iter() {
        if data.has_hole(run.span)? {
            return Ok(Some(run.start()));
        }
    }
    Ok(None)
}

/// Tells whoever opens the layer next in this boot that the page cache is not to be trusted: a sync
/// of what a dead process wrote has failed.
pub(super) fn distrust(storage: &dyn Storage, dir: &Path) {
    // If even that fails, the next to open it meets the host's error itself.
    if let Ok(file) = storage.open(&dir.join(LIVE_FILE), OpenMode::Write) {
        let _ = file.write_at(&1u32.to_le_bytes(), POISON_AT);
    }
}

/// Removes the log of a layer that was closed in order.
pub(super) fn remove(storage: &dyn Storage, dir: &Path) -> Result<()> {
    remove_if_there(storage, &dir.join(LIVE_FILE))
}

#[cfg(test)]
mod tests;
