//! What happens during a long command, for a person who waits.

use vellum_image::Progress;

/// Hears of it.
pub trait Watch {
    /// A part is begun, such as a layer; `size` is the number of bytes to come, where that is known. What
    /// it returns hears of them.
    fn begin(&self, name: &str, size: Option<u64>) -> Option<Progress<'static>>;
    /// A part was there already.
    fn exists(&self, name: &str);
    /// The part begun last is done.
    fn done(&self);
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Watch for Quiet {
    fn begin(&self, _: &str, _: Option<u64>) -> Option<Progress<'static>> {
        None
    }
    fn exists(&self, _: &str) {}
    fn done(&self) {}
}
