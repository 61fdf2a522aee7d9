//! Layers in the store: staged, published, found again, leased to the one process that writes.

use std::path::PathBuf;

use uuid::Uuid;

use super::records::{LayerInfo, TemplateRecord};
use super::{Store, StoreGuard, record_bytes};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Held, Holder, LockMode, Unsynced, by};
use vellum_core::layer::{Header, WritableLayer};

const INFO_FILE: &str = "info.json";
pub(super) const LEASE_FILE: &str = "lease";
/// How often a lease is asked for, and how long apart.
const LEASE_ATTEMPTS: u32 = 5;
const LEASE_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
/// Locked by whoever serves an image with this top layer.
const READERS_FILE: &str = "readers";

/// A layer that is being made: in `staging`, until it is published or the guard is dropped.
#[derive(Debug)]
pub struct StagedLayer {
    store: Store,
    /// Identity, parent and size.
    pub header: Header,
    /// Where it is made.
    dir: PathBuf,
    /// It has its place in the store: there is nothing left to remove.
    placed: bool,
    /// What is not durable of its files, but for their names.
    unsynced: Vec<Unsynced>,
    /// Tells [`Store::prune`] that somebody works on it.
    _lease: LayerLease,
}

/// A layer that has its place in the store, and is durable with the first record that names it: a crash
/// before may leave any part of it, which is nobody's.
#[derive(Debug)]
#[must_use = "no record may name it before it is durable"]
pub struct PlacedLayer {
    /// Its identity.
    pub uuid: Uuid,
    /// What is not durable of it.
    pub(super) unsynced: Vec<Unsynced>,
}

/// The right to write a layer: no other process has it until this is dropped.
#[derive(Debug)]
pub struct LayerLease {
    _held: Box<dyn Held>,
}

impl StagedLayer {
    /// The layer's directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Makes the layer one of the store's, durably. No record names it yet: `pin` keeps it.
    ///
    /// # Errors
    /// Where the host fails; nothing is visible then.
    pub fn publish(mut self, info: &LayerInfo, _pin: &StoreGuard) -> Result<Uuid> {
        self.describe(info)?;
        let store = &self.store;
        let mut unsynced = self.unsynced.clone();
        unsynced.push(Unsynced::Names(self.dir.clone()));
        // Before it has its place: whoever finds it there by what it says may build on it.
        store
            .storage
            .sync_together(&unsynced)
            .context(|| format!("cannot sync the layer {}", self.dir.display()))?;
        let (uuid, _) = self.rename()?;
        let dir = self.store.layers_dir();
        self.store
            .storage
            .sync_dir(&dir)
            .context(|| format!("cannot sync {}", dir.display()))?;
        Ok(uuid)
    }

    /// Gives a layer that is still empty its place in the store: it can be opened from now on, but is durable
    /// only with the first record that names it.
    ///
    /// # Errors
    /// Where the host fails; nothing is visible then.
    pub fn place(mut self, info: &LayerInfo, _pin: &StoreGuard) -> Result<PlacedLayer> {
        self.describe(info)?;
        let (uuid, dir) = self.rename()?;
        let mut unsynced = std::mem::take(&mut self.unsynced);
        unsynced.push(Unsynced::Names(dir));
        Ok(PlacedLayer { uuid, unsynced })
    }

    fn describe(&mut self, info: &LayerInfo) -> Result<()> {
        let path = self.dir.join(INFO_FILE);
        let file = self
            .store
            .storage
            .create_file(&path, &record_bytes(info)?)
            .context(|| format!("cannot write {}", path.display()))?;
        self.unsynced.push(file);
        Ok(())
    }

    /// Gives the layer its name, and the place that this is.
    fn rename(&mut self) -> Result<(Uuid, PathBuf)> {
        let uuid = self.header.uuid;
        let target = self.store.layer_dir(uuid);
        self.store
            .storage
            .rename(&self.dir, &target)
            .context(|| format!("cannot publish the layer {}", target.display()))?;
        self.placed = true;
        Ok((uuid, target))
    }
}

