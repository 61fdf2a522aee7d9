//! `vellum push`: an image is put together in `staging`, then sent.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::json;
use uuid::Uuid;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::Compression;
use vellum_registry::artifact::{ARTIFACT_TYPE, BLOCKS_ANNOTATION, IMAGE_ANNOTATION};
use vellum_registry::{
    Access, Document, INDEX_TYPE, Location, MANIFEST_TYPE, Outcome, Place, Push, Upload,
};
use vellum_store::Store;

use super::super::export::image::{self, Collected};
use super::super::export::subject::Subject;
use super::super::layer_file::Known;
use super::super::lazy::Remote;
use super::super::trace::{self, Trace, TraceOptions};
use super::super::watch::Watch;
use super::artifact::{self, Artifact};
use super::hot::Hot;
use super::layout::{Layout, described, document};
use super::pushed::{self, PushedLayer};
use super::salt::Encryption;
use super::sealed::Sealing;

/// What is pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PushFormat {
    /// The container image and the block layers.
    Both,
    /// The container image.
    Oci,
    /// The block layers.
    Blocks,
}

/// What a user says about a push.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// What is pushed.
    pub format: PushFormat,
    /// zstd's level for block layers, 1 to 19.
    pub level: i32,
    /// How the registry is spoken to.
    pub access: Access,
    /// Of what the hot pack is made, beside the file system's metadata.
    pub trace: Option<TraceSource>,
    /// There is a hot pack.
    pub hot: bool,
    /// Block layers alone are pushed, encrypted: `format` says so too.
    pub encryption: Option<Encryption>,
}

/// Where a push has its trace from.
#[derive(Debug, Clone)]
pub enum TraceSource {
    /// A command that is run for it.
    Command(TraceOptions),
    /// One that was recorded before.
    Recorded(Trace),
}

/// What a push did.
#[derive(Debug, Clone, Serialize)]
pub struct PushReport {
    /// The image or container.
    pub name: String,
    /// Where it is now.
    pub reference: String,
    /// What was pushed.
    pub format: PushFormat,
    /// The digest of what the reference names.
    pub digest: String,
    /// Blobs that were sent.
    pub sent: usize,
    /// Bytes of these.
    pub sent_bytes: u64,
    /// Blobs that the repository had.
    pub existed: usize,
    /// Blobs that another repository had.
    pub mounted: usize,
}

/// Sends the image, snapshot or container `name` to a registry or a layout.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a reference by digest; [`ErrorKind::Unsupported`] for a disk that holds no files, but as
/// blocks; as [`Place::push`] and [`super::super::export::export`].
pub fn push(
    store: &Store,
    name: &str,
    location: &Location,
    options: &PushOptions,
    watch: &dyn Watch,
) -> Result<PushReport> {
    if location.digest().is_some() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{location} names a digest, which the image has by itself: push it to a tag"),
        ));
    }
    refuse_plain_beside(options.format, options.encryption.as_ref())?;
    let place = Place::open(location, options.access)?;
    // Before anything is put together for one that does not take it.
    place.try_push()?;
    // Until all is sent: what lies in `staging` is nobody's once nobody does this.
    let _pin = store.pin_layers()?;
    let layout = Layout::new(store)?;
    let sealing = options.encryption.as_ref();
    let sealing = sealing.map(|how| how.sealing(store, &place.namespace(location)));
    let sealing = sealing.transpose()?;
    let (mut push, layers) = assemble(store, name, options, sealing.as_ref(), &layout, watch)?;
    if let Some((registry, repository)) = place.repository() {
        for blob in &mut push.blobs {
            let from = store.blob_place(&blob.digest, registry);
            blob.from = from.filter(|from| from != repository);
        }
    }
    let report = send(&place, &push, name, location, options.format, watch)?;
    if let Some((reference, access)) = place.whereabouts() {
        pushed::note(store, &layout, &layers, &reference, access);
    }
    if let Some((registry, repository)) = place.repository() {
        let digests = push.blobs.iter().map(|blob| blob.digest.as_str());
        // A hint, without which the image is there all the same.
        let noted = store.note_blobs(digests, registry, repository);
        if let Err(error) = noted {
            tracing::warn!("where blobs are is not noted: {error}");
        }
    }
    Ok(report)
}

