//! The hot pack of an image that was pulled lazily, until it has come: the file `hot`. docs/lazy.md, "The hot pack".

use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::client::ask_for_the_background;
use super::{lazy_layers, read_noted};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;
use vellum_registry::{Access, Descriptor, Location};
use vellum_store::Store;

/// The file of a layer whose hot pack has not come.
pub(super) const HOT_FILE: &str = "hot";
/// The longest file `hot`: its layers are 4096 at most.
const MAX_HOT: u64 = 1 << 20;

/// Where a hot pack is, and of which layers. It lies in the directory of the topmost of them that is lazy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hot {
    /// The registry and repository, or the layout, with the tag or digest that was pulled.
    reference: String,
    /// The registry is spoken to without TLS.
    #[serde(default)]
    plain_http: bool,
    /// The digest of the blob.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    /// All layers of the image, from the bottom up: its frames are of these.
    pub layers: Vec<Uuid>,
}

impl Hot {
    /// Reads the one in a layer's directory; `None` where there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the message names the file.
    pub fn read(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>> {
        read_noted(storage, &dir.join(HOT_FILE), MAX_HOT)
    }

    /// Whether there is one in a layer's directory.
    pub fn is_noted(dir: &Path) -> bool {
        dir.join(HOT_FILE).exists()
    }

    /// Forgets the one in a layer's directory: it came, or is of no use.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn remove(dir: &Path) -> Result<()> {
        let path = dir.join(HOT_FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.context(|| format!("cannot remove {}", path.display())),
        }
    }

    /// Which place to ask, and how.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no reference.
    pub fn place(&self) -> Result<(Location, Access)> {
        let access = Access {
            plain_http: self.plain_http,
        };
        Ok((Location::parse(&self.reference)?, access))
    }
}

/// Has the fetcher bring the hot pack of an image with these layers, which a record names, unless none of them is lazy.
/// A failure is logged: the image is there all the same.
pub(crate) fn expect_hot_pack(
    store: &Store,
    layers: &[Uuid],
    pack: &Descriptor,
    whereabouts: (String, Access),
) {
    let noted = note(store, layers, pack, whereabouts);
    let asked = noted.and_then(|noted| match noted {
        true => ask_for_the_background(store.root()),
        false => Ok(()),
    });
    if let Err(error) = asked {
        tracing::warn!("what an image needs first does not come ahead yet: {error}");
    }
}

/// Notes where a pack is; false where no layer is lazy.
fn note(
    store: &Store,
    layers: &[Uuid],
    pack: &Descriptor,
    (reference, access): (String, Access),
) -> Result<bool> {
    let Some(top) = lazy_layers(store, layers)?.pop() else {
        return Ok(false);
    };
    let hot = Hot {
        reference,
        plain_http: access.plain_http,
        digest: pack.digest.clone(),
        size: pack.size,
        layers: layers.to_vec(),
    };
    let path = store.layer_dir(top).join(HOT_FILE);
    let json = serde_json::to_vec(&hot).map_err(|error| {
        Error::with_source(ErrorKind::Internal, "where a hot pack is, as JSON", error)
    })?;
    let written = store.storage().write_atomic(&path, &json);
    written.context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}
