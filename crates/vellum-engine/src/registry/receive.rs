//! Block layers of an artifact: fetched, checked, and made the store's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vellum_base::block::{BlockState, Run};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::layer::{Header, LazyContent, LazyLayer, SealedLayer};
use vellum_image::blob_name;
use vellum_registry::artifact::{
    CONFIG_TYPE, ChunkReader, DATA_TYPE, ENCRYPTED_CONFIG_TYPE, HOT_HEADER_LEN, HOT_TYPE, LayerKey,
    MAX_HOT_FRAMES, MAX_LAYERS, MAX_TABLE, TABLE_TYPE, Table,
};
use vellum_registry::{Access, Descriptor, Identities, Manifest};
use vellum_store::{DiskInfo, ImageRecord, LayerInfo, StagedLayer, Store, StoreGuard, now};

use super::super::import::LayerOutcome;
use super::super::lazy::Remote;
use super::super::staged::{open_staged, seal_as, write_run};
use super::super::template;
use super::super::watch::Watch;
use super::description::Description;
use super::layout::{Layout, digest_of};
use super::pull::check_size;
use super::push::short;
use super::sealed::Opened;

/// The longest configuration of an artifact.
const MAX_CONFIG: u64 = 4 << 20;

/// The most bytes of a hot pack that are no frames.
const MAX_HOT_LIST: u64 = (HOT_HEADER_LEN + 16 * MAX_HOT_FRAMES) as u64;

/// What an artifact is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub config: Descriptor,
    /// From the bottom up.
    pub layers: Vec<LayerBlobs>,
    /// What a start needs first.
    pub hot: Option<Descriptor>,
}

/// The blobs of a layer.
#[derive(Debug)]
pub(super) struct LayerBlobs {
    pub table: Descriptor,
    data: Option<Descriptor>,
}

/// Where blobs are, and how to ask there.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    reference: String,
    access: Access,
}

impl Origin {
    /// What [`vellum_registry::Place::whereabouts`] says.
    pub fn at((reference, access): (String, Access)) -> Self {
        Origin { reference, access }
    }

    /// As [`vellum_registry::Place::whereabouts`].
    pub fn whereabouts(&self) -> (String, Access) {
        (self.reference.clone(), self.access)
    }
}

impl Parts {
    /// The configuration and the tables, which are fetched first.
    pub fn descriptions(&self) -> impl Iterator<Item = &Descriptor> {
        let tables = self.layers.iter().map(|layer| &layer.table);
        std::iter::once(&self.config).chain(tables)
    }

    /// Whether its configuration, and so its layers, are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.config.is(ENCRYPTED_CONFIG_TYPE)
    }

    /// Of all its blobs.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter();
        let layers = layers.flat_map(|layer| std::iter::once(&layer.table).chain(&layer.data));
        let all = layers.chain([&self.config]);
        all.map(|blob| blob.digest.as_str())
    }
}

/// Takes an artifact's manifest apart.
///
/// # Errors
/// [`ErrorKind::Corrupt`].
pub(super) fn parts(manifest: &Manifest) -> Result<Parts> {
    let bad = |what: &str| {
        Err(Error::new(
            ErrorKind::Corrupt,
            format!("an artifact {what}"),
        ))
    };
    if !manifest.config.is(CONFIG_TYPE) && !manifest.config.is(ENCRYPTED_CONFIG_TYPE) {
        return bad("with a configuration of another type");
    }
    check_size(&manifest.config, MAX_CONFIG, "configuration")?;
    let mut layers: Vec<LayerBlobs> = Vec::new();
    // A table or data, right behind which data may stand, or not.
    let mut after_table = false;
    for entry in manifest.layers() {
        if entry.is(TABLE_TYPE) {
            check_size(entry, MAX_TABLE, "table")?;
            layers.push(LayerBlobs {
                table: entry.clone(),
                data: None,
            });
            after_table = true;
            continue;
        }
        if entry.is(DATA_TYPE) {
            match layers.last_mut().filter(|_| after_table) {
                Some(layer) => layer.data = Some(entry.clone()),
                None => return bad("with data that no table stands in front of"),
            }
        }
        after_table = false;
    }
    // One that is named many times is taken apart as often.
    let tables = layers.iter().map(|layer| layer.table.size);
    if tables.fold(0, u64::saturating_add) > MAX_TABLE {
        return bad(&format!(
            "whose tables have more than {MAX_TABLE} bytes together"
        ));
    }
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return bad(&format!("with {} layers", layers.len()));
    }
    let data = layers.iter().filter_map(|layer| layer.data.as_ref());
    let data = data
        .map(|data| data.size)
        .fold(MAX_HOT_LIST, u64::saturating_add);
    // One that makes no sense is none.
    let usable = |entry: &&Descriptor| {
        entry.is(HOT_TYPE) && entry.size <= data && blob_name(&entry.digest).is_ok()
    };
    let hot = manifest.layers().iter().find(usable).cloned();
    Ok(Parts {
        config: manifest.config.clone(),
        layers,
        hot,
    })
}

