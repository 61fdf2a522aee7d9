//! OCI layouts, whatever holds them: docs/object-stores.md.

mod archive;
mod bucket;
mod directory;
mod files;
mod index;
mod provider;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::{Hasher, LAYOUT, OciArchive, blob_name};

use super::blobs::Part;
use super::document::{Descriptor, Document, INDEX_TYPE, MANIFEST_TYPE};
use super::failure::Failure;
use super::find::Documents;
use super::location::{Holder, LayoutReference};
use super::ranges::Flow;
use super::retry::{Tries, retried};
use super::session::{Access, Outcome, Upload};
use archive::Archive;
use bucket::Bucket;
use directory::Directory;
use files::{Files, Filling};
use index::{Index, MAX_INDEX};

/// The longest manifest that is read.
const MAX_DOCUMENT: u64 = 4 << 20;
const INDEX_FILE: &str = "index.json";
const LAYOUT_FILE: &str = "oci-layout";

/// An OCI layout.
#[derive(Debug)]
pub(crate) struct Layout {
    files: Files,
    /// As a user calls it.
    shown: String,
}

impl Layout {
    /// Gets ready to reach the one of a reference. Nothing is read yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an object store of which too little is known, or that is not to be spoken to.
    pub fn open(reference: &LayoutReference, access: Access) -> Result<Self> {
        let files = match reference.holder {
            Holder::Directory => Files::Directory(Directory::new(reference.dir())),
            Holder::S3 | Holder::Google | Holder::Azure => {
                Files::Bucket(Bucket::open(reference, access)?)
            }
        };
        Ok(Layout {
            files,
            shown: reference.layout(),
        })
    }

    /// The one in an archive.
    pub fn in_archive(archive: OciArchive, shown: String) -> Self {
        Layout {
            files: Files::Archive(Archive::new(archive)),
            shown,
        }
    }

    /// As a user calls it.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// What a reference is to say of the store, besides what it says.
    pub fn settings(&self) -> Vec<(String, String)> {
        match &self.files {
            Files::Bucket(bucket) => bucket.settings().to_vec(),
            Files::Directory(_) | Files::Archive(_) => Vec::new(),
        }
    }

    async fn index(&self) -> Result<Option<Index>, Failure> {
        let bytes = self.files.read(INDEX_FILE, MAX_INDEX).await?;
        let index = bytes.map(|bytes| Index::parse(&bytes)).transpose();
        Ok(index.context(|| self.shown.clone())?)
    }

    /// The entries of its index.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it has none.
    pub async fn entries(&self) -> Result<Vec<Descriptor>, Failure> {
        match self.index().await? {
            Some(index) => Ok(index.entries()?),
            None => Err(self.no_layout().into()),
        }
    }

    fn no_layout(&self) -> Error {
        let text = format!(
            "{} has no {INDEX_FILE}: look whether the name is right, and whether something was pushed there",
            self.shown
        );
        Error::new(ErrorKind::NotFound, text)
    }

    /// The digest of what a reference names: the entry of its tag, where it has no digest.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the tags that there are.
    pub async fn resolve(&self, identifier: Option<&str>) -> Result<String, Failure> {
        if let Some(digest) = identifier.filter(|identifier| identifier.contains(':')) {
            return Ok(digest.to_owned());
        }
        let Some(index) = self.index().await? else {
            return Err(self.no_layout().into());
        };
        if let Some(entry) = index.find(identifier)? {
            return Ok(entry.digest);
        }
        let tags = match index.tags()?.as_slice() {
            [] => "nothing with a tag".to_owned(),
            tags => tags.join(", "),
        };
        let wanted = identifier.unwrap_or("latest");
        let text = format!(
            "{} has no {wanted}, but {tags}: name one of these",
            self.shown
        );
        Err(Error::new(ErrorKind::NotFound, text).into())
    }

    /// Fetches a blob into a new file. When it is done, its length and digest are right. `moved` counts its bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Corrupt`].
    pub async fn download(
        &self,
        blob: &Descriptor,
        path: &Path,
        moved: &AtomicU64,
    ) -> Result<(), Failure> {
        let part = Mutex::new(Part::new(path, &blob.digest)?);
        let go_on = || async { self.go_on(blob, &mut *part.lock().await, moved).await };
        retried(Tries::Several, go_on).await?;
        let actual = part.into_inner().hasher.finish();
        match actual == blob.digest {
            true => Ok(()),
            false => {
                Err(self.damaged(&blob.digest, &format!("its bytes have the digest {actual}")))
            }
        }
    }

    /// Goes on with a blob to its end.
    async fn go_on(
        &self,
        blob: &Descriptor,
        part: &mut Part,
        moved: &AtomicU64,
    ) -> Result<(), Failure> {
        let digest = &blob.digest;
        if part.len == blob.size && blob.size > 0 {
            return Ok(());
        }
        let from = part.len;
        let mut each = |bytes: &[u8]| -> Result<Flow, Failure> {
            if part.len + bytes.len() as u64 > blob.size {
                let why = format!("there are more than {} bytes", blob.size);
                return Err(self.damaged(digest, &why));
            }
            part.take(digest, bytes)?;
            moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Ok(Flow::Go)
        };
        self.stream(digest, from, &mut each).await?;
        if part.len < blob.size {
            let why = format!("there are {} bytes of {}", part.len, blob.size);
            return Err(Failure::passing(self.damaged(digest, &why).error));
        }
        Ok(())
    }

