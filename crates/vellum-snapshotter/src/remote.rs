//! Remote snapshots: a layer that a registry has as blocks is there before anything of it is fetched.
//! docs/containerd.md, "Remote snapshots".

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use super::Snapshotter;
use super::failure::{Result, request};
use super::labels::{IMAGE_LABEL, MANIFEST_LABEL, REF_LABEL};
use super::pull_secrets::{PullSecrets, Secret};
use super::retire::Job;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind};
use vellum_core::layer::Header;
use vellum_engine::lazy::{Background, complete_in_background};
use vellum_engine::registry::RemoteImage;
use vellum_engine::template;
use vellum_registry::{Keychain, Reference};
use vellum_store::{SnapshotKind, SnapshotRecord, Store, StoreGuard};

/// How long containerd waits at most to hear that there are no block layers.
const PATIENCE: Duration = Duration::from_secs(3);
/// For how long it is known what a registry has of an image, or has not.
const KNOWN_FOR: Duration = Duration::from_secs(600);
/// Images of which that is known at a time.
const MAX_IMAGES: usize = 64;
/// Those of them that have block layers: what is kept of one may have 32 MiB.
const MAX_FOUND: usize = 8;

/// A registry, or a repository in it with all below, whose block layers are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    registry: String,
    repository: String,
}

impl Source {
    /// Reads `HOST[:PORT][/REPOSITORY]`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn parse(text: &str) -> vellum_base::Result<Self> {
        let (registry, repository) = text.split_once('/').unwrap_or((text, ""));
        // As an image of it would be called.
        let image = Reference::parse(&format!("{}/image", text.trim_end_matches('/')));
        let is_registry = image.is_ok_and(|image| image.registry() == registry);
        match is_registry && !text.ends_with('/') {
            true => Ok(Source {
                registry: registry.to_owned(),
                repository: repository.to_owned(),
            }),
            false => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{text:?} names no registry: write HOST[:PORT] or HOST[:PORT]/REPOSITORY, like \
                     registry.example/team; Docker Hub is docker.io"
                ),
            )),
        }
    }

    fn covers(&self, image: &Reference) -> bool {
        let below = image.repository().strip_prefix(&self.repository);
        let below = below.is_some_and(|rest| {
            self.repository.is_empty() || rest.is_empty() || rest.starts_with('/')
        });
        below && image.registry() == self.registry
    }
}

/// What is known of one image.
#[derive(Debug)]
struct Known {
    since: Instant,
    image: Option<Arc<RemoteImage>>,
    /// Of which pull the secret was that it was asked with.
    pull: Option<u64>,
}

impl Known {
    /// Whether one who would ask with the secret of that pull need not.
    fn is_good_for(&self, pull: Option<u64>) -> bool {
        // Another secret may open what was closed.
        self.since.elapsed() < KNOWN_FOR && (self.image.is_some() || self.pull == pull)
    }
}

/// Filled by the first who asks, while others wait.
type Slot = Arc<Mutex<Option<Known>>>;

/// Which images are looked for in registries, and what was found.
#[derive(Debug, Default)]
pub struct Remote {
    sources: Vec<Source>,
    background: Option<Background>,
    secrets: Arc<PullSecrets>,
    images: Mutex<HashMap<String, Slot>>,
    /// Held while layers are made: two pulls of the same ones share them.
    making: Mutex<()>,
}

impl Remote {
    /// Takes block layers from these places, from nowhere where there are none. With `background` those that nobody
    /// reads come too.
    pub fn new(sources: Vec<Source>, background: Option<Background>) -> Self {
        Remote {
            sources,
            background,
            ..Remote::default()
        }
    }

    /// Asks registries with what pods pull with.
    pub fn with_secrets(self, secrets: &Arc<PullSecrets>) -> Self {
        Remote {
            secrets: Arc::clone(secrets),
            ..self
        }
    }

    /// The image with the layer that containerd is about to unpack, where a registry has it as blocks. Whatever is
    /// missing or fails, the answer is that there is none: containerd unpacks the layer then.
    pub(super) fn look(
        &self,
        store: &Store,
        labels: &BTreeMap<String, String>,
    ) -> Option<Arc<RemoteImage>> {
        let (chain_id, image, manifest) = (
            labels.get(REF_LABEL)?,
            labels.get(IMAGE_LABEL)?,
            labels.get(MANIFEST_LABEL)?,
        );
        let reference = Reference::parse(image).ok()?;
        if !self.sources.iter().any(|source| source.covers(&reference)) {
            return None;
        }
        let secret = self.secrets.of_image(&reference);
        let pull = secret.as_ref().map(|secret| secret.number);
        let slot = self.slot(&format!(
            "{}/{}@{manifest}",
            reference.registry(),
            reference.repository()
        ));
        let mut slot = slot.lock();
        if slot.as_ref().is_none_or(|known| !known.is_good_for(pull)) {
            let found = find(store, &reference, manifest, secret);
            *slot = Some(Known {
                since: Instant::now(),
                image: found.map(Arc::new),
                pull,
            });
        }
        let remote = slot.as_ref()?.image.clone()?;
        if !remote.has(chain_id) {
            tracing::info!(
                image,
                layer = chain_id,
                "its block layers are of other files: unpacked"
            );
            return None;
        }
        Some(remote)
    }