/// Reads the configuration, which was fetched; identities are looked for only where it is encrypted.
///
/// # Errors
/// As [`Opened::plain`] and [`Opened::encrypted`], and those of `identities`.
pub(super) fn open(
    layout: &Layout,
    parts: &Parts,
    identities: impl FnOnce() -> Result<Identities>,
) -> Result<Opened> {
    let config = layout.read(&parts.config.digest)?;
    match parts.is_encrypted() {
        true => Opened::encrypted(&config, &identities()?),
        false => Opened::plain(&config),
    }
}

/// A layer of the artifact.
struct Layer {
    table: Table,
    /// The table's key, if it is encrypted.
    key: Option<LayerKey>,
    /// The table's blob.
    blob: Descriptor,
    data: Option<Descriptor>,
    /// The store has it.
    there: Option<Uuid>,
}

/// Makes layers of blobs.
pub(super) struct Receiver<'a> {
    store: &'a Store,
    pin: &'a StoreGuard,
    layout: &'a Layout,
    watch: &'a dyn Watch,
    description: Description,
    layers: Vec<Layer>,
    /// Where the blobs can be had again; nowhere, where they came in a file.
    from: Option<Origin>,
    /// Layers are made of which nothing is here.
    lazily: bool,
}

impl<'a> Receiver<'a> {
    /// Looks at the tables, which were fetched `from` there as the configuration was, and for layers that the store has.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`].
    pub fn new(
        from: Option<&Origin>,
        store: &'a Store,
        pin: &'a StoreGuard,
        layout: &'a Layout,
        watch: &'a dyn Watch,
        (parts, opened): (&Parts, Opened),
    ) -> Result<Self> {
        let mut layers = Vec::new();
        if !opened.is_of(parts.layers.len()) {
            return Err(of_other_layers());
        }
        for (index, blobs) in parts.layers.iter().enumerate() {
            layers.push(open_table(layout, blobs, &opened, index)?);
        }
        let size = layers.last().map(|layer| layer.table.virtual_size);
        if size != Some(opened.description.disk.virtual_size) {
            return Err(of_other_layers());
        }
        let bottom = parts.layers.first();
        let template = bottom.and_then(|blobs| opened.template(0, &blobs.table));
        let template = template.map(str::to_owned);
        let mut receiver = Receiver {
            store,
            pin,
            layout,
            watch,
            description: opened.description,
            layers,
            from: from.cloned(),
            lazily: false,
        };
        receiver.make_template(template.as_deref())?;
        receiver.look()?;
        Ok(receiver)
    }

    /// The disk that all of its layers are.
    pub fn disk(&self) -> &DiskInfo {
        &self.description.disk
    }

    /// Only so many of its layers, from the bottom up, are made.
    pub fn up_to(mut self, count: usize) -> Self {
        self.layers.truncate(count);
        self
    }

    /// From now on its layers are made lazy: their data is not fetched.
    pub fn lazily(mut self) -> Result<Self> {
        self.lazily = true;
        let mut below: Option<Header> = None;
        for layer in &mut self.layers {
            let found = match layer.there {
                Some(uuid) => Some(Header::read(
                    &**self.store.storage(),
                    &self.store.layer_dir(uuid),
                )?),
                None => find_lazy(self.store, below.as_ref(), &layer.blob)?,
            };
            let Some(header) = found else { break };
            layer.there = Some(header.uuid);
            below = Some(header);
        }
        Ok(self)
    }

    /// Makes the empty file system at the bottom, where this host makes such ones: then it is not fetched.
    fn make_template(&self, key: Option<&str>) -> Result<()> {
        let Some(layer) = self.layers.first() else {
            return Ok(());
        };
        let size = layer.table.virtual_size;
        if key == Some(&template::key(size)) {
            let made = template::get(self.store, size, self.pin);
            if let Err(error) = made {
                tracing::info!(
                    "the empty file system is fetched, as it cannot be made here: {error}"
                );
            }
        }
        Ok(())
    }

    /// Finds the layers that the store has, from the bottom up.
    fn look(&mut self) -> Result<()> {
        let mut below: Option<Header> = None;
        for layer in &mut self.layers {
            let found = find(self.store, below.as_ref(), &layer.table)?;
            let Some(header) = found else { break };
            self.watch.exists(&short(&digest_of(layer.table.digest)));
            layer.there = Some(header.uuid);
            below = Some(header);
        }
        Ok(())
    }

