//! Images into the store: each layer of a source becomes one block layer.

mod layer;

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::complete::finish_layer;
use super::layer_file;
use super::raw;
use super::staged::open_staged;
use super::template;
use super::watch::Watch;
use vellum_backup::LAYER_FILE_MAGIC;
use vellum_base::block::{BLOCK_SIZE, MAX_VIRTUAL_SIZE};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::ext4;
use vellum_fs::superblock::Superblock;
use vellum_image::{
    ApplyOptions, DiskImage, Format, HistoryEntry, Holds, Image, ImageConfig, Measure, Platform,
    Source, SourceOptions, apply_layer_aside, chain_ids, copy_tree_aside,
};
use vellum_store::{DiskInfo, FsInfo, ImageRecord, LayerInfo, Store, StoreGuard, now};

/// The virtual size of an image where nobody says otherwise: 10 GiB.
pub const DEFAULT_SIZE: u64 = 10 << 30;

/// What a user says about an import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Virtual size in bytes, a multiple of 4096.
    pub size: Option<u64>,
    /// Put the source on top of this image.
    pub from: Option<String>,
    /// Which image of an archive with several.
    pub select: Option<String>,
    /// Which platform of an image for several.
    pub platform: Option<Platform>,
    /// What the source is; `None` finds out.
    pub format: Option<Format>,
    /// Files that a disk image may name as its backing though they lie elsewhere.
    pub allow_backing: Vec<PathBuf>,
}

/// What became of one layer of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerOutcome {
    /// The digest of its uncompressed tar, where it is known.
    pub diff_id: Option<String>,
    /// The block layer.
    pub layer: Uuid,
    /// The store had it already.
    pub existed: bool,
    /// Bytes of its data blocks.
    pub bytes: u64,
}

impl LayerOutcome {
    /// Of a layer of which this is known.
    pub(crate) fn new(layer: Uuid, existed: bool, info: LayerInfo) -> Self {
        LayerOutcome {
            diff_id: info.diff_id,
            layer,
            existed,
            bytes: info.bytes,
        }
    }
}

/// What an import made.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    /// The image.
    pub image: ImageRecord,
    /// Its layers from the source, from the bottom up.
    pub layers: Vec<LayerOutcome>,
    /// The disk image can be mounted, or it is no disk image.
    pub mountable: bool,
}

/// Makes the image `name` from `source`: a path, or `-` for a tar on standard input.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for the name; whatever is wrong with the source. Nothing is visible
/// then, though layers that were done are kept until [`Store::prune`], and are found again.
pub fn import(
    store: &Store,
    name: &str,
    source: &Path,
    options: &ImportOptions,
    watch: &dyn Watch,
) -> Result<ImportReport> {
    store.check_new_image(name)?;
    store.check_space_for("image")?;
    let pin = store.pin_layers()?;
    let mut source_options = SourceOptions::new(store.root().join("staging"));
    source_options.image.clone_from(&options.select);
    source_options.platform.clone_from(&options.platform);
    source_options.format = options.format;
    source_options
        .allow_backing
        .clone_from(&options.allow_backing);
    source_options.layer_file = Some(LAYER_FILE_MAGIC);
    let mut opened = Source::open(source, &source_options)?;
    let importer = Importer {
        store,
        pin: &pin,
        watch,
    };
    let (image, layers) = match &mut opened {
        Source::Disk(disk) => importer.disk(name, disk, options)?,
        Source::Layers(file) => {
            layer_file::check_options(options)?;
            let shown = source.display().to_string();
            let input = file.reader(watch.begin(&shown, file.size()))?;
            let received = layer_file::receive(store, name, input, &pin, watch);
            received.context(|| shown)?
        }
        other => importer.files_that_fit(name, source, other, options)?,
    };
    store.put_image(&image, &pin)?;
    crash_point::here("layer file: record in place");
    let mountable = image.disk.fs.is_some();
    Ok(ImportReport {
        image,
        layers,
        mountable,
    })
}

/// Where layers go on top of.
struct Ground {
    layers: Vec<Uuid>,
    virtual_size: u64,
    fs: FsInfo,
    config: ImageConfig,
    /// Stands for all of the layers, so that what is built on them can be found again.
    key: Option<String>,
    /// There is an image below, from which whiteouts delete.
    has_image: bool,
}

impl Ground {
    /// The layer that the next one lies on.
    #[expect(
        clippy::indexing_slicing,
        reason = "a ground is a template or an image, which has layers"
    )]
    fn top(&self) -> Uuid {
        self.layers[self.layers.len() - 1]
    }
}

struct Importer<'a> {
    store: &'a Store,
    pin: &'a StoreGuard,
    watch: &'a dyn Watch,
}

