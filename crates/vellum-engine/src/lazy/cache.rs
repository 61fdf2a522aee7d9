//! The bound of what fetched blocks take, as commands see it. docs/lazy.md, "A bounded cache".

use serde::Serialize;

use super::Remote;
use super::client::ask_for_the_background;
use vellum_base::error::Result;
use vellum_core::layer::{Header, SealedLayer};
use vellum_store::{CacheLimit, Store};

/// What lazy layers take that can be fetched again.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CacheUse {
    /// The bound.
    pub limit: CacheLimit,
    /// Lazy layers of which nobody wanted all.
    pub layers: usize,
    /// Bytes that they take on the host.
    pub bytes: u64,
}

/// What a store's lazy layers take that can be fetched again, and may.
///
/// # Errors
/// Where the store cannot be read.
pub fn cache_use(store: &Store) -> Result<CacheUse> {
    let storage = &**store.storage();
    let mut used = CacheUse {
        limit: store.cache_limit()?,
        layers: 0,
        bytes: 0,
    };
    for layer in store.layers()? {
        let dir = store.layer_dir(layer);
        // Of what cannot be read, or is removed meanwhile, `check` tells.
        if !Header::read(storage, &dir).is_ok_and(|header| header.lazy) {
            continue;
        }
        let kept = Remote::read(storage, &dir).ok().flatten();
        if kept.is_some_and(|remote| remote.is_kept()) {
            continue;
        }
        if let Ok(opened) = SealedLayer::open(storage, &dir)
            && opened.is_lazy()
            && opened.tells_damage()
        {
            used.layers += 1;
            used.bytes += opened.allocated_bytes()?;
        }
    }
    Ok(used)
}

/// Sets the bound, for what is here by now too.
///
/// # Errors
/// As [`Store::set_cache_limit`]; where no fetcher can be started.
pub fn set_cache_limit(store: &Store, limit: CacheLimit) -> Result<()> {
    store.set_cache_limit(limit)?;
    // It sees to it.
    ask_for_the_background(store.root())
}
