//! A lazy layer, whose blocks are somewhere else until they are wanted. format.md, section 8; lazy.md.
//!
//! Here is what readers know of one, and how they wait; [`LazyLayer`] is for the one process that brings blocks.

mod have;
mod incoming;

pub(super) use have::HAVE_FILE;
pub(super) use incoming::finish;
pub use incoming::{Completion, LazyContent, LazyLayer};

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use have::HaveHeader;
use vellum_base::block::{Block, Span, WindowPower};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::{Storage, about_to_wait, refuses_to_wait, waits};

use super::header::Header;

/// Brings blocks of lazy layers to where they are read.
pub trait Fetch: Send + Sync {
    /// Returns when all blocks of these windows of the layer in `dir` are in its data files. The windows hold data.
    ///
    /// # Errors
    /// What the caller's client is told: [`ErrorKind::Absent`] where they cannot be had.
    fn fetch(&self, dir: &Path, windows: Range<u32>) -> Result<()>;
}

static FETCH: OnceLock<Box<dyn Fetch>> = OnceLock::new();

/// From now on whoever reads lazy layers in this process waits for `fetch`. Only the first call counts.
pub fn fetch_by(fetch: Box<dyn Fetch>) {
    let _ = FETCH.set(fetch);
}

/// What a reader knows of a lazy layer.
pub(super) struct Lazy {
    dir: PathBuf,
    have: HaveHeader,
    /// The windows that are here: bits are only ever set.
    here: Vec<AtomicU64>,
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
    /// As the header of `have`.
    pub fn open(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Arc<Self>> {
        let (have, here) = have::read(storage, dir, header)?;
        Ok(Arc::new(Lazy {
            dir: dir.to_owned(),
            have,
            here: here.words().iter().copied().map(AtomicU64::new).collect(),
        }))
    }

    pub fn power(&self) -> WindowPower {
        self.have.power
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

    fn note(&self, windows: Range<u32>) {
        for window in windows {
            if let Some(word) = self.here.get(window as usize / 64) {
                word.fetch_or(1 << (window % 64), Ordering::Release);
            }
        }
    }
}

/// Windows of a lazy layer that a request needs.
#[derive(Debug, Clone)]
struct Wanted {
    lazy: Arc<Lazy>,
    windows: Range<u32>,
}

impl Wanted {
    /// Waits until they are here.
    fn fetch(self) -> Result<()> {
        let absent = |what: &str| {
            let text = format!(
                "{}: blocks of the layer are not here{what}",
                self.lazy.dir.display()
            );
            Err(Error::new(ErrorKind::Absent, text))
        };
        if refuses_to_wait() {
            return absent(" yet");
        }
        let Some(fetch) = FETCH.get() else {
            return absent(", and this program does not fetch them: `vellum complete IMAGE` does");
        };
        about_to_wait();
        let _waits = waits();
        fetch.fetch(&self.lazy.dir, self.windows.clone())?;
        self.lazy.note(self.windows);
        Ok(())
    }
}

thread_local! {
    /// Of a request that holds locks: what it would have waited for.
    static PUT_OFF: RefCell<Option<Option<Wanted>>> = const { RefCell::new(None) };
}

/// Has windows fetched that a reader needs, or puts that off where the caller holds locks.
///
/// # Errors
/// [`ErrorKind::Absent`], which [`once_here`] sees to; as [`Fetch::fetch`].
pub(super) fn want(lazy: &Arc<Lazy>, windows: Range<u32>) -> Result<()> {
    let wanted = Wanted {
        lazy: Arc::clone(lazy),
        windows,
    };
    let put_off = PUT_OFF.with_borrow_mut(|slot| match slot {
        Some(slot) => {
            *slot = Some(wanted.clone());
            true
        }
        None => false,
    });
    match put_off {
        true => Err(Error::new(
            ErrorKind::Absent,
            "blocks that are on their way",
        )),
        false => wanted.fetch(),
    }
}

/// Does `work`, which holds locks and may read lazy layers: where it needs blocks that are not here it fails, lets go of its
/// locks, and is done again once they are. It must bear that.
///
/// # Errors
/// Those of `work`, and [`ErrorKind::Absent`] for blocks that cannot be had.
pub(crate) fn once_here<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    if PUT_OFF.with_borrow(Option::is_some) {
        // Within such work.
        return work();
    }
    loop {
        PUT_OFF.with_borrow_mut(|slot| *slot = Some(None));
        let end = PutOff;
        let result = work();
        let wanted = end.take();
        match (&result, wanted) {
            (Err(error), Some(wanted)) if error.kind() == ErrorKind::Absent => wanted.fetch()?,
            _ => return result,
        }
    }
}

/// While a thread puts waiting off; ends also when its work panics.
struct PutOff;

impl PutOff {
    fn take(self) -> Option<Wanted> {
        PUT_OFF.with_borrow_mut(Option::take).flatten()
    }
}

impl Drop for PutOff {
    fn drop(&mut self) {
        PUT_OFF.with_borrow_mut(|slot| *slot = None);
    }
}
