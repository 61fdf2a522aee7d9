//! `vellum save`: what a push sends, of several images, as one OCI archive.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::{LayoutBlob, archive_name, blob_name, tag_of, write_layout_tar};
use vellum_registry::{
    Access, CONTAINERD_NAME, Document, INDEX_TYPE, NAME_ANNOTATION, Push, REF_NAME,
};
use vellum_store::{Store, check_reference};

use super::super::export::output::Out;
use super::super::watch::Watch;
use super::layout::{Layout, described};
use super::push::{PushFormat, PushOptions, assemble, refuse_plain_beside};
use super::salt::Encryption;
use super::sealed::Sealing;

/// The trust domain of archives, whose salt is the store's own.
const NAMESPACE: &str = "archives";
/// Bytes that are written at a time.
const BUFFER: usize = 256 << 10;

/// What a user says about an archive.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// What of each image is saved.
    pub format: PushFormat,
    /// zstd's level for block layers, 1 to 19.
    pub level: i32,
    /// A file that is there is replaced.
    pub replace: bool,
    /// Block layers alone are saved, encrypted: `format` says so too.
    pub encryption: Option<Encryption>,
}

/// An image of an archive.
#[derive(Debug, Clone, Serialize)]
pub struct SavedImage {
    /// The image, snapshot or container.
    pub name: String,
    /// The digest of what the archive's index leads to.
    pub digest: String,
}

/// What a save wrote.
#[derive(Debug, Clone, Serialize)]
pub struct SaveReport {
    /// What is in it.
    pub images: Vec<SavedImage>,
    /// Where; `-` is standard output.
    #[serde(serialize_with = "crate::path_as_text")]
    pub path: PathBuf,
    /// What of each was saved.
    pub format: PushFormat,
    /// Bytes of its blobs.
    pub bytes: u64,
}

/// Writes images, snapshots or containers to the OCI archive `target`; `-`, a pipe and a character device are written
/// from the first byte to the last. What cannot be written in whole is not there.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for what is there; [`ErrorKind::InvalidInput`] for a name that comes twice; as
/// [`super::push()`] otherwise.
pub fn save(
    store: &Store,
    names: &[String],
    target: &Path,
    options: &SaveOptions,
    watch: &dyn Watch,
) -> Result<SaveReport> {
    let mut seen = BTreeSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(archive_name(name))) {
        let text = format!("an archive has each name once, and {twice} comes twice: leave one out");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    refuse_plain_beside(options.format, options.encryption.as_ref())?;
    // First, so that nothing is done for what has no place to go to.
    let mut out = Out::file(target, options.replace)?;
    // Until all is written: what lies in `staging` is nobody's once nobody does this.
    let _pin = store.pin_layers()?;
    let sealing = options.encryption.as_ref();
    let sealing = sealing
        .map(|how| how.sealing(store, NAMESPACE))
        .transpose()?;
    let mut archive = Archive::default();
    for name in names {
        let how = (options, sealing.as_ref());
        archive.add(store, name, how, names.len() == 1, watch)?;
    }
    let what = || format!("saving to {}", target.display());
    let (images, bytes) = archive.write(out.writer()?).context(what)?;
    out.finish().context(what)?;
    Ok(SaveReport {
        images,
        path: target.to_owned(),
        format: options.format,
        bytes,
    })
}

/// Images that lie in `staging`.
#[derive(Debug, Default)]
struct Archive {
    layouts: Vec<Layout>,
    digests: BTreeSet<String>,
    blobs: Vec<LayoutBlob>,
    entries: Vec<Value>,
    images: Vec<SavedImage>,
}

impl Archive {
    fn add(
        &mut self,
        store: &Store,
        name: &str,
        (options, sealing): (&SaveOptions, Option<&Sealing>),
        alone: bool,
        watch: &dyn Watch,
    ) -> Result<()> {
        let layout = Layout::new(store)?;
        let options = PushOptions {
            format: options.format,
            level: options.level,
            access: Access::default(),
            trace: None,
            // Nobody reads an archive lazily.
            hot: false,
            encryption: None,
        };
        let (push, _) = assemble(store, name, &options, sealing, &layout, watch)?;
        let Push { blobs, documents } = push;
        for blob in blobs {
            if !self.digests.insert(blob.digest.clone()) {
                // Another image has it: its room is wanted for what only this one has.
                let failed = || format!("cannot remove {}", blob.path.display());
                std::fs::remove_file(&blob.path).context(failed)?;
                continue;
            }
            self.blobs.push(LayoutBlob {
                name: blob_name(&blob.digest)?,
                path: blob.path,
                size: blob.size,
            });
        }
        for document in &documents {
            if self.digests.insert(document.digest.clone()) {
                let added = layout.add(&document.bytes)?;
                self.blobs.push(LayoutBlob {
                    name: blob_name(&added.digest)?,
                    path: added.path,
                    size: added.size,
                });
            }
        }
        let named = documents.last();
        let named = named.ok_or_else(|| Error::internal("an image without a document"))?;
        self.entries.push(entry(name, named, alone));
        self.images.push(SavedImage {
            name: name.to_owned(),
            digest: named.digest.clone(),
        });
        self.layouts.push(layout);
        Ok(())
    }

    /// Writes the archive. Returns what is in it, and how many bytes its blobs have.
    fn write(mut self, output: &mut dyn Write) -> Result<(Vec<SavedImage>, u64)> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": self.entries,
        });
        let index = index.to_string();
        // The same images give the same bytes.
        self.blobs.sort_by(|one, other| one.name.cmp(&other.name));
        let bytes = self.blobs.iter().map(|blob| blob.size).sum();
        let mut output = BufWriter::with_capacity(BUFFER, output);
        write_layout_tar(self.blobs, &[("index.json", index.as_bytes())], &mut output)?;
        output.flush().context(|| "writing the archive")?;
        Ok((self.images, bytes))
    }
}

/// The entry of the archive's index. Who has only a tag to go by finds one image alone by its tag, as
/// `vellum export --format oci` has it, and several by their names.
#[expect(clippy::indexing_slicing, reason = "a JSON object takes any key")]
fn entry(name: &str, document: &Document, alone: bool) -> Value {
    let full = archive_name(name);
    let short = match alone {
        true => tag_of(&full).unwrap_or("latest"),
        false => &full,
    };
    let mut entry = described(document);
    entry["annotations"] = json!({ CONTAINERD_NAME: full, REF_NAME: short });
    // What stands behind a container's `@` is no name of an image.
    if check_reference(name).is_ok() && !name.contains('@') {
        entry["annotations"][NAME_ANNOTATION] = json!(name);
    }
    entry
}
