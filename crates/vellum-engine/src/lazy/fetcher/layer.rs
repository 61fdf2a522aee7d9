//! A lazy layer whose blocks come: who wants what, and who is at it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use uuid::Uuid;

use super::super::stall::{Pauses, Stall, pause_after};
use super::super::{Remote, Waiting};
use super::cache::Cache;
use super::coming::{Coming, PATIENCE};
use vellum_base::block::{Block, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::{Completion, LazyLayer};
use vellum_registry::artifact::{ChunkReader, Window};
use vellum_registry::{BlobReader, Failure, Seen};
use vellum_store::Store;

/// Requests to registries that are on their way at once.
const AT_ONCE: usize = 16;
/// Stored bytes that one request asks for, at most, but for a single window.
const MAX_REQUEST: u64 = 4 << 20;
/// As that, of one that nobody waits for: whoever wants something meanwhile has to share the link with it.
const REQUEST_IN_BACKGROUND: u64 = 1 << 20;
/// Windows that are fetched ahead of one who reads in order, at most.
const MAX_AHEAD: u32 = 32;
/// How often one who waits for another's fetch looks whether it has waited for too long.
const LOOK: Duration = Duration::from_millis(200);

/// How many requests are on their way, of all layers, and what those before have shown of registries.
#[derive(Debug, Default)]
pub(super) struct Limit {
    pub seen: Arc<Seen>,
    taken: Mutex<usize>,
    free: Condvar,
}

impl Limit {
    pub fn take(&self) -> Taken<'_> {
        let mut taken = self.taken.lock();
        while *taken >= AT_ONCE {
            self.free.wait(&mut taken);
        }
        *taken += 1;
        Taken(self)
    }
}

pub(super) struct Taken<'a>(&'a Limit);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.free.notify_one();
    }
}

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
    /// Somebody wants all of it: nothing of it is evicted.
    is_kept: AtomicBool,
    /// The layer is whole, or is opened anew. Held for reading by whoever changes something of it.
    retired: RwLock<bool>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Windows that somebody fetches.
    on_their_way: BTreeSet<u32>,
    /// When those who wait began, by the order in which they came.
    waiting: BTreeMap<u64, Instant>,
    came: u64,
    error: Option<String>,
    /// Where one who reads in order reads next, and how much is fetched for them.
    next: u32,
    ahead: u32,
    /// Hot packs that may bring windows.
    packs: Vec<Arc<Coming>>,
}

impl State {
    /// The first of those windows that nobody fetches.
    fn first_free(&self, missing: &[u32]) -> Option<u32> {
        let free = |window: &&u32| !self.on_their_way.contains(window);
        missing.iter().find(free).copied()
    }

    /// Whether a hot pack is about to bring a window.
    fn comes_soon(&self, layer: Uuid, window: u32) -> bool {
        let mut packs = self.packs.iter();
        packs.any(|pack| pack.brings_soon(layer, window))
    }
}

/// One who waits.
struct Waiter<'a> {
    layer: &'a Incoming,
    number: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.layer.state.lock().waiting.remove(&self.number);
    }
}