fn send(
    place: &Place,
    push: &Push,
    name: &str,
    location: &Location,
    format: PushFormat,
    watch: &dyn Watch,
) -> Result<PushReport> {
    let tagged = push.documents.last();
    let tagged = tagged.ok_or_else(|| Error::internal("a push of no document"))?;
    let report = std::cell::RefCell::new(PushReport {
        name: name.to_owned(),
        reference: location.to_string(),
        format,
        digest: tagged.digest.clone(),
        sent: 0,
        sent_bytes: 0,
        existed: 0,
        mounted: 0,
    });
    let total = push.blobs.iter().map(|blob| blob.size).sum();
    let shown = match place.repository() {
        Some((_, repository)) => repository.to_owned(),
        None => location.to_string(),
    };
    let progress = watch.begin(&shown, Some(total));
    place.push(push, progress, &|blob: &Upload, outcome| {
        let mut report = report.borrow_mut();
        match outcome {
            Outcome::Sent => {
                report.sent += 1;
                report.sent_bytes += blob.size;
            }
            Outcome::Existed => {
                report.existed += 1;
                watch.exists(&short(&blob.digest));
            }
            Outcome::Mounted => {
                report.mounted += 1;
                watch.exists(&short(&blob.digest));
            }
        }
    })?;
    watch.done();
    Ok(report.into_inner())
}

/// A digest for people.
pub(super) fn short(digest: &str) -> String {
    let digits = digest.split(':').next_back().unwrap_or(digest);
    digits.chars().take(12).collect()
}

/// Refuses to encrypt blocks and to push the same plain beside them.
pub(super) fn refuse_plain_beside(
    format: PushFormat,
    encryption: Option<&Encryption>,
) -> Result<()> {
    if encryption.is_none() || format == PushFormat::Blocks {
        return Ok(());
    }
    let text = "only block layers are encrypted, and a container image beside them would show all of it: leave --format \
                out, or give --format blocks";
    Err(Error::new(ErrorKind::InvalidInput, text))
}

/// Warns of layers that came, or went, encrypted, and are to go plain now.
fn warn_of_plain(subject: &Subject<'_>, name: &str) {
    let store = subject.store;
    // The empty file system at the bottom is everybody's.
    let is_shared = |layer| {
        store
            .layer_info(layer)
            .is_ok_and(|info| Known::of(info).template.is_some())
    };
    let is_encrypted =
        |layer: &Uuid| Remote::is_encrypted(&store.layer_dir(*layer)) && !is_shared(*layer);
    if subject.layers.iter().any(is_encrypted) {
        tracing::warn!(
            "{name} has layers that were encrypted where they came from, or went to, and goes as it is here, plain: \
             --encrypt-to encrypts it"
        );
    }
}

/// Puts together what is sent, and of which layers it has the blocks.
pub(super) fn assemble(
    store: &Store,
    name: &str,
    options: &PushOptions,
    sealing: Option<&Sealing>,
    layout: &Layout,
    watch: &dyn Watch,
) -> Result<(Push, Vec<PushedLayer>)> {
    let format = options.format;
    let subject = Subject::find(store, name, format != PushFormat::Oci)?;
    if sealing.is_none() {
        warn_of_plain(&subject, name);
    }
    let trace = match &options.trace {
        _ if format == PushFormat::Oci => None,
        Some(TraceSource::Command(command)) => Some(trace::record(&subject, command)?),
        Some(TraceSource::Recorded(trace)) => Some(trace.clone()),
        None => None,
    };
    let hot = match options.hot {
        true => Hot::Pack(trace.as_ref()),
        false => Hot::No,
    };
    let mut collected = None;
    if format != PushFormat::Blocks {
        let advice = || "`vellum push --format blocks` takes a disk as it is";
        subject.need_files().context(advice)?;
        let gzip = Compression::Gzip;
        collected = Some(image::collect(&subject, layout.path(), gzip, None, watch)?);
    }
    let mut layers = Vec::new();
    let mut artifact = None;
    if format != PushFormat::Oci {
        let diff_ids = collected.as_ref().map_or(&[][..], |image| &image.diff_ids);
        let how = (options.level, sealing);
        let mut written = artifact::write(&subject, layout, how, (diff_ids, hot), watch)?;
        layers.append(&mut written.layers);
        artifact = Some(written);
    }
    Ok((combine(layout, collected, artifact)?, layers))
}

