//! An OCI layout in the store's `staging`, where what is pushed or pulled lies meanwhile.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::{Hasher, LAYOUT, blob_name, hex};
use vellum_registry::{Document, Upload};
use vellum_store::Store;

/// A directory that goes with this.
#[derive(Debug)]
pub(super) struct Layout {
    dir: TempDir,
}

impl Layout {
    /// An empty one.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn new(store: &Store) -> Result<Self> {
        let staging = store.root().join("staging");
        let failed = || format!("making a directory in {}", staging.display());
        let dir = tempfile::tempdir_in(&staging).context(failed)?;
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).context(failed)?;
        Ok(Layout { dir })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where a blob lies.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is no digest.
    pub fn blob(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.path().join(blob_name(digest)?))
    }

    /// A file that becomes a blob when its digest is known.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn unnamed(&self) -> Result<(PathBuf, File)> {
        let path = self.path().join("unnamed");
        let file = File::create(&path).context(|| format!("cannot make {}", path.display()))?;
        Ok((path, file))
    }

    /// Gives a file the name of a blob; says of what is to be sent what it is.
    ///
    /// # Errors
    /// Where it cannot be renamed.
    pub fn name(&self, path: &Path, sha256: [u8; 32], size: u64) -> Result<Upload> {
        let digest = digest_of(sha256);
        let to = self.blob(&digest)?;
        std::fs::rename(path, &to).context(|| format!("cannot rename {}", path.display()))?;
        Ok(Upload {
            digest,
            size,
            path: to,
            from: None,
        })
    }

    /// Adds a blob that is in memory.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn add(&self, bytes: &[u8]) -> Result<Upload> {
        let digest = digest_of(Sha256::digest(bytes).into());
        let path = self.blob(&digest)?;
        std::fs::write(&path, bytes).context(|| format!("cannot write {}", path.display()))?;
        Ok(Upload {
            digest,
            size: bytes.len() as u64,
            path,
            from: None,
        })
    }

    /// A blob that is read whole, compared with its digest.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for another digest.
    pub fn read(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob(digest)?;
        let bytes = std::fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
        let mut hasher = Hasher::like(digest)?;
        hasher.update(&bytes);
        match hasher.finish() == digest {
            true => Ok(bytes),
            false => Err(Error::new(
                ErrorKind::Corrupt,
                format!("{} has changed since it was fetched", path.display()),
            )),
        }
    }

    /// Makes it the layout of one image.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn of_image(&self, manifest: &Document) -> Result<()> {
        let path = self.blob(&manifest.digest)?;
        std::fs::write(&path, &manifest.bytes)
            .context(|| format!("cannot write {}", path.display()))?;
        let index = json!({
            "schemaVersion": 2,
            "manifests": [described(manifest)],
        });
        for (name, text) in [
            ("index.json", index.to_string().as_bytes()),
            ("oci-layout", LAYOUT),
        ] {
            let path = self.path().join(name);
            std::fs::write(&path, text).context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// A document's entry in an index.
pub(super) fn described(document: &Document) -> Value {
    json!({
        "mediaType": document.media_type,
        "digest": document.digest,
        "size": document.bytes.len(),
    })
}

/// A SHA-256 as registries write it.
pub(crate) fn digest_of(sha256: [u8; 32]) -> String {
    format!("sha256:{}", hex(&sha256))
}

/// Names a document by its digest.
pub(super) fn document(media_type: &str, value: &Value) -> Document {
    let bytes = value.to_string().into_bytes();
    Document {
        media_type: media_type.to_owned(),
        digest: digest_of(Sha256::digest(&bytes).into()),
        bytes,
    }
}