/// Windows that this thread fetches; whoever waits for them looks again when it is dropped.
struct Claim<'a> {
    layer: &'a Incoming,
    windows: Vec<u32>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.layer.state.lock();
        for window in &self.windows {
            state.on_their_way.remove(window);
        }
        self.layer.changed.notify_all();
    }
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
        (limit, cache): (&Arc<Limit>, &Arc<Cache>),
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

    /// Whether windows of it may be evicted.
    pub fn is_evictable(&self) -> bool {
        !self.is_kept.load(Ordering::Acquire)
    }

    /// Looks whether somebody wants all of it by now.
    ///
    /// # Errors
    /// As [`Remote::read`].
    pub fn look_again(&self, store: &Store) -> Result<()> {
        let remote = Remote::read(&**store.storage(), self.lazy.dir())?;
        if remote.is_some_and(|remote| remote.is_kept()) {
            self.is_kept.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The windows that are here, and how many bytes each takes.
    pub fn held(&self) -> Vec<(u32, u64)> {
        let here = self.windows.iter();
        here.filter(|(number, _)| self.lazy.is_here(**number))
            .map(|(number, window)| (*number, bytes_of(window)))
            .collect()
    }

    /// Has readers note what they read.
    pub fn note_reads(&self) {
        if let Err(error) = self.lazy.note_reads() {
            tracing::warn!("reads of a lazy layer are not noted: {error}");
        }
    }

    /// Gives the space back of what is not here. Nobody fetches yet.
    pub fn give_back_unknown(&self) {
        if let Err(error) = self.lazy.evict_unknown() {
            tracing::warn!("what a lazy layer takes that is not here stays: {error}");
        }
    }

    /// Evicts those of these windows that were not read lately and that nobody is at. Returns the others.
    pub fn evict(&self, windows: &[u32]) -> BTreeSet<u32> {
        // Without waiting: whoever retires it may hold what others wait for.
        let retired = self.retired.try_read();
        if retired.as_deref() != Some(&false) {
            return windows.iter().copied().collect();
        }
        let mut stay = self.lazy.take_reads(windows);
        let claim = {
            let mut state = self.state.lock();
            let busy = |window: &&u32| state.on_their_way.contains(window);
            stay.extend(windows.iter().filter(busy));
            let go = windows.iter().filter(|window| !stay.contains(window));
            let go: Vec<u32> = go.copied().collect();
            self.take(&mut state, go)
        };
        if claim.windows.is_empty() {
            return stay;
        }
        // Somebody may want all of it by now.
        let evicted = match self.is_evictable() {
            true => self.lazy.evict(&claim.windows),
            false => Ok(false),
        };
        let evicted = evicted.unwrap_or_else(|error| {
            tracing::error!("windows of a lazy layer are not evicted: {error}");
            false
        });
        if !evicted {
            // They take their space.
            stay.extend(&claim.windows);
        }
        stay
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

    /// Fetches these data blocks again, as far as the disk lost or changed them; false where nobody can tell.
    ///
    /// # Errors
    /// As [`Incoming::want`]; [`ErrorKind::Io`] where the disk does not keep them.
    pub fn heal(&self, damaged: Span) -> Result<bool> {
        if !self.lazy.is_checked() {
            return Ok(false);
        }
        let sound = |spans: &[Span]| spans.iter().all(|span| self.lazy.is_sound(*span));
        let mut healed = Vec::new();
        let Some(near) = self.windows_of(damaged) else {
            return Ok(true);
        };
        for (number, window) in self.windows.range(near) {
            let of_it = window.blocks.iter();
            let wanted: Vec<Span> = of_it.filter_map(|one| one.intersection(damaged)).collect();
            if wanted.is_empty() || self.lazy.is_here(*number) && sound(&wanted) {
                continue;
            }
            self.lazy.lost(*number);
            self.want(*number..*number + 1)?;
            healed.push((*number, wanted));
        }
        if healed.is_empty() {
            return Ok(true);
        }
        {
            let _in_use = self.in_use()?;
            self.lazy.sync_to_disk()?;
        }
        let dir = self.lazy.dir().display();
        // What was evicted meanwhile reads as zeros, or came once more behind our back.
        let kept = |(number, spans): &(u32, Vec<Span>)| {
            sound(spans) || !self.lazy.is_here(*number) || sound(spans)
        };
        if !healed.iter().all(kept) {
            let text = format!("{dir}: the disk does not keep what is written there: replace it");
            return Err(Error::new(ErrorKind::Io, text));
        }
        let windows = healed.len();
        tracing::warn!(
            "{dir}: {windows} window(s) that the disk had lost or changed were fetched again"
        );
        Ok(true)
    }

    /// The windows that may have blocks of a span; `None` where the table has none.
    fn windows_of(&self, span: Span) -> Option<RangeInclusive<u32>> {
        let power = self.lazy.power();
        let (last, _) = self.windows.last_key_value()?;
        let known = Span::between(Block::FIRST, power.span(*last).end()).intersection(span)?;
        let last = Block::new(known.end().get() - 1);
        Some(power.window_of(known.start())..=power.window_of(last))
    }

    fn wait(&self) -> Waiter<'_> {
        let mut state = self.state.lock();
        let number = state.came;
        state.came += 1;
        state.waiting.insert(number, Instant::now());
        Waiter {
            layer: self,
            number,
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
        if self.first_missing(missing).is_none() || state.first_free(missing).is_some() {
            return Ok(());
        }
        self.changed.wait_for(&mut state, LOOK);
        if deadline.is_some_and(|deadline| Instant::now() >= deadline + LOOK) {
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

    /// Takes the first of those windows that nobody fetches, with what follows it and can come in the same
    /// request; `None` where others fetch all of them.
    fn claim(&self, missing: &[u32]) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        let first = state.first_free(missing)?;
        let last = *missing.last()?;
        state.ahead = match state.next == first {
            true => (state.ahead * 2).clamp(1, MAX_AHEAD),
            false => 0,
        };
        let end = last.saturating_add(state.ahead);
        let windows = self.neighbours(&state, first..=end, MAX_REQUEST);
        state.next = windows.last().map_or(first, |last| last + 1);
        Some(self.take(&mut state, windows))
    }

    /// As [`Incoming::claim`], for nobody who reads.
    fn claim_next(&self) -> Option<Claim<'_>> {
        let missing = self.lazy.missing();
        let mut state = self.state.lock();
        let first = state.first_free(&missing)?;
        let windows = self.neighbours(&state, first..=u32::MAX, REQUEST_IN_BACKGROUND);
        Some(self.take(&mut state, windows))
    }

    /// The first of those windows, with what follows it and fits in a request of `most` bytes.
    fn neighbours(&self, state: &State, range: RangeInclusive<u32>, most: u64) -> Vec<u32> {
        let mut windows = Vec::new();
        let mut bytes = 0;
        for (number, window) in self.windows.range(range) {
            // Chunks of neighbours lie next to each other; one that is here, or on its way, ends the request.
            bytes += u64::from(window.chunk.len);
            let more = windows.is_empty() || bytes <= most;
            if !more || state.on_their_way.contains(number) || self.lazy.is_here(*number) {
                break;
            }
            if !windows.is_empty() && state.comes_soon(self.layer, *number) {
                break;
            }
            windows.push(*number);
        }
        windows
    }

    fn take(&self, state: &mut State, windows: Vec<u32>) -> Claim<'_> {
        state.on_their_way.extend(&windows);
        Claim {
            layer: self,
            windows,
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
