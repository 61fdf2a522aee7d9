//! Blocks of sealed layers that the disk lost or changed come again. docs/lazy.md, "Healing".

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::stall::{Pauses, Stall, pause_after};
use super::super::{Damaged, Remote};
use super::layer::{checked, stored_at};
use super::limit::Limit;
use vellum_base::block::{Block, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::Healer;
use vellum_registry::artifact::{ChunkReader, Window};
use vellum_registry::{BlobReader, Failure};
use vellum_store::Store;

/// How long a turn of another may take for one who would not wait for a registry.
const TURN: Duration = Duration::from_secs(10);

/// Heals layers: one at a time, so that those who found the same damage wait for one fetch.
#[derive(Debug, Default)]
pub(super) struct Healing(Mutex<()>);

impl Healing {
    /// Brings blocks again and writes them; false where nobody has them.
    ///
    /// # Errors
    /// [`ErrorKind::Absent`] with what the registry says; [`ErrorKind::Io`] where the disk does not keep them.
    pub fn heal(&self, store: &Store, damaged: &Damaged, limit: &Limit) -> Result<bool> {
        let deadline = Stall::of_environment().deadline();
        let turn = match deadline {
            Some(deadline) => self.0.try_lock_until(deadline.max(Instant::now() + TURN)),
            None => Some(self.0.lock()),
        };
        let Some(_turn) = turn else {
            let text = "other damaged blocks have not come yet";
            return Err(Error::new(ErrorKind::Absent, text));
        };
        let dir = store.layer_dir(damaged.layer);
        let storage = &**store.storage();
        if !Remote::is_known(&dir) {
            return Ok(false);
        }
        let Some(healer) = Healer::open(storage, &dir)? else {
            return Ok(false);
        };
        let wanted = span_of(damaged)?;
        if healer.is_sound(wanted)? {
            return Ok(true);
        }
        let Some((remote, table)) = Remote::read_with_table(store, &dir)? else {
            return Ok(false);
        };
        if table.digest != healer.digest() {
            let text = format!("{}: its table is of another layer", dir.display());
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let (reference, access) = remote.place()?;
        let source = Source {
            blob: remote.data.unwrap_or_else(String::new),
            ranges: BlobReader::open(&reference, access, &limit.seen)?,
            limit,
        };
        let mut written = Blocks::NONE;
        let is_of = |window: &Window| {
            let mut spans = window.blocks.iter();
            spans.any(|span| span.intersection(wanted).is_some())
        };
        for window in table.windows().filter(is_of) {
            written += source.put(&window, &healer, deadline)?;
        }
        healer.sync()?;
        if !healer.is_sound(wanted)? {
            let text = format!(
                "{}: the disk does not keep what is written there: replace it",
                dir.display()
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        tracing::warn!(
            "{}: {written} block(s) that the disk had lost or changed were fetched again from {reference}",
            dir.display()
        );
        Ok(true)
    }
}

/// The blocks that somebody asks for.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for what no device can have.
pub(super) fn span_of(damaged: &Damaged) -> Result<Span> {
    let wanted = Span::checked(Block::new(damaged.first), Blocks::new(damaged.count));
    wanted.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "blocks that no device can have"))
}

/// Who has a layer's blocks.
struct Source<'a> {
    blob: String,
    ranges: BlobReader,
    limit: &'a Limit,
}

impl Source<'_> {
    /// Fetches a window, however often it takes, and writes what of it is damaged.
    fn put(&self, window: &Window, healer: &Healer, deadline: Option<Instant>) -> Result<Blocks> {
        let mut pauses = Pauses::default();
        loop {
            match self.try_put(window, healer) {
                Ok(written) => return Ok(written),
                Err(failure) => pause_after(&failure, &mut pauses, deadline)?,
            }
        }
    }

    fn try_put(&self, window: &Window, healer: &Healer) -> Result<Blocks, Failure> {
        let stored = {
            let _taken = self.limit.take();
            self.ranges.get(&self.blob, stored_at(window, window))?
        };
        let mut reader = ChunkReader::new()?;
        let mut written = Blocks::NONE;
        let blocks = checked(&mut reader, window, &stored, &self.blob);
        let blocks = blocks.inspect_err(|why| self.ranges.distrust(&self.blob, &stored, why))?;
        for (span, bytes) in blocks {
            written += healer.put(span, bytes)?;
        }
        Ok(written)
    }
}
