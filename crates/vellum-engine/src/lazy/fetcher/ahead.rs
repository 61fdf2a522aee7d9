//! What is likely to be read next comes although nobody waits for it. docs/lazy.md, "What comes with a read".

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::{Fetcher, PAUSE};
use vellum_base::error::Result;

/// Pieces that are wanted at a time: of more the oldest are given up.
const PIECES: usize = 16;

/// A layer, and windows of it.
type Piece = (Uuid, RangeInclusive<u32>);

/// What is to come.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    queue: Mutex<VecDeque<Piece>>,
    more: Condvar,
}

impl Ahead {
    /// Has windows of a layer come, before those that were asked for earlier.
    pub fn push(&self, layer: Uuid, windows: RangeInclusive<u32>) {
        let piece = (layer, windows);
        let mut queue = self.queue.lock();
        if piece.1.is_empty() || queue.contains(&piece) {
            return;
        }
        if queue.len() == PIECES {
            queue.pop_front();
        }
        queue.push_back(piece);
        self.more.notify_one();
    }

    /// Brings what is to come.
    pub fn work(&self, fetcher: &Fetcher) {
        while !fetcher.is_stopped() {
            // Whoever reads it tries for as long as they want it.
            if let Some(Err(error)) = self.bring_next(fetcher) {
                tracing::debug!("ahead of who reads: {error}");
            }
        }
    }

    /// Brings the piece that was asked for last; `None` where there is none for a while.
    pub fn bring_next(&self, fetcher: &Fetcher) -> Option<Result<()>> {
        let (layer, windows) = {
            let mut queue = self.queue.lock();
            if queue.is_empty() {
                self.more.wait_for(&mut queue, PAUSE);
            }
            queue.pop_back()?
        };
        Some(bring(fetcher, layer, &windows))
    }
}

fn bring(fetcher: &Fetcher, layer: Uuid, windows: &RangeInclusive<u32>) -> Result<()> {
    let Some(open) = fetcher.layer(layer)? else {
        return Ok(());
    };
    while !fetcher.is_stopped() && open.bring_ahead(windows)? {}
    Ok(())
}
