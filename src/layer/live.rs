//! Map changes that clients were told of and no flush has made durable yet, in memory that
//! outlives the process: a killed server's successor must know them, since the file system above
//! goes on and takes its writes for done. format.md, section 6.
//!
//! The file is shared memory, not storage: it counts only within the boot that wrote it.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::codec::{Reader, Writer, check_crc};
use super::recovery::remove_if_there;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::{OpenMode, SharedFile, Storage};

/// The file's name within the layer's directory.
pub(super) const LIVE_FILE: &str = "live";
const LIVE_TMP: &str = "live.tmp";

const MAGIC: &[u8; 8] = b"VELLUMLV";
const VERSION: u32 = 1;
const HEADER_LEN: u64 = 4096;
/// Length of the part of the header that never changes.
const IDENTITY_LEN: usize = 56;
/// Where the two regions' epochs are, and the poison mark.
const EPOCHS_AT: [u64; 2] = [64, 80];
const POISON_AT: u64 = 96;
const ENTRY_LEN: usize = 32;
/// Entries of a region.
const CAPACITY: u64 = 256 << 10;
/// More changes than these between two flushes are refused. Unit tests fill it all the time.
const LIMIT: u64 = if cfg!(test) { 24 } else { CAPACITY };
/// From here on a flush is due.
const SOFT_LIMIT: u64 = LIMIT / 4;
/// Changes of the map that one request makes at most between two calls of
/// [`super::WritableLayer::flush_if_due`], so that several at once find room in the log.
pub const CHANGES_AT_ONCE: u64 = LIMIT / 8;
const REGION_LEN: u64 = CAPACITY * ENTRY_LEN as u64;
/// Length of the file.
const FILE_LEN: u64 = HEADER_LEN + 2 * REGION_LEN;

/// A change as it was logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LiveChange {
    pub(super) start: u64,
    pub(super) len: u64,
    /// An index value.
    pub(super) new: u32,
}

/// The file of a log, shared with whoever poisons the layer without having its map.
type LogFile = Arc<Mutex<Box<dyn SharedFile>>>;

/// The log of a layer that is open.
#[derive(Debug)]
pub(super) struct Live {
    file: LogFile,
    /// Where changes go now.
    region: usize,
    used: [u64; 2],
    epochs: [u64; 2],
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

/// What a process of this boot left.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// A sync had failed: what the page cache shows may not be on the disk.
    pub(super) poisoned: bool,
    /// The page cache holds everything that was written: no block may be replayed over it.
    pub(super) same_boot: bool,
    /// In order.
    pub(super) changes: Vec<LiveChange>,
}

fn identity(uuid: Uuid, boot: [u8; 16], place: [u64; 2]) -> Vec<u8> {
    let mut place_bytes = Writer::with_capacity(16);
    place.into_iter().for_each(|part| place_bytes.u64(part));
    let mut out = Writer::with_capacity(IDENTITY_LEN);
    out.bytes(MAGIC);
    out.u32(VERSION);
    out.u32(crc32fast::hash(&place_bytes.into_bytes()));
    out.bytes(uuid.as_bytes());
    out.bytes(&boot);
    out.u32(0);
    out.crc();
    out.into_bytes()
}

/// On the stack: every first write to a block makes one.
fn entry(change: LiveChange, epoch: u64) -> [u8; ENTRY_LEN] {
    let mut out = [0; ENTRY_LEN];
    // Lengths stay far below 2^48.
    let packed = change.len | u64::from(change.new.wrapping_add(1)) << 48;
    let fields = [change.start, packed, epoch];
    for (field, value) in out.chunks_exact_mut(8).zip(fields) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    if let Some((body, crc)) = out.split_last_chunk_mut::<4>() {
        *crc = crc32fast::hash(body).to_le_bytes();
    }
    out
}

fn decode_entry(bytes: &[u8], epoch: u64) -> Option<LiveChange> {
    check_crc(bytes, "entry").ok()?;
    let mut input = Reader::new(bytes);
    let start = input.u64().ok()?;
    let packed = input.u64().ok()?;
    let new = ((packed >> 48) as u32).wrapping_sub(1);
    let known = [super::ABSENT, super::STATE_DATA, super::STATE_ZERO].contains(&new);
    let found = input.u64().ok()?;
    (found == epoch && known).then_some(LiveChange {
        start,
        len: packed & ((1 << 48) - 1),
        new,
    })
}

