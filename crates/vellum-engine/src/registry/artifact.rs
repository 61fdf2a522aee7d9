//! An image's block layers as blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufWriter;

use serde_json::{Value, json};
use uuid::Uuid;
use vellum_base::error::{Error, Result};
use vellum_core::layer::SealedLayer;
use vellum_registry::artifact::{
    ARTIFACT_TYPE, CONFIG_TYPE, DATA_TYPE, DIFF_ID_ANNOTATION, DIGEST_ANNOTATION,
    ENCRYPTED_CONFIG_TYPE, Encoded, HOT_TYPE, LayerEncoder, LayerKey, SIZE_ANNOTATION, TABLE_TYPE,
    TEMPLATE_ANNOTATION, Table, power_for,
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
use super::sealed::{Sealing, Secret, seal};

/// An artifact that lies in a layout.
pub(super) struct Artifact {
    pub manifest: Document,
    pub blobs: Vec<Upload>,
    pub layers: Vec<PushedLayer>,
}

/// Writes the layers of a subject, all of them sealed, into a layout, encrypted if it is said with what; and the hot pack, if
/// there is to be one.
///
/// # Errors
/// Where a layer cannot be read, or the layout written; as [`hot::write`].
pub(super) fn write(
    subject: &Subject<'_>,
    layout: &Layout,
    (level, sealing): (i32, Option<&Sealing>),
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
    let mut parts = Parts::default();
    for layer in &subject.layers {
        let sealed = checksummed(subject.store, *layer)?;
        let known = Known::of(subject.store.layer_info(*layer)?);
        let blobs = layer_blobs(&sealed, layout, (level, sealing), watch)?;
        parts.add(*layer, blobs, &known, diff_ids.get(layer).copied());
        description.layers.push(known);
    }
    let Parts {
        mut entries,
        mut blobs,
        written,
        layers,
        secrets,
    } = parts;
    if let Hot::Pack(trace) = hot
        && let Some(pack) = hot::write(trace, &metadata::find(subject)?, &written, layout)?
    {
        entries.push(entry(HOT_TYPE, &pack));
        blobs.push(pack);
    }
    let (config_type, config) = match sealing {
        Some(sealing) => {
            let sealed = seal(description, secrets, &sealing.recipients)?;
            (ENCRYPTED_CONFIG_TYPE, sealed)
        }
        None => (CONFIG_TYPE, description.encode()?),
    };
    let config = layout.add(&config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": entry(config_type, &config),
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

/// What was written of the layers so far.
#[derive(Default)]
struct Parts {
    /// Of the manifest.
    entries: Vec<Value>,
    blobs: Vec<Upload>,
    written: Vec<Written>,
    layers: Vec<PushedLayer>,
    /// Of each layer, if they are encrypted.
    secrets: Vec<Secret>,
}

impl Parts {
    /// Adds the next layer, which lies on those before.
    fn add(&mut self, layer: Uuid, blobs: LayerBlobs, known: &Known, diff_id: Option<&String>) {
        let LayerBlobs {
            table,
            blob,
            data,
            key,
        } = blobs;
        let said = match &key {
            Some(key) => {
                self.secrets.push(Secret {
                    digest: digest_of(table.digest),
                    template: known.template.clone(),
                    key: key.clone(),
                });
                BTreeMap::new()
            }
            None => annotations(&table, known, diff_id),
        };
        self.entries.push(table_entry(&table, said, &blob));
        self.layers.push(PushedLayer {
            layer,
            table: blob.digest.clone(),
            data: data.as_ref().map(|data| data.digest.clone()),
            key,
        });
        self.blobs.push(blob);
        self.written.push(Written {
            digest: digest_of(table.digest),
            power: table.power,
            extents: table.extents,
            chunks: table.chunks,
            data: data.as_ref().map(|data| data.path.clone()),
        });
        if let Some(data) = data {
            self.entries.push(entry(DATA_TYPE, &data));
            self.blobs.push(data);
        }
    }
}

fn entry(media_type: &str, blob: &Upload) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.size })
}

/// What everybody is told of a layer that is not encrypted.
fn annotations(
    table: &Table,
    known: &Known,
    diff_id: Option<&String>,
) -> BTreeMap<&'static str, String> {
    let mut said = BTreeMap::from([(DIGEST_ANNOTATION, digest_of(table.digest))]);
    said.extend(known.template.clone().map(|key| (TEMPLATE_ANNOTATION, key)));
    said.extend(diff_id.map(|id| (DIFF_ID_ANNOTATION, id.clone())));
    said
}

#[expect(clippy::indexing_slicing, reason = "a JSON object takes any key")]
fn table_entry(table: &Table, mut said: BTreeMap<&'static str, String>, blob: &Upload) -> Value {
    said.insert(SIZE_ANNOTATION, table.virtual_size.to_string());
    let mut entry = entry(TABLE_TYPE, blob);
    entry["annotations"] = json!(said);
    entry
}

fn digest(sealed: &SealedLayer) -> Result<[u8; 32]> {
    sealed
        .digest()
        .ok_or_else(|| Error::internal("a layer with checksums has no digest"))
}

/// What a layer was written to.
struct LayerBlobs {
    table: Table,
    /// The table's.
    blob: Upload,
    /// None where the layer has no data.
    data: Option<Upload>,
    /// The layer's key, if it is encrypted.
    key: Option<LayerKey>,
}

/// Writes a layer's table, and its data unless it has none.
fn layer_blobs(
    sealed: &SealedLayer,
    layout: &Layout,
    (level, sealing): (i32, Option<&Sealing>),
    watch: &dyn Watch,
) -> Result<LayerBlobs> {
    let salt = sealing.map(|sealing| &sealing.salt);
    let blocks = sealed.data_blocks();
    let (path, file) = layout.unnamed()?;
    let out = BufWriter::with_capacity(1 << 20, file);
    let encoder = LayerEncoder::new(out, power_for(blocks), level)?;
    let mut encoder = encoder.encrypted(salt);
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
    let (bytes, key) = match salt {
        Some(salt) => {
            let (bytes, key) = table.encode_encrypted(salt)?;
            (bytes, Some(key))
        }
        None => (table.encode()?, None),
    };
    Ok(LayerBlobs {
        blob: layout.add(&bytes)?,
        table,
        data,
        key,
    })
}
