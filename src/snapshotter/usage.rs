//! What snapshots take: bytes of blocks, and inodes.

use uuid::Uuid;

use super::Snapshotter;
use super::operations::{Result, request};
use crate::block::{BLOCK_LEN, BLOCK_SIZE};
use crate::fs::superblock::Superblock;
use crate::layer::{SealedLayer, data_blocks_on_disk};
use crate::store::{SnapshotKind, SnapshotRecord};

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
    /// [`crate::ErrorKind::NotFound`].
    pub fn usage(&self, key: &str) -> Result<SnapshotUsage> {
        let record = request(self.index.get(key))?;
        Ok(self.usage_of(&record)?)
    }

    fn usage_of(&self, record: &SnapshotRecord) -> crate::Result<SnapshotUsage> {
        let inodes = match record.kind {
            SnapshotKind::View => None,
            SnapshotKind::Committed => record.inodes,
            SnapshotKind::Active => self.mounts.inodes(record.id).ok(),
        };
        let inodes = inodes.zip(record.base_inodes);
        let bytes = match record.kind {
            SnapshotKind::View => 0,
            SnapshotKind::Committed => record.bytes,
            SnapshotKind::Active => match record.layers.split_last() {
                None => 0,
                Some((top, below)) => {
                    let blocks = match self.mounts.stats(record.id) {
                        Ok(stats) => stats.top_blocks,
                        // Nobody serves it: the map on disk is all there is.
                        Err(_) => {
                            let dir = self.store.layer_dir(*top);
                            data_blocks_on_disk(&**self.store.storage(), &dir)?
                        }
                    };
                    blocks * BLOCK_SIZE + self.sealed_bytes(below)?
                }
            },
        };
        Ok(SnapshotUsage {
            bytes,
            // More may have been deleted than made.
            inodes: inodes.map_or(0, |(now, before)| now.saturating_sub(before)),
        })
    }

    /// Bytes of data in sealed layers.
    pub(super) fn sealed_bytes(&self, layers: &[Uuid]) -> crate::Result<u64> {
        let mut bytes = 0;
        for layer in layers {
            let dir = self.store.layer_dir(*layer);
            let sealed = SealedLayer::open(&**self.store.storage(), &dir)?;
            bytes += sealed.data_blocks() * BLOCK_SIZE;
        }
        Ok(bytes)
    }

    /// Inodes in use in an empty file system.
    pub(super) fn template_inodes(&self, layer: Uuid) -> crate::Result<u64> {
        let dir = self.store.layer_dir(layer);
        let sealed = SealedLayer::open(&**self.store.storage(), &dir)?;
        let mut block = vec![0; BLOCK_LEN];
        sealed.read_blocks(&mut block, 0)?;
        let superblock = block.get(1024..2048).unwrap_or_default();
        Superblock::parse(superblock)
            .map(|superblock| superblock.inodes_used)
            .map_err(|error| error.context(dir.display()))
    }
}
