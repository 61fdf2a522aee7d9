//! Space on the host: what a writable layer keeps back for itself, so that flushes, discards, closing
//! and opening work on a full disk, and how its writers meet one. docs/durability.md, "A full disk".

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::files::remove_if_there;
use super::full::{Full, Refuser, TIGHT};
use super::headroom::{Headroom, Need};
use vellum_base::block::Offset;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::{DiskSpace, OpenMode, Storage, StorageFile};

/// The file that holds space and nothing else. Its length is what it holds.
pub const RESERVE_FILE: &str = "reserve";

/// Kept for the layer itself beside its map: the header and the first pieces of the log of changes,
/// and what the host's file system needs to note all that.
const OWN: u64 = 1 << 20;
/// Kept for clients' small writes once the disk is full, so that one that writes little goes on, and
/// the file system of one that writes much can note what it could not write.
const CLIENTS: u64 = 3 << 20;
/// The same while less than [`LOW`] is left: what the journal of an ext4 takes, all of whose blocks
/// may still have to be written for the first time. But no more than a part of what is left.
const CLIENTS_LOW: u64 = 16 << 20;
const LOW: u64 = 1 << 30;
const PART: u64 = 16;
/// A write of at most so many bytes is small: those of a file system's own structures are.
const SMALL: u64 = 128 << 10;
/// What is given up for one failure at least: a file system takes more than the bytes.
const STEP: u64 = 256 << 10;
/// How often the reserve is made whole again where it is not.
const TOP_UP: Duration = Duration::from_secs(1);
/// How long writers are held by default.
const HOLD: Duration = Duration::from_secs(20);
/// A held writer looks again after so long.
const LOOK: Duration = Duration::from_millis(50);

/// What space is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// The layer's own files, without which it can keep no promise: may take all of the reserve.
    Own,
    /// A client's write: small ones may take what is not for the layer itself.
    Client,
}

#[derive(Debug, Default)]
struct State {
    file: Option<Arc<dyn StorageFile>>,
    /// What the reserve holds.
    len: u64,
    /// What a checkpoint of the map takes, and blocks that so far lie in the journal alone: after a
    /// power cut they want space in the data files.
    map: u64,
    carried: u64,
    topped_up: Option<Instant>,
    /// The host cannot reserve at all.
    unsupported: bool,
    full: Option<Full>,
}

impl State {
    /// What is the layer's own.
    fn own(&self) -> u64 {
        (OWN + self.map + self.carried).next_multiple_of(STEP)
    }
}

/// Milliseconds of a time.
#[expect(
    clippy::cast_possible_truncation,
    reason = "2^64 of them are 500 million years"
)]
pub(super) fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}

/// The space of one layer.
#[derive(Debug)]
pub(super) struct Space {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    path: PathBuf,
    state: Mutex<State>,
    /// There is a [`Full`].
    full: AtomicBool,
    hold_ms: AtomicU64,
    headroom: Headroom,
    /// Bytes of the device that count as small whatever is written there.
    favoured: OnceLock<Vec<Range<Offset>>>,
    opened: Instant,
    /// When the reserve was last looked after, in milliseconds since then.
    looked_after: AtomicU64,
}

/// How a layer stands with the host's space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// Bytes that the layer keeps back on the host.
    pub reserved_bytes: u64,
    /// Since when the host has had no room for its writes, in seconds since 1970; `None` while it has.
    pub full_since: Option<u64>,
}

impl Space {
    /// Takes over what a process before left in `dir`, and reserves what is missing where there is
    /// room.
    pub(super) fn open(storage: &Arc<dyn Storage>, dir: &Path) -> Self {
        let space = Space {
            storage: storage.clone(),
            dir: dir.to_owned(),
            path: dir.join(RESERVE_FILE),
            state: Mutex::default(),
            full: AtomicBool::new(false),
            hold_ms: AtomicU64::new(millis(HOLD)),
            headroom: Headroom::new(),
            favoured: OnceLock::new(),
            opened: Instant::now(),
            looked_after: AtomicU64::new(0),
        };
        if let Ok(file) = storage.open(&space.path, OpenMode::Write) {
            let mut state = space.state.lock();
            // What is a hole in it holds nothing.
            let holds = file.len().and_then(|len| Ok(len.min(file.allocated()?)));
            state.len = holds.unwrap_or_else(|error| {
                tracing::warn!(path = %space.path.display(), %error, "the reserve counts as empty");
                0
            });
            state.file = Some(file);
        }
        space.top_up();
        space
    }

    /// How long writers are held before they are told that the disk is full.
    pub(super) fn hold_writes_for(&self, limit: Duration) {
        let limit = limit.min(Duration::from_millis(u64::MAX));
        self.hold_ms.store(millis(limit), Ordering::Relaxed);
    }

