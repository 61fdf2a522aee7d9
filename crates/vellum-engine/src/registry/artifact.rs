//! An image's block layers as blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufWriter;

use serde_json::{Value, json};
use uuid::Uuid;
use vellum_base::error::{Error, Result};
use vellum_core::layer::SealedLayer;
use vellum_registry::artifact::{
    ARTIFACT_TYPE, CONFIG_TYPE, DATA_TYPE, DIFF_ID_ANNOTATION, DIGEST_ANNOTATION, Encoded,
    HOT_TYPE, LayerEncoder, SIZE_ANNOTATION, TABLE_TYPE, TEMPLATE_ANNOTATION, Table, power_for,
};
use vellum_registry::{Document, MANIFEST_TYPE, Upload};

use super::super::export::layers::{Piece, checksummed, config, each_piece};
use super::super::export::subject::Subject;
use super::super::layer_file::Known;
use super::super::watch::Watch;
use super::description::Description;
use super::hot::{self, Hot, Written};
use super::layout::{Layout, digest_of, document};
use super::metadata;
use super::pushed::PushedLayer;

/// An artifact that lies in a layout.
pub(super) struct Artifact {
    pub manifest: Document,
    pub blobs: Vec<Upload>,
    pub layers: Vec<PushedLayer>,
}

/// Writes the layers of a subject, all of them sealed, into a layout; and the hot pack, if there is to be one.
///
/// # Errors
/// Where a layer cannot be read, or the layout written; as [`hot::write`].
pub(super) fn write(
    subject: &Subject<'_>,
    layout: &Layout,
    level: i32,
    (diff_ids, hot): (&[(Uuid, String)], Hot<'_>),
    watch: &dyn Watch,
) -> Result<Artifact> {
    if subject.container.is_some() {
        return Err(Error::internal(
            "the layers of a container that is not sealed",
        ));
    }
    let diff_ids: BTreeMap<&Uuid, &String> = diff_ids.iter().map(|(uuid, id)| (uuid, id)).collect();
    let mut description = Description {
        disk: subject.disk.clone(),
        config: config(subject),
        layers: Vec::new(),
    };
    let mut entries = Vec::new();
    let mut blobs = Vec::new();
    let mut written = Vec::new();
    let mut layers = Vec::new();
    for layer in &subject.layers {
        let sealed = checksummed(subject.store, *layer)?;
        let known = Known::of(subject.store.layer_info(*layer)?);
        let (table, blob, data) = layer_blobs(&sealed, layout, level, watch)?;
        let diff_id = diff_ids.get(layer).map(|id| id.as_str());
        entries.push(table_entry(&sealed, &known, diff_id, &blob)?);
        layers.push(PushedLayer {
            layer: *layer,
            table: blob.digest.clone(),
            data: data.as_ref().map(|data| data.digest.clone()),
        });
        blobs.push(blob);
        written.push(Written {
            digest: digest_of(table.digest),
            power: table.power,
            extents: table.extents,
            chunks: table.chunks,
            data: data.as_ref().map(|data| data.path.clone()),
        });
        if let Some(data) = data {
            entries.push(entry(DATA_TYPE, &data));
            blobs.push(data);
        }
        description.layers.push(known);
    }
    if let Hot::Pack(trace) = hot
        && let Some(pack) = hot::write(trace, &metadata::find(subject)?, &written, layout)?
    {
        entries.push(entry(HOT_TYPE, &pack));
        blobs.push(pack);
    }
    let config = layout.add(&description.encode()?)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": entry(CONFIG_TYPE, &config),
        "layers": entries,
    });
    blobs.push(config);
    // Layers of equal content have one table, and one blob of data.
    let mut known = BTreeSet::new();
    blobs.retain(|blob| known.insert(blob.digest.clone()));
    Ok(Artifact {
        manifest: document(MANIFEST_TYPE, &manifest),
        blobs,
        layers,
    })
}

fn entry(media_type: &str, blob: &Upload) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.size })
}

#[expect(clippy::indexing_slicing, reason = "a JSON object takes any key")]
fn table_entry(
    sealed: &SealedLayer,
    known: &Known,
    diff_id: Option<&str>,
    table: &Upload,
) -> Result<Value> {
    let size = sealed.header().virtual_size.to_string();
    let mut said = BTreeMap::from([
        (DIGEST_ANNOTATION, digest_of(digest(sealed)?)),
        (SIZE_ANNOTATION, size),
    ]);
    said.extend(known.template.clone().map(|key| (TEMPLATE_ANNOTATION, key)));
    said.extend(diff_id.map(|id| (DIFF_ID_ANNOTATION, id.to_owned())));
    let mut entry = entry(TABLE_TYPE, table);
    entry["annotations"] = json!(said);
    Ok(entry)
}

fn digest(sealed: &SealedLayer) -> Result<[u8; 32]> {
    sealed
        .digest()
        .ok_or_else(|| Error::internal("a layer with checksums has no digest"))
}

/// Writes a layer's table, and its data unless it has none. Returns the table too.
fn layer_blobs(
    sealed: &SealedLayer,
    layout: &Layout,
    level: i32,
    watch: &dyn Watch,
) -> Result<(Table, Upload, Option<Upload>)> {
    let blocks = sealed.data_blocks();
    let (path, file) = layout.unnamed()?;
    let out = BufWriter::with_capacity(1 << 20, file);
    let mut encoder = LayerEncoder::new(out, power_for(blocks), level)?;
    let name = sealed.header().uuid.to_string();
    let progress = watch.begin(&name, Some(blocks.bytes()));
    each_piece(sealed, progress, |piece| {
        match piece {
            Piece::Zero(span) => encoder.zero(span),
            Piece::Data(block, bytes) => encoder.data(block, bytes)?,
        }
        Ok(())
    })?;
    watch.done();
    let Encoded { table, sha256, .. } =
        encoder.finish(sealed.header().virtual_size, digest(sealed)?)?;
    let len = table.data_len;
    let data = match len {
        0 => None,
        len => Some(layout.name(&path, sha256, len)?),
    };
    let blob = layout.add(&table.encode()?)?;
    Ok((table, blob, data))
}
