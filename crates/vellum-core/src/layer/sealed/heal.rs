//! Blocks of a sealed layer that the disk lost or changed are written again: lazy.md, "Healing".

use std::path::{Path, PathBuf};

use super::super::data::DataFiles;
use super::super::table::{DIGEST_LEN, Table};
use super::{SEAL_FILE, SealedLayer, SealedMap};
use vellum_base::block::{BLOCK_LEN, Block, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage};

/// A sealed layer, open so that its damaged blocks can be written again, with nothing but what they held when it was
/// sealed. Others may read it meanwhile.
#[derive(Debug)]
pub struct Healer {
    dir: PathBuf,
    table: Table,
    data: DataFiles,
}

impl Healer {
    /// Opens a layer; `None` for one that has no checksums, of which nobody can tell what is damaged.
    ///
    /// # Errors
    /// As [`SealedLayer::open`].
    pub fn open(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>> {
        let SealedLayer { header, map, .. } = SealedLayer::open_unsynced(storage, dir)?;
        let SealedMap::Table(table) = map else {
            return Ok(None);
        };
        Ok(Some(Healer {
            data: DataFiles::open(storage, dir, &header, OpenMode::Write)?,
            dir: dir.to_owned(),
            table,
        }))
    }

    /// The layer's digest.
    pub fn digest(&self) -> [u8; DIGEST_LEN] {
        self.table.digest
    }

    /// Whether the host has these data blocks as they were sealed.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the seal has no checksums for them.
    pub fn is_sound(&self, span: Span) -> Result<bool> {
        for block in span.blocks() {
            if !self.is_here(block, self.sum(block)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn sum(&self, block: Block) -> Result<u32> {
        let sum = self.table.sums(Span::of(block)).map(|mut sums| sums.next());
        let named = || self.dir.join(SEAL_FILE).display().to_string();
        let missing = || Error::new(ErrorKind::Corrupt, format!("no checksum for block {block}"));
        sum.and_then(|sum| sum.ok_or_else(missing)).context(named)
    }

    /// Whether the host has a block with that checksum. One that cannot be read it has not.
    fn is_here(&self, block: Block, sum: u32) -> bool {
        let mut bytes = [0; BLOCK_LEN];
        let read = self.data.read(&mut bytes, block.offset());
        read.is_ok() && crc32fast::hash(&bytes) == sum
    }

    /// Writes those of these data blocks that the host has not as they were sealed. Returns how many.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where these are not what was sealed: none of them is written. Where the host refuses.
    pub fn put(&self, span: Span, bytes: &[u8]) -> Result<Blocks> {
        assert_eq!(
            bytes.len(),
            span.len().buffer_len(),
            "bytes of other blocks"
        );
        let mut damaged = Vec::new();
        for (block, bytes) in span.blocks().zip(bytes.chunks_exact(BLOCK_LEN)) {
            let sum = self.sum(block)?;
            if crc32fast::hash(bytes) != sum {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "{}: what came for block {block} is not what was sealed",
                        self.dir.display()
                    ),
                ));
            }
            if !self.is_here(block, sum) {
                damaged.push((block, bytes));
            }
        }
        for (block, bytes) in &damaged {
            self.data.write(bytes, block.offset())?;
        }
        Ok(Blocks::new(damaged.len() as u64))
    }

    /// Makes durable what was put, and has the next reads come from the disk: one that does not keep it is found out by
    /// [`Healer::is_sound`].
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn sync(&self) -> Result<()> {
        self.data.drop_cache()
    }
}
