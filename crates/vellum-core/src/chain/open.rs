//! From directories to a chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::base::check_parent;
use super::{Base, Chain, ChainStats};
use crate::layer::{LayerOptions, SealedLayer, WritableLayer};
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::Storage;

/// Which layers make a chain.
#[derive(Debug, Clone, Default)]
pub struct ChainSpec {
    /// Directories of sealed layers, from the bottom up.
    pub sealed: Vec<PathBuf>,
    /// Directory of the writable top; without one the chain is read-only.
    pub top: Option<PathBuf>,
    /// For the top.
    pub options: LayerOptions,
}

/// Opens every layer and merges their maps. The top layer, where it was not closed, is recovered.
///
/// # Errors
/// [`vellum_base::ErrorKind::Corrupt`] where a layer does not fit the one below; the message names the
/// directory. As [`SealedLayer::open`] and [`WritableLayer::open`].
pub fn open_chain(storage: &Arc<dyn Storage>, spec: &ChainSpec) -> Result<Chain> {
    open_counted_chain(storage, spec, Arc::default())
}

/// As [`open_chain`], counting in `stats`, which may hold what was counted before.
///
/// # Errors
/// As [`open_chain`].
pub fn open_counted_chain(
    storage: &Arc<dyn Storage>,
    spec: &ChainSpec,
    stats: Arc<ChainStats>,
) -> Result<Chain> {
    let base = open_base(storage, &spec.sealed)?;
    with_top(storage, base, spec, stats)
}

/// As [`open_counted_chain`], on a layer that is not sealed: the last of `spec.sealed` is opened as in
/// [`open_read_only_chain`]. For what is written above it and thrown away.
///
/// # Errors
/// As [`open_chain`].
pub fn look_at_chain(
    storage: &Arc<dyn Storage>,
    spec: &ChainSpec,
    stats: Arc<ChainStats>,
) -> Result<Chain> {
    let (unsealed, sealed) = match spec.sealed.split_last() {
        Some((last, sealed)) => (Some(last), sealed),
        None => (None, spec.sealed.as_slice()),
    };
    let base = open_base(storage, sealed)?;
    if let Some(unsealed) = unsealed {
        base.push(Arc::new(SealedLayer::open_unsealed(&**storage, unsealed)?))?;
    }
    with_top(storage, base, spec, stats)
}

fn with_top(
    storage: &Arc<dyn Storage>,
    base: Base,
    spec: &ChainSpec,
    stats: Arc<ChainStats>,
) -> Result<Chain> {
    let below = base.layers().last().cloned();
    let below = below.as_ref().map(|layer| layer.header());
    let top = match &spec.top {
        Some(dir) => {
            let top =
                WritableLayer::open_counted(storage.clone(), dir, spec.options, stats.clone())?;
            check_parent(&top.header(), below, &dir.display().to_string())?;
            Some(top)
        }
        None => None,
    };
    Chain::counted(base, top, stats)
}

/// Opens a chain with a layer on top that is not sealed, in a store that cannot be written: what that
/// layer would be recovered to is made up in memory. Nobody may be writing it.
///
/// # Errors
/// As [`open_chain`].
pub fn open_read_only_chain(
    storage: &Arc<dyn Storage>,
    sealed: &[PathBuf],
    unsealed: &Path,
    stats: Arc<ChainStats>,
) -> Result<Chain> {
    let base = open_base(storage, sealed)?;
    let top = SealedLayer::open_unsealed(&**storage, unsealed)?;
    base.push(Arc::new(top))?;
    Chain::counted(base, None, stats)
}

pub(super) fn open_base(storage: &Arc<dyn Storage>, sealed: &[PathBuf]) -> Result<Base> {
    let base = Base::default();
    for dir in sealed {
        let layer = SealedLayer::open(&**storage, dir)
            .context(|| format!("cannot open the chain of {} layers", sealed.len()))?;
        base.push(Arc::new(layer))?;
    }
    Ok(base)
}