impl Drop for StagedLayer {
    fn drop(&mut self) {
        if !self.placed {
            // What cannot be removed now, prune removes.
            let _ = self.store.storage.remove_tree(&self.dir);
        }
    }
}

impl Store {
    /// The directory of all published layers.
    pub(super) fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// The directory of a published layer.
    pub fn layer_dir(&self, layer: Uuid) -> PathBuf {
        self.layers_dir().join(layer.to_string())
    }

    /// The directory of a layer that is being made.
    pub fn staging_dir(&self, layer: Uuid) -> PathBuf {
        self.root.join("staging").join(layer.to_string())
    }

    /// The directories of layers, in the same order.
    pub fn layer_dirs(&self, layers: &[Uuid]) -> Vec<PathBuf> {
        layers.iter().map(|layer| self.layer_dir(*layer)).collect()
    }

    /// Makes an empty writable layer in `staging`, which is not durable.
    ///
    /// # Errors
    /// As [`Header::read`] of the parent, [`Header::new`] and [`WritableLayer::create_unsynced`].
    pub fn stage_layer(&self, parent: Option<Uuid>, virtual_size: u64) -> Result<StagedLayer> {
        self.stage(self.header_on(parent, virtual_size)?)
    }

    /// A header of a new layer on `parent`. It names what `parent` stands for, if it does: so `parent` may be
    /// joined again.
    fn header_on(&self, parent: Option<Uuid>, virtual_size: u64) -> Result<Header> {
        let below = match parent {
            Some(parent) => Some(Header::read(&*self.storage, &self.layer_dir(parent))?.known_as()),
            None => None,
        };
        Header::new(below, virtual_size)
    }

    /// As [`Store::stage_layer`], an empty layer that will be one of another store: with its identity, parent,
    /// place and time. It lies in `staging` by a name of its own, so that what an interrupted command left of the
    /// same layer is in nobody's way.
    ///
    /// # Errors
    /// As [`WritableLayer::create_unsynced`].
    pub fn stage_received(&self, header: &Header) -> Result<StagedLayer> {
        let header = Header {
            sealed: false,
            ..header.clone()
        };
        self.stage_in(header, self.staging_dir(Uuid::new_v4()))
    }

    fn stage(&self, header: Header) -> Result<StagedLayer> {
        let dir = self.staging_dir(header.uuid);
        self.stage_in(header, dir)
    }

    fn stage_in(&self, header: Header, dir: PathBuf) -> Result<StagedLayer> {
        let created = WritableLayer::create_unsynced(&*self.storage, &dir, &header);
        let mut unsynced = created.inspect_err(|error| {
            // Made in part; whoever is in the way by that name made it.
            if error.kind() != ErrorKind::AlreadyExists {
                let _ = self.storage.remove_tree(&dir);
            }
        })?;
        // Its names are made durable where it has its place.
        unsynced.retain(|one| matches!(one, Unsynced::File(_)));
        let lease = match self.try_lease(&dir) {
            Ok(Some(lease)) => lease,
            other => {
                let _ = self.storage.remove_tree(&dir);
                other?;
                return Err(Error::new(
                    ErrorKind::InUse,
                    "a new layer is locked already",
                ));
            }
        };
        Ok(StagedLayer {
            store: self.clone(),
            header,
            dir,
            placed: false,
            unsynced,
            _lease: lease,
        })
    }

    /// As [`Store::stage_layer`], an empty layer that will take the place of several on each other, from the
    /// lowest to the uppermost.
    ///
    /// # Errors
    /// As [`Store::stage_layer`].
    pub fn stage_joined(&self, lowest: &Header, uppermost: &Header) -> Result<StagedLayer> {
        self.stage(Header {
            stands_for: Some(uppermost.known_as()),
            ..Header::new(lowest.parent, uppermost.virtual_size)?
        })
    }

    pub(super) fn try_lease(&self, dir: &std::path::Path) -> Result<Option<LayerLease>> {
        let path = dir.join(LEASE_FILE);
        let held = self
            .storage
            .lock(&path, LockMode::Exclusive, false)
            .context(|| format!("cannot lock {}", path.display()))?;
        Ok(held.map(|held| LayerLease { _held: held }))
    }