    /// The place for what is known of an image. What is old, or too much, is forgotten.
    fn slot(&self, image: &str) -> Slot {
        let mut images = self.images.lock();
        let age = |slot: &Slot| match slot.try_lock() {
            // Somebody asks just now.
            None => (Duration::ZERO, false),
            Some(known) => known.as_ref().map_or((Duration::ZERO, false), |known| {
                (known.since.elapsed(), known.image.is_some())
            }),
        };
        images.retain(|_, slot| age(slot).0 < KNOWN_FOR);
        if !images.contains_key(image) {
            forget_oldest(&mut images, MAX_IMAGES, |slot| Some(age(slot).0));
            forget_oldest(&mut images, MAX_FOUND, |slot| {
                let (age, found) = age(slot);
                found.then_some(age)
            });
        }
        images.entry(image.to_owned()).or_default().clone()
    }
}

/// Makes place for one more among those that have an age.
fn forget_oldest(
    images: &mut HashMap<String, Slot>,
    most: usize,
    age: impl Fn(&Slot) -> Option<Duration>,
) {
    let mut ages: Vec<(Duration, String)> = images
        .iter()
        .filter_map(|(name, slot)| Some((age(slot)?, name.clone())))
        .collect();
    ages.sort_unstable();
    for (_, name) in ages.into_iter().skip(most - 1) {
        images.remove(&name);
    }
}

/// Asks the registry, with the image's pull secret where it has one.
fn find(
    store: &Store,
    reference: &Reference,
    manifest: &str,
    secret: Option<Secret>,
) -> Option<RemoteImage> {
    let begin = Instant::now();
    let keychain = secret.map(|secret| Arc::new(secret) as Arc<dyn Keychain>);
    let found = store.pin_layers().and_then(|pin| {
        let deadline = begin + PATIENCE;
        RemoteImage::find(store, reference, manifest, deadline, keychain, &pin)
    });
    let micros = begin.elapsed().as_micros() as u64;
    match found {
        Ok(Some(remote)) => {
            tracing::info!(image = %reference, manifest, micros, "its registry has block layers: they come when they are read");
            Some(remote)
        }
        Ok(None) => {
            tracing::info!(image = %reference, manifest, micros, "its registry has no block layers: unpacked");
            None
        }
        Err(error) => {
            tracing::warn!(image = %reference, manifest, micros, %error, "its block layers cannot be had: unpacked");
            None
        }
    }
}

/// Lazy layers of a snapshot that was made.
struct Lent {
    /// Those that it does not share with its parent.
    own: Vec<Uuid>,
    /// With all below, from the bottom up.
    all: Vec<Uuid>,
}

impl Snapshotter {
    /// Makes the snapshot that containerd then finds by its label, on lazy layers, and does not unpack. False where
    /// that cannot be: containerd unpacks it.
    pub(super) fn lend(
        &self,
        record: &SnapshotRecord,
        image: &RemoteImage,
        pin: &StoreGuard,
    ) -> bool {
        let making = self.remote.making.lock();
        let lent = self.try_lend(record, image, pin);
        drop(making);
        let lent = match lent {
            Ok(Some(lent)) => lent,
            Ok(None) => return self.not_lent(),
            Err(error) => {
                tracing::warn!(key = %record.key, %error, "no layer is made of a registry's blocks: unpacked");
                return self.not_lent();
            }
        };
        image.expect_hot_pack(&self.store, &lent.all);
        if let Some(background) = self.remote.background
            && let Err(error) = complete_in_background(&self.store, &lent.own, background)
        {
            // It is there all the same.
            tracing::warn!(key = %record.key, %error, "is not completed in the background yet");
        }
        true
    }

    /// What was made for a snapshot that did not come about is nobody's.
    fn not_lent(&self) -> bool {
        self.retirer.push(Job {
            sweep: true,
            ..Job::default()
        });
        false
    }

