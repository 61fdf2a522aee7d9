//! How much space blocks of lazy layers may take that can be fetched again: `ROOT/cache.json`.

use serde::{Deserialize, Serialize};

use super::Store;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::size::human_size;

const FILE: &str = "cache.json";

/// The bound of a store's cache of blocks that were fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheLimit {
    /// Bytes; none is as much as comes.
    pub bytes: Option<u64>,
}

impl CacheLimit {
    /// The least: what one request brings has to fit twice.
    pub const LEAST: u64 = 8 << 20;
}

impl Store {
    /// The bound of the store's cache; none where none was set.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for one that is damaged, with what to do.
    pub fn cache_limit(&self) -> Result<CacheLimit> {
        let read = self.read_json(&self.root.join(FILE));
        let read = read.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => error.context(
                "the bound of the cache of lazy layers (set it anew: `vellum space --cache SIZE`)",
            ),
            _ => error,
        });
        Ok(read?.unwrap_or_default())
    }

    /// Sets the bound of the store's cache.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for less than [`CacheLimit::LEAST`].
    pub fn set_cache_limit(&self, limit: CacheLimit) -> Result<()> {
        if limit.bytes.is_some_and(|bytes| bytes < CacheLimit::LEAST) {
            let least = human_size(CacheLimit::LEAST);
            let text = format!(
                "a cache of less than {least} cannot hold what is being read: give it more, or off"
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let _guard = self.lock()?;
        self.write_json(&self.root.join(FILE), &limit)
    }
}