/// What the tag is to name: the image, the artifact, or an index of both.
fn combine(
    layout: &Layout,
    collected: Option<Collected>,
    artifact: Option<Artifact>,
) -> Result<Push> {
    let image = collected.map(|mut collected| {
        if let Some(artifact) = &artifact {
            collected.annotate(BLOCKS_ANNOTATION, &artifact.manifest.digest);
        }
        image_push(layout, collected)
    });
    match (image.transpose()?, artifact) {
        (Some((push, platform)), Some(artifact)) => Ok(both(push, &platform, artifact)),
        (Some((push, _)), None) => Ok(push),
        (None, Some(artifact)) => Ok(Push {
            blobs: artifact.blobs,
            documents: vec![artifact.manifest],
        }),
        (None, None) => Err(Error::internal("a push of nothing")),
    }
}

/// Writes out an image. Returns what is to be sent of it, and its platform.
fn image_push(layout: &Layout, collected: Collected) -> Result<(Push, serde_json::Value)> {
    let dir = layout.path().join("image");
    let digest = collected.layout(&dir)?;
    let failed = |path: &std::path::Path| format!("cannot read {}", path.display());
    let blobs = dir.join("blobs/sha256");
    let read = |path: &std::path::Path| std::fs::read(path).context(|| failed(path));
    let digits = digest.split(':').next_back().unwrap_or(&digest);
    let manifest = Document {
        media_type: MANIFEST_TYPE.into(),
        bytes: read(&blobs.join(digits))?,
        digest: digest.clone(),
    };
    let parsed = manifest.manifest()?;
    let mut seen = BTreeSet::new();
    let mut uploads = Vec::new();
    for blob in parsed.layers().iter().chain([&parsed.config]) {
        let digits = blob.digest.split(':').next_back().unwrap_or(&blob.digest);
        if seen.insert(blob.digest.clone()) {
            uploads.push(Upload {
                digest: blob.digest.clone(),
                size: blob.size,
                path: blobs.join(digits),
                from: None,
            });
        }
    }
    let index: serde_json::Value = serde_json::from_slice(&read(&dir.join("index.json"))?)
        .map_err(|error| Error::internal(format!("an index that was written: {error}")))?;
    let platform = index.pointer("/manifests/0/platform");
    let platform = platform.ok_or_else(|| Error::internal("an image without a platform"))?;
    Ok((
        Push {
            blobs: uploads,
            documents: vec![manifest],
        },
        platform.clone(),
    ))
}

/// One tag for everybody: docs/registry.md.
#[expect(clippy::indexing_slicing, reason = "a JSON object takes any key")]
fn both(mut push: Push, platform: &serde_json::Value, artifact: Artifact) -> Push {
    let mut entries = Vec::new();
    for image in &push.documents {
        let mut entry = described(image);
        entry["platform"] = platform.clone();
        entries.push(entry);
        let mut entry = described(&artifact.manifest);
        entry["artifactType"] = json!(ARTIFACT_TYPE);
        entry["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
        entry["annotations"] = json!({ IMAGE_ANNOTATION: image.digest });
        entries.push(entry);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": entries,
    });
    let known: BTreeSet<String> = push.blobs.iter().map(|blob| blob.digest.clone()).collect();
    let new = artifact
        .blobs
        .into_iter()
        .filter(|blob| !known.contains(&blob.digest));
    push.blobs.extend(new);
    push.documents.push(artifact.manifest);
    push.documents.push(document(INDEX_TYPE, &index));
    push
}
