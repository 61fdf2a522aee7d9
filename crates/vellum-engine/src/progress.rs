//! What long work on blocks tells a person who waits.

use super::watch::Quiet;

/// What happens while blocks are read or copied.
pub trait BlocksWatch: Sync {
    /// So many data blocks will be.
    fn begin(&self, blocks: u64);
    /// So many more were.
    fn read(&self, blocks: u64);
    /// All were.
    fn end(&self);
}

impl BlocksWatch for Quiet {
    fn begin(&self, _: u64) {}
    fn read(&self, _: u64) {}
    fn end(&self) {}
}