    /// Clients' writes leave so many bytes of the host's disk available; 0 ends that.
    pub(super) fn keep_free(&self, bytes: u64) {
        self.headroom.keep(bytes);
    }

    /// Writes to these bytes of the device count as small: a journal, without which the file system
    /// above gives up.
    pub(super) fn favour(&self, ranges: Vec<Range<Offset>>) {
        // Once is enough: it stays where it is.
        let _ = self.favoured.set(ranges);
    }

    fn is_favoured(&self, offset: Offset, len: u64) -> bool {
        let within = |range: &Range<Offset>| range.start <= offset && offset + len <= range.end;
        let favoured = self.favoured.get();
        favoured.is_some_and(|all| all.iter().any(within))
    }

    /// The next checkpoint takes so many bytes at most.
    pub(super) fn map_is(&self, bytes: u64) {
        self.state.lock().map = bytes;
    }

    /// Whether after a power cut there is space for so many bytes of blocks that lie in the journal
    /// alone.
    pub(super) fn covers(&self, carried: u64) -> bool {
        let covered = {
            let mut state = self.state.lock();
            state.carried = carried;
            state.unsupported || state.len >= state.own()
        };
        covered || {
            self.top_up();
            let state = self.state.lock();
            state.len >= state.own()
        }
    }

    /// As [`Space::top_up`], for one who calls it often; false where it was done a moment ago.
    pub(super) fn look_after(&self) -> bool {
        let now = millis(self.opened.elapsed());
        let last = self.looked_after.load(Ordering::Relaxed);
        let due = now >= last + millis(TOP_UP);
        if due {
            self.looked_after.store(now, Ordering::Relaxed);
            self.top_up();
        }
        due
    }

    /// Reserves what is missing, where there is room, and not all the time.
    pub(super) fn top_up(&self) {
        let clients = match self.free() {
            Some(free) if free < LOW => (free / PART).clamp(CLIENTS, CLIENTS_LOW),
            _ => CLIENTS,
        };
        let mut state = self.state.lock();
        let wanted = (state.own() + clients).next_multiple_of(STEP);
        let lately = state.topped_up.is_some_and(|at| at.elapsed() < TOP_UP);
        // What it lacks for itself cannot wait.
        if state.unsupported || state.len >= wanted || lately && state.len >= state.own() {
            return;
        }
        if state.full.is_some() && !self.is_open(&state, 0) {
            return;
        }
        // The first part is worth more than the second: on a disk with less than both, that alone.
        for target in [wanted, state.own()] {
            if state.len < target && self.reserve(&mut state, target) {
                break;
            }
        }
        state.topped_up = Some(Instant::now());
    }

    /// Makes the reserve `target` bytes long; false where there is no room.
    fn reserve(&self, state: &mut State, target: u64) -> bool {
        if state.file.is_none() {
            state.file = self.storage.open(&self.path, OpenMode::Create).ok();
        }
        let Some(file) = state.file.clone() else {
            return false;
        };
        match file.allocate(0, target) {
            Ok(()) => {
                state.len = target;
                true
            }
            Err(error) => {
                // Part of it may have been taken.
                let _ = file.set_len(state.len);
                state.unsupported = Error::io("", error).kind() != ErrorKind::NoSpace;
                if state.unsupported {
                    tracing::debug!(dir = %self.dir.display(), "no space can be reserved here");
                }
                false
            }
        }
    }

    /// Gives up some of the reserve, at least `need` bytes where there are as many; false where
    /// nothing is left for this claim.
    fn give_up(&self, claim: Claim, need: u64) -> bool {
        let mut state = self.state.lock();
        let keep = match claim {
            Claim::Own => 0,
            Claim::Client => state.own(),
        };
        if state.len <= keep {
            return false;
        }
        let step = need.next_multiple_of(STEP).min(state.len - keep);
        let left = state.len - step;
        let Some(file) = &state.file else {
            return false;
        };
        if file.set_len(left).is_err() {
            return false;
        }
        state.len = left;
        state.topped_up = Some(Instant::now());
        true
    }

    /// Does work that takes about `need` bytes, from the reserve where the host has none, again and
    /// again until that is used up. The work must bear being cut off and repeated.
    pub(super) fn within<T>(
        &self,
        claim: Claim,
        need: u64,
        mut work: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let mut result = work();
        let mut once_more = true;
        while let Err(error) = &result
            && error.is_full_disk()
        {
            // Others may have taken what was given up, or given something back.
            let again = self.give_up(claim, need.max(STEP))
                || claim == Claim::Own && std::mem::take(&mut once_more);
            if !again {
                break;
            }
            result = work();
        }
        result
    }

