//! Space ahead of first touches: where writes make many blocks of a region data for the first time, the
//! host is asked once for the space of the region rather than for each block. The map alone says what
//! is ours, so a preallocated block that was never written stays the parent's. docs/durability.md,
//! "Space ahead of first touches".

mod windows;

use std::time::Duration;

use self::windows::WINDOW;
pub(super) use self::windows::{Want, Windows};
use super::range_lock::RangeGuard;
use super::shared::Shared;
use vellum_base::block::{Block, BlockState, Blocks, Run, Span};
use vellum_base::error::{ErrorKind, Result};

/// After the host refused, or had little left, nothing is preallocated for so long.
const PAUSE: Duration = Duration::from_secs(10);
/// What a process before may have left is looked for from so many blocks on, beside one for so many of
/// data: the host's file system takes some for itself.
const LEFTOVER: Blocks = Blocks::new(256);
const OVERHEAD: u64 = 64;

/// Blocks that take space on the host, by what it says, beyond those of data.
pub(super) fn leftover(allocated: Result<u64>, data: Blocks) -> Blocks {
    // A host that does not tell has none to give back either.
    let Ok(allocated) = allocated else {
        return Blocks::NONE;
    };
    let beyond = Blocks::whole_in(allocated).get().saturating_sub(data.get());
    match beyond >= LEFTOVER.get() + data.get() / OVERHEAD {
        true => Blocks::new(beyond),
        false => Blocks::NONE,
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
            if let Err(error) = self.data.release(run) {
                tracing::debug!(%error, "preallocated space is not given back");
                let mut map = self.map.write();
                let left = map.preallocated().leftover() + run.len();
                map.preallocated_mut().set_leftover(left);
            }
        }
    }

    /// As [`Shared::release`], of those that nobody holds.
    fn release_free(&self, spans: Vec<Span>) {
        for span in spans {
            if let Some(_held) = self.locks.try_lock(span) {
                self.release(span);
            }
        }
    }

    /// Gives back all space that is preallocated, also what a process before left. Waits for writers,
    /// so no blocks may be held.
    pub(super) fn give_back_preallocated(&self) {
        let map = self.map.read();
        let (spans, leftover) = (map.preallocated().spans(), map.preallocated().leftover());
        drop(map);
        for span in spans {
            let _held = self.locks.lock(span);
            self.release(span);
        }
        if leftover.is_none() {
            return;
        }
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
                self.data.release(run)?;
            }
        }
        Ok(())
    }

    /// To be called now and then with no blocks held: gives preallocated space back where the host has
    /// little left.
    pub(super) fn mind_low_space(&self) {
        let none = self.map.read().preallocated().blocks().is_none();
        if !none && !self.space.has_plenty() {
            self.map.write().preallocated_mut().pause(PAUSE);
            self.give_back_preallocated();
        }
    }
}

fn not_data(runs: impl Iterator<Item = Run<BlockState>>) -> Vec<Span> {
    let runs = runs.filter(|run| run.value != BlockState::Data);
    runs.map(|run| run.span).collect()
}
