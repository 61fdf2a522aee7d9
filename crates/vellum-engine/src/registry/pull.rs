//! `vellum pull`: an image is fetched into `staging`, checked, and made one of the store's.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::{Format, ImageConfig, Platform, chain_ids};
use vellum_registry::{Access, Descriptor, Document, Found, Identities, Location, Place};
use vellum_store::{ImageRecord, Store, StoreGuard};

use super::super::import::{DEFAULT_SIZE, ImportOptions, LayerOutcome, import};
use super::super::lazy::{Background, complete_in_background, expect_hot_pack};
use super::super::template;
use super::super::watch::Watch;
use super::layout::Layout;
use super::receive;

/// The longest configuration that is read.
const MAX_CONFIG: u64 = 4 << 20;

/// What a user says about a pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Of an image for several platforms, which; `None` is this host's.
    pub platform: Option<Platform>,
    /// How the registry is spoken to.
    pub access: Access,
    /// Blocks come when they are read: docs/lazy.md.
    pub lazy: bool,
    /// Those that nobody reads come too.
    pub background: Option<Background>,
    /// Files with identities, by which encrypted layers are read; where there are none, those that
    /// [`Identities::find`] finds.
    pub identities: Vec<PathBuf>,
}

/// How an image came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Came {
    /// As block layers.
    Blocks,
    /// As tables, whose blocks come when they are read.
    Lazily,
    /// As tars, which were unpacked.
    Tars,
}

/// What a pull made.
#[derive(Debug, Clone, Serialize)]
pub struct PullReport {
    /// The image.
    pub image: ImageRecord,
    /// The digest of the manifest that it was made of.
    pub digest: String,
    /// How it came.
    pub came: Came,
    /// Its layers, from the bottom up.
    pub layers: Vec<LayerOutcome>,
}

/// Makes the image `name` of what a registry or a layout has. Nothing can be seen of it before all of it is there and checked.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for the name; as [`Place::find`], [`Place::fetch`] and
/// [`import`].
pub fn pull(
    store: &Store,
    location: &Location,
    name: &str,
    options: &PullOptions,
    watch: &dyn Watch,
) -> Result<PullReport> {
    store.check_new_image(name)?;
    store.check_space_for("image")?;
    let place = Place::open(location, options.access)?;
    let found = place.find(&platform(options))?;
    let report = take(store, &place, found, name, options, watch);
    report.map_err(|error| error.context(format!("pulling {location}")))
}

/// Which platform is wanted.
pub(super) fn platform(options: &PullOptions) -> Platform {
    options.platform.clone().unwrap_or_else(Platform::host)
}

/// Makes the image `name` of what was found at a place.
///
/// # Errors
/// As [`pull`].
pub(super) fn take(
    store: &Store,
    place: &Place,
    found: Found,
    name: &str,
    options: &PullOptions,
    watch: &dyn Watch,
) -> Result<PullReport> {
    let Found { image, artifact } = found;
    let pin = store.pin_layers()?;
    let puller = Puller {
        store,
        pin: &pin,
        place,
        watch,
        options,
    };
    match (image, artifact) {
        (Some(image), Some(artifact)) => match puller.blocks(name, &artifact) {
            // What a newer program pushed, this one takes as everybody does.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                tracing::warn!("its block layers cannot be used, so it is unpacked: {error}");
                puller.tars(name, &image)
            }
            other => other,
        },
        (None, Some(artifact)) => puller.blocks(name, &artifact),
        (Some(image), None) => puller.tars(name, &image),
        (None, None) => Err(Error::internal("a reference leads to nothing")),
    }
}

struct Puller<'a> {
    store: &'a Store,
    pin: &'a StoreGuard,
    place: &'a Place,
    watch: &'a dyn Watch,
    options: &'a PullOptions,
}

