//! How whoever reads a layer waits for blocks that are somewhere else: those of a lazy layer, and those that the disk lost.

use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::Lazy;
use vellum_base::block::Span;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::{about_to_wait, refuses_to_stall, waits};

/// Brings blocks of lazy layers to where they are read.
pub trait Fetch: Send + Sync {
    /// Returns when all blocks of these windows of the layer in `dir` are in its data files. The windows hold data.
    ///
    /// # Errors
    /// What the caller's client is told: [`ErrorKind::Absent`] where they cannot be had.
    fn fetch(&self, dir: &Path, windows: Range<u32>) -> Result<()>;

    /// Brings data blocks of the sealed or lazy layer in `dir`, which lie in one extent, once more, and returns when they are
    /// as they should be; false where nobody has them.
    ///
    /// # Errors
    /// Why they could not be had, or could not be written.
    fn heal(&self, dir: &Path, blocks: Span) -> Result<bool>;
}

static FETCH: OnceLock<Box<dyn Fetch>> = OnceLock::new();

/// From now on whoever reads layers in this process waits for `fetch`. Only the first call counts.
pub fn fetch_by(fetch: Box<dyn Fetch>) {
    let _ = FETCH.set(fetch);
}

/// What a request needs before it can be answered.
#[derive(Debug, Clone)]
enum Wanted {
    /// Windows of a lazy layer.
    Windows {
        lazy: Arc<Lazy>,
        windows: Range<u32>,
    },
    /// Blocks of the layer in `dir` that the disk lost or changed, and what the read said of that.
    Damaged {
        dir: PathBuf,
        blocks: Span,
        damage: Error,
    },
}

impl Wanted {
    /// Waits until it is here.
    fn fetch(&self) -> Result<()> {
        match self {
            Wanted::Windows { lazy, windows } => fetch(lazy, windows),
            Wanted::Damaged {
                dir,
                blocks,
                damage,
            } => mend(dir, *blocks, damage),
        }
    }

    /// Whether the blocks were damaged that `other` found damaged.
    fn is_same_damage(&self, other: &Wanted) -> bool {
        match (self, other) {
            (
                Wanted::Damaged { dir, blocks, .. },
                Wanted::Damaged {
                    dir: d, blocks: b, ..
                },
            ) => dir == d && blocks == b,
            _ => false,
        }
    }
}

fn fetch(lazy: &Lazy, windows: &Range<u32>) -> Result<()> {
    let absent = |what: &str| {
        let text = format!(
            "{}: blocks of the layer are not here{what}",
            lazy.dir.display()
        );
        Err(Error::new(ErrorKind::Absent, text))
    };
    if refuses_to_stall() {
        return absent(" yet");
    }
    let Some(fetch) = FETCH.get() else {
        return absent(", and this program does not fetch them: `vellum complete IMAGE` does");
    };
    about_to_wait();
    let _waits = waits();
    let epoch = lazy.known_as_of();
    fetch.fetch(&lazy.dir, windows.clone())?;
    lazy.note(windows.clone(), epoch);
    Ok(())
}

fn mend(dir: &Path, blocks: Span, damage: &Error) -> Result<()> {
    let Some(fetch) = FETCH.get() else {
        return Err(damage.clone());
    };
    about_to_wait();
    let _waits = waits();
    match fetch.heal(dir, blocks) {
        Ok(true) => Ok(()),
        Ok(false) => Err(damage.clone()),
        Err(error) => Err(damage
            .clone()
            .context(format!("it could not be fetched again ({error})"))),
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
pub(in crate::layer) fn want(lazy: &Arc<Lazy>, windows: Range<u32>) -> Result<()> {
    now_or_later(Wanted::Windows {
        lazy: Arc::clone(lazy),
        windows,
    })
}

/// Has blocks brought again of which a read said `damage`, or puts that off where the caller holds locks.
///
/// # Errors
/// `damage`, where they cannot be had; [`ErrorKind::Absent`], which [`once_here`] sees to.
pub(in crate::layer) fn heal(dir: &Path, blocks: Span, damage: Error) -> Result<()> {
    now_or_later(Wanted::Damaged {
        dir: dir.to_owned(),
        blocks,
        damage,
    })
}

fn now_or_later(wanted: Wanted) -> Result<()> {
    let now = PUT_OFF.with_borrow_mut(|slot| match slot {
        Some(slot) => {
            *slot = Some(wanted);
            None
        }
        None => Some(wanted),
    });
    match now {
        Some(wanted) => wanted.fetch(),
        None => Err(Error::new(
            ErrorKind::Absent,
            "blocks that are on their way",
        )),
    }
}

/// Does `work`, which holds locks and may read layers: where it needs blocks that are not here it fails, lets go of its
/// locks, and is done again once they are. It must bear that.
///
/// # Errors
/// Those of `work`, and [`ErrorKind::Absent`] for blocks that cannot be had.
pub(crate) fn once_here<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    if PUT_OFF.with_borrow(Option::is_some) {
        // Within such work.
        return work();
    }
    let mut last: Option<Wanted> = None;
    loop {
        PUT_OFF.with_borrow_mut(|slot| *slot = Some(None));
        let end = PutOff;
        let result = work();
        let wanted = end.take();
        let wanted = match (&result, wanted) {
            (Err(error), Some(wanted)) if error.kind() == ErrorKind::Absent => wanted,
            _ => return result,
        };
        if let (Wanted::Damaged { damage, .. }, Some(last)) = (&wanted, &last)
            && wanted.is_same_damage(last)
        {
            // The disk does not keep what is written.
            return Err(damage.clone());
        }
        wanted.fetch()?;
        last = Some(wanted);
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