impl Importer<'_> {
    fn ground(&self, options: &ImportOptions, size: u64) -> Result<Ground> {
        let Some(from) = &options.from else {
            let template = template::get(self.store, size, self.pin)?;
            return Ok(Ground {
                layers: vec![template.layer],
                virtual_size: size,
                fs: template.fs,
                config: ImageConfig::for_host(),
                key: Some(template.key),
                has_image: false,
            });
        };
        let image = self.store.image(from)?;
        if options
            .size
            .is_some_and(|size| size != image.disk.virtual_size)
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "--size and --from contradict each other: {from} has {} bytes; give a container \
                     another size instead (`vellum create --size`)",
                    image.disk.virtual_size
                ),
            ));
        }
        image.top()?;
        let fs = image.disk.fs.ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("{from} holds no ext4 file system to add files to"),
            )
        })?;
        let mut config = image.config;
        let own = template::count(self.store, &image.layers);
        config.settle_history(image.layers.len() - own);
        Ok(Ground {
            layers: image.layers,
            virtual_size: image.disk.virtual_size,
            fs,
            config,
            key: None,
            has_image: true,
        })
    }

    /// As [`Importer::files`], in a file system that the content fits in where the user gave no
    /// size: by what can be told beforehand, and where that was not enough by all of the content.
    fn files_that_fit(
        &self,
        name: &str,
        path: &Path,
        source: &mut Source,
        options: &ImportOptions,
    ) -> Result<(ImageRecord, Vec<LayerOutcome>)> {
        if let (Some(size), _) | (None, Some(size)) =
            (options.size, options.from.is_some().then_some(DEFAULT_SIZE))
        {
            return self.files(name, path, source, options, size);
        }
        let size = source.measure(false)?.map_or(DEFAULT_SIZE, size_for);
        let error = match self.files(name, path, source, options, size) {
            Err(error) if error.kind() == ErrorKind::NoSpace => error,
            other => return other,
        };
        match source.measure(true)?.map(size_for) {
            Some(larger) if larger > size => {
                tracing::info!("{size} bytes are too small: once more with {larger}");
                self.watch.done();
                self.files(name, path, source, options, larger)
            }
            // The store's disk is full, or the content cannot be read twice.
            _ => Err(error),
        }
    }

    fn files(
        &self,
        name: &str,
        path: &Path,
        source: &mut Source,
        options: &ImportOptions,
        size: u64,
    ) -> Result<(ImageRecord, Vec<LayerOutcome>)> {
        let mut ground = self.ground(options, size)?;
        let mut outcomes = Vec::new();
        let shown = path.display().to_string();
        match source {
            Source::Image(image) => {
                if options.from.is_some() {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        "--from takes a tar or a directory to add, not a whole image",
                    ));
                }
                self.image_layers(image, &mut ground, &mut outcomes)?;
                ground.config = image.config().clone();
                // What is built on it adds steps of its own.
                ground.config.settle_history(image.layers().len());
            }
            Source::Tar(tar) => {
                let progress = self.watch.begin(&shown, tar.size());
                let reader = tar.reader(progress)?;
                let apply = ApplyOptions {
                    whiteouts: ground.has_image,
                    ..ApplyOptions::default()
                };
                let outcome =
                    self.layer(&ground, file_origin(path), None, None, |dir, aside| {
                        apply_layer_aside(reader, dir, aside, &apply)
                            .map(drop)
                            .map_err(|error| error.context(&shown))
                    })?;
                self.added(&mut ground, &mut outcomes, outcome, path);
            }
            Source::Directory(directory) => {
                let progress = self.watch.begin(&shown, None);
                let outcome =
                    self.layer(&ground, file_origin(path), None, None, |dir, aside| {
                        copy_tree_aside(directory, dir, aside, progress).map(drop)
                    })?;
                self.added(&mut ground, &mut outcomes, outcome, path);
            }
            Source::Disk(_) | Source::Layers(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "a disk image or layer file is not a layer of files",
                ));
            }
        }
        let image = ImageRecord {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            layers: ground.layers,
            disk: DiskInfo {
                virtual_size: ground.virtual_size,
                device_size: None,
                fs: Some(ground.fs),
                holds: None,
            },
            config: ground.config,
            created: now(),
        };
        Ok((image, outcomes))
    }

    /// A layer of loose files was made: it goes on the stack and into the history.
    fn added(
        &self,
        ground: &mut Ground,
        outcomes: &mut Vec<LayerOutcome>,
        outcome: LayerOutcome,
        path: &Path,
    ) {
        self.watch.done();
        ground.layers.push(outcome.layer);
        ground.config.history.push(imported(path));
        outcomes.push(outcome);
    }

    fn image_layers(
        &self,
        image: &Image,
        ground: &mut Ground,
        outcomes: &mut Vec<LayerOutcome>,
    ) -> Result<()> {
        let base_key = ground.key.clone().unwrap_or_default();
        let chain_ids = chain_ids(image.diff_ids());
        for (index, (layer, chain_id)) in image.layers().iter().zip(chain_ids).enumerate() {
            let short: String = layer
                .diff_id
                .chars()
                .skip("sha256:".len())
                .take(12)
                .collect();
            let key = format!("{base_key}/{chain_id}");
            let parent = ground.top();
            let diff_id = Some(layer.diff_id.clone());
            let outcome = match self.store.find_layer(parent, &key, self.pin)? {
                Some(found) => {
                    self.watch.exists(&short);
                    let bytes = self.store.layer_info(found)?.bytes;
                    LayerOutcome {
                        diff_id,
                        layer: found,
                        existed: true,
                        bytes,
                    }
                }
                None => {
                    let progress = self.watch.begin(&short, Some(layer.size));
                    let reader = image.open_layer(index, progress)?;
                    let origin = format!("layer {}", layer.diff_id);
                    let outcome =
                        self.layer(ground, origin, diff_id, Some(key), |dir, aside| {
                            apply_layer_aside(reader, dir, aside, &ApplyOptions::default())
                                .map(drop)
                        })?;
                    self.watch.done();
                    outcome
                }
            };
            ground.layers.push(outcome.layer);
            outcomes.push(outcome);
        }
        Ok(())
    }

    fn disk(
        &self,
        name: &str,
        disk: &DiskImage,
        options: &ImportOptions,
    ) -> Result<(ImageRecord, Vec<LayerOutcome>)> {
        if options.from.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "--from takes a tar or a directory to add, not a disk image",
            ));
        }
        let fs = mountable(disk)?;
        let fixed = fs.as_ref().and_then(|fs| fs.fixed.as_ref());
        let least = disk.size.next_multiple_of(BLOCK_SIZE);
        let virtual_size = options.size.unwrap_or(least);
        if let (Some(why), true) = (fixed, virtual_size > least) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "its file system cannot be made larger than its {} bytes, since {why}: leave \
                     --size out",
                    disk.size
                ),
            ));
        }
        if virtual_size < least {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("--size {virtual_size} is smaller than the disk image ({least} bytes)"),
            ));
        }
        let staged = self.store.stage_layer(None, virtual_size)?;
        let layer = open_staged(self.store, &staged)?;
        let shown = disk.path.display().to_string();
        let mut progress = self.watch.begin(&shown, Some(disk.size));
        raw::copy_in(&layer, disk, |bytes| {
            if let Some(progress) = &mut progress {
                progress(bytes);
            }
        })?;
        let bytes = layer.data_blocks().bytes();
        let info = LayerInfo {
            origin: file_origin(&disk.path),
            ..LayerInfo::default()
        };
        let layer = finish_layer(staged, layer, info, self.pin)?;
        self.watch.done();
        let mut config = ImageConfig::for_host();
        config.history.push(imported(&disk.path));
        let image = ImageRecord {
            name: name.to_owned(),
            id: Uuid::new_v4(),
            layers: vec![layer],
            disk: DiskInfo {
                virtual_size,
                device_size: (options.size.is_none() && disk.size < virtual_size)
                    .then_some(disk.size),
                fs,
                holds: disk.holds.as_ref().map(Holds::to_string),
            },
            config,
            created: now(),
        };
        let outcome = LayerOutcome {
            diff_id: None,
            layer,
            existed: false,
            bytes,
        };
        Ok((image, vec![outcome]))
    }
}

