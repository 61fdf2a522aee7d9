//! What the disk lost or changed of a layer comes again.

use std::ops::RangeInclusive;

use super::Incoming;
use vellum_base::block::{Block, Span};
use vellum_base::error::{Error, ErrorKind, Result};

impl Incoming {
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
}
