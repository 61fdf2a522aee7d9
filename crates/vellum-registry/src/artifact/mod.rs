//! The block artifact: what of a layer lies where, and its bytes in frames that can be fetched one by one.
//! docs/registry.md, "The artifact".

mod bytes;
mod data;
mod hot;
mod keys;
mod table;

pub use data::{ChunkReader, Encoded, LayerEncoder};
pub use hot::{HOT_HEADER_LEN, HotFrame, HotPack, MAX_HOT_FRAMES};
pub use keys::{ChunkKey, LayerKey, Salt};
pub use table::{Chunk, MAX_TABLE, Table, Window, power_for};

/// The `artifactType` of an image's block layers.
pub const ARTIFACT_TYPE: &str = "application/vnd.vellum.image.v1";
/// The type of an artifact's configuration.
pub const CONFIG_TYPE: &str = "application/vnd.vellum.image.config.v1+json";
/// The type of an encrypted artifact's configuration: an age file of JSON.
pub const ENCRYPTED_CONFIG_TYPE: &str = "application/vnd.vellum.image.config.v1+json+age";
/// The type of a table.
pub const TABLE_TYPE: &str = "application/vnd.vellum.layer.table.v1";
/// The type of a data blob.
pub const DATA_TYPE: &str = "application/vnd.vellum.layer.data.v1+zstd";
/// The type of a pack of what a start needs first.
pub const HOT_TYPE: &str = "application/vnd.vellum.hot.v1+zstd";

/// On an image's manifest: the digest of its artifact.
pub const BLOCKS_ANNOTATION: &str = "dev.vellum.blocks.digest";
/// On an artifact's entry of an index: the digest of the image's manifest.
pub const IMAGE_ANNOTATION: &str = "dev.vellum.image.digest";
/// On a table: the digest of its layer.
pub const DIGEST_ANNOTATION: &str = "dev.vellum.layer.digest";
/// On a table: the virtual size of its layer in bytes.
pub const SIZE_ANNOTATION: &str = "dev.vellum.layer.virtual-size";
/// On a table: the key of the empty file system that the layer is.
pub const TEMPLATE_ANNOTATION: &str = "dev.vellum.layer.template";
/// On a table: the diff_id of the tar with the same changes.
pub const DIFF_ID_ANNOTATION: &str = "dev.vellum.layer.diff-id";
/// The most layers of an artifact.
pub const MAX_LAYERS: usize = 4096;
