//! Lazy layers in the store: docs/lazy.md. [`vellum_core::layer::LazyLayer`] has their bytes, [`vellum_registry::BlobReader`]
//! reads blobs; here one process brings them together, and all others ask it.
//!
//! * [`Remote`]: where a layer's blocks are.
//! * [`fetcher`]: the process that brings them.
//! * [`FetcherClient`]: how everybody else waits for it.
//! * [`complete()`]: has all of an image brought.
//! * [`PullSecretServer`]: what the snapshotter tells the fetcher of credentials.

mod cache;
mod client;
mod complete;
pub mod fetcher;
mod hot;
mod pull_secrets;
mod remote;
mod stall;

pub use cache::{CacheUse, cache_use, set_cache_limit};
pub(crate) use client::waits_for_any;
pub use client::{FetcherClient, explain, traffic, waiting};
pub(crate) use complete::go_on_in_background;
pub use complete::{CompleteReport, complete, complete_in_background};
pub use fetcher::FETCHER_COMMAND;
pub(crate) use hot::expect_hot_pack;
pub use pull_secrets::PullSecretServer;
pub use remote::{Background, REMOTE_FILES, Remote};

use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;
use vellum_core::layer::Header;
use vellum_store::Store;

/// Asks for windows of a layer: [`Want`].
const WANT: &str = "want";
/// Asks for blocks of a sealed layer that the disk lost or changed: [`Damaged`]. The answer is whether anybody has them.
const HEAL: &str = "heal";
/// Says that there is something to be brought although nobody waits for it: layers that are to be completed, hot packs.
const BACKGROUND: &str = "background";
/// Asks for the seal of a layer of which all is here: [`Complete`].
const COMPLETE: &str = "complete";
/// Asks who waits: [`Waiting`] of each layer of which something is wanted.
const STATUS: &str = "status";
/// Asks how many parts of blobs were asked for: [`vellum_registry::Traffic`].
const TRAFFIC: &str = "traffic";

/// Windows that somebody waits for.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Want {
    layer: Uuid,
    windows: Range<u32>,
}

/// Blocks that are to be brought again.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Damaged {
    layer: Uuid,
    first: u64,
    count: u64,
}

/// A layer that is to be completed.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Complete {
    layer: Uuid,
}

/// Who waits for a layer's blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The layer.
    pub layer: Uuid,
    /// How many requests; none where only the last attempt failed.
    pub requests: u64,
    /// For how many seconds the oldest of them has waited.
    pub seconds: u64,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

/// What a file of JSON beside a layer notes; `None` where it is not there.
///
/// # Errors
/// [`ErrorKind::Corrupt`]; the message names the file.
fn read_noted<T: DeserializeOwned>(
    storage: &dyn Storage,
    path: &Path,
    max: u64,
) -> Result<Option<T>> {
    let bytes = match storage.read_all(path, max) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.context(|| format!("cannot read {}", path.display()))?,
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        let text = format!("{} is damaged", path.display());
        Error::with_source(ErrorKind::Corrupt, text, error)
    })
}

/// The layers among these that are lazy.
///
/// # Errors
/// Where a header cannot be read.
pub fn lazy_layers(store: &Store, layers: &[Uuid]) -> Result<Vec<Uuid>> {
    let mut lazy = Vec::new();
    for layer in layers {
        let header = Header::read(&**store.storage(), &store.layer_dir(*layer))?;
        if header.lazy {
            lazy.push(*layer);
        }
    }
    Ok(lazy)
}
