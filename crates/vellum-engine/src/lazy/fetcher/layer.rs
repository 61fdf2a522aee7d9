//! A lazy layer whose blocks come.

mod claims;
mod evicting;
mod healing;
mod near;

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use uuid::Uuid;

use super::super::stall::{Pauses, Stall, pause_after};
use super::super::{Remote, Waiting};
use super::ahead::Ahead;
use super::cache::Cache;
use super::coming::{Coming, PATIENCE};
use super::limit::Limit;
use claims::{Claim, State};
use vellum_base::block::{Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::{Completion, LazyLayer};
use vellum_registry::artifact::{ChunkReader, Window};
use vellum_registry::{BlobReader, Failure};
use vellum_store::Store;

/// How often one who waits for another's fetch looks whether it has waited for too long.
const LOOK: Duration = Duration::from_millis(200);
/// How long an attempt that is under way is waited for beyond the time that a read may wait: one that stands still ends before.
const ATTEMPT: Duration = Duration::from_secs(30);

/// A lazy layer, open to be filled.
pub(super) struct Incoming {
    layer: Uuid,
    lazy: LazyLayer,
    /// By their numbers.
    windows: BTreeMap<u32, Window>,
    /// The digest of the data's blob.
    data: String,
    ranges: BlobReader,
    limit: Arc<Limit>,
    cache: Arc<Cache>,
    ahead: Arc<Ahead>,
    /// Somebody wants all of it: nothing of it is evicted.
    is_kept: AtomicBool,
    /// The layer is whole, or is opened anew. Held for reading by whoever changes something of it.
    retired: RwLock<bool>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Where the chunks of windows that lie next to each other are in their blob.
pub(super) fn stored_at(first: &Window, last: &Window) -> Range<u64> {
    first.chunk.offset..last.chunk.offset + u64::from(last.chunk.len)
}

/// What a window takes on the host's disk.
fn bytes_of(window: &Window) -> u64 {
    let blocks: Blocks = window.blocks.iter().map(|span| span.len()).sum();
    blocks.bytes()
}

/// The blocks of a chunk that came. What is wrong may have been changed on its way.
pub(super) fn checked<'a>(
    reader: &'a mut ChunkReader,
    window: &'a Window,
    chunk: &[u8],
    blob: &str,
) -> Result<impl Iterator<Item = (Span, &'a [u8])>, Failure> {
    reader
        .blocks(window, chunk)
        .map_err(|error| Failure::passing(error.context(format!("blob {blob}"))))
}

impl Incoming {
    /// Opens a layer of the store; `None` where it is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for files that are not what they should be.
    pub fn open(
        store: &Store,
        layer: Uuid,
        (limit, cache, ahead): (&Arc<Limit>, &Arc<Cache>, &Arc<Ahead>),
    ) -> Result<Option<Self>> {
        let dir = store.layer_dir(layer);
        let storage = &**store.storage();
        let Some(lazy) = LazyLayer::open(storage, &dir)? else {
            return Ok(None);
        };
        let remote = Remote::read(storage, &dir)?;
        let remote = remote.ok_or_else(|| {
            let text = format!("{}: a lazy layer that came from nowhere", dir.display());
            Error::new(ErrorKind::Corrupt, text)
        })?;
        let table = remote.read_table(storage, &dir)?;
        let (reference, access) = remote.place()?;
        let windows = table.windows().map(|window| (window.chunk.window, window));
        Ok(Some(Incoming {
            layer,
            is_kept: AtomicBool::new(remote.is_kept() || !lazy.is_checked()),
            lazy,
            windows: windows.collect(),
            data: remote.data.unwrap_or_else(String::new),
            ranges: BlobReader::open(&reference, access, &limit.seen)?,
            limit: Arc::clone(limit),
            cache: Arc::clone(cache),
            ahead: Arc::clone(ahead),
            retired: RwLock::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Makes durable what came.
    ///
    /// # Errors
    /// As [`LazyLayer::sync`]: the layer has to be opened anew; as [`Incoming::in_use`].
    pub fn sync(&self) -> Result<()> {
        let _in_use = self.in_use()?;
        self.lazy.sync()
    }

    /// From now on this one changes nothing of the layer, which may be opened anew. Waits for what it is at.
    pub fn retire(&self) {
        *self.retired.write() = true;
    }

    /// Whether the layer is whole, or opened anew.
    pub fn is_retired(&self) -> bool {
        *self.retired.read()
    }

    /// Keeps this one from being retired.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where it is.
    fn in_use(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let retired = self.retired.read();
        match *retired {
            false => Ok(retired),
            true => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: the layer was completed, or opened anew, meanwhile: ask once more",
                    self.lazy.dir().display()
                ),
            )),
        }
    }

    /// False for one that was removed meanwhile.
    pub fn is_there(&self) -> bool {
        self.lazy.dir().exists()
    }

    pub fn is_all_here(&self) -> bool {
        self.lazy.missing().is_empty()
    }

    /// As [`LazyLayer::complete`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for blocks with another digest than the layer should have; as [`Incoming::in_use`].
    pub fn complete(&self, store: &Store) -> Result<()> {
        let _in_use = self.in_use()?;
        match self.lazy.complete(&**store.storage(), |_| {})? {
            Completion::Whole => Ok(()),
            // Whoever wants all of it brings them, and asks once more.
            Completion::Damaged(windows) => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: the disk lost or changed {windows} windows: they are fetched again",
                    self.lazy.dir().display()
                ),
            )),
            Completion::Wrong => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: what came has another digest than the layer should have: it is fetched again",
                    self.lazy.dir().display()
                ),
            )),
        }
    }

    /// Puts a window that was claimed where it is read.
    ///
    /// # Errors
    /// As [`LazyLayer::put`] and [`Incoming::in_use`].
    fn put<'a>(
        &self,
        window: &Window,
        blocks: impl Iterator<Item = (Span, &'a [u8])>,
    ) -> Result<()> {
        let (number, bytes) = (window.chunk.window, bytes_of(window));
        // One that comes again, since it was damaged, has its place.
        let is_new = !self.lazy.takes_space(number);
        if is_new {
            self.cache.make_room(bytes);
        }
        // Not while room is made, which may be of this layer.
        let _in_use = self.in_use()?;
        self.lazy.put(number, blocks)?;
        if is_new {
            self.cache.came(self.layer, number, bytes);
        }
        Ok(())
    }

    pub fn has_waiters(&self) -> bool {
        !self.state.lock().waiting.is_empty()
    }

    /// Who waits, and what failed last; `None` where nobody does and nothing did.
    pub fn waiting(&self, layer: Uuid) -> Option<Waiting> {
        let state = self.state.lock();
        let oldest = state.waiting.values().next();
        if oldest.is_none() && state.error.is_none() {
            return None;
        }
        Some(Waiting {
            layer,
            requests: state.waiting.len() as u64,
            seconds: oldest.map_or(0, |oldest| oldest.elapsed().as_secs()),
            error: state.error.clone(),
        })
    }

    /// Waits until those windows are here.
    ///
    /// # Errors
    /// [`ErrorKind::Absent`] with what the registry says, where they did not come in time, or not to stay.
    pub fn want(&self, wanted: Range<u32>) -> Result<()> {
        let deadline = Stall::of_environment().deadline();
        let _waiter = self.wait();
        let began = Instant::now();
        let mut pauses = Pauses::default();
        let mut least = usize::MAX;
        let mut has_caught_up = false;
        loop {
            let missing = |window: &u32| !self.lazy.is_here(*window);
            let missing: Vec<u32> = wanted.clone().filter(missing).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if began.elapsed() < PATIENCE && self.waited_for_pack(&missing) {
                continue;
            }
            let Some(claim) = self.claim(&missing) else {
                if !has_caught_up {
                    self.caught_up(&missing);
                    has_caught_up = true;
                }
                self.wait_for_others(&missing, deadline)?;
                continue;
            };
            let failure = match self.fetch(&claim) {
                Ok(_) => {
                    self.check_that_more_is_here(missing.len(), &mut least, deadline)?;
                    continue;
                }
                Err(failure) => failure,
            };
            drop(claim);
            pause_after(&failure, &mut pauses, deadline)?;
        }
    }

    /// Fetches the first windows that are missing and that nobody fetches, in one request. Returns how many bytes came;
    /// `None` where there are none.
    ///
    /// # Errors
    /// [`ErrorKind::Absent`] with what the registry says.
    pub fn bring_next(&self) -> Result<Option<u64>> {
        let Some(claim) = self.claim_next() else {
            return Ok(None);
        };
        let fetched = self.fetch(&claim);
        fetched
            .map(Some)
            .map_err(|failure| Error::new(ErrorKind::Absent, failure.error.to_string()))
    }

    /// Fetches the first windows of a range that are missing and that nobody fetches, in one request, which nobody waits for.
    /// False where there are none.
    ///
    /// # Errors
    /// [`ErrorKind::Absent`] with what the registry says.
    pub fn bring_ahead(&self, range: &RangeInclusive<u32>) -> Result<bool> {
        let Some(claim) = self.claim_in(range) else {
            return Ok(false);
        };
        match self.try_fetch(&claim) {
            Ok(_) => Ok(true),
            Err(failure) => Err(Error::new(ErrorKind::Absent, failure.error.to_string())),
        }
    }

    /// Of a request of which so many windows were missing, and `least` at some time before: they come, but others may go
    /// as fast.
    fn check_that_more_is_here(
        &self,
        missing: usize,
        least: &mut usize,
        deadline: Option<Instant>,
    ) -> Result<()> {
        let comes_nearer = missing < *least;
        *least = missing.min(*least);
        if comes_nearer || deadline.is_none_or(|deadline| Instant::now() < deadline) {
            return Ok(());
        }
        let text = format!(
            "{}: blocks of the layer are evicted as fast as they come: give the cache more \
             (`vellum space --cache SIZE`)",
            self.lazy.dir().display()
        );
        Err(Error::new(ErrorKind::Absent, text))
    }

    /// Waits until somebody has fetched something, or has failed.
    fn wait_for_others(&self, missing: &[u32], deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        // It may have come, or failed, before we had the lock.
        if self.first_missing(missing).is_none() || state.free(missing).next().is_some() {
            return Ok(());
        }
        self.changed.wait_for(&mut state, LOOK);
        let is_over = |more| deadline.is_some_and(|deadline| Instant::now() >= deadline + more);
        if is_over(ATTEMPT) || is_over(LOOK) && state.error.is_some() {
            let why = state.error.clone();
            let text = why.unwrap_or_else(|| "blocks of the layer do not come".to_owned());
            return Err(Error::new(ErrorKind::Absent, text));
        }
        Ok(())
    }

    /// The first of those windows that is not here yet.
    fn first_missing(&self, windows: &[u32]) -> Option<u32> {
        let mut windows = windows.iter().copied();
        windows.find(|window| !self.lazy.is_here(*window))
    }

    /// Waits until a hot pack has brought something, if it brings the first of those windows that is missing soon.
    fn waited_for_pack(&self, missing: &[u32]) -> bool {
        let mut state = self.state.lock();
        let first = self.first_missing(missing);
        let brings = first.is_some_and(|first| state.comes_soon(self.layer, first));
        if brings {
            self.changed.wait_for(&mut state, LOOK);
        }
        brings
    }

    /// From now on a pack may bring windows.
    pub fn expect(&self, pack: &Arc<Coming>) {
        self.state.lock().packs.push(Arc::clone(pack));
    }

    /// A pack brings nothing more.
    pub fn expect_no_more(&self, pack: &Arc<Coming>) {
        let mut state = self.state.lock();
        state.packs.retain(|one| !Arc::ptr_eq(one, pack));
        self.changed.notify_all();
    }

    /// Whether a window is here.
    pub fn has(&self, window: u32) -> bool {
        self.lazy.is_here(window)
    }

    /// Puts what a hot pack has for a window where it is read, unless it is here or on its way. It is checked as what comes by
    /// itself.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is not the window's; as [`LazyLayer::put`].
    pub fn put_hot(&self, number: u32, stored: &[u8], reader: &mut ChunkReader) -> Result<()> {
        let Some(window) = self.windows.get(&number) else {
            let text = format!(
                "the table of the layer {} has no window {number}",
                self.layer
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        let claim = {
            let mut state = self.state.lock();
            if state.on_their_way.contains(&number) || self.lazy.is_here(number) {
                return Ok(());
            }
            self.take(&mut state, vec![number])
        };
        let put = self.put(window, reader.blocks(window, stored)?);
        drop(claim);
        match put {
            // It comes when it is read.
            Err(_) if self.is_retired() => Ok(()),
            other => other,
        }
    }

    /// As [`Incoming::try_fetch`], and notes for those who ask why nothing comes what failed, if it did.
    fn fetch(&self, claim: &Claim<'_>) -> Result<u64, Failure> {
        let fetched = self.try_fetch(claim);
        let failed = fetched.as_ref().err();
        self.state.lock().error = failed.map(|failure| failure.error.to_string());
        fetched
    }

    /// Fetches windows whose chunks lie next to each other, checks them and puts them where they are read.
    /// Returns how many bytes came.
    fn try_fetch(&self, claim: &Claim<'_>) -> Result<u64, Failure> {
        let windows: Vec<&Window> = claim
            .windows
            .iter()
            .filter_map(|one| self.windows.get(one))
            .collect();
        let (Some(first), Some(last)) = (windows.first(), windows.last()) else {
            let text = "windows that the layer's table does not have";
            return Err(Error::new(ErrorKind::Corrupt, text).into());
        };
        let stored = {
            let _taken = self.limit.take();
            self.ranges.get(&self.data, stored_at(first, last))?
        };
        let mut reader = ChunkReader::new()?;
        let mut rest = &stored[..];
        for window in windows {
            let (chunk, behind) = rest.split_at(window.chunk.len as usize);
            rest = behind;
            let blocks = checked(&mut reader, window, chunk, &self.data);
            let blocks =
                blocks.inspect_err(|why| self.ranges.distrust(&self.data, &stored, why))?;
            self.put(window, blocks)?;
        }
        Ok(stored.len() as u64)
    }
}