    /// Hands out a blob from a byte on as it comes. Nothing is checked.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; those of `each`.
    pub async fn stream(
        &self,
        digest: &str,
        from: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<(), Failure> {
        let there = self.files.stream(&blob_name(digest)?, from, each).await?;
        match there {
            true => Ok(()),
            false => Err(self.no_blob(digest)),
        }
    }

    /// Those bytes of a blob, exactly as many, of which nothing is checked but their number.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`] for a blob that is shorter.
    pub async fn range(
        &self,
        digest: &str,
        range: std::ops::Range<u64>,
    ) -> Result<Vec<u8>, Failure> {
        let len = range.end.saturating_sub(range.start);
        let found = self.files.range(&blob_name(digest)?, range).await?;
        let bytes = found.ok_or_else(|| self.no_blob(digest))?;
        match bytes.len() as u64 == len {
            true => Ok(bytes),
            false => {
                let why = format!("{} bytes came instead of {len}", bytes.len());
                Err(Failure::passing(self.damaged(digest, &why).error))
            }
        }
    }

    fn no_blob(&self, digest: &str) -> Failure {
        let text = format!(
            "{} has no blob {digest}, which its index leads to: push the image there again",
            self.shown
        );
        Error::new(ErrorKind::NotFound, text).into()
    }

    fn damaged(&self, digest: &str, why: &str) -> Failure {
        let text = format!(
            "the blob {digest} of {} is damaged: {why}. Nothing of it is used; remove it there and push the image \
             again, or take another copy of it",
            self.shown
        );
        Error::new(ErrorKind::Corrupt, text).into()
    }

    /// Makes sure that something can be put there.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a bucket that is not there; [`ErrorKind::Permission`].
    pub async fn try_push(&self) -> Result<(), Failure> {
        self.files.fill()?;
        self.index().await.map(drop)
    }

    /// Gets ready to put something there.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn fill(&self) -> Result<Filling<'_>> {
        self.files.fill()
    }

    /// Has it have a blob. `moved` counts its bytes.
    ///
    /// # Errors
    /// Where the host or the store refuses.
    pub async fn upload(
        &self,
        filling: &Filling<'_>,
        blob: &Upload,
        moved: &AtomicU64,
    ) -> Result<Outcome, Failure> {
        let name = blob_name(&blob.digest)?;
        // One of another length was cut off by whoever put it there.
        if self.files.size(&name).await? == Some(blob.size) {
            moved.fetch_add(blob.size, Ordering::Relaxed);
            return Ok(Outcome::Existed);
        }
        filling.put_file(&name, &blob.path, moved).await?;
        Ok(Outcome::Sent)
    }

    /// Has it have a manifest or index.
    ///
    /// # Errors
    /// Where the host or the store refuses.
    pub async fn put_document(
        &self,
        filling: &Filling<'_>,
        document: &Document,
    ) -> Result<(), Failure> {
        let name = blob_name(&document.digest)?;
        filling.put(&name, &document.bytes).await
    }

    /// Has a tag lead to a document. What others have tags lead to meanwhile stays.
    ///
    /// # Errors
    /// Where the host or the store refuses; [`ErrorKind::Corrupt`] for an index that makes no sense.
    pub async fn set_tag(
        &self,
        filling: &Filling<'_>,
        tag: &str,
        document: &Document,
    ) -> Result<(), Failure> {
        if self.files.size(LAYOUT_FILE).await?.is_none() {
            filling.put(LAYOUT_FILE, LAYOUT).await?;
        }
        let change = |there: Option<Vec<u8>>| {
            let index = there.map(|bytes| Index::parse(&bytes)).transpose();
            let mut index = index
                .context(|| self.shown.clone())?
                .unwrap_or_else(Index::empty);
            let changed = index.set(tag, document)?;
            Ok(changed.then(|| index.encode()))
        };
        filling.change(INDEX_FILE, MAX_INDEX, &change).await
    }
}

impl Documents for Layout {
    async fn document(&self, identifier: &str) -> Result<Document, Failure> {
        let bytes = self
            .files
            .read(&blob_name(identifier)?, MAX_DOCUMENT)
            .await?;
        let bytes = bytes.ok_or_else(|| self.no_blob(identifier))?;
        let mut hasher = Hasher::like(identifier)?;
        hasher.update(&bytes);
        let actual = hasher.finish();
        if actual != identifier {
            let why = format!("its bytes have the digest {actual}");
            return Err(self.damaged(identifier, &why));
        }
        Ok(Document {
            media_type: kind_of(&bytes),
            digest: actual,
            bytes,
        })
    }

    fn absent(&self, identifier: &str, _why: &Error) -> Error {
        self.no_blob(identifier).error
    }
}

/// What a document says that it is, or else is by its form: it need not say so.
fn kind_of(bytes: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
    let value = value.unwrap_or(serde_json::Value::Null);
    let said = value.get("mediaType").and_then(serde_json::Value::as_str);
    match said.filter(|said| !said.is_empty()) {
        Some(said) => said.to_owned(),
        None if value.get("manifests").is_some() => INDEX_TYPE.to_owned(),
        None => MANIFEST_TYPE.to_owned(),
    }
}