    /// Does a client's write of `len` bytes at `offset`; `grows`: it may want space for all of them.
    pub(super) fn write(
        &self,
        offset: Offset,
        len: u64,
        grows: bool,
        work: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let small = len <= SMALL || self.is_favoured(offset, len);
        let need = || match small {
            true if self.is_favoured(offset, len) => Need::Favoured,
            true => Need::Small,
            false => Need::Large,
        };
        if grows && !self.headroom.allows(need, len, || self.available()) {
            self.refused(Refuser::Headroom(len));
            return Err(self.refusal());
        }
        if grows && !small && self.full.load(Ordering::Relaxed) && !self.may_try(len) {
            return Err(self.refusal());
        }
        let result = if small {
            self.within(Claim::Client, len, &work)
        } else {
            work()
        };
        match &result {
            Ok(()) if self.full.load(Ordering::Relaxed) && grows => self.wrote(small),
            Err(error) if error.is_full_disk() => self.refused(Refuser::Disk(self.free())),
            _ => {}
        }
        result
    }

    fn refusal(&self) -> Error {
        Error::io(
            format!(
                "{}: the host's disk is full, or nearly so",
                self.dir.display()
            ),
            std::io::Error::from_raw_os_error(libc::ENOSPC),
        )
    }

    /// Whether the disk has room for what may never be written.
    pub(super) fn has_plenty(&self) -> bool {
        let enough = |available| available >= self.headroom.kept().saturating_add(LOW);
        !self.full.load(Ordering::Relaxed) && self.available().is_none_or(enough)
    }

    fn space(&self) -> Option<DiskSpace> {
        self.storage.disk_space(&self.dir).ok().flatten()
    }

    fn free(&self) -> Option<u64> {
        self.space().map(|space| space.free)
    }

    fn available(&self) -> Option<u64> {
        self.space().map(|space| space.available)
    }

    /// Whether the disk says that it has room for `len` bytes again.
    fn is_open(&self, state: &State, len: u64) -> bool {
        let over = |full: &Full| {
            let kept = self.headroom.kept();
            let space = self.space();
            space.is_some_and(|space| full.is_over(space, kept, len))
        };
        state.full.as_ref().is_none_or(over)
    }

    /// Whether a write that wants space should try at all. Without that, writers who wait would take
    /// whatever a neighbour gives up of its own reserve.
    fn may_try(&self, len: u64) -> bool {
        let mut state = self.state.lock();
        self.is_open(&state, len)
            || state
                .full
                .as_mut()
                .is_none_or(|full| full.may_be_tried(len))
    }

    /// A write was refused for want of space.
    fn refused(&self, who: Refuser) {
        let mut state = self.state.lock();
        if let Some(full) = &mut state.full {
            full.refused(who);
        } else {
            let dir = self.dir.display();
            match (who, self.headroom.kept()) {
                (Refuser::Disk(_), _) => tracing::warn!(%dir, "the host's disk is full"),
                (Refuser::Headroom(_), keep) => {
                    tracing::warn!(%dir, keep, "the host's disk is nearly full: writes stop");
                }
            }
            state.full = Some(Full::new(who));
        }
        self.full.store(true, Ordering::Relaxed);
    }

    /// A write was successful that wanted space: a small one says little.
    fn wrote(&self, small: bool) {
        let mut state = self.state.lock();
        if !small || self.is_open(&state, 0) {
            state.full = None;
            self.full.store(false, Ordering::Relaxed);
            tracing::info!(dir = %self.dir.display(), "the host's disk has room again");
            drop(state);
            self.top_up();
        }
    }

    /// To be called after a write failed for want of space, with nothing locked: waits a moment and
    /// says whether it should be tried again. Not any more once the disk has been full for long.
    pub(super) fn wait_for_room(&self) -> bool {
        let hold = Duration::from_millis(self.hold_ms.load(Ordering::Relaxed));
        let waited = self.state.lock().full.as_ref().map(Full::lasts);
        match waited {
            Some(waited) if waited < hold => {
                std::thread::sleep(LOOK.min(hold - waited));
                true
            }
            Some(_) => false,
            // Somebody else's write went well meanwhile; or the failure was of another kind.
            None => false,
        }
    }

    pub(super) fn status(&self) -> SpaceStatus {
        let state = self.state.lock();
        let full = state.full.as_ref().filter(|_| !self.is_open(&state, 0));
        SpaceStatus {
            reserved_bytes: state.len,
            full_since: full.map(Full::since),
        }
    }

    /// The layer is closed: gives everything back, but on a disk that is nearly full, where it would
    /// not be opened again otherwise.
    pub(super) fn give_back(&self) {
        if self.free().is_some_and(|free| free < TIGHT) {
            return;
        }
        self.give_back_all();
    }

