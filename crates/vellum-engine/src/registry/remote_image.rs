//! Images that a registry has as block layers, for one who names them by containerd's chain ids: remote snapshots,
//! docs/containerd.md.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::{Platform, chain_ids};
use vellum_registry::artifact::DIFF_ID_ANNOTATION;
use vellum_registry::{Access, Descriptor, Document, Keychain, Reference, Session};
use vellum_store::{Store, StoreGuard};

use super::super::import::LayerOutcome;
use super::super::lazy;
use super::super::watch::Quiet;
use super::layout::Layout;
use super::receive::{Origin, Parts, Receiver, parts};
use super::sealed::Opened;

/// Bytes of configuration and tables together that are kept in memory for one image, whose blocks are then some 80 GB.
const MAX_KEPT: u64 = 32 << 20;

/// What is known of an image whose block layers a registry has: enough to make lazy layers without asking it again.
#[derive(Debug)]
pub struct RemoteImage {
    from: Origin,
    parts: Parts,
    /// The configuration and the tables, by their digests.
    kept: BTreeMap<String, Vec<u8>>,
    /// How many layers, from the bottom up, have the files of a chain id.
    counts: BTreeMap<String, usize>,
}

impl RemoteImage {
    /// Looks for the block layers of the image whose manifest has this digest in the repository of `reference`, and
    /// makes sure that their data can be had by ranges. `None` for an image that names none. Waits no longer than
    /// until `deadline`. What `keychain` knows goes before docker's credentials.
    ///
    /// # Errors
    /// Where the registry does not answer in time, does not let us, or has something that makes no sense or cannot be
    /// mounted. Nothing is made then.
    pub fn find(
        store: &Store,
        reference: &Reference,
        manifest: &str,
        deadline: Instant,
        keychain: Option<Arc<dyn Keychain>>,
        pin: &StoreGuard,
    ) -> Result<Option<Self>> {
        let pinned = format!(
            "{}/{}@{manifest}",
            reference.registry(),
            reference.repository()
        );
        let reference = Reference::parse(&pinned)?;
        let session = Session::open(&reference, Access::default())?.within(deadline);
        let session = match keychain {
            Some(keychain) => session.knowing(keychain),
            None => session,
        };
        let found = Self::ask(store, &session, manifest, pin);
        session.leave();
        found
    }

    fn ask(
        store: &Store,
        session: &Session,
        manifest: &str,
        pin: &StoreGuard,
    ) -> Result<Option<Self>> {
        let found = session.find(&Platform::host())?;
        let Some(image) = found.image.filter(|image| image.digest == manifest) else {
            let text = format!("{manifest} is no image's manifest");
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let Some(artifact) = found.artifact else {
            return Ok(None);
        };
        tracing::debug!(image = %image.digest, artifact = %artifact.digest, "has block layers");
        let remote = Self::fetch(store, session, &artifact)?;
        let layout = remote.layout(store)?;
        let receiver = remote.receiver(store, &layout, pin)?;
        session.try_ranges(&receiver.wanted())?;
        Ok(Some(remote))
    }

    /// Fetches what describes the layers.
    fn fetch(store: &Store, session: &Session, artifact: &Document) -> Result<Self> {
        let parts = parts(&artifact.manifest()?)?;
        if parts.is_encrypted() {
            return unusable(
                "is encrypted, which containers of other programs cannot use: `vellum pull` takes it",
            );
        }
        let counts = counts(&parts)?;
        let wanted: Vec<Descriptor> = parts.descriptions().cloned().collect();
        let size = wanted
            .iter()
            .map(|blob| blob.size)
            .fold(0, u64::saturating_add);
        if size > MAX_KEPT {
            return unusable(&format!("has tables of more than {MAX_KEPT} bytes"));
        }
        let layout = Layout::new(store)?;
        session.fetch(&wanted, layout.path(), None)?;
        let mut kept = BTreeMap::new();
        for blob in wanted {
            let bytes = layout.read(&blob.digest)?;
            kept.insert(blob.digest, bytes);
        }
        Ok(RemoteImage {
            from: Origin::at(session.whereabouts()),
            parts,
            kept,
            counts,
        })
    }

    fn layout(&self, store: &Store) -> Result<Layout> {
        let layout = Layout::new(store)?;
        for bytes in self.kept.values() {
            layout.add(bytes)?;
        }
        Ok(layout)
    }

    fn receiver<'a>(
        &self,
        store: &'a Store,
        layout: &'a Layout,
        pin: &'a StoreGuard,
    ) -> Result<Receiver<'a>> {
        let from = Some(&self.from);
        let opened = Opened::plain(&layout.read(&self.parts.config.digest)?)?;
        let parts = (&self.parts, opened);
        let receiver = Receiver::new(from, store, pin, layout, &Quiet, parts)?;
        let disk = receiver.disk();
        match disk.fs.is_some() && disk.device_size.is_none() {
            true => receiver.lazily(),
            false => unusable("holds no file system that containers can use"),
        }
    }

    /// True where its layers, from the bottom up to one of them, have the files of the chain id.
    pub fn has(&self, chain_id: &str) -> bool {
        self.counts.contains_key(chain_id)
    }

    /// Makes those of its layers, from the bottom up to the one with the files of `chain_id`, that the store does not
    /// have. Nothing is fetched, and no record names them yet. `None` for a chain id that is not one of its.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn make(
        &self,
        store: &Store,
        chain_id: &str,
        pin: &StoreGuard,
    ) -> Result<Option<Vec<LayerOutcome>>> {
        let Some(count) = self.counts.get(chain_id) else {
            return Ok(None);
        };
        let layout = self.layout(store)?;
        let receiver = self.receiver(store, &layout, pin)?;
        let layers = receiver.up_to(*count).receive_layers()?;
        crash_point::here("remote: layers published");
        Ok(Some(layers))
    }

    /// Has the fetcher bring what a start needs first, once a record names these layers, which [`RemoteImage::make`]
    /// made. Where they are not all of the image's, the ones to come are waited for.
    pub fn expect_hot_pack(&self, store: &Store, layers: &[Uuid]) {
        if let Some(pack) = &self.parts.hot
            && layers.len() == self.parts.layers.len()
        {
            lazy::expect_hot_pack(store, layers, pack, self.from.whereabouts());
        }
    }
}

/// The chain ids of an artifact's layers. Those of its own file system, at the bottom, have no diff id, and all above
/// them have one.
fn counts(parts: &Parts) -> Result<BTreeMap<String, usize>> {
    let diff_ids = parts.layers.iter();
    let diff_ids = diff_ids.map(|layer| layer.table.annotation(DIFF_ID_ANNOTATION));
    let own = diff_ids.clone().take_while(Option::is_none).count();
    let known: Option<Vec<&str>> = diff_ids.skip(own).collect();
    match known {
        Some(known) if own > 0 && !known.is_empty() => {
            Ok(chain_ids(&known).into_iter().zip(own + 1..).collect())
        }
        _ => unusable("does not say which of its layers is which of the image's"),
    }
}

fn unusable<T>(what: &str) -> Result<T> {
    let text = format!("the artifact of block layers {what}");
    Err(Error::new(ErrorKind::Unsupported, text))
}
