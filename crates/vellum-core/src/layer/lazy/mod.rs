//! A lazy layer, whose blocks are somewhere else until they are wanted. format.md, section 8; lazy.md.
//!
//! Here is what readers know of one; [`wait`] is how they wait for blocks, [`LazyLayer`] is for the one process that
//! brings them.

mod evict;
mod have;
mod incoming;
mod sums;
mod wait;

pub(super) use have::HAVE_FILE;
pub(super) use incoming::finish;
pub use incoming::{Completion, LazyContent, LazyLayer};
pub(super) use sums::SUMS_FILE;
pub(crate) use wait::once_here;
pub use wait::{Fetch, fetch_by};
pub(super) use wait::{heal, want};

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use have::{HaveHeader, WindowSet};
use sums::Sums;
use vellum_base::block::{Block, Span, WindowPower};
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, StorageFile};

use super::header::Header;

/// What a reader knows of a lazy layer.
pub(super) struct Lazy {
    dir: PathBuf,
    have: HaveHeader,
    file: Arc<dyn StorageFile>,
    /// None of a layer of which nothing is evicted.
    sums: Option<Sums>,
    /// The windows that are here: as of `epoch`, with those that came since.
    here: Vec<AtomicU64>,
    /// How often blocks had been evicted when `here` was read.
    epoch: AtomicU64,
    /// The store can be written: reads are noted.
    can_write: bool,
    /// See [`sums::Turns`].
    laps: AtomicU64,
    /// The read that was noted last: the lap in the high half, the window in the low one.
    noted: AtomicU64,
    /// Held by whoever changes what is here, and `epoch`. The set is there to be read into.
    changing: Mutex<WindowSet>,
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Lazy {
    /// Reads what is known to be here.
    ///
    /// # Errors
    /// As the header of `have`, and that of `sums`.
    pub fn open(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Arc<Self>> {
        let path = dir.join(HAVE_FILE);
        let opened = storage.open(&path, OpenMode::Read);
        let file = opened.context(|| format!("cannot open {}", path.display()))?;
        // Before the windows are read: what is evicted afterwards is another epoch's.
        let (have, _) = have::read(storage, dir, header)?;
        let can_write = !storage.is_read_only(dir);
        let mode = match can_write {
            true => OpenMode::Write,
            false => OpenMode::Read,
        };
        let sums = || Sums::open(storage, dir, header, mode);
        let sums = have.checked.then(sums).transpose()?;
        let turns = sums.as_ref().map(Sums::turns).transpose()?;
        let (_, here) = have::read(storage, dir, header)?;
        Ok(Arc::new(Lazy {
            dir: dir.to_owned(),
            have,
            file,
            sums,
            here: here.words().iter().copied().map(AtomicU64::new).collect(),
            epoch: AtomicU64::new(turns.map_or(0, |turns| turns.evictions)),
            can_write,
            laps: AtomicU64::new(turns.map_or(0, |turns| turns.laps)),
            noted: AtomicU64::new(0),
            changing: Mutex::new(here),
        }))
    }

    pub fn power(&self) -> WindowPower {
        self.have.power
    }

    /// Whether blocks that are here have checksums.
    pub fn is_checked(&self) -> bool {
        self.sums.is_some()
    }

    /// The first of these blocks, which are here, that has another checksum than it had when it came.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn first_wrong(&self, span: Span, bytes: &[u8]) -> Result<Option<Block>> {
        let sums = self.sums.as_ref();
        sums.map_or(Ok(None), |sums| sums.first_wrong(span, bytes))
    }

    /// How often blocks have been evicted. What is known to be here is what is here as of then: whoever reads blocks, and
    /// finds the same number afterwards, has read none that were evicted meanwhile.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn epoch(&self) -> Result<u64> {
        let Some(sums) = &self.sums else { return Ok(0) };
        let turns = sums.turns()?;
        self.laps.store(turns.laps, Ordering::Relaxed);
        if self.epoch.load(Ordering::Acquire) == turns.evictions {
            return Ok(turns.evictions);
        }
        let mut set = self.changing.lock();
        // Before the windows are read, as at the start.
        let now = sums.turns()?.evictions;
        if self.known_as_of() == now {
            // Another thread has read them meanwhile.
            return Ok(now);
        }
        have::read_again(&*self.file, &mut set)
            .context(|| format!("cannot read {}", self.dir.display()))?;
        for (word, read) in self.here.iter().zip(set.words()) {
            word.store(*read, Ordering::Release);
        }
        self.epoch.store(now, Ordering::Release);
        Ok(now)
    }

    fn is_here(&self, window: u32) -> bool {
        let word = self.here.get(window as usize / 64);
        // Acquire: what was fetched was written before the bit.
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (window % 64) & 1 == 1)
    }

    /// The windows of data blocks that are not here: the first to the last of them.
    pub fn missing(&self, span: Span) -> Option<Range<u32>> {
        if span.is_empty() {
            return None;
        }
        let last = self.power().window_of(Block::new(span.end().get() - 1));
        let mut windows = self.power().window_of(span.start())..=last;
        let first = windows.find(|window| !self.is_here(*window))?;
        let last = windows.rfind(|window| !self.is_here(*window));
        Some(first..last.unwrap_or(first) + 1)
    }

    /// Notes that these blocks were read, where somebody wants to know.
    pub fn note_read(&self, span: Span) {
        let laps = self.laps.load(Ordering::Relaxed);
        let (true, true, Some(sums)) = (laps != 0, self.can_write, &self.sums) else {
            return;
        };
        let last = Block::new(span.end().get() - 1);
        for window in self.power().window_of(span.start())..=self.power().window_of(last) {
            let noted = laps << 32 | u64::from(window);
            if self.noted.swap(noted, Ordering::Relaxed) == noted {
                continue;
            }
            if let Err(error) = sums.note_read(window) {
                // It is evicted the sooner.
                tracing::debug!("a read is not noted: {error}");
            }
        }
    }

    /// The epoch of what is known, which whoever asks for windows says when they have come.
    fn known_as_of(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Windows that were asked for in that epoch have come.
    fn note(&self, windows: Range<u32>, epoch: u64) {
        let _changing = self.changing.lock();
        if self.known_as_of() != epoch {
            // They may have been evicted since, and that is known already.
            return;
        }
        for window in windows {
            if let Some(word) = self.here.get(window as usize / 64) {
                word.fetch_or(1 << (window % 64), Ordering::Release);
            }
        }
    }
}