    /// The right to write a published layer.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process has it.
    pub fn lease_layer(&self, layer: Uuid) -> Result<LayerLease> {
        let dir = self.layer_dir(layer);
        for attempt in 0..LEASE_ATTEMPTS {
            if attempt > 0 {
                // Whoever asks whether a layer is leased takes the lease for a moment.
                std::thread::sleep(LEASE_PAUSE);
            }
            if let Some(lease) = self.try_lease(&dir)? {
                return Ok(lease);
            }
        }
        Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the layer {layer} is in use by another process{}",
                self.lease_holder(&dir)
            ),
        ))
    }

    /// Keeps others from writing a published layer that is not sealed, while it is read.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process writes it.
    pub fn lease_for_reading(&self, layer: Uuid) -> Result<LayerLease> {
        let dir = self.layer_dir(layer);
        let path = dir.join(LEASE_FILE);
        for attempt in 0..LEASE_ATTEMPTS {
            if attempt > 0 {
                // As in `lease_layer`.
                std::thread::sleep(LEASE_PAUSE);
            }
            let held = self
                .storage
                .lock(&path, LockMode::Shared, false)
                .context(|| format!("cannot lock {}", path.display()))?;
            if let Some(held) = held {
                return Ok(LayerLease { _held: held });
            }
        }
        Err(Error::new(
            ErrorKind::InUse,
            format!(
                "the layer {layer} is in use by another process{}",
                self.lease_holder(&dir)
            ),
        ))
    }

    /// Who has the right to write the layer in `dir`.
    pub fn layer_holder(&self, dir: &std::path::Path) -> Option<Holder> {
        self.storage.holder(&dir.join(LEASE_FILE))
    }

    /// The same for a message.
    pub(super) fn lease_holder(&self, dir: &std::path::Path) -> String {
        by(self.layer_holder(dir).as_ref())
    }

    /// Who reads a chain with this layer on top, for a message.
    pub(super) fn reader(&self, layer: Uuid) -> String {
        by(self
            .storage
            .holder(&self.layer_dir(layer).join(READERS_FILE))
            .as_ref())
    }

    /// Keeps the image with this top layer from being removed.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while it is being removed.
    pub fn read_layer(&self, layer: Uuid) -> Result<LayerLease> {
        let path = self.layer_dir(layer).join(READERS_FILE);
        let held = self
            .storage
            .lock(&path, LockMode::Shared, false)
            .context(|| format!("cannot lock {}", path.display()))?;
        held.map(|held| LayerLease { _held: held }).ok_or_else(|| {
            Error::new(
                ErrorKind::InUse,
                format!("the layer {layer} is being removed"),
            )
        })
    }

    /// True while some process reads a chain with this layer on top.
    pub(super) fn has_readers(&self, layer: Uuid) -> bool {
        let path = self.layer_dir(layer).join(READERS_FILE);
        // No file, no reader; one that cannot be looked for may be there.
        self.storage.exists(&path).unwrap_or(true)
            && !matches!(
                self.storage.lock(&path, LockMode::Exclusive, false),
                Ok(Some(_))
            )
    }

    /// Layers from the bottom up to `layer`, found by the parents that their headers name. A parent that was
    /// joined with others is not there any more: the records say what took its place. Where they do not name
    /// `layer` any more, since it was joined or its snapshot removed after the caller had pinned it, the layer
    /// that stands for its parent is looked for among all.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is missing, [`ErrorKind::Corrupt`] for a circle.
    pub fn ancestry(&self, layer: Option<Uuid>) -> Result<Vec<Uuid>> {
        let mut layers = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut at = layer;
        while let Some(layer) = at {
            if !seen.insert(layer) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("the layer {layer} is its own ancestor"),
                ));
            }
            layers.push(layer);
            let header = Header::read(&**self.storage(), &self.layer_dir(layer))?;
            at = header.parent;
            let Some(parent) = at else { break };
            if self.has_layer(parent)? {
                continue;
            }
            if let Some(below) = self.below_in_records(layer)? {
                layers.extend(below.iter().rev());
                break;
            }
            at = self.standing_for(parent)?.or(at);
        }
        layers.reverse();
        Ok(layers)
    }

    /// True where a layer of this name is published.
    ///
    /// # Errors
    /// Where it cannot be looked for.
    pub fn has_layer(&self, layer: Uuid) -> Result<bool> {
        let dir = self.layer_dir(layer);
        self.storage
            .exists(&dir)
            .context(|| format!("cannot look for {}", dir.display()))
    }

    /// The layers below `layer` as the record of a container or image lists them.
    fn below_in_records(&self, layer: Uuid) -> Result<Option<Vec<Uuid>>> {
        for image in self.images()? {
            if let Some(place) = image.layers.iter().position(|there| *there == layer) {
                return Ok(Some(image.layers.into_iter().take(place).collect()));
            }
        }
        for container in self.containers()? {
            if container.top == layer || container.next == Some(layer) {
                return Ok(Some(self.resolve(&container)?.sealed).map(|mut sealed| {
                    // Of one that is being sealed, what lies below it.
                    if container.next != Some(layer) {
                        sealed.retain(|below| *below != layer);
                    }
                    sealed
                }));
            }
            for chain in container.chains()? {
                if let Some(place) = chain.iter().position(|there| *there == layer) {
                    return Ok(Some(chain.into_iter().take(place).collect()));
                }
            }
        }
        Ok(None)
    }

    /// A layer that says what `layer` and those joined with it said.
    fn standing_for(&self, layer: Uuid) -> Result<Option<Uuid>> {
        let stands = |there: &Uuid| {
            let header = Header::read(&*self.storage, &self.layer_dir(*there));
            header.is_ok_and(|header| header.sealed && header.stands_for == Some(layer))
        };
        Ok(self.layers()?.into_iter().find(stands))
    }

    /// True while some process has the right to write the layer in `dir`.
    pub fn is_leased(&self, dir: &std::path::Path) -> bool {
        !matches!(self.try_lease(dir), Ok(Some(_)))
    }

    /// What is known of a layer.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the store has no such layer.
    pub fn layer_info(&self, layer: Uuid) -> Result<LayerInfo> {
        self.read_json(&self.layer_dir(layer).join(INFO_FILE))?
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("the store has no layer {layer}"),
                )
            })
    }

    /// Replaces what is known of a layer.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn set_layer_info(&self, layer: Uuid, info: &LayerInfo) -> Result<()> {
        self.write_json(&self.layer_dir(layer).join(INFO_FILE), info)
    }

    /// All published layers.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn layers(&self) -> Result<Vec<Uuid>> {
        let entries = self.list(&self.layers_dir())?;
        Ok(entries
            .iter()
            .filter_map(|entry| Uuid::parse_str(&entry.name).ok())
            .collect())
    }

    /// A layer on `parent` with this chain key. The caller holds the pin.
    ///
    /// # Errors
    /// Where the layers cannot be listed.
    pub fn find_layer(
        &self,
        parent: Uuid,
        chain_key: &str,
        _pin: &StoreGuard,
    ) -> Result<Option<Uuid>> {
        for layer in self.layers()? {
            // A layer that cannot be read is not one to build on.
            let Ok(info) = self.layer_info(layer) else {
                continue;
            };
            if info.chain_key.as_deref() != Some(chain_key) || info.damaged.is_some() {
                continue;
            }
            let header = Header::read(&*self.storage, &self.layer_dir(layer));
            if header.is_ok_and(|header| header.sealed && header.parent == Some(parent)) {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    /// The template made with `key`, if there is one.
    ///
    /// # Errors
    /// Where its record is damaged.
    pub fn template(&self, key: &str) -> Result<Option<TemplateRecord>> {
        let record: Option<TemplateRecord> = self.read_json(&self.record_path("templates", key))?;
        // Where the layer is gone or damaged, a new one is made.
        Ok(record.filter(|record| {
            self.layer_info(record.layer)
                .is_ok_and(|info| info.damaged.is_none())
        }))
    }

    /// Remembers a template.
    ///
    /// # Errors
    /// Where the host fails.
    pub fn put_template(&self, record: &TemplateRecord) -> Result<()> {
        self.write_json(&self.record_path("templates", &record.key), record)
    }
}
