//! The empty file system that every image of one size begins with: made once, shared by all.

use uuid::Uuid;

use super::complete::finish_layer;
use super::raw;
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::LockMode;
use vellum_core::layer::{LayerOptions, WritableLayer};
use vellum_fs::ext4::{self, MakeOptions};
use vellum_image::DiskImage;
use vellum_store::{FsInfo, LayerInfo, Store, StoreGuard, TemplateRecord};

/// Changes whenever the options of the file system do, or how layers are written on it, so that old and new
/// layers do not mix. From 3 on they are [laid out](vellum_fs::unmounted::lay_out).
const VERSION: u32 = 3;

/// The beginning of every template's key. The keys of image layers go on from there with a slash.
const KEY: &str = "ext4-v";

/// How many of an image's layers, from the bottom up, are the driver's own: the empty file system
/// that its files lie in, which no step of its history made.
pub fn count(store: &Store, layers: &[Uuid]) -> usize {
    let is_template = |layer: &&Uuid| {
        let key = store
            .layer_info(**layer)
            .ok()
            .and_then(|info| info.chain_key);
        key.is_some_and(|key| is_key(&key))
    };
    layers.iter().take(1).filter(is_template).count()
}

/// True for the chain key of a template. No import looks for a layer by such a key.
pub fn is_key(key: &str) -> bool {
    key.starts_with(KEY) && !key.contains('/')
}

/// The key of the template for file systems of `size` bytes.
pub fn key(size: u64) -> String {
    format!("{KEY}{VERSION}-{size}")
}

/// The template for file systems of `size` bytes, if the store has it.
///
/// # Errors
/// Where its record is damaged.
pub fn find(store: &Store, size: u64) -> Result<Option<TemplateRecord>> {
    store.template(&key(size))
}

/// The template for file systems of `size` bytes; made where the store has none.
pub fn get(store: &Store, size: u64, pin: &StoreGuard) -> Result<TemplateRecord> {
    let key = key(size);
    // One process makes it, the others wait and find it.
    let lock_path = store.root().join("templates").join("lock");
    let _lock = store
        .storage()
        .lock(&lock_path, LockMode::Exclusive, true)
        .context(|| format!("cannot lock {}", lock_path.display()))?;
    if let Some(record) = store.template(&key)? {
        return Ok(record);
    }
    let staged = store.stage_layer(None, size)?;
    let image = staged.dir().join("ext4.img");
    // Equal everywhere, so that equal imports have equal layers.
    let uuid = Uuid::from_u128(0x7665_6c6c_756d_0000_0000_0000_0000_0000 | u128::from(size));
    ext4::make(&image, size, &MakeOptions::new(uuid))?;
    let layer = WritableLayer::open(
        store.storage().clone(),
        &staged.dir(),
        LayerOptions::default(),
    )?;
    raw::copy_in(&layer, &DiskImage::of_file(&image)?, |_| {})?;
    std::fs::remove_file(&image).context(|| format!("cannot remove {}", image.display()))?;
    let info = LayerInfo {
        origin: format!("empty ext4 of {size} bytes"),
        chain_key: Some(key.clone()),
        ..LayerInfo::default()
    };
    let layer = finish_layer(staged, layer, info, pin)?;
    let record = TemplateRecord {
        key,
        layer,
        fs: FsInfo {
            fixed: None,
            kind: "ext4".into(),
        },
    };
    store.put_template(&record)?;
    Ok(record)
}