    /// The data that has to be fetched.
    pub fn wanted(&self) -> Vec<Descriptor> {
        let missing = self.layers.iter().filter(|layer| layer.there.is_none());
        missing.filter_map(|layer| layer.data.clone()).collect()
    }

    /// As [`Receiver::receive_layers`], with the image that they are.
    ///
    /// # Errors
    /// As [`Receiver::receive_layers`].
    pub fn receive(&self, name: &str) -> Result<(ImageRecord, Vec<LayerOutcome>)> {
        let outcomes = self.receive_layers()?;
        let image = ImageRecord {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            layers: outcomes.iter().map(|outcome| outcome.layer).collect(),
            disk: self.description.disk.clone(),
            config: self.description.config.clone(),
            created: now(),
        };
        Ok((image, outcomes))
    }

    /// Writes the layers, whose data was fetched, makes sure of their digests, and publishes them. No record names
    /// them yet.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is not what it is to be: nothing is published then.
    pub fn receive_layers(&self) -> Result<Vec<LayerOutcome>> {
        let mut below: Option<Header> = None;
        let mut ready = Vec::new();
        let layers = self.layers.iter().zip(&self.description.layers);
        for (index, (layer, known)) in layers.enumerate() {
            if let Some(uuid) = layer.there {
                let (storage, dir) = (&**self.store.storage(), self.store.layer_dir(uuid));
                let header = Header::read(storage, &dir)?;
                if let Some(key) = &layer.key {
                    let _guard = self.store.lock()?;
                    Remote::bring_key(storage, &dir, &layer.blob.digest, key)?;
                }
                ready.push(Ready::There(uuid, self.store.layer_info(uuid)?));
                below = Some(header);
                continue;
            }
            let parent = below.as_ref().map(Header::known_as);
            let header = Header::new(parent, layer.table.virtual_size)?;
            let staged = self.store.stage_received(&header)?;
            self.note_remote(layer, &staged)?;
            let bytes = match self.lazily {
                true => self.make_lazy(layer, &staged)?,
                false => {
                    let bytes = self.write(layer, &staged)?;
                    self.forget_data(index)?;
                    bytes
                }
            };
            let info = known.clone().info(&header, bytes);
            below = Some(header);
            ready.push(Ready::Staged(Box::new(staged), info));
            crash_point::here("pull: layer staged");
        }
        self.publish(ready)
    }

    /// Writes a layer, and seals it. Returns the bytes of its data blocks.
    fn write(&self, layer: &Layer, staged: &StagedLayer) -> Result<u64> {
        let table = &layer.table;
        let open = open_staged(self.store, staged)?;
        let name = short(&digest_of(table.digest));
        let mut progress = self.watch.begin(&name, Some(table.data_blocks().bytes()));
        if let Some(data) = &layer.data {
            let path = self.layout.blob(&data.digest)?;
            let failed = || format!("cannot read {}", path.display());
            let file = File::open(&path).context(failed)?;
            let mut reader = ChunkReader::new()?;
            let mut stored = Vec::new();
            for window in table.windows() {
                interrupt::check()?;
                stored.resize(window.chunk.len as usize, 0);
                file.read_exact_at(&mut stored, window.chunk.offset)
                    .context(failed)?;
                let blocks = reader.blocks(&window, &stored);
                let blocks =
                    blocks.map_err(|error| error.context(format!("blob {}", data.digest)))?;
                for (span, bytes) in blocks {
                    write_run(&open, Run::new(span, BlockState::Data), bytes)?;
                    if let Some(progress) = &mut progress {
                        progress(span.len().bytes());
                    }
                }
            }
        }
        let zeros = table.extents.iter();
        for run in zeros.filter(|run| run.value == BlockState::Zero) {
            interrupt::check()?;
            write_run(&open, *run, &[])?;
        }
        self.watch.done();
        let bytes = open.data_blocks().bytes();
        seal_as(self.store, staged, open, &table.digest)?;
        Ok(bytes)
    }

    /// Notes where a layer's blocks can be had again.
    fn note_remote(&self, layer: &Layer, staged: &StagedLayer) -> Result<()> {
        let Some(from) = &self.from else {
            return Ok(());
        };
        let remote = Remote {
            reference: from.reference.clone(),
            plain_http: from.access.plain_http,
            table: layer.blob.digest.clone(),
            data: layer.data.as_ref().map(|data| data.digest.clone()),
            background: None,
            keep: false,
        };
        let table = self.layout.read(&layer.blob.digest)?;
        remote.write(
            &**self.store.storage(),
            &staged.dir(),
            (&table, layer.key.as_ref()),
        )
    }

