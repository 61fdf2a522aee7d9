//! Space ahead of first touches: where writes make many blocks of a region data for the first time, the
//! host is asked once for the space of the region rather than for each block. The map alone says what
//! is ours, so a preallocated block that was never written stays the parent's. docs/durability.md,
//! "Space ahead of first touches".

mod windows;

use std::path::Path;
use std::time::Duration;

use self::windows::WINDOW;
pub(super) use self::windows::{Want, Windows};
use super::journal::has_journal;
use super::live::Left;
use super::range_lock::RangeGuard;
use super::shared::Shared;
use super::space::{Claim, RESERVE_FILE};
use vellum_base::block::{Block, BlockState, Blocks, Run, Span};
use vellum_base::error::{ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;

/// After the host refused, or had little left, nothing is preallocated for so long.
const PAUSE: Duration = Duration::from_secs(10);
/// In a layer that was closed in order, what may have been left all the same is looked for from so many
/// blocks on, beside one for so many of data: the host's file system takes some for itself.
const LEFTOVER: Blocks = Blocks::new(256);
const OVERHEAD: u64 = 64;

/// Whether the process before closed the layer, as far as its files tell before anything is recovered.
///
/// # Errors
/// Where the host cannot look.
pub(super) fn was_closed(storage: &dyn Storage, dir: &Path, left: &Left) -> Result<bool> {
    let reserve = dir.join(RESERVE_FILE);
    let is_reserved = || {
        let found = storage.exists(&reserve);
        found.context(|| format!("cannot look at {}", reserve.display()))
    };
    Ok(*left == Left::Nothing && !has_journal(storage, dir)? && !is_reserved()?)
}

/// Blocks that take space on the host, by what it says, beyond those of data; in a layer that was `closed`
/// none where the host's file system may have them for itself.
pub(super) fn leftover(allocated: Result<u64>, data: Blocks, closed: bool) -> Blocks {
    // A host that does not tell has none to give back either.
    let Ok(allocated) = allocated else {
        return Blocks::NONE;
    };
    let beyond = Blocks::whole_in(allocated).get().saturating_sub(data.get());
    match closed && beyond < LEFTOVER.get() + data.get() / OVERHEAD {
        true => Blocks::NONE,
        false => Blocks::new(beyond),
    }
}

/// The parts of `span` that are not within `other`.
fn outside(span: Span, other: Span) -> [Option<Span>; 2] {
    let part = |start: Block, end: Block| (start < end).then(|| Span::between(start, end));
    let before = part(span.start(), span.end().min(other.start()));
    let behind = part(span.start().max(other.end()), span.end());
    [before, behind]
}

impl Shared {
    /// Whether a write to `span` makes blocks data, and what it is to do first.
    pub(super) fn before_write(&self, span: Span) -> (bool, Want) {
        let map = self.map.read();
        if map.index().first_run(span) == Run::new(span, BlockState::Data) {
            return (false, Want::Nothing);
        }
        (true, map.preallocated().wanted(span, map.data_blocks()))
    }

    /// Does so, with the blocks of the write held. A hint: whatever fails here, the write meets.
    pub(super) fn prepare_write(&self, held: &RangeGuard<'_>, want: Want) {
        match want {
            Want::Nothing => {}
            Want::Space(whole) => self.preallocate(held, whole),
            Want::Sweep => {
                let idle = self.map.write().preallocated_mut().sweep();
                self.release_free(idle);
            }
        }
    }

    fn preallocate(&self, held: &RangeGuard<'_>, whole: Span) {
        let Some(whole) = whole.intersection(Span::up_to(Blocks::whole_in(self.size()))) else {
            return;
        };
        if !self.space.has_plenty() {
            let mut map = self.map.write();
            map.preallocated_mut().pause(PAUSE);
            let all = map.preallocated().spans();
            drop(map);
            return self.release_free(all);
        }
        // So that no block changes meanwhile. It must not be waited for, with others held: whoever
        // touches the window next tries again.
        let rest = outside(whole, held.span()).into_iter().flatten();
        let locks: Option<Vec<_>> = rest.map(|part| self.locks.try_lock(part)).collect();
        let Some(_locks) = locks else {
            return;
        };
        let mut map = self.map.write();
        let new = not_data(map.index().cover(whole));
        let beyond = |span: &Span| outside(*span, held.span()).into_iter().flatten();
        let more: Blocks = new.iter().flat_map(beyond).map(Span::len).sum();
        if !map.preallocated().has_room(more, map.data_blocks()) && !more.is_none() {
            return;
        }
        new.iter()
            .for_each(|span| map.preallocated_mut().add(*span));
        drop(map);
        let Err(error) = self.data.preallocate(whole) else {
            return;
        };
        tracing::debug!(%error, "space is not taken ahead");
        let mut map = self.map.write();
        match error.kind() {
            ErrorKind::Unsupported => map.preallocated_mut().give_up(),
            _ => map.preallocated_mut().pause(PAUSE),
        }
        drop(map);
        self.release(whole);
    }

    /// Gives the space of preallocated blocks back. The caller holds all of them, or nobody writes.
    fn release(&self, span: Span) {
        let taken = self.map.write().preallocated_mut().take(span);
        for run in taken {
            if let Err(error) = self.punch(run) {
                tracing::debug!(%error, "preallocated space is not given back");
                let mut map = self.map.write();
                let left = map.preallocated().leftover() + run.len();
                map.preallocated_mut().set_leftover(left);
            }
        }
    }

    /// Punches blocks that hold nothing. That may want a block of the host's own just where it has none.
    fn punch(&self, run: Span) -> Result<()> {
        let space = &self.space;
        space.within(Claim::Own, 0, || self.data.release(run))
    }

    /// As [`Shared::release`], of those that nobody holds.
    fn release_free(&self, spans: Vec<Span>) {
        for span in spans {
            if let Some(_held) = self.locks.try_lock(span) {
                self.release(span);
            }
        }
    }

    /// Gives back all space that is preallocated, also what a process before is known to have left. Waits
    /// for writers, so no blocks may be held.
    pub(super) fn give_back_preallocated(&self) {
        let spans = self.map.read().preallocated().spans();
        for span in spans {
            let _held = self.locks.lock(span);
            self.release(span);
        }
        self.give_back_leftover();
    }

    /// Gives back what a process before is known to have left.
    pub(super) fn give_back_leftover(&self) {
        if !self.map.read().preallocated().leftover().is_none() {
            self.look_for_leftover();
        }
    }

    /// Gives back what takes space and is not data, also where nothing is known of it.
    pub(super) fn look_for_leftover(&self) {
        match self.release_leftover() {
            Ok(()) => self
                .map
                .write()
                .preallocated_mut()
                .set_leftover(Blocks::NONE),
            Err(error) => tracing::debug!(%error, "space that is not needed stays taken"),
        }
    }

    /// Compares what takes space on the host with the map.
    fn release_leftover(&self) -> Result<()> {
        let mut left = Vec::new();
        self.data.visit_allocated(|span| {
            left.extend(not_data(self.map.read().index().cover(span)));
        })?;
        for span in left.into_iter().flat_map(|span| span.pieces(WINDOW)) {
            let _held = self.locks.lock(span);
            let still = not_data(self.map.read().index().cover(span));
            for run in still {
                self.punch(run)?;
            }
        }
        Ok(())
    }

    /// To be called now and then with no blocks held: gives preallocated space back where the host has
    /// little left. What it could not give back it leaves alone for a while.
    pub(super) fn mind_low_space(&self) {
        let nothing = {
            let map = self.map.read();
            let preallocated = map.preallocated();
            preallocated.blocks().is_none() || preallocated.was_given_back_within(PAUSE)
        };
        if !nothing && !self.space.has_plenty() {
            let mut map = self.map.write();
            map.preallocated_mut().pause(PAUSE);
            map.preallocated_mut().gives_back();
            drop(map);
            self.give_back_preallocated();
        }
    }

    /// To be called every few seconds with no blocks held, whether or not requests come: gives back what
    /// no write comes to, and all of it where the host has little left.
    pub(super) fn look_after_preallocated(&self) {
        if self.map.read().preallocated().may_sweep() {
            let idle = self.map.write().preallocated_mut().sweep();
            self.release_free(idle);
        }
        self.mind_low_space();
    }
}

fn not_data(runs: impl Iterator<Item = Run<BlockState>>) -> Vec<Span> {
    let runs = runs.filter(|run| run.value != BlockState::Data);
    runs.map(|run| run.span).collect()
}
