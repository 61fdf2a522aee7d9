//! A progress bar over blocks.

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::output::Output;
use vellum_base::block::BLOCK_SIZE;
use vellum_engine::progress::BlocksWatch;

/// Shown where somebody watches.
pub(super) struct Bar {
    out: Output,
    verb: &'static str,
    bar: Mutex<Option<ProgressBar>>,
}

impl Bar {
    /// What is done with the blocks comes before the bar.
    pub(super) fn new(out: Output, verb: &'static str) -> Self {
        Bar {
            out,
            verb,
            bar: Mutex::new(None),
        }
    }
}

impl BlocksWatch for Bar {
    fn begin(&self, blocks: u64) {
        if !self.out.shows_progress() {
            return;
        }
        let bar = ProgressBar::new(blocks * BLOCK_SIZE);
        let verb = self.verb;
        let template = format!(
            "{verb} [{{bar:30}}] {{decimal_bytes}}/{{decimal_total_bytes}} {{decimal_bytes_per_sec}} {{eta}}"
        );
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        *self.bar.lock() = Some(bar);
    }

    fn read(&self, blocks: u64) {
        if let Some(bar) = &*self.bar.lock() {
            bar.inc(blocks * BLOCK_SIZE);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }
}