impl Puller<'_> {
    fn fetch(&self, name: &str, blobs: &[Descriptor], layout: &Layout) -> Result<()> {
        if blobs.is_empty() {
            return Ok(());
        }
        let total = blobs
            .iter()
            .map(|blob| blob.size)
            .fold(0, u64::saturating_add);
        let progress = self.watch.begin(name, Some(total));
        self.place.fetch(blobs, layout.path(), progress)?;
        self.watch.done();
        Ok(())
    }

    /// Fetches block layers.
    fn blocks(&self, name: &str, artifact: &Document) -> Result<PullReport> {
        let layout = Layout::new(self.store)?;
        let parts = receive::parts(&artifact.manifest()?)?;
        let first: Vec<Descriptor> = parts.descriptions().cloned().collect();
        self.fetch(name, &first, &layout)?;
        let identities = || Identities::find(&self.options.identities);
        let opened = receive::open(&layout, &parts, identities)?;
        let from = self.place.whereabouts().map(receive::Origin::at);
        let mut receiver = receive::Receiver::new(
            from.as_ref(),
            self.store,
            self.pin,
            &layout,
            self.watch,
            (&parts, opened),
        )?;
        crash_point::here("pull: tables fetched");
        match self.options.lazy {
            true => {
                receiver = receiver.lazily()?;
                // Now rather than when somebody reads.
                self.place.try_ranges(&receiver.wanted())?;
            }
            false => self.fetch(name, &receiver.wanted(), &layout)?,
        }
        crash_point::here("pull: blobs fetched");
        let (image, layers) = receiver.receive(name)?;
        self.store.put_image(&image, self.pin)?;
        crash_point::here("pull: record in place");
        self.note(&parts);
        self.expect_hot_pack(&parts, &image);
        if let Some(background) = self.options.background
            && let Err(error) = complete_in_background(self.store, &image.layers, background)
        {
            // The image is there all the same.
            tracing::warn!("it is not completed in the background yet: {error}");
        }
        Ok(PullReport {
            image,
            digest: artifact.digest.clone(),
            came: if self.options.lazy {
                Came::Lazily
            } else {
                Came::Blocks
            },
            layers,
        })
    }

    /// Of an image that was pulled lazily, has the fetcher bring what a start needs first.
    fn expect_hot_pack(&self, parts: &receive::Parts, image: &ImageRecord) {
        let Some(pack) = parts.hot.as_ref().filter(|_| self.options.lazy) else {
            return;
        };
        if let Some(whereabouts) = self.place.whereabouts() {
            expect_hot_pack(self.store, &image.layers, pack, whereabouts);
        }
    }

    /// Notes where the blobs came from: a push of the same layers to another repository has the same ones.
    fn note(&self, parts: &receive::Parts) {
        let Some((registry, repository)) = self.place.repository() else {
            return;
        };
        let noted = self.store.note_blobs(parts.digests(), registry, repository);
        if let Err(error) = noted {
            // A hint, without which the image is there all the same.
            tracing::warn!("where blobs are is not noted: {error}");
        }
    }

    /// Fetches tars, and imports them.
    fn tars(&self, name: &str, image: &Document) -> Result<PullReport> {
        let layout = Layout::new(self.store)?;
        layout.of_image(image)?;
        let manifest = image.manifest()?;
        check_size(&manifest.config, MAX_CONFIG, "configuration")?;
        let config = std::slice::from_ref(&manifest.config);
        self.place.fetch(config, layout.path(), None)?;
        let config = ImageConfig::from_json(&layout.read(&manifest.config.digest)?)?;
        let there = self.layers_there(&config)?.min(manifest.layers().len());
        let (there, missing) = manifest.layers().split_at(there);
        self.fetch(name, missing, &layout)?;
        crash_point::here("pull: blobs fetched");
        let mut options = ImportOptions {
            format: Some(Format::Oci),
            platform: self.options.platform.clone(),
            // What is there is of this size, and nothing is known of what is not fetched.
            size: (!there.is_empty()).then_some(DEFAULT_SIZE),
            ..ImportOptions::default()
        };
        let imported = import(self.store, name, layout.path(), &options, self.watch);
        let imported = match imported {
            Err(error) if error.kind() == ErrorKind::NoSpace && !there.is_empty() => {
                // It does not fit in what its lower layers fitted in.
                self.watch.done();
                // One that lies higher up too is there.
                let missing: BTreeSet<&str> = missing.iter().map(|blob| &*blob.digest).collect();
                let there: Vec<Descriptor> = there
                    .iter()
                    .filter(|blob| !missing.contains(&*blob.digest))
                    .cloned()
                    .collect();
                self.fetch(name, &there, &layout)?;
                options.size = None;
                import(self.store, name, layout.path(), &options, self.watch)?
            }
            other => other?,
        };
        Ok(PullReport {
            image: imported.image,
            digest: image.digest.clone(),
            came: Came::Tars,
            layers: imported.layers,
        })
    }

    /// How many layers of an image, from the bottom up, an import would find in the store.
    fn layers_there(&self, config: &ImageConfig) -> Result<usize> {
        let Some(template) = template::find(self.store, DEFAULT_SIZE)? else {
            return Ok(0);
        };
        let mut parent = template.layer;
        let chain_ids = chain_ids(&config.rootfs.diff_ids);
        for (count, chain_id) in chain_ids.into_iter().enumerate() {
            let key = format!("{}/{chain_id}", template.key);
            match self.store.find_layer(parent, &key, self.pin)? {
                Some(found) => parent = found,
                None => return Ok(count),
            }
        }
        Ok(config.rootfs.diff_ids.len())
    }
}

/// Refuses what is longer than its kind may be, before it is fetched.
pub(super) fn check_size(blob: &Descriptor, most: u64, what: &str) -> Result<()> {
    if blob.size <= most {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the {what} {} has {} bytes; at most {most} are read",
            blob.digest, blob.size
        ),
    ))
}
