//! Progress bars, on standard error.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::output::Output;
use vellum_engine::watch::Watch;
use vellum_image::Progress;

/// A progress bar for each part that is read or written; a line for one that exists.
pub(super) struct Bars {
    out: Output,
    bar: Mutex<Option<ProgressBar>>,
}

impl Bars {
    pub(super) fn new(out: Output) -> Self {
        Bars {
            out,
            bar: Mutex::new(None),
        }
    }
}

impl Watch for Bars {
    fn begin(&self, name: &str, size: Option<u64>) -> Option<Progress<'static>> {
        if !self.out.shows_progress() {
            return None;
        }
        let (bar, template) = match size {
            Some(size) => (
                ProgressBar::new(size),
                "{msg:24!} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}",
            ),
            None => (
                ProgressBar::no_length(),
                "{msg:24!} {spinner} {decimal_bytes} {decimal_bytes_per_sec}",
            ),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        *self.bar.lock() = Some(bar.clone());
        Some(Box::new(move |bytes| bar.inc(bytes)))
    }

    fn exists(&self, name: &str) {
        self.out.note(&format!("{name}: Layer already exists"));
    }

    fn done(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }
}
