//! Which repository of a registry has a blob, as far as is known: a hint, by which a push mounts what it would send.
//! docs/registry.md, "Transport".

use serde::{Deserialize, Serialize};

use super::Store;
use vellum_base::error::Result;

const FILE: &str = "registry-blobs.json";
/// How many places are kept: the last.
const MOST: usize = 4096;

/// A blob of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    digest: String,
    registry: String,
    repository: String,
}

impl Store {
    /// A repository of `registry` that had the blob `digest` when it was last seen.
    pub fn blob_place(&self, digest: &str, registry: &str) -> Option<String> {
        let places = self.blob_places();
        let mut known = places.into_iter().rev();
        let found = known.find(|place| place.digest == digest && place.registry == registry);
        found.map(|place| place.repository)
    }

    /// Notes that a repository has blobs.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn note_blobs<'a>(
        &self,
        digests: impl Iterator<Item = &'a str>,
        registry: &str,
        repository: &str,
    ) -> Result<()> {
        let new: Vec<Place> = digests
            .map(|digest| Place {
                digest: digest.to_owned(),
                registry: registry.to_owned(),
                repository: repository.to_owned(),
            })
            .collect();
        let _lock = self.lock()?;
        let mut places = self.blob_places();
        places.retain(|place| !new.contains(place));
        places.extend(new);
        let surplus = places.len().saturating_sub(MOST);
        places.drain(..surplus);
        self.write_json(&self.root.join(FILE), &places)
    }

    /// All places, the newest last. A hint that is damaged is none.
    fn blob_places(&self) -> Vec<Place> {
        let read = self.read_json(&self.root.join(FILE));
        match read {
            Ok(places) => places.unwrap_or_default(),
            Err(error) => {
                tracing::warn!("{error}: it is written anew");
                Vec::new()
            }
        }
    }
}
