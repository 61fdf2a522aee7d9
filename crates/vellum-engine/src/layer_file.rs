//! Images of layer files: docs/images.md, "Layer files". [`crate::export`] writes them.

use std::collections::HashSet;
use std::io::Read;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::complete::checksum_layer;
use super::import::{ImportOptions, LayerOutcome};
use super::staged::{open_staged, seal_as, write_run};
use super::template;
use super::watch::Watch;
use vellum_backup::{LayerEntry, LayerPart, LayerReader};
use vellum_base::block::BLOCK_SIZE;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::layer::{Header, SealedLayer, WritableLayer, check_size};
use vellum_image::ImageConfig;
use vellum_store::{DiskInfo, ImageRecord, LayerInfo, StagedLayer, Store, StoreGuard, now};

/// What a layer file says of its image, as JSON. Fields may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Description {
    /// The version of the program that wrote it.
    pub vellum: String,
    /// What was exported.
    pub name: String,
    /// The image whose layers were left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without: Option<String>,
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// How it is run, and its history.
    pub config: ImageConfig,
    /// When it was exported, RFC 3339.
    pub created: String,
}

/// What a layer file says of a layer beside its header, as JSON. Fields may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// How it came to be, for people.
    pub origin: String,
    /// The digest of the uncompressed tar that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// For the empty file system at the bottom, by which it is told from layers of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

impl Known {
    /// What others are told of a layer.
    pub fn of(info: LayerInfo) -> Self {
        Known {
            origin: info.origin,
            diff_id: info.diff_id,
            template: info.chain_key.filter(|key| template::is_key(key)),
        }
    }

    /// What is believed of it. A chain key by which an import would find the layer is not: the file may say
    /// anything, and the layer would be taken for one that its maker did not make.
    pub fn info(self, header: &Header, bytes: u64) -> LayerInfo {
        let template = self.template.filter(|key| template::is_key(key));
        LayerInfo {
            origin: self.origin,
            diff_id: self.diff_id,
            chain_key: template.filter(|_| header.parent.is_none()),
            bytes,
            damaged: None,
        }
    }

    /// As the format has it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        encode(self)
    }
}

impl Description {
    /// As the format has it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        encode(self)
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let description: Description = decode(bytes)?;
        check_disk(&description.disk)?;
        Ok(description)
    }
}

/// Makes sure that what a file or an artifact says of its disk is possible.
///
/// # Errors
/// [`ErrorKind::Corrupt`]; [`ErrorKind::Unsupported`] for a file system that is not known.
pub(crate) fn check_disk(disk: &DiskInfo) -> Result<()> {
    check_size(disk.virtual_size)
        .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
    if let Some(shown) = disk.device_size {
        let hidden = disk.virtual_size.checked_sub(shown);
        if hidden.is_none_or(|hidden| hidden >= BLOCK_SIZE) {
            let size = disk.virtual_size;
            let text = format!("a device of {shown} bytes in layers of {size} bytes");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
    }
    if let Some(fs) = &disk.fs
        && !matches!(&fs.kind[..], "ext2" | "ext3" | "ext4")
    {
        let text = format!("its file system is of the kind {:?}, not an ext4", fs.kind);
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::internal(format!("a layer file cannot be described: {error}")))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let text = "what the layer file says of its image or a layer makes no sense";
        Error::with_source(ErrorKind::Corrupt, text, error)
    })
}

/// Refuses options that a layer file has no place for.
///
/// # Errors
/// [`ErrorKind::InvalidInput`].
pub(crate) fn check_options(options: &ImportOptions) -> Result<()> {
    let given = [
        ("--size", options.size.is_some()),
        ("--from", options.from.is_some()),
        ("--select", options.select.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{option} is not for a layer file, which has its layers as they are"),
        )),
        None => Ok(()),
    }
}

/// Reads a layer file to its end, and publishes those of its layers that the store does not have. No record names
/// them yet.
///
/// # Errors
/// As [`LayerReader::new`] and [`LayerReader::next_part`]; [`ErrorKind::NotFound`] for a layer that is left out and not
/// here; [`ErrorKind::AlreadyExists`] for one that is here with another content. Nothing is published then.
pub(crate) fn receive(
    store: &Store,
    name: &str,
    input: Box<dyn Read + Send>,
    pin: &StoreGuard,
    watch: &dyn Watch,
) -> Result<(ImageRecord, Vec<LayerOutcome>)> {
    let mut reader = LayerReader::new(input)?;
    let description = Description::decode(reader.description())?;
    let mut receiver = Receiver {
        store,
        description: &description,
        watch,
        seen: HashSet::new(),
        below: None,
        open: None,
        layers: Vec::new(),
    };
    while let Some(part) = reader.next_part()? {
        interrupt::check()?;
        match part {
            LayerPart::Layer(entry) => receiver.begin(&entry)?,
            LayerPart::Chunk(chunk) => {
                // Of one that is here already, nothing is to be done but to check the file.
                let Some(open) = &receiver.open else { continue };
                for (run, bytes) in chunk.pieces() {
                    write_run(&open.layer, run, bytes)?;
                }
                crash_point::here("layer file: piece written");
            }
        }
    }
    receiver.end_layer()?;
    watch.done();
    let outcomes = receiver.publish(pin)?;
    let image = ImageRecord {
        name: name.to_owned(),
        id: Uuid::new_v4(),
        layers: outcomes.iter().map(|outcome| outcome.layer).collect(),
        disk: description.disk,
        config: description.config,
        created: now(),
    };
    Ok((image, outcomes))
}