/// The file system of a disk image, where it can be mounted.
fn mountable(disk: &DiskImage) -> Result<Option<FsInfo>> {
    let kind = match &disk.holds {
        // The kernel's ext4 mounts all three.
        Some(Holds::FileSystem(kind)) if matches!(&kind[..], "ext2" | "ext3" | "ext4") => kind,
        _ => return Ok(None),
    };
    let mut superblock = [0; Superblock::LEN];
    disk.read_at(&mut superblock, Superblock::AT)?;
    let fixed = Superblock::parse(&superblock)?.fixed();
    Ok(Some(FsInfo {
        kind: kind.clone(),
        fixed: fixed.map(str::to_owned),
    }))
}

/// The virtual size of an image whose size nobody says: the usual one, and for content that would
/// fill most of it as much on top of the content.
fn size_for(content: Measure) -> u64 {
    // An archive may say anything of its files; what no layer holds is refused as such later.
    let blocks = content.bytes.saturating_add(content.bytes / 8);
    let inodes = content.files.saturating_mul(ext4::BYTES_PER_INODE);
    let need = blocks.max(inodes);
    if need <= DEFAULT_SIZE / 4 * 3 {
        return DEFAULT_SIZE;
    }
    (need.min(MAX_VIRTUAL_SIZE) + DEFAULT_SIZE).next_multiple_of(1 << 30)
}

fn file_origin(path: &Path) -> String {
    if path.as_os_str() == "-" {
        return "vellum import (standard input)".into();
    }
    format!(
        "vellum import {}",
        path.file_name().unwrap_or(path.as_os_str()).display()
    )
}

/// The step of the history that added `path`.
fn imported(path: &Path) -> HistoryEntry {
    HistoryEntry {
        created: Some(now()),
        created_by: Some(file_origin(path)),
        ..HistoryEntry::default()
    }
}