fn epoch_field(epoch: u64) -> Vec<u8> {
    let mut out = Writer::with_capacity(16);
    out.u64(epoch);
    out.u32(0);
    out.crc();
    out.into_bytes()
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
        changes: &[LiveChange],
    ) -> Result<Self> {
        let tmp = dir.join(LIVE_TMP);
        let path = dir.join(LIVE_FILE);
        let what = || format!("cannot make {}", path.display());
        let file = storage.open_shared(&tmp, FILE_LEN).context(what)?;
        let place = file.place().context(what)?;
        let mut live = Live {
            file: Arc::new(Mutex::new(file)),
            region: 0,
            used: [0; 2],
            epochs: [1, 2],
        };
        live.write_at(0, &identity(uuid, storage.boot_id(), place))?;
        for (at, epoch) in EPOCHS_AT.into_iter().zip(live.epochs) {
            live.write_at(at, &epoch_field(epoch))?;
        }
        for (at, change) in changes.iter().enumerate() {
            if at as u64 == LIMIT {
                live.region = 1;
            }
            live.append(change.start, change.len, change.new)?;
        }
        storage.rename(&tmp, &path).context(what)?;
        Ok(live)
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
    pub(super) fn append(&mut self, start: u64, len: u64, new: u32) -> Result<()> {
        let (region, epoch) = (self.region, self.epoch(self.region));
        let used = self.used.get(region).copied().unwrap_or(LIMIT);
        if used >= LIMIT {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{LIMIT} changes of the map wait for a flush: flush more often"),
            ));
        }
        let at = region_at(region) + used * ENTRY_LEN as u64;
        self.write_at(at, &entry(LiveChange { start, len, new }, epoch))?;
        if let Some(used) = self.used.get_mut(region) {
            *used += 1;
        }
        Ok(())
    }

    fn epoch(&self, region: usize) -> u64 {
        self.epochs.get(region).copied().unwrap_or_default()
    }

    /// True when a flush is due to make room.
    pub(super) fn is_filling(&self) -> bool {
        self.used
            .get(self.region)
            .is_some_and(|&used| used >= SOFT_LIMIT)
    }

    /// A flush froze everything so far: what comes now goes to the other region, if that is empty.
    /// If not, because the flush before failed, everything stays where it is, and this flush
    /// empties the older region alone.
    pub(super) fn freeze(&mut self) {
        let other = 1 - self.region;
        if self.used.get(other) == Some(&0) && self.epoch(other) > self.epoch(self.region) {
            self.region = other;
        }
    }

    /// What was frozen is durable: forgets it, or else keeps it, which does no harm: applied
    /// again in its order, followed by all that came later, it changes nothing.
    pub(super) fn committed(&mut self) {
        if let Err(error) = self.clear(1 - self.region) {
            tracing::warn!(%error, "the log of changes cannot be emptied");
        }
    }

    /// Empties a region: its entries belong to an epoch that is over.
    fn clear(&mut self, region: usize) -> Result<()> {
        if self.used.get(region) == Some(&0) {
            // Its epoch must still come after the other's, since order is by epoch.
            if self.epoch(region) > self.epoch(1 - region) {
                return Ok(());
            }
        }
        let epoch = self.epochs.iter().max().map_or(1, |last| last + 1);
        let at = EPOCHS_AT.get(region).copied().unwrap_or_default();
        self.write_at(at, &epoch_field(epoch))?;
        if let (Some(slot), Some(used)) = (self.epochs.get_mut(region), self.used.get_mut(region)) {
            *slot = epoch;
            *used = 0;
        }
        Ok(())
    }
}

/// What a process of this boot left in `dir`: nothing after an orderly close and after a reboot, no
/// changes where the layer was poisoned, since what its page cache holds cannot be trusted then.
pub(super) fn read_left(storage: &dyn Storage, dir: &Path, uuid: Uuid) -> Result<Left> {
    let path = dir.join(LIVE_FILE);
    let what = || format!("cannot read {}", path.display());
    let file = match storage.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Left::default()),
        other => other.context(what)?,
    };
    let mut header = vec![0; 128];
    file.read_at(&mut header, 0).context(what)?;
    let place = file.place().context(what)?;
    if header.get(..IDENTITY_LEN) != Some(&*identity(uuid, storage.boot_id(), place)) {
        return Ok(Left::default());
    }
    let poisoned = header.get(POISON_AT as usize..POISON_AT as usize + 4) != Some(&[0; 4]);
    if poisoned {
        tracing::warn!(layer = %dir.display(), "a sync had failed: going back to the last flush");
        return Ok(Left {
            poisoned: true,
            ..Left::default()
        });
    }
    let mut regions: Vec<(u64, Vec<LiveChange>)> = Vec::new();
    for (region, at) in EPOCHS_AT.into_iter().enumerate() {
        let field = header
            .get(at as usize..at as usize + 16)
            .unwrap_or_default();
        // A torn epoch: the region was being emptied.
        if check_crc(field, "epoch").is_err() {
            continue;
        }
        let epoch = Reader::new(field).u64()?;
        let mut changes = Vec::new();
        let mut chunk = vec![0; 2048 * ENTRY_LEN];
        'region: for first in (0..REGION_LEN).step_by(chunk.len()) {
            file.read_at(&mut chunk, region_at(region) + first)
                .context(what)?;
            for bytes in chunk.chunks_exact(ENTRY_LEN) {
                match decode_entry(bytes, epoch) {
                    Some(change) => changes.push(change),
                    None => break 'region,
                }
            }
        }
        regions.push((epoch, changes));
    }
    regions.sort_by_key(|(epoch, _)| *epoch);
    let changes = regions
        .into_iter()
        .flat_map(|(_, changes)| changes)
        .collect();
    Ok(Left {
        poisoned: false,
        same_boot: true,
        changes,
    })
}

/// Removes the log of a layer that was closed in order.
pub(super) fn remove(storage: &dyn Storage, dir: &Path) -> Result<()> {
    remove_if_there(storage, &dir.join(LIVE_FILE))
}

#[cfg(test)]
mod tests;