/// A layer that is being written.
struct Open {
    // Closed before its directory is removed.
    layer: Arc<WritableLayer>,
    staged: StagedLayer,
    digest: [u8; 32],
    known: Known,
}

/// A layer of the file that was read.
enum Received {
    /// The store had it.
    There { layer: Uuid, info: LayerInfo },
    /// Sealed and checked, in `staging`.
    Staged {
        staged: Box<StagedLayer>,
        digest: [u8; 32],
        info: LayerInfo,
    },
}

struct Receiver<'a> {
    store: &'a Store,
    description: &'a Description,
    watch: &'a dyn Watch,
    seen: HashSet<Uuid>,
    /// The layer before.
    below: Option<Header>,
    open: Option<Open>,
    layers: Vec<Received>,
}

impl Receiver<'_> {
    fn begin(&mut self, entry: &LayerEntry) -> Result<()> {
        self.end_layer()?;
        let header = Header::decode(&entry.header).context(|| "the header of a layer")?;
        let layer = header.uuid;
        let known: Known = decode(&entry.info)?;
        if !header.sealed
            || header.virtual_size != entry.virtual_size
            || !header.fits_on(self.below.as_ref())
            || !self.seen.insert(layer)
        {
            let text = format!(
                "the layer {layer} is not sealed, of two sizes, there twice or does not fit on the one before"
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        if self.store.has_layer(layer)? {
            check_same(self.store, &header, &entry.digest)?;
            self.watch.exists(&layer.to_string());
            let info = self.store.layer_info(layer)?;
            self.layers.push(Received::There { layer, info });
        } else if entry.left_out {
            return Err(self.missing(layer, &known));
        } else {
            let staged = self.store.stage_received(&header)?;
            let layer = open_staged(self.store, &staged)?;
            self.open = Some(Open {
                layer,
                staged,
                digest: entry.digest,
                known,
            });
        }
        self.below = Some(header);
        Ok(())
    }

    fn missing(&self, layer: Uuid, known: &Known) -> Error {
        let image = match &self.description.without {
            Some(image) => format!("the image {image}"),
            None => "the image that has it".into(),
        };
        Error::new(
            ErrorKind::NotFound,
            format!(
                "the layer {layer} ({}) is left out of the file and not in this store: bring {image} here first \
                 (`vellum export --format layer` of it), or export {} without --without",
                known.origin, self.description.name
            ),
        )
    }

    /// Seals the layer that is being written, and makes sure that it is what it was.
    fn end_layer(&mut self) -> Result<()> {
        let Some(Open {
            layer,
            staged,
            digest,
            known,
        }) = self.open.take()
        else {
            return Ok(());
        };
        let bytes = layer.data_blocks().bytes();
        seal_as(self.store, &staged, layer, &digest)?;
        let info = known.info(&staged.header, bytes);
        self.layers.push(Received::Staged {
            staged: Box::new(staged),
            digest,
            info,
        });
        crash_point::here("layer file: layer staged");
        Ok(())
    }

    /// Gives the layers their places, from the bottom up: each is there only with all below it.
    fn publish(self, pin: &StoreGuard) -> Result<Vec<LayerOutcome>> {
        let mut outcomes = Vec::new();
        for received in self.layers {
            let (layer, existed, info) = match received {
                Received::There { layer, info } => (layer, true, info),
                Received::Staged {
                    staged,
                    digest,
                    info,
                } => {
                    let layer = staged.header.uuid;
                    // Another import of the same layer may have come first.
                    let existed = self.store.has_layer(layer)?;
                    if existed {
                        let header = Header {
                            sealed: true,
                            ..staged.header.clone()
                        };
                        check_same(self.store, &header, &digest)?;
                    } else {
                        staged.publish(&info, pin)?;
                        crash_point::here("layer file: layer published");
                    }
                    (layer, existed, info)
                }
            };
            outcomes.push(LayerOutcome::new(layer, existed, info));
        }
        Ok(outcomes)
    }
}

/// Makes sure that a layer of the store is the one of a file.
fn check_same(store: &Store, header: &Header, digest: &[u8; 32]) -> Result<()> {
    let layer = header.uuid;
    let dir = store.layer_dir(layer);
    let storage = &**store.storage();
    let other = |what: &str| {
        Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "the store has another layer {layer}: {what} is not that of the file, which was changed, or is of \
                 a container that is here too"
            ),
        )
    };
    if Header::read(storage, &dir)? != *header {
        return Err(other("its header"));
    }
    if let Some(damaged) = store.layer_info(layer)?.damaged {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the layer {layer} of the store is damaged: {damaged}; see `vellum check`"),
        ));
    }
    if SealedLayer::open(storage, &dir)?.digest().is_none() {
        checksum_layer(store, layer, |_| {})?;
    }
    if SealedLayer::open(storage, &dir)?.digest().as_ref() != Some(digest) {
        return Err(other("its content"));
    }
    Ok(())
}
