//! The configuration of an artifact: docs/registry.md, "The artifact".

use serde::{Deserialize, Serialize};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::ImageConfig;
use vellum_store::DiskInfo;

use super::super::layer_file::{Known, check_disk};

/// What is said of an image, as JSON. Fields may be added. Nothing in it is of one store or one moment, so that the
/// same image has the same digest everywhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Description {
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// How it is run, and its history.
    pub config: ImageConfig,
    /// What each layer came from, from the bottom up.
    pub layers: Vec<Known>,
}

impl Description {
    pub fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::internal(format!("an image cannot be described: {error}")))
    }

    /// Makes sure that its disk is one that this build knows.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; [`ErrorKind::Unsupported`] for a file system that is not known.
    pub fn check(&self) -> Result<()> {
        check_disk(&self.disk)
    }

    /// Reads what anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; [`ErrorKind::Unsupported`] for a file system that is not known.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let description: Description = serde_json::from_slice(bytes).map_err(|error| {
            let text = "what the artifact says of its image makes no sense";
            Error::with_source(ErrorKind::Corrupt, text, error)
        })?;
        description.check()?;
        Ok(description)
    }
}