    /// As [`Space::give_back`], of a layer that nobody will write again.
    pub(super) fn give_back_all(&self) {
        let mut state = self.state.lock();
        state.file = None;
        state.len = 0;
        state.topped_up = None;
        if let Err(error) = remove_if_there(&*self.storage, &self.path) {
            tracing::warn!(%error, "space stays reserved");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_base::storage::SimStorage;

    fn space(room: u64) -> (SimStorage, Space) {
        let disk = SimStorage::new();
        disk.create_dir(Path::new("/layer")).unwrap();
        disk.limit(room);
        let storage: Arc<dyn Storage> = Arc::new(disk.clone());
        let space = Space::open(&storage, Path::new("/layer"));
        (disk, space)
    }

    fn refused() -> Error {
        Error::io("", std::io::Error::from_raw_os_error(libc::ENOSPC))
    }

    #[test]
    fn a_disk_with_room_for_the_layer_alone_gives_that() {
        let (_, plenty) = space(2 << 30);
        let (_, low) = space(512 << 20);
        let (_, lower) = space(48 << 20);
        let (_, own) = space(2 << 20);
        let (_, none) = space(100 << 10);
        let all = [&plenty, &low, &lower, &own, &none];
        let reserved = all.map(|space| space.status().reserved_bytes);
        let wanted = [OWN + CLIENTS, OWN + CLIENTS_LOW, OWN + CLIENTS, OWN, 0];
        assert_eq!(reserved, wanted);
    }

    #[test]
    fn small_writes_leave_the_layer_its_own_and_its_own_files_take_all() {
        let (_, space) = space(2 << 30);
        space
            .within(Claim::Client, 4096, || Err::<(), _>(refused()))
            .unwrap_err();
        assert_eq!(space.status().reserved_bytes, OWN);
        space
            .within(Claim::Own, 4096, || Err::<(), _>(refused()))
            .unwrap_err();
        assert_eq!(space.status().reserved_bytes, 0);
    }

    #[test]
    fn a_large_write_does_not_take_what_small_ones_need_nor_tries_before_there_is_room() {
        let (disk, space) = space(2 << 30);
        let tries = std::cell::Cell::new(0);
        let large = |room: bool| {
            space.write(Offset::default(), 1 << 20, true, || {
                tries.set(tries.get() + 1);
                if room { Ok(()) } else { Err(refused()) }
            })
        };
        large(false).unwrap_err();
        assert!(space.status().full_since.is_some());
        assert_eq!(space.status().reserved_bytes, OWN + CLIENTS);
        large(true).unwrap_err();
        assert_eq!(tries.get(), 1, "not before there is room");
        // Small ones go on.
        space
            .write(Offset::default(), 4096, true, || Ok(()))
            .unwrap();
        assert!(space.status().full_since.is_some());
        disk.limit(3 << 30);
        assert!(space.status().full_since.is_none());
        large(true).unwrap();
        assert_eq!(tries.get(), 2);
    }

    #[test]
    fn a_layer_that_leaves_some_of_the_disk_free_writes_again_once_that_is_there() {
        let (disk, space) = space(80 << 20);
        let write = |len| space.write(Offset::default(), len, true, || Ok(()));
        space.keep_free(64 << 20);
        write(1 << 20).unwrap();
        disk.limit(60 << 20);
        // It looks again after a moment.
        std::thread::sleep(Duration::from_millis(150));
        assert!(write(1 << 20).unwrap_err().is_full_disk());
        assert!(space.status().full_since.is_some());
        assert!(space.wait_for_room(), "writers are held");
        write(4096).unwrap();
        disk.limit(20 << 20);
        assert!(write(4096).unwrap_err().is_full_disk());
        // What takes no new space is not concerned.
        let over = space.write(Offset::default(), 1 << 20, false, || Ok(()));
        over.unwrap();
        disk.limit(66 << 20);
        assert!(space.status().full_since.is_none());
        write(1 << 20).unwrap();
        space.keep_free(0);
        disk.limit(1 << 20);
        write(1 << 20).unwrap();
    }

    #[test]
    fn writers_are_held_for_a_while_after_the_disk_is_full_and_no_longer() {
        let (_, space) = space(64 << 20);
        assert!(!space.wait_for_room(), "the disk is not full");
        space.hold_writes_for(Duration::from_millis(80));
        space
            .write(Offset::default(), 1 << 20, true, || Err(refused()))
            .unwrap_err();
        let began = Instant::now();
        while space.wait_for_room() {}
        assert!(began.elapsed() >= Duration::from_millis(70));
        assert!(!space.wait_for_room());
    }

    #[test]
    fn a_disk_that_is_nearly_full_leaves_a_closed_layer_its_reserve() {
        for (room, left) in [(32 << 20, true), (128 << 20, false)] {
            let (disk, space) = space(room);
            space.give_back();
            assert_eq!(disk.exists(Path::new("/layer/reserve")).unwrap(), left);
        }
    }
}
