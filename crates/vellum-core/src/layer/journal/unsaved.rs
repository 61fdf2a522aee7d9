//! Map changes that the next checkpoint has to add to the file `map`.

use crate::layer::table::MapExtent;

/// More changes than these (2 MiB) are not kept for the next checkpoint, which then replaces the map:
/// 512 MiB were written with them at least.
const MOST_UNSAVED: usize = 128 << 10;
/// So many are made room for at once: doubling would take up to twice what is needed.
const ROOM: usize = 16 << 10;

/// Map changes in records that no checkpoint contains yet, in order.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    changes: Vec<MapExtent>,
    too_many: bool,
}

impl Unsaved {
    /// A record holds these.
    pub(super) fn add(&mut self, changes: &[MapExtent]) {
        self.too_many |= self.changes.len() + changes.len() > MOST_UNSAVED;
        if self.too_many {
            self.changes = Vec::new();
        } else {
            if self.changes.capacity() - self.changes.len() < changes.len() {
                self.changes.reserve_exact(changes.len().max(ROOM));
            }
            self.changes.extend_from_slice(changes);
        }
    }

    /// Those so far, for a checkpoint; `None` where they were too many to be kept.
    pub(super) fn take(&mut self) -> Option<Vec<MapExtent>> {
        let taken = std::mem::take(self);
        (!taken.too_many).then_some(taken.changes)
    }
}