    /// Makes a layer of which nothing is here. Returns the bytes that its data blocks will have.
    fn make_lazy(&self, layer: &Layer, staged: &StagedLayer) -> Result<u64> {
        let (storage, dir) = (&**self.store.storage(), staged.dir());
        let table = &layer.table;
        let content = LazyContent {
            power: table.power,
            digest: table.digest,
            extents: &table.extents,
        };
        LazyLayer::make(storage, &dir, &staged.header, &content)?;
        Ok(table.data_blocks().bytes())
    }

    /// Removes the data of a layer that was written, unless a layer above has the same.
    fn forget_data(&self, index: usize) -> Result<()> {
        let mut left = self.layers.iter().skip(index);
        let Some(data) = left.next().and_then(|layer| layer.data.as_ref()) else {
            return Ok(());
        };
        let same =
            |layer: &Layer| matches!(&layer.data, Some(other) if other.digest == data.digest);
        if left.any(|layer| layer.there.is_none() && same(layer)) {
            return Ok(());
        }
        let path = self.layout.blob(&data.digest)?;
        std::fs::remove_file(&path).context(|| format!("cannot remove {}", path.display()))
    }

    fn publish(&self, ready: Vec<Ready>) -> Result<Vec<LayerOutcome>> {
        let mut outcomes = Vec::new();
        for one in ready {
            let (layer, existed, info) = match one {
                Ready::There(layer, info) => (layer, true, info),
                Ready::Staged(staged, info) => {
                    let layer = staged.publish(&info, self.pin)?;
                    crash_point::here("pull: layer published");
                    (layer, false, info)
                }
            };
            outcomes.push(LayerOutcome::new(layer, existed, info));
        }
        Ok(outcomes)
    }
}

/// A layer that a record can name soon.
enum Ready {
    There(Uuid, LayerInfo),
    Staged(Box<StagedLayer>, LayerInfo),
}

fn of_other_layers() -> Error {
    let text = "an artifact whose configuration is of other layers";
    Error::new(ErrorKind::Corrupt, text)
}

fn open_table(layout: &Layout, blobs: &LayerBlobs, opened: &Opened, index: usize) -> Result<Layer> {
    let table = opened.table(index, &blobs.table, layout)?;
    let len = blobs.data.as_ref().map_or(0, |data| data.size);
    if len != table.data_len {
        let text = format!(
            "the table {} is of {} bytes of data, not {len}",
            blobs.table.digest, table.data_len
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    Ok(Layer {
        table,
        key: opened.key(index),
        blob: blobs.table.clone(),
        data: blobs.data.clone(),
        there: None,
    })
}

/// The sealed layers of the store that lie on `below`, with their directories.
fn layers_on(
    store: &Store,
    below: Option<&Header>,
) -> Result<impl Iterator<Item = (Header, PathBuf)>> {
    let layers = store.layers()?.into_iter();
    Ok(layers.filter_map(move |layer| {
        let dir = store.layer_dir(layer);
        // What cannot be read is not the one that is looked for.
        let header = Header::read(&**store.storage(), &dir).ok()?;
        (header.sealed && header.fits_on(below)).then_some((header, dir))
    }))
}

/// A lazy layer of the store with the same table in the same place. Its digest is only what the table says, so that it
/// is not known by that.
fn find_lazy(store: &Store, below: Option<&Header>, table: &Descriptor) -> Result<Option<Header>> {
    let same = |dir: &Path| {
        let remote = Remote::read(&**store.storage(), dir);
        matches!(remote, Ok(Some(remote)) if remote.table == table.digest)
    };
    let found = layers_on(store, below)?.find(|(_, dir)| same(dir));
    Ok(found.map(|(header, _)| header))
}

/// A layer of the store with the same digest in the same place: known by what it holds, which was read when it was
/// sealed, and not by what anybody says of it.
fn find(store: &Store, below: Option<&Header>, table: &Table) -> Result<Option<Header>> {
    let whole = |header: &Header| {
        let info = store.layer_info(header.uuid);
        info.is_ok_and(|info| info.damaged.is_none())
    };
    let same = |dir: &Path| {
        let sealed = SealedLayer::open(&**store.storage(), dir);
        sealed.is_ok_and(|sealed| sealed.digest() == Some(table.digest))
    };
    let found = layers_on(store, below)?.find(|(header, dir)| {
        header.virtual_size == table.virtual_size && whole(header) && same(dir)
    });
    Ok(found.map(|(header, _)| header))
}
