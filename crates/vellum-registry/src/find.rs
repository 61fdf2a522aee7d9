//! From a tag or digest to the manifests of an image and its block layers, wherever these are.

use super::artifact::{ARTIFACT_TYPE, BLOCKS_ANNOTATION};
use super::document::{Document, choose};
use super::failure::Failure;
use vellum_base::error::{Error, ErrorKind};
use vellum_image::{Platform, blob_name};

/// How deep indexes nest.
const MAX_INDEXES: usize = 4;

/// What a reference leads to. One of the two is there.
#[derive(Debug, Clone)]
pub struct Found {
    /// The manifest of the image, for the platform.
    pub image: Option<Document>,
    /// The manifest of its block layers.
    pub artifact: Option<Document>,
}

/// Where manifests and indexes are.
pub(crate) trait Documents {
    /// The one of a tag or digest, which it has.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none.
    async fn document(&self, identifier: &str) -> Result<Document, Failure>;

    /// What a user is told of one that is not there, for that reason.
    fn absent(&self, identifier: &str, why: &Error) -> Error;
}

/// What a tag or digest leads to, for a platform; `shown` is what a user calls it.
pub(crate) async fn find(
    documents: &impl Documents,
    identifier: &str,
    shown: &str,
    platform: &Platform,
) -> Result<Found, Failure> {
    let mut document = need(documents, identifier).await?;
    for _ in 0..MAX_INDEXES {
        let Some(entries) = document.entries()? else {
            return with_blocks(documents, document).await;
        };
        let chosen = choose(&entries, platform);
        let chosen = chosen.map_err(|error| error.context(shown.to_owned()))?;
        // What is no digest would be a tag, or lead elsewhere, and nothing would be checked.
        blob_name(&chosen.digest)?;
        document = need(documents, &chosen.digest).await?;
    }
    let text = format!("{shown}: indexes nest more than {MAX_INDEXES} deep");
    Err(Error::new(ErrorKind::InvalidInput, text).into())
}

async fn need(documents: &impl Documents, identifier: &str) -> Result<Document, Failure> {
    let found = documents.document(identifier).await;
    found.map_err(|failure| match failure.error.kind() {
        ErrorKind::NotFound => documents.absent(identifier, &failure.error).into(),
        _ => failure,
    })
}

/// Finds the block layers that an image names.
async fn with_blocks(documents: &impl Documents, document: Document) -> Result<Found, Failure> {
    let manifest = document.manifest()?;
    if manifest.artifact_type.as_deref() == Some(ARTIFACT_TYPE) {
        return Ok(Found {
            image: None,
            artifact: Some(document),
        });
    }
    let named = manifest.annotation(BLOCKS_ANNOTATION);
    let artifact = match named.filter(|named| blob_name(named).is_ok()) {
        Some(digest) => match documents.document(digest).await {
            Err(failure) if failure.error.kind() == ErrorKind::NotFound => None,
            other => Some(other?),
        },
        None => None,
    };
    if let (Some(digest), None) = (named, &artifact) {
        tracing::info!("the block layers {digest} are not there: the image is unpacked");
    }
    Ok(Found {
        image: Some(document),
        artifact,
    })
}