    /// The layers of the snapshot that was made.
    fn try_lend(
        &self,
        record: &SnapshotRecord,
        image: &RemoteImage,
        pin: &StoreGuard,
    ) -> Result<Option<Lent>> {
        let Some(reference) = record.labels.get(REF_LABEL) else {
            return Ok(None);
        };
        let Some(made) = image.make(&self.store, reference, pin)? else {
            return Ok(None);
        };
        let layers: Vec<Uuid> = made.iter().map(|made| made.layer).collect();
        let (Some((base, own)), Some(top)) = (layers.split_first(), layers.last()) else {
            return Ok(None);
        };
        let below = layers.iter().rev().nth(1);
        // Where the parent was unpacked, its blocks are others: then all of the chain is the snapshot's own.
        let (base, own) = match below == Some(&record.base) {
            true => (record.base, std::slice::from_ref(top)),
            false => (*base, own),
        };
        let bytes = made.iter().filter(|made| own.contains(&made.layer));
        let header = Header::read(&**self.store.storage(), &self.store.layer_dir(*top))?;
        let id = Uuid::new_v4();
        let lent = SnapshotRecord {
            key: format!("{} {id}", record.key),
            id,
            kind: SnapshotKind::Committed,
            base,
            layers: own.to_vec(),
            bytes: bytes.map(|made| made.bytes).sum(),
            // Nobody has looked.
            inodes: None,
            virtual_size: header.virtual_size,
            ..record.clone()
        };
        // From here on whoever removes another snapshot of these layers leaves them.
        request(self.index.reserve(&lent))?;
        let written = match self.are_going(&lent.layers) {
            Ok(false) => self.store.put_snapshot(&lent, None, pin).map(|()| true),
            Ok(true) => Ok(false),
            Err(error) => Err(error),
        };
        if !matches!(written, Ok(true)) {
            self.index.forget(&lent.key);
            return Ok(written.map(|_| None)?);
        }
        crash_point::here("remote: lazy record in place");
        let own = lent.layers.clone();
        self.index.show(lent, None);
        Ok(Some(Lent { own, all: layers }))
    }

    /// True where some of these layers are being removed, or were.
    fn are_going(&self, layers: &[Uuid]) -> vellum_base::Result<bool> {
        if self.retirer.removes_any(layers) {
            return Ok(true);
        }
        for layer in layers {
            if !self.store.has_layer(*layer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// True of the layer below a removed snapshot where no other lies on it: an empty file system that came from a
    /// registry, and not one of this host's.
    pub(super) fn is_left(&self, base: Uuid) -> bool {
        if self.index.lies_on(base) {
            return false;
        }
        let header = Header::read(&**self.store.storage(), &self.store.layer_dir(base));
        let template = header.and_then(|header| template::find(&self.store, header.virtual_size));
        // Where that cannot be told, a sweep does.
        !matches!(template, Ok(Some(template)) if template.layer == base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_covers_its_registry_or_the_repositories_below_it_and_no_other() {
        let covers = |source: &str, image: &str| {
            let image = Reference::parse(image).unwrap();
            Source::parse(source).unwrap().covers(&image)
        };
        assert!(covers("registry.example", "registry.example/team/web:1"));
        assert!(covers(
            "registry.example/team",
            "registry.example/team/web:1"
        ));
        assert!(covers(
            "registry.example/team/web",
            "registry.example/team/web"
        ));
        assert!(covers("localhost:5000", "localhost:5000/web"));
        assert!(covers("docker.io/library", "debian"));
        assert!(!covers(
            "registry.example/team",
            "registry.example/teams/web"
        ));
        assert!(!covers(
            "registry.example",
            "registry.example:5000/team/web"
        ));
        assert!(!covers(
            "registry.example",
            "other.example/registry.example/web"
        ));
        assert!(!covers("docker.io/library", "docker.io/me/debian"));
    }

    #[test]
    fn what_names_no_registry_is_no_source() {
        for text in [
            "",
            "/",
            "team",
            "team/web",
            "https://registry.example",
            "registry.example/",
            "*",
            "a b",
        ] {
            let error = Source::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
        }
    }

    #[test]
    fn what_is_known_of_images_is_bounded() {
        let remote = Remote::default();
        for n in 0..10 * MAX_IMAGES {
            let slot = remote.slot(&n.to_string());
            *slot.lock() = Some(Known {
                since: Instant::now(),
                image: None,
                pull: None,
            });
        }
        assert_eq!(remote.images.lock().len(), MAX_IMAGES);
        assert!(
            remote
                .images
                .lock()
                .contains_key(&(10 * MAX_IMAGES - 1).to_string())
        );
    }
}
