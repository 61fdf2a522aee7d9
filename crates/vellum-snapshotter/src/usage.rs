//! What snapshots take: bytes of blocks, and inodes.

use uuid::Uuid;

use super::Snapshotter;
use super::failure::{Result, request};
use vellum_base::block::{BLOCK_LEN, Block, Blocks};
use vellum_core::layer::{SealedLayer, data_blocks_on_disk};
use vellum_fs::superblock::Superblock;
use vellum_store::{SnapshotKind, SnapshotRecord};

/// What a snapshot takes by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Bytes of data in its own layers.
    pub bytes: u64,
    /// Inodes in use beyond those of its parent; 0 where they were not counted.
    pub inodes: u64,
}

impl Snapshotter {
    /// What the snapshot takes beyond what it was made from.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::NotFound`].
    pub fn usage(&self, key: &str) -> Result<SnapshotUsage> {
        let record = request(self.index.get(key))?;
        Ok(self.usage_of(&record)?)
    }

    fn usage_of(&self, record: &SnapshotRecord) -> vellum_base::Result<SnapshotUsage> {
        let (inodes, top_blocks) = match record.kind {
            SnapshotKind::View => (None, None),
            SnapshotKind::Committed => (record.inodes, None),
            SnapshotKind::Active => {
                let stats = self.mounts.stats(record.id).ok();
                let inodes = self.mounts.inodes(record.id).ok();
                (inodes, stats.map(|stats| stats.top_blocks))
            }
        };
        // What programs wrote and the kernel has not: they have used it all the same.
        let delayed = match record.kind {
            SnapshotKind::Active => self.mounts.delayed_bytes(record.id),
            _ => 0,
        };
        let inodes = inodes.zip(record.base_inodes);
        Ok(SnapshotUsage {
            bytes: self.bytes_of(record, top_blocks)? + delayed,
            // More may have been deleted than made.
            inodes: inodes.map_or(0, |(now, before)| now.saturating_sub(before)),
        })
    }

    /// Bytes of data in a snapshot's own layers. Of an active one `top_blocks` is what its server
    /// says of the top; without a server the map on disk is all there is.
    pub(super) fn bytes_of(
        &self,
        record: &SnapshotRecord,
        top_blocks: Option<u64>,
    ) -> vellum_base::Result<u64> {
        let (top, below) = match (record.kind, record.layers.split_last()) {
            (SnapshotKind::Committed, _) => return Ok(record.bytes),
            (SnapshotKind::View, _) | (SnapshotKind::Active, None) => return Ok(0),
            (SnapshotKind::Active, Some(layers)) => layers,
        };
        let top_blocks = match top_blocks {
            Some(blocks) => Blocks::new(blocks),
            None => data_blocks_on_disk(&**self.store.storage(), &self.store.layer_dir(*top))?,
        };
        Ok(top_blocks.bytes() + self.sealed_bytes(below)?)
    }

    /// Bytes of data in sealed layers.
    pub(super) fn sealed_bytes(&self, layers: &[Uuid]) -> vellum_base::Result<u64> {
        let mut bytes = 0;
        for layer in layers {
            let dir = self.store.layer_dir(*layer);
            let sealed = SealedLayer::open(&**self.store.storage(), &dir)?;
            bytes += sealed.data_blocks().bytes();
        }
        Ok(bytes)
    }

    /// Inodes in use in an empty file system.
    #[expect(clippy::indexing_slicing, reason = "a block has 4096 bytes")]
    pub(super) fn template_inodes(&self, layer: Uuid) -> vellum_base::Result<u64> {
        let dir = self.store.layer_dir(layer);
        let sealed = SealedLayer::open(&**self.store.storage(), &dir)?;
        let mut block = vec![0; BLOCK_LEN];
        sealed.read_blocks(&mut block, Block::FIRST)?;
        Superblock::parse(&block[1024..2048])
            .map(|superblock| superblock.inodes_used)
            .map_err(|error| error.context(dir.display()))
    }
}
